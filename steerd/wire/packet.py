"""An IP packet, as NFQUEUE copies it, into the fields steering needs. TCP and UDP over IPv4 and IPv6.

Contract: `parse` takes any bytes, never raises, reads no further than the copy and the packet's own lengths allow, and
answers None for everything whose headers end too early or contradict each other. A payload may be cut short (NFQUEUE
copies at most so many bytes); headers may not.

Sources: RFC 791 (IPv4), RFC 8200 (IPv6 and its extension headers), RFC 9293 (TCP), RFC 768 (UDP).

Not covered: checksums (`is_damaged` is for those who need them), reassembly (conntrack reassembles before the queue; a
first fragment is read, a later one is not), jumbograms (RFC 2675), AH and ESP, and other transports.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from steerd.model import TCP, UDP, Flow

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10
URG = 0x20

HOP_BY_HOP = 0
ROUTING = 43
FRAGMENT = 44
DESTINATION_OPTIONS = 60

MAX_EXTENSION_HEADERS = 8
"""RFC 8200 recommends at most five; without a limit a packet of 64 KiB could hold 8,000 of them."""

_IPV4 = Struct("!BxH2xHxB2x4s4s").unpack_from
_IPV6 = Struct("!4xHBx16s16s").unpack_from
_TCP = Struct("!HHIIBBH").unpack_from
_UDP = Struct("!HHH").unpack_from
_new = tuple.__new__


class Packet(NamedTuple):
    """The fields of one packet, in host byte order; addresses as packed bytes. Of UDP, the TCP fields are 0 and b""."""

    version: int
    src: bytes
    dst: bytes
    protocol: int
    """`model.TCP` or `model.UDP`: the last one, behind IPv6 extension headers."""
    sport: int
    dport: int
    flags: int
    """The TCP flags byte: CWR ECE URG ACK PSH RST SYN FIN from high to low."""
    seq: int
    ack: int
    ip_options: bytes
    """IPv4: all option bytes of the header (0 to 40). IPv6: b""."""
    dst_options: bytes
    """IPv6: the option areas of all destination options headers, one behind the other. IPv4: b""."""
    tcp_options: bytes
    """All option bytes of the TCP header (0 to 40)."""
    payload: bytes
    """What TCP or UDP carries, as far as it was copied; padding behind the packet's own length is not in it."""
    window: int = 0
    """The TCP window field as it stands, unscaled."""

    @property
    def flow(self) -> Flow:
        """The 4-tuple."""
        flow: Flow = _new(Flow, (self.src, self.sport, self.dst, self.dport))
        return flow

    @property
    def source(self) -> bytes:
        """Whom things are counted for: an IPv4 address, or the IPv6 /64 that one host may choose its address from."""
        return self.src if self.version == 4 else self.src[:8]


def parse(data: bytes) -> Packet | None:
    """One packet, from its IP header on. None: not IPv4 or IPv6, neither TCP nor UDP, a later fragment, or headers
    that end too early or contradict each other."""
    size = len(data)
    if size < 28:  # the smallest thing of interest: IPv4 and UDP headers
        return None
    first = data[0]
    if 0x45 <= first <= 0x4F:
        _, end, fragment, protocol, src, dst = _IPV4(data)
        if fragment & 0x1FFF:
            return None
        start = (first & 15) * 4
        version = 4
        ip_options = b"" if start == 20 else data[20:start]
        dst_options = b""
    elif first >> 4 == 6:
        if size < 40:
            return None
        payload_length, next_header, src, dst = _IPV6(data)
        end = 40 + payload_length
        walked = _walk_extension_headers(data, min(end, size), next_header)
        if walked is None:
            return None
        protocol, start, dst_options = walked
        version = 6
        ip_options = b""
    else:
        return None

    if protocol == TCP:
        held = end if end < size else size
        if start + 20 > held:
            return None
        sport, dport, seq, ack, offset, flags, window = _TCP(data, start)
        options = start + 20
        body = start + (offset >> 4) * 4
        if not options <= body <= held:
            return None
        packet: Packet = _new(
            Packet,
            (version, src, dst, TCP, sport, dport, flags, seq, ack, ip_options, dst_options,
             data[options:body], data[body:held], window),
        )  # fmt: skip
        return packet
    if protocol == UDP:
        body = start + 8
        if body > end or body > size:
            return None
        sport, dport, length = _UDP(data, start)
        if length < 8 or start + length > end:
            return None
        payload = data[body : start + length]
        return Packet(version, src, dst, UDP, sport, dport, 0, 0, 0, ip_options, dst_options, b"", payload)
    return None


def is_damaged(packet: Packet, data: bytes) -> bool:
    """Whether the TCP checksum of a whole copy is wrong (RFC 9293 section 3.1). Conntrack calls a damaged segment
    invalid, as it does the first segment of a connection that it does not know."""
    size = 20 + len(packet.tcp_options) + len(packet.payload)
    end = int.from_bytes(data[2:4], "big") if packet.version == 4 else 40 + int.from_bytes(data[4:6], "big")
    summed = packet.src + packet.dst + data[end - size : end]
    # The one's complement sum of 16-bit words is the number that they make together, modulo 0xFFFF (RFC 1071).
    return (int.from_bytes(summed + b"\0" if size & 1 else summed, "big") + TCP + size) % 0xFFFF != 0


def is_cut(data: bytes) -> bool:
    """Whether a copy of a readable packet ends before the packet does."""
    if data[0] >> 4 == 4:
        return int.from_bytes(data[2:4], "big") > len(data)
    return 40 + int.from_bytes(data[4:6], "big") > len(data)


def _walk_extension_headers(data: bytes, held: int, protocol: int) -> tuple[int, int, bytes] | None:
    """The first header behind IPv6's extension headers: (protocol, its offset, destination option areas).

    Hop-by-hop options count only directly behind the IPv6 header (RFC 8200 section 4.1); in any other place they are
    returned as the protocol, which no transport has.
    """
    start = 40
    dst_options = b""
    for number in range(MAX_EXTENSION_HEADERS + 1):
        if protocol in (ROUTING, DESTINATION_OPTIONS) or (protocol == HOP_BY_HOP and number == 0):
            if start + 8 > held:
                return None
            length = (data[start + 1] + 1) * 8
            if start + length > held:
                return None
            if protocol == DESTINATION_OPTIONS:
                dst_options += data[start + 2 : start + length]
        elif protocol == FRAGMENT:
            if start + 8 > held:
                return None
            if data[start + 2] or data[start + 3] & 0xF8:  # the offset's 13 bits
                return None
            length = 8
        else:
            return protocol, start, dst_options
        protocol = data[start]
        start += length
    return None
