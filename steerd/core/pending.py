"""First payloads of late-steered TCP connections, until they suffice for a decision. Pure: packets and `now` go in,
actions come out; the worker carries them out.

**For the worker.** Every TCP packet that was queued because its connection is not decided yet goes to `segment`. It
answers with a step, a tuple of actions. The last one says what becomes of this packet:

- `Decide`: this connection is decided. If `alone`, the packet itself is the first one: it may go on with the decision's
  mark, and its data follows as a copy. Otherwise the packet is dropped, and an ACK without payload made from the header
  of `first`, carrying the mark, stands for it; then `data` from `first.seq` on follows, and behind it a FIN if `fin`.
- `Hold`: drop it; a copy is kept, and the client need not hear of it.
- `Acknowledge`: drop it, and tell the client that its bytes up to `ack` are here (the client is waiting for that).
- `ForwardRaw`: drop it and send the same bytes through the raw socket. Its connection is decided already. If it
  `repeats` the first byte that was not acknowledged, and the kernel did not open that connection after all (it still
  held an old one), call `forget` and ask again.
- `Drop`: drop it. Only the reason is of interest, for a counter.
- `GiveUp`: drop it; this connection will not be decided. If `reset`, answer with a reset of your own, since what the
  client sent will not come again. Otherwise answer as `unmatched` says, by way of the kernel, which checks the cookie.

Before it there may be an `Evict`: something older was forgotten to make room; count it, and reset a `silent` client,
which will not repeat anything. `expire` gives a GiveUp for every connection whose time is over, or a `Silence` if its
client has said nothing; call it now and then, at least when `next_deadline` has passed. `now` is in seconds and never
goes back. `inspect(packet, data)` is asked with all bytes from the presumed beginning on, without a gap, and answers
NEED_MORE or the decision. It must keep the contract of `wire.parser`: once decided, more bytes change nothing.
`patience(packet)` is asked once for a connection that has to wait. `is_genuine(first)` is asked once for a connection
before anything of it is acknowledged, or its silence is waited for: whether the client did receive our answer to its
SYN, and this is its beginning. All of them, with `limits`, may be replaced at any time (a reload).

**Silent clients.** Where the server speaks first, patience says so, and the ACK that ends a client's handshake is held
like a first segment of no bytes. If nothing follows in time, `expire` gives a Silence: an ACK made from the header of
`first`, with the mark of the target for silent clients, opens the connection.

**Which bytes are the beginning?** Only the SYN cookie knows the client's initial sequence number, and only the kernel
can check the cookie. So the lowest sequence number seen with one ACK number (cookie + 1, hence the same in all segments
of a handshake, and not to be guessed by others: it is part of the key) is *presumed* to be the beginning:

- A wrong guess that is decided (a second segment that came first) costs nothing: its Decide carries a sequence number
  that the kernel's synproxy refuses. The segment that shows it, a lower one, is then judged afresh. The refused bytes
  are gone and come again with the client's next probe or timeout.
- A wrong guess that is held is corrected by the lower segment, and what is held keeps its place behind it.
- A wrong guess that is *acknowledged* would be fatal: the client would never repeat the bytes that were lost. So
  nothing is acknowledged before the presumed beginning was seen three times. Without an acknowledgement a client
  repeats the last segment of a flight once (a tail loss probe, RFC 8985 section 7) and then only its first
  unacknowledged one (RFC 6298 section 5.4); so the third sight is the beginning, unless the network doubled a packet
  as well. If even that was wrong, the connection ends in a reset, never in silence. The usual two-segment hello needs
  no acknowledgement; a client that says one byte at a time waits about half a second, once.
- What remains: Linux keeps an MSS index of 0 to 3 in the cookie's low bits (net/ipv4/syncookies.c), so that it also
  accepts a beginning up to 3 - index too low or up to index too high (seen on 6.18: with an MSS of 1460, 1 to 3 too
  high). If a client's first one to three bytes travel alone and are lost, and the next segment suffices by itself, then
  that segment is the beginning for the daemon as well. What was inspected is what is delivered, all the same.

**What is delivered is what was inspected.** Bytes that were held are never replaced. A segment that contradicts them
ends the connection (CONFLICT), so that nobody can show one hello to steerd and another to the daemon. A Decide holds
the inspected bytes and nothing else: what was held beyond a gap was never acknowledged, and the client repeats it.

**After a decision** the connection is remembered for a while. What was queued meanwhile is forwarded, never judged. A
client that still repeats its first unacknowledged byte after `settle_seconds` was refused by its daemon (a full
backlog) or by the kernel (a connection it has forgotten, a wrong guess): decided again, but at the sight number
`attempts` given up with a reset. What was given up is remembered as well, and dropped until `settle_seconds` are over.
Then it is judged afresh, unless something of it was acknowledged or may have been delivered: it is reset once more.
A sequence number before the presumed beginning is news in every case: the guess was wrong.

**Room** is bounded four ways (`Limits`). A new connection pushes out the oldest unacknowledged one of its source, or
of all, rather than being turned away: hellos come whole within milliseconds, floods stay. Nothing that was
acknowledged is ever pushed out; where nothing else is left, the new one is dropped, and the client tries again. So
nothing is acknowledged to a source that may be forged: forged ones could take all the room.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Literal, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from steerd.model import Answer
from steerd.wire.packet import ACK, FIN, RST, SYN, Packet

D = TypeVar("D")
"""What `inspect` decides. Nothing here looks into it."""

SIGHTS_OF_THE_BEGINNING = 3
"""The original, a tail loss probe, and a retransmission, which can only begin at the first unacknowledged byte."""

MAX_RANGES = 32
"""Runs of bytes with gaps between them. More would cost far more memory than the bytes themselves: every second byte
of a hello, sent one at a time."""

_SEQUENCE = 0xFFFFFFFF
_BEHIND = 0x80000000
"""RFC 9293 section 3.4: a difference of half the sequence space or more means "before"."""
_CONTROL = SYN | RST | ACK


class Limits(NamedTuple):
    """The bounds of one worker. It holds at most `connections` * (`connection_bytes` + one packet) bytes."""

    connection_bytes: int = 32768
    """Bytes of one connection, from its presumed beginning; not less than the `bound` of any parser in use."""
    source_connections: int = 64
    """Undecided connections of one source: an IPv4 address, or an IPv6 /64."""
    connections: int = 4096
    """Undecided connections of all sources together."""
    remembered: int = 65536
    """Connections that were decided or given up."""
    remember_seconds: float = 30.0
    """For how long, at least, unless there are more of them than `remembered`."""
    settle_seconds: float = 1.0
    """How long packets may have been under way to the worker while their connection was decided. TCP, too, repeats a
    SYN after one second (RFC 6298 section 2)."""
    attempts: int = 3
    """Sights of the same first packet, `settle_seconds` apart, of which the last draws a reset."""


class Patience(NamedTuple):
    """How long a connection may stay undecided."""

    seconds: float
    """From its first segment on."""
    for_silence: bool
    """A client that says nothing is of interest: it has a target of its own."""


class Why(enum.Enum):
    """Why something was dropped, evicted or given up. Closed: each has one counter."""

    BYTES = "bytes"
    """`connection_bytes` are held, and `inspect` needs more."""
    SOURCE = "source"
    """The source has `source_connections`. Evicted: its oldest. Dropped: all of them are acknowledged."""
    TOTAL = "total"
    """There are `connections`. Evicted: the oldest. Dropped: all of them are acknowledged."""
    TIME = "time"
    """Not decided within the service's patience."""
    CONFLICT = "conflict"
    """Two segments disagree about a byte, or about where the client's data ends."""
    ENDED = "ended"
    """The client's FIN directly follows bytes that do not suffice."""
    UNANSWERED = "unanswered"
    """Decided `attempts` - 1 times, and the client still repeats itself."""
    GIVEN_UP = "given-up"
    """Of a connection that was given up already. Given up again: its reset did not reach the client."""
    GAPS = "gaps"
    """One more gap than MAX_RANGES allows; the client repeats it."""
    OUTSIDE = "outside"
    """Before a beginning that is acknowledged, or beyond `connection_bytes`."""
    NOT_GENUINE = "not-genuine"
    """It would be acknowledged or waited for now, but its client never saw our answer to its SYN."""
    FIN_ALONE = "fin-alone"
    """A FIN, and nothing is known of its connection: the client closed without a word, or its data comes later."""
    NO_DATA = "no-data"
    """No payload and no FIN, or not a segment of a handshake that was completed (SYN, no ACK)."""
    CLIENT_RESET = "client-reset"
    """The client reset its connection, which is forgotten."""


class Decide(msgspec.Struct, Generic[D], frozen=True, gc=False):
    """The connection is decided; what the daemon gets is exactly what was inspected."""

    decision: D
    first: Packet
    """The segment at the beginning. Its header (seq, ack, TCP options) is the one to build from."""
    data: bytes
    """All inspected bytes, in order; the first one's sequence number is `first.seq`."""
    fin: bool
    """The client's FIN directly follows `data`."""
    alone: bool
    """The queued packet is `first`, and `data` is its payload (or a beginning of it)."""
    attempt: int = 1
    """2 and more: decided before, and the client repeats itself: the connection was not opened, or died at once."""


class Acknowledge(msgspec.Struct, frozen=True):
    """The bytes from `first.seq` up to, not including, `ack` are held; the client may be told so."""

    packet: Packet
    """The queued packet: addresses, ports, the sequence number to use (its `ack`) and the newest timestamps."""
    ack: int
    window: int
    """Bytes from `ack` on that will still be taken."""


class Hold(msgspec.Struct, frozen=True):
    """The packet's bytes are held."""


class ForwardRaw(msgspec.Struct, frozen=True):
    """The packet belongs to a decided connection."""

    repeats: bool
    """Its client has not heard of the beginning yet."""


class Drop(msgspec.Struct, frozen=True):
    """The packet is of no use."""

    why: Why


class Evict(msgspec.Struct, frozen=True):
    """An undecided connection was forgotten to make room. Nothing of it was acknowledged: the client repeats it."""

    why: Why
    silent: Packet | None = None
    """The ACK of a client that has said nothing, hence has nothing to repeat."""


class GiveUp(msgspec.Struct, frozen=True):
    """The connection will not be decided."""

    why: Why
    first: Packet
    """The segment at the presumed beginning (UNANSWERED, GIVEN_UP: the one that was queued)."""
    reset: bool
    """Bytes were acknowledged, or the kernel refuses the cookie: only a reset of the worker's own ends it."""


class Silence(msgspec.Struct, frozen=True):
    """The client completed its handshake and said nothing in time."""

    first: Packet
    """The ACK that ended the handshake."""


Action = Decide[D] | Acknowledge | Hold | ForwardRaw | Drop | Evict | GiveUp
Step = tuple[Action[D], ...]
Inspect = Callable[[Packet, bytes], D | Literal[Answer.NEED_MORE]]

_HOLD = (Hold(),)
_FORWARD = (ForwardRaw(repeats=False),)
_FORWARD_REPEATED = (ForwardRaw(repeats=True),)
_DROP = {why: (Drop(why),) for why in Why}

_Key = tuple[bytes, int, bytes, int, int]


class _Known(msgspec.Struct, frozen=True, gc=False):
    """A connection that was decided or given up."""

    at: float
    start: int
    unacknowledged: int
    """Sequence number of the first byte that the client was not told of; `start` if it was told of none."""
    attempts: int
    given_up: bool


class _Undecided:
    """One connection whose bytes do not suffice yet. Offsets count from the presumed beginning, `first.seq`."""

    __slots__ = ("acknowledged", "attempts", "buffer", "end", "first", "ranges", "seconds", "sights")

    def __init__(self, first: Packet, seconds: float, attempts: int) -> None:
        self.first = first
        self.seconds = seconds
        self.attempts = attempts
        self.sights = 0
        self.acknowledged = 0
        self.end: int | None = None
        """Where the client's FIN is."""
        self.buffer = bytearray()
        self.ranges: list[tuple[int, int]] = []
        """Which parts of the buffer are held, in ascending order, neither overlapping nor touching."""

    @property
    def contiguous(self) -> int:
        """How many bytes are held from the beginning on, up to the first gap."""
        return self.ranges[0][1] if self.ranges and self.ranges[0][0] == 0 else 0

    def begin_at(self, packet: Packet, limit: int) -> None:
        """Take a lower segment for the beginning. What is held moves up; what moves beyond the limit is forgotten, and
        so are decisions for the wrong beginning, which the kernel refused."""
        shift = (self.first.seq - packet.seq) & _SEQUENCE
        self.first = packet
        self.sights = 0
        self.attempts = 1
        self.ranges = [(low + shift, min(high + shift, limit)) for low, high in self.ranges if low + shift < limit]
        self.buffer = bytearray(shift) + self.buffer if self.ranges else bytearray()
        if self.end is not None:
            self.end = self.end + shift if self.end + shift <= limit else None

    def contradicts(self, offset: int, payload: bytes, fin: bool) -> bool:
        """Whether a segment disagrees with what is held: about a byte, or about where the data ends."""
        end = offset + len(payload)
        if self.end is not None and (end > self.end or (fin and end != self.end)):
            return True
        if fin and self.ranges and self.ranges[-1][1] > end:
            return True
        for low, high in self.ranges:
            low, high = max(low, offset), min(high, end)
            if low < high and self.buffer[low:high] != payload[low - offset : high - offset]:
                return True
        return False

    def put(self, offset: int, payload: bytes) -> bool:
        """Hold a segment that contradicts nothing. Beyond MAX_RANGES the last run goes; False if that is this one."""
        end = offset + len(payload)
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.ranges, (offset, end)]):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        del merged[MAX_RANGES:]
        self.ranges = merged
        last = merged[-1][1]
        if offset >= last:
            return False
        if len(self.buffer) < end:
            self.buffer.extend(bytes(end - len(self.buffer)))
        self.buffer[offset:end] = payload
        del self.buffer[last:]
        return True


class Pending(Generic[D]):
    """All undecided connections of one worker. See the top of the file for how it is used."""

    def __init__(
        self,
        limits: Limits,
        inspect: Inspect[D],
        patience: Callable[[Packet], Patience],
        is_genuine: Callable[[Packet], bool],
    ) -> None:
        self.limits = limits
        self.inspect = inspect
        self.patience = patience
        self.is_genuine = is_genuine
        self._undecided: dict[_Key, _Undecided] = {}
        # Deadlines, in ascending order: a queue for each length of patience that is in use. OrderedDict, because the
        # oldest entry of a dict from which the oldest was often removed is found only by walking over the holes.
        self._deadlines: dict[float, OrderedDict[_Key, float]] = {}
        self._evictable: OrderedDict[_Key, None] = OrderedDict()
        self._sources: dict[bytes, OrderedDict[_Key, None]] = {}
        # Two generations, of which the older one is thrown away whole: remembering costs one entry and no clean-up. An
        # entry that is made when the younger one is due passes into the older one at once, and has all its time there.
        self._known: dict[_Key, _Known] = {}
        self._known_since = 0.0
        self._older: dict[_Key, _Known] = {}

    def __len__(self) -> int:
        """How many connections are undecided."""
        return len(self._undecided)

    @property
    def held_bytes(self) -> int:
        """The size of all buffers, gaps included. Walks over all connections: for metrics and tests."""
        return sum(len(connection.buffer) for connection in self._undecided.values())

    @property
    def remembered(self) -> int:
        """How many decided or given up connections are remembered."""
        return len(self._known) + len(self._older)

    def segment(self, packet: Packet, now: float, *, cut: bool = False) -> Step[D]:
        """What is to be done about one queued TCP packet.

        `cut`: the copy ends before the packet does. Then a FIN is not where the copy ends; it is left to be repeated.
        """
        key = _key(packet)
        connection = self._undecided.get(key)
        if connection is not None:
            return self._next(key, connection, packet, now, cut)
        known = self._known.get(key) or self._older.get(key)
        if known is not None:
            return self._again(key, known, packet, now, cut)
        return self._first(key, packet, now, cut, 1)

    def forget(self, packet: Packet) -> None:
        """Forget what is held or was decided of this packet's connection: the next `segment` judges it afresh."""
        key = _key(packet)
        connection = self._undecided.get(key)
        if connection is not None:
            self._forget(key, connection)
        self._known.pop(key, None)
        self._older.pop(key, None)

    def expire(self, now: float) -> list[GiveUp | Silence]:
        """Forget what is too old; one action for each connection that was not decided in time."""
        overdue: list[GiveUp | Silence] = []
        for deadlines in list(self._deadlines.values()):
            while deadlines:
                key, deadline = next(iter(deadlines.items()))
                if deadline > now:
                    break
                connection = self._undecided[key]
                if connection.ranges:
                    overdue.append(self._give_up(key, connection, Why.TIME, now))
                else:
                    self._forget(key, connection)
                    self._remember(key, _known(connection, now, given_up=False), now)
                    overdue.append(Silence(connection.first))
        age = now - self._known_since
        if age >= self.limits.remember_seconds:
            if age >= 2 * self.limits.remember_seconds:
                self._known = {}
            self._turn_over(now)
        return overdue

    def next_deadline(self) -> float | None:
        """When `expire` has something to give up; None if nothing waits. Mere forgetting is worth no wake-up."""
        return min((next(iter(queue.values())) for queue in self._deadlines.values()), default=None)

    # ---- a packet of a connection that is unknown, undecided, or known ----

    def _first(self, key: _Key, packet: Packet, now: float, cut: bool, attempts: int) -> Step[D]:
        payload = packet.payload
        flags = packet.flags
        if flags & _CONTROL != ACK:
            return _DROP[Why.CLIENT_RESET if flags & RST else Why.NO_DATA]
        if not payload:
            if flags & FIN:
                return _DROP[Why.FIN_ALONE]
            patience = self.patience(packet)
            if not patience.for_silence:
                return _DROP[Why.NO_DATA]
            # It repeats nothing: among forged ones it would be pushed out, and never be heard of again.
            if not self.is_genuine(packet):
                return _DROP[Why.NOT_GENUINE]
            return self._wait(key, packet, b"", patience, now, attempts)
        limit = self.limits.connection_bytes
        data = payload if len(payload) <= limit else payload[:limit]
        fin = bool(flags & FIN) and not cut and data is payload
        decision = self.inspect(packet, data)
        if decision is not Answer.NEED_MORE:
            self._remember(key, _Known(now, packet.seq, packet.seq, attempts, False), now)
            return (Decide(decision, packet, data, fin, True, attempts),)
        if fin or len(data) >= limit:
            self._remember(key, _Known(now, packet.seq, packet.seq, attempts, True), now)
            return (GiveUp(Why.ENDED if fin else Why.BYTES, packet, False),)
        return self._wait(key, packet, data, self.patience(packet), now, attempts)

    def _wait(self, key: _Key, packet: Packet, data: bytes, patience: Patience, now: float, attempts: int) -> Step[D]:
        room = self._make_room(packet.source)
        if isinstance(room, Drop):
            return (room,)
        connection = _Undecided(packet, patience.seconds, attempts)
        if data:
            connection.sights = 1
            connection.put(0, data)
        self._undecided[key] = connection
        self._deadlines.setdefault(patience.seconds, OrderedDict())[key] = now + patience.seconds
        self._evictable[key] = None
        self._sources.setdefault(packet.source, OrderedDict())[key] = None
        return (room, *_HOLD) if room else _HOLD

    def _next(self, key: _Key, connection: _Undecided, packet: Packet, now: float, cut: bool) -> Step[D]:
        payload = packet.payload
        flags = packet.flags
        limit = self.limits.connection_bytes
        offset = (packet.seq - connection.first.seq) & _SEQUENCE
        if flags & RST:
            # A reset far from what was sent is nobody's: RFC 5961 section 3.2.
            if offset > limit:
                return _DROP[Why.OUTSIDE]
            self._forget(key, connection)
            return _DROP[Why.CLIENT_RESET]
        fin = bool(flags & FIN) and not cut
        if flags & _CONTROL != ACK or not (payload or fin):
            return _DROP[Why.NO_DATA]
        if payload and not connection.ranges and offset == 0:
            # The first word of a client that was silent so far.
            self._forget(key, connection)
            return self._first(key, packet, now, cut, connection.attempts)
        if offset >= _BEHIND:
            if connection.acknowledged or not payload:
                return _DROP[Why.OUTSIDE]
            connection.begin_at(packet, limit)
            offset = 0
        if offset >= limit:
            return _DROP[Why.OUTSIDE]
        if len(payload) > limit - offset:
            payload = payload[: limit - offset]
            fin = False
        if connection.contradicts(offset, payload, fin):
            return (self._give_up(key, connection, Why.CONFLICT, now),)

        before = connection.contiguous
        if payload:
            if not connection.put(offset, payload):
                return _DROP[Why.GAPS]
            if offset == 0:
                connection.sights += 1
        if fin:
            connection.end = offset + len(payload)
        after = connection.contiguous
        if after != before:
            data = bytes(connection.buffer[:after])
            decision = self.inspect(connection.first, data)
            if decision is not Answer.NEED_MORE:
                self._forget(key, connection)
                self._remember(key, _known(connection, now, given_up=False), now)
                return (Decide(decision, connection.first, data, connection.end == after, False, connection.attempts),)
        if connection.end == after:
            return (self._give_up(key, connection, Why.ENDED, now),)
        if after >= limit:
            return (self._give_up(key, connection, Why.BYTES, now),)
        if connection.sights < SIGHTS_OF_THE_BEGINNING:
            return _HOLD
        if not connection.acknowledged and not self.is_genuine(connection.first):
            self._forget(key, connection)
            return _DROP[Why.NOT_GENUINE]
        connection.acknowledged = after
        self._evictable.pop(key, None)
        return (Acknowledge(packet, (connection.first.seq + after) & _SEQUENCE, limit - after),)

    def _again(self, key: _Key, known: _Known, packet: Packet, now: float, cut: bool) -> Step[D]:
        limits = self.limits
        payload = packet.payload
        settled = now - known.at >= limits.settle_seconds
        told = known.unacknowledged != known.start
        if payload and (packet.seq - known.start) & _SEQUENCE >= _BEHIND:
            if told:
                return _DROP[Why.OUTSIDE]
            return self._first(key, packet, now, cut, 1)
        if known.given_up:
            if not settled:
                return _DROP[Why.GIVEN_UP]
            delivered = known.attempts >= limits.attempts
            if not (told or delivered):
                return self._first(key, packet, now, cut, 1)
            # Its reset was lost. Judged afresh, it would begin with the wrong byte, or be carried out once more.
            self._remember(key, replace(known, at=now), now)
            return (GiveUp(Why.GIVEN_UP if told else Why.UNANSWERED, packet, True),)
        if (known.unacknowledged - packet.seq) & _SEQUENCE >= len(payload):
            return _FORWARD
        if not settled:
            return _FORWARD_REPEATED
        attempts = known.attempts + 1
        if attempts >= limits.attempts:
            self._remember(key, replace(known, at=now, attempts=attempts, given_up=True), now)
            return (GiveUp(Why.UNANSWERED, packet, True),)
        if not told:
            return self._first(key, packet, now, cut, attempts)
        # What was acknowledged is no longer held and will not be repeated: there is nothing left to decide with.
        self._remember(key, replace(known, at=now, attempts=attempts), now)
        return _FORWARD_REPEATED

    # ---- room and memory ----

    def _make_room(self, source: bytes) -> Evict | Drop | None:
        """See to it that one more connection of this source has room: what had to go, or why it cannot be."""
        limits = self.limits
        own = self._sources.get(source, ())
        if len(own) >= limits.source_connections:
            oldest = next((key for key in own if key in self._evictable), None)
            why = Why.SOURCE
        elif len(self._undecided) >= limits.connections:
            oldest = next(iter(self._evictable), None)
            why = Why.TOTAL
        else:
            return None
        if oldest is None:
            return Drop(why)
        connection = self._undecided[oldest]
        self._forget(oldest, connection)
        return Evict(why, None if connection.ranges else connection.first)

    def _give_up(self, key: _Key, connection: _Undecided, why: Why, now: float) -> GiveUp:
        self._forget(key, connection)
        self._remember(key, _known(connection, now, given_up=True), now)
        return GiveUp(why, connection.first, connection.acknowledged > 0)

    def _forget(self, key: _Key, connection: _Undecided) -> None:
        del self._undecided[key]
        deadlines = self._deadlines[connection.seconds]
        del deadlines[key]
        if not deadlines:
            del self._deadlines[connection.seconds]
        self._evictable.pop(key, None)
        source = connection.first.source
        own = self._sources[source]
        del own[key]
        if not own:
            del self._sources[source]

    def _remember(self, key: _Key, known: _Known, now: float) -> None:
        self._known[key] = known
        if len(self._known) * 2 >= self.limits.remembered or now - self._known_since >= self.limits.remember_seconds:
            self._turn_over(now)

    def _turn_over(self, now: float) -> None:
        """The older generation is forgotten, the younger one becomes the older."""
        self._older, self._known, self._known_since = self._known, {}, now


def _key(packet: Packet) -> _Key:
    return packet.src, packet.sport, packet.dst, packet.dport, packet.ack


def _known(connection: _Undecided, now: float, *, given_up: bool) -> _Known:
    start = connection.first.seq
    unacknowledged = (start + connection.acknowledged) & _SEQUENCE
    return _Known(now, start, unacknowledged, connection.attempts, given_up)
