"""The datagram half of a worker: flows of UDP that are decided by their first datagrams, and datagrams that are decided
one by one.

A datagram that decides alone goes on with the decision's mark. Conntrack makes the flow's entry from it, and from then
on the kernel carries the flow. Where several decide, all of them are sent through a raw socket, in the order in which
they came, and the first one makes the entry (chains `steer_local`, `verify_udp`). The last one could go on by itself,
but for this: datagrams that the kernel handled as one packet (UDP segmentation offload, GRO) are queued one by one, and
share a conntrack entry that is not confirmed. The first of them may go on and confirm it. Once that was dropped, the
kernel drops the others too, unless no more than one is left (net/netfilter/nfnetlink_queue.c, nf_ct_drop_unconfirmed).

**What was on its way.** While a flow's first datagrams wait for their worker, more of it may come and wait behind them.
Read alone they would say something else, or nothing. So a flow is remembered until all that waited has been seen, and
what comes of it follows it.

**A daemon that sleeps.** The first datagrams of a flow for it are held until it listens (core.wake), then decided anew
and sent, in order. Where each datagram is decided by itself (`dns`), it is dropped: resolvers ask again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from steerd.core import datagrams, pending
from steerd.core.datagrams import Datagrams, Decide, Drop, GiveUp, Hold
from steerd.core.engine import Decision, Engine
from steerd.core.marks import KEEP_ID, PASS_ID
from steerd.core.wake import Doorbell, Sleepers
from steerd.kernel.queue import DROP, Verdict
from steerd.model import Answer, Flow, Outcome, Reason
from steerd.telemetry.counters import Extra
from steerd.wire import quic
from steerd.wire.packet import Packet, is_cut, parse
from steerd.wire.parser import History

LOOK_SECONDS = 0.25
"""As often as undecided flows are looked through for those whose time is over."""

_EVICTED = {datagrams.Why.SOURCE: Extra.EVICTED_SOURCE, datagrams.Why.TOTAL: Extra.EVICTED_TOTAL}


_UNKNOWN_VERSION = ""
"""In the place of a connection id: the version could not be read, and none is one that the client could begin again."""


class _Decided(NamedTuple):
    """A flow that was decided a moment ago."""

    target_id: int
    sent: bool
    """Its first datagrams were sent by this worker; so must be what follows."""
    connection: str | None
    """QUIC: the connection id that its client made up, in hexadecimal."""


class Datagram:
    """All flows of datagrams of one worker that are undecided.

    `settle` is the worker's (see Late); what has to wait for the verdict is added to `after`. `send` sends an IP packet
    to a target, `forget` has conntrack forget a flow. At most `queue_length` packets wait for the worker at a time.
    """

    def __init__(
        self,
        settle: Callable[[Packet, Decision], Decision],
        slot: memoryview,
        after: list[Callable[[], None]],
        send: Callable[[bytes, int], None],
        forget: Callable[[Flow], object],
        queue_length: int,
        doorbell: Doorbell,
    ) -> None:
        self._settle = settle
        self._slot = slot
        self._after = after
        self._send = send
        self._forget = forget
        self._queue_length = queue_length
        self._doorbell = doorbell
        self._sleepers: Sleepers[list[bytes]] = Sleepers()
        self._negotiating: list[tuple[float, Flow]] = []
        self._looked = 0.0
        self._judged = 0
        self._decided: dict[Flow, _Decided] = {}
        self._decided_before: dict[Flow, _Decided] = {}
        self._undecided: Datagrams[Decision] = Datagrams(
            pending.Limits(),
            lambda packet, payloads: self._engine.decide_datagrams(packet, payloads),  # noqa: PLW0108 (it changes)
            lambda packet: self._engine.patience(packet).seconds,
        )

    def refresh(self, engine: Engine, limits: pending.Limits) -> None:
        """A new plan is in force. What is undecided stays, and is decided by it."""
        self._engine = engine
        self._undecided.limits = limits
        self._decided.clear()
        self._decided_before.clear()

    @property
    def decides_anew(self) -> bool:
        """Whether `expire` may decide something by routes."""
        return bool(self._sleepers)

    def __len__(self) -> int:
        """How many flows wait for something: a decision, their daemon, or to be forgotten after it."""
        decided = len(self._decided) + len(self._decided_before) + len(self._negotiating)
        return len(self._undecided) + len(self._sleepers) + decided

    @property
    def undecided(self) -> int:
        """How many flows wait for a decision."""
        return len(self._undecided)

    @property
    def held_bytes(self) -> int:
        """Of their first datagrams, as packets."""
        return self._undecided.held_bytes

    def judge(self, packet: Packet, raw: bytes) -> Verdict:
        """What becomes of a queued datagram; `raw` are its bytes, as far as they were copied."""
        flow = packet.flow
        self._judged += 1
        if self._judged >= self._queue_length:
            # No more packets can have waited since the last time.
            self._forget_decided()
        if self._sleepers and (held := self._sleepers.get(flow)) is not None:
            return self._hold_too(held, raw)
        decided = self._decided.get(flow) or self._decided_before.get(flow)
        if decided is not None and not _begins_another(packet.payload, decided):
            self._slot[Extra.FORWARDED] += 1
            return self._go_on(decided, raw)
        match self._undecided.datagram(packet, raw, time.monotonic(), cut=is_cut(raw)):
            case Decide(decision=decision, earlier=earlier):
                return self._decide(packet, raw, decision, earlier)
            case Hold(evicted=evicted):
                self._slot[Extra.HELD_DATAGRAMS] += 1
                if evicted is not None:
                    self._slot[_EVICTED[evicted]] += 1
            case GiveUp():
                self._settle(packet, self._engine.give_up(packet, Reason.TOO_LONG))
            case Drop():
                self._slot[Extra.CUT_DATAGRAMS] += 1
        return DROP

    def expire(self, now: float) -> None:
        """Forget flows whose time is over, and send what was held for daemons that listen now."""
        for _, deadline, held, is_open in self._sleepers.due(self._doorbell, now):
            self._wake_up(held, deadline, is_open)
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            while self._negotiating and self._negotiating[0][0] <= now:
                self._forget(self._negotiating.pop(0)[1])
            for first in self._undecided.expire(now):
                self._settle(first, self._engine.give_up(first, Reason.TOO_SLOW))

    def rest(self) -> None:
        """No more packets wait, and all verdicts are given."""
        # What came before the last verdicts and after the queue was found empty is seen by the next time.
        self._forget_decided()

    def _decide(self, packet: Packet, raw: bytes, decision: Decision, earlier: tuple[bytes, ...]) -> Verdict:
        decision = self._settle(packet, decision)
        if decision.reason is Reason.UNKNOWN_CONNECTION:
            return Verdict(KEEP_ID)
        if decision.outcome is Outcome.WAIT:
            self._hold(packet, [*earlier, raw], decision, None)
            return DROP
        if decision.outcome is not Outcome.STEER:
            return Verdict(PASS_ID) if decision.outcome is Outcome.PASS else DROP
        decided = _Decided(decision.target_id, bool(earlier), _connection(decision))
        if not self._engine.decides_every_datagram(packet):
            self._decided[packet.flow] = decided
        if decided.connection == _UNKNOWN_VERSION and len(self._negotiating) < self._queue_length:
            # Once versions are offered to the client, its next try may name another daemon.
            self._negotiating.append((time.monotonic() + LOOK_SECONDS, packet.flow))
        self._after.extend(partial(self._send, copy, decided.target_id) for copy in earlier)
        return self._go_on(decided, raw)

    # ---- flows whose daemon sleeps ----

    def _hold(self, packet: Packet, raws: list[bytes], decision: Decision, deadline: float | None) -> None:
        """Keep a flow until its daemon listens; `deadline`: of one that was held before."""
        door, timeout = self._doorbell.door_of(packet, decision.target_id)
        now = time.monotonic()
        self._doorbell.ask(door, now)
        if self._engine.decides_every_datagram(packet) or is_cut(raws[-1]):
            return
        limits = self._undecided.limits
        until = now + timeout if deadline is None else deadline
        source = packet.source
        if self._sleepers.put(packet.flow, door, source, until, raws, limits.source_connections, limits.connections):
            self._slot[Extra.HELD_DATAGRAMS] += 1

    def _hold_too(self, held: list[bytes], raw: bytes) -> Verdict:
        """One more of a flow that is held."""
        size = sum(map(len, held)) + len(raw)
        if not is_cut(raw) and len(held) < datagrams.MAX_DATAGRAMS and size <= self._undecided.limits.connection_bytes:
            held.append(raw)
            self._slot[Extra.HELD_DATAGRAMS] += 1
        return DROP

    def _wake_up(self, held: list[bytes], deadline: float, is_open: bool) -> None:
        """A flow that was held: its daemon listens, or it will not."""
        packets = [packet for raw in held if (packet := parse(raw)) is not None]
        last = packets[-1]
        if not is_open:
            self._settle(last, self._engine.give_up(last, Reason.NOT_WOKEN))
            return
        decision = self._engine.decide_datagrams(last, History(packet.payload for packet in packets))
        if decision is Answer.NEED_MORE:  # another plan is in force, and knows better
            return
        decision = self._settle(last, decision)
        if decision.outcome is Outcome.WAIT:
            self._hold(last, held, decision, deadline)
        elif decision.outcome is Outcome.STEER:
            self._decided[last.flow] = _Decided(decision.target_id, True, _connection(decision))
            self._after.extend(partial(self._send, copy, decision.target_id) for copy in held)

    def _go_on(self, decided: _Decided, raw: bytes) -> Verdict:
        """A datagram of a decided flow: by itself, or as a copy behind other copies, if that is whole."""
        if not decided.sent or is_cut(raw):
            return Verdict(decided.target_id)
        self._after.append(partial(self._send, raw, decided.target_id))
        return DROP

    def _forget_decided(self) -> None:
        self._judged = 0
        self._decided_before, self._decided = self._decided, {}


def _connection(decision: Decision) -> str | None:
    return decision.keys.get(quic.FIRST_ID, _UNKNOWN_VERSION if quic.PACKET in decision.keys else None)


def _begins_another(payload: bytes, decided: _Decided) -> bool:
    """Whether a datagram of a decided flow may be the first one of another QUIC connection."""
    if decided.connection is None:
        return False
    header = quic.header(payload)
    return (
        isinstance(header, quic.LongHeader)
        and header.kind is quic.Kind.INITIAL
        and header.dcid.hex() != decided.connection
    )
