"""A route netlink socket for work by the ten thousand.

pyroute2 knows the messages (`encode` is its coder) but sends and waits one at a time, 0.25 ms each. Here one encoded
message is a template: its copies differ in a few bytes, are filled in column by column, and go to the kernel in one
system call. The kernel carries them out in order and, since only the last asks for an acknowledgement, answers
failures only.

To import pyroute2 takes 130 ms and 20 MB, so it is imported by who has something to change; who looks, and that is most
starts, sends a `request`.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from steerd.errors import KernelError

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x200, 0x400, 0x800
NLMSG_ERROR, NLMSG_DONE = 2, 3
HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
ATTRIBUTE = struct.Struct("=HH")
"""struct nlattr: length (header included, padding not), type."""

BATCH = 256
"""Messages in one system call: enough to hide its cost, few enough that others get at the routing lock in between."""

_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 12
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER = 4 << 20
_RECEIVE = 1 << 18
_DUMP_ATTEMPTS = 5

_Object = tuple[bytes, int, int]


def encode(message: Any, kind: int, flags: int = 0) -> bytes:
    """A pyroute2 message as bytes, header included; sequence number and port are 0."""
    message["header"] = {"type": kind, "flags": NLM_F_REQUEST | flags, "sequence_number": 0, "pid": 0}
    message.encode()
    return bytes(message.data)


def request(kind: int, about: bytes) -> bytes:
    """A message that asks for something, header included: the struct of its kind, and attributes behind it."""
    return HEADER.pack(HEADER.size + len(about), kind, NLM_F_REQUEST, 0, 0) + about


def errno_text(number: int) -> str:
    """`No space left on device (ENOSPC)`."""
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"


def attributes(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The (type, payload) pairs between two offsets of a received buffer; nesting and byte order bits are cut off."""
    while at + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


class Rtnetlink:
    """One socket of NETLINK_ROUTE in the network namespace of the calling thread. Use it as a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        # Without it the kernel ignores the filters of a dump and sends all 65,536 host routes for the one we ask for.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        self._sequence = 0

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    def batch(self, template: bytes, columns: Mapping[int, Sequence[bytes]]) -> dict[int, int]:
        """Send copies of `template` in one system call, one for each row of `columns`.

        `columns` maps an offset in the message to the bytes that stand there in each copy: as many for every offset,
        all of one width. Returns {row: errno} of the rows that the kernel refused. Raises KernelError if the answers
        were lost.
        """
        return self._carry_out(template, len(next(iter(columns.values()))), columns)

    def request(self, message: bytes) -> int:
        """Send one message and return the kernel's errno, 0 for success."""
        return self._carry_out(message, 1, {}).get(0, 0)

    def _carry_out(self, template: bytes, count: int, columns: Mapping[int, Sequence[bytes]]) -> dict[int, int]:
        size = len(template)
        messages = bytearray(template * count)
        first = self._take_sequences(count)
        sequences = array.array("I", range(first, first + count)).tobytes()
        for offset, width, column in [
            (8, 4, sequences),
            *((offset, len(cells[0]), b"".join(cells)) for offset, cells in columns.items()),
        ]:
            for byte in range(width):
                messages[offset + byte :: size] = column[byte::width]
        messages[(count - 1) * size + 6] |= NLM_F_ACK
        self._socket.send(messages)
        refused = {}
        while True:
            data = self._receive()
            at = 0
            while at < len(data):
                length, kind, _, sequence, _ = HEADER.unpack_from(data, at)
                if kind == NLMSG_ERROR and 0 <= sequence - first < count:
                    (negative,) = struct.unpack_from("=i", data, at + 16)
                    if negative:
                        refused[sequence - first] = -negative
                    if sequence == first + count - 1:
                        return refused
                at += (length + 3) & ~3

    def answer(self, message: bytes) -> bytes | None:
        """Send one message that is answered with an object; the object, or None if the kernel has none."""
        sequence = self._take_sequences(1)
        request = bytearray(message)
        struct.pack_into("=I", request, 8, sequence)
        self._socket.send(request)
        while True:
            data = self._receive()
            _, kind, _, answered, _ = HEADER.unpack_from(data)
            if answered == sequence:
                return None if kind == NLMSG_ERROR else data[HEADER.size :]

    def dump(self, message: bytes) -> list[_Object]:
        """Ask for a dump: every object as (buffer, offset of the payload behind the header, end).

        A change during a dump may make the kernel leave an object out, or tell of it twice; it says so, and the dump
        is asked for again. Where others change things all the time that never ends, so after some attempts everything
        that any of them told of is returned: objects may come more than once. Raises KernelError if the kernel refuses.
        """
        told: list[_Object] = []
        for _ in range(_DUMP_ATTEMPTS):
            found, interrupted = self._dump_once(message)
            if not interrupted:
                return found
            told += found
        return told

    def _dump_once(self, message: bytes) -> tuple[list[_Object], bool]:
        sequence = self._take_sequences(1)
        request = bytearray(message)
        struct.pack_into("=HI", request, 6, NLM_F_REQUEST | NLM_F_DUMP, sequence)
        self._socket.send(request)
        found: list[_Object] = []
        interrupted = False
        while True:
            data = self._receive()
            at = 0
            while at < len(data):
                length, kind, flags, answered, _ = HEADER.unpack_from(data, at)
                if answered == sequence:
                    interrupted |= bool(flags & NLM_F_DUMP_INTR)
                    if kind == NLMSG_DONE:
                        return found, interrupted
                    if kind == NLMSG_ERROR:
                        (negative,) = struct.unpack_from("=i", data, at + 16)
                        raise KernelError(f"The kernel refused to list its state: {errno_text(-negative)}.")
                    found.append((data, at + 16, at + length))
                at += (length + 3) & ~3

    def _take_sequences(self, count: int) -> int:
        if self._sequence + count >= 1 << 32:
            self._sequence = 0
        first = self._sequence + 1
        self._sequence += count
        return first

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE)
        except OSError as error:
            raise KernelError(
                f"The kernel's answers to a batch of address changes were lost: {errno_text(error.errno or 0)}. "
                "The next reconcile finds out what was done and does the rest."
            ) from error
