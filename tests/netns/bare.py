"""Clients without sockets: they complete handshakes by raw packets, from addresses that nobody has.

    python -m tests.netns.bare VERSION PORT COUNT                              they say nothing
    python -m tests.netns.bare VERSION PORT COUNT JUNK-PER-SECOND SECONDS      all are one source, and send junk

COUNT connections to the endpoint, from addresses in tests.netns.flood's SOURCES (which must be routed here), are
opened, 8,000 a second: of silent clients, 50 from each source (IPv4 address, IPv6 /64). Each SYN-ACK is answered, and
the number of those printed as "established N". Junk is a request that no route matches, or the beginning of one, from
those connections in turn. Nothing else that the endpoint sends is answered.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time

from tests.netns.flood import raw_socket, segment

_SYN, _ACK, _PSH = 0x02, 0x10, 0x08
_SO_RCVBUFFORCE = 33
_ETHER_TYPES = {4: 0x0800, 6: 0x86DD}
_ADDRESSES = {4: (12, 16, 20), 6: (8, 24, 40)}
"""Where an IP header has source and destination, and where it ends."""
_FIRST_PORT, _OF_ONE_SOURCE = 2000, 50
_BURST = 64
_OPENED_PER_SECOND = 8000
_STEP = 0.01
_PATIENCE = 3.0
_JUNK = (b"GET / HTTP/1.1\r\nHost: junk.example\r\n\r\n", b"GET /")


class Client:
    """All connections of one family to one port."""

    def __init__(self, version: int, port: int) -> None:
        self._version, self._port = version, port
        self._raw, self._to = raw_socket(version)
        self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETHER_TYPES[version]))
        self._wire.bind(("eth0", _ETHER_TYPES[version]))
        self._wire.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 26)
        self._wire.setblocking(False)

    def open(self, count: int, of_one_source: int) -> list[tuple[bytes, int, int, int]]:
        """Source address, port, and the next sequence and acknowledgement number of each that was answered."""
        opened: list[tuple[bytes, int, int, int]] = []
        started = time.monotonic()
        for number in range(count):
            source, sport = self._source(number // of_one_source), _FIRST_PORT + number % of_one_source
            self._send(segment(source, sport, self._port, number, 0, _SYN))
            if number % _BURST == 0:
                opened += self._answered()
                time.sleep(max(0.0, started + number / _OPENED_PER_SECOND - time.monotonic()))
        deadline = time.monotonic() + _PATIENCE
        while len(opened) < count and time.monotonic() < deadline:
            time.sleep(_STEP)
            opened += self._answered()
        return opened

    def junk(self, opened: list[tuple[bytes, int, int, int]], rate: int, seconds: float) -> int:
        """Send it; returns the packets sent."""
        ready = [
            segment(source, sport, self._port, seq, ack, _ACK | _PSH, _JUNK[number % len(_JUNK)])
            for number, (source, sport, seq, ack) in enumerate(opened)
        ]
        started = time.monotonic()
        number = 0
        while number < rate * seconds:
            for _ in range(int(rate * _STEP)):
                self._send(ready[number % len(ready)])
                number += 1
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
        return number

    def _source(self, number: int) -> bytes:
        if self._version == 4:
            return bytes((10, 200, number >> 8, number & 0xFF))
        return bytes.fromhex("fd00000f0000") + number.to_bytes(2, "big") + bytes(7) + b"\x01"

    def _send(self, packet: bytes) -> None:
        self._raw.sendto(packet, self._to)

    def _answered(self) -> list[tuple[bytes, int, int, int]]:
        """Answer the SYN-ACKs that have come so far."""
        answered = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self._wire.recv(2048)
                source_at, destination_at, end = _ADDRESSES[self._version]
                sport, dport, seq, ack, _, flags = struct.unpack_from("!HHIIBB", data, end)
                if sport != self._port or flags & (_SYN | _ACK) != _SYN | _ACK:
                    continue
                client = data[destination_at : 2 * destination_at - source_at]
                self._send(segment(client, dport, self._port, ack, seq + 1 & 0xFFFFFFFF, _ACK))
                answered.append((client, dport, ack, seq + 1 & 0xFFFFFFFF))
        return answered


def main() -> None:
    version, port, count, *junk = map(int, sys.argv[1:])
    client = Client(version, port)
    opened = client.open(count, count if junk else _OF_ONE_SOURCE)
    print("established", len(opened), flush=True)
    if junk:
        rate, seconds = junk
        print("sent", client.junk(opened, rate, seconds), flush=True)


if __name__ == "__main__":
    main()
