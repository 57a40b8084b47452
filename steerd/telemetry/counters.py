"""Counters in shared memory: a file that every worker maps, so that counts survive a worker and cost it nanoseconds.

Layout, all of it unsigned 64-bit words in the machine's order:
  64 words    the header: magic, number of worker slots, generation, log switch (LogSwitch), epoch of
              what the kernel decides by itself (core.offload), 59 that are free
  512 * 16    names of series: 0 if the place is free, 1 if the series is in use, else the time when it went (seconds
              since 1970); 15 words of text, `SERVICE TAB PARSER` in UTF-8, with zeros behind it
  then one slot for each worker: a word for each Reason, Extra and Gauge, and a block for each series: 32 words by
              Reason, 15 by how long the decision took (BOUNDS), and nanoseconds in all

The generation rises when the registry changed, or when the kernel's maps lost what workers had put there.

One writer for each word (a worker its slot, the main process the header, the names, and Extra.RESTARTS), and aligned
64-bit stores: no lock needed.

**Series.** Decisions are counted for each service and parser of the configuration. A series keeps its place, and its
counts, from one configuration to the next, and over restarts. One that no configuration names for KEEP_SECONDS loses
its place at the next reload. Where no place is left for a service, it counts as OTHER.
"""

from __future__ import annotations

import enum
import mmap
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from steerd import shared
from steerd.errors import NoAnswerError, SteerdError
from steerd.model import Reason

_MAGIC = 0x33304453_54454552  # changes whenever the layout does
_WORKERS_WORD = 1
GENERATION_WORD, LOG_WORD, EPOCH_WORD = 2, 3, 4
HEADER_WORDS = 64
MAX_SERIES = 512
_NAME_WORDS = 16
_REASON_WORDS = 32
_FIRST_BLOCK = 128
BOUNDS = (
    5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000, 25_000_000,
    50_000_000, 100_000_000,
)  # fmt: skip
"""Of the classes of decision times: the most nanoseconds of each. The last class has no bound."""
_TIMES, _NANOSECONDS, _BLOCK_WORDS = _REASON_WORDS, _REASON_WORDS + len(BOUNDS) + 1, 48
SLOT_WORDS = _FIRST_BLOCK + MAX_SERIES * _BLOCK_WORDS
OTHER = "(other)"
"""No name of a service."""
KEEP_SECONDS = 3600
_FREE, _IN_USE = 0, 1


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
    RESTARTS = 56
    """Times that the worker was started again, since it had died."""
    NOT_LOGGED = 57
    """Decisions that failed and were not logged, since too many did (telemetry.logs)."""
    OFFLOADED = 58
    """Extensions that the kernel was told to steer by itself (the table's counter `offloaded` has the SYNs)."""


class Gauge(enum.IntEnum):
    """Words of a slot that say how things stand. Append, never reorder."""

    PENDING_CONNECTIONS = 96
    """Connections whose first payload does not suffice yet."""
    PENDING_FLOWS = 97
    """Flows of datagrams whose first datagrams do not suffice yet."""
    PENDING_BYTES = 98
    """Bytes held of these connections and flows."""


assert len(Reason) <= min(Extra) == _REASON_WORDS
assert max(Extra) < min(Gauge) <= max(Gauge) < _FIRST_BLOCK
assert _NANOSECONDS < _BLOCK_WORDS


class LogSwitch(NamedTuple):
    """What is logged; can be changed while everything runs."""

    level: int
    """The least that counts, as in the module `logging`: 10, 20, 30, 40."""
    access: int
    """Decisions: 0 none, 1 every one, N one of N."""


class Series(NamedTuple):
    """Decisions of one service by one parser, over all workers."""

    service: str
    """"": of packets that were for no service, or could not be read."""
    parser: str
    reasons: list[int]
    """By Reason."""
    times: list[int]
    """How many took as long as the class of BOUNDS says."""
    nanoseconds: int


class Counters:
    """The mapped file. `create` is for the main process, `open` for workers and for whoever wants to look."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self._words = memoryview(mapping).cast("Q")

    @classmethod
    def create(cls, path: Path, workers: int) -> Counters:
        """Map the file at `path`; what was counted in it stays if it has the same shape, else it starts from zero."""
        size = (HEADER_WORDS + MAX_SERIES * _NAME_WORDS + workers * SLOT_WORDS) * 8
        mapping = shared.mapped(path, write=True) if path.exists() else None
        if mapping is not None and len(mapping) == size:
            counters = cls(path, mapping)
            if counters._words[0] == _MAGIC and counters.workers == workers:
                return counters
        with shared.made_anew(path, size) as mapping:
            counters = cls(path, mapping)
            counters._words[0], counters._words[_WORKERS_WORD] = _MAGIC, workers
            counters._give_place(0, OTHER, "")
            counters._give_place(1, "", "")
        return counters

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Counters:
        """Map an existing file; raises NoAnswerError if there is none, SteerdError if it is of another layout."""
        try:
            mapping = shared.mapped(path, write=write)
        except FileNotFoundError:
            raise NoAnswerError(f"{path} does not exist: is steerd running?") from None
        counters = cls(path, mapping) if mapping is not None and len(mapping) % 8 == 0 else None
        if counters is None or counters._words[0] != _MAGIC:
            raise SteerdError(f"{path} was written by another version of steerd: restart the daemon")
        return counters

    @property
    def workers(self) -> int:
        return self._words[_WORKERS_WORD]

    @property
    def header(self) -> memoryview:
        """For who looks at GENERATION_WORD and LOG_WORD for each packet."""
        return self._words[:HEADER_WORDS]

    @property
    def generation(self) -> int:
        return self._words[GENERATION_WORD]

    def next_generation(self) -> None:
        """Tell the workers to look at the registry again and to forget which targets the kernel has."""
        self._words[GENERATION_WORD] += 1

    @property
    def log(self) -> LogSwitch:
        """What workers log from their next packet on."""
        return log_switch(self._words[LOG_WORD])

    @log.setter
    def log(self, switch: LogSwitch) -> None:
        self._words[LOG_WORD] = switch.level << 32 | switch.access

    def slot(self, worker: int) -> memoryview:
        """The words of one worker (0 ..), to be indexed by Reason, Extra and Gauge."""
        start = HEADER_WORDS + MAX_SERIES * _NAME_WORDS + worker * SLOT_WORDS
        return self._words[start : start + SLOT_WORDS]

    def total(self, word: Reason | Extra | Gauge) -> int:
        """One counter, summed over the workers."""
        return sum(self.slot(worker)[word] for worker in range(self.workers))

    def totals(self, words: Iterable[Reason | Extra | Gauge]) -> dict[str, int]:
        """Several counters by their names, for people and monitors: `counters.totals(Reason)`."""
        return {word.name.lower(): self.total(word) for word in words}

    # ---- series ----

    def name_series(self, services: Iterable[tuple[str, Sequence[str]]], now: float | None = None) -> None:
        """Give every service of a configuration its places, one for each of its parsers and one for none. To be done
        before that configuration is published. `now`: seconds since 1970."""
        now = time.time() if now is None else now
        wanted = {service: ("", *parsers) for service, parsers in services}
        names = {(service, parser) for service, parsers in wanted.items() for parser in parsers}
        places: dict[tuple[str, str], int] = {}
        for place, name in self._names():
            state = self._names_words(place)[0]
            if name in names or name in ((OTHER, ""), ("", "")):
                state = _IN_USE
            elif state == _IN_USE:
                state = int(now)
            elif now - state >= KEEP_SECONDS:
                self._take_place(place)
                continue
            self._names_words(place)[0] = state
            places[name] = place
        free = [place for place in range(MAX_SERIES) if self._names_words(place)[0] == _FREE]
        for service, parsers in wanted.items():
            missing = [parser for parser in parsers if (service, parser) not in places]
            if len(missing) <= len(free):
                for parser in missing:
                    self._give_place(free.pop(0), service, parser)

    def blocks(self) -> dict[tuple[str, str], int]:
        """Where in a slot the block of each service and parser begins."""
        return {name: _FIRST_BLOCK + place * _BLOCK_WORDS for place, name in self._names()}

    def series(self) -> Iterator[Series]:
        """Everything that was decided, by service and parser."""
        slots = [self.slot(worker) for worker in range(self.workers)]
        for (service, parser), start in self.blocks().items():
            blocks = [slot[start : start + _BLOCK_WORDS].tolist() for slot in slots]
            words = [sum(column) for column in zip(*blocks, strict=True)]
            yield Series(
                service, parser, words[: len(Reason)], words[_TIMES : _TIMES + len(BOUNDS) + 1], words[_NANOSECONDS]
            )

    def _names_words(self, place: int) -> memoryview:
        start = HEADER_WORDS + place * _NAME_WORDS
        return self._words[start : start + _NAME_WORDS]

    def _names(self) -> Iterator[tuple[int, tuple[str, str]]]:
        """Every place that is taken, and by whom."""
        for place in range(MAX_SERIES):
            words = self._names_words(place)
            if words[0] != _FREE:
                service, _, parser = words[1:].tobytes().rstrip(b"\0").decode().partition("\t")
                yield place, (service, parser)

    def _give_place(self, place: int, service: str, parser: str) -> None:
        text = f"{service}\t{parser}".encode().ljust((_NAME_WORDS - 1) * 8, b"\0")
        words = self._names_words(place)
        words[1:] = memoryview(text).cast("Q")
        words[0] = _IN_USE

    def _take_place(self, place: int) -> None:
        self._names_words(place)[0] = _FREE
        start = _FIRST_BLOCK + place * _BLOCK_WORDS
        for worker in range(self.workers):
            self.slot(worker)[start : start + _BLOCK_WORDS] = memoryview(bytes(_BLOCK_WORDS * 8)).cast("Q")


class Meter:
    """A worker's side of the series: what it decided, and how long that took."""

    def __init__(self, counters: Counters, worker: int) -> None:
        self._counters = counters
        self._words = counters.slot(worker)
        self.refresh()

    def refresh(self) -> None:
        """Take up the names that are in force."""
        self._blocks = self._counters.blocks()
        self._other = self._blocks[OTHER, ""]

    def count(self, service: str, parser: str, reason: Reason, nanoseconds: int) -> None:
        """One decision."""
        words = self._words
        block = self._blocks.get((service, parser), self._other)
        words[reason] += 1
        words[block + reason] += 1
        words[block + _TIMES + bisect_left(BOUNDS, nanoseconds)] += 1
        words[block + _NANOSECONDS] += nanoseconds


def log_switch(word: int) -> LogSwitch:
    """What LOG_WORD says."""
    return LogSwitch(word >> 32, word & 0xFFFFFFFF)
