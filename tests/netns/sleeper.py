"""A daemon for tests that is woken: `python3 -I -S sleeper.py LOG PORT INDEX NAME`, a program of its own.

It listens on the aliases INDEX of 10.64.0.0/22 and fd00:64::/118, TCP and UDP, after it has written a line into LOG:
its index and name, its process, and what it may do. To every connection and datagram it answers `NAME ADDRESS PORT` and
a line end. Two indices are special: SLOW takes a second before it listens, and DEAF never does.
"""

import ipaddress
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

SLOW, DEAF = 500, 501
_ADDRESSES = (ipaddress.ip_address("10.64.0.0"), ipaddress.ip_address("fd00:64::"))


def _status(name: str) -> str:
    with open("/proc/self/status") as status:
        return next(line.split(":")[1].strip().replace("\t", ",") for line in status if line.startswith(name + ":"))


def main() -> None:
    log, port, index, name = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    descriptors = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()]
    facts = [index, name, os.getpid(), _status("Uid"), _status("Groups"), os.getpgrp() == os.getpid()]
    facts += [_status(f"Cap{kind}") for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")] + [_status("NoNewPrivs")]
    facts += [len(descriptors), Path("/proc/self/fd/0").readlink()]
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, (" ".join(str(fact).replace(" ", ",") for fact in facts) + "\n").encode())
    os.close(descriptor)
    if index == DEAF:
        signal.pause()
    if index == SLOW:
        time.sleep(1)
    selector = selectors.DefaultSelector()
    for base in _ADDRESSES:
        address = str(base + index)
        family = socket.AF_INET if base.version == 4 else socket.AF_INET6
        answer = f"{name} {address} {port}\n".encode()
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            daemon = socket.socket(family, kind)
            daemon.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            daemon.bind((address, port))
            if kind == socket.SOCK_STREAM:
                daemon.listen(256)
            selector.register(daemon, selectors.EVENT_READ, (kind, answer))
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            daemon = key.fileobj
            kind, answer = key.data
            if kind is None:
                if not daemon.recv(65536):
                    selector.unregister(daemon)
                    daemon.close()
            elif kind == socket.SOCK_STREAM:
                client, _ = daemon.accept()
                client.sendall(answer)
                selector.register(client, selectors.EVENT_READ, (None, b""))
            else:
                _, peer = daemon.recvfrom(65536)
                daemon.sendto(answer, peer)


if __name__ == "__main__":
    main()
