"""Ending a local TCP connection from outside of its process (NETLINK_SOCK_DIAG, linux/inet_diag.h, SOCK_DESTROY)."""

from __future__ import annotations

import socket
import struct

from steerd.kernel.rtnetlink import HEADER, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR
from steerd.model import TCP, Flow

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_ALL_STATES = 0xFFFFFFFF
_LISTEN = 10
_ANY_DEVICE = 0

_REQUEST = struct.Struct("=BBxxI")
"""The beginning of struct inet_diag_req_v2: family, protocol, extensions, states; the socket's id follows."""
_ID = struct.Struct("!HH16s16s")
"""The beginning of struct inet_diag_sockid: local port, remote port, local address, remote address."""
_DEVICE = struct.Struct("=I")
_NO_COOKIE = b"\xff" * 8
_MESSAGE = struct.Struct("=BB2x")
"""The beginning of struct inet_diag_msg: family, state; the socket's id follows."""
_ID_LENGTH, _COOKIE_AT = 48, 40
_RECEIVE = 8192


def end(flow: Flow) -> bool:
    """End the connection of a local daemon with the client `flow.src`; its process is told ECONNABORTED.

    False if there is none, or if the kernel cannot do it (CONFIG_INET_DIAG_DESTROY).
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as diag:
        found = _ask(diag, _SOCK_DIAG_BY_FAMILY, flow, _NO_COOKIE)
        if found is None:
            return False
        _, state = _MESSAGE.unpack_from(found)
        # Where no connection is, the kernel finds the daemon's listening socket.
        if state == _LISTEN:
            return False
        cookie = found[_MESSAGE.size + _COOKIE_AT : _MESSAGE.size + _ID_LENGTH]
        return _ask(diag, _SOCK_DESTROY, flow, cookie) is not None


def _ask(diag: socket.socket, kind: int, flow: Flow, cookie: bytes) -> bytes | None:
    """The body of the kernel's answer, empty for a mere acknowledgement; None if it refuses."""
    identity = _ID.pack(flow.dport, flow.sport, flow.dst, flow.src) + _DEVICE.pack(_ANY_DEVICE) + cookie
    body = _REQUEST.pack(_FAMILIES[flow.version], TCP, _ALL_STATES) + identity
    flags = NLM_F_REQUEST | (NLM_F_ACK if kind == _SOCK_DESTROY else 0)
    diag.send(HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body)
    data = diag.recv(_RECEIVE)
    length, answered, _, _, _ = HEADER.unpack_from(data)
    body = data[HEADER.size : length]
    if answered != NLMSG_ERROR:
        return body
    return None if struct.unpack_from("=i", body)[0] else b""
