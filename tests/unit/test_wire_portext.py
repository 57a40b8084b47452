"""The port extension: what is ours, what is malformed, and that what is encoded is found again."""

from __future__ import annotations

import pytest

from steerd.model import TCP, UDP, Extension
from steerd.wire import portext
from steerd.wire.packet import SYN, Packet, parse
from steerd.wire.portext import MALFORMED, Malformed, Numbers

NUMBERS = Numbers()
SEVEN = Extension(7, 9)
IPV4 = bytes.fromhex("9e08 5354 0007 0009")
IPV6 = bytes.fromhex("1e06 5354 0007 0009")
TCP_OPTION = bytes.fromhex("fd08 5354 0007 0009")


def packet(ipv4: bytes = b"", ipv6: bytes = b"", tcp: bytes = b"") -> Packet:
    return Packet(4, bytes(4), bytes(4), TCP, 40000, 443, SYN, 0, 0, ipv4, ipv6, tcp, b"")


def find(ipv4: bytes = b"", ipv6: bytes = b"", tcp: bytes = b"") -> Extension | Malformed | None:
    return portext.find(packet(ipv4, ipv6, tcp), NUMBERS)


def test_bytes_as_documented() -> None:
    assert portext.encode_ipv4(SEVEN, NUMBERS) == IPV4
    assert portext.encode_tcp(SEVEN, NUMBERS) == TCP_OPTION
    header = portext.encode_ipv6(SEVEN, NUMBERS)
    assert header == b"\x00\x01" + IPV6 + bytes.fromhex("0104 00000000")
    assert len(header) == (header[1] + 1) * 8


def test_each_carrier() -> None:
    assert find(ipv4=IPV4) == SEVEN
    assert find(ipv6=IPV6) == SEVEN
    assert find(tcp=TCP_OPTION) == SEVEN


@pytest.mark.parametrize(
    "built",
    [
        "47000029 26ff4000 4011ba12 c6336407 cb00710a 9e085354000700099c401151 000d666468 656c6c6f",
        "60074c01 001d3c40 20010db8000000000000000000000007 20010db8000000000000000000000010"
        "11011e06 53540007 00090104 00000000 9c401151 000db2e7 68656c6c6f",
    ],
    ids=["IP_OPTIONS", "IPV6_DSTOPTS"],
)
def test_datagrams_of_a_linux_socket_with_our_option(built: str) -> None:
    """As Linux 6.18 sent them, `encode_ipv4` and `encode_ipv6` being what setsockopt was given."""
    datagram = parse(bytes.fromhex(built))
    assert datagram is not None
    assert (datagram.protocol, datagram.sport, datagram.dport, datagram.payload) == (UDP, 40000, 4433, b"hello")
    found = portext.find(datagram, NUMBERS)
    assert found == SEVEN
    keys = portext.keys(SEVEN, datagram.dport)
    assert keys == {"portext.dst": "7", "portext.src": "9", "portext.port": str(7 * 65536 + 4433)}


def test_other_options_before_and_behind() -> None:
    mss_nop_sack = bytes.fromhex("020405b4 01 0402")
    assert find(tcp=mss_nop_sack + TCP_OPTION + b"\x03\x03\x07") == SEVEN
    router_alert = bytes.fromhex("94040000")
    assert find(ipv4=router_alert + b"\x01" + IPV4) == SEVEN
    pad1_padn = bytes.fromhex("00 0102ffff")
    assert find(ipv6=pad1_padn + IPV6 + b"\x01\x00") == SEVEN


def test_somebody_elses_options_are_ignored() -> None:
    assert find() is None
    assert find(ipv4=bytes.fromhex("9e08 5355 0007 0009")) is None, "another ExID"
    assert find(ipv4=bytes.fromhex("5e08 5354 0007 0009")) is None, "another type"
    assert find(tcp=bytes.fromhex("fe08 5354 0007 0009")) is None
    assert find(tcp=bytes.fromhex("fd08 5355 0007 0009") + TCP_OPTION) == SEVEN, "two experiments share kind 253"
    assert find(tcp=bytes.fromhex("fd03 53 01") + TCP_OPTION) == SEVEN, "no room for an ExID"
    assert find(tcp=bytes.fromhex("fd02 5354")) is None


def test_our_bytes_inside_another_option_are_not_an_option() -> None:
    assert find(tcp=b"\xfe\x0a" + TCP_OPTION) is None
    assert find(ipv4=b"\x94\x0a" + IPV4) is None


def test_nothing_is_read_behind_the_end_of_the_list() -> None:
    assert find(tcp=b"\x00" + TCP_OPTION) is None
    assert find(ipv4=b"\x00" + IPV4) is None
    assert find(tcp=TCP_OPTION + b"\x00" + TCP_OPTION) == SEVEN


def test_nothing_is_read_behind_an_option_that_points_outside_or_has_no_length() -> None:
    for broken in (b"\x02\x00", b"\x02\x01", b"\x02\xff"):
        assert find(tcp=broken + TCP_OPTION) is None
        assert find(tcp=TCP_OPTION + broken) == SEVEN
    assert find(tcp=TCP_OPTION + b"\x02") == SEVEN


@pytest.mark.parametrize("length", [4, 5, 6, 7, 9, 10, 255])
def test_ours_with_a_wrong_length_is_malformed(length: int) -> None:
    for option in (IPV4, TCP_OPTION):
        area = option[:1] + bytes([length]) + option[2:] + bytes(2)
        assert portext.find(packet(area, b"", b"") if option is IPV4 else packet(b"", b"", area), NUMBERS) is MALFORMED
    assert find(ipv6=b"\x1e" + bytes([length - 2 if length != 8 else 7]) + IPV6[2:] + bytes(2)) is MALFORMED


@pytest.mark.parametrize("held", [4, 5, 6, 7])
def test_ours_cut_short_is_malformed(held: int) -> None:
    assert find(ipv4=IPV4[:held]) is MALFORMED
    assert find(ipv6=IPV6[:held]) is MALFORMED
    assert find(tcp=TCP_OPTION[:held]) is MALFORMED


@pytest.mark.parametrize("held", [1, 2, 3])
def test_cut_before_the_exid_it_is_nobodys(held: int) -> None:
    assert find(IPV4[:held], IPV6[:held], TCP_OPTION[:held]) is None


def test_more_than_one_is_malformed() -> None:
    assert find(ipv4=IPV4 + IPV4) is MALFORMED
    assert find(ipv4=IPV4, tcp=TCP_OPTION) is MALFORMED
    assert find(ipv6=IPV6, tcp=TCP_OPTION) is MALFORMED
    assert find(tcp=TCP_OPTION + bytes.fromhex("fd08 5354 0000 0000")) is MALFORMED
    assert find(tcp=TCP_OPTION + bytes.fromhex("fd06 5354 0000")) is MALFORMED


def test_zero_is_not_extended() -> None:
    assert find(ipv4=bytes.fromhex("9e08 5354 0000 0000")) is None
    assert find(ipv4=bytes.fromhex("9e08 5354 0000 0009")) == Extension(0, 9)


def test_numbers_are_configurable() -> None:
    numbers = Numbers(0xDE, 0x3E, 254, 0xABCD)
    for kind, area in (
        (packet(ipv4=portext.encode_ipv4(SEVEN, numbers)), portext.Area.IPV4),
        (packet(ipv6=portext.encode_ipv6(SEVEN, numbers)[2:]), portext.Area.IPV6),
        (packet(tcp=portext.encode_tcp(SEVEN, numbers)), portext.Area.TCP),
    ):
        assert portext.find(kind, numbers) == SEVEN, area
        assert portext.find(kind, NUMBERS) is None, area


@pytest.mark.parametrize("extension", [Extension(65536, 0), Extension(-1, 0), Extension(0, 65536), Extension(0, -1)])
def test_encoding_refuses_what_does_not_fit(extension: Extension) -> None:
    for encode in (portext.encode_ipv4, portext.encode_ipv6, portext.encode_tcp):
        with pytest.raises(ValueError, match="extension must be between 0 and 65535"):
            encode(extension, NUMBERS)


def test_split() -> None:
    assert portext.split(70000) == (1, 4464)
    assert portext.split(443) == (0, 443)
    assert portext.split(65537) == (1, 1)
    assert portext.split(4294967295) == (65535, 65535)


@pytest.mark.parametrize("port", [0, -1, 4294967296])
def test_split_refuses_what_is_no_extended_port(port: int) -> None:
    with pytest.raises(ValueError, match=f"must be between 1 and 4294967295, not {port}"):
        portext.split(port)


def test_split_refuses_port_zero() -> None:
    with pytest.raises(ValueError, match=r"65536 is extension 1 of port 0.* is 65537"):
        portext.split(65536)


def test_keys() -> None:
    assert portext.keys(Extension(1, 0), 4464) == {"portext.dst": "1", "portext.port": "70000"}
    assert portext.keys(Extension(0, 9), 4464) == {"portext.src": "9"}
    assert portext.keys(Extension(65535, 2), 65535) == {
        "portext.dst": "65535", "portext.src": "2", "portext.port": "4294967295",
    }  # fmt: skip
