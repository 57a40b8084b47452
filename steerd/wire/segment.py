"""TCP segments to send: bytes of whole IP packets, made from the header of a packet that was read. Pure.

Sources: RFC 9293 section 3.1 (TCP), RFC 791 (IPv4), RFC 8200 section 8.1 (the checksum of TCP over IPv6), RFC 1071 and
RFC 1624 (the checksum's arithmetic), RFC 7323 section 3.2 (timestamps).
"""

from __future__ import annotations

from struct import Struct

from steerd.wire.packet import ACK, FIN, PSH, RST, SYN, Packet

_IPV4 = Struct("!BBHHHBBH4s4s").pack
_IPV6 = Struct("!IHBB16s16s").pack
_TCP = Struct("!HHIIBBHHH").pack
_TIMESTAMPS = Struct("!II").unpack_from
_ANSWERED_TIMESTAMPS = Struct("!BBBBII").pack

_SEQUENCE = 0xFFFFFFFF
_TCP_PROTOCOL = 6
_TTL = 64
_DO_NOT_FRAGMENT = 0x4000
_NOP, _TIMESTAMP = 1, 8

_OUTSIDE_THE_COOKIE = 0xF
"""In the low bits of a synproxy timestamp: the client offered no window scale (net/netfilter/nf_synproxy_core.c)."""


def bare_ack(first: Packet) -> bytes:
    """The ACK that ends a handshake, as the client would have sent it without the payload of `first`."""
    return _segment(
        first.src, first.dst, first.sport, first.dport, first.seq, first.ack, ACK, first.window, first.tcp_options,
        label=_label(first),
    )  # fmt: skip


def data(first: Packet, payload: bytes, *, fin: bool, size: int) -> list[bytes]:
    """The client's first bytes, from `first.seq` on, in segments of at most `size` bytes, and a FIN behind if `fin`."""
    parts = [payload[start : start + size] for start in range(0, len(payload), size)]
    segments = []
    for index, part in enumerate(parts):
        flags = ACK | PSH | (FIN if fin and index == len(parts) - 1 else 0)
        seq = (first.seq + index * size) & _SEQUENCE
        segments.append(
            _segment(
                first.src, first.dst, first.sport, first.dport, seq, first.ack, flags, first.window,
                first.tcp_options, part,
            )
        )  # fmt: skip
    return segments


def acknowledgement(packet: Packet, ack: int, window: int, window_scale: int) -> bytes:
    """From the endpoint to the client: all bytes before `ack` are here, and `window` more may come.

    `window_scale` is what the answer to the client's SYN said; it counts if the client offered one, which its cookie,
    a timestamp that the client gives back, still says.
    """
    options, scaled = _answer_timestamps(packet)
    field = min(window >> window_scale if scaled else window, 0xFFFF)
    return _segment(
        packet.dst, packet.src, packet.dport, packet.sport, packet.ack, ack & _SEQUENCE, ACK, field, options
    )


def alert(packet: Packet, length: int, record: bytes) -> bytes:
    """From the endpoint to the client: these bytes, in answer to the `length` that it has sent from `packet` on."""
    options, _ = _answer_timestamps(packet)
    ack = (packet.seq + length) & _SEQUENCE
    return _segment(packet.dst, packet.src, packet.dport, packet.sport, packet.ack, ack, ACK | PSH, 0, options, record)


def reset(packet: Packet, sent: int = 0) -> bytes:
    """From the endpoint to the client: this connection is over (RFC 9293 section 3.10.7.1). `sent`: bytes that it was
    sent before."""
    seq = (packet.ack + sent) & _SEQUENCE
    return _segment(packet.dst, packet.src, packet.dport, packet.sport, seq, 0, RST, 0, b"")


def bare_syn(syn: Packet) -> bytes:
    """The same SYN without IP options, extension headers and payload."""
    return _segment(
        syn.src, syn.dst, syn.sport, syn.dport, syn.seq, 0, syn.flags & ~(ACK | FIN | RST | PSH) | SYN, syn.window,
        syn.tcp_options, label=_label(syn),
    )  # fmt: skip


def _label(packet: Packet) -> int:
    """The flow label for a segment without payload to synproxy.

    nft_synproxy checks an IPv6 segment with the routine for IPv4 (seen on kernels 6.1 to 7.3): it takes bytes 12 to 19
    of the IPv6 header for the addresses, and sums the whole header as well. Bytes 8 to 39 belong to the checksum in any
    case; what is left over, 0 to 7 and 12 to 19, this label brings to zero. So both routines find the checksum right.
    """
    if packet.version == 4:
        return 0
    length = 20 + len(packet.tcp_options)
    words = (0x6000, length, _TCP_PROTOCOL << 8 | _TTL, int.from_bytes(packet.src[4:12], "big"))
    return 0xFFFF - sum(words) % 0xFFFF


def _answer_timestamps(packet: Packet) -> tuple[bytes, bool]:
    """The timestamps option that answers this packet's, if it has one; and whether the client's windows are scaled."""
    options = packet.tcp_options
    at = 0
    while at < len(options) and options[at]:
        if options[at] == _NOP:
            at += 1
            continue
        if options[at] == _TIMESTAMP and at + 10 <= len(options) and options[at + 1] == 10:
            value, echoed = _TIMESTAMPS(options, at + 2)
            scaled = echoed & 0xF != _OUTSIDE_THE_COOKIE
            return _ANSWERED_TIMESTAMPS(_NOP, _NOP, _TIMESTAMP, 10, echoed, value), scaled
        if at + 1 >= len(options) or options[at + 1] < 2:
            break
        at += options[at + 1]
    return b"", False


def _segment(
    src: bytes,
    dst: bytes,
    sport: int,
    dport: int,
    seq: int,
    ack: int,
    flags: int,
    window: int,
    options: bytes,
    payload: bytes = b"",
    *,
    label: int = 0,
) -> bytes:
    """One packet. `options` are whole 32-bit words; `label` is the flow label of IPv6."""
    length = 20 + len(options) + len(payload)
    offset = (20 + len(options)) << 2
    body = _TCP(sport, dport, seq, ack, offset, flags, window, 0, 0) + options + payload
    # Modulo 0xFFFF a long number is the one's complement sum of its 16-bit words: 2**16 is 1 there.
    total = int.from_bytes(src + dst, "big") + _TCP_PROTOCOL + length
    total += int.from_bytes(body + b"\0" if len(body) & 1 else body, "big")
    checksum = 0xFFFF - total % 0xFFFF
    body = b"%b%b%b" % (body[:16], checksum.to_bytes(2, "big"), body[18:])
    if len(src) == 4:
        # The kernel fills it in where it sends, but not where a verdict puts one packet in the place of another.
        header = _IPV4(0x45, 0, 20 + length, 0, _DO_NOT_FRAGMENT, _TTL, _TCP_PROTOCOL, 0, src, dst)
        total = 0xFFFF - int.from_bytes(header, "big") % 0xFFFF
        return b"%b%b%b%b" % (header[:10], total.to_bytes(2, "big"), header[12:], body)
    return _IPV6(6 << 28 | label, length, _TCP_PROTOCOL, _TTL, src, dst) + body
