"""Pending first payloads: whatever the cut, the order and the loss, the decision is that for the whole payload at once.

The kernel's part is played here: it accepts a Decide only if its first sequence number is the true one (the cookie).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

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
    Why,
)
from steerd.model import TCP, Answer
from steerd.wire.http import inspect as http
from steerd.wire.packet import ACK, FIN, RST, Packet
from steerd.wire.prefix import prefix_parser

MODULUS = 2**32
Decision = tuple[str, bytes]
Wanted = Decision | Literal[Answer.NEED_MORE]


def counted(data: bytes) -> Wanted:
    """The first byte says how many follow. Every byte could be such a first byte, so wrong guesses are common."""
    length = data[0] % 64
    return ("counted", data[: length + 1]) if len(data) > length else Answer.NEED_MORE


def line(data: bytes) -> Wanted:
    head, newline, _ = data.partition(b"\n")
    return ("line", head) if newline else Answer.NEED_MORE


def of_parser(parser: Callable[[bytes], dict[str, str] | Answer]) -> Callable[[bytes], Wanted]:
    def inspect(data: bytes) -> Wanted:
        answer = parser(data)
        return answer if answer is Answer.NEED_MORE else ("parser", repr(answer).encode())

    return inspect


INSPECTORS = [counted, line, of_parser(http), of_parser(prefix_parser(["GET /a", "GET /ab\n\n", "\n", "a"]))]
payloads = (
    st.binary(min_size=1, max_size=80)
    | st.text("GET /ab\n:", min_size=1, max_size=60).map(str.encode)
    | st.integers(0, 60).map(lambda size: b"GET /ab HTTP/1.1\r\nHost: a.example\r\nX: " + b"a" * size + b"\r\n\r\n")
)
sequence_numbers = st.integers(0, MODULUS - 1) | st.integers(MODULUS - 90, MODULUS - 1)


def segment(seq: int, payload: bytes, flags: int = 0, ack: int = 7, src: bytes = b"\xc6\x33\x64\x01") -> Packet:
    return Packet(
        4, src, b"\xcb\x00\x71\x0a", TCP, 40000, 443, ACK | flags, seq % MODULUS, ack, b"", b"", b"", payload
    )  # fmt: skip


class Outcome(NamedTuple):
    """How a connection ended: decided (and what the daemon got), or given up."""

    decide: Decide[Decision] | None
    given_up: GiveUp | None


class Gateway:
    """The worker and the kernel around `pending`, for one client that says `payload`, perhaps with a FIN behind it."""

    def __init__(self, inspect: Callable[[bytes], Wanted], payload: bytes, start: int, fin: bool, limits: Limits):
        self.pending: Pending[Decision] = Pending(
            limits,
            lambda _first, data: inspect(data),
            lambda _: Patience(1e6, False),
            lambda first: first.seq == start & 0xFFFFFFFF,
        )
        self.payload, self.start, self.fin = payload, start, fin
        self.arrived: set[int] = set()
        self.acknowledged = 0
        self.outcome: Outcome | None = None

    def packet(self, low: int, high: int) -> Packet:
        fin = FIN if self.fin and high == len(self.payload) else 0
        return segment(self.start + low, self.payload[low:high], fin)

    def receive(self, low: int, high: int, now: float) -> None:
        """Bytes [low, high) of the payload arrive; everything that pending may promise is checked."""
        self.arrived.update(range(low, high))
        for action in self.pending.segment(self.packet(low, high), now):
            match action:
                case Decide(first=first, data=data, fin=fin):
                    offset = self.offset(first.seq)
                    assert data == self.payload[offset : offset + len(data)]
                    assert self.arrived.issuperset(range(offset, offset + len(data)))
                    assert fin == (self.fin and offset + len(data) == len(self.payload))
                    if offset == 0:
                        self.outcome = Outcome(action, None)
                case Acknowledge(ack=ack, window=window):
                    end = self.offset(ack)
                    assert self.arrived.issuperset(range(end)), "acknowledged what never arrived"
                    assert end >= self.acknowledged
                    assert end + window == self.pending.limits.connection_bytes
                    self.acknowledged = end
                case GiveUp(why=why, first=first, reset=reset):
                    assert why in (Why.ENDED, Why.BYTES)
                    assert reset == (self.acknowledged > 0)
                    if self.offset(first.seq) == 0:
                        self.outcome = Outcome(None, action)
                case ForwardRaw():
                    pass
                case _:
                    assert action in (Hold(), Drop(Why.GIVEN_UP), Drop(Why.OUTSIDE), Drop(Why.FIN_ALONE))
        assert len(self.pending) <= 1
        assert self.pending.held_bytes <= self.pending.limits.connection_bytes

    def offset(self, seq: int) -> int:
        return (seq - self.start) % MODULUS

    def check_outcome(self, inspect: Callable[[bytes], Wanted]) -> None:
        """What became of the connection is what the whole payload, seen at once, deserves."""
        wanted = inspect(self.payload[: self.pending.limits.connection_bytes])
        assert self.outcome is not None
        if wanted is Answer.NEED_MORE:
            assert self.outcome.decide is None
        else:
            assert self.outcome.decide is not None
            assert self.outcome.decide.decision == wanted == inspect(self.outcome.decide.data)
        assert len(self.pending) == 0
        self.pending.expire(1e9)
        assert self.pending.remembered == 0


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Segments in any order that need not cover everything, may overlap, and begin at one place at most twice: the
    third sight of a beginning is taken for the client's own word."""
    drawn = draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(1, size)), max_size=12))
    begun: Counter[int] = Counter()
    taken = []
    for low, length in drawn:
        begun[low] += 1
        if begun[low] <= 2:
            taken.append((low, min(low + length, size)))
    return taken


@settings(max_examples=800, deadline=None)
@given(st.data(), st.sampled_from(INSPECTORS), payloads, sequence_numbers, st.booleans())
def test_any_cut_any_order_any_overlap(
    data: st.DataObject, inspect: Callable[[bytes], Wanted], payload: bytes, start: int, fin: bool
) -> None:
    bound = data.draw(st.sampled_from([8, 40, 1000]))
    gateway = Gateway(inspect, payload, start, fin, Limits(connection_bytes=bound))
    now = 0.0
    for low, high in data.draw(cuts(len(payload))):
        gateway.receive(low, high, now)
        if gateway.outcome:
            break
        now += data.draw(st.sampled_from([0.0, 0.1, 2.0 if not gateway.pending else 0.0]))
    # In the end every client repeats all that was not acknowledged, from the beginning on.
    whole_arrives = fin or len(payload) >= bound or inspect(payload) is not Answer.NEED_MORE
    size = data.draw(st.integers(1, 20))
    for _ in range(3):
        for low in range(0, len(payload), size):
            if gateway.outcome is None:
                gateway.receive(low, min(low + size, len(payload)), now)
    if not whole_arrives:
        assert gateway.outcome is None
        (given_up,) = gateway.pending.expire(now + 2e6)
        assert isinstance(given_up, GiveUp)
        assert given_up.why is Why.TIME
        return
    gateway.check_outcome(inspect)


@settings(max_examples=800, deadline=None)
@given(
    st.data(), st.sampled_from(INSPECTORS), payloads, sequence_numbers, st.booleans(), st.booleans(), st.integers(1, 30)
)
def test_a_real_sender_over_a_lossy_path(
    data: st.DataObject,
    inspect: Callable[[bytes], Wanted],
    payload: bytes,
    start: int,
    fin: bool,
    nagle: bool,
    mss: int,
) -> None:
    """A sender by the book, seen from its timers: new data as Nagle and the window allow; nothing heard: one tail loss
    probe (RFC 8985), then its first unacknowledged segment, again and again (RFC 6298). Any of its packets may be
    lost, and any acknowledgement; packets that are sent together may change places."""
    gateway = Gateway(inspect, payload, start, fin, Limits(connection_bytes=1000))
    needs_more_for_ever = not fin and inspect(payload) is Answer.NEED_MORE
    writes = data.draw(st.lists(st.integers(1, 40), max_size=6))  # sizes of what the program writes, one a turn
    written = heard = sent = silent = 0
    losses = data.draw(st.lists(st.booleans(), max_size=20))
    flight: list[tuple[int, int]] = []
    for turn in range(400):
        if gateway.outcome or (needs_more_for_ever and heard == len(payload)):
            break
        written = min(written + (writes.pop() if writes else len(payload)), len(payload))
        batch = []
        while sent < written and len(flight) < 10:
            high = min(sent + mss, written)
            if nagle and flight and high - sent < mss and high != len(payload):
                break
            batch.append((sent, high))
            flight.append((sent, high))
            sent = high
        if batch:
            silent = 0
            batch = data.draw(st.permutations(batch)) if len(batch) > 1 else batch
        elif flight:
            silent += 1
            batch = [flight[-1] if silent == 1 else flight[0]]
        for low, high in batch:
            if losses and losses.pop():
                continue
            gateway.receive(low, high, float(turn))
            if gateway.outcome:
                break
        if gateway.acknowledged > heard and not (losses and losses.pop()):
            heard, silent = gateway.acknowledged, 0
            flight = [(low, high) for low, high in flight if high > heard]
    if needs_more_for_ever:
        assert gateway.outcome is None
        assert heard == len(payload), "the client waits for ever"
        (given_up,) = gateway.pending.expire(1e9)
        assert isinstance(given_up, GiveUp)
        assert given_up.reset
        return
    gateway.check_outcome(inspect)


# ---- anything at all, from many ----

SOURCES = [b"\xc6\x33\x64" + bytes([number]) for number in range(4)]
TIGHT = Limits(
    connection_bytes=24,
    source_connections=3,
    connections=6,
    remembered=10,
    remember_seconds=2.0,
    settle_seconds=0.5,
)

LONGEST_PATIENCE = 3.0

anything = st.tuples(
    st.sampled_from(SOURCES),
    st.integers(0, 2),  # ACK number
    st.integers(-30, 40),  # offset
    st.text("\x00\x02\x08ab\n", max_size=12).map(str.encode),
    st.sampled_from([0, 0, 0, 0, FIN, RST]),
    st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.6, 4.0]),  # seconds since the one before
    st.booleans(),  # cut
)


@settings(max_examples=800, deadline=None)
@given(
    st.lists(anything, max_size=60), st.sampled_from(INSPECTORS), st.sampled_from([0, 3, MODULUS - 4]), st.booleans()
)
def test_bounds_hold_and_what_is_inspected_is_what_is_delivered(
    packets: list[tuple[bytes, int, int, bytes, int, float, bool]],
    inspect: Callable[[bytes], Wanted],
    start: int,
    for_silence: bool,
) -> None:
    """Conflicting bytes, FINs and RSTs anywhere, far jumps: an attacker who knows his own ACK number."""
    inspected: list[bytes] = []

    def asked(_first: Packet, data: bytes) -> Wanted:
        assert 0 < len(data) <= TIGHT.connection_bytes
        inspected.append(data)
        return inspect(data)

    def patience(packet: Packet) -> Patience:
        return Patience(LONGEST_PATIENCE if packet.src < SOURCES[2] else 1.0, for_silence)

    pending: Pending[Decision] = Pending(TIGHT, asked, patience, lambda first: first.ack % 3 != 0)
    said: dict[tuple[bytes, int], set[tuple[int, int]]] = {}
    now = 0.0
    for src, ack, offset, payload, flags, pause, cut in packets:
        now += pause
        for action in pending.expire(now):
            assert for_silence if isinstance(action, Silence) else action.why is Why.TIME
        deadline = pending.next_deadline()
        assert deadline is None or now < deadline <= now + LONGEST_PATIENCE
        packet = segment(start + offset, payload, flags, ack, src)
        bytes_said = said.setdefault((src, ack), set())
        bytes_said.update(((packet.seq + index) % MODULUS, byte) for index, byte in enumerate(payload))

        inspected.clear()
        step = pending.segment(packet, now, cut=cut)

        *before, last = step
        assert all(isinstance(action, Evict) for action in before)
        match last:
            case Decide(decision=decision, first=first, data=data):
                assert data == inspected[-1]
                assert decision == inspect(data)
                assert all(((first.seq + index) % MODULUS, byte) in bytes_said for index, byte in enumerate(data))
            case Acknowledge(packet=answered, window=window):
                assert answered is packet
                assert 0 < window < TIGHT.connection_bytes
            case GiveUp(reset=reset, why=why):
                assert reset or why not in (Why.UNANSWERED, Why.GIVEN_UP)
            case _:
                assert isinstance(last, Hold | ForwardRaw | Drop)
        assert len(pending) <= TIGHT.connections
        assert pending.held_bytes <= TIGHT.connections * TIGHT.connection_bytes
        assert pending.remembered <= TIGHT.remembered
        assert (pending.next_deadline() is None) == (len(pending) == 0)
    pending.expire(now + LONGEST_PATIENCE)
    assert (len(pending), pending.held_bytes, pending.next_deadline()) == (0, 0, None)
    pending.expire(now + 2 * LONGEST_PATIENCE + 2 * TIGHT.remember_seconds)
    assert pending.remembered == 0
    # Whatever went before, every source has its full room again.
    room = [pending.segment(segment(0, b"GET", 0, ack, src), now + 100) for src in SOURCES[:2] for ack in range(3)]
    if inspect(b"GET") is Answer.NEED_MORE:
        assert room == [(Hold(),)] * 6


@settings(max_examples=300, deadline=None)
@given(st.data(), st.binary(min_size=2, max_size=40), st.integers(1, 39))
def test_of_two_hellos_at_most_one_is_seen_and_that_one_is_delivered(
    data: st.DataObject, payload: bytes, position: int
) -> None:
    """Segments of two payloads that differ in one byte, mixed. A decision never mixes them: the byte that was inspected
    is delivered, and once both are seen by an undecided connection, it is given up."""
    position %= len(payload)
    other = payload[:position] + bytes([payload[position] ^ 1]) + payload[position + 1 :]
    pending: Pending[bytes] = Pending(
        Limits(),
        lambda _first, got: got if len(got) == len(payload) else Answer.NEED_MORE,
        lambda _first: Patience(10.0, False),
        lambda _first: True,
    )
    held: set[int] = set()
    for low, high in data.draw(cuts(len(payload))):
        said = data.draw(st.sampled_from([payload, other]))
        (action,) = pending.segment(segment(low, said[low:high]), 0.0)
        if low <= position < high and not isinstance(action, ForwardRaw | Drop):
            held.add(said[position])
        if len(held) == 2:
            assert isinstance(action, GiveUp)
            assert action.why is Why.CONFLICT
            break
        if isinstance(action, Decide):
            assert action.decision == action.data
            assert action.data == (payload if held == {payload[position]} else other)
            break
