"""`proxy`: the header of the PROXY protocol, versions 1 (a line of text) and 2 (binary), that a proxy sends in front of
what its client sends (doc/proxy-protocol.txt of HAProxy; its sections 2.1 and 2.2).

The header is a wrapper: another protocol begins behind it. `read` says where that is and who the client is; `inspect`,
the parser of the registry, gives only the keys. Neither can tell a proxy from a client that pretends to be one: it is
for the caller to honour a header only from addresses that are trusted to send it.

Keys, text in latin-1:
- `proxy.version`: "1" or "2". It is the only key where the header names no client: `UNKNOWN`, `LOCAL` (the proxy speaks
  for itself, such as in a health check), and in version 2 an unspecified family or transport;
- `proxy.source`, `proxy.destination`: addresses of the client and of what it connected to, in their usual short form;
- `proxy.source-port`, `proxy.destination-port`: in decimal;
- `proxy.authority`: the host name that the client asked for, such as the SNI, in lower case (ASCII letters) and without
  one trailing dot;
- `proxy.alpn`: the protocol above, such as `h2`, where the proxy ended TLS;
- `proxy.unique-id`: the name that the proxy gave to the connection.

The last three come from TLVs of version 2, and an empty one gives no key. An IPv4-mapped address (`::ffff:192.0.2.1`)
is given as the IPv4 address that it stands for: proxies send it if they listen for both families on one socket.

NEED_MORE until the header is complete, but NOT_MINE as soon as it cannot become one. Malformed, hence NOT_MINE, since
two readers could see two different headers: a line that is not exactly as the specification has it (a lone CR or LF,
leading zeros, two spaces, small letters), versions, commands, families and transports that it does not know, a block
too short for its addresses, TLVs that do not fill the rest exactly, one of those read here twice, a wrong checksum
(CRC32C), a unique id of more than 128 bytes, and an authority with white space or control characters. Two liberties: in
version 1 an IPv6 address may end like an IPv4 address (RFC 4291 section 2.2), since senders write mapped ones so; and
where the specification says that the addresses are to be ignored, the TLVs behind them are ignored, too.

Not covered: the TLS TLV (version, cipher, name in the client's certificate), the network namespace, TLVs of one's own,
and the paths of Unix sockets: skipped. A header behind a header: it is part of what the following parsers see.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address
from typing import Literal, NamedTuple

from steerd.model import Answer, IPAddress, Keys
from steerd.wire.cursor import Cursor, MalformedError, TooShortError, require
from steerd.wire.parser import Parser, always

BOUND = 8192
"""Twice what nginx reads of a header: room for a certificate in a TLV. With the most that another parser may want
behind it (18,432 bytes) it stays below what is held of one connection, 32,768 bytes."""

_LONGEST_LINE = 107
_WORD = b"PROXY "
_CR_LF = b"\r\n"
_LINE_STARTS = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN ", b"PROXY UNKNOWN\r")
_LINE_SO_FAR = re.compile(rb"PROXY (?:TCP[46] [0-9A-Fa-f:. ]*|UNKNOWN(?: [\x20-\x7e]*)?)\r?")
_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [\x20-\x7e]*)?")
_ADDRESS, _PORT = rb"([0-9A-Fa-f:.]+)", rb"(0|[1-9][0-9]{0,4})"
_TCP = re.compile(rb" ".join([rb"PROXY TCP([46])", _ADDRESS, _ADDRESS, _PORT, _PORT]))

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED = 16
"""Bytes of a version 2 header before what its length counts."""
_LOCAL = 0x20
_PROXY = 0x21
_UNSPECIFIED = 0
_ADDRESS_SIZES = {1: 4, 2: 16}
_UNIX = 3
_UNIX_ADDRESSES = 2 * 108
_STREAM = 1
_DATAGRAM = 2

_ALPN = 1
_AUTHORITY = 2
_CRC32C = 3
_UNIQUE_ID = 5
_READ_HERE = (_ALPN, _AUTHORITY, _CRC32C, _UNIQUE_ID)
_LONGEST_UNIQUE_ID = 128
_NOT_IN_A_NAME = re.compile(rb"[\x00-\x20\x7f]")


class Header(NamedTuple):
    """A whole header."""

    keys: Keys
    source: bytes | None
    """The client's packed address, 4 or 16 bytes; None: the header names none, so the packet's own one holds."""
    length: int
    """Bytes of the header: the inner protocol begins at this offset."""


def read(data: bytes) -> Header | Answer:
    """The header that `data` begins with, or NEED_MORE, or NOT_MINE; like a parser it never changes its mind."""
    try:
        return _version_1(data) if data[:1] == b"P" else _version_2(data)
    except TooShortError:
        return Answer.NEED_MORE
    except MalformedError:
        return Answer.NOT_MINE


def encode(source: bytes, sport: int, destination: bytes, dport: int) -> bytes:
    """A header of version 2 for a TCP connection: packed addresses of one family, ports; 28 bytes for IPv4, 52 for
    IPv6."""
    block = source + destination + sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    family = 1 if len(source) == _ADDRESS_SIZES[1] else 2
    return _SIGNATURE + bytes([_PROXY, family << 4 | _STREAM]) + len(block).to_bytes(2, "big") + block


def is_claimed(data: bytes) -> bool | Literal[Answer.NEED_MORE]:
    """Whether data begin like a header of either version, be it well-formed or not. What is malformed here might be
    good enough for a daemon, which would believe it."""
    if data.startswith((_WORD, _SIGNATURE)):
        return True
    return Answer.NEED_MORE if _WORD.startswith(data) or _SIGNATURE.startswith(data) else False


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the header that `data` begins with, or NEED_MORE, or NOT_MINE."""
    header = read(data)
    return header if isinstance(header, Answer) else header.keys


def _version_1(data: bytes) -> Header:
    line, ended, _ = data[:_LONGEST_LINE].partition(_CR_LF)
    if not ended:
        require(len(line) < _LONGEST_LINE)
        require(any(start.startswith(line) for start in _LINE_STARTS) or _LINE_SO_FAR.fullmatch(line) is not None)
        raise TooShortError
    length = len(line) + len(_CR_LF)
    if _UNKNOWN.fullmatch(line):
        return Header({"proxy.version": "1"}, None, length)
    match = _TCP.fullmatch(line)
    if match is None:
        raise MalformedError
    try:
        source, destination = (ip_address(address.decode("ascii")) for address in match.group(2, 3))
    except ValueError:
        raise MalformedError from None
    require(source.version == destination.version == int(match[1]))
    ports = int(match[4]), int(match[5])
    require(max(ports) <= 0xFFFF)
    return _proxied("1", source, destination, ports, length)


def _version_2(data: bytes) -> Header:
    cursor = Cursor(data)
    cursor.expect(_SIGNATURE)
    command = cursor.number(1)
    require(command in (_LOCAL, _PROXY))
    family, transport = divmod(cursor.number(1), 16)
    require(command == _LOCAL or (family <= _UNIX and transport <= _DATAGRAM))
    block_length = cursor.number(2)
    length = _FIXED + block_length
    require(length <= BOUND)
    if len(data) < length:
        raise TooShortError
    if command == _LOCAL or _UNSPECIFIED in (family, transport):
        return Header({"proxy.version": "2"}, None, length)

    cursor.end_after(block_length)
    if family == _UNIX:
        cursor.take(_UNIX_ADDRESSES)
        header = Header({"proxy.version": "2"}, None, length)
    else:
        size = _ADDRESS_SIZES[family]
        source, destination = ip_address(cursor.take(size)), ip_address(cursor.take(size))
        header = _proxied("2", source, destination, (cursor.number(2), cursor.number(2)), length)
    header.keys.update(_tlv_keys(cursor, data[:length]))
    return header


def _proxied(version: str, source: IPAddress, destination: IPAddress, ports: tuple[int, int], length: int) -> Header:
    """A header that names a client; `ports` are those of source and destination."""
    source, destination = _unmapped(source), _unmapped(destination)
    keys = {
        "proxy.version": version,
        "proxy.source": str(source),
        "proxy.source-port": str(ports[0]),
        "proxy.destination": str(destination),
        "proxy.destination-port": str(ports[1]),
    }
    return Header(keys, source.packed, length)


def _unmapped(address: IPAddress) -> IPAddress:
    """RFC 4291 section 2.5.5.2: an IPv4-mapped IPv6 address is the address of an IPv4 node."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _tlv_keys(cursor: Cursor, header: bytes) -> Keys:
    """Keys of the TLVs, from the cursor on to the end of the whole header, whose checksum is compared as well."""
    found: dict[int, bytes] = {}
    while cursor.left:
        kind = cursor.number(1)
        value = cursor.take(cursor.number(2))
        if kind not in _READ_HERE:
            continue
        require(kind not in found)
        found[kind] = value
        if kind == _CRC32C:
            require(len(value) == 4)
            end = len(header) - cursor.left
            require(crc32c(header[: end - 4] + bytes(4) + header[end:]) == int.from_bytes(value, "big"))
    authority = found.get(_AUTHORITY, b"").lower().removesuffix(b".")
    require(not _NOT_IN_A_NAME.search(authority))
    unique_id = found.get(_UNIQUE_ID, b"")
    require(len(unique_id) <= _LONGEST_UNIQUE_ID)
    values = {"proxy.authority": authority, "proxy.alpn": found.get(_ALPN, b""), "proxy.unique-id": unique_id}
    return {key: value.decode("latin-1") for key, value in values.items() if value}


def crc32c(data: bytes) -> int:
    """The CRC with the polynomial of Castagnoli, 32 bits (RFC 4960 appendix B)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC32C_TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _crc32c_of_byte(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_CRC32C_TABLE = [_crc32c_of_byte(byte) for byte in range(256)]


PARSER = Parser(
    name="proxy",
    keys=(
        "proxy.source",
        "proxy.source-port",
        "proxy.destination",
        "proxy.destination-port",
        "proxy.authority",
        "proxy.alpn",
        "proxy.unique-id",
        "proxy.version",
    ),
    bound=BOUND,
    make=always(inspect),
    summary="PROXY protocol, versions 1 and 2: the client's address, and the host name it asked for",
    exclusive=False,
)
