"""A bounded flood of SYNs with a port extension from spoofed sources, for tests inside a namespace.

    python -m tests.netns.flood PACKETS PER-SECOND

Sources are random in 10.128.0.0/9, ports random; the rate is kept in steps of 10 ms. Prints the packets sent and the
seconds it took.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
import sys
import time

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.gateway import ENDPOINT4, NUMBERS

_STEP = 0.01


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total = sum(int(word) for word in struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def spoofed_syn(chosen: random.Random, port: int, extension: int) -> bytes:
    """A SYN from anywhere; the kernel fills in the IP checksum of raw packets, TCP's is made here."""
    source = bytes((10, chosen.randrange(128, 256), chosen.randrange(256), chosen.randrange(256)))
    destination = socket.inet_aton(ENDPOINT4)
    option = portext.encode_ipv4(Extension(extension, 0), NUMBERS)
    tcp = struct.pack(
        "!HHIIBBHHH", chosen.randrange(1024, 65536), port, chosen.getrandbits(32), 0, 0x50, 2, 64240, 0, 0
    )
    pseudo = source + destination + struct.pack("!HH", 6, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    header = struct.pack("!BBHHHBBH4s4s", 0x47, 0, 28 + len(tcp), 0, 0, 64, 6, 0, source, destination)
    return header + option + tcp


def main() -> None:
    packets, rate = int(sys.argv[1]), int(sys.argv[2])
    chosen = random.Random(1)
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    # A source comes again after five seconds at the earliest, long after steerd has forgotten that it was turned away.
    ready = [spoofed_syn(chosen, 443, chosen.randint(1, 1000)) for _ in range(min(packets, 5 * rate))]
    started = time.monotonic()
    for number, packet in enumerate(itertools.islice(itertools.cycle(ready), packets)):
        if number % int(rate * _STEP) == 0:
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
        raw.sendto(packet, (ENDPOINT4, 0))
    print(packets, round(time.monotonic() - started, 2), flush=True)


if __name__ == "__main__":
    main()
