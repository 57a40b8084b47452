"""The relay's loop: ports that listen, the daemons behind them, and the connections that are copied.

`Relay.listen` says what to listen on, all of it; what stays as it is, is not touched, and neither is any connection.
A client whose daemon cannot be reached is reset at once, and the log says so once for each daemon, and once more when
it answers again. A daemon whose backlog is full is asked again every 20 ms, and meanwhile its clients wait in the
kernel's own backlog: nothing is accepted that could not be delivered. Where no descriptor is left, accepting waits in
the same way.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import msgspec
import structlog

from steerd.relay.handover import Channel
from steerd.relay.streams import Pipes, Stream, reset
from steerd.wire import proxy

Kind = Literal["unix", "unix-fd"]

_BURST = 32
"""Connections accepted in a row before others have their turn."""
_BACKLOG = 4096
_MAX_EVENTS = 256
_LATER_SECONDS = 0.02
_PIPES_KEPT = 32
_MAX_FAULTS_LOGGED = 100
# linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h, linux/in.h, linux/in6.h
_SO_ORIGINAL_DST = 80
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4x")
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listen(msgspec.Struct, frozen=True):
    """One address to listen on, and the daemon behind it."""

    address: str
    port: int
    kind: Kind
    path: str
    """An absolute path, or the name of an abstract socket behind an @."""
    proxy_protocol: bool = False
    """Each connection that is copied begins with a header of the PROXY protocol, version 2."""

    @property
    def daemon(self) -> str:
        """As it stands in the configuration."""
        return f"{self.kind}:{self.path}"


class Relay:
    """One loop, for one thread."""

    def __init__(self, log: structlog.typing.FilteringBoundLogger) -> None:
        """Raises OSError where not even the descriptors to begin with are left."""
        self.log = log
        self.pipes = Pipes(_PIPES_KEPT)
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        # Descriptors that were closed since epoll_wait: what it said of them may now seem to be about others.
        self._forgotten: set[int] = set()
        self._soon: dict[object, Callable[[], None]] = {}
        self._later: dict[object, Callable[[], None]] = {}
        self._later_at = 0.0
        self._ports: dict[tuple[str, int], _Port] = {}
        self._channels: dict[str, Channel] = {}
        self._streams = 0
        self._faults: set[str] = set()

    # ---- for the process ----

    def listen(self, wanted: Sequence[Listen]) -> dict[str, str]:
        """Listen on these addresses and no others. Returns which could not be had, `address port`, each with why."""
        by_address = {(each.address, each.port): each for each in wanted}
        for key, port in list(self._ports.items()):
            if key not in by_address or by_address[key].daemon != port.daemon:
                self._ports.pop(key).close()
        taking = {_address(each.path) for each in wanted if each.kind == "unix-fd"}
        for address in self._channels.keys() - taking:
            self._channels.pop(address).close()
        failed = {}
        for key, each in by_address.items():
            if key in self._ports:
                self._ports[key].change(each)
                continue
            try:
                self._ports[key] = _Port(self, each)
            except OSError as error:
                failed[f"{each.address} {each.port}"] = error.strerror or str(error)
        return failed

    @property
    def streams(self) -> int:
        """How many connections are being copied."""
        return self._streams

    def turn(self, seconds: float | None = None) -> None:
        """Wait for something to happen, `seconds` at most, and do what is to be done."""
        self._forgotten.clear()
        for descriptor, events in self._epoll.poll(self._wait(seconds), _MAX_EVENTS):
            handler = None if descriptor in self._forgotten else self._handlers.get(descriptor)
            if handler is not None:
                self._do(partial(handler, events))
        tasks, self._soon = self._soon, {}
        if self._later and time.monotonic() >= self._later_at:
            tasks, self._later = {**tasks, **self._later}, {}
        for task in tasks.values():
            self._do(task)

    def _do(self, task: Callable[[], None]) -> None:
        """What goes wrong where nobody foresaw it must not cost the other connections."""
        try:
            task()
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            if text not in self._faults and len(self._faults) < _MAX_FAULTS_LOGGED:
                self._faults.add(text)
                self.log.error("fault in the relay", why=text)

    def _wait(self, seconds: float | None) -> float | None:
        if self._soon:
            return 0
        if not self._later:
            return seconds
        until_later = max(0.0, self._later_at - time.monotonic())
        return until_later if seconds is None else min(seconds, until_later)

    def close(self) -> None:
        """Let go of everything; connections end."""
        for port in self._ports.values():
            port.close()
        for channel in self._channels.values():
            channel.close()
        self._ports.clear()
        self.pipes.close()
        self._epoll.close()

    # ---- for its parts ----

    def channel(self, address: str) -> Channel:
        """The one to a daemon that takes connections itself."""
        if address not in self._channels:
            self._channels[address] = Channel(self, address)
        return self._channels[address]

    def watch(self, source: socket.socket | int, events: int, handler: Callable[[int], None]) -> None:
        """Call the handler with what happens to a descriptor."""
        descriptor = source if isinstance(source, int) else source.fileno()
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def forget(self, source: socket.socket | int) -> None:
        """Before a descriptor is closed."""
        descriptor = source if isinstance(source, int) else source.fileno()
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            self._forgotten.add(descriptor)

    def soon(self, who: object, task: Callable[[], None]) -> None:
        """Do a task in the next turn; one task for each `who`."""
        self._soon[who] = task

    def later(self, who: object, task: Callable[[], None]) -> None:
        """Do a task in 20 ms or sooner; one task for each `who`."""
        if not self._later:
            self._later_at = time.monotonic() + _LATER_SECONDS
        self._later[who] = task

    def begun(self) -> None:
        self._streams += 1

    def ended(self) -> None:
        self._streams -= 1


class _Port:
    """One address that is listened on, and the daemon behind it."""

    def __init__(self, relay: Relay, listen: Listen) -> None:
        """Raises OSError if the address cannot be had."""
        self._relay = relay
        self._to = listen
        self._waiting: socket.socket | None = None
        """A client that was accepted, and cannot be delivered yet."""
        self._trouble = ""
        family = socket.AF_INET6 if ":" in listen.address else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # The alias may be added, or brought back, a moment later.
            if family == socket.AF_INET6:
                self._listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            else:
                self._listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            self._listener.bind((listen.address, listen.port))
            self._listener.listen(_BACKLOG)
            relay.watch(self._listener, select.EPOLLIN | select.EPOLLET, lambda _events: self._accept())
        except OSError:
            self._listener.close()
            raise

    @property
    def daemon(self) -> str:
        return self._to.daemon

    def change(self, to: Listen) -> None:
        """Bring the next clients to the same daemon in another way."""
        self._to = to

    def close(self) -> None:
        """Stop listening. Clients that are in the backlog are still brought to the daemon if it takes them now."""
        self._relay.forget(self._listener)
        for _ in range(_BACKLOG):
            client = self._next()
            if client is None:
                break
            if not self._deliver(client):
                reset(client)
                break
        self._waiting = None
        self._listener.close()

    def _accept(self) -> None:
        if self._listener.fileno() < 0:
            return
        for _ in range(_BURST):
            client = self._next()
            if client is None:
                return
            if not self._deliver(client):
                self._waiting = client
                self._relay.later(self, self._accept)
                return
        self._relay.soon(self, self._accept)

    def _next(self) -> socket.socket | None:
        """A client to be delivered; None: there is none, or it cannot be had now."""
        if self._waiting is not None:
            client, self._waiting = self._waiting, None
            return client
        while True:
            try:
                return self._listener.accept()[0]
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._say("no descriptor or memory is left; its clients wait", error)
                    self._relay.later(self, self._accept)
                    return None
                # That client is gone; the next one may not be.

    def _deliver(self, client: socket.socket) -> bool:
        """Bring a client to its daemon, or reset it; False: it must wait."""
        try:
            if self._to.kind == "unix-fd":
                return self._hand_over(client)
            return self._open(client)
        except BlockingIOError:  # its backlog is full
            return False
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._say("no descriptor or memory is left; its clients wait", error)
                return False
            self._say("a daemon cannot be connected to; its clients are reset", error)
            reset(client)
            return True

    def _open(self, client: socket.socket) -> bool:
        header = header_of(client) if self._to.proxy_protocol else b""
        if header is None:
            client.close()
            return True
        daemon = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            daemon.connect(_address(self._to.path))
            if header:
                daemon.sendall(header)
        except OSError:
            daemon.close()
            raise
        self._well()
        client.setblocking(False)
        self._relay.begun()
        try:
            Stream(self._relay, client, daemon)
        except OSError:
            self._relay.forget(client)
            client.close()
            daemon.close()
            self._relay.ended()
        return True

    def _hand_over(self, client: socket.socket) -> bool:
        header = header_of(client)
        if header is None:
            client.close()
            return True
        if not self._relay.channel(_address(self._to.path)).hand_over(header, client, self._accept):
            return False
        self._well()
        return True

    def _say(self, what: str, error: OSError) -> None:
        why = error.strerror or str(error)
        if self._trouble != why:
            self._trouble = why
            self._relay.log.warning(what, daemon=self._to.daemon, why=why)

    def _well(self) -> None:
        if self._trouble:
            self._trouble = ""
            self._relay.log.info("a daemon can be connected to again", daemon=self._to.daemon)


def header_of(client: socket.socket) -> bytes | None:
    """The PROXY header of an accepted connection: the client, and the endpoint that it connected to before the kernel
    translated it (SO_ORIGINAL_DST). None: the client is gone."""
    try:
        source, sport = client.getpeername()[:2]
        destination, dport = client.getsockname()[:2]
        source, destination = (socket.inet_pton(client.family, each) for each in (source, destination))
    except OSError:
        return None
    level, form = (
        (socket.IPPROTO_IP, _SOCKADDR_IN) if client.family == socket.AF_INET else (socket.IPPROTO_IPV6, _SOCKADDR_IN6)
    )
    try:
        dport, destination = form.unpack(client.getsockopt(level, _SO_ORIGINAL_DST, form.size))
    except OSError as error:
        # Nothing was translated: somebody on this machine connected to the alias itself.
        if error.errno not in (errno.ENOENT, errno.ENOPROTOOPT):
            raise
    return proxy.encode(source, sport, destination, dport)


def _address(path: str) -> str:
    return f"\0{path[1:]}" if path.startswith("@") else path
