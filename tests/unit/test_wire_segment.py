"""Segments that are sent: scapy reads them, and finds every checksum right."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from steerd.model import TCP as TCP_NUMBER
from steerd.wire import segment
from steerd.wire.packet import ACK, FIN, PSH, RST, SYN, Packet, is_damaged, parse

TIMESTAMPS = bytes.fromhex("0101080a0000000100000042")
ADDRESSES = {
    4: tuple(ipaddress.ip_address(text).packed for text in ("198.51.100.1", "203.0.113.10")),
    6: tuple(ipaddress.ip_address(text).packed for text in ("2001:db8:1::1", "2001:db8::10")),
}


def packet(version: int, payload: bytes = b"hello", options: bytes = TIMESTAMPS, flags: int = ACK | PSH) -> Packet:
    src, dst = ADDRESSES[version]
    return Packet(
        version, src, dst, TCP_NUMBER, 40000, 443, flags, 0xFFFFFFFE, 77, b"", b"", options, payload, window=501
    )


def check(built: bytes) -> Packet:
    """Read a segment back, and have scapy compute its checksums anew."""
    layer = IP(built) if built[0] >> 4 == 4 else IPv6(built)
    del layer[TCP].chksum
    if layer.version == 4:
        del layer.chksum
    assert bytes(layer) == built
    read = parse(built)
    assert read is not None
    return read


def ones_complement(data: bytes) -> int:
    return int.from_bytes(data, "big") % 0xFFFF


both = pytest.mark.parametrize("version", [4, 6])


@both
def test_a_bare_ack_is_the_first_segment_without_its_payload(version: int) -> None:
    first = packet(version)
    assert check(segment.bare_ack(first)) == first._replace(flags=ACK, payload=b"")


@both
def test_a_bare_syn_is_the_syn_without_options_of_the_ip_header_and_payload(version: int) -> None:
    syn = packet(version, b"early", b"\x02\x04\x05\xb4", SYN)._replace(ack=0, ip_options=b"\1\1\1\1")
    assert check(segment.bare_syn(syn)) == syn._replace(payload=b"", ip_options=b"")


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16), st.booleans())
def test_the_flow_label_makes_both_ways_of_checking_right(src: bytes, dst: bytes, timestamps: bool) -> None:
    """nft_synproxy sums the IPv6 header's words 0 to 3 and 6 to 9 on top of what belongs to the checksum."""
    first = packet(6, options=TIMESTAMPS if timestamps else b"")._replace(src=src, dst=dst)
    for built in (segment.bare_ack(first), segment.bare_syn(first._replace(flags=SYN))):
        assert ones_complement(built[:8] + built[12:20]) == 0
        assert built[0] >> 4 == 6


@both
def test_data_is_cut_into_segments_in_order_and_the_last_one_carries_the_fin(version: int) -> None:
    payload = bytes(range(256)) * 10
    first = packet(version)
    read = [check(built) for built in segment.data(first, payload, fin=True, size=1000)]
    assert b"".join(part.payload for part in read) == payload
    assert [part.seq for part in read] == [(first.seq + at) % 2**32 for at in (0, 1000, 2000)]
    assert [bool(part.flags & FIN) for part in read] == [False, False, True]
    assert {(part.ack, part.window, part.tcp_options) for part in read} == {(77, 501, TIMESTAMPS)}


@both
def test_an_acknowledgement_goes_the_other_way_and_answers_the_timestamps(version: int) -> None:
    asked = packet(version)
    answer = check(segment.acknowledgement(asked, asked.seq + 5, 32768, 7))
    assert (answer.src, answer.dst, answer.sport, answer.dport) == (asked.dst, asked.src, 443, 40000)
    assert (answer.seq, answer.ack, answer.flags) == (77, 3, ACK)
    assert answer.tcp_options == bytes.fromhex("0101080a0000004200000001")
    assert answer.window == 32768 >> 7


@pytest.mark.parametrize(
    ("options", "window"),
    [
        (b"", 32768),  # no timestamps, hence no cookie in them: nothing is scaled
        (bytes.fromhex("0101080a000000010000004f"), 32768),  # the client offered no window scale
        (bytes.fromhex("0101080a0000000100000042"), 256),
        (bytes.fromhex("080a0000000100000042") + b"\0\0", 256),
        (bytes.fromhex("0800"), 32768),  # broken options say nothing
        (bytes.fromhex("05020101"), 32768),
    ],
)
def test_the_window_is_scaled_if_the_client_offered_it(options: bytes, window: int) -> None:
    answer = parse(segment.acknowledgement(packet(4, options=options), 5, 32768, 7))
    assert answer is not None
    assert answer.window == window


@both
def test_a_reset_and_an_alert_are_what_the_client_expects_next(version: int) -> None:
    asked = packet(version)
    alert = check(segment.alert(asked, 5, b"alert!!"))
    assert (alert.seq, alert.ack, alert.payload) == (77, 3, b"alert!!")
    reset = check(segment.reset(asked, 7))
    assert (reset.seq, reset.flags, reset.payload) == (84, RST, b"")


@both
@given(payload=st.binary(min_size=1, max_size=100), behind=st.binary(max_size=3), data=st.data())
def test_a_segment_with_a_wrong_bit_is_damaged(
    version: int, payload: bytes, behind: bytes, data: st.DataObject
) -> None:
    """Of an odd length or an even one; what lies behind the packet does not count."""
    (built,) = segment.data(packet(version), payload, fin=False, size=len(payload))
    whole = parse(built + behind)
    assert whole is not None
    assert not is_damaged(whole, built + behind)
    place = data.draw(st.integers(len(built) - len(payload), len(built) - 1))
    changed = built[:place] + bytes([built[place] ^ 1 << data.draw(st.integers(0, 7))]) + built[place + 1 :]
    damaged = parse(changed + behind)
    assert damaged is not None
    assert is_damaged(damaged, changed + behind)
