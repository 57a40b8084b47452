"""Metrics for Prometheus: finds out how things stand, and serves it over HTTP at `gateway.metrics.listen`.

Who asks more than once a second gets the same answer again, so that however many ask, it costs little. There are at
most _MOST_CONNECTIONS; a new one pushes out the oldest, so that nobody keeps the others out by connecting. Nothing is
said there that would have to be kept secret: no key, no address, no name but those of services, parsers and pools.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from aiohttp import web

from steerd.config import Config, Listen
from steerd.control.registry import Registry
from steerd.errors import KernelError, SteerdError
from steerd.kernel import queue, statistics
from steerd.kernel.nftables import Nftables
from steerd.telemetry import metrics
from steerd.telemetry.counters import Counters

PATH = "/metrics"

_FRESH_SECONDS = 1.0
_SHUTDOWN_SECONDS = 1.0
_IDLE_SECONDS = 60.0
"""Longer than monitors wait from one scrape to the next."""
_MOST_CONNECTIONS = 32
_MODE = 0o666
_T = TypeVar("_T")


class Monitor:
    """Serves from `start` to `stop`. `config` says what is in force; `on_fault` is told what nobody foresaw."""

    def __init__(
        self,
        listen: Listen,
        config: Callable[[], Config],
        counters: Counters,
        registry: Registry,
        on_fault: Callable[[str], None],
    ) -> None:
        self._listen = listen
        self._config = config
        self._counters = counters
        self._registry = registry
        self._on_fault = on_fault
        self._version = metadata.version("steerd")
        self._asking = asyncio.Lock()
        self._snapshot: metrics.Snapshot | None = None
        self._taken = 0.0
        app = web.Application()
        app.router.add_get(PATH, self._scrape)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
        self._connections: dict[_Connection, None] = {}
        self._listening: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; raises SteerdError if that cannot be had."""
        await self._runner.setup()
        try:
            listener = _listener(self._listen)
        except OSError as error:
            await self._runner.cleanup()
            raise SteerdError(
                f"gateway.metrics.listen: {self._listen} cannot be listened on: {os.strerror(error.errno or 0)}."
            ) from error
        server = self._runner.server
        assert server is not None, "the runner was set up"
        self._listening = await asyncio.get_running_loop().create_server(
            lambda: _Connection(server, self._connections), sock=listener
        )

    async def stop(self) -> None:
        """Let requests end that are being answered, and go."""
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()
        if self._listen.path:
            Path(self._listen.path).unlink(missing_ok=True)

    async def _scrape(self, request: web.Request) -> web.Response:
        try:
            async with self._asking:
                if self._snapshot is None or time.monotonic() - self._taken > _FRESH_SECONDS:
                    self._snapshot = await asyncio.to_thread(self._take)
                    self._taken = time.monotonic()
                accept = request.headers.get("Accept", "")
                body, content_type = await asyncio.to_thread(metrics.exposition, self._snapshot, accept)
        except Exception:
            self._on_fault(traceback.format_exc())
            return web.Response(status=500, text="This is a fault of steerd; its log says more.\n")
        return web.Response(body=body, headers={"Content-Type": content_type})

    def _take(self) -> metrics.Snapshot:
        config = self._config()
        conntrack = _found(statistics.conntrack)
        return metrics.Snapshot(
            version=self._version,
            counters=self._counters,
            queues=_found(lambda: _queues(config.gateway.first_queue, config.gateway.workers)),
            pools={
                pool.name: metrics.Pool({"ipv4": pool.ipv4, "ipv6": pool.ipv6}, pool.leased, pool.quarantined)
                for pool in self._registry.leases.pools(time.time())
            },
            routes={service.name: self._routes(service.name) for service in config.services},
            sessions=self._registry.sessions.count(),
            kernel_packets=_found(_kernel_packets),
            synproxy=_found(statistics.synproxy),
            conntrack_entries=None if conntrack is None else conntrack.entries,
            conntrack_max=None if conntrack is None else conntrack.max,
        )

    def _routes(self, service: str) -> dict[str, int]:
        try:
            static, dynamic = self._registry.routes.count(service)
        except SteerdError:  # a reload took the service away a moment ago
            return {}
        return {"static": static, "dynamic": dynamic}


class _Connection(web.RequestHandler):
    """One connection, among those that there are, the oldest first."""

    __slots__ = ("_connections",)

    def __init__(self, server: web.Server, connections: dict[_Connection, None]) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=_IDLE_SECONDS,
        )
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections[self] = None
        if len(self._connections) > _MOST_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            if oldest.transport is not None:
                oldest.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.pop(self, None)
        super().connection_lost(exc)


def _found(find: Callable[[], _T]) -> _T | None:
    """None if the kernel does not tell: the rest is told all the same."""
    with contextlib.suppress(KernelError, OSError):
        return find()
    return None


def _queues(first: int, workers: int) -> list[metrics.Queue]:
    return [
        metrics.Queue(None, {})
        if state is None
        else metrics.Queue(state.waiting, {"queue_full": state.queue_dropped, "socket_full": state.user_dropped})
        for state in queue.states_from(first, workers)
    ]


def _kernel_packets() -> dict[str, int]:
    with contextlib.closing(Nftables()) as nftables:
        return nftables.counters()


def _listener(listen: Listen) -> socket.socket:
    if listen.path:
        path = Path(listen.path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            path.chmod(_MODE)
        except OSError:
            listener.close()
            raise
        return listener
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    return socket.create_server((listen.host, listen.port), family=family)
