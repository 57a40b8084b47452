"""nf_tables over raw netlink: the few requests that are made too often, or too near a packet, for a `nft` process.

Layout of every message: include/uapi/linux/netfilter/nf_tables.h. A change is a batch: BATCH_BEGIN, requests, BATCH_END
in one datagram; the kernel carries out all of it or nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steerd.errors import KernelError
from steerd.kernel.nfnetlink import (
    ACK,
    ATTRIBUTE,
    CREATE,
    NESTED,
    NETLINK_NETFILTER,
    REQUEST,
    Nfnetlink,
    attribute,
    attributes,
    listed,
    message,
)

TABLE = "steerd"

_NFPROTO_UNSPEC, _NFPROTO_INET = 0, 1
_SUBSYS_NFTABLES = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_DELTABLE, _DELCHAIN, _NEWRULE, _GETRULE, _DELRULE, _NEWSETELEM, _GETSETELEM, _DELSETELEM, _GETOBJ = (
    *(2, 5, 6, 7, 8),
    *(12, 13, 14, 19),
)
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS = 1, 2, 3
_LIST_ELEMENT = 1
_ELEMENT_KEY, _ELEMENT_DATA = 1, 2
_DATA_VALUE = 1
_OBJECT_TABLE, _OBJECT_NAME, _OBJECT_TYPE, _OBJECT_DATA = 1, 2, 3, 4
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS = 1, 2, 3, 4
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_TARGET_NAME, _TARGET_REVISION, _TARGET_INFO = 1, 2, 3
_APPEND = 0x800
_COUNTER_TYPE = b"\0\0\0\1"
_COUNTER_PACKETS = 2

_NFNLGRP_NFTABLES = 7
_SO_ATTACH_FILTER = 26


class Element(NamedTuple):
    """One element of a set (data None) or map of the steerd table.

    Keys and data as the kernel compares them: every field padded to 4 bytes, addresses and ports in network order, a
    packet mark in the machine's own.
    """

    name: str
    key: bytes
    data: bytes | None


def _of_set(element: Element) -> bytes:
    """The attributes of a request about one element."""
    parts = attribute(_ELEMENT_KEY | NESTED, attribute(_DATA_VALUE, element.key))
    if element.data is not None:
        parts += attribute(_ELEMENT_DATA | NESTED, attribute(_DATA_VALUE, element.data))
    return _set_named(element.name) + attribute(_ELEMENTS | NESTED, attribute(_LIST_ELEMENT | NESTED, parts))


def _set_named(name: str) -> bytes:
    """The attributes of a request about a whole set."""
    return attribute(_ELEMENTS_TABLE, TABLE.encode() + b"\0") + attribute(_ELEMENTS_SET, name.encode() + b"\0")


def _element(name: str, told: bytes) -> Element:
    """One element as the kernel lists it."""
    parts = attributes(told)
    data = attributes(parts[_ELEMENT_DATA])[_DATA_VALUE] if _ELEMENT_DATA in parts else None
    return Element(name, attributes(parts[_ELEMENT_KEY])[_DATA_VALUE], data)


def _all_alike(name: str, told: bytes) -> list[Element]:
    """All elements of a listing, if they have a key and data of the same lengths, and nothing else, as 65,536 targets
    do: then no attribute need be looked at on its own. Otherwise []."""
    first = next((_element(name, each) for each in listed(told)), None)
    if first is None or first.data is None:
        return []
    key, data = len(first.key), len(first.data)
    if key % 4 or data % 4:  # there is padding between
        return []
    like_this = attribute(
        _LIST_ELEMENT,
        attribute(_ELEMENT_KEY, attribute(_DATA_VALUE, first.key))
        + attribute(_ELEMENT_DATA, attribute(_DATA_VALUE, first.data)),
    )
    at_key = 3 * ATTRIBUTE.size
    at_data = len(like_this) - data
    before, between = re.escape(like_this[:at_key]), re.escape(like_this[at_key + key : at_data])
    found = re.findall(b"%b(.{%d})%b(.{%d})" % (before, key, between, data), told, re.DOTALL)
    # As many as fit in are all that there are, one behind the other.
    return [Element(name, *each) for each in found] if len(found) * len(like_this) == len(told) else []


class Rule(NamedTuple):
    """One rule of a table: its chain, the handle that it keeps as long as it exists, and what it says, undecoded."""

    chain: str
    handle: int
    body: bytes


class Nftables:
    """One netlink socket to nf_tables. Not for several threads at once."""

    def __init__(self) -> None:
        self._netlink = Nfnetlink()

    def close(self) -> None:
        self._netlink.close()

    def insert(self, elements: Sequence[Element]) -> None:
        """Add elements in one transaction; one that is there with the same data already is fine.

        Raises KernelError where the kernel says no: the table or set is missing (ENOENT), or the key is there with
        other data (EEXIST, EBUSY), which would mean that a target id has got a second meaning.
        """
        self._change(_NEWSETELEM, CREATE, elements, "took no element for")

    def delete(self, elements: Sequence[Element]) -> None:
        """Take elements away in one transaction. Raises KernelError if one is not there, and then takes none."""
        self._change(_DELSETELEM, 0, elements, "did not delete from")

    def replace(self, names: Sequence[str], elements: Sequence[Element]) -> None:
        """Empty sets and add elements, in one transaction. Fine if there are no such sets. Raises KernelError."""
        asked = f"nf_tables did not empty {', '.join(names)} of table inet {TABLE}"
        emptied = [(_DELSETELEM, 0, _set_named(name)) for name in names]
        added = [(_NEWSETELEM, CREATE, _of_set(element)) for element in elements]
        error = self._carry_out([*emptied, *added], asked)
        if error not in (0, errno.ENOENT):
            raise KernelError(f"{asked}: {os.strerror(error)}")

    def queue(self, queues: Mapping[str, int]) -> None:
        """Fill chains: each hands all that comes to it to an NFQUEUE, and has no other rule. By xt_NFQUEUE, for kernels
        that have no `queue` statement; nft itself cannot write such a rule. Raises KernelError."""
        asked = "nf_tables took no rule with xt_NFQUEUE (CONFIG_NFT_COMPAT, CONFIG_NETFILTER_XT_TARGET_NFQUEUE)"
        requests = []
        for chain, number in queues.items():
            place = attribute(_RULE_TABLE, TABLE.encode() + b"\0") + attribute(_RULE_CHAIN, chain.encode() + b"\0")
            requests.append((_DELRULE, 0, place))
            requests.append((_NEWRULE, CREATE | _APPEND, place + _queueing(number)))
        error = self._carry_out(requests, asked)
        if error:
            raise KernelError(f"{asked}: {os.strerror(error)}")

    def _change(self, request: int, flags: int, elements: Sequence[Element], doing: str) -> None:
        names = ", ".join(sorted({element.name for element in elements}))
        asked = f"nf_tables {doing} {names} of table inet {TABLE}"
        error = self._carry_out([(request, flags, _of_set(element)) for element in elements], asked)
        if error:
            raise KernelError(f"{asked}: {os.strerror(error)}")

    def _carry_out(self, requests: Sequence[tuple[int, int, bytes]], asked: str) -> int:
        """Requests (kind, flags, attributes) in one transaction; 0, or the errno for which there was none."""
        netlink = self._netlink
        first = netlink.next_sequence()
        parts = [message(_BATCH_BEGIN, REQUEST, first, _NFPROTO_UNSPEC, _SUBSYS_NFTABLES, b"")]
        awaited = set()
        for request, flags, body in requests:
            sequence = netlink.next_sequence()
            awaited.add(sequence)
            kind = _SUBSYS_NFTABLES << 8 | request
            parts.append(message(kind, REQUEST | flags | ACK, sequence, _NFPROTO_INET, 0, body))
        parts.append(message(_BATCH_END, REQUEST, netlink.next_sequence(), _NFPROTO_UNSPEC, _SUBSYS_NFTABLES, b""))
        netlink.send(b"".join(parts))
        # What concerns the batch as a whole (no right to it, a failed commit) is answered to its first message.
        ours = awaited | {first}
        while awaited:
            for reply in netlink.receive(asked):
                # Of a batch that was refused only the first answer was read; the others are still to come.
                if reply.sequence not in ours:
                    continue
                awaited.discard(reply.sequence)
                if reply.error:
                    return reply.error
        return 0

    def contains(self, name: str, key: bytes) -> bool:
        """Whether a set holds a key, which is laid out as an Element's. Raises KernelError if there is no such set."""
        asked = f"nf_tables does not look into set {name} of table inet {TABLE}"
        kind = _SUBSYS_NFTABLES << 8 | _GETSETELEM
        reply = self._netlink.ask(kind, 0, _NFPROTO_INET, _of_set(Element(name, key, None)), asked)
        if reply.error not in (0, errno.ENOENT):
            raise KernelError(f"{asked}: {os.strerror(reply.error)}")
        return not reply.error

    def elements(self, name: str) -> list[Element]:
        """Every element of a set or map; [] if there is no such thing."""
        about = _set_named(name)
        found: list[Element] = []
        for fields, _ in self._dump(_GETSETELEM, _NFPROTO_INET, about, f"does not list {name}"):
            told = fields.get(_ELEMENTS, b"")
            found += _all_alike(name, told) or (_element(name, each) for each in listed(told))
        return found

    def listing(self, name: str) -> bytes:
        """The elements of a set as the kernel lists them, undecoded; b"" if there is no such thing."""
        about = _set_named(name)
        return b"".join(body for _, body in self._dump(_GETSETELEM, _NFPROTO_INET, about, f"does not list {name}"))

    def rules(self, family: int, table: str) -> list[Rule]:
        """All rules of a table, [] if there is no such table; family 1 is inet, 2 IPv4, 10 IPv6."""
        about = attribute(_RULE_TABLE, table.encode() + b"\0")
        return [
            Rule(fields[_RULE_CHAIN].rstrip(b"\0").decode(), int.from_bytes(fields[_RULE_HANDLE], "big"), body)
            for fields, body in self._dump(_GETRULE, family, about, "does not list the rules")
        ]

    def counters(self) -> dict[str, int]:
        """Packets counted by each named counter of the table; {} if the table is not there.

        `nft list counters` would read every element of every set on the way: seconds, with 70,000 targets.
        """
        about = attribute(_OBJECT_TABLE, TABLE.encode() + b"\0") + attribute(_OBJECT_TYPE, _COUNTER_TYPE)
        found = {}
        for fields, _ in self._dump(_GETOBJ, _NFPROTO_INET, about, "does not list the counters"):
            packets = attributes(fields[_OBJECT_DATA])[_COUNTER_PACKETS]
            found[fields[_OBJECT_NAME].rstrip(b"\0").decode()] = int.from_bytes(packets, "big")
        return found

    def _dump(self, request: int, family: int, about: bytes, doing: str) -> list[tuple[dict[int, bytes], bytes]]:
        """Every object that the kernel answers a request with: its attributes by kind, and all of them as they came."""
        asked = f"nf_tables {doing} of table inet {TABLE}"
        bodies = self._netlink.dump(_SUBSYS_NFTABLES << 8 | request, family, about, asked)
        return [(attributes(body), body) for body in bodies]


def _queueing(number: int) -> bytes:
    """The expressions of a rule that hands a packet to NFQUEUE `number`: struct xt_NFQ_info, padded to 8 bytes
    (include/uapi/linux/netfilter/xt_NFQUEUE.h)."""
    target = (
        attribute(_TARGET_NAME, b"NFQUEUE\0")
        + attribute(_TARGET_REVISION, bytes(4))
        + attribute(_TARGET_INFO, struct.pack("=H6x", number))
    )
    expression = attribute(_EXPRESSION_NAME, b"target\0") + attribute(_EXPRESSION_DATA | NESTED, target)
    return attribute(_RULE_EXPRESSIONS | NESTED, attribute(_LIST_ELEMENT | NESTED, expression))


class Watcher:
    """Tells when somebody deletes tables, chains or rules: a file descriptor for an event loop.

    A filter in the kernel lets only such notifications through, or the elements that workers add would wake us up.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
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
