"""The `proxy` parser: headers of curl, nginx and HAProxy and what begins behind them, and what is refused."""

from __future__ import annotations

import ipaddress
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerd.core.pending import Limits
from steerd.model import Answer, Keys
from steerd.wire.proxy import BOUND, PARSER, Header, crc32c, encode, inspect, read
from steerd.wire.registry import REGISTRY

VECTORS = Path(__file__).parent.parent / "vectors"
IPV4 = (bytes([198, 51, 100, 7]), bytes([203, 0, 113, 10]))
IPV6 = (bytes.fromhex("20010db8000000000000000000000007"), bytes.fromhex("20010db8000000000000000000000010"))
MAPPED = tuple(bytes(10) + b"\xff\xff" + address for address in IPV4)
GET = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
LOCAL, PROXY = 0x20, 0x21
UNSPEC, TCP4, UDP4, TCP6, UDP6, UNIX, UNIX_DATAGRAM = 0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32
ALPN, AUTHORITY, CRC32C, NOOP, UNIQUE_ID, SSL, CUSTOM = 1, 2, 3, 4, 5, 0x20, 0xE0
PORTS = struct.pack("!HH", 40000, 443)
ADDRESSES = b"".join(IPV4) + PORTS


def real(what: str) -> bytes:
    return (VECTORS / f"proxy-{what}.bin").read_bytes()


def binary(block: bytes = ADDRESSES, family: int = TCP4, command: int = PROXY) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(block)) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def with_checksum(before: bytes = b"", behind: bytes = b"") -> bytes:
    """A header with TLVs before and behind that of its checksum."""
    zeroed = binary(ADDRESSES + before + tlv(CRC32C, bytes(4)) + behind)
    at = len(zeroed) - len(behind) - 4
    return zeroed[:at] + crc32c(zeroed).to_bytes(4, "big") + zeroed[at + 4 :]


def names(version: str, source: str, source_port: int, destination: str, destination_port: int) -> Keys:
    return {
        "proxy.version": version,
        "proxy.source": source,
        "proxy.source-port": str(source_port),
        "proxy.destination": destination,
        "proxy.destination-port": str(destination_port),
    }


def header(data: bytes) -> Header:
    found = read(data)
    assert isinstance(found, Header), found
    return found


def keys(data: bytes) -> Keys:
    return header(data).keys


# What real proxies and clients send


@pytest.mark.parametrize(
    ("what", "source_port", "destination_port", "inner"),
    [
        ("curl-7.88.1-v1-ipv4", 57350, 9000, "http"),
        ("curl-7.88.1-v1-ipv6", 36970, 9000, "http"),
        ("nginx-1.22.1-v1-ipv4", 53080, 1101, "http"),
        ("nginx-1.22.1-v1-ipv6", 50172, 1101, "http"),
        ("nginx-1.22.1-v1-mapped", 46694, 1103, "http"),
        ("haproxy-2.6.12-v2-ipv4", 37528, 1002, "http"),
        ("haproxy-2.6.12-v2-ipv6", 45626, 1002, "http"),
        ("haproxy-2.6.12-v2-mapped", 58712, 1003, "http"),
        ("haproxy-2.6.12-v2-crc32c", 45892, 1004, "tls"),
        ("haproxy-2.6.12-v2-ssl", 45194, 1005, "http2"),
        ("haproxy-2.6.12-v2-ssl-cn", 52238, 1005, "http2"),
    ],
)
def test_headers_of_real_proxies(what: str, source_port: int, destination_port: int, inner: str) -> None:
    data = real(what)
    found = header(data)
    addresses = ("2001:db8::7", "2001:db8::10") if what.endswith(("6", "-cn")) else ("198.51.100.7", "203.0.113.10")
    version = "1" if "-v1-" in what else "2"
    expected = names(version, addresses[0], source_port, addresses[1], destination_port)
    assert expected.items() <= found.keys.items()
    assert found.source == ipaddress.ip_address(addresses[0]).packed
    assert isinstance(REGISTRY[inner].make(())(data[found.length :]), dict)


@pytest.mark.parametrize("what", ["v1-unknown", "v2-local", "v2-check"])
def test_haproxy_names_no_client(what: str) -> None:
    data = real(f"haproxy-2.6.12-{what}")
    found = header(data)
    assert found[:2] == ({"proxy.version": what[1]}, None)
    assert data[found.length :].startswith((b"GET /cart HTTP/1.1\r\n", b"PING"))


def test_tlvs_of_haproxy() -> None:
    found = keys(real("haproxy-2.6.12-v2-ssl"))
    assert found["proxy.authority"] == "shop.example"
    assert found["proxy.alpn"] == "h2"
    assert found["proxy.unique-id"] == "C6336407:B08A_CB00710A:03ED_6B040786_0005"
    found = keys(real("haproxy-2.6.12-v2-crc32c"))
    assert found["proxy.unique-id"] == "C6336407:B344_CB00710A:03EC_6B040786_0004"
    assert not {"proxy.authority", "proxy.alpn"} & found.keys()


@pytest.mark.parametrize("file", sorted(VECTORS.glob("proxy-*.bin")), ids=lambda file: file.stem)
def test_every_cut_of_what_is_real(file: Path) -> None:
    data = file.read_bytes()
    found = header(data)
    assert all(read(data[:part]) is Answer.NEED_MORE for part in range(found.length))
    assert all(read(data[:part]) == found for part in range(found.length, len(data)))
    assert inspect(data) == found.keys


@pytest.mark.parametrize(("what", "checksum"), [("v2-crc32c", 28), ("v2-ssl", 28), ("v2-ssl-cn", 52)])
def test_every_changed_bit_is_seen_by_the_checksum_of_haproxy(what: str, checksum: int) -> None:
    data = real(f"haproxy-2.6.12-{what}")
    data = data[: header(data).length]
    assert data[checksum] == CRC32C
    unseen = []
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        answer = read(bytes(changed))
        if isinstance(answer, Header):
            unseen.append((bit // 8, answer.source is None))
    # LOCAL, an unspecified family, an unspecified transport; and another type of the checksum's own TLV.
    assert unseen == [(12, True), (13, True), (13, True), *[(checksum, False)] * len(unseen[3:])]


# Version 1


@pytest.mark.parametrize(
    ("line", "expected", "source"),
    [
        ("TCP4 198.51.100.7 203.0.113.10 40000 443", ("198.51.100.7", 40000, "203.0.113.10", 443), IPV4[0]),
        ("TCP4 0.0.0.0 255.255.255.255 0 65535", ("0.0.0.0", 0, "255.255.255.255", 65535), bytes(4)),
        ("TCP6 2001:DB8:0:0::7 2001:db8::0010 1 2", ("2001:db8::7", 1, "2001:db8::10", 2), IPV6[0]),
        ("TCP6 :: ::1 1 2", ("::", 1, "::1", 2), bytes(16)),
        (
            f"TCP6 {'FFFF:' * 7}FFFF {'ffff:' * 7}ffff 65535 65535",
            ("ffff:" * 7 + "ffff", 65535, "ffff:" * 7 + "ffff", 65535),
            b"\xff" * 16,
        ),
        ("TCP6 ::ffff:198.51.100.7 ::FFFF:cb00:710a 1 2", ("198.51.100.7", 1, "203.0.113.10", 2), IPV4[0]),
        (
            "TCP6 64:ff9b::198.51.100.7 ::1 1 2",
            ("64:ff9b::c633:6407", 1, "::1", 2),
            b"\0\x64\xff\x9b" + bytes(8) + IPV4[0],
        ),
    ],
)
def test_lines(line: str, expected: tuple[str, int, str, int], source: bytes) -> None:
    data = f"PROXY {line}\r\n".encode()
    assert read(data) == read(data + GET) == Header(names("1", *expected), source, len(data))
    assert all(read(data[:part]) is Answer.NEED_MORE for part in range(len(data)))


@pytest.mark.parametrize("rest", ["", " ", " ffff::1 ffff::2 65535 65535", "  TCP4 whatever"])
def test_unknown(rest: str) -> None:
    data = f"PROXY UNKNOWN{rest}\r\n".encode()
    assert read(data + GET) == Header({"proxy.version": "1"}, None, len(data))
    assert all(read(data[:part]) is Answer.NEED_MORE for part in range(len(data)))


def test_the_longest_line() -> None:
    start = b"PROXY UNKNOWN "
    assert header(start + b"x" * (105 - len(start)) + b"\r\n" + GET).length == 107
    assert read(start + b"x" * (106 - len(start)) + b"\r\n" + GET) is Answer.NOT_MINE
    assert read(start + b"x" * (106 - len(start))) is Answer.NEED_MORE
    assert read(start + b"x" * (107 - len(start))) is Answer.NOT_MINE


@pytest.mark.parametrize(
    "line",
    [
        "PROXY",
        "PROXY ",
        "PROXY TCP4",
        "PROXY TCP5 198.51.100.7 203.0.113.10 1 2",
        "PROXY UDP4 198.51.100.7 203.0.113.10 1 2",
        "PROXY tcp4 198.51.100.7 203.0.113.10 1 2",
        "proxy TCP4 198.51.100.7 203.0.113.10 1 2",
        " PROXY TCP4 198.51.100.7 203.0.113.10 1 2",
        "PROXY  TCP4 198.51.100.7 203.0.113.10 1 2",
        "PROXY TCP4  198.51.100.7 203.0.113.10 1 2",
        "PROXY TCP4 198.51.100.7\t203.0.113.10 1 2",
        "PROXY TCP4 198.51.100.7 203.0.113.10 1 2 ",
        "PROXY TCP4 198.51.100.7 203.0.113.10 1 2 3",
        "PROXY TCP4 198.51.100.7 203.0.113.10 1",
        "PROXY TCP4 198.51.100.7 203.0.113.10 1 65536",
        "PROXY TCP4 198.51.100.7 203.0.113.10 01 2",
        "PROXY TCP4 198.51.100.7 203.0.113.10 +1 2",
        "PROXY TCP4 198.51.100.7 203.0.113.10 -1 2",
        "PROXY TCP4 198.51.100.7 203.0.113.10 1 ",
        "PROXY TCP4 198.51.100.7 203.0.113.10 a 2",
        "PROXY TCP4 198.51.100.07 203.0.113.10 1 2",
        "PROXY TCP4 198.51.100.256 203.0.113.10 1 2",
        "PROXY TCP4 198.51.100 203.0.113.10 1 2",
        "PROXY TCP4 198.51.100.7. 203.0.113.10 1 2",
        "PROXY TCP4 c6.33.64.7 203.0.113.10 1 2",
        "PROXY TCP4 2001:db8::7 2001:db8::10 1 2",
        "PROXY TCP4 198.51.100.7 2001:db8::10 1 2",
        "PROXY TCP6 198.51.100.7 203.0.113.10 1 2",
        "PROXY TCP6 2001:db8::7 203.0.113.10 1 2",
        "PROXY TCP6 2001:db8::7%1 2001:db8::10 1 2",
        "PROXY TCP6 2001:db8:::7 2001:db8::10 1 2",
        "PROXY TCP6 2001::db8::7 2001:db8::10 1 2",
        "PROXY TCP6 2001:00db8::7 2001:db8::10 1 2",
        "PROXY TCP6 1:2:3:4:5:6:7 2001:db8::10 1 2",
        "PROXY TCP6 1:2:3:4:5:6:7:8:9 2001:db8::10 1 2",
        "PROXY TCP6 [2001:db8::7] 2001:db8::10 1 2",
        "PROXY TCP6 ::ffff:198.51.100.07 2001:db8::10 1 2",
        "PROXY UNKNOWNS",
        "PROXY UNKNOWN\t",
        "PROXY UNKNOWN \0",
        "PROXY UNKNOWN \x7f",
        "PROXY UNKNOWN \r",
        "PROXY UNKNOWN\nGET / HTTP/1.1",
        "PROXY UNKNOWN a\rb",
        "PROXY TCP4 198.51.100.7 203.0.113.10 1 2\nGET / HTTP/1.1",
        "PROXY TCP4 198.51.100.7 203.0.113.10 1 2\r",
        "PROXY TCP4 198.51.100.7 203.0.113.10 1 2\rX",
    ],
    ids=repr,
)
def test_lines_that_are_refused(line: str) -> None:
    assert read(line.encode() + b"\r\n") is Answer.NOT_MINE
    assert read(line.encode() + b"\r\n" + GET) is Answer.NOT_MINE


@pytest.mark.parametrize(
    "beginning",
    [
        b"G",
        b"\x16",
        b"p",
        b"PRI",
        b"PO",
        b"PROXYS",
        b"PROXY\r",
        b"PROXY T0",
        b"PROXY TCP4 g",
        b"PROXY TCP6 %",
        b"PROXY TCP4 1\n",
        b"PROXY UNKNOWN\n",
        b"PROXY UNKNOWN \r\r",
        b"\r\nG",
        b"\r\n\r\n\r",
        SIGNATURE + b"\x11",
        SIGNATURE + b"\x22",
        SIGNATURE + b"\x31",
        SIGNATURE + b"\x21\x13",
        SIGNATURE + b"\x21\x41",
        SIGNATURE + b"\x21\x11" + (BOUND - 15).to_bytes(2, "big"),
        SIGNATURE + b"\x20\x00\xff\xff",
    ],
    ids=repr,
)
def test_not_mine_as_soon_as_it_cannot_be_a_header(beginning: bytes) -> None:
    assert read(beginning) is Answer.NOT_MINE
    assert read(beginning[:-1]) is Answer.NEED_MORE


# Version 2


@pytest.mark.parametrize("family", [TCP4, UDP4])
def test_ipv4(family: int) -> None:
    data = binary(ADDRESSES, family)
    expected = names("2", "198.51.100.7", 40000, "203.0.113.10", 443)
    assert read(data + GET) == Header(expected, IPV4[0], 28)


@pytest.mark.parametrize("family", [TCP6, UDP6])
def test_ipv6(family: int) -> None:
    data = binary(b"".join(IPV6) + PORTS, family)
    assert read(data + GET) == Header(names("2", "2001:db8::7", 40000, "2001:db8::10", 443), IPV6[0], 52)


def test_mapped_addresses() -> None:
    data = binary(b"".join(MAPPED) + PORTS, TCP6)
    assert read(data) == Header(names("2", "198.51.100.7", 40000, "203.0.113.10", 443), IPV4[0], 52)
    # Each address by itself.
    data = binary(MAPPED[0] + IPV6[1] + PORTS, TCP6)
    assert read(data) == Header(names("2", "198.51.100.7", 40000, "2001:db8::10", 443), IPV4[0], 52)


@pytest.mark.parametrize("family", [UNIX, UNIX_DATAGRAM])
def test_unix_sockets_have_no_address_but_tlvs(family: int) -> None:
    data = binary(b"/run/a".ljust(108, b"\0") * 2 + tlv(AUTHORITY, b"a.example"), family)
    assert read(data + GET) == Header({"proxy.version": "2", "proxy.authority": "a.example"}, None, len(data))


@pytest.mark.parametrize(
    ("command", "family"),
    [(LOCAL, UNSPEC), (LOCAL, TCP4), (LOCAL, 0xFF), (PROXY, UNSPEC), (PROXY, 0x10), (PROXY, 0x01), (PROXY, 0x02)],
)
@pytest.mark.parametrize("block", [b"", ADDRESSES, b"\xff" * 5, tlv(AUTHORITY, b"a b") + tlv(CRC32C, b"")])
def test_what_names_no_client_is_skipped_unread(command: int, family: int, block: bytes) -> None:
    data = binary(block, family, command)
    assert read(data + GET) == Header({"proxy.version": "2"}, None, 16 + len(block))


@pytest.mark.parametrize(("family", "size"), [(TCP4, 12), (UDP4, 12), (TCP6, 36), (UDP6, 36), (UNIX, 216)])
def test_a_block_too_short_for_its_addresses(family: int, size: int) -> None:
    assert isinstance(read(binary(bytes(size), family)), Header)
    for length in range(size):
        assert read(binary(bytes(length), family)) is Answer.NOT_MINE
        assert read(binary(bytes(length), family) + GET) is Answer.NOT_MINE


# TLVs


@pytest.mark.parametrize(
    ("tlvs", "expected"),
    [
        (tlv(AUTHORITY, b"Shop.Example."), {"proxy.authority": "shop.example"}),
        (tlv(AUTHORITY, b"\xc3\x89.example"), {"proxy.authority": "\xc3\x89.example"}),
        (tlv(AUTHORITY, b""), {}),
        (tlv(AUTHORITY, b"."), {}),
        (tlv(ALPN, b"http/1.1"), {"proxy.alpn": "http/1.1"}),
        (tlv(ALPN, b""), {}),
        (tlv(UNIQUE_ID, b"\0\xff Id"), {"proxy.unique-id": "\0\xff Id"}),
        (tlv(UNIQUE_ID, b"x" * 128), {"proxy.unique-id": "x" * 128}),
        (tlv(NOOP, b"\0\0") * 3 + tlv(ALPN, b"h2") + tlv(NOOP, b""), {"proxy.alpn": "h2"}),
        (tlv(CUSTOM, b"vpce-1") * 2 + tlv(SSL, b"\1\0\0\0\0"), {}),
    ],
)
def test_tlvs(tlvs: bytes, expected: Keys) -> None:
    address_keys = names("2", "198.51.100.7", 40000, "203.0.113.10", 443)
    assert keys(binary(ADDRESSES + tlvs)) == keys(with_checksum(tlvs)) == address_keys | expected
    assert keys(with_checksum(behind=tlvs)) == address_keys | expected


@pytest.mark.parametrize(
    "tlvs",
    [
        b"\4",
        b"\4\0",
        b"\4\0\1",
        tlv(NOOP, b"") + b"\0",
        tlv(NOOP, b"more")[:-1],
        b"\xe0\xff\xff",
        tlv(AUTHORITY, b"a.example") * 2,
        tlv(AUTHORITY, b"a.example") + tlv(AUTHORITY, b""),
        tlv(ALPN, b"h2") * 2,
        tlv(UNIQUE_ID, b"1") + tlv(UNIQUE_ID, b"2"),
        tlv(UNIQUE_ID, b"x" * 129),
        tlv(AUTHORITY, b"a.example\0b.example"),
        tlv(AUTHORITY, b"a example"),
        tlv(AUTHORITY, b"a.example\n"),
        tlv(CRC32C, b""),
        tlv(CRC32C, bytes(3)),
        tlv(CRC32C, bytes(5)),
        tlv(CRC32C, bytes(4)),
    ],
    ids=repr,
)
def test_tlvs_that_are_refused(tlvs: bytes) -> None:
    assert read(binary(ADDRESSES + tlvs)) is Answer.NOT_MINE
    assert read(binary(ADDRESSES + tlvs) + bytes(300)) is Answer.NOT_MINE


def test_two_checksums() -> None:
    assert read(with_checksum(behind=tlv(CRC32C, bytes(4)))) is Answer.NOT_MINE


def test_crc32c() -> None:
    """The check value of the CRC catalogues, and the examples of RFC 3720 appendix B.4 (as numbers, not as bytes)."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


# Bounds


def test_the_longest_header() -> None:
    data = with_checksum(tlv(CUSTOM, bytes(BOUND - len(with_checksum()) - 3)))
    assert len(data) == BOUND == PARSER.bound
    assert header(data + GET).length == BOUND
    assert read(data[:-1]) is Answer.NEED_MORE


def test_any_parser_has_room_behind_the_longest_header() -> None:
    others = [parser.bound for parser in REGISTRY.values() if parser is not PARSER]
    assert BOUND + max(others) < Limits().connection_bytes


# Any header


addresses = st.tuples(*[st.ip_addresses(v=4)] * 2) | st.tuples(*[st.ip_addresses(v=6)] * 2)
ports = st.integers(0, 0xFFFF)


@given(addresses, ports, ports, st.binary(max_size=20))
def test_any_addresses_as_text_and_as_bytes(
    pair: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...],
    source_port: int,
    destination_port: int,
    behind: bytes,
) -> None:
    version = pair[0].version
    packed = pair[0].packed + pair[1].packed + struct.pack("!HH", source_port, destination_port)
    as_bytes = binary(packed, TCP4 if version == 4 else TCP6)
    long_form = " ".join(address.exploded.upper() for address in pair)
    as_text = f"PROXY TCP{version} {long_form} {source_port} {destination_port}\r\n".encode()
    by_bytes, by_text = header(as_bytes + behind), header(as_text + behind)
    assert by_bytes.length == len(as_bytes)
    assert by_text.length == len(as_text)
    assert by_bytes.source == by_text.source
    assert by_bytes.keys | {"proxy.version": "1"} == by_text.keys
    assert by_bytes.source is not None
    assert by_bytes.keys["proxy.source"] == str(ipaddress.ip_address(by_bytes.source))
    if getattr(pair[0], "ipv4_mapped", None) is None:
        assert by_bytes.source == pair[0].packed


def test_what_is_encoded_is_what_the_specification_says_and_what_is_read_back() -> None:
    assert encode(IPV4[0], 40000, IPV4[1], 443) == binary()
    assert encode(IPV6[0], 40000, IPV6[1], 443) == binary(b"".join(IPV6) + PORTS, TCP6)
    header = encode(IPV6[0], 40000, IPV6[1], 443)
    assert read(header + GET) == Header(names("2", "2001:db8::7", 40000, "2001:db8::10", 443), IPV6[0], len(header))
