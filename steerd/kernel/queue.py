"""One NFQUEUE, bound by one worker: python-netfilterqueue, with what it leaves to its user.

Its `run` receives and calls back in a loop in C, until no packet is left. Verdicts are not the library's, one system
call each, but of many packets in one (`give`): the kernel works off one netlink message behind the other. Deciding many
packets in a row and then giving all their verdicts is also what keeps Python's code in the CPU's caches; the kernel's
work on one verdict would push it out. The queue's netlink socket gets a large buffer, and NETLINK_NO_ENOBUFS: a full
socket then costs the packets that did not fit, and not an error on top; the kernel counts them in
/proc/net/netfilter/nfnetlink_queue.

**Datagrams that the kernel handles as one packet** (UDP segmentation offload of a sender on this machine, GRO) are
handed over one by one, whole and with their checksums, since NFQA_CFG_F_GSO is not asked for. With it they would come
as one, which does not say where it is to be cut, with a checksum that is not made yet, and cut off after the first few.
They share the conntrack entry that they are to make: the first of them confirms it; once the first was dropped, all but
the very last are dropped in any case (steerd.datagram says what follows from that). Linux 6.11 to 6.12.74, 6.13 to
6.18.13 and 6.19 to 6.19.3 drop all of them before they are queued (CVE-2026-45859).

Layout of a verdict: include/uapi/linux/netfilter/nfnetlink_queue.h.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from netfilterqueue import NetfilterQueue

from steerd.errors import KernelError
from steerd.kernel.nfnetlink import ACK, REQUEST, Nfnetlink, attribute, message

_SOL_NETLINK = 270
_NETLINK_NO_ENOBUFS = 5
_SO_RCVBUFFORCE = 33

_VERDICT = 3 << 8 | 1
"""NFNL_SUBSYS_QUEUE, NFQNL_MSG_VERDICT."""
_VERDICT_HEADER, _MARK, _PAYLOAD = 2, 3, 10
_CONFIG = 3 << 8 | 2
"""NFNL_SUBSYS_QUEUE, NFQNL_MSG_CONFIG."""
_COMMAND, _BIND, _PF_UNBIND = 1, 1, 4
RESERVED = 65535
"""The number of a queue that takes no packets (`Reservation`)."""
_STATES = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
_DROP, _ACCEPT = 0, 1
_TWO_NUMBERS = struct.Struct("!II").pack
_NUMBER = struct.Struct("!I").pack
_DROPPED = struct.Struct("!28sI").pack
_ACCEPTED = struct.Struct("!28sI4sI").pack


class Verdict(NamedTuple):
    """What becomes of a queued packet."""

    id: int | None
    """For the mark; None: it is dropped."""
    payload: bytes | None = None
    """What goes on in its place."""


DROP = Verdict(None)


class QueuedPacket(Protocol):
    """What python-netfilterqueue hands to the callback. The payload is there until the callback returns."""

    @property
    def id(self) -> int: ...
    @property
    def mark(self) -> int: ...
    def get_payload(self) -> bytes: ...


class Ruling(NamedTuple):
    """What becomes of a packet: the verdict on it."""

    id: int
    """`QueuedPacket.id`."""
    mark: int | None
    """The packet goes on with this mark; None: it is dropped."""
    payload: bytes | None = None
    """What goes on in its place, from the IP header on."""


class Queue:
    """Bound on construction; raises KernelError if another process owns the queue or the kernel refuses."""

    def __init__(
        self, number: int, on_packet: Callable[[QueuedPacket], None], *, length: int, receive_buffer: int
    ) -> None:
        self._queue = NetfilterQueue()
        try:
            self._queue.bind(number, on_packet, max_len=length)
        except OSError as error:
            raise KernelError(f"NFQUEUE {number} cannot be bound: {error} (does another process own it?)") from error
        accepting = message(_VERDICT, REQUEST, 0, 0, number, _header(_ACCEPT) + attribute(_MARK, bytes(4)))
        # A message up to the packet's id, and between that and the mark: the same for all packets.
        self._accept, self._mark = accepting[:28], accepting[32:36]
        self._drop = message(_VERDICT, REQUEST, 0, 0, number, _header(_DROP))[:28]
        self._number = number
        self._patience: float | None = None
        self._arrivals = select.poll()
        self._arrivals.register(self._queue.get_fd(), select.POLLIN)
        # Its descriptor is the queue's own, by another number.
        self._netlink = socket.socket(fileno=os.dup(self._queue.get_fd()))
        self._netlink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        self._netlink.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)

    def wait_at_most(self, seconds: float) -> None:
        """From now on `run` returns when no packet has come for so long; 0: never. The callback may call it, too."""
        self._patience = seconds * 1000 or None

    def run(self) -> None:
        """Wait for a packet, and hand every one that is there to the callback, which must not raise; it returns when
        there are no more, which under load is never. Each needs a ruling (`give`), in the order in which they came: the
        kernel looks for a packet from the oldest on."""
        self._arrivals.poll(self._patience)
        self._queue.run(block=False)

    def give(self, rulings: Iterable[Ruling]) -> None:
        """The verdicts on these packets, which the kernel carries out in this order before this returns."""
        self._netlink.send(b"".join([self._verdict(ruling) for ruling in rulings]))

    def _verdict(self, ruling: Ruling) -> bytes:
        id_, mark, payload = ruling
        if mark is None:
            return _DROPPED(self._drop, id_)
        if payload is None:
            return _ACCEPTED(self._accept, id_, self._mark, mark)
        attributes = _header(_ACCEPT, id_) + attribute(_MARK, _NUMBER(mark)) + attribute(_PAYLOAD, payload)
        return message(_VERDICT, REQUEST, 0, 0, self._number, attributes)


def _header(verdict: int, id_: int = 0) -> bytes:
    return attribute(_VERDICT_HEADER, _TWO_NUMBERS(verdict, id_))


class Reservation:
    """What only one process of a network namespace can have, until it ends: a queue, to which no rule leads. Unlike a
    name that anybody may take (an abstract socket's), it needs CAP_NET_ADMIN. Raises KernelError."""

    def __init__(self) -> None:
        self._netlink = Nfnetlink()
        asked = f"NFQUEUE {RESERVED} cannot be reserved"
        bind = attribute(_COMMAND, struct.pack("!BxH", _BIND, 0))
        try:
            self._netlink.send(message(_CONFIG, REQUEST | ACK, 0, 0, RESERVED, bind))
            (answer,) = self._netlink.receive(asked)
            if answer.error:
                raise KernelError(f"{asked}: {os.strerror(answer.error)}")
        except BaseException:
            self._netlink.close()
            raise

    def close(self) -> None:
        self._netlink.close()


class QueueState(NamedTuple):
    """One line of /proc/net/netfilter/nfnetlink_queue (net/netfilter/nfnetlink_queue.c, seq_show)."""

    number: int
    owner: int
    """Netlink port id of who bound it; usually its process id."""
    waiting: int
    """Packets handed over that have no verdict yet."""
    queue_dropped: int
    """Packets dropped because so many waited already."""
    user_dropped: int
    """Packets dropped because the netlink socket was full."""


def states() -> dict[int, QueueState]:
    """Every bound queue of this network namespace, by number; raises KernelError for who may not look."""
    try:
        text = _STATES.read_text()
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise KernelError(
            "only root, and the group that was let (steerd prepare), may look at the queues"
            " (/proc/net/netfilter/nfnetlink_queue)"
        ) from None
    result = {}
    for line in text.splitlines():
        fields = [int(field) for field in line.split()]
        result[fields[0]] = QueueState(fields[0], fields[1], fields[2], fields[5], fields[6])
    return result


def states_from(first: int, count: int) -> list[QueueState | None]:
    """Of `count` queues from `first` on; None: it is not bound. Raises KernelError as `states` does."""
    found = states()
    return [found.get(number) for number in range(first, first + count)]


def let_group_look(gid: int) -> None:
    """As root: let a group read what `states` reads, in this network namespace until it ends (or the kernel's module is
    removed). Capabilities do not open that file, only its owner and group do (mode 0440)."""
    # A command that does nothing any more, to the module that has to be there for the file to be.
    nothing = attribute(_COMMAND, struct.pack("!BxH", _PF_UNBIND, 0))
    with contextlib.closing(Nfnetlink()) as netlink:
        netlink.ask(_CONFIG, ACK, 0, nothing, "asking for nfnetlink_queue")
    try:
        os.chown(_STATES, -1, gid)
    except OSError as error:
        raise KernelError(f"{_STATES} cannot be given to group {gid}: {error.strerror}") from error
