"""A daemon, and a client, that send many bytes one way and compare what arrived with what was sent.

    python -m tests.netns.transfer NAME PORT ADDRESS...      (the daemon; prints "listening")

A client begins with the line `NAME up BYTES` or `NAME down BYTES`. Then that many bytes travel from or to the client.
At last the daemon says, in one line, its name, whom it sees, and the SHA-256 of what it received or sent.
"""

from __future__ import annotations

import hashlib
import random
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = 1 << 18


class Result(NamedTuple):
    """What the daemon says at last."""

    name: str
    address: str
    """Of the daemon's own socket."""
    client: str
    sha256: str


def _blocks(size: int) -> Iterator[bytes]:
    """`size` bytes, no two blocks of them alike: one that is lost, doubled or out of place changes the checksum."""
    filling = random.Random(size).randbytes(_BLOCK - 8)
    for start in range(0, size, _BLOCK):
        yield (start.to_bytes(8, "big") + filling)[: size - start]


def _send(connection: socket.socket, size: int) -> str:
    """Send `size` bytes; their SHA-256."""
    checksum = hashlib.sha256()
    for block in _blocks(size):
        checksum.update(block)
        connection.sendall(block)
    return checksum.hexdigest()


def _receive(connection: socket.socket, size: int) -> str:
    """Receive `size` bytes; their SHA-256."""
    checksum = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    while size:
        got = connection.recv_into(buffer[: min(size, _BLOCK)])
        if not got:
            raise ConnectionError(f"closed {size} bytes before the end")
        checksum.update(buffer[:got])
        size -= got
    return checksum.hexdigest()


def _line(connection: socket.socket) -> str:
    """A line, byte by byte, so that nothing behind it is taken."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError(f"closed after {line!r}")
        line += byte
    return line.decode().strip()


def transfer(connection: socket.socket, name: str, direction: str, size: int) -> Result:
    """Client: one transfer of `size` bytes, "up" or "down", over a connected socket. The daemon's Result; raises
    ValueError if what arrived is not what was sent."""
    connection.sendall(f"{name} {direction} {size}\n".encode())
    checksum = _send(connection, size) if direction == "up" else _receive(connection, size)
    result = Result(*_line(connection).split())
    if result.sha256 != checksum:
        raise ValueError(f"the daemon's checksum of {size} bytes {direction} is {result.sha256}, ours {checksum}")
    return result


def _serve(connection: socket.socket, name: str) -> None:
    with connection:
        asked, direction, size = _line(connection).split()
        assert asked == name, f"{name} was asked for {asked}"
        checksum = _receive(connection, int(size)) if direction == "up" else _send(connection, int(size))
        address, client = connection.getsockname()[0], connection.getpeername()[0]
        connection.sendall(" ".join(Result(name, address, client, checksum)).encode() + b"\n")


def _accept(listener: socket.socket, name: str) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection, name), daemon=True).start()


def main() -> None:
    name, port, *addresses = sys.argv[1:]
    threads = []
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, int(port)), family=family)
        threads.append(threading.Thread(target=_accept, args=(listener, name)))
    for thread in threads:
        thread.start()
    print("listening", flush=True)


if __name__ == "__main__":
    main()
