"""Who may use a socket of the API, and how much of it at a time.

The kernel says who is at the other end, as of the moment of connecting (unix(7): SO_PEERCRED, SO_PEERGROUPS): the
user, and all groups that the process is in. The modes of the sockets keep most others out before that; what counts is
what is said here.

A peer that may not is answered 403, once. One that has too many connections, or connects when there are too many of all
together, is hung up on at once. The log says so, but not more often than once a minute of one user.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from steerd.control.api.seldom import Seldom

MAX_CONNECTIONS = 256
"""To one socket."""
MAX_CONNECTIONS_OF_USER = 64
"""All who may not use it count as one user together, and keep nobody out."""
_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h; Python does not name it
_CREDENTIALS = struct.Struct("=iII")
_MOST_BYTES = 1024  # Python's getsockopt gives no more: 256 groups


class Peer(NamedTuple):
    """The process at the other end of a connection, as it was when it connected."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end of a unix socket. Of a process in more than 256 groups only its main one is known."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        packed = b""
    return Peer(pid, uid, frozenset((gid, *(number for (number,) in struct.iter_unpack("=I", packed)))))


class Door:
    """One socket of the API: who may enter, and who is in."""

    def __init__(
        self, name: str, groups: Iterable[int], whom: str, *, read_only: bool, on_refused: Callable[[str], None]
    ) -> None:
        """`groups` are those whose members may enter; `whom` says so in words. root and this process's own user may
        always."""
        self.read_only = read_only
        self._name = name
        self._groups = frozenset(groups)
        self._whom = whom
        self._say = Seldom(on_refused)
        self._own_user = os.geteuid()
        self._inside: Counter[int | None] = Counter()
        """By user; None: who may not enter."""

    def may_enter(self, peer: Peer) -> bool:
        """Whether this peer may use the socket."""
        return peer.uid in (0, self._own_user) or not self._groups.isdisjoint(peer.groups)

    def refusal(self, peer: Peer) -> str:
        """Why it may not, for itself."""
        return f"The user {peer.uid} may not use {self._name}: it is for {self._whom}."

    def enter(self, peer: Peer) -> bool:
        """Count a new connection; False if there are too many. Each that was counted ends with `leave`."""
        user = self._user(peer)
        if self._inside.total() >= MAX_CONNECTIONS or self._inside[user] >= MAX_CONNECTIONS_OF_USER:
            self._tell(peer, "has, or all together have, too many connections")
            return False
        self._inside[user] += 1
        if not self.may_enter(peer):
            self._tell(peer, f"was refused: it is for {self._whom}")
        return True

    def leave(self, peer: Peer) -> None:
        """One connection of this peer has ended."""
        user = self._user(peer)
        self._inside[user] -= 1
        if not self._inside[user]:
            del self._inside[user]

    def _user(self, peer: Peer) -> int | None:
        return peer.uid if self.may_enter(peer) else None

    def _tell(self, peer: Peer, what: str) -> None:
        self._say(peer.uid, f"{self._name}: the user {peer.uid} (process {peer.pid}) {what}")
