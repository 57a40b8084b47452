"""The datagram half of a worker: flows of UDP that are decided by their first datagrams, and datagrams that are decided
one by one.

The datagram that decides goes on with the decision's mark. Conntrack makes the flow's entry from it, and from then on
the kernel carries the flow. What was held before is sent again through a raw socket and follows that entry; if there is
none, since the target was missing, the table drops it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from steerd.core import datagrams, pending
from steerd.core.datagrams import Datagrams, Decide, Drop, GiveUp, Hold
from steerd.core.engine import Decision, Engine
from steerd.core.marks import PASS_ID
from steerd.kernel.queue import DROP, Verdict
from steerd.model import Outcome, Reason
from steerd.telemetry.counters import Extra
from steerd.wire.packet import Packet, is_cut

LOOK_SECONDS = 0.25
"""As often as undecided flows are looked through for those whose time is over."""

_EVICTED = {datagrams.Why.SOURCE: Extra.EVICTED_SOURCE, datagrams.Why.TOTAL: Extra.EVICTED_TOTAL}


class Datagram:
    """All flows of datagrams of one worker that are undecided.

    `settle` is the worker's (see Late); what has to wait for the verdict is added to `after`. `send` sends an IP packet
    of the worker's own.
    """

    def __init__(
        self,
        settle: Callable[[Packet, Decision], Decision],
        slot: memoryview,
        after: list[Callable[[], None]],
        send: Callable[[bytes], None],
    ) -> None:
        self._settle = settle
        self._slot = slot
        self._after = after
        self._send = send
        self._looked = 0.0
        self._undecided: Datagrams[Decision] = Datagrams(
            pending.Limits(),
            lambda packet, payloads: self._engine.decide_datagrams(packet, payloads),  # noqa: PLW0108 (it changes)
            lambda packet: self._engine.patience(packet).seconds,
        )

    def refresh(self, engine: Engine, limits: pending.Limits) -> None:
        """A new plan is in force. What is undecided stays, and is decided by it."""
        self._engine = engine
        self._undecided.limits = limits

    def __len__(self) -> int:
        """How many flows wait for a decision."""
        return len(self._undecided)

    def judge(self, packet: Packet, raw: bytes) -> Verdict:
        """What becomes of a queued datagram; `raw` are its bytes, as far as they were copied."""
        match self._undecided.datagram(packet, raw, time.monotonic(), cut=is_cut(raw)):
            case Decide(decision=decision, earlier=earlier):
                return self._decide(packet, decision, earlier)
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
        """Forget flows whose time is over."""
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            for first in self._undecided.expire(now):
                self._settle(first, self._engine.give_up(first, Reason.TOO_SLOW))

    def _decide(self, packet: Packet, decision: Decision, earlier: tuple[bytes, ...]) -> Verdict:
        decision = self._settle(packet, decision)
        if decision.outcome is Outcome.STEER:
            self._after.extend(partial(self._send, copy) for copy in earlier)
            return Verdict(decision.target_id)
        return Verdict(PASS_ID) if decision.outcome is Outcome.PASS else DROP
