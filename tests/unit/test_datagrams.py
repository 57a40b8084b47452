"""Undecided flows of datagrams, case by case. `inspect` here decides at the first datagram that ends in a full stop,
with all of them."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any, Literal

import pytest

from steerd.core.datagrams import MAX_DATAGRAMS, Datagrams, Decide, Drop, GiveUp, Hold, Why
from steerd.core.pending import Limits
from steerd.model import UDP, Answer
from steerd.wire.packet import Packet

ENDPOINT = {4: ipaddress.ip_address("203.0.113.10").packed, 6: ipaddress.ip_address("2001:db8::10").packed}
CLIENT = {4: "198.51.100.1", 6: "2001:db8:1::1"}
HOLD = Hold()


def sentence(_packet: Packet, payloads: Sequence[bytes]) -> bytes | Literal[Answer.NEED_MORE]:
    return b" ".join(payloads) if payloads[-1].endswith(b".") else Answer.NEED_MORE


def made(*, seconds: float = 10.0, **limits: Any) -> Datagrams[bytes]:
    return Datagrams(Limits()._replace(**limits), sentence, lambda _packet: seconds)


def packet(payload: bytes, port: int = 40000, source: str = CLIENT[4]) -> Packet:
    src = ipaddress.ip_address(source)
    return Packet(
        src.version, src.packed, ENDPOINT[src.version], UDP, port, 443, 0, 0, 0, b"", b"", b"", payload
    )  # fmt: skip


class Flows:
    """Datagrams as the worker puts them in; the bytes of an IP packet are its payload and where it came from."""

    def __init__(self, **limits: Any) -> None:
        self.undecided = made(**limits)

    def __call__(
        self, payload: bytes, port: int = 40000, source: str = CLIENT[4], *, now: float = 1.0, cut: bool = False
    ) -> Decide[bytes] | Hold | GiveUp | Drop:
        return self.undecided.datagram(packet(payload, port, source), raw(payload, port, source), now, cut=cut)

    def is_held(self, port: int = 40000, source: str = CLIENT[4]) -> bool:
        """Whether anything of a flow is held; decides it."""
        step = self(b".", port, source)
        assert isinstance(step, Decide)
        return bool(step.earlier)


def raw(payload: bytes, port: int = 40000, source: str = CLIENT[4]) -> bytes:
    return b"%s %d " % (source.encode(), port) + payload


# ---- deciding ----


@pytest.mark.parametrize("version", [4, 6])
def test_one_datagram_that_suffices_is_decided_and_nothing_is_held(version: int) -> None:
    flows = Flows()
    assert flows(b"hello.", source=CLIENT[version]) == Decide(b"hello.", ())
    assert len(flows.undecided) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_what_was_held_is_sent_again_in_the_order_in_which_it_came(version: int) -> None:
    flows, source = Flows(), CLIENT[version]
    for number, word in enumerate((b"one", b"two", b"", b"two")):
        assert flows(word, source=source, now=1.0 + number) == HOLD
        assert len(flows.undecided) == 1
    earlier = tuple(raw(word, source=source) for word in (b"one", b"two", b"", b"two"))
    assert flows(b"three.", source=source) == Decide(b"one two  two three.", earlier)
    assert len(flows.undecided) == 0


def test_nothing_of_a_decided_flow_is_remembered() -> None:
    flows = Flows(seconds=5.0)
    assert flows(b"one") == HOLD
    flows(b"two.")
    assert flows.undecided.expire(1e9) == []
    assert flows(b"three.") == Decide(b"three.", ())
    assert flows(b"four", now=100.0) == HOLD
    assert flows.undecided.expire(104.9) == []


@pytest.mark.parametrize(
    "other",
    [("198.51.100.1", 40001), ("198.51.100.2", 40000), ("2001:db8:1::1", 40000), ("2001:db8:1::2", 40000)],
)
def test_flows_are_told_apart(other: tuple[str, int]) -> None:
    flows, (source, port) = Flows(), other
    assert flows(b"one") == flows(b"ein", port, source) == HOLD
    assert flows(b"zwei.", port, source) == Decide(b"ein zwei.", (raw(b"ein", port, source),))
    assert flows(b"two.") == Decide(b"one two.", (raw(b"one"),))


# ---- what cannot be sent again ----


def test_a_copy_that_ends_early_decides_but_is_not_held() -> None:
    flows = Flows()
    assert flows(b"hello", cut=True) == Drop()
    assert len(flows.undecided) == 0
    assert flows(b"hello.", cut=True) == Decide(b"hello.", ())
    assert flows(b"one") == HOLD
    assert flows(b"two", cut=True) == Drop()
    assert flows(b"three.", cut=True) == Decide(b"one three.", (raw(b"one"),))


# ---- bounds of one flow ----


def test_a_flow_has_so_many_datagrams_and_no_more() -> None:
    flows = Flows()
    for number in range(MAX_DATAGRAMS - 1):
        assert flows(b"%d" % number) == HOLD
    assert flows(b"x") == GiveUp()
    assert len(flows.undecided) == 0
    for number in range(MAX_DATAGRAMS - 1):
        assert flows(b"%d" % number) == HOLD
    last = flows(b".")
    assert isinstance(last, Decide)
    assert len(last.earlier) == MAX_DATAGRAMS - 1, "the last one that it may have may decide"


def test_a_flow_has_so_many_bytes_and_no_more() -> None:
    flows = Flows(connection_bytes=10)
    assert flows(b"12345") == flows(b"6789") == HOLD
    assert flows(b"0") == GiveUp()
    assert len(flows.undecided) == 0
    assert flows(b"1234567890") == GiveUp()
    assert flows(b"1234567890.") == Decide(b"1234567890.", ())
    assert flows(b"123456789") == HOLD
    assert flows(b"0123.") == Decide(b"123456789 0123.", (raw(b"123456789"),)), "if it suffices, any length does"


# ---- bounds of all ----


def test_a_source_pushes_out_its_own_oldest_flow() -> None:
    flows = Flows(source_connections=2, connections=3)
    assert flows(b"other", source="198.51.100.2") == HOLD
    assert flows(b"first", 1) == flows(b"second", 2) == HOLD
    assert flows(b"third", 3) == Hold(Why.SOURCE)
    assert flows(b"more", 3) == HOLD, "a flow that is there needs no room"
    assert len(flows.undecided) == 3
    assert [flows.is_held(port) for port in (1, 2, 3)] == [False, True, True]
    assert flows.is_held(source="198.51.100.2")


@pytest.mark.parametrize(
    ("neighbour", "is_one_source"),
    [("2001:db8:1::2", True), ("2001:db8:1:0:ffff::", True), ("2001:db8:1:1::1", False)],
)
def test_a_source_of_ipv6_is_its_64(neighbour: str, is_one_source: bool) -> None:
    flows = Flows(source_connections=1)
    assert flows(b"one", source=CLIENT[6]) == HOLD
    assert flows(b"two", source=neighbour) == Hold(Why.SOURCE if is_one_source else None)
    assert flows.is_held(source=CLIENT[6]) is not is_one_source


def test_where_all_have_too_many_the_oldest_goes() -> None:
    flows = Flows(connections=3)
    for number in (1, 2, 3):
        assert flows(b"%d" % number, source=f"198.51.100.{number}") == HOLD
    flows(b"again", source="198.51.100.1")  # it is the oldest nonetheless
    assert flows(b"4", source="198.51.100.4") == Hold(Why.TOTAL)
    assert len(flows.undecided) == 3
    assert [flows.is_held(source=f"198.51.100.{number}") for number in (1, 2, 3, 4)] == [False, True, True, True]


def test_a_flood_of_sources_has_bounded_room_and_whoever_is_decided_at_once_needs_none() -> None:
    flows = Flows(connections=100)
    for number in range(1000):
        flows(b"flood", source=str(ipaddress.ip_address("192.0.2.0") + number))
        assert flows(b"hello.") == Decide(b"hello.", ())
    assert len(flows.undecided) == 100


def test_narrower_limits_hold_for_who_comes() -> None:
    flows = Flows(source_connections=5)
    for port in range(5):
        flows(b"x", port)
    flows.undecided.limits = Limits()._replace(source_connections=2)
    assert flows(b"x", 10) == Hold(Why.SOURCE)
    assert len(flows.undecided) == 5, "one goes for each that comes; the others have their time"


# ---- time ----


def test_a_flow_that_is_not_decided_in_time_is_forgotten() -> None:
    flows = Flows(seconds=5.0)
    flows(b"one", 1, now=10.0)
    flows(b"two", 2, now=12.0)
    flows(b"more", 1, now=14.9)  # its time began with its first datagram
    assert flows.undecided.expire(14.99) == []
    assert flows.undecided.expire(15.0) == [packet(b"one", 1)], "who waited, by its first datagram"
    assert flows.undecided.expire(15.0) == []
    assert flows.undecided.expire(17.0) == [packet(b"two", 2)]
    assert len(flows.undecided) == 0
    assert flows(b"again", 1, now=20.0) == HOLD


def test_each_flow_has_the_patience_of_its_service() -> None:
    undecided = Datagrams(Limits(), sentence, lambda packet: 1.0 if packet.sport == 1 else 10.0)
    for port in (2, 1, 3):
        undecided.datagram(packet(b"x", port), b"", 0.0, cut=False)
    assert undecided.expire(1.0) == [packet(b"x", 1)], "though it is not the oldest"
    assert undecided.expire(10.0) == [packet(b"x", 2), packet(b"x", 3)]


def test_what_expired_or_was_given_up_leaves_room() -> None:
    flows = Flows(seconds=5.0, source_connections=1)
    assert flows(b"one", 1, now=0.0) == HOLD
    flows.undecided.expire(5.0)
    assert flows(b"two", 2, now=5.0) == HOLD
    for _ in range(MAX_DATAGRAMS - 1):
        step = flows(b"two", 2, now=5.0)
    assert step == GiveUp()
    assert flows(b"three", 3, now=5.0) == HOLD
