"""The half of a worker that has the kernel steer the next SYN with the same extension by itself; core.offload says what
for, and when that is right. main.epochs takes it back.

Nothing is lost if the kernel cannot be told: the next SYN comes to a worker again.
"""

from __future__ import annotations

from collections.abc import Callable

from steerd.core.engine import NO_TARGET, Engine
from steerd.core.marks import MarkLayout
from steerd.core.offload import key
from steerd.errors import KernelError
from steerd.kernel import ruleset
from steerd.kernel.nftables import Nftables
from steerd.telemetry.counters import EPOCH_WORD, LOG_WORD, Counters, Extra, log_switch
from steerd.wire.packet import Packet
from steerd.wire.portext import Numbers

# What the kernel was told it does not ask about again; keys that go on coming are of packets with marks of others, say.
_MAX_REMEMBERED = 16384


class Offload:
    """A worker's half."""

    def __init__(self, counters: Counters, worker: int, nftables: Nftables) -> None:
        self._shared = counters.header
        self._slot = counters.slot(worker)
        self._nftables = nftables
        self._epoch = -1
        self._tried: set[bytes] = set()
        self._full: set[int] = set()

    def refresh(self, engine: Engine, mark: MarkLayout, numbers: Numbers) -> None:
        """A new plan is in force."""
        self._engine = engine
        self._mark = mark
        self._numbers = numbers

    def wants(self, packet: Packet) -> bool:
        """Whether a SYN that was steered a moment ago, to a target that is awake and in the kernel's maps, is one that
        the kernel could have steered, and was not told how since the epoch began. Not until the next one, once it has
        refused something: a full map refuses all, and to take a transaction back the kernel waits some 8 ms (RCU)."""
        epoch = self._shared[EPOCH_WORD]
        if epoch != self._epoch or len(self._tried) > _MAX_REMEMBERED:
            self._tried.clear()
            self._full.clear()
            self._epoch = epoch
        found = key(packet, self._numbers)
        return (
            packet.version not in self._full
            and found is not None
            and found not in self._tried
            and not log_switch(self._shared[LOG_WORD]).access
            and self._engine.lasting_target(packet) != NO_TARGET
        )

    def tell(self, packet: Packet, keep_up: Callable[[], None], may_steer: Callable[[int], bool]) -> None:
        """Have the kernel steer SYNs like this one, if that is right now. `keep_up` sees what is in force; `may_steer`
        says of a target whether it is awake, and in the kernel's maps."""
        # What follows was not true before the epoch was read, or the kernel refuses it.
        epoch = self._shared[EPOCH_WORD]
        keep_up()
        found = key(packet, self._numbers)
        target_id = self._engine.lasting_target(packet)
        if (
            packet.version in self._full
            or found is None
            or target_id == NO_TARGET
            or not may_steer(target_id)
            or log_switch(self._shared[LOG_WORD]).access
        ):
            return
        self._tried.add(found)
        mark = self._mark.field(target_id)
        try:
            self._nftables.insert(ruleset.offload_elements(packet.version, found, mark, epoch))
        except (KernelError, OSError):  # another epoch has begun, the map is full, or there is no memory
            self._full.add(packet.version)
            return
        self._slot[Extra.OFFLOADED] += 1
