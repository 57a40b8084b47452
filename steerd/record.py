"""The half of a worker that counts and logs decisions.

Every decision is counted, and what it took; a line of the log is written of those that the log switch asks for, and of
those that failed. Any client can make decisions fail, so these lines have an allowance, and what was left out is said.
A line has everything that explains the decision. What costs time to find out, as a route's name, is looked up only when
a line is written.
"""

from __future__ import annotations

import ipaddress
from time import monotonic, monotonic_ns

import structlog

from steerd.control.registry import Reader
from steerd.core.engine import Decision, Engine
from steerd.errors import SteerdError
from steerd.model import Outcome, Reason
from steerd.telemetry import logs
from steerd.telemetry.counters import LOG_WORD, Counters, Extra, Gauge, Meter, log_switch
from steerd.wire import packet as wire
from steerd.wire.packet import Packet

_FAILED = (Outcome.DROP, Outcome.RESET, Outcome.ALERT)
FAILURES_PER_SECOND, FAILURES_AT_ONCE = 5, 20
_SHOWN_BYTES = 64
"""Of a packet of which nothing else can be said."""


class Record:
    """What one worker did, for those who look on. `begin` is called when a decision is begun."""

    def __init__(
        self, counters: Counters, worker: int, reader: Reader, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self._shared = counters.header
        self._slot = counters.slot(worker)
        self._meter = Meter(counters, worker)
        self._reader = reader
        self._log = log
        self._failures = logs.Allowance(FAILURES_PER_SECOND, FAILURES_AT_ONCE)
        self._began = 0
        self._until_logged = self._access = 0
        self._see_switch()
        self.pending(0, 0, 0)

    def refresh(self, engine: Engine) -> None:
        """A new plan is in force."""
        self._engine = engine
        self._meter.refresh()

    def begin(self) -> None:
        """From now on time counts for the next decision."""
        self._began = monotonic_ns()

    def decision(self, packet: Packet, decision: Decision) -> None:
        """This was decided."""
        now = monotonic_ns()
        # What time alone decides comes one behind the other, without a packet in between.
        nanoseconds, self._began = now - self._began, now
        self._meter.count(decision.service, decision.parser, decision.reason, nanoseconds)
        if decision.malformed:
            self._slot[Extra.MALFORMED_EXTENSION] += 1
        if self._shared[LOG_WORD] != self._switch:
            self._see_switch()
        if self._until_logged:
            self._until_logged -= 1
            if not self._until_logged:
                self._until_logged = self._access
                self._write(packet, decision, nanoseconds)
                return
        if decision.outcome is not Outcome.STEER and decision.outcome in _FAILED and self._may_tell_failure():
            self._write(packet, decision, nanoseconds)

    def not_readable(self, raw: bytes) -> None:
        """A packet that cannot be read was dropped."""
        self._fail(Reason.NOT_READABLE, raw, None)

    def fault(self, raw: bytes | None) -> None:
        """An exception ended a decision; `raw` is the packet, if there was one."""
        self._fail(Reason.FAULT, b"" if raw is None else raw, None if raw is None else wire.parse(raw))

    def pending(self, connections: int, flows: int, held_bytes: int) -> None:
        """So much waits for more bytes now."""
        self._slot[Gauge.PENDING_CONNECTIONS] = connections
        self._slot[Gauge.PENDING_FLOWS] = flows
        self._slot[Gauge.PENDING_BYTES] = held_bytes

    @property
    def owes(self) -> bool:
        """Whether `settle_up` has something to say."""
        return bool(self._failures.refused)

    def settle_up(self, now: float) -> None:
        """Say what was not said, as soon as a line is allowed again."""
        if self._failures.refused and self._failures.has_room(now):
            self._log.info("failed decisions that were not logged", decisions=self._failures.forgive())

    def _see_switch(self) -> None:
        self._switch = self._shared[LOG_WORD]
        switch = log_switch(self._switch)
        logs.set_level(switch.level)
        self._access = self._until_logged = switch.access

    def _may_tell_failure(self) -> bool:
        allowed = self._failures.take(monotonic())
        if not allowed:
            self._slot[Extra.NOT_LOGGED] += 1
        return allowed

    def _fail(self, reason: Reason, raw: bytes, packet: Packet | None) -> None:
        nanoseconds = monotonic_ns() - self._began
        self._meter.count("", "", reason, nanoseconds)
        if self._may_tell_failure():
            self._log.info(
                "decision",
                client=None if packet is None else _address(packet.src, packet.sport),
                endpoint=None if packet is None else _address(packet.dst, packet.dport),
                outcome=Outcome.DROP.value,
                reason=reason.name.lower(),
                packet=raw[:_SHOWN_BYTES].hex() if packet is None else None,
                payload=None if packet is None else packet.payload[:_SHOWN_BYTES].hex(),
                microseconds=nanoseconds // 1000,
            )

    def _write(self, packet: Packet, decision: Decision, nanoseconds: int) -> None:
        target = self._reader.target(decision.target_id) if decision.target_id else None
        self._log.info(
            "decision",
            service=decision.service,
            client=_address(packet.src, packet.sport),
            endpoint=_address(packet.dst, packet.dport),
            outcome=decision.outcome.value,
            reason=decision.reason.name.lower(),
            parser=decision.parser,
            route=self._route(packet, decision),
            target=str(self._reader.written(target)) if target else None,
            keys=logs.shown_keys(decision.keys),
            microseconds=nanoseconds // 1000,
        )

    def _route(self, packet: Packet, decision: Decision) -> str | None:
        """The name of the route that decided; None if it cannot be told."""
        try:
            found = self._engine.route_of(packet, decision)
            return None if found is None else self._reader.name_of_route(decision.service, *found)
        except SteerdError:  # it went a moment ago
            return None


def _address(packed: bytes, port: int) -> str:
    host = ipaddress.ip_address(packed)
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"
