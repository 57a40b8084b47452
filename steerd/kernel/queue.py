"""One NFQUEUE, bound by one worker: python-netfilterqueue, with what it leaves to its user.

Its `run` receives and calls back in a loop in C: one recv and one verdict for each packet, and no poll. The queue's
netlink socket gets a large buffer, and NETLINK_NO_ENOBUFS: a full socket then costs the packets that did not fit, and
not an error on top; the kernel counts them in /proc/net/netfilter/nfnetlink_queue.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from netfilterqueue import NetfilterQueue

from steerd.errors import KernelError

_SOL_NETLINK = 270
_NETLINK_NO_ENOBUFS = 5
_SO_RCVTIMEO = 20
_SO_RCVBUFFORCE = 33
_TIMEVAL = struct.Struct("@ll")


class QueuedPacket(Protocol):
    """What python-netfilterqueue hands to the callback."""

    def get_payload(self) -> bytes: ...
    def get_mark(self) -> int: ...
    def set_mark(self, mark: int) -> None: ...
    def set_payload(self, payload: bytes) -> None: ...
    def accept(self) -> None: ...
    def drop(self) -> None: ...


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
        # Its descriptor is the queue's own, by another number.
        self._netlink = socket.socket(fileno=os.dup(self._queue.get_fd()))
        self._netlink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        self._netlink.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)

    def wait_at_most(self, seconds: float) -> None:
        """From now on `run` returns when no packet has come for so long; 0: never. The callback may call it, too."""
        whole = int(seconds)
        self._netlink.setsockopt(
            socket.SOL_SOCKET, _SO_RCVTIMEO, _TIMEVAL.pack(whole, int((seconds - whole) * 1_000_000))
        )

    def run(self) -> None:
        """Hand every packet to the callback. The callback must not raise: its packet would get no verdict."""
        self._queue.run()


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
        text = Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text()
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise KernelError("only root may look at the queues (/proc/net/netfilter/nfnetlink_queue)") from None
    result = {}
    for line in text.splitlines():
        fields = [int(field) for field in line.split()]
        result[fields[0]] = QueueState(fields[0], fields[1], fields[2], fields[5], fields[6])
    return result
