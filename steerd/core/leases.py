"""Leases: which alias of a pool a name gets. Pure: what is taken goes in, an index comes out.

Aliases are counted as pools count them, from 0, and a lease takes the alias of one index in every address family that
the pool has there. Who gets which:

1. The name that had an alias last gets the same one again, if nobody else has it: its clients may remember it. That
   holds in quarantine as well, which protects *other* names from packets on their way to the former one.
2. Else the lowest free index that is not in quarantine.

Some aliases are never given away, for as long as others use them without a lease (a route of the configuration, say);
the caller says which, index by index (`is_used`).

The cost of a decision does not grow with the number of leases, but for aliases that are used otherwise, each of which
is asked about again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Literal


class Seats:
    """The aliases of one pool, by index, 0 .. capacity - 1. `now` and `until` are seconds of one clock."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: set[int] = set()
        self._quarantine: dict[int, float] = {}
        self._ends: list[tuple[float, int]] = []
        # Who had an index last, and which one a name had last; only of indices that nobody has now.
        self._last: dict[int, str] = {}
        self._former: dict[str, int] = {}
        # Every index below `_next` is taken, in quarantine, or in the heap `_free` (which may hold some that are not
        # free any more); every index from `_next` on was never looked at.
        self._free: list[int] = []
        self._next = 0

    @property
    def leased(self) -> int:
        """How many are taken."""
        return len(self._taken)

    def quarantined(self, now: float) -> int:
        """How many are in quarantine."""
        self._end_quarantines(now)
        return len(self._quarantine)

    def is_quarantined(self, index: int, now: float) -> bool:
        """Whether an index is kept from others than who had it last."""
        self._end_quarantines(now)
        return index in self._quarantine

    def some(self, state: Literal["leased", "quarantined"], first: int, limit: int, now: float) -> list[int]:
        """Up to `limit` indices in this state, from `first` on, in order."""
        self._end_quarantines(now)
        found = self._taken if state == "leased" else self._quarantine
        return heapq.nsmallest(limit, (index for index in found if index >= first))

    def choose(self, name: str, now: float, is_used: Callable[[int], bool]) -> int | None:
        """The index that a name would get; None: there is none. Takes nothing yet."""
        former = self._former.get(name)
        if former is not None and not is_used(former):
            return former
        self._end_quarantines(now)
        passed: list[int] = []
        chosen = None
        while self._free:
            index = heapq.heappop(self._free)
            if index in self._taken or index in self._quarantine or (passed and passed[-1] == index):
                continue
            passed.append(index)
            if not is_used(index):
                chosen = index
                break
        while chosen is None and self._next < self.capacity:
            index = self._next
            self._next += 1
            if index in self._taken or index in self._quarantine:
                continue
            passed.append(index)
            if not is_used(index):
                chosen = index
        for index in passed:
            heapq.heappush(self._free, index)
        return chosen

    def is_taken(self, index: int) -> bool:
        """Whether an index has a holder."""
        return index in self._taken

    def last_holder(self, index: int) -> str | None:
        """Who had a free index last, as far as that is known."""
        return self._last.get(index)

    def take(self, index: int) -> None:
        """An index has a holder now; who had it before is forgotten."""
        self._taken.add(index)
        self._quarantine.pop(index, None)
        name = self._last.pop(index, None)
        if name is not None and self._former.get(name) == index:
            del self._former[name]

    def release(self, index: int, name: str, until: float) -> None:
        """An index is free again, for others than `name` from `until` on."""
        self._taken.discard(index)
        self._last[index] = name
        self._former[name] = index
        self._quarantine[index] = until
        heapq.heappush(self._ends, (until, index))

    def _end_quarantines(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            until, index = heapq.heappop(self._ends)
            # Else it was taken since, and perhaps released again.
            if self._quarantine.get(index) == until:
                del self._quarantine[index]
                if index < self._next:
                    heapq.heappush(self._free, index)
