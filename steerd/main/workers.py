"""Keeps the workers: one process for each queue, started again when it dies; and says when their queues overflow."""

from __future__ import annotations

import asyncio
import time

from structlog.typing import FilteringBoundLogger

from steerd.config import Gateway
from steerd.control.registry import Registry
from steerd.errors import KernelError
from steerd.kernel import queue
from steerd.main import back_off
from steerd.main.back_off import BackOff
from steerd.main.nursery import Nursery
from steerd.orders import WorkerSettings
from steerd.telemetry.counters import Counters, Extra

_QUEUE_REPORT_SECONDS = 60.0


class Workers:
    """All workers of this process, by their indices 0 .. `count` - 1. What they need of the configuration stays the
    same over reloads (main.reload.FIXED)."""

    def __init__(
        self, gateway: Gateway, nursery: Nursery, counters: Counters, registry: Registry, log: FilteringBoundLogger
    ) -> None:
        self._gateway = gateway
        self._nursery = nursery
        self._counters = counters
        self._registry = registry
        self._log = log
        self._began = [asyncio.Event() for _ in range(gateway.workers)]
        self.bound: set[int] = set()
        """Those whose queues are bound now."""

    @property
    def count(self) -> int:
        """How many there are to be."""
        return self._gateway.workers

    @property
    def are_all_bound(self) -> bool:
        """Whether none is away now."""
        return len(self.bound) == self.count

    async def begun(self) -> None:
        """Wait until each of them was bound once."""
        for event in self._began:
            await event.wait()

    async def keep(self, index: int) -> None:
        """Start a worker, and again whenever it dies. A cancelled task takes its worker with it."""
        settings = self._settings(index)
        pauses = BackOff()
        while True:
            born = time.monotonic()
            try:
                worker = await self._nursery.start(settings)
            except OSError as error:  # no memory or no process to be had: that may pass
                self._log.error("worker cannot be started", worker=index, why=str(error))
                await asyncio.sleep(back_off.LONGEST_SECONDS)
                continue
            try:
                if await worker.is_ready():
                    self._log.info("worker bound", worker=index, queue=settings.queue, pid=worker.pid)
                    self.bound.add(index)
                    self._began[index].set()
                status = await worker.end()
            finally:
                self.bound.discard(index)
                await worker.kill()
            # A killed worker leaves its reader's slot behind, and with it every page that it could still have read.
            self._registry.forget_dead_readers()
            pause = pauses.after(time.monotonic() - born)
            self._log.warning("worker died", worker=index, pid=worker.pid, status=status, again_in_seconds=pause)
            await asyncio.sleep(pause)
            self._counters.slot(index)[Extra.RESTARTS] += 1

    def _settings(self, index: int) -> WorkerSettings:
        gateway = self._gateway
        return WorkerSettings(
            index=index,
            queue=gateway.first_queue + index,
            queue_length=gateway.queue_length,
            receive_buffer=gateway.receive_buffer,
            state_dir=gateway.state_dir,
            run_dir=gateway.run_dir,
            counters=str(self._counters.path),
            log_format=gateway.log.format,
        )

    async def keep_watching_queues(self) -> None:
        """Say so when the kernel dropped packets because a worker did not keep up; once a minute at most."""
        reported = 0
        while True:
            try:
                states = queue.states_from(self._gateway.first_queue, self.count)
            except KernelError as error:
                self._log.warning("nobody will say when queues overflow", why=str(error))
                await asyncio.Event().wait()
            dropped = sum(state.queue_dropped + state.user_dropped for state in states if state is not None)
            if dropped > reported:
                self._log.warning("queues overflowed; the clients will repeat", packets=dropped - reported)
            # A worker that starts again binds its queue anew, and the kernel counts from zero.
            reported = dropped
            await asyncio.sleep(_QUEUE_REPORT_SECONDS)
