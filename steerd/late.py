"""The late half of a worker: connections that are decided by their first payload.

The kernel has answered the client's SYN with a cookie and forgotten it. A first payload that decides goes on with the
decision's mark: the kernel checks the cookie, throws the payload away and opens the connection to the daemon, all of it
inside the verdict's system call; a copy of the payload then follows through a raw socket. `core.pending` says what to
do with each segment, the engine decides, and here it is carried out.

What goes on is the first packet itself, or an ACK made from its header: in the place of the last packet if the payload
came in several segments, by itself if only time decided, and over IPv6 always (wire.segment.bare_ack says why).

**An old connection in the way.** A client that vanished and comes back from the same port meets a conntrack entry that
is still there. The kernel's SYN to the daemon, which proves that the client is genuine, is dropped then, and the table
notes the 4-tuple. When the client repeats itself, the note is found here, and the old entry is deleted. Without a note
nothing is ever deleted: a spoofer could cut live connections.

**A daemon that sleeps.** A first payload for it is held as it was inspected, and the client's repetitions of it are
dropped, until the daemon listens (core.wake). Then it is decided anew, and opened with an ACK of our own. It is held
only if the kernel found its cookie right, so that nobody wakes daemons, or fills the room, in another's name. One that
is not held, for want of room, is forgotten: its client repeats it.

**Who is genuine?** A segment proves nothing: anybody can send one from any address. The cookie in it does, and only the
kernel can check that. A decision is carried out by way of the kernel, which refuses a wrong cookie without a word.
Everything else that would cost memory for long, or draw a packet to the client, asks the kernel first: an ACK with the
mark ASK, made from the segment's header, has it check the cookie, note the client in the set `genuine`, and do no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, NamedTuple

from steerd.core import pending
from steerd.core.engine import Decision, Engine
from steerd.core.marks import ASK_ID, OURS_ID, MarkLayout
from steerd.core.pending import (
    Acknowledge,
    Decide,
    Drop,
    Evict,
    ForwardRaw,
    GiveUp,
    Pending,
    Silence,
    Why,
)
from steerd.core.wake import Doorbell, Sleepers
from steerd.kernel import sockets
from steerd.kernel.conntrack import Conntrack
from steerd.kernel.handshake import Handshake
from steerd.kernel.inject import Injector
from steerd.kernel.nftables import Nftables
from steerd.kernel.queue import DROP, Verdict
from steerd.kernel.ruleset import flow_key
from steerd.model import UDP, Answer, Flow, Outcome, Reason
from steerd.telemetry.counters import Extra
from steerd.wire import segment
from steerd.wire.packet import FIN, URG, Packet, is_cut, is_damaged

_REASONS = {
    Why.BYTES: Reason.TOO_LONG,
    Why.TIME: Reason.TOO_SLOW,
    Why.CONFLICT: Reason.CONFLICT,
    Why.ENDED: Reason.ENDED,
    Why.UNANSWERED: Reason.UNANSWERED,
}
_DROPPED = {
    Why.SOURCE: Extra.FULL_SOURCE,
    Why.TOTAL: Extra.FULL_TOTAL,
    Why.OUTSIDE: Extra.OUTSIDE,
    Why.GAPS: Extra.GAPS,
    Why.GIVEN_UP: Extra.GIVEN_UP,
    Why.NOT_GENUINE: Extra.NOT_GENUINE,
    Why.CLIENT_RESET: Extra.CLIENT_RESET,
    Why.FIN_ALONE: Extra.NO_USE,
    Why.NO_DATA: Extra.NO_USE,
}
_EVICTED = {Why.SOURCE: Extra.EVICTED_SOURCE, Why.TOTAL: Extra.EVICTED_TOTAL}
# Fatal (2), unrecognized_name (112): RFC 8446 section 6, RFC 6066 section 3. In a record of TLS 1.0 to 1.3.
_UNRECOGNIZED_NAME = bytes.fromhex("15 0303 0002 02 70")
_TLS_HANDSHAKE = b"\x16\x03"
TICK_SECONDS = 0.02
"""As often as pending connections are looked through for those whose time is over."""

_MAX_UNDELIVERED = 4096
_SILENT_SECONDS = 1.0
_SILENT_TRIES = 8
"""As long, and about as often, as a client repeats its SYN to a daemon whose backlog is full."""
_TRIES = 10
"""Ticks for which a distant daemon's answer to the kernel's SYN is waited for. After that the client repeats itself."""


class _Waiting(NamedTuple):
    """A copy for a connection that is not open yet."""

    flow: Flow
    copy: bytes
    tries: int


class _Opening(NamedTuple):
    """A connection that silence has decided. Its client has nothing to repeat, so it is for us to try again."""

    due: float
    first: Packet
    decision: Decision
    tries: int


class _Asleep(NamedTuple):
    """A connection whose daemon does not listen yet."""

    first: Packet
    data: bytes
    fin: bool
    silent: bool


class Late:
    """All connections of one worker that are undecided, or were decided a moment ago.

    `settle` counts and logs a decision and sees to it that the kernel knows its target; it returns the decision that is
    to be carried out. `after` is filled with what has to be done once the verdict is given. `give` has the kernel do
    all that was decided before: whoever asks the kernel about a connection calls it first.
    """

    def __init__(
        self,
        settle: Callable[[Packet, Decision], Decision],
        give: Callable[[], None],
        slot: memoryview,
        nftables: Nftables,
        doorbell: Doorbell,
    ) -> None:
        self.after: list[Callable[[], None]] = []
        self._settle = settle
        self._give = give
        self._slot = slot
        self._nftables = nftables
        self._conntrack = Conntrack()
        self._injector = Injector(0)
        self._pending = Pending(pending.Limits(), self._inspect, self._patience, self._is_genuine)
        self._looked = 0.0
        # Connections whose copy the kernel did not take were not opened, whatever conntrack holds for their ports.
        self._undelivered: set[Flow] = set()
        self._waiting: list[_Waiting] = []
        self._opening: list[_Opening] = []
        self._doorbell = doorbell
        self._sleepers: Sleepers[_Asleep] = Sleepers()

    def refresh(self, engine: Engine, mark: MarkLayout, limits: pending.Limits, handshake: Handshake) -> None:
        """A new plan is in force. What is undecided stays, and is decided by it."""
        self._engine = engine
        self._mark = mark
        self._handshake = handshake
        self._pending.limits = limits
        self._injector.close()
        self._injector = Injector(mark.field(OURS_ID))

    @property
    def decides_anew(self) -> bool:
        """Whether `expire` may decide something by routes."""
        return bool(self._sleepers)

    def __len__(self) -> int:
        """How many connections wait for a decision, for their daemon, or for its host."""
        return len(self._pending) + len(self._waiting) + len(self._opening) + len(self._sleepers)

    @property
    def undecided(self) -> int:
        """How many connections wait for a decision."""
        return len(self._pending)

    @property
    def held_bytes(self) -> int:
        """Of their first payloads."""
        return self._pending.held_bytes

    def send(self, packet: bytes, target_id: int) -> None:
        """Send an IP packet, decided for this target, now. Raises OSError as Injector.send does."""
        self._injector.send(packet, self._mark.field(target_id))

    def forget(self, flow: Flow) -> bool:
        """Have conntrack forget a flow of datagrams; whether there was one."""
        return self._conntrack.delete(flow, UDP)

    def syn(self, packet: Packet) -> Verdict:
        """A SYN that said too little after all: the same without what only seemed to say something goes round once
        more, and the kernel answers it."""
        self._send_later(segment.bare_syn(packet))
        return DROP

    def judge(self, packet: Packet, raw: bytes) -> Verdict:
        """What becomes of a queued segment of an undecided connection; `raw` are its bytes, as far as they were
        copied."""
        now = time.monotonic()
        cut = is_cut(raw)
        if not cut and is_damaged(packet, raw):
            self._slot[Extra.DAMAGED] += 1
            return DROP
        if self._sleepers and self._waits(packet):
            return DROP
        verdict = DROP
        for action in self._pending.segment(packet, now, cut=cut):
            if isinstance(action, ForwardRaw) and action.repeats:
                self._give()
                if self._is_vanished(flow := packet.flow):
                    self._delete_entry(flow)
                    self._pending.forget(packet)
                    return self.judge(packet, raw)
            verdict = self._carry_out(action, packet, raw, cut)
        return verdict

    def expire(self, now: float) -> None:
        """See to connections whose time is over, once a tick. What is to be done about them stands in `after`."""
        if now - self._looked < TICK_SECONDS:
            return
        self._looked = now
        for action in self._pending.expire(now):
            if isinstance(action, Silence):
                self._end_silence(action.first, now)
            else:
                self._give_up(action)
        opening, self._opening = self._opening, []
        for each in opening:
            if each.due > now:
                self._opening.append(each)
            elif not self._conntrack.is_answered(each.first.flow):
                self._open_silent(each.first, each.decision, each.tries, now)
        for _, deadline, held, is_open in self._sleepers.due(self._doorbell, now):
            self._wake_up(held, deadline, is_open, now)
        waiting, self._waiting = self._waiting, []
        for flow, copy, tries in waiting:
            self.after.append(partial(self._deliver, flow, copy, tries))

    def _end_silence(self, first: Packet, now: float) -> None:
        if self._conntrack.is_answered(first.flow):  # the client has used its port for another connection since
            self._slot[Extra.DELIVERED_BEFORE] += 1
            return
        decision = self._settle(first, self._engine.decide_silence(first))
        if decision.outcome is Outcome.STEER:
            self._open_silent(first, decision, _SILENT_TRIES, now)
        elif decision.outcome is Outcome.WAIT:
            self._hold(_Asleep(first, b"", False, True), decision, None)
        else:
            self._open(first, decision, b"")

    def _open_silent(self, first: Packet, decision: Decision, tries: int, now: float) -> None:
        """Open a connection without payload, and look again: the daemon's backlog may be full."""
        if not tries:
            self._send_later(segment.reset(first))
            return
        self._open(first, decision, b"")
        # There is no payload whose copy would end the daemon's handshake.
        self.after.append(partial(self._deliver, first.flow, segment.bare_ack(first)))
        self._opening.append(_Opening(now + _SILENT_SECONDS, first, decision, tries - 1))

    def _inspect(self, packet: Packet, data: bytes) -> Decision | Literal[Answer.NEED_MORE]:
        return self._engine.decide_first(packet, data)

    def _patience(self, packet: Packet) -> pending.Patience:
        return self._engine.patience(packet)

    def _is_genuine(self, first: Packet) -> bool:
        """Have the kernel check the client's cookie now, opening nothing. An old connection in the way of that goes."""
        flow = first.flow
        if self._passes(first):
            return True
        if not self._is_vanished(flow):
            return False
        self._delete_entry(flow)
        return self._passes(first)

    def _passes(self, first: Packet) -> bool:
        try:
            self._injector.send(segment.bare_ack(first), self._mark.field(ASK_ID))
        except OSError:
            self._slot[Extra.NOT_SENT] += 1
        return self._is_noted(first)

    # ---- actions ----

    def _carry_out(self, action: pending.Action[Decision], packet: Packet, raw: bytes, cut: bool) -> Verdict:
        slot = self._slot
        match action:
            case Decide():
                return self._decide(action, raw, cut)
            case ForwardRaw():
                slot[Extra.FORWARDED] += 1
                for copy in self._copies(packet, raw, cut):
                    self.after.append(partial(self._deliver, packet.flow, copy))
            case Acknowledge(packet=acknowledged, ack=ack, window=window):
                slot[Extra.HELD] += 1
                slot[Extra.ACKNOWLEDGED] += 1
                scale = self._handshake.window_scale
                self._send_later(segment.acknowledgement(acknowledged, ack, window, scale))
            case Drop(why=why):
                slot[_DROPPED[why]] += 1
            case Evict(why=why, silent=silent):
                slot[_EVICTED[why]] += 1
                if silent is not None:
                    self._send_later(segment.reset(silent))
            case GiveUp():
                self._give_up(action)
            case _:
                slot[Extra.HELD if packet.payload else Extra.SILENT] += 1
        return DROP

    def _decide(self, decide: Decide[Decision], raw: bytes, cut: bool) -> Verdict:
        first = decide.first
        if decide.attempt > 1 and not self._may_open_again(first.flow):
            self._slot[Extra.DELIVERED_BEFORE] += 1
            return DROP
        decision = self._settle(first, decide.decision)
        verdict = DROP
        if decision.outcome is Outcome.WAIT:
            self._hold(_Asleep(first, decide.data, decide.fin, False), decision, None)
        else:
            verdict = self._verdict(decide, decision)
        if decision.outcome is Outcome.STEER:
            whole = decide.alone and not cut and len(decide.data) == len(first.payload) and not first.flags & URG
            self._deliver_later(first, [raw] if whole else self._segments(first, decide.data, decide.fin))
        return verdict

    def _segments(self, first: Packet, data: bytes, fin: bool) -> list[bytes]:
        mss = self._handshake.mss4 if first.version == 4 else self._handshake.mss6
        return segment.data(first, data, fin=fin, size=mss - len(first.tcp_options))

    # ---- connections whose daemon sleeps ----

    def _hold(self, held: _Asleep, decision: Decision, deadline: float | None) -> None:
        """Keep a connection until its daemon listens; `deadline`: of one that was held before."""
        first = held.first
        door, timeout = self._doorbell.door_of(first, decision.target_id)
        now = time.monotonic()
        limits = self._pending.limits
        if deadline is None and not self._is_genuine(first):
            self._slot[Extra.NOT_GENUINE] += 1
            self._pending.forget(first)
            return
        self._doorbell.ask(door, now)
        until = now + timeout if deadline is None else deadline
        room = (limits.source_connections, limits.connections)
        if not self._sleepers.put(first.flow, door, first.source, until, held, *room):
            self._pending.forget(first)

    def _waits(self, packet: Packet) -> bool:
        """Whether a packet belongs to a connection that is held, and is of no use."""
        held = self._sleepers.get(packet.flow)
        if held is None or held.first.ack != packet.ack:
            return False
        if held.silent and packet.payload:
            # It has spoken after all.
            self._sleepers.pop(packet.flow)
            self._pending.forget(packet)
            return False
        self._slot[Extra.HELD] += 1
        return True

    def _wake_up(self, held: _Asleep, deadline: float, is_open: bool, now: float) -> None:
        """A connection that was held: its daemon listens, or it will not."""
        first, data, fin, silent = held
        decision: Decision | Literal[Answer.NEED_MORE]
        if not is_open:
            decision = self._engine.give_up(first, Reason.NOT_WOKEN)
        else:
            decision = self._engine.decide_silence(first) if silent else self._engine.decide_first(first, data)
        if decision is Answer.NEED_MORE:  # another plan is in force, and knows better
            self._pending.forget(first)
            return
        decision = self._settle(first, decision)
        if decision.outcome is Outcome.WAIT:
            self._hold(held, decision, deadline)
        elif decision.outcome is not Outcome.STEER:
            self._pending.forget(first)
            self._open(first, decision, data)
        elif silent:
            self._open_silent(first, decision, _SILENT_TRIES, now)
        else:
            self._open(first, decision, data)
            self._deliver_later(first, self._segments(first, data, fin))

    def _give_up(self, action: GiveUp) -> None:
        first = action.first
        if action.why is Why.GIVEN_UP:
            self._slot[Extra.RESET_AGAIN] += 1
            self._send_later(segment.reset(first))
            return
        decision = self._settle(first, self._engine.give_up(first, _REASONS[action.why]))
        if not action.reset:
            self._open(first, decision, b"")
        elif action.why is not Why.UNANSWERED or (decision.outcome is not Outcome.DROP and self._is_genuine(first)):
            self._send_later(segment.reset(first))

    def _copies(self, packet: Packet, raw: bytes, cut: bool) -> list[bytes]:
        """A packet once more; of one that was cut short, what is there of it: the client repeats the rest. No byte of
        it is urgent: the daemon would not read that one where it was inspected."""
        if not (cut or packet.flags & URG):
            return [raw]
        fin = bool(packet.flags & FIN) and not cut
        return segment.data(packet, packet.payload, fin=fin, size=len(packet.payload) or 1)

    # ---- carrying a decision out ----

    def _verdict(self, decide: Decide[Decision], decision: Decision) -> Verdict:
        """The queued packet itself stands for the client's ACK, or gives its place to one."""
        first = decide.first
        id_ = self._id(decision)
        if id_ is None:
            return DROP
        if id_ == ASK_ID:
            self.after.append(partial(self._refuse, first, decision, decide.data))
        return Verdict(id_, None if decide.alone and first.version == 4 else segment.bare_ack(first))

    def _open(self, first: Packet, decision: Decision, data: bytes) -> None:
        """An ACK of our own stands for the client's."""
        id_ = self._id(decision)
        if id_ is None:
            return
        self._send_later(segment.bare_ack(first), self._mark.field(id_))
        if id_ == ASK_ID:
            self.after.append(partial(self._refuse, first, decision, data))

    def _id(self, decision: Decision) -> int | None:
        if decision.outcome is Outcome.STEER:
            return decision.target_id
        return None if decision.outcome is Outcome.DROP else ASK_ID

    def _refuse(self, first: Packet, decision: Decision, data: bytes) -> None:
        """By now the kernel has checked the client's cookie, and noted the client if it was right. A spoofer's victim
        gets nothing from us. Needs no state: what we said so far is the one SYN-ACK."""
        if not self._is_noted(first):
            self._slot[Extra.NOT_GENUINE] += 1
            return
        said = b""
        if decision.outcome is Outcome.ALERT and data.startswith(_TLS_HANDSHAKE):
            said = _UNRECOGNIZED_NAME
            self._injector.send(segment.alert(first, len(data), said))
        self._injector.send(segment.reset(first, len(said)))

    def _deliver(self, flow: Flow, copy: bytes, tries: int = _TRIES) -> None:
        """A copy goes into an open connection or nowhere. A daemon on this host has answered by now; for one that is
        further away it waits."""
        try:
            self._injector.send(copy)
        except PermissionError:
            if tries and len(self._waiting) < _MAX_UNDELIVERED and self._conntrack.is_opening(flow):
                self._slot[Extra.SENT_AGAIN] += 1
                self._waiting.append(_Waiting(flow, copy, tries - 1))
                return
            if len(self._undelivered) >= _MAX_UNDELIVERED:
                # Who was in it is taken for delivered: refused a second time, rather than carried out twice.
                self._undelivered.clear()
            self._undelivered.add(flow)
            raise
        self._undelivered.discard(flow)

    def _deliver_later(self, first: Packet, copies: Iterable[bytes]) -> None:
        for copy in copies:
            self.after.append(partial(self._deliver, first.flow, copy))

    def _send_later(self, packet: bytes, mark: int | None = None) -> None:
        self.after.append(partial(self._injector.send, packet, mark))

    # ---- what the kernel knows ----

    def _may_open_again(self, flow: Flow) -> bool:
        """Whether a connection that was decided before may be opened once more. If an old one was in the way, it no
        longer is; if the new one stands, a second one would carry the request out twice."""
        self._give()
        if self._is_vanished(flow):
            self._delete_entry(flow)
            return True
        return flow in self._undelivered

    def _is_noted(self, first: Packet) -> bool:
        """As genuine: the kernel was asked a moment ago, and its cookie was right."""
        return self._nftables.contains(f"genuine{first.version}", flow_key(first.flow))

    def _is_vanished(self, flow: Flow) -> bool:
        return self._nftables.contains(f"vanished{flow.version}", flow_key(flow))

    def _delete_entry(self, flow: Flow) -> None:
        """And the daemon's end of that connection with it: should the new one go to the same daemon, that end would
        take its SYN for a stray packet of the old one."""
        old = self._conntrack.translated(flow)
        if self._conntrack.delete(flow):
            self._slot[Extra.OLD_ENTRY_DELETED] += 1
        if old is not None:
            sockets.end(old)
