"""First datagrams of UDP flows, until they suffice for a decision. Pure: packets and `now` go in, a step comes out; the
worker carries it out.

Every datagram that was queued because its flow is not decided yet goes to `datagram`, which answers

- `Decide`: the flow is decided. If nothing was held, this datagram goes on with the decision's mark; else `earlier`,
  what was held, is sent again in front of it;
- `Hold`: drop it; a copy is kept. No packet waits in the queue: its verdict would have to be looked for there, and its
  conntrack entry would be another one than the next datagram's;
- `GiveUp`: the flow had all the datagrams or bytes that it may have, and does not say where it wants to go;
- `Drop`: a copy that ends before its datagram does: it could not be sent again.

Nothing of a decided flow is remembered: the kernel carries it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

from steerd.core.pending import Limits
from steerd.model import Answer, Flow
from steerd.wire.packet import Packet
from steerd.wire.parser import History

MAX_DATAGRAMS = 16
"""Of one flow. A hello of 16 KiB, the largest that common servers take, fills 14."""

D = TypeVar("D")


class Why(enum.Enum):
    """Why a flow was pushed out. Closed: each has one counter."""

    SOURCE = "source"
    TOTAL = "total"


class Decide(NamedTuple, Generic[D]):
    decision: D
    earlier: tuple[bytes, ...]
    """Whole IP packets, in the order in which they came."""


class Hold(NamedTuple):
    evicted: Why | None = None
    """Another flow was pushed out for it."""


class GiveUp(NamedTuple):
    pass


class Drop(NamedTuple):
    pass


class _Held(NamedTuple):
    """An undecided flow."""

    first: Packet
    deadline: float
    packets: list[bytes]
    payloads: History


class Datagrams(Generic[D]):
    """The undecided flows of one worker. `inspect` is asked with a flow's payloads so far; `patience` says for how many
    seconds a flow may be undecided. Of `limits` those of bytes and connections count."""

    def __init__(
        self,
        limits: Limits,
        inspect: Callable[[Packet, Sequence[bytes]], D | Literal[Answer.NEED_MORE]],
        patience: Callable[[Packet], float],
    ) -> None:
        self.limits = limits
        self._inspect = inspect
        self._patience = patience
        self._flows: OrderedDict[Flow, _Held] = OrderedDict()
        self._sources: dict[bytes, OrderedDict[Flow, None]] = {}

    def __len__(self) -> int:
        """How many flows are undecided."""
        return len(self._flows)

    @property
    def held_bytes(self) -> int:
        """Bytes of all held packets. Walks over all undecided flows."""
        return sum(len(packet) for held in self._flows.values() for packet in held.packets)

    def datagram(self, packet: Packet, raw: bytes, now: float, *, cut: bool) -> Decide[D] | Hold | GiveUp | Drop:
        """What is to be done about one queued datagram; `raw` is its IP packet. `cut`: the copy ends before it does."""
        flow = packet.flow
        held = self._flows.get(flow)
        payloads = History() if held is None else held.payloads
        payloads.append(packet.payload)
        decision = self._inspect(packet, payloads)
        if decision is not Answer.NEED_MORE:
            if held is not None:
                self._forget(flow, held)
            return Decide(decision, () if held is None else tuple(held.packets))
        if cut:
            payloads.pop()
            payloads.memory.clear()
            return Drop()
        if len(payloads) >= MAX_DATAGRAMS or sum(map(len, payloads)) >= self.limits.connection_bytes:
            if held is not None:
                self._forget(flow, held)
            return GiveUp()
        if held is not None:
            held.packets.append(raw)
            return Hold()
        evicted = self._make_room(packet.source)
        self._flows[flow] = _Held(packet, now + self._patience(packet), [raw], payloads)
        self._sources.setdefault(packet.source, OrderedDict())[flow] = None
        return Hold(evicted)

    def expire(self, now: float) -> list[Packet]:
        """Forget the flows that were not decided in time; the first datagram of each. Walks over all undecided flows,
        since each has its own service's patience: for a few times a second."""
        overdue = [(flow, held) for flow, held in self._flows.items() if held.deadline <= now]
        for flow, held in overdue:
            self._forget(flow, held)
        return [held.first for _, held in overdue]

    def _make_room(self, source: bytes) -> Why | None:
        """See to it that one more flow of this source has room: why another one had to go, if one had to."""
        own = self._sources.get(source, OrderedDict())
        if len(own) >= self.limits.source_connections:
            oldest, why = next(iter(own)), Why.SOURCE
        elif len(self._flows) >= self.limits.connections:
            oldest, why = next(iter(self._flows)), Why.TOTAL
        else:
            return None
        self._forget(oldest, self._flows[oldest])
        return why

    def _forget(self, flow: Flow, held: _Held) -> None:
        del self._flows[flow]
        own = self._sources[held.first.source]
        del own[flow]
        if not own:
            del self._sources[held.first.source]
