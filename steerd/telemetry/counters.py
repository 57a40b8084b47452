"""Counters in shared memory: a file that every worker maps, so that counts survive a worker and cost it nanoseconds.

Layout, all of it unsigned 64-bit words in the machine's order:
  word 0      magic
  word 1      number of worker slots
  word 2      generation: rises when the registry changed, or when the kernel's maps lost what workers had put there
  word 3..7   free
  from word 8 one slot of SLOT_WORDS words for each worker: first one word for each Reason, then the extra ones below

One writer for each word (a worker its slot, the main process the header), and aligned 64-bit stores: no lock needed.
"""

from __future__ import annotations

import enum
import mmap
import os
from pathlib import Path

from steerd.errors import SteerdError
from steerd.model import Reason

_MAGIC = 0x32304453_54454552  # changes whenever the layout does
_WORKERS_WORD, _GENERATION_WORD = 1, 2
_HEADER_WORDS = 8
SLOT_WORDS = 64


class Extra(enum.IntEnum):
    """Words of a slot that count something else than decisions. Append, never reorder."""

    MALFORMED_EXTENSION = 32
    """Packets with a port extension of ours that cannot be read; treated as if they had none."""
    LOADED = 33
    """Targets put into the kernel's maps."""
    HELD = 34
    """Segments of first payloads held, since more is needed for a decision."""
    ACKNOWLEDGED = 35
    """... and acknowledged to clients that wait for that."""
    FORWARDED = 36
    """Segments that waited while their connection was decided, sent after it."""
    SILENT = 37
    """Clients that said nothing at once, where that is of interest."""
    EVICTED_SOURCE = 38
    """Undecided connections or flows pushed out by newer ones of their source (`pending.source_connections`)."""
    EVICTED_TOTAL = 39
    """Undecided connections or flows pushed out by newer ones (`pending.connections`)."""
    FULL_SOURCE = 40
    """First segments dropped: no room for their source, and nothing that could be pushed out."""
    FULL_TOTAL = 41
    """First segments dropped: no room, and nothing that could be pushed out."""
    OUTSIDE = 42
    """Segments dropped: before an acknowledged beginning, or beyond `pending.connection_bytes`."""
    GAPS = 43
    """Segments dropped: one gap too many in front of them."""
    GIVEN_UP = 44
    """Segments dropped: of connections given up a moment ago."""
    RESET_AGAIN = 45
    """Connections given up that did not hear of it the first time."""
    CLIENT_RESET = 46
    """Undecided connections that their client reset."""
    NO_USE = 47
    """Segments dropped: nothing is known of their connection, and they say nothing."""
    DELIVERED_BEFORE = 48
    """First payloads dropped: repeated, though their connection stands."""
    OLD_ENTRY_DELETED = 49
    """Conntrack entries deleted: a genuine client opened a new connection from their ports."""
    NOT_GENUINE = 50
    """First segments neither answered nor held: the client never saw our answer to its SYN."""
    NOT_SENT = 51
    """Packets of a worker's own that were not sent: dropped in output by our table (its counter `undelivered`) or by a
    firewall, or for want of memory or a route (then the log has the first)."""
    HELD_DATAGRAMS = 52
    """First datagrams held, since more is needed for a decision."""
    CUT_DATAGRAMS = 53
    """First datagrams dropped: more is needed for a decision, and they are too long for a whole copy."""
    DAMAGED = 54
    """Segments dropped: their TCP checksum is wrong."""
    SENT_AGAIN = 55
    """First payloads sent again, since their daemon, on another host, had not answered the kernel's SYN yet."""


assert len(Reason) <= min(Extra)


class Counters:
    """The mapped file. `create` is for the main process, `open` for workers and for whoever wants to look."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self._mapping = mapping
        self._words = memoryview(mapping).cast("Q")

    @classmethod
    def create(cls, path: Path, workers: int) -> Counters:
        """Map the file at `path`; what was counted in it stays if it has the same shape, else it starts from zero."""
        size = (_HEADER_WORDS + workers * SLOT_WORDS) * 8
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(descriptor, size)
            counters = cls(path, mmap.mmap(descriptor, size))
        finally:
            os.close(descriptor)
        words = counters._words
        if words[0] != _MAGIC or words[_WORKERS_WORD] != workers:
            for index in range(len(words)):
                words[index] = 0
            words[0], words[_WORKERS_WORD] = _MAGIC, workers
        return counters

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Counters:
        """Map an existing file; raises SteerdError if there is none or it is of another layout."""
        try:
            descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SteerdError(f"{path} does not exist: is steerd running?") from None
        try:
            size = os.fstat(descriptor).st_size
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            # An empty file is one that `create` has made a moment ago, and mmap refuses it.
            counters = cls(path, mmap.mmap(descriptor, size, access=access)) if size and size % 8 == 0 else None
        finally:
            os.close(descriptor)
        if counters is None or counters._words[0] != _MAGIC:
            raise SteerdError(f"{path} was written by another version of steerd: restart the daemon")
        return counters

    @property
    def workers(self) -> int:
        return self._words[_WORKERS_WORD]

    @property
    def generation(self) -> int:
        return self._words[_GENERATION_WORD]

    def next_generation(self) -> None:
        """Tell the workers to look at the registry again and to forget which targets the kernel has."""
        self._words[_GENERATION_WORD] += 1

    def slot(self, worker: int) -> memoryview:
        """The words of one worker (0 ..), to be indexed by Reason and Extra."""
        start = _HEADER_WORDS + worker * SLOT_WORDS
        return self._words[start : start + SLOT_WORDS]

    def total(self, word: Reason | Extra) -> int:
        """One counter, summed over the workers."""
        return sum(self.slot(worker)[word] for worker in range(self.workers))
