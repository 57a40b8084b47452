"""A daemon for tests: many UDP sockets in one process, each of which answers with its own name.

    python -m tests.netns.udp_responder < LIST

LIST is as that of tests.netns.responder. To every datagram the answer is `ADDRESS PORT CLIENT-ADDRESS CLIENT-PORT `,
and behind it what the client sent. A datagram that begins with "later" is answered after so many seconds as follow, one
that begins with "size" by so many bytes, with the don't-fragment bit.
"""

from __future__ import annotations

import ipaddress
import resource
import selectors
import socket
import sys
import threading

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


def answer(daemon: socket.socket, name: str) -> None:
    try:
        data, peer = daemon.recvfrom(65536)
        said = f"{name} {peer[0]} {peer[1]} ".encode() + data
        if data.startswith(b"later"):
            threading.Timer(float(data[5:]), daemon.sendto, (said, peer)).start()
        elif data.startswith(b"size"):
            daemon.sendto(said.ljust(int(data[4:]), b"."), peer)
        else:
            daemon.sendto(said, peer)
    except OSError as error:  # an ICMP error to an earlier answer, or a path that takes no datagram as large
        print(name, error, flush=True)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
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
            answer(key.fileobj, key.data)


if __name__ == "__main__":
    main()
