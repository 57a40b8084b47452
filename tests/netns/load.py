"""A client that opens many connections, each with an extension of its own, and checks the name of each daemon.

    python -m tests.netns.load VERSION PORT FIRST-ALIAS FIRST-EXTENSION LAST-EXTENSION COUNT SEED [PAUSE SOURCE]

PAUSE seconds lie between two connections (0), which come from the address SOURCE (whatever the kernel takes).
Extension n must be answered by the alias FIRST-ALIAS + n - 1. It prints "GOOD WRONG FAILED" at the end; what was wrong
goes to standard error.
"""

from __future__ import annotations

import ipaddress
import random
import socket
import sys
import time

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, NUMBERS


def ask(version: int, port: int, extension: Extension, source: str = "") -> str:
    """The answer of the daemon behind an extension, without its line end."""
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6) as connection:
        connection.settimeout(15)
        if source:
            connection.bind((source, 0))
        if version == 4:
            connection.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, portext.encode_ipv4(extension, NUMBERS))
        else:
            connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, portext.encode_ipv6(extension, NUMBERS))
        connection.connect((ENDPOINT4 if version == 4 else ENDPOINT6, port))
        line = b""
        while not line.endswith(b"\n"):
            data = connection.recv(256)
            if not data:
                raise ConnectionError(f"closed after {line!r}")
            line += data
        return line.decode().strip()


def main() -> None:
    version, port = int(sys.argv[1]), int(sys.argv[2])
    base = ipaddress.ip_address(sys.argv[3])
    first, last, count, seed = map(int, sys.argv[4:8])
    pause, source = (float(sys.argv[8]), sys.argv[9]) if len(sys.argv) > 8 else (0.0, "")
    chosen = random.Random(seed)
    good = wrong = failed = 0
    for _ in range(count):
        extension = chosen.randint(first, last)
        time.sleep(pause)
        try:
            name = ask(version, port, Extension(extension, 0), source).split()[0]
        except OSError as error:
            failed += 1
            print(f"extension {extension}: {error}", file=sys.stderr)
            continue
        if name == str(base + extension - 1):
            good += 1
        else:
            wrong += 1
            print(f"extension {extension}: answered by {name}", file=sys.stderr)
    print(good, wrong, failed, flush=True)


if __name__ == "__main__":
    main()
