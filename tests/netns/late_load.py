"""A client that makes many late connections from few ports, and checks who answers each, and that all of it comes back.

    python -m tests.netns.late_load VERSION PORT HOSTS COUNT SEED FIRST-SOURCE-PORT SOURCE-PORTS

Each connection asks one of HOSTS names, h0.example .. (whose daemon is the alias of that number), from one of
SOURCE-PORTS ports, which is used again at once for another name: after a FIN from either side, or after a reset. Prints
"GOOD WRONG FAILED ECHOED-TWICE"; what was wrong goes to standard error.
"""

from __future__ import annotations

import random
import socket
import sys

from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6

RESET = b"\1\0\0\0\0\0\0\0"


def connect(version: int, port: int, source_port: int) -> socket.socket:
    client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
    client.settimeout(20)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind((CLIENT4 if version == 4 else CLIENT6, source_port))
    client.connect((ENDPOINT4 if version == 4 else ENDPOINT6, port))
    return client


def exchange(client: socket.socket, request: bytes, *, reset: bool) -> tuple[str, int]:
    """The address of the daemon that answered, and how many bytes came back after its line."""
    client.sendall(request)
    answer = b""
    while answer.count(b"\n") < 1 or len(answer.partition(b"\n")[2]) < len(request):
        data = client.recv(4096)
        if not data:
            raise ConnectionError(f"closed after {answer!r}")
        answer += data
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    else:
        client.shutdown(socket.SHUT_WR)
        while data := client.recv(4096):
            answer += data
    line, _, echoed = answer.partition(b"\n")
    return line.decode().split()[0], len(echoed)


def main() -> None:
    version, port, hosts, count, seed, first, ports = map(int, sys.argv[1:8])
    chosen = random.Random(seed)
    alias = "10.64.1.{}" if version == 4 else "fd00:64::1:{:x}"
    good = wrong = failed = twice = 0
    for turn in range(count):
        number = chosen.randrange(hosts)
        request = f"GET /{turn} HTTP/1.1\r\nHost: h{number}.example\r\n\r\n".encode()
        try:
            with connect(version, port, first + turn % ports) as client:
                name, echoed = exchange(client, request, reset=chosen.random() < 0.5)
        except OSError as error:
            failed += 1
            print(f"{turn}: {error}", file=sys.stderr)
            continue
        if name == alias.format(number):
            good += 1
            twice += echoed != len(request)
        else:
            wrong += 1
            print(f"{turn}: h{number}.example answered by {name}", file=sys.stderr)
    print(good, wrong, failed, twice, flush=True)


if __name__ == "__main__":
    main()
