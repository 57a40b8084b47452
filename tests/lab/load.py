"""Clients of the lab that connect one after the other, each by the next way and to the next daemon, and check who
answers; until standard input ends.

    python -m tests.lab.load CERTIFICATE

To be run on one of the lab's clients, as root. Prints {"right": n, "wrong": n, "failed": n} at the end, and on standard
error what was wrong or failed.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import random
import select
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from steerd import client

ENDPOINT4, ENDPOINT6 = "203.0.113.10", "2001:db8::10"
FIRST_TENANT = {4: ipaddress.ip_address("10.64.0.0"), 6: ipaddress.ip_address("fd00:64::")}
TENANTS = 256
NAMES = 4
# What is dropped is sent again after 1, 3, 7, 15, 31 and 63 seconds; a gateway that is emulated may take a minute to
# start.
PATIENCE = 120.0


class Answer(NamedTuple):
    """What was asked for, who should have answered, and what came."""

    what: str
    expected: str
    came: str

    @property
    def is_right(self) -> bool:
        return self.came.startswith(self.expected)

    @property
    def is_wrong(self) -> bool:
        """Somebody else answered, or nobody can tell who. A daemon that ends may cut its answer short."""
        return not self.expected.startswith(self.came) and not self.is_right


def endpoint(version: int) -> str:
    return ENDPOINT4 if version == 4 else ENDPOINT6


def own_address(version: int) -> str:
    """This client's, as the gateway sees it."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    address, _ = client.route(family, (endpoint(version), 9))
    return str(address[0])


def line(connection: socket.socket) -> str:
    """One line, and nothing of what follows it; or what came before the end."""
    came = b""
    while not came.endswith(b"\n") and (data := connection.recv(1)):
        came += data
    return came.decode("latin-1").strip()


def tenant(version: int, index: int) -> str:
    return f"{FIRST_TENANT[version] + index} 8080 "


def early(version: int, extension: int, via: Literal["ip", "tcp"] = "ip") -> Answer:
    """By a port extension: the n-th belongs to the n-th alias."""
    address = (endpoint(version), 80)
    with client.connect(address, extension=extension, timeout=PATIENCE, via=via) as connection:
        came = line(connection)
    expected = tenant(version, extension - 1) + own_address(version) + " "
    return Answer(f"extension {extension} by IPv{version} ({via})", expected, came)


def late(version: int, number: int, index: int | None = None) -> Answer:
    """By the host of an HTTP request, in two segments; `index`: of the alias, if it is not `number`."""
    with socket.create_connection((endpoint(version), 80), PATIENCE) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: ")
        connection.sendall(f"s{number}.example\r\n\r\n".encode())
        came = line(connection)
    expected = tenant(version, number if index is None else index) + own_address(version) + " "
    return Answer(f"host {number} by IPv{version}", expected, came)


def tls(version: int, name: str, daemon: str, trusted: ssl.SSLContext) -> Answer:
    """By the server name of a whole TLS handshake, its certificate checked, and an HTTP request in it."""
    with (
        socket.create_connection((endpoint(version), 443), PATIENCE) as connection,
        trusted.wrap_socket(connection, server_hostname=name) as encrypted,
    ):
        encrypted.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        came = b""
        while data := encrypted.recv(4096):
            came += data
    body = came.decode("latin-1").partition("\r\n\r\n")[2]
    return Answer(f"TLS name {name} by IPv{version}", f"{daemon} 8443 {own_address(version)} {name}", body)


def site(version: int, number: int) -> str:
    return f"10.65.0.{number}" if version == 4 else f"fd00:65::{number}"


def ways(trusted: ssl.SSLContext) -> Iterator[Callable[[], Answer]]:
    """One connection after the other, for ever: early, late by host, early by TCP option, late by TLS name."""
    chosen = random.Random()
    for version in itertools.cycle((4, 6)):
        extension, number = chosen.randint(1, TENANTS), chosen.randint(1, NAMES - 1)
        yield partial(early, version, extension)
        yield partial(late, version, number)
        yield partial(early, version, extension, "tcp")
        yield partial(tls, version, f"s{number}.example", site(version, number), trusted)


def main() -> None:
    trusted = ssl.create_default_context(cafile=sys.argv[1])
    counts = Counter({"right": 0, "wrong": 0, "failed": 0})
    for ask in ways(trusted):
        try:
            answer = ask()
        except OSError as error:
            counts["failed"] += 1
            print(f"failed: {error!r}", file=sys.stderr, flush=True)
        else:
            found = "right" if answer.is_right else "wrong" if answer.is_wrong else "failed"
            counts[found] += 1
            if not answer.is_right:
                print(f"{found}: {answer}", file=sys.stderr, flush=True)
        if select.select([sys.stdin], [], [], 0.02)[0]:
            break
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
