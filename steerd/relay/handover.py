"""`unix-fd:/path`: the daemon gets the client's TCP connection itself, as if it had accepted it.

The protocol. The daemon listens on the path with a SOCK_SEQPACKET or SOCK_STREAM socket, or is bound there with a
SOCK_DGRAM one. When the first client comes the relay connects, once, and sends one message for each client:
- its bytes are a header of the PROXY protocol, version 2 (28 bytes for IPv4, 52 for IPv6): the client's address and
  port, and the address and port of the endpoint that the client connected to;
- with it comes one descriptor (SCM_RIGHTS): a connected TCP socket, blocking, without close-on-exec of its own.
The daemon answers nothing. It owns the connection from then on; getpeername(2) on it is the client, getsockname(2) the
alias. With SOCK_STREAM one recvmsg(2) gives at most one message, since a descriptor ends it.

A daemon that does not take its messages stops the relay from accepting for it; clients wait in the backlog. When it
closes its end, the next client makes the relay connect anew; what it had not taken is closed by the kernel.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steerd.relay.engine import Relay

_SEND_TYPES = (socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM)


class Channel:
    """The relay's connection to one such daemon, whatever address clients come to."""

    def __init__(self, relay: Relay, address: str) -> None:
        """`address`: as connect(2) has it."""
        self._relay = relay
        self._address = address
        self._socket: socket.socket | None = None
        self._waiting: set[Callable[[], None]] = set()

    def hand_over(self, header: bytes, client: socket.socket, again: Callable[[], None]) -> bool:
        """Send a client to the daemon, and close it here. False: the daemon takes none now, and `again` is called when
        it may. Raises OSError if it never will."""
        if self._socket is not None:
            try:
                return self._send(self._socket, header, client, again)
            except OSError:  # the daemon was started anew, perhaps
                self.close()
        self._socket = _connect(self._address)
        self._relay.watch(self._socket, select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET, self._on_event)
        return self._send(self._socket, header, client, again)

    def _send(self, connection: socket.socket, header: bytes, client: socket.socket, again: Callable[[], None]) -> bool:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", client.fileno()))
        try:
            connection.sendmsg([header], [rights])
        except OSError as error:
            # So many descriptors may be on their way between processes as one process may have open (unix(7)).
            if not isinstance(error, BlockingIOError) and error.errno != errno.ETOOMANYREFS:
                raise
            self._waiting.add(again)
            return False
        client.close()
        return True

    def _on_event(self, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self.close()
        waiting, self._waiting = self._waiting, set()
        for again in waiting:
            again()

    def close(self) -> None:
        """Let go of the daemon; the next client makes a new connection."""
        if self._socket is not None:
            self._relay.forget(self._socket)
            self._socket.close()
            self._socket = None


def _connect(address: str) -> socket.socket:
    for kind in _SEND_TYPES:
        connection = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            if error.errno == errno.EPROTOTYPE and kind != _SEND_TYPES[-1]:
                continue
            raise
        return connection
    raise AssertionError("the last kind of socket connects or raises")
