"""Undecided flows of datagrams: whatever comes in whatever order, each flow is decided as if it were alone, and there
are never more of them, or more in them, than may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from steerd.core.datagrams import MAX_DATAGRAMS, Datagrams, Decide, Drop, GiveUp, Hold, Why
from steerd.core.pending import Limits
from steerd.model import UDP, Answer, Flow
from steerd.wire.packet import Packet
from steerd.wire.registry import DATAGRAMS
from tests.flows import flow, flows
from tests.initials import client_hello, flight

IPV4 = [bytes([198, 51, 100, last]) for last in (1, 2, 3)]
IPV6 = [bytes.fromhex(f"20010db80001{subnet:04x}{host:016x}") for subnet, host in ((0, 1), (0, 2), (1, 1))]
END = b"!"

clients = st.tuples(st.sampled_from(IPV4 + IPV6), st.integers(1, 4))
payloads = st.binary(max_size=3) | st.just(END)
seconds_ = st.integers(1, 10).map(float)


def packet(client: tuple[bytes, int], payload: bytes) -> Packet:
    source, port = client
    version = 4 if len(source) == 4 else 6
    return Packet(version, source, bytes(len(source)), UDP, port, 443, 0, 0, 0, b"", b"", b"", payload)


def all_of_them(_packet: Packet, payloads: Sequence[bytes]) -> tuple[bytes, ...] | Literal[Answer.NEED_MORE]:
    return tuple(payloads) if payloads[-1] == END else Answer.NEED_MORE


class Held(NamedTuple):
    flow: Flow
    deadline: float
    datagrams: list[tuple[Packet, bytes]]

    @property
    def source(self) -> bytes:
        return self.datagrams[0][0].source


class Undecided(RuleBasedStateMachine):
    """Beside a model that is a plain list of flows, oldest first."""

    @initialize(bytes_=st.integers(1, 60), own=st.integers(1, 3), total=st.integers(1, 8), seconds=seconds_)
    def begin(self, bytes_: int, own: int, total: int, seconds: float) -> None:
        self.seconds = seconds
        limits = Limits(connection_bytes=bytes_, source_connections=own, connections=total)
        self.tested = Datagrams(limits, all_of_them, lambda _packet: self.seconds)
        self.model: list[Held] = []
        self.now = 1.0
        self.sent = 0

    @rule(client=clients, payload=payloads, cut=st.booleans() | st.just(False))
    def arrive(self, client: tuple[bytes, int], payload: bytes, cut: bool) -> None:
        one = packet(client, payload)
        self.sent += 1
        raw = b"packet %d" % self.sent
        assert self.tested.datagram(one, raw, self.now, cut=cut) == self.expected(one, raw, cut)

    @rule(client=clients, count=st.integers(2, MAX_DATAGRAMS + 1))
    def many_arrive(self, client: tuple[bytes, int], count: int) -> None:
        for _ in range(count):
            self.arrive(client, b"", False)

    def expected(self, one: Packet, raw: bytes, cut: bool) -> Decide[tuple[bytes, ...]] | Hold | GiveUp | Drop:
        limits = self.tested.limits
        mine = next((held for held in self.model if held.flow == one.flow), None)
        earlier = mine.datagrams if mine else []
        said = (*(each.payload for each, _ in earlier), one.payload)
        if one.payload == END:
            self.forget(mine)
            return Decide(said, tuple(raw for _, raw in earlier))
        if cut:
            return Drop()
        if len(said) == MAX_DATAGRAMS or sum(map(len, said)) >= limits.connection_bytes:
            self.forget(mine)
            return GiveUp()
        if mine:
            mine.datagrams.append((one, raw))
            return Hold()
        own = [held for held in self.model if held.source == one.source]
        why = None
        if len(own) >= limits.source_connections:
            why = Why.SOURCE
            self.forget(own[0])
        elif len(self.model) >= limits.connections:
            why = Why.TOTAL
            self.forget(self.model[0])
        self.model.append(Held(one.flow, self.now + self.seconds, [(one, raw)]))
        return Hold(why)

    def forget(self, held: Held | None) -> None:
        if held is not None:
            self.model.remove(held)

    @rule(seconds=seconds_)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        overdue = [held for held in self.model if held.deadline <= self.now]
        assert self.tested.expire(self.now) == [held.datagrams[0][0] for held in overdue]
        for held in overdue:
            self.forget(held)

    @rule(seconds=seconds_)
    def a_reload_changes_the_patience(self, seconds: float) -> None:
        self.seconds = seconds

    @invariant()
    def bounds_hold(self) -> None:
        limits = self.tested.limits
        assert len(self.tested) == len(self.model) <= limits.connections
        by_source = Counter(held.source for held in self.model)
        assert all(count <= limits.source_connections for count in by_source.values())
        for held in self.model:
            assert len(held.datagrams) < MAX_DATAGRAMS
            assert sum(len(one.payload) for one, _ in held.datagrams) < limits.connection_bytes

    @invariant()
    def nothing_else_is_kept(self) -> None:
        kept = {flow: held.packets for flow, held in self.tested._flows.items()}
        assert kept == {held.flow: [raw for _, raw in held.datagrams] for held in self.model}
        sources = {source: set(own) for source, own in self.tested._sources.items()}
        assert sources == {one.source: {h.flow for h in self.model if h.source == one.source} for one in self.model}


TestUndecided = Undecided.TestCase
TestUndecided.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


# ---- real flows, mixed ----

REAL = {
    **{name: flow(name) for name in flows("quic")[:3] + flows("dtls")[:3]},
    "two initials": flight(client_hello(b"two.example", b"h3", size=1700)),
    "three initials": flight(client_hello(b"three.example", b"h3", size=2700)),
}


def inspect(_packet: Packet, payloads: Sequence[bytes]) -> str | Literal[Answer.NEED_MORE]:
    for parser in ("quic", "dtls"):
        answer = DATAGRAMS[parser].make(())(payloads)
        if answer is Answer.NEED_MORE:
            return Answer.NEED_MORE
        if answer is not Answer.NOT_MINE:
            return repr(answer)
    return "nobody's"


def undecided() -> Datagrams[str]:
    return Datagrams(Limits(), inspect, lambda _packet: 10.0)


def until_decided(held: Datagrams[str], client: tuple[bytes, int], datagrams: list[bytes]) -> list[object]:
    steps: list[object] = []
    for datagram in datagrams:
        steps.append(held.datagram(packet(client, datagram), datagram, 1.0, cut=False))
        if isinstance(steps[-1], Decide):
            break
    return steps


ALONE = {name: until_decided(undecided(), (IPV4[0], 1), datagrams) for name, datagrams in REAL.items()}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(sorted(REAL)), min_size=2, max_size=6), st.data())
def test_flows_that_come_mixed_are_decided_as_if_each_were_alone(names: list[str], data: st.DataObject) -> None:
    held = undecided()
    clients = [(IPV4[0], port) for port in range(len(names))]
    left = [REAL[name][: len(ALONE[name])] for name in names]
    steps: list[list[object]] = [[] for _ in names]
    while any(left):
        turn = data.draw(st.sampled_from([number for number, datagrams in enumerate(left) if datagrams]))
        datagram, *left[turn] = left[turn]
        steps[turn].append(held.datagram(packet(clients[turn], datagram), datagram, 1.0, cut=False))
    assert steps == [ALONE[name] for name in names]
    assert len(held) == 0


def test_the_real_flows_are_decided_and_some_of_them_take_several_datagrams() -> None:
    assert all(isinstance(steps[-1], Decide) for steps in ALONE.values())
    assert max(map(len, ALONE.values())) == 3
    assert not any("nobody" in str(steps[-1].decision) for steps in ALONE.values() if isinstance(steps[-1], Decide))
