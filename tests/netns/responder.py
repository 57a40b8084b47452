"""A daemon for tests and the demo: many listening sockets in one process, each of which answers with its own name.

    python -m tests.netns.responder < LIST

LIST has one line for each run of addresses, `FIRST-ADDRESS COUNT PORT`. Once all listen, "listening N" is printed. To
every connection the answer is one line, `ADDRESS PORT CLIENT-ADDRESS CLIENT-PORT`: the address and port that this very
socket was bound to, and the client as seen from here. Then, whatever the client sends is sent back, until it closes;
but after "reset" the connection is reset.
"""

from __future__ import annotations

import contextlib
import ipaddress
import resource
import select
import socket
import sys

IPV6_FREEBIND = 78


def listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # an alias of an anyip pool
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 64)
    listener.bind((address, port))
    listener.listen(256)
    return listener


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    epoll = select.epoll()
    listeners: dict[int, tuple[socket.socket, bytes]] = {}
    clients: dict[int, socket.socket] = {}
    for line in sys.stdin:
        first, count, port = line.split()
        base = ipaddress.ip_address(first)
        for index in range(int(count)):
            listener = listen(str(base + index), int(port))
            listeners[listener.fileno()] = (listener, f"{base + index} {port}".encode())
            epoll.register(listener, select.EPOLLIN)
    print("listening", len(listeners), flush=True)
    while True:
        for fd, _ in epoll.poll():
            if fd in listeners:
                listener, name = listeners[fd]
                with contextlib.suppress(OSError):
                    client, peer = listener.accept()
                    clients[client.fileno()] = client
                    epoll.register(client, select.EPOLLIN)
                    client.send(name + f" {peer[0]} {peer[1]}\n".encode())
            else:
                client = clients[fd]
                data = b""
                with contextlib.suppress(OSError):
                    data = client.recv(65536)
                if data == b"reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    data = b""
                if data:
                    client.setblocking(True)
                    with contextlib.suppress(OSError):
                        client.sendall(data)
                    client.setblocking(False)
                else:
                    del clients[fd]
                    client.close()


if __name__ == "__main__":
    main()
