"""The demo's third act, DNS: many name servers in one process, each on its own alias, and a resolver with one socket.

    python -m tests.demo.dns daemons FIRST-ALIAS COUNT PORT
    python -m tests.demo.dns client ADDRESS PORT NAME ...

Once all daemons are there, "listening N" is printed. Each answers every question with one address, that of the alias
that it is bound to. The client asks every name from one socket, a few at a time, and prints one line for each answer,
`NAME ADDRESS`; names that stay without one are said on standard error.
"""

from __future__ import annotations

import contextlib
import ipaddress
import selectors
import socket
import struct
import sys

from tests.netns.datagram_flood import query

_AT_A_TIME = 16
_TRIES = 5
_PATIENCE = 1.0
_QUESTION = 12
_RECORD = struct.Struct("!HHHIH4s")
"""RFC 1035 section 4.1.3, for an IPv4 address whose name is the question's."""


def answer(asked: bytes, alias: str) -> bytes:
    """The response to a query (RFC 1035 section 4.1) of one question."""
    header = asked[:2] + struct.pack("!5H", 0x8580, 1, 1, 0, 0)
    return header + asked[_QUESTION:] + _RECORD.pack(0xC000 | _QUESTION, 1, 1, 0, 4, socket.inet_aton(alias))


def daemons(first: str, count: str, port: str) -> None:
    """Serve for ever."""
    selector = selectors.DefaultSelector()
    for index in range(int(count)):
        alias = str(ipaddress.ip_address(first) + index)
        daemon = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        daemon.bind((alias, int(port)))
        selector.register(daemon, selectors.EVENT_READ, alias)
    print("listening", count, flush=True)
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            # An ICMP error to an earlier answer: the client is gone.
            with contextlib.suppress(OSError):
                asked, peer = key.fileobj.recvfrom(4096)
                key.fileobj.sendto(answer(asked, key.data), peer)


def client(address: str, port: str, *names: str) -> None:
    """Ask every name until it is answered."""
    resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    resolver.connect((address, int(port)))
    resolver.settimeout(_PATIENCE)
    unasked = list(enumerate(names))
    unasked.reverse()
    waiting: dict[int, str] = {}
    tries = 0
    while (unasked or waiting) and tries < _TRIES:
        while unasked and len(waiting) < _AT_A_TIME:
            number, name = unasked.pop()
            waiting[number] = name
            resolver.send(struct.pack("!H", number) + query(name)[2:])
        try:
            response = resolver.recv(4096)
        except TimeoutError:
            tries += 1
            unasked += waiting.items()
            waiting.clear()
            continue
        tries = 0
        said = waiting.pop(int.from_bytes(response[:2]), None)
        if said is not None:
            print(said, socket.inet_ntoa(response[-4:]), flush=True)
    for name in waiting.values():
        print(f"{name}: no answer", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1] == "daemons":
        daemons(*sys.argv[2:])
    else:
        client(*sys.argv[2:])
