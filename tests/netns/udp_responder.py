"""A daemon for tests: many UDP sockets in one process, each of which answers with its own name.

    python -m tests.netns.udp_responder < LIST

LIST is as that of tests.netns.responder. To every datagram the answer is `ADDRESS PORT CLIENT-ADDRESS CLIENT-PORT `,
and behind it what the client sent. A datagram that begins with "held" is reported on standard output, and answered at
SIGUSR1; one that begins with "size" is answered by so many bytes, with the don't-fragment bit.
"""

from __future__ import annotations

import ipaddress
import resource
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
IPV6_MTU_DISCOVER, IPV6_FREEBIND = 23, 78


def bind(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    daemon = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        daemon.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        daemon.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        daemon.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IP_PMTUDISC_DO)
    else:
        daemon.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    daemon.bind((address, port))
    return daemon


def answer(daemon: socket.socket, name: str, held: list[Callable[[], object]]) -> None:
    try:
        data, peer = daemon.recvfrom(65536)
        said = f"{name} {peer[0]} {peer[1]} ".encode() + data
        if data.startswith(b"held"):
            held.append(lambda: send(daemon, name, said, peer))
            print("held", flush=True)
        elif data.startswith(b"size"):
            send(daemon, name, said.ljust(int(data[4:]), b"."), peer)
        else:
            send(daemon, name, said, peer)
    except OSError as error:  # an ICMP error to an earlier answer
        print(name, error, flush=True)


def send(daemon: socket.socket, name: str, said: bytes, peer: tuple[Any, ...]) -> None:
    try:
        daemon.sendto(said, peer)
    except OSError as error:  # dropped by a rule, or a path that takes no datagram as large
        print(name, error, flush=True)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: list[Callable[[], object]] = []
    signal.signal(signal.SIGUSR1, lambda *_: [held.pop(0)() for _ in list(held)])
    selector = selectors.DefaultSelector()
    count = 0
    for line in sys.stdin:
        first, size, port = line.split()
        base = ipaddress.ip_address(first)
        for address in (str(base + index) for index in range(int(size))):
            selector.register(bind(address, int(port)), selectors.EVENT_READ, f"{address} {port}")
            count += 1
    print("listening", count, flush=True)
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            answer(key.fileobj, key.data, held)


if __name__ == "__main__":
    main()
