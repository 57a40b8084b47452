"""A daemon that nobody asks for: on the wildcard address, on the ports that clients use, TCP and UDP, IPv4 and IPv6.

    python3 -m tests.lab.trap PORT ...

Whoever reaches it was delivered wrong: it says so on standard output, and answers "trap". Tells systemd when it
listens. Runs before anything else of the lab is there, and so uses nothing but Python itself.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys


def listen(family: socket.AddressFamily, kind: socket.SocketKind, port: int) -> socket.socket:
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("", port))
    if kind == socket.SOCK_STREAM:
        listener.listen()
    return listener


def answer(listener: socket.socket) -> None:
    """Whoever has come."""
    port = listener.getsockname()[1]
    if listener.type == socket.SOCK_DGRAM:
        _, peer = listener.recvfrom(65536)
        print(f"reached by {peer[0]} at {port}/udp", flush=True)
        listener.sendto(b"trap", peer)
        return
    client, peer = listener.accept()
    print(f"reached by {peer[0]} at {port}/tcp", flush=True)
    with client:
        client.sendall(b"trap\n")


def tell_systemd() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(os.environ["NOTIFY_SOCKET"])
        notify.send(b"READY=1")


def main() -> None:
    selector = selectors.DefaultSelector()
    for port in map(int, sys.argv[1:]):
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                selector.register(listen(family, kind, port), selectors.EVENT_READ)
    tell_systemd()
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            with contextlib.suppress(OSError):  # who has gone again
                answer(key.fileobj)


if __name__ == "__main__":
    main()
