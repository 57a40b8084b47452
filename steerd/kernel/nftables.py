"""nf_tables over raw netlink: the few requests that are made too often, or too near a packet, for a `nft` process.

Layout of every message: include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h. A change is a batch: BATCH_BEGIN,
requests, BATCH_END in one datagram; the kernel carries out all of it or nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

from steerd.errors import KernelError

TABLE = "steerd"

_NETLINK_NETFILTER = 12
_NFPROTO_UNSPEC, _NFPROTO_INET = 0, 1
_SUBSYS_NFTABLES = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_DELTABLE, _DELCHAIN, _GETRULE, _DELRULE, _NEWSETELEM, _GETOBJ = 2, 5, 7, 8, 12, 19
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP, _CREATE = 0x1, 0x4, 0x300, 0x400
_NESTED = 0x8000
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS = 1, 2, 3
_LIST_ELEMENT = 1
_ELEMENT_KEY, _ELEMENT_DATA = 1, 2
_DATA_VALUE = 1
_OBJECT_TABLE, _OBJECT_NAME, _OBJECT_TYPE, _OBJECT_DATA = 1, 2, 3, 4
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE = 1, 2, 3
_COUNTER_TYPE = b"\0\0\0\1"
_COUNTER_PACKETS = 2

# The kernel answers inside the send call; only a lost answer (no memory for it) could make a reader wait for ever.
_ANSWER_SECONDS = 2.0
_NFNLGRP_NFTABLES = 7
_SO_ATTACH_FILTER = 26

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("!BBH")
_ATTRIBUTE = struct.Struct("=HH")


class Element(NamedTuple):
    """One element of a set (data None) or map of the steerd table.

    Keys and data as the kernel compares them: every field padded to 4 bytes, addresses and ports in network order, a
    packet mark in the machine's own.
    """

    name: str
    key: bytes
    data: bytes | None


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(len(value) + _ATTRIBUTE.size, kind) + value + b"\0" * (-len(value) % 4)


def _message(kind: int, flags: int, sequence: int, family: int, resource: int, attributes: bytes) -> bytes:
    body = _GENERIC.pack(family, 0, resource) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def _element(element: Element) -> bytes:
    parts = _attribute(_ELEMENT_KEY | _NESTED, _attribute(_DATA_VALUE, element.key))
    if element.data is not None:
        parts += _attribute(_ELEMENT_DATA | _NESTED, _attribute(_DATA_VALUE, element.data))
    return _attribute(
        _ELEMENTS | _NESTED,
        _attribute(_LIST_ELEMENT | _NESTED, parts),
    )


def _attributes(data: bytes) -> dict[int, bytes]:
    """The attributes that stand one behind the other in `data`, by kind."""
    found = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        found[kind & ~_NESTED] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (max(length, _ATTRIBUTE.size) + 3) & ~3
    return found


class Rule(NamedTuple):
    """One rule of a table: its chain, the handle that it keeps as long as it exists, and what it says, undecoded."""

    chain: str
    handle: int
    body: bytes


class _Answer(NamedTuple):
    """One message of the kernel's: errno 0 for an acknowledgement or an object."""

    sequence: int
    kind: int
    error: int
    body: bytes


class Nftables:
    """One netlink socket to nf_tables. Not for several threads at once."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(_ANSWER_SECONDS)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def _next(self) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return self._sequence

    def insert(self, elements: Sequence[Element]) -> None:
        """Add elements in one transaction; one that is there with the same data already is fine.

        Raises KernelError where the kernel says no: the table or set is missing (ENOENT), or the key is there with
        other data (EEXIST, EBUSY), which would mean that a target id has got a second meaning.
        """
        parts = [_message(_BATCH_BEGIN, _REQUEST, self._next(), _NFPROTO_UNSPEC, _SUBSYS_NFTABLES, b"")]
        first = self._sequence + 1
        for element in elements:
            attributes = _attribute(_ELEMENTS_TABLE, TABLE.encode() + b"\0")
            attributes += _attribute(_ELEMENTS_SET, element.name.encode() + b"\0")
            attributes += _element(element)
            kind = _SUBSYS_NFTABLES << 8 | _NEWSETELEM
            parts.append(_message(kind, _REQUEST | _CREATE | _ACK, self._next(), _NFPROTO_INET, 0, attributes))
        parts.append(_message(_BATCH_END, _REQUEST, self._next(), _NFPROTO_UNSPEC, _SUBSYS_NFTABLES, b""))
        self._socket.send(b"".join(parts))
        awaited = set(range(first, first + len(elements)))
        # What concerns the batch as a whole (no right to it, a failed commit) is answered to its first message.
        ours = awaited | {first - 1}
        names = ", ".join(sorted({element.name for element in elements}))
        while awaited:
            for answer in self._answers(f"took no element for {names}"):
                # Of a batch that was refused only the first answer was read; the others are still to come.
                if answer.sequence not in ours:
                    continue
                awaited.discard(answer.sequence)
                if answer.error:
                    why = os.strerror(answer.error)
                    raise KernelError(f"nf_tables took no element for {names} of table inet {TABLE}: {why}")

    def rules(self, family: int, table: str) -> list[Rule]:
        """All rules of a table, [] if there is no such table; family 1 is inet, 2 IPv4, 10 IPv6."""
        attributes = _attribute(_RULE_TABLE, table.encode() + b"\0")
        return [
            Rule(fields[_RULE_CHAIN].rstrip(b"\0").decode(), int.from_bytes(fields[_RULE_HANDLE], "big"), body)
            for fields, body in self._dump(_GETRULE, family, attributes, "does not list the rules")
        ]

    def counters(self) -> dict[str, int]:
        """Packets counted by each named counter of the table; {} if the table is not there.

        `nft list counters` would read every element of every set on the way: seconds, with 70,000 targets.
        """
        attributes = _attribute(_OBJECT_TABLE, TABLE.encode() + b"\0") + _attribute(_OBJECT_TYPE, _COUNTER_TYPE)
        found = {}
        for fields, _ in self._dump(_GETOBJ, _NFPROTO_INET, attributes, "does not list the counters"):
            packets = _attributes(fields[_OBJECT_DATA])[_COUNTER_PACKETS]
            found[fields[_OBJECT_NAME].rstrip(b"\0").decode()] = int.from_bytes(packets, "big")
        return found

    def _dump(self, request: int, family: int, attributes: bytes, doing: str) -> list[tuple[dict[int, bytes], bytes]]:
        """Every object that the kernel answers a request with: its attributes by kind, and all of them as they came."""
        sequence = self._next()
        kind = _SUBSYS_NFTABLES << 8 | request
        self._socket.send(_message(kind, _REQUEST | _DUMP, sequence, family, 0, attributes))
        found: list[tuple[dict[int, bytes], bytes]] = []
        while True:
            for answer in self._answers(doing):
                if answer.sequence != sequence:
                    continue
                if answer.kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    return found
                body = answer.body[_GENERIC.size :]
                found.append((_attributes(body), body))

    def _answers(self, doing: str) -> list[_Answer]:
        """The messages of the next datagram; `doing` is for the error if none comes."""
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            raise KernelError(f"nf_tables {doing} of table inet {TABLE}: no answer in {_ANSWER_SECONDS:g} s") from None
        answers = []
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _flags, sequence, _port = _HEADER.unpack_from(data, offset)
            body = data[offset + _HEADER.size : offset + length]
            error = -struct.unpack_from("=i", body)[0] if kind == _NLMSG_ERROR else 0
            answers.append(_Answer(sequence, kind, error, body))
            offset += (length + 3) & ~3
        return answers


class Watcher:
    """Tells when somebody deletes tables, chains or rules: a file descriptor for an event loop.

    A filter in the kernel lets only such notifications through, or the elements that workers add would wake us up.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        program = _deletions_only()
        code = ctypes.create_string_buffer(program, len(program))
        attached = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> None:
        """Take what has arrived; what it was does not matter, only that the table must be looked at."""
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # notifications were lost: then there were some
                    raise

    def close(self) -> None:
        self._socket.close()


def _deletions_only() -> bytes:
    """A classic BPF program: pass a notification whose first message deletes a table, chain or rule, else drop it."""
    kinds = [_SUBSYS_NFTABLES << 8 | kind for kind in (_DELTABLE, _DELCHAIN, _DELRULE)]
    load_type = (0x28, 0, 0, 4)  # BPF_LD | BPF_H | BPF_ABS: nlmsg_type, which BPF reads in network order
    tests = [
        (0x15, len(kinds) - number, 0, int.from_bytes(kind.to_bytes(2, sys.byteorder), "big"))  # BPF_JMP | BPF_JEQ
        for number, kind in enumerate(kinds)
    ]
    drop, take = (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)  # BPF_RET
    return b"".join(struct.pack("=HBBI", *step) for step in (load_type, *tests, drop, take))
