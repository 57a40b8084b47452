"""One connection that is copied, both ways, with splice(2): bytes go from socket to socket through a pipe and never
into this process.

What holds of the client's TCP connection holds of the daemon's unix one, and the other way round:
- the end of one direction (FIN, shutdown) is passed on when all before it is, and the other direction goes on;
- a side that does not take what it is sent stops the other side: at most a pipe (64 KiB) is on its way in each
  direction, and the kernel's window does the rest;
- a client's reset ends both sides at once. A unix socket knows no reset: the daemon sees both directions end at the
  same time (EPOLLHUP, and EPIPE when it writes). A daemon that closes while something is unread resets its client, as
  it would over TCP.

Events are edge-triggered: each socket is registered once, and a direction is pumped until one side has nothing or takes
nothing more. A pipe is held only while there are bytes in it, so an idle connection costs its two sockets.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steerd.relay.engine import Relay

EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET

# What one turn may copy before others have theirs: so many times a pipe.
_ROUNDS = 16
_CHUNK = 65536
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_RESET = struct.pack("ii", 1, 0)
# A client that vanished without a word is noticed after 15 minutes; its daemon has no other way to learn of it.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 600), (socket.TCP_KEEPINTVL, 60), (socket.TCP_KEEPCNT, 5))


def reset(client: socket.socket) -> None:
    """Close a TCP connection with a reset."""
    with contextlib.suppress(OSError):  # it is reset already
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.close()


class Pipes:
    """Empty pipes, some of them kept for the next one who needs one."""

    def __init__(self, kept: int) -> None:
        """Open as many as are `kept`, so that there are some when no descriptor is left. Raises OSError."""
        self._kept = kept
        self._free = [os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(kept)]

    def take(self) -> tuple[int, int]:
        """A pipe: the end to read, the end to write. Raises OSError where no descriptor is left."""
        return self._free.pop() if self._free else os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def give(self, pipe: tuple[int, int], *, is_empty: bool = True) -> None:
        """A pipe that is not needed any more."""
        if is_empty and len(self._free) < self._kept:
            self._free.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        while self._free:
            for end in self._free.pop():
                os.close(end)


class Direction:
    """What goes from one socket to the other."""

    __slots__ = ("held", "is_lost", "is_over", "is_stuck", "pipe", "sink", "source")

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.pipe: tuple[int, int] | None = None
        self.held = 0
        """Bytes in the pipe."""
        self.is_stuck = False
        """The sink takes nothing now."""
        self.is_over = False
        """The end was passed on."""
        self.is_lost = False
        """The sink will take nothing any more."""


class Stream:
    """A client's connection and its daemon's, from the moment that both are there to the end of both."""

    __slots__ = ("_client", "_daemon", "_down", "_is_left", "_relay", "_up")

    def __init__(self, relay: Relay, client: socket.socket, daemon: socket.socket) -> None:
        """Both sockets are connected, and not blocking. Raises OSError if the client is gone."""
        self._relay = relay
        self._client = client
        self._daemon = daemon
        self._up = Direction(client, daemon)
        self._down = Direction(daemon, client)
        self._is_left = False
        """The daemon has closed its end: nothing can be brought to it."""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            client.setsockopt(socket.IPPROTO_TCP, option, value)
        # The daemon cannot say that its small writes are not to wait for each other.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        relay.watch(client, EVENTS, self._on_client)
        relay.watch(daemon, EVENTS, self._on_daemon)

    def _on_client(self, events: int) -> None:
        # Urgent data would stop splice for good, and a unix socket has no place for them.
        if events & select.EPOLLPRI or (events & select.EPOLLERR and self._has_failed(self._client)):
            self._end(with_reset=True)
            return
        if events & _READABLE and not self._up.is_stuck:
            self._pump(self._up)
        if events & select.EPOLLOUT and self._down.is_stuck:
            self._pump(self._down)

    def _on_daemon(self, events: int) -> None:
        # What the daemon sent before it closed is still there to be read, and then its error, if it has one.
        if events & _READABLE and not self._down.is_stuck:
            self._pump(self._down)
        if events & (select.EPOLLOUT | select.EPOLLHUP) and self._up.is_stuck:
            self._pump(self._up)
        if events & select.EPOLLHUP:
            self._is_left = True
            self._end_if_over()

    @staticmethod
    def _has_failed(connection: socket.socket) -> bool:
        return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def _pump(self, direction: Direction) -> None:
        """Copy until one side has nothing or takes nothing more, or others want their turn."""
        if direction.is_over or direction.is_lost or self._client.fileno() < 0:
            return
        for _ in range(_ROUNDS):
            if not (self._write(direction) if direction.held else self._read(direction)):
                return
        self._relay.soon(direction, lambda: self._pump(direction))

    def _read(self, direction: Direction) -> bool:
        """From the source into the pipe; whether to go on."""
        if direction.pipe is None:
            try:
                direction.pipe = self._relay.pipes.take()
            except OSError:
                self._relay.later(direction, lambda: self._pump(direction))
                return False
        try:
            direction.held = os.splice(direction.source.fileno(), direction.pipe[1], _CHUNK, flags=_FLAGS)
        except BlockingIOError:
            self._give_back(direction)
            return False
        except OSError:
            self._end(with_reset=True)
            return False
        if direction.held:
            return True
        self._give_back(direction)
        direction.is_over = True
        with contextlib.suppress(OSError):  # it is closed already: there is nobody to tell
            direction.sink.shutdown(socket.SHUT_WR)
        self._end_if_over()
        return False

    def _write(self, direction: Direction) -> bool:
        """From the pipe into the sink; whether to go on."""
        assert direction.pipe is not None
        try:
            direction.held -= os.splice(direction.pipe[0], direction.sink.fileno(), direction.held, flags=_FLAGS)
        except BlockingIOError:
            direction.is_stuck = True
            return False
        except OSError:
            # The daemon reads no more, but what it has said already is still on its way.
            direction.is_lost = True
            self._give_back(direction)
            if direction is self._down:
                self._end(with_reset=True)
            self._end_if_over()
            return False
        direction.is_stuck = False
        return True

    def _give_back(self, direction: Direction) -> None:
        if direction.pipe is not None:
            self._relay.pipes.give(direction.pipe, is_empty=not direction.held)
            direction.pipe = None
            direction.held = 0

    def _end_if_over(self) -> None:
        up = self._up
        if self._down.is_over and (up.is_over or up.is_lost or self._is_left):
            self._end(with_reset=up.is_lost or up.held > 0)

    def _end(self, *, with_reset: bool) -> None:
        if self._client.fileno() < 0:
            return
        self._relay.forget(self._client)
        self._relay.forget(self._daemon)
        for direction in (self._up, self._down):
            self._give_back(direction)
        if with_reset:
            reset(self._client)
        else:
            self._client.close()
        self._daemon.close()
        self._relay.ended()
