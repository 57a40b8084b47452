"""A bounded flood of first datagrams from spoofed sources, for tests inside a namespace.

    python -m tests.netns.datagram_flood VERSION KIND SOURCES PACKETS PER-SECOND

KIND is junk (what no route matches), half (a QUIC Initial with the first half of a hello) or query (DNS). SOURCES: how
many sources there are; they are random in 10.128.0.0/9 or in the /64s of 2001:db8:f::/48, their ports random. Each
sends one datagram before the first comes again. The rate is kept in steps of 1 ms; with longer pauses, real flows would
slip through between the bursts. Prints the packets sent and the seconds it took.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
import sys
import time
from collections.abc import Callable

from tests.initials import client_hello, flight
from tests.netns.flood import checksum
from tests.netns.gateway import ENDPOINT4, ENDPOINT6

PORTS = {"junk": 500, "half": 443, "query": 53}
HELLO_SIZE = 1800
"""Two Initials, as browsers' hellos have it."""
_STEP = 0.001


def query(name: str) -> bytes:
    """A DNS question for an IPv4 address (RFC 1035 section 4.1)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", 1, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)


def payloads(kind: str, chosen: random.Random) -> list[bytes]:
    """A hundred payloads of a kind."""
    make: dict[str, Callable[[int], bytes]] = {
        "junk": lambda _: b"x" + chosen.randbytes(60),
        "half": lambda _: flight(client_hello(b"www.a.example", b"h3", size=HELLO_SIZE), dcid=chosen.randbytes(8))[0],
        "query": lambda number: query(f"spoofed{number}.a.example"),
    }
    return [make[kind](number) for number in range(100)]


def spoofed(version: int, chosen: random.Random, port: int, payload: bytes) -> bytes:
    """A datagram from anywhere; IPv4's own checksum the kernel fills in, and UDP's may be missing there."""
    udp = struct.pack("!4H", chosen.randrange(1024, 65536), port, 8 + len(payload), 0)
    if version == 4:
        source = bytes((10, chosen.randrange(128, 256))) + chosen.randbytes(2)
        destination = socket.inet_aton(ENDPOINT4)
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(payload), 0, 0, 64, 17, 0, source, destination)
        return header + udp + payload
    source = socket.inet_pton(socket.AF_INET6, "2001:db8:f::")[:6] + chosen.randbytes(10)
    destination = socket.inet_pton(socket.AF_INET6, ENDPOINT6)
    summed = source + destination + struct.pack("!2I", len(udp) + len(payload), 17) + udp + payload
    total = checksum(summed + b"\0" * (len(summed) % 2)) or 0xFFFF
    header = struct.pack("!IHBB", 6 << 28, len(udp) + len(payload), 17, 64) + source + destination
    return header + udp[:6] + struct.pack("!H", total) + payload


def main() -> None:
    version, kind = int(sys.argv[1]), sys.argv[2]
    sources, packets, rate = map(int, sys.argv[3:])
    chosen = random.Random(1)
    raw = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    to = (ENDPOINT4, 0) if version == 4 else (ENDPOINT6, 0)
    said = itertools.cycle(payloads(kind, chosen))
    ready = [spoofed(version, chosen, PORTS[kind], next(said)) for _ in range(sources)]
    started = time.monotonic()
    for number, packet in enumerate(itertools.islice(itertools.cycle(ready), packets)):
        if number % max(1, int(rate * _STEP)) == 0:
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
        raw.sendto(packet, to)
    print(packets, round(time.monotonic() - started, 2), flush=True)


if __name__ == "__main__":
    main()
