"""Reloads: the configuration file is read again when somebody asks (SIGHUP, the API), and put in force; or it is not,
and what was in force stays.

Reloads come one after the other. Those who ask while one runs share the next one, which reads the file anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from operator import attrgetter

from structlog.typing import FilteringBoundLogger

from steerd import config as configuration
from steerd import privileges
from steerd.config import Config
from steerd.control.registry import Registry
from steerd.errors import SteerdError
from steerd.main.announcer import Announcer

FIXED = (
    "mark",
    "workers",
    "first_queue",
    "state_dir",
    "run_dir",
    "queue_length",
    "receive_buffer",
    "user",
    "api",
    "log.format",
    "metrics.listen",
)
"""Of config.Gateway: what a reload cannot change."""


def check_change(old: Config, new: Config) -> None:
    """Whether this process can go over to a new configuration; raises SteerdError."""
    for key in FIXED:
        if attrgetter(key)(new.gateway) != attrgetter(key)(old.gateway):
            name = "mark_bits" if key == "mark" else key
            raise SteerdError(f"{new.file}: gateway.{name} changed, which needs a restart of the daemon.")
    if sentence := privileges.lacking(new):
        raise SteerdError(sentence)


class Reloader:
    """`config` says what is in force; `put_in_force` changes that, or raises SteerdError or OSError and has changed
    nothing."""

    def __init__(
        self,
        config: Callable[[], Config],
        put_in_force: Callable[[Config], Awaitable[None]],
        registry: Registry,
        announcer: Announcer,
        log: FilteringBoundLogger,
    ) -> None:
        self._config = config
        self._put_in_force = put_in_force
        self._registry = registry
        self._announcer = announcer
        self._log = log
        self._is_asked = asyncio.Event()
        # Who waits for the next reload.
        self._awaiting: list[asyncio.Future[SteerdError | None]] = []
        # Of the file that is in force, if a reload has read it.
        self._text: str | None = None
        self.refused: SteerdError | None = None
        """What the last reload was refused for; None: it was not, or there was none."""

    def ask(self) -> None:
        """Have a reload done."""
        self._is_asked.set()

    async def reload(self) -> SteerdError | None:
        """Put the configuration file in force, as it is now. Returns None once it is in force; else why it is not, a
        ConfigError with every mistake, or what the kernel or the registry refused, and what was in force still is."""
        done: asyncio.Future[SteerdError | None] = asyncio.get_running_loop().create_future()
        self._awaiting.append(done)
        self.ask()
        return await done

    async def keep(self) -> None:
        """Do it whenever somebody asks."""
        while True:
            await self._is_asked.wait()
            self._is_asked.clear()
            awaiting, self._awaiting = self._awaiting, []
            self._announcer.reloading()
            self.refused = problem = await self._reload_once()
            self._announcer.reloaded()
            for done in awaiting:
                if not done.done():  # who asked does not wait any more
                    done.set_result(problem)

    async def _reload_once(self) -> SteerdError | None:
        begun = time.monotonic()
        try:
            new, text = await asyncio.to_thread(self._read)
            await self._put_in_force(new)
        except (SteerdError, OSError) as error:
            self._log.error("not reloaded; the running configuration stays", why=str(error))
            return error if isinstance(error, SteerdError) else SteerdError(f"{self._config().file}: {error}")
        self._text = text
        seconds = round(time.monotonic() - begun, 3)
        self._log.info("reloaded", file=new.file, services=len(new.services), seconds=seconds)
        return None

    def _read(self) -> tuple[Config, str]:
        """The configuration file as it is now, and its text."""
        now = self._config()
        text = configuration.read(now.file)
        if text == self._text:
            return now, text
        new = configuration.parse(text, now.file, self._registry.relays.seats())
        check_change(now, new)
        return new, text
