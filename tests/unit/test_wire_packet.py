"""Packets built by scapy, read by steerd, compared field by field; and the ways in which headers can lie."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.layers.inet6 import (
    HBHOptUnknown,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.packet import Raw

from steerd.model import TCP as TCP_NUMBER
from steerd.model import UDP as UDP_NUMBER
from steerd.wire import packet
from steerd.wire.packet import Packet, parse

V4: dict[str, Any] = {"src": "198.51.100.7", "dst": "203.0.113.10"}
V6: dict[str, Any] = {"src": "2001:db8::7", "dst": "2001:db8::10"}
OPTIONS = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
SYN = TCP(sport=40000, dport=443, flags="SEC", seq=0xFFFFFFFE, ack=1, options=OPTIONS)
SYN_OPTIONS = bytes.fromhex("020405b4 0402 080a0000000100000000 01 030307")
DATA = TCP(sport=40000, dport=443, flags="PA", seq=2, ack=3) / Raw(b"hello")


def expected(version: int, header: Any, **fields: Any) -> Packet:
    """The record of a SYN as above, but for `fields`."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    record = Packet(
        version=version, src=socket.inet_pton(family, header["src"]), dst=socket.inet_pton(family, header["dst"]),
        protocol=TCP_NUMBER, sport=40000, dport=443, flags=0xC2, seq=0xFFFFFFFE, ack=1,
        ip_options=b"", dst_options=b"", tcp_options=SYN_OPTIONS, payload=b"", window=8192,
    )  # fmt: skip
    return record._replace(**fields)


def test_ipv4_syn() -> None:
    assert parse(bytes(IP(**V4) / SYN)) == expected(4, V4)


def test_ipv6_syn() -> None:
    assert parse(bytes(IPv6(**V6) / SYN)) == expected(6, V6)


def test_ipv4_options() -> None:
    option = bytes.fromhex("9e08535400070000")
    built = bytes(IP(**V4, options=[IPOption(option)]) / SYN)
    assert parse(built) == expected(4, V4, ip_options=option)


def test_payload_ends_where_the_ip_length_says() -> None:
    data = {"flags": packet.PSH | packet.ACK, "seq": 2, "ack": 3, "tcp_options": b"", "payload": b"hello"}
    assert parse(bytes(IP(**V4) / DATA) + b"ethernet padding") == expected(4, V4, **data)
    assert parse(bytes(IPv6(**V6) / DATA) + b"ethernet padding") == expected(6, V6, **data)


def test_a_payload_may_be_cut_short_by_the_copy() -> None:
    for built in (bytes(IP(**V4) / DATA), bytes(IPv6(**V6) / DATA)):
        read = parse(built[:-2])
        assert read is not None
        assert read.payload == b"hel"


@pytest.mark.parametrize(("version", "header"), [(4, IP(**V4)), (6, IPv6(**V6))])
def test_udp(version: int, header: Any) -> None:
    fields = {"protocol": UDP_NUMBER, "flags": 0, "seq": 0, "ack": 0, "tcp_options": b"", "payload": b"hello"} | {
        "window": 0
    }
    built = bytes(header / UDP(sport=40000, dport=443) / Raw(b"hello"))
    assert parse(built) == expected(version, V4 if version == 4 else V6, **fields)
    assert parse(built + b"padding") == parse(built)


def test_udp_length_that_is_too_small_or_points_outside_the_packet() -> None:
    for length in (0, 7, 14):
        assert parse(bytes(IP(**V4) / UDP(sport=1, dport=2, len=length) / Raw(b"hello"))) is None
    within = parse(bytes(IP(**V4) / UDP(sport=1, dport=2, len=10) / Raw(b"hello")))
    assert within is not None
    assert within.payload == b"he"


def test_ipv6_extension_headers_are_walked() -> None:
    ours = HBHOptUnknown(otype=0x1E, optlen=6, optdata=bytes.fromhex("535400070000"))
    built = bytes(
        IPv6(**V6)
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt(options=[ours])
        / IPv6ExtHdrRouting(segleft=0, type=2, addresses=["2001:db8::99"])
        / IPv6ExtHdrFragment(offset=0, m=0)
        / IPv6ExtHdrDestOpt(options=[ours], autopad=1)
        / SYN
    )
    read = parse(built)
    assert read is not None
    assert read == expected(6, V6, dst_options=read.dst_options)
    assert read.dst_options.count(bytes.fromhex("1e06535400070000")) == 2
    assert len(read.dst_options) == 2 * 14


def test_fragments() -> None:
    assert parse(bytes(IP(**V4, flags="MF") / SYN)) == expected(4, V4)
    assert parse(bytes(IP(**V4, frag=1) / SYN)) is None
    assert parse(bytes(IPv6(**V6) / IPv6ExtHdrFragment(offset=0, m=1) / SYN)) == expected(6, V6)
    for offset in (1, 31, 32, 8191):
        assert parse(bytes(IPv6(**V6) / IPv6ExtHdrFragment(offset=offset) / SYN)) is None


def test_extension_headers_are_bounded() -> None:
    def chain(number: int) -> bytes:
        built = IPv6(**V6)
        for _ in range(number):
            built /= IPv6ExtHdrDestOpt()
        return bytes(built / SYN)

    assert parse(chain(packet.MAX_EXTENSION_HEADERS)) is not None
    assert parse(chain(packet.MAX_EXTENSION_HEADERS + 1)) is None


def test_hop_by_hop_options_in_a_wrong_place() -> None:
    assert parse(bytes(IPv6(**V6) / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / SYN)) is None


@pytest.mark.parametrize("built", [IP(**V4) / SYN, IPv6(**V6) / SYN, IPv6(**V6) / IPv6ExtHdrDestOpt() / SYN])
def test_headers_that_end_too_early(built: Any) -> None:
    whole = bytes(built)
    assert all(parse(whole[:length]) is None for length in range(len(whole)))
    assert parse(whole) is not None


def test_headers_that_contradict_each_other() -> None:
    assert parse(bytes(IP(**V4, len=59) / SYN)) is None, "TCP header longer than the packet"
    assert parse(bytes(IP(**V4, len=0) / SYN)) is None
    assert parse(bytes(IP(**V4, ihl=4) / SYN)) is None
    assert parse(bytes(IPv6(**V6, plen=39) / SYN)) is None
    assert parse(bytes(IP(**V4) / TCP(dataofs=4))) is None
    assert parse(bytes(IP(**V4) / TCP(dataofs=15))) is None


def test_other_protocols_are_none() -> None:
    assert parse(bytes(IP(**V4) / ICMP() / Raw(bytes(40)))) is None
    assert parse(bytes(IPv6(**V6) / ICMPv6EchoRequest(data=bytes(40)))) is None
    assert parse(b"\x55" + bytes(100)) is None
    assert parse(b"") is None
