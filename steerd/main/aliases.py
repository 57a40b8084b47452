"""Keeps the aliases of the configuration in force: brings back those that somebody else removes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from steerd.config import Config
from steerd.errors import SteerdError
from steerd.kernel import aliases

_AGAIN_SECONDS = 5.0


class Aliases:
    """`config` says what is in force."""

    def __init__(self, config: Callable[[], Config], log: FilteringBoundLogger) -> None:
        self._config = config
        self._log = log
        self.changing = asyncio.Lock()
        """Held by who changes them in a thread. Whoever looks at them meanwhile would take that for somebody else's
        doing, and work against it."""

    async def keep(self) -> None:
        """Bring back aliases that somebody else removed."""
        loop = asyncio.get_running_loop()
        with contextlib.closing(aliases.Watcher()) as watcher:
            lost = asyncio.Event()
            loop.add_reader(watcher.fileno(), lost.set)
            try:
                while True:
                    await lost.wait()
                    lost.clear()
                    watcher.read()
                    try:
                        await self.mend()
                    except (SteerdError, OSError) as error:
                        self._log.error("aliases cannot be mended; trying again", why=str(error))
                        await asyncio.sleep(_AGAIN_SECONDS)
                        lost.set()
            finally:
                loop.remove_reader(watcher.fileno())

    async def mend(self) -> None:
        """Look once. Raises SteerdError or OSError."""
        async with self.changing:
            changes = await asyncio.to_thread(aliases.reconcile, list(self._config().pools.values()))
        if changes.added or changes.routes_added:
            self._log.warning(
                "aliases were removed by somebody; they are back",
                aliases=changes.added,
                routes=changes.routes_added,
            )
