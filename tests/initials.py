"""Makes QUIC packets as clients send them, for tests: any hello, any frames, any version.

The protection is aioquic's, not ours, so that what is read here was not written by the same hand.
"""

from __future__ import annotations

from aioquic.quic.crypto import CryptoPair

VERSION_1 = 0x00000001
VERSION_2 = 0x6B3343CF

INITIAL, ZERO_RTT, HANDSHAKE, RETRY = range(4)
_TYPE_BITS = {VERSION_1: (0, 1, 2, 3), VERSION_2: (1, 2, 3, 0)}  # RFC 9000 section 17.2, RFC 9369 section 3.2

PADDING = b"\x00"
PING = b"\x01"

DCID = bytes.fromhex("8394c8f03e515708")
SCID = bytes.fromhex("c1c2c3c4")
DATAGRAM = 1200


def varint(number: int, size: int | None = None) -> bytes:
    """A variable-length integer (RFC 9000 section 16), in the fewest bytes or in `size` of them."""
    size = size or next(size for size in (1, 2, 4, 8) if number < 1 << 8 * size - 2)
    return (number | (size.bit_length() - 1) << 8 * size - 2).to_bytes(size)


def crypto(offset: int, data: bytes, size: int | None = None) -> bytes:
    """A CRYPTO frame; `size`: bytes of its two numbers."""
    return b"\x06" + varint(offset, size) + varint(len(data), size) + data


def ack(largest: int, *ranges: tuple[int, int], ecn: tuple[int, int, int] | None = None) -> bytes:
    """An ACK frame with further ranges (gap, length), and with ECN counts if there are any."""
    numbers = [largest, 40, len(ranges), 0, *(number for pair in ranges for number in pair), *(ecn or ())]
    return bytes([3 if ecn else 2]) + b"".join(map(varint, numbers))


def close(code: int, reason: bytes) -> bytes:
    """A CONNECTION_CLOSE frame of the transport."""
    return b"\x1c" + varint(code) + varint(6) + varint(len(reason)) + reason


def long_header(
    kind: int, version: int = VERSION_1, dcid: bytes = DCID, scid: bytes = SCID, *, fixed: bool = True, low: int = 0
) -> bytes:
    """A long header up to the source connection id; `low`: the four bits of its first byte that are the kind's own."""
    bits = _TYPE_BITS.get(version, range(4))[kind]
    first = 0x80 | (0x40 if fixed else 0) | bits << 4 | low
    return bytes([first]) + version.to_bytes(4) + bytes([len(dcid)]) + dcid + bytes([len(scid)]) + scid


def initial(
    frames: bytes,
    *,
    version: int = VERSION_1,
    dcid: bytes = DCID,
    scid: bytes = SCID,
    keys_of: bytes | None = None,
    number: int = 0,
    number_size: int = 1,
    token: bytes = b"",
    fixed: bool = True,
    pad_to: int = 0,
) -> bytes:
    """A protected Initial of these frames, with PADDING behind them up to `pad_to` bytes of packet. `keys_of`: the
    connection id that the keys come from, if it is not `dcid`."""
    header = long_header(INITIAL, version, dcid, scid, fixed=fixed, low=number_size - 1)
    header += varint(len(token)) + token
    # A payload of 4 bytes with the packet number at least, for the sample.
    frames = frames.ljust(max(4 - number_size, pad_to - len(header) - 2 - number_size - 16), PADDING)
    header += varint(number_size + len(frames) + 16, 2) + number.to_bytes(number_size)
    pair = CryptoPair()
    pair.setup_initial(dcid if keys_of is None else keys_of, is_client=True, version=version)
    return bytes(pair.encrypt_packet(header, frames, number))


def datagram(frames: bytes, *, version: int = VERSION_1, dcid: bytes = DCID, number: int = 0) -> bytes:
    """A datagram as a client's first flight has them: one Initial, padded to DATAGRAM bytes."""
    return initial(frames, version=version, dcid=dcid, number=number, pad_to=DATAGRAM)


def other(kind: int, length: int, *, version: int = VERSION_1, dcid: bytes = DCID) -> bytes:
    """A packet of another kind with a long header and `length` bytes that cannot be read."""
    return long_header(kind, version, dcid) + varint(length, 2) + bytes(255 - at % 256 for at in range(length))


def client_hello(name: bytes, *protocols: bytes, size: int = 0, padding_first: bool = True) -> bytes:
    """A ClientHello with its handshake header; with padding (RFC 7685) up to `size` bytes, in front of the name or
    behind everything else."""

    def vector(length_size: int, content: bytes) -> bytes:
        return len(content).to_bytes(length_size) + content

    def extension(kind: int, content: bytes) -> bytes:
        return kind.to_bytes(2) + vector(2, content)

    extensions = extension(0, vector(2, b"\x00" + vector(2, name)))
    extensions += extension(16, vector(2, b"".join(vector(1, protocol) for protocol in protocols)))
    extensions += extension(43, vector(1, b"\x03\x04"))
    start = b"\x03\x03" + bytes(32) + b"\x00" + vector(2, b"\x13\x01") + b"\x01\x00"
    missing = size - 4 - len(start) - 2 - len(extensions) - 4
    if missing >= 0:
        # Not zeros, so that bytes that are put together wrongly are seen.
        padding = extension(21, bytes(at % 251 for at in range(missing)))
        extensions = padding + extensions if padding_first else extensions + padding
    body = start + vector(2, extensions)
    return b"\x01" + vector(3, body)


def flight(hello: bytes, *, cut: int = 1000, version: int = VERSION_1, dcid: bytes = DCID) -> list[bytes]:
    """The datagrams of a ClientHello (with its handshake header): one CRYPTO frame of `cut` bytes each."""
    return [
        datagram(crypto(start, hello[start : start + cut]), version=version, dcid=dcid, number=number)
        for number, start in enumerate(range(0, len(hello), cut))
    ]
