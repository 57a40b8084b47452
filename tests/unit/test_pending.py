"""Pending first payloads, case by case. `inspect` here decides at the first newline, with the line before it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest

from steerd.core import pending
from steerd.core.pending import (
    Acknowledge,
    Decide,
    Drop,
    Evict,
    ForwardRaw,
    GiveUp,
    Hold,
    Limits,
    Patience,
    Pending,
    Silence,
    Step,
    Why,
)
from steerd.model import TCP, Answer
from steerd.wire.packet import ACK, FIN, PSH, RST, SYN, Packet

START = 0xFFFFFFFA  # six bytes before the sequence numbers begin anew, so that every longer payload crosses that
COOKIE = 77
CLIENT = bytes([198, 51, 100, 1])


def segment(offset: int, payload: bytes = b"", flags: int = 0, ack: int = COOKIE + 1, src: bytes = CLIENT) -> Packet:
    """A segment whose first byte is `offset` bytes from the beginning of what the client says."""
    version = 4 if len(src) == 4 else 6
    dst = bytes([203, 0, 113, 10]) if version == 4 else bytes(15) + b"\x10"
    return Packet(
        version, src, dst, TCP, 40000, 443, ACK | PSH | flags, (START + offset) % 2**32, ack, b"", b"", b"", payload
    )


def line(_first: Packet, data: bytes) -> str | Literal[Answer.NEED_MORE]:
    head, newline, _ = data.partition(b"\n")
    return head.decode("latin-1") if newline else Answer.NEED_MORE


def made(*, seconds: float = 10.0, for_silence: bool = False, **limits: Any) -> Pending[str]:
    patience = Patience(seconds, for_silence)
    return Pending(Limits()._replace(**limits), line, lambda _packet: patience, lambda _first: True)


def decided(step: Step[str]) -> Decide[str]:
    (action,) = step
    assert isinstance(action, Decide)
    return action


HOLD = (Hold(),)
FORWARD = (ForwardRaw(repeats=False),)
FORWARD_REPEATED = (ForwardRaw(repeats=True),)


# ---- one segment ----


def test_one_segment_that_suffices_is_decided_alone_and_nothing_is_held() -> None:
    held, first = made(), segment(0, b"hello\n")
    assert held.segment(first, 1.0) == (Decide("hello", first, b"hello\n", False, True),)
    assert (len(held), held.held_bytes, held.next_deadline()) == (0, 0, None)


def test_a_fin_on_the_first_segment_is_told() -> None:
    first = segment(0, b"hello\n", FIN)
    assert decided(made().segment(first, 1.0)).fin
    assert not decided(made().segment(first, 1.0, cut=True)).fin


def test_more_than_the_bound_is_cut_off_and_its_fin_with_it() -> None:
    action = decided(made(connection_bytes=6).segment(segment(0, b"hello\nmore", FIN), 1.0))
    assert (action.data, action.fin) == (b"hello\n", False)


def test_a_fin_behind_too_little_ends_it() -> None:
    first = segment(0, b"hel", FIN)
    assert made().segment(first, 1.0) == (GiveUp(Why.ENDED, first, False),)
    assert made().segment(first, 1.0, cut=True) == HOLD


@pytest.mark.parametrize(
    ("flags", "payload", "why"),
    [
        (FIN, b"", Why.FIN_ALONE),
        (0, b"", Why.NO_DATA),
        (SYN, b"hello\n", Why.NO_DATA),
        (RST, b"hello\n", Why.CLIENT_RESET),
    ],
)
def test_what_begins_nothing(flags: int, payload: bytes, why: Why) -> None:
    held = made()
    assert held.segment(segment(0, payload, flags), 1.0) == (Drop(why),)
    assert (len(held), held.remembered) == (0, 0)


# ---- more segments ----


def test_two_segments_across_the_end_of_the_sequence_numbers() -> None:
    held, first = made(), segment(0, b"hello, ")
    assert held.segment(first, 1.0) == HOLD
    assert held.segment(segment(7, b"world\n"), 1.1) == (
        Decide("hello, world", first, b"hello, world\n", False, False),
    )
    assert (len(held), held.held_bytes) == (0, 0)


def test_a_lower_segment_is_the_beginning_and_what_is_held_keeps_its_place() -> None:
    held, first = made(), segment(0, b"hello, ")
    assert held.segment(segment(7, b"wor"), 1.0) == HOLD
    assert held.segment(first, 1.1) == HOLD
    assert held.segment(segment(10, b"ld\n"), 1.2) == (
        Decide("hello, world", first, b"hello, world\n", False, False),
    )  # fmt: skip


def test_a_later_segment_that_decided_alone_is_judged_again_when_the_beginning_comes() -> None:
    held, second, first = made(), segment(7, b"world\n"), segment(0, b"hello, ")
    assert decided(held.segment(second, 1.0)).first.seq == second.seq  # the kernel's cookie refuses this one
    assert held.segment(first, 1.0) == HOLD
    assert decided(held.segment(second, 1.2)).decision == "hello, world"


def test_gaps_are_not_inspected_and_what_lies_behind_one_is_not_delivered() -> None:
    held = made()
    held.segment(segment(0, b"a"), 1.0)
    assert held.segment(segment(4, b"more"), 1.0) == HOLD
    assert decided(held.segment(segment(1, b"b\n"), 1.0)).data == b"ab\n"


def test_a_fin_that_came_early_is_sent_behind_the_data() -> None:
    held = made()
    held.segment(segment(0, b"hel"), 1.0)
    assert held.segment(segment(6, b"", FIN), 1.0) == HOLD
    assert decided(held.segment(segment(3, b"lo\n"), 1.0)).fin


def test_a_fin_beyond_a_gap_is_left_to_be_repeated() -> None:
    held = made()
    held.segment(segment(0, b"hel"), 1.0)
    assert held.segment(segment(9, b"", FIN), 1.0) == HOLD
    assert not decided(held.segment(segment(3, b"lo\n"), 1.0)).fin


def test_a_fin_keeps_its_place_when_the_beginning_moves() -> None:
    held = made()
    held.segment(segment(3, b"lo"), 1.0)
    held.segment(segment(6, b"", FIN), 1.0)
    assert held.segment(segment(0, b"hel"), 1.0) == HOLD
    assert decided(held.segment(segment(5, b"\n"), 1.0)).fin


def test_a_fin_directly_behind_too_little_ends_it_whichever_comes_last() -> None:
    held, first = made(), segment(0, b"hel")
    held.segment(first, 1.0)
    assert held.segment(segment(3, b"", FIN), 1.0) == (GiveUp(Why.ENDED, first, False),)
    held = made()
    held.segment(first, 1.0)
    held.segment(segment(5, b"", FIN), 1.0)
    assert held.segment(segment(3, b"lo"), 1.0) == (GiveUp(Why.ENDED, first, False),)


def test_connections_with_another_ack_number_are_others() -> None:
    held = made()
    held.segment(segment(0, b"hel"), 1.0)
    held.segment(segment(0, b"HEL", ack=5), 1.0)
    assert decided(held.segment(segment(3, b"LO\n", ack=5), 1.0)).decision == "HELLO"
    assert decided(held.segment(segment(3, b"lo\n"), 1.0)).decision == "hello"


def test_useless_segments_of_an_undecided_connection() -> None:
    held = made(connection_bytes=100)
    held.segment(segment(0, b"hel"), 1.0)
    assert held.segment(segment(3), 1.0) == (Drop(Why.NO_DATA),)
    assert held.segment(segment(3, b"x", SYN), 1.0) == (Drop(Why.NO_DATA),)
    assert held.segment(segment(3, b"", FIN), 1.0, cut=True) == (Drop(Why.NO_DATA),)
    assert held.segment(segment(100, b"x"), 1.0) == (Drop(Why.OUTSIDE),)
    assert held.segment(segment(-1, b"", FIN), 1.0) == (Drop(Why.OUTSIDE),)
    assert held.held_bytes == 3


def test_the_client_may_reset_but_only_from_where_it_is() -> None:
    held = made(connection_bytes=100)
    held.segment(segment(0, b"hel"), 1.0)
    assert held.segment(segment(101, b"", RST), 1.0) == (Drop(Why.OUTSIDE),)
    assert held.segment(segment(-1, b"", RST), 1.0) == (Drop(Why.OUTSIDE),)
    assert len(held) == 1
    assert held.segment(segment(3, b"", RST), 1.0) == (Drop(Why.CLIENT_RESET),)
    assert (len(held), held.remembered) == (0, 0)


# ---- overlaps ----


def test_overlaps_that_agree() -> None:
    held = made()
    held.segment(segment(2, b"llo"), 1.0)
    assert held.segment(segment(0, b"hell"), 1.0) == HOLD
    assert held.segment(segment(1, b"ello"), 1.0) == HOLD
    assert decided(held.segment(segment(4, b"o\n"), 1.0)).data == b"hello\n"


@pytest.mark.parametrize(
    ("second", "begins"),
    [
        (segment(4, b"X\n"), 2),
        (segment(0, b"heX"), 0),
        (segment(5, b"", FIN), 2),  # the client's data would end amid what it has sent
        (segment(2, b"l", FIN), 2),
    ],
)
def test_a_contradiction_ends_it(second: Packet, begins: int) -> None:
    held = made()
    held.segment(segment(2, b"llo, "), 1.0)
    (action,) = held.segment(second, 1.0)
    assert isinstance(action, GiveUp)
    assert (action.why, action.reset, action.first.seq) == (Why.CONFLICT, False, (START + begins) % 2**32)
    assert len(held) == 0
    assert held.segment(segment(7, b"world\n"), 1.1) == (Drop(Why.GIVEN_UP),)


def test_data_beyond_a_fin_or_a_second_fin_ends_it() -> None:
    for contradiction in (segment(5, b"xy"), segment(7, b"", FIN), segment(5, b"", FIN)):
        held = made()
        held.segment(segment(0, b"hel"), 1.0)
        held.segment(segment(6, b"", FIN), 1.0)
        (action,) = held.segment(contradiction, 1.0)
        assert isinstance(action, GiveUp)
        assert action.why is Why.CONFLICT


# ---- acknowledgements ----


def test_a_client_that_waits_is_told_after_the_third_sight_and_then_at_once() -> None:
    held = made(connection_bytes=100)
    for _ in range(2):
        assert held.segment(segment(0, b"h"), 1.0) == HOLD
    repeated = segment(0, b"h")
    assert held.segment(repeated, 1.6) == (Acknowledge(repeated, (START + 1) % 2**32, 99),)
    for offset, byte in enumerate(b"ello, world", start=1):
        packet = segment(offset, bytes([byte]))
        assert held.segment(packet, 1.7) == (Acknowledge(packet, (START + offset + 1) % 2**32, 99 - offset),)
    action = decided(held.segment(segment(12, b"\n"), 1.8))
    assert (action.data, action.first.seq) == (b"hello, world\n", START)


def test_a_lost_acknowledgement_is_repeated_and_a_gap_is_not_acknowledged() -> None:
    held = made()
    for _ in range(3):
        step = held.segment(segment(0, b"hel"), 1.0)
    for packet in (segment(0, b"hel"), segment(5, b"x"), segment(1, b"e")):
        step = held.segment(packet, 1.0)
        assert step == (Acknowledge(packet, (START + 3) % 2**32, Limits().connection_bytes - 3),)


def test_sights_of_a_wrong_beginning_do_not_count() -> None:
    held = made()
    held.segment(segment(3, b"lo"), 1.0)
    held.segment(segment(3, b"lo"), 1.1)  # a tail loss probe
    assert held.segment(segment(0, b"hel"), 1.3) == HOLD
    assert held.segment(segment(3, b"lo"), 1.4) == HOLD
    assert held.segment(segment(0, b"hel"), 1.5) == HOLD
    assert isinstance(held.segment(segment(0, b"hel"), 1.6)[0], Acknowledge)


def test_nothing_lies_before_an_acknowledged_beginning() -> None:
    held = made()
    for _ in range(3):
        held.segment(segment(0, b"hel"), 1.0)
    assert held.segment(segment(-1, b"x"), 1.0) == (Drop(Why.OUTSIDE),)
    assert decided(held.segment(segment(3, b"lo\n"), 1.0)).decision == "hello"
    assert held.segment(segment(-1, b"x\n"), 1.0) == (Drop(Why.OUTSIDE),)


# ---- after the decision ----


def test_what_was_queued_meanwhile_is_forwarded_and_never_judged() -> None:
    held = made()
    decided(held.segment(segment(0, b"hello\n"), 1.0))
    for packet in (segment(6, b"second\n"), segment(6, b"", FIN), segment(3, b"lo\n"), segment(9, b"", RST)):
        assert held.segment(packet, 1.9) == FORWARD
    assert held.segment(segment(0, b"hello\n"), 1.9) == FORWARD_REPEATED


def test_a_client_that_was_refused_is_decided_again_then_reset() -> None:
    held, first = made(), segment(0, b"hello\n")
    assert decided(held.segment(first, 1.0)).decision == "hello"
    assert held.segment(first, 1.6) == FORWARD_REPEATED
    assert held.segment(segment(6, b"more"), 2.0) == FORWARD
    assert decided(held.segment(first, 2.4)).decision == "hello"
    assert held.segment(first, 3.0) == FORWARD_REPEATED
    assert held.segment(first, 4.0) == (GiveUp(Why.UNANSWERED, first, True),)
    assert held.segment(first, 4.5) == (Drop(Why.GIVEN_UP),)
    assert held.segment(first, 5.5) == (GiveUp(Why.UNANSWERED, first, True),), "it may have been delivered"


def test_attempts_are_counted_across_more_segments() -> None:
    held = made()
    for now in (1.0, 3.0):
        assert held.segment(segment(0, b"hel"), now) == HOLD
        assert decided(held.segment(segment(3, b"lo\n"), now)).decision == "hello"
    first = segment(0, b"hel")
    assert held.segment(first, 5.0) == (GiveUp(Why.UNANSWERED, first, True),)


def test_attempts_with_a_wrong_beginning_do_not_count() -> None:
    held, first, second, third = made(), segment(0, b"ab"), segment(2, b"c"), segment(3, b"\n")
    held.segment(second, 1.0)
    assert decided(held.segment(third, 1.0)).first == second
    assert held.segment(second, 2.5) == HOLD
    assert held.segment(first, 2.5) == HOLD
    assert decided(held.segment(third, 2.5)).attempt == 1
    assert held.segment(first, 4.0) == HOLD, "the kernel refused once what it could open, and not twice"


def test_what_was_acknowledged_cannot_be_decided_again_and_ends_in_a_reset() -> None:
    held = made()
    for _ in range(3):
        held.segment(segment(0, b"hel"), 1.0)
    last = segment(3, b"lo\n")
    decided(held.segment(last, 1.0))
    assert held.segment(segment(0, b"hel"), 3.0) == FORWARD
    assert held.segment(last, 3.0) == FORWARD_REPEATED
    assert held.segment(last, 5.0) == (GiveUp(Why.UNANSWERED, last, True),)


def test_a_lost_reset_is_repeated_not_taken_for_a_new_beginning() -> None:
    held = made(seconds=2.0)
    for _ in range(3):
        held.segment(segment(0, b"h"), 1.0)
    assert held.expire(3.0) == [GiveUp(Why.TIME, segment(0, b"h"), True)]
    late = segment(1, b"ello\n")
    assert held.segment(late, 3.5) == (Drop(Why.GIVEN_UP),)
    assert held.segment(late, 4.5) == (GiveUp(Why.GIVEN_UP, late, True),)
    assert held.segment(late, 5.0) == (Drop(Why.GIVEN_UP),)


def test_decisions_are_remembered_for_their_time_and_no_longer() -> None:
    held, first = made(remember_seconds=10.0), segment(0, b"hello\n")
    decided(held.segment(first, 100.0))
    assert held.segment(segment(6, b"x\n"), 109.9) == FORWARD
    held.expire(109.9)
    assert held.segment(segment(6, b"x\n"), 109.9) == FORWARD
    held.expire(130.0)
    assert held.remembered == 0


def test_memory_of_decisions_is_bounded_and_keeps_the_newest() -> None:
    held = made(remembered=100)
    for number in range(1000):
        decided(held.segment(segment(0, b"hello\n", ack=number), 1.0))
        assert held.remembered <= 100
        for recent in range(max(0, number - 40), number + 1):
            assert held.segment(segment(6, b"x\n", ack=recent), 1.0) == FORWARD


# ---- bounds ----


def test_time_is_counted_from_the_first_segment() -> None:
    held, first = made(seconds=10.0), segment(0, b"hel")
    held.segment(first, 5.0)
    held.segment(segment(0, b"HEL", ack=9), 7.0)
    held.segment(segment(3, b"l"), 14.0)
    assert held.next_deadline() == 15.0
    assert held.expire(14.9) == []
    assert held.expire(15.0) == [GiveUp(Why.TIME, first, False)]
    assert held.next_deadline() == 17.0
    assert len(held.expire(17.0)) == 1
    assert (len(held), held.next_deadline()) == (0, None)


def test_bytes_of_one_connection() -> None:
    held, first = made(connection_bytes=8), segment(0, b"hello")
    assert held.segment(first, 1.0) == HOLD
    assert held.segment(segment(5, b", world\n"), 1.0) == (GiveUp(Why.BYTES, first, False),)
    whole = segment(0, b"hello, world\n", ack=9)
    assert held.segment(whole, 1.0) == (GiveUp(Why.BYTES, whole, False),)
    assert held.held_bytes == 0


def test_a_fin_beyond_the_bound_is_not_told() -> None:
    held = made(connection_bytes=6)
    held.segment(segment(0, b"hel"), 1.0)
    assert not decided(held.segment(segment(3, b"lo\nmore", FIN), 1.0)).fin


def test_what_moves_beyond_the_bound_is_forgotten() -> None:
    held = made(connection_bytes=8)
    held.segment(segment(6, b"world"), 1.0)
    held.segment(segment(12, b"", FIN), 1.0)
    assert held.segment(segment(0, b"hel"), 1.0) == HOLD
    assert held.held_bytes == 8
    assert held.segment(segment(-9, b"x"), 1.0) == HOLD
    assert held.held_bytes == 1
    assert decided(held.segment(segment(-8, b"y\n"), 1.0)).data == b"xy\n"


def test_a_source_pushes_out_its_own_oldest() -> None:
    held = made(source_connections=2)
    other = bytes([198, 51, 100, 2])
    held.segment(segment(0, b"o", src=other), 1.0)
    assert held.segment(segment(0, b"a", ack=1), 1.0) == HOLD
    assert held.segment(segment(0, b"b", ack=2), 1.0) == HOLD
    assert held.segment(segment(0, b"c", ack=3), 1.0) == (Evict(Why.SOURCE), Hold())
    assert decided(held.segment(segment(1, b"\n", src=other), 1.0)).decision == "o"
    assert decided(held.segment(segment(1, b"\n", ack=2), 1.0)).decision == "b"
    assert held.segment(segment(0, b"a", ack=1), 1.0) == HOLD  # from the beginning again


def test_an_ipv6_source_is_a_64() -> None:
    held = made(source_connections=1)
    network, elsewhere = bytes.fromhex("20010db800010002"), bytes.fromhex("20010db800010003")
    assert held.segment(segment(0, b"a", src=network + bytes(8)), 1.0) == HOLD
    assert held.segment(segment(0, b"a", src=elsewhere + bytes(8)), 1.0) == HOLD
    assert held.segment(segment(0, b"b", src=network + bytes([255] * 8)), 1.0) == (Evict(Why.SOURCE), Hold())


def test_all_sources_together_push_out_the_oldest() -> None:
    held = made(connections=2)
    sources = [bytes([198, 51, 100, number]) for number in range(3)]
    assert [held.segment(segment(0, b"a", src=source), 1.0) for source in sources] == [
        HOLD,
        HOLD,
        (Evict(Why.TOTAL), Hold()),
    ]
    assert len(held) == 2
    assert decided(held.segment(segment(1, b"\n", src=sources[1]), 1.0)).data == b"a\n"


@pytest.mark.parametrize(("limit", "why"), [("source_connections", Why.SOURCE), ("connections", Why.TOTAL)])
def test_nothing_acknowledged_is_pushed_out(limit: str, why: Why) -> None:
    limits: dict[str, Any] = {limit: 2}
    held = made(**limits)
    for number in range(2):
        for _ in range(3):
            held.segment(segment(0, b"a", ack=number), 1.0)
    assert held.segment(segment(0, b"b", ack=2), 1.0) == (Drop(why),)
    assert decided(held.segment(segment(0, b"c\n", ack=3), 1.0)).data == b"c\n"
    assert decided(held.segment(segment(1, b"\n", ack=0), 1.0)).data == b"a\n"


def test_nothing_is_acknowledged_to_who_may_be_forged_nor_kept_for_him() -> None:
    held = made()
    asked: list[Packet] = []

    def is_genuine(first: Packet) -> bool:
        asked.append(first)
        return first.ack == COOKIE + 1

    held.is_genuine = is_genuine
    forged = segment(0, b"a", ack=COOKIE)
    assert [held.segment(forged, 1.0) for _ in range(3)] == [HOLD, HOLD, (Drop(Why.NOT_GENUINE),)]
    assert (len(held), held.held_bytes, held._sources) == (0, 0, {})
    genuine = segment(0, b"a")
    assert [type(held.segment(genuine, 1.0)[0]) for _ in range(4)] == [Hold, Hold, Acknowledge, Acknowledge]
    assert asked == [forged, genuine], "asked once"
    assert held.segment(forged, 1.0) == HOLD, "judged afresh"


def test_gaps_are_bounded_and_the_lowest_bytes_have_the_better_claim() -> None:
    held = made()
    for number in range(pending.MAX_RANGES):
        assert held.segment(segment(2 * number, b"a"), 1.0) == HOLD
    assert held.segment(segment(2 * pending.MAX_RANGES, b"a"), 1.0) == (Drop(Why.GAPS),)
    assert held.held_bytes == 2 * pending.MAX_RANGES - 1
    assert held.segment(segment(-2, b"a"), 1.0) == HOLD  # pushes out the highest
    assert held.held_bytes == 2 * pending.MAX_RANGES - 1
    assert held.segment(segment(-1, b"b"), 1.0) == HOLD
    assert decided(held.segment(segment(1, b"\n"), 1.0)).data == b"aba\na"


def test_a_source_without_connections_leaves_nothing_behind() -> None:
    held = made()
    for number in range(100):
        source = number.to_bytes(4, "big")
        held.segment(segment(0, b"hel", src=source), 1.0)
        held.segment(segment(3, b"lo\n", src=source), 1.0)
    assert held._sources == {}


def test_what_brings_nothing_new_is_not_inspected() -> None:
    asked: list[bytes] = []

    def never_enough(_first: Packet, data: bytes) -> Literal[Answer.NEED_MORE]:
        asked.append(data)
        return Answer.NEED_MORE

    held: Pending[str] = Pending(Limits(), never_enough, lambda _packet: Patience(10.0, False), lambda _first: True)
    for offset, data in ((0, b"hel"), (0, b"hel"), (1, b"e"), (5, b"x"), (3, b"l"), (2, b"l")):
        held.segment(segment(offset, data), 1.0)
    assert asked == [b"hel", b"hell"]


# ---- silent clients ----


def test_a_silent_client_is_held_only_where_it_is_of_interest() -> None:
    assert made().segment(segment(0), 1.0) == (Drop(Why.NO_DATA),)
    held, first = made(for_silence=True, seconds=0.5), segment(0)
    assert held.segment(first, 1.0) == HOLD
    assert held.next_deadline() == 1.5
    assert held.expire(1.4) == []
    assert held.expire(1.5) == [Silence(first)]
    assert (len(held), held.next_deadline()) == (0, None)
    # What it says now belongs to a connection that is open.
    assert held.segment(segment(0, b"late\n"), 1.6) == FORWARD_REPEATED


def test_a_client_that_speaks_in_time_is_judged_by_what_it_says() -> None:
    held, spoken = made(for_silence=True), segment(0, b"hello\n")
    held.segment(segment(0), 1.0)
    assert held.segment(spoken, 2.0) == (Decide("hello", spoken, b"hello\n", False, True),)
    assert held.expire(100.0) == []


def test_a_client_that_begins_and_stops_is_not_silent() -> None:
    held = made(for_silence=True)
    held.segment(segment(0), 1.0)
    held.segment(segment(0, b"hel"), 2.0)
    assert held.expire(12.0) == [GiveUp(Why.TIME, segment(0, b"hel"), False)]


def test_a_silent_client_that_closes_is_given_up_at_once() -> None:
    held = made(for_silence=True)
    held.segment(segment(0), 1.0)
    assert held.segment(segment(0, flags=FIN), 1.1) == (GiveUp(Why.ENDED, segment(0), False),)


def test_each_length_of_patience_has_its_own_order() -> None:
    held = made()
    held.patience = lambda packet: Patience(float(packet.ack), False)
    for ack, now in ((9, 1.0), (3, 2.0), (9, 3.0)):
        held.segment(segment(0, b"hel", ack=ack), now)
    held.segment(segment(0, b"hel", ack=4), 3.0)
    assert held.next_deadline() == 5.0
    assert [action.first.ack for action in held.expire(7.0)] == [3, 4]
    assert held.next_deadline() == 10.0


def test_what_is_forgotten_is_judged_afresh() -> None:
    held, first = made(), segment(0, b"hello\n")
    decided(held.segment(first, 1.0))
    assert held.segment(first, 1.1) == FORWARD_REPEATED
    held.forget(first)
    assert decided(held.segment(first, 1.2)).attempt == 1


def test_limits_and_inspect_may_be_replaced() -> None:
    held = made()
    held.segment(segment(0, b"hello, "), 1.0)
    held.limits = Limits(connection_bytes=4)
    assert held.segment(segment(3, b"lo"), 1.0) == (GiveUp(Why.BYTES, segment(0, b"hello, "), False),)
    held.limits = Limits()
    held.segment(segment(0, b"hello, ", ack=9), 1.0)
    held.inspect = lambda _first, data: data.decode()
    assert decided(held.segment(segment(7, b"w", ack=9), 1.0)).decision == "hello, w"


def test_every_reason_is_tried_in_this_file() -> None:
    used = set(re.findall(r"Why\.([A-Z_]+)", Path(__file__).read_text()))
    assert used == {why.name for why in Why}
