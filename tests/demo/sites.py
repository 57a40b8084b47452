"""Daemons of the demo's second act: many web servers in one process, each with a listening socket on its own alias.

    python -m tests.demo.sites FIRST-ALIAS COUNT PORT [CERTIFICATE]

With a CERTIFICATE (a PEM file that holds the key too) they speak HTTP over TLS, else HTTP. Once all listen, "listening
N" is printed. The body of every answer is `ALIAS PORT CLIENT-ADDRESS HOST`: the address and port that this very socket
was bound to, the client as seen from here, and the host that the request asked for, without its port.
"""

from __future__ import annotations

import contextlib
import ipaddress
import selectors
import socket
import ssl
import sys

from tests.netns.responder import listen

_PATIENCE = 15.0
_LONGEST_HEAD = 65536


def main() -> None:
    first, count, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    tls = None
    if len(sys.argv) > 4:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(sys.argv[4])
    selector = selectors.DefaultSelector()
    for index in range(count):
        selector.register(listen(str(ipaddress.ip_address(first) + index), port), selectors.EVENT_READ)
    print("listening", count, flush=True)
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            # A client that breaks off misses its answer, and is what finds it out.
            with contextlib.suppress(OSError):
                _serve(key.fileobj, tls)


def _serve(listener: socket.socket, tls: ssl.SSLContext | None) -> None:
    """Accept one client and answer its one request."""
    alias, port = listener.getsockname()[:2]
    connection, peer = listener.accept()
    with connection:
        connection.settimeout(_PATIENCE)
        if tls is None:
            _answer(connection, f"{alias} {port} {peer[0]}")
        else:
            with tls.wrap_socket(connection, server_side=True) as encrypted:
                _answer(encrypted, f"{alias} {port} {peer[0]}")


def _answer(connection: socket.socket, who: str) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        data = connection.recv(4096)
        if not data or len(head) > _LONGEST_HEAD:
            return
        head += data
    fields = dict(line.lower().split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:] if ": " in line)
    body = f"{who} {fields.get('host', '').partition(':')[0]}"
    connection.sendall(f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode("latin-1"))


if __name__ == "__main__":
    main()
