"""Tells systemd how it goes: ready, reloading, stopping, alive, and one line for `systemctl status`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from steerd.kernel.notify import Notifier
from steerd.main.workers import Workers

_STATUS_SECONDS = 10.0
# A watchdog that hears of us three times in its time does not bite because one of them was late.
_WATCHDOG_SHARE = 3


class Announcer:
    """To be made before other processes are started (kernel.notify.Notifier). `status` gives the line."""

    def __init__(self, status: Callable[[], str], log: FilteringBoundLogger) -> None:
        self._status = status
        self._log = log
        self._notifier = Notifier()
        self._is_ready = False

    async def keep(self, workers: Workers, started: float) -> None:
        """Say when every worker is bound for the first time, and from then on how it goes. `started`: as
        time.monotonic, for the log."""
        await workers.begun()
        self._log.info("ready", workers=workers.count, seconds=round(time.monotonic() - started, 3))
        self._is_ready = True
        self._notify(lambda: self._notifier.ready(self._status()))
        watchdog = self._notifier.watchdog_seconds
        while True:
            # While a worker is away its clients wait. If it does not come back in time, a new start is the last resort.
            if workers.are_all_bound:
                self._notify(self._notifier.alive)
            self._notify(lambda: self._notifier.status(self._status()))
            await asyncio.sleep(watchdog / _WATCHDOG_SHARE if watchdog else _STATUS_SECONDS)

    def reloading(self) -> None:
        """A reload begins; `reloaded` must follow."""
        if self._is_ready:
            self._notify(self._notifier.reloading)

    def reloaded(self) -> None:
        """It is over, well or not."""
        if self._is_ready:
            self._notify(lambda: self._notifier.ready(self._status()))

    def stopping(self) -> None:
        """The end has begun."""
        self._notify(self._notifier.stopping)

    def _notify(self, say: Callable[[], None]) -> None:
        try:
            say()
        except OSError as error:
            self._log.error("systemd cannot be told how it goes", why=str(error))
