"""A bounded flood of packets from spoofed sources, for tests inside a namespace.

    python -m tests.netns.flood PACKETS PER-SECOND [KIND VERSION PORT [SOURCE]]

KIND is "extension", a SYN with a port extension (not given: that, IPv4, port 443); "syn", one without; "payload", a
segment with the beginning or the whole of a request, as if a handshake had been completed; or "piece", such a
beginning three times, as a client would repeat it. Sources are random in 10.128.0.0/9 or fd00:f::/48, ports too; or
all packets come from the address SOURCE. The rate is kept in steps of 10 ms. Prints "ready", and at last the packets
sent and the seconds it took.
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
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, NUMBERS

SOURCES4, SOURCES6 = "10.128.0.0/9", "fd00:f::/48"
_SYN, _ACK, _PSH = 0x02, 0x10, 0x08
_STEP = 0.01
_PIECE = b"GET /"
_BODIES = (b"GET / HTTP/1.1\r\nHost: h1.example\r\n\r\n", b"GET / HTTP/1.1\r\nHost: junk.example\r\n\r\n", _PIECE)


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total = sum(int(word) for word in struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def segment(source: bytes, sport: int, port: int, seq: int, ack: int, flags: int, body: bytes = b"") -> bytes:
    """A TCP segment to the endpoint, in an IPv4 or IPv6 packet as `source` says; IPv4's own checksum is left to the
    kernel, which fills it in for raw packets."""
    version = 4 if len(source) == 4 else 6
    destination = socket.inet_pton(*(socket.AF_INET, ENDPOINT4) if version == 4 else (socket.AF_INET6, ENDPOINT6))
    return packet(source, destination, struct.pack("!HHIIBBHHH", sport, port, seq, ack, 0x50, flags, 64240, 0, 0), body)


def packet(source: bytes, destination: bytes, tcp: bytes, body: bytes, ip_options: bytes = b"") -> bytes:
    """An IP packet with this TCP header, whose checksum is made here, and body."""
    length = len(tcp) + len(body)
    pseudo = source + destination + struct.pack("!II", length, socket.IPPROTO_TCP)
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp + body + b"\0" * (length % 2))) + tcp[18:]
    if len(source) == 16:
        first32 = 6 << 28 | _label(source, length)
        return struct.pack("!IHBB16s16s", first32, length, socket.IPPROTO_TCP, 64, source, destination) + tcp + body
    words = 5 + len(ip_options) // 4
    first = (0x40 | words, 0, 4 * words + length, 0, 0, 64, socket.IPPROTO_TCP, 0)
    return struct.pack("!BBHHHBBH4s4s", *first, source, destination) + ip_options + tcp + body


def _label(source: bytes, length: int) -> int:
    """Without this flow label synproxy would drop an IPv6 packet whose checksum no device has checked: it checks by the
    rule for IPv4 (steerd/wire/segment.py)."""
    words: tuple[int, ...] = struct.unpack("!4H", source[4:12])
    return 0xFFFF - (0x6000 + length + (socket.IPPROTO_TCP << 8 | 64) + sum(words)) % 0xFFFF


def raw_socket(version: int) -> tuple[socket.socket, tuple[str, int]]:
    """For whole packets, and the address to send them to."""
    family, endpoint = (socket.AF_INET, ENDPOINT4) if version == 4 else (socket.AF_INET6, ENDPOINT6)
    return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW), (endpoint, 0)


def spoofed(chosen: random.Random, kind: str, version: int, port: int, source: str) -> bytes:
    """A packet from anywhere, or from `source`."""
    if source:
        address = socket.inet_pton(socket.AF_INET if version == 4 else socket.AF_INET6, source)
    elif version == 4:
        address = bytes((10, chosen.randrange(128, 256), chosen.randrange(256), chosen.randrange(256)))
    else:
        address = bytes.fromhex("fd00000f0000") + chosen.randbytes(10)
    sport, seq = chosen.randrange(1024, 65536), chosen.getrandbits(32)
    if kind == "piece":
        return segment(address, sport, port, seq, chosen.getrandbits(32), _ACK | _PSH, _PIECE)
    if kind == "payload":
        return segment(address, sport, port, seq, chosen.getrandbits(32), _ACK | _PSH, chosen.choice(_BODIES))
    if kind == "syn":
        return segment(address, sport, port, seq, 0, _SYN)
    option = portext.encode_ipv4(Extension(chosen.randint(1, 1000), 0), NUMBERS)
    tcp = struct.pack("!HHIIBBHHH", sport, port, seq, 0, 0x50, _SYN, 64240, 0, 0)
    return packet(address, socket.inet_aton(ENDPOINT4), tcp, b"", option)


def main() -> None:
    packets, rate = int(sys.argv[1]), int(sys.argv[2])
    kind, version, port, source = [*sys.argv[3:], *("extension", "4", "443", "")[len(sys.argv) - 3 :]]
    chosen = random.Random(1)
    raw, to = raw_socket(int(version))
    # A source comes again after five seconds at the earliest, long after steerd has forgotten that it was turned away.
    times = 3 if kind == "piece" else 1
    ready = [
        each
        for _ in range(min(packets, 5 * rate) // times)
        for each in [spoofed(chosen, kind, int(version), int(port), source)] * times
    ]
    print("ready", flush=True)
    started = time.monotonic()
    for number, each in enumerate(itertools.islice(itertools.cycle(ready), packets)):
        if number % int(rate * _STEP) == 0:
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
        raw.sendto(each, to)
    print(packets, round(time.monotonic() - started, 2), flush=True)


if __name__ == "__main__":
    main()
