"""What listens on this machine, asked of the kernel itself (NETLINK_SOCK_DIAG, linux/inet_diag.h).

`/proc/net/tcp` would be read line by line; here the kernel filters (a little program, INET_DIAG_REQ_BYTECODE), so
that asking for wildcard listeners among 70,000 others hands over only those asked for. `which_listen` asks about one
address and port after the other: the kernel looks each up as for a packet that comes, however many sockets there are.
(Its multicast groups, SKNLGRP_INET_TCP_DESTROY and the like, tell of every socket that ends, those of connections too,
and of none that begins to listen.)
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from steerd.errors import KernelError
from steerd.kernel.rtnetlink import ATTRIBUTE, HEADER, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, errno_text
from steerd.model import PROTOCOL_NAMES, TCP, UDP

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_INET_DIAG_REQ_BYTECODE = 1
_INET_DIAG_SKV6ONLY = 11
_BC_JMP, _BC_S_COND = 1, 7
_STATES = {TCP: 1 << 10, UDP: 1 << 7}
"""TCP_LISTEN; an unconnected UDP socket is in TCP_CLOSE."""

_REQUEST = struct.Struct("=BBBxI48x")
"""struct inet_diag_req_v2: family, protocol, extensions, states, socket id."""
_EXACT = struct.Struct("=BBBxI2s2s16s16sI8s")
"""The same with its socket id: ports, addresses, device, cookie."""
_NO_COOKIE = b"\xff" * 8
_ALL_STATES = 0xFFFFFFFF
_AT_ONCE = 64
"""Requests for which the answers fit into a socket's buffer."""
_MESSAGE = struct.Struct("=B3x2s2x16s")
"""The beginning of struct inet_diag_msg: family, source port, source address (which IPv4 fills to 4 bytes)."""
_MESSAGE_LENGTH = 72
_OPERATION = struct.Struct("=BBH")
_CONDITION = struct.Struct("=BBxxi")
_RECEIVE = 1 << 18
_MAPPED = bytes(10) + b"\xff\xff"


class Listener(NamedTuple):
    """Where a socket may listen."""

    address: bytes
    """Packed."""
    port: int
    wildcard: bool
    """One that is bound to the wildcard address counts, too."""


def wildcard_ports(protocol: int = TCP) -> set[tuple[int, int]]:
    """The (IP version, port) pairs on which a socket bound to the wildcard address takes connections (or datagrams).

    A socket on `::` without IPV6_V6ONLY takes IPv4 too, and so comes as both. Raises KernelError.
    """
    ports = {(4, port) for _, port, _, _ in _sockets(protocol, socket.AF_INET, _bound_to_wildcard(socket.AF_INET))}
    for _, port, address, both in _sockets(protocol, socket.AF_INET6, _bound_to_wildcard(socket.AF_INET6)):
        if address == bytes(16):
            ports.add((6, port))
        if both:
            ports.add((4, port))
    return ports


def all_listeners(protocol: int = TCP) -> set[tuple[bytes, int]]:
    """Every (packed local address, port) that takes connections; a wildcard is all zeros.

    A socket on an IPv4-mapped address (`::ffff:a.b.c.d`) comes as IPv4; one on `::` that takes IPv4 too comes as both.
    Raises KernelError.
    """
    found = {(address[:4], port) for _, port, address, _ in _sockets(protocol, socket.AF_INET, b"")}
    for _, port, address, both in _sockets(protocol, socket.AF_INET6, b""):
        if address.startswith(_MAPPED):
            found.add((address[12:], port))
            continue
        found.add((address, port))
        if both and address == bytes(16):
            found.add((bytes(4), port))
    return found


def listens(address: bytes, port: int, protocol: int = TCP, *, wildcard: bool = False) -> bool:
    """Whether a socket takes connections (or datagrams) on exactly this packed address and port, or, if `wildcard`, on
    the wildcard address and this port.

    The kernel looks one up as for a packet from nowhere (inet_diag_dump_one_icsk, udp_dump_one), and the nearest one
    wins: a socket bound to the address before one bound to the wildcard. Raises KernelError.
    """
    return which_listen(protocol, [Listener(address, port, wildcard)])[0]


def which_listen(protocol: int, wanted: Sequence[Listener]) -> list[bool]:
    """Of each whether a socket takes connections (or datagrams of strangers) there. One that is bound to a device is
    not seen. Raises KernelError."""
    found: list[bool] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as diag:
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            diag.send(b"".join(_question(protocol, number, listener) for number, listener in enumerate(some)))
            answers = [False] * len(some)
            # One after the other, in the order of the questions.
            for number, listener in enumerate(some):
                data = diag.recv(_RECEIVE)
                _, kind, _, sequence, _ = HEADER.unpack_from(data)
                if kind == NLMSG_ERROR:
                    (negative,) = struct.unpack_from("=i", data, 16)
                    if -negative != errno.ENOENT:
                        name = PROTOCOL_NAMES[protocol].upper()
                        raise KernelError(f"The kernel refused to look for a {name} socket: {errno_text(-negative)}.")
                    continue
                assert sequence == number
                family, _, address, _ = _told(data, 0)
                bound = address[:4] if family == socket.AF_INET else address.removeprefix(_MAPPED)
                answers[number] = listener.wildcard or bound == listener.address
            found += answers
    return found


def _question(protocol: int, number: int, listener: Listener) -> bytes:
    """A request for the one socket that would get a packet to this address and port."""
    here = listener.port.to_bytes(2, "big"), listener.address
    ends = (here, (b"\0\0", b"")) if protocol == TCP else ((b"\0\0", b""), here)  # as the kernel has it for UDP
    (sport, src), (dport, dst) = ends
    family = socket.AF_INET if len(listener.address) == 4 else socket.AF_INET6
    body = _EXACT.pack(family, protocol, 0, _ALL_STATES, sport, dport, src, dst, 0, _NO_COOKIE)
    return HEADER.pack(16 + len(body), _SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, number, 0) + body


def _bound_to_wildcard(family: int) -> bytes:
    """The filter: the source address is the wildcard of this family (for IPv6: or the IPv4-mapped one).

    A condition names how many bytes on to go if it holds and if it does not; going to the end accepts, beyond rejects.
    """
    if family == socket.AF_INET:
        return _condition(socket.AF_INET, 4, holds=16, fails=20)
    mapped = _condition(socket.AF_INET, 4, holds=16, fails=20)
    # Holds: step onto the jump, which leads to the end. Fails: step over it, to the second condition.
    return _condition(socket.AF_INET6, 16, holds=28, fails=32) + _OPERATION.pack(_BC_JMP, 4, 4 + len(mapped)) + mapped


def _condition(family: int, width: int, holds: int, fails: int) -> bytes:
    return _OPERATION.pack(_BC_S_COND, holds, fails) + _CONDITION.pack(family, width * 8, -1) + bytes(width)


def _sockets(protocol: int, family: int, bytecode: bytes) -> Iterator[tuple[int, int, bytes, bool]]:
    """(family, port, 16 bytes of local address, whether an IPv6 socket also takes IPv4) of each matching socket."""
    body = _REQUEST.pack(family, protocol, 0, _STATES[protocol])
    if bytecode:
        body += ATTRIBUTE.pack(4 + len(bytecode), _INET_DIAG_REQ_BYTECODE) + bytecode
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as diag:
        diag.send(HEADER.pack(16 + len(body), _SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body)
        while True:
            data = diag.recv(_RECEIVE)
            at = 0
            while at < len(data):
                length, kind, _, _, _ = HEADER.unpack_from(data, at)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    (negative,) = struct.unpack_from("=i", data, at + 16)
                    name = PROTOCOL_NAMES[protocol].upper()
                    raise KernelError(f"The kernel refused to list its {name} sockets: {errno_text(-negative)}.")
                yield _told(data, at)
                at += (length + 3) & ~3


def _told(data: bytes, at: int) -> tuple[int, int, bytes, bool]:
    """What the message at this place says of a socket, as `_sockets` gives it."""
    (length,) = struct.unpack_from("=I", data, at)
    family, port, address = _MESSAGE.unpack_from(data, at + 16)
    both = family == socket.AF_INET6 and not _only_ipv6(data, at + 16 + _MESSAGE_LENGTH, at + length)
    return family, port[0] << 8 | port[1], address, both


def _only_ipv6(data: bytes, at: int, end: int) -> bool:
    while at < end:
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if kind == _INET_DIAG_SKV6ONLY:
            return data[at + 4] != 0
        at += (length + 3) & ~3
    return False
