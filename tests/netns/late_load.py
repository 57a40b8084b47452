"""A client that makes many late connections from few ports, and checks who answers each, and that all of it comes back.

    python -m tests.netns.late_load VERSION PORT HOSTS COUNT SEED FIRST-SOURCE-PORT SOURCE-PORTS
                                    [ENDINGS [THREADS [STRANGER]]]

Each connection asks one of HOSTS names, h0.example .. (whose daemon is the alias of that number), from one of
SOURCE-PORTS ports, which is used again at once for another name. ENDINGS is how connections end, each by one of them:
"fin" from either side, "reset", or "vanish", without a word, as if the client had lost its power; "fin,reset" if not
given. COUNT connections are shared by THREADS (1), and so are the ports. With STRANGER each connection comes from a
source of its own, that address and the following ones (of IPv6: that /64 and the following ones). Prints "GOOD WRONG
FAILED ECHOED-TWICE"; what was wrong goes to standard error. No two requests of one SEED are alike.
"""

from __future__ import annotations

import ipaddress
import random
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6

RESET = b"\1\0\0\0\0\0\0\0"
TCP_REPAIR = 19


class Tally(NamedTuple):
    """What became of connections."""

    good: int
    wrong: int
    failed: int
    twice: int


class Load(NamedTuple):
    """What the command line says."""

    version: int
    port: int
    hosts: int
    connections: int
    seed: int
    first: int
    ports: int
    endings: tuple[str, ...]
    threads: int
    stranger: str

    def source(self, turn: int) -> str:
        """Where a connection comes from."""
        if not self.stranger:
            return CLIENT4 if self.version == 4 else CLIENT6
        return str(ipaddress.ip_address(self.stranger) + (turn if self.version == 4 else turn << 64))


def alias(version: int, number: int) -> str:
    """The address of the daemon of `h{number}.example`."""
    return f"10.64.1.{number}" if version == 4 else f"fd00:64::1:{number:x}"


def connect(version: int, port: int, source: str, source_port: int) -> socket.socket:
    client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
    client.settimeout(20)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind((source, source_port))
    client.connect((ENDPOINT4 if version == 4 else ENDPOINT6, port))
    return client


def exchange(client: socket.socket, request: bytes, ending: str) -> tuple[str, int]:
    """The address of the daemon that answered, and how many bytes came back after its line. The connection is ended,
    or will be when the socket is closed; with the ending "stay" nothing is done to that end."""
    client.sendall(request)
    answer = b""
    while answer.count(b"\n") < 1 or len(answer.partition(b"\n")[2]) < len(request):
        data = client.recv(4096)
        if not data:
            raise ConnectionError(f"closed after {answer!r}")
        answer += data
    if ending == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    elif ending == "vanish":
        client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    elif ending == "fin":
        client.shutdown(socket.SHUT_WR)
        while data := client.recv(4096):
            answer += data
    line, _, echoed = answer.partition(b"\n")
    return line.decode().split()[0], len(echoed)


def run(load: Load, thread: int) -> Tally:
    """The share of one thread."""
    chosen = random.Random(load.seed * 1000 + thread)
    good = wrong = failed = twice = 0
    own_ports = load.ports // load.threads
    for turn in range(thread, load.connections, load.threads):
        number = chosen.randrange(load.hosts)
        request = f"GET /{load.seed}/{turn} HTTP/1.1\r\nHost: h{number}.example\r\n\r\n".encode()
        source_port = load.first + thread * own_ports + turn // load.threads % own_ports
        try:
            with connect(load.version, load.port, load.source(turn), source_port) as client:
                name, echoed = exchange(client, request, chosen.choice(load.endings))
        except OSError as error:
            failed += 1
            print(f"{load.seed}/{turn} from {source_port}: {error}", file=sys.stderr)
            continue
        if name == alias(load.version, number):
            good += 1
            twice += echoed != len(request)
        else:
            wrong += 1
            print(f"{load.seed}/{turn}: h{number}.example answered by {name}", file=sys.stderr)
    return Tally(good, wrong, failed, twice)


def main() -> None:
    version, port, hosts, count, seed, first, ports = map(int, sys.argv[1:8])
    endings = tuple(sys.argv[8].split(",")) if len(sys.argv) > 8 else ("fin", "reset")
    threads = int(sys.argv[9]) if len(sys.argv) > 9 else 1
    stranger = sys.argv[10] if len(sys.argv) > 10 else ""
    load = Load(version, port, hosts, count, seed, first, ports, endings, threads, stranger)
    with ThreadPoolExecutor(threads) as pool:
        tallies = list(pool.map(lambda thread: run(load, thread), range(threads)))
    print(*map(sum, zip(*tallies, strict=True)), flush=True)


if __name__ == "__main__":
    main()
