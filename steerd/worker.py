"""A worker: one queue, one process, the hot loop; forked by steerd.nursery.

It owns nothing that must outlive it. The registry and the counters are the main process's; established connections
are the kernel's. So it may be killed at any moment, and packets that waited for its verdict are sent again by clients.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from steerd.control.claims import Claimant
from steerd.control.doors import Visitor
from steerd.control.registry import Reader
from steerd.control.states import States
from steerd.core.choice import Chooser
from steerd.core.engine import NO_TARGET, Decision, Engine
from steerd.core.marks import PASS_ID, RESET_ID, MarkLayout
from steerd.core.wake import Door, Doorbell, DoorState
from steerd.datagram import Datagram
from steerd.errors import KernelError, SteerdError
from steerd.kernel import handshake
from steerd.kernel.nftables import Nftables
from steerd.kernel.queue import DROP, Queue, QueuedPacket, Ruling, Verdict
from steerd.kernel.ruleset import datagram_elements, target_elements
from steerd.late import TICK_SECONDS, Late
from steerd.model import UDP, Outcome, Reason
from steerd.offload import Offload
from steerd.orders import READY, WorkerSettings
from steerd.record import Record
from steerd.telemetry import logs
from steerd.telemetry.counters import GENERATION_WORD, Counters, Extra
from steerd.wire import packet as wire

_PR_SET_PDEATHSIG = 1
_CONTROL = wire.SYN | wire.ACK
_COLLECT_EVERY = 100_000
# So many packets are decided in a row before their verdicts are given, if so many are there. More would let the first
# one wait longer for little. The first of a batch takes 100 us, the tenth 20: the kernel's work empties the caches.
_BATCH = 64
# Faults are logged once each; a client that can cause many different ones must not fill the disk.
_MAX_FAULTS_LOGGED = 100
_GAUGE_SECONDS = 0.25
# The queue's former owner, killed a moment ago, may still be on its way out.
_BIND_SECONDS = 5.0


class Worker:
    """Takes packets from the queue, has the engine decide, and gives verdicts."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._counters = Counters.open(Path(settings.counters), write=True)
        self._shared = self._counters.header
        self._log = logs.configure(process=f"worker-{settings.index}", style=settings.log_format)
        self._slot = self._counters.slot(settings.index)
        self._reader = Reader(settings.state_dir)
        self._states = States.open(settings.run_dir)
        self._chooser = Chooser(self._reader.group, self._states.get)
        self._claimant = Claimant(settings.run_dir, self._reader.session)
        self._nftables = Nftables()
        self._faults: set[str] = set()
        self._record = Record(self._counters, settings.index, self._reader, self._log)
        self._gauged = 0.0
        self._rulings: list[Ruling] = []
        self._tasks: list[Callable[[], None]] = []
        self._visitor = Visitor(settings.run_dir)
        doorbell = Doorbell(self._door_of, self._visitor.look, self._visitor.ask)
        self._late = Late(self._settle, self._give, self._slot, self._nftables, doorbell)
        self._datagram = Datagram(
            self._settle,
            self._slot,
            self._late.after,
            self._late.send,
            self._late.forget,
            settings.queue_length,
            doorbell,
        )
        self._offload = Offload(self._counters, settings.index, self._nftables)
        self._refresh()
        self._queue = self._bind()
        self._waiting = False

    def _bind(self) -> Queue:
        deadline = time.monotonic() + _BIND_SECONDS
        while True:
            try:
                return Queue(
                    self._settings.queue,
                    self._on_packet,
                    length=self._settings.queue_length,
                    receive_buffer=self._settings.receive_buffer,
                )
            except KernelError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _refresh(self) -> None:
        """Take up what the main process published, and forget what the kernel's maps were known to hold."""
        generation = self._shared[GENERATION_WORD]
        # Until this is done every packet tries again: the old plan's probes, looked up among the new plan's routes,
        # could lead to a wrong daemon.
        self._generation = -1
        plan = self._reader.refresh()
        self._mark = MarkLayout(plan.mark_low, plan.mark_high)
        # The registry gives no id that does not fit, so the hot path need not ask `field` again.
        self._clear, self._shift = ~self._mark.mask & 0xFFFFFFFF, self._mark.shift
        self._engine = Engine(
            plan, self._reader.route, self._reader.session, state=self._states.get, chooser=self._chooser
        )
        self._late.refresh(self._engine, self._mark, plan.pending, handshake.measure())
        self._datagram.refresh(self._engine, plan.pending)
        self._record.refresh(self._engine)
        self._offload.refresh(self._engine, self._mark, plan.numbers)
        self._loaded: set[int] = set()
        self._waking = plan.waking
        # Of those that are loaded: whose daemon may be asleep, with the target's port, and how long it is waited for.
        self._sleepy: dict[int, tuple[int, float]] = {}
        self._answering: set[tuple[int, int]] = set()
        self._generation = generation
        self._log.debug("plan taken up", services=len(plan.services), endpoints=len(plan.endpoints))

    def run(self) -> None:
        """Serve the queue for ever."""
        gc.collect()
        gc.freeze()
        # Decisions make no cycles. What an exception leaves behind can wait.
        gc.set_threshold(_COLLECT_EVERY)
        # Who is woken for each packet never finds two of them.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        while True:
            self._queue.run()
            self._reader.rest()
            self._give()
            self._datagram.rest()
            self._watch_the_time()

    def _on_packet(self, queued: QueuedPacket) -> None:
        self._record.begin()
        try:
            verdict = self._judge(queued)
        except Exception as error:  # whatever it was: this packet is lost, the next one is not
            self._on_fault(error, queued.get_payload())
            self._late.after.clear()
            verdict = DROP
        id_, payload = verdict
        mark = None if id_ is None else queued.mark & self._clear | id_ << self._shift
        self._rulings.append(Ruling(queued.id, mark, payload))
        if self._late.after:
            self._tasks += self._late.after
            self._late.after.clear()
        if len(self._rulings) >= _BATCH:
            self._give()
            self._watch_the_time()

    def _give(self) -> None:
        """Give the verdicts on what was decided so far, and do what had to wait for them."""
        if self._rulings:
            try:
                self._queue.give(self._rulings)
            except OSError:
                self._give_one_by_one()
            self._rulings.clear()
            self._carry_out(self._tasks)

    def _give_one_by_one(self) -> None:
        """A packet without a verdict would stay in the queue for good."""
        for ruling in self._rulings:
            try:
                self._queue.give([ruling])
            except OSError as error:
                self._on_fault(error)

    def _carry_out(self, tasks: list[Callable[[], None]]) -> None:
        for task in tasks:
            try:
                task()
            except PermissionError:  # dropped in output: by our table (counter undelivered), or by a firewall
                self._slot[Extra.NOT_SENT] += 1
            except OSError as error:  # no memory, no route: this one is lost, and the client repeats
                self._slot[Extra.NOT_SENT] += 1
                self._log_once(f"a packet of the worker's own was not sent: {error}")
            except Exception as error:
                self._on_fault(error)
        tasks.clear()

    def _watch_the_time(self) -> None:
        """See to those whose time is over, and to it that the time of others is noticed."""
        now = time.monotonic()
        self._record.begin()
        try:
            if self._late.decides_anew or self._datagram.decides_anew:
                self._keep_up()
            self._late.expire(now)
            self._datagram.expire(now)
            self._reader.rest()
        except Exception as error:
            self._on_fault(error)
        self._carry_out(self._late.after)
        self._record.settle_up(now)
        was_waiting, self._waiting = self._waiting, bool(self._late or self._datagram or self._record.owes)
        if self._waiting != was_waiting:
            self._queue.wait_at_most(TICK_SECONDS if self._waiting else 0)
        if self._waiting != was_waiting or (self._waiting and now - self._gauged > _GAUGE_SECONDS):
            self._gauged = now
            held = self._late.held_bytes + self._datagram.held_bytes
            self._record.pending(self._late.undecided, self._datagram.undecided, held)

    def _keep_up(self) -> None:
        """See what is in force now."""
        if self._reader.advance() or self._shared[GENERATION_WORD] != self._generation:
            self._give()
            self._refresh()

    def _judge(self, queued: QueuedPacket) -> Verdict:
        """What becomes of a packet."""
        self._keep_up()
        raw = queued.get_payload()
        packet = wire.parse(raw)
        if packet is None:
            self._record.not_readable(raw)
            return DROP
        if packet.protocol == UDP:
            return self._datagram.judge(packet, raw)
        if packet.flags & _CONTROL != wire.SYN:
            return self._late.judge(packet, raw)
        decision = self._settle(packet, self._engine.decide_syn(packet))
        match decision.outcome:
            case Outcome.STEER:
                # Behind the verdict: the client waits for that.
                if not queued.mark & self._clear and self._is_awake(decision.target_id) and self._offload.wants(packet):
                    self._tasks.append(partial(self._offload.tell, packet, self._keep_up, self._is_awake))
                return Verdict(decision.target_id)
            case Outcome.PASS:
                return Verdict(PASS_ID)
            case Outcome.RESET | Outcome.ALERT:
                return Verdict(RESET_ID)
            case Outcome.LATE:
                return self._late.syn(packet)
            case Outcome.WAIT:
                # The client repeats its SYN.
                self._visitor.ask(self._door_of(packet, decision.target_id)[0], time.monotonic())
        return DROP

    def _settle(self, packet: wire.Packet, decision: Decision) -> Decision:
        """Make the decision's claim, have the kernel know its target, count and log it; returns the decision that
        counts then."""
        if decision.claim is not None and not self._claimant.claim(decision.claim):
            decision = self._engine.give_up(packet, Reason.SESSION_REFUSED)._replace(
                keys=decision.keys, parser=decision.parser
            )
        if decision.outcome is Outcome.STEER:
            if decision.target_id not in self._loaded:
                decision = self._load(decision)
            if decision.target_id in self._sleepy and decision.outcome is Outcome.STEER:
                decision = self._steer_if_awake(packet, decision)
            if packet.protocol == UDP and (decision.target_id, packet.dport) not in self._answering:
                decision = self._load_datagram(decision, packet.dport)
        self._record.decision(packet, decision)
        return decision

    def _is_awake(self, target_id: int) -> bool:
        """Whether a target is in the kernel's maps, and never asleep."""
        return target_id in self._loaded and target_id not in self._sleepy

    def _door_of(self, packet: wire.Packet, target_id: int) -> tuple[Door, float]:
        port, timeout = self._sleepy[target_id]
        return Door(target_id, packet.protocol, port or packet.dport), timeout

    def _steer_if_awake(self, packet: wire.Packet, decision: Decision) -> Decision:
        """Nobody is steered to a target that may be asleep, unless its own daemon listens there."""
        state = self._visitor.look(self._door_of(packet, decision.target_id)[0])
        if state is DoorState.OPEN:
            return decision
        if state is DoorState.REFUSED:
            refused = self._engine.give_up(packet, Reason.NOT_WOKEN)
            return decision._replace(outcome=refused.outcome, reason=refused.reason, target_id=NO_TARGET)
        return decision._replace(outcome=Outcome.WAIT, reason=Reason.ASLEEP)

    def _load(self, decision: Decision) -> Decision:
        """See to it that the kernel can translate to the decision's target; without that, the packet is dropped."""
        target = self._reader.target(decision.target_id)
        try:
            if target is None:
                raise KernelError(
                    f"target id {decision.target_id} is in the plan, but not among the registry's targets"
                )
            self._nftables.insert(target_elements(self._mark.field(decision.target_id), target))
        except (KernelError, OSError) as error:
            self._log_once(f"target not loaded: {error}")
            return decision._replace(outcome=Outcome.DROP, reason=Reason.NOT_LOADED)
        self._loaded.add(decision.target_id)
        self._slot[Extra.LOADED] += 1
        self._log.debug("target loaded", target=str(target), id=decision.target_id)
        asleep = next((each for each in self._waking if target.address.packed in each), None)
        if asleep is not None:
            self._sleepy[decision.target_id] = (target.port, asleep.timeout)
        return decision

    def _load_datagram(self, decision: Decision, dport: int) -> Decision:
        """See to it that the kernel knows the target's answers to clients that sent to this port, and its zone."""
        if decision.outcome is not Outcome.STEER:  # not loaded, or asleep
            return decision
        target = self._reader.target(decision.target_id)
        if target is None:  # said by `_load`
            return decision
        wanted = datagram_elements(self._mark.field(decision.target_id), decision.target_id, target, dport)
        try:
            # One address and port under two ids (`same`, and by number) is one daemon: whichever came first.
            self._nftables.insert([e for e in wanted if not self._nftables.contains(e.name, e.key)])
        except (KernelError, OSError) as error:
            self._log_once(f"target not loaded: {error}")
            return decision._replace(outcome=Outcome.DROP, reason=Reason.NOT_LOADED)
        self._answering.add((decision.target_id, dport))
        return decision

    def _on_fault(self, error: Exception, raw: bytes | None = None) -> None:
        self._record.fault(raw)
        self._log_once("".join(traceback.format_exception(error)))

    def _log_once(self, text: str) -> None:
        if text not in self._faults and len(self._faults) < _MAX_FAULTS_LOGGED:
            self._faults.add(text)
            self._log.error("packet dropped", why=text)


def serve(settings: WorkerSettings, pipe: int) -> int:
    """Bind, say so on the pipe, and serve for ever; returns an exit status if it cannot."""
    try:
        worker = Worker(settings)
    except SteerdError as error:
        log = logs.configure(process=f"worker-{settings.index}", style=settings.log_format)
        log.error("worker cannot start", why=str(error))
        return 1
    os.write(pipe, READY)
    worker.run()
    return 0
