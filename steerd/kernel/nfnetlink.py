"""A netlink socket to Netfilter's subsystems, and the coding of their messages: what `nftables` and `conntrack` share.

Layout: include/uapi/linux/netlink.h and include/uapi/linux/netfilter/nfnetlink.h. The kernel answers inside the send
call, so whoever has sent a request finds the answer waiting.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from steerd.errors import KernelError

NETLINK_NETFILTER = 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
REQUEST, ACK, DUMP, CREATE = 0x1, 0x4, 0x300, 0x400
NESTED = 0x8000
GENERIC = struct.Struct("!BBH")
"""struct nfgenmsg: address family, version, resource id."""

# Only a lost answer (no memory for it) could make a reader wait for ever.
_ANSWER_SECONDS = 2.0
_HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
"""struct nlattr: length, header included and padding not, and type."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return ATTRIBUTE.pack(len(value) + ATTRIBUTE.size, kind) + value + b"\0" * (-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes that stand one behind the other in `data`, by kind."""
    found = {}
    offset = 0
    while offset + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        found[kind & ~NESTED] = data[offset + ATTRIBUTE.size : offset + length]
        offset += (max(length, ATTRIBUTE.size) + 3) & ~3
    return found


def listed(data: bytes) -> Iterator[bytes]:
    """The values of attributes that stand one behind the other in `data`, whatever their kind."""
    offset = 0
    while offset + ATTRIBUTE.size <= len(data):
        length, _ = ATTRIBUTE.unpack_from(data, offset)
        yield data[offset + ATTRIBUTE.size : offset + length]
        offset += (max(length, ATTRIBUTE.size) + 3) & ~3


def message(kind: int, flags: int, sequence: int, family: int, resource: int, body: bytes) -> bytes:
    """One message. `kind` is subsystem << 8 | request; `body` its attributes."""
    body = GENERIC.pack(family, 0, resource) + body
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


class Reply(NamedTuple):
    """One message of the kernel's: errno 0 for an acknowledgement or an object."""

    sequence: int
    kind: int
    error: int
    body: bytes


class Nfnetlink:
    """One socket. Not for several threads at once."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(_ANSWER_SECONDS)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def next_sequence(self) -> int:
        """A number for the next message, which the answers to it carry."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return self._sequence

    def send(self, messages: bytes) -> None:
        self._socket.send(messages)

    def receive(self, asked: str) -> list[Reply]:
        """The messages of the next datagram. Raises KernelError with `asked`, which says who did not do what."""
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            raise KernelError(f"{asked}: no answer in {_ANSWER_SECONDS:g} s") from None
        replies = []
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _flags, sequence, _port = _HEADER.unpack_from(data, offset)
            body = data[offset + _HEADER.size : offset + length]
            error = -struct.unpack_from("=i", body)[0] if kind == NLMSG_ERROR else 0
            replies.append(Reply(sequence, kind, error, body))
            offset += (length + 3) & ~3
        return replies

    def ask(self, kind: int, flags: int, family: int, body: bytes, asked: str) -> Reply:
        """Send one request, and return the answer to it: an object, an acknowledgement or an error."""
        sequence = self.next_sequence()
        self.send(message(kind, REQUEST | flags, sequence, family, 0, body))
        while True:
            for reply in self.receive(asked):
                if reply.sequence == sequence:
                    return reply

    def dump(self, kind: int, family: int, about: bytes, asked: str) -> Iterator[bytes]:
        """The attributes of every object that the kernel answers a request with, to be taken one after the other; none
        where there is nothing to list. Raises KernelError with `asked`, which says who did not do what."""
        sequence = self.next_sequence()
        self.send(message(kind, REQUEST | DUMP, sequence, family, 0, about))
        while True:
            for reply in self.receive(asked):
                if reply.sequence != sequence:
                    continue
                if reply.kind == NLMSG_ERROR and reply.error != errno.ENOENT:
                    raise KernelError(f"{asked}: {os.strerror(reply.error)}")
                if reply.kind in (NLMSG_DONE, NLMSG_ERROR):
                    return
                yield reply.body[GENERIC.size :]
