"""Marks: how a decision is written into the bits of the packet mark that are ours.

The bits are a range `low`..`high` (inclusive) of the 32. The highest one is kept free for a state that packets may have
one day; the bits below it hold an id. An id names a target for ever, except for the few below FIRST_TARGET_ID, which
name an answer instead.
"""

from __future__ import annotations

from typing import NamedTuple

NO_DECISION = 0
"""What a mark says that nobody has set."""
RESET_ID = 1
"""Answer with a TCP reset."""
PASS_ID = 2
"""Leave the packet to the gateway's own socket."""
OURS_ID = 3
"""A worker sends this packet itself."""
ASK_ID = 4
"""Find out whether a client's handshake is genuine, and open nothing: the worker will refuse it itself."""
KEEP_ID = 5
"""Whose this datagram is cannot be told: it goes on if it belongs to a flow that stands."""
FIRST_TARGET_ID = 16
"""Ids from here on are targets; those between are kept for answers yet to come."""

MARK_BITS = 32
"""Width of `skb->mark` (include/linux/skbuff.h)."""


class MarkLayout(NamedTuple):
    """An inclusive range of mark bits, 0 <= low < high <= 31."""

    low: int
    high: int

    @property
    def shift(self) -> int:
        """How far an id is shifted to stand in the mark."""
        return self.low

    @property
    def width(self) -> int:
        """How many bits are ours, the free one included."""
        return self.high - self.low + 1

    @property
    def mask(self) -> int:
        """All bits that are ours, the free one included, as a mark value."""
        return ((1 << self.width) - 1) << self.low

    @property
    def highest_id(self) -> int:
        """The largest id that fits below the free bit."""
        return (1 << (self.width - 1)) - 1

    def field(self, id_: int) -> int:
        """The mark value of an id (other bits zero); raises ValueError unless 0 <= id <= highest_id."""
        if not 0 <= id_ <= self.highest_id:
            raise ValueError(f"Id {id_} does not fit into mark bits {self.low}-{self.high}: 0 to {self.highest_id}.")
        return id_ << self.low
