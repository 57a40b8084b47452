"""A reload that fails half-way, whatever fails: what was in force is in force again, and the daemon lives."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import structlog

from steerd import config
from steerd.config import Config
from steerd.control.registry import Registry
from steerd.daemon import Daemon
from steerd.errors import KernelError, SteerdError
from steerd.main.announcer import Announcer
from steerd.main.reload import Reloader

NO_DESCRIPTOR = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
OLD, NEW = (f"[gateway.limits]\ntotal_rate = {rate}" for rate in (1000, 2000))


class Running:
    """What a reload touches of a daemon; each step notes which configuration it was done for, and one fails for the new
    one."""

    def __init__(self, old: Config, failing: str, error: Exception) -> None:
        self._failing = failing
        self._error = error
        self.done: dict[str, Config] = {}
        self._config = self._old = old
        self._registry = SimpleNamespace(relays=SimpleNamespace(reserve=lambda _config: None, seats=lambda: None))
        self._waker = SimpleNamespace(configure=lambda new: self._note("waker", new))
        self._table = SimpleNamespace(change=lambda new: self._note("table", new))
        log = structlog.get_logger()
        self.reloader = Reloader(
            lambda: self._config,
            self._put_in_force,
            cast(Registry, self._registry),
            Announcer(lambda: "", log),
            log,
        )

    def _note(self, step: str, new: Config) -> None:
        self.done[step] = new
        if step == self._failing and new is not self._old:
            raise self._error

    def _publish(self, new: Config) -> None:
        self._note("registry", new)

    def _let_listen(self) -> None:
        self.done["relay"] = self._config

    async def _put_in_force(self, new: Config) -> None:
        Daemon._apply(cast(Daemon, self), new)


async def reload(reloader: Reloader, times: int) -> list[SteerdError | None]:
    keeping = asyncio.create_task(reloader.keep())
    try:
        return [await reloader.reload() for _ in range(times)]
    finally:
        keeping.cancel()


@pytest.mark.parametrize("error", [NO_DESCRIPTOR, KernelError("no memory")])
@pytest.mark.parametrize("failing", ["registry", "table", "waker"])
def test_a_reload_that_fails_half_way_is_undone(failing: str, error: Exception, tmp_path: Path) -> None:
    file = tmp_path / "steerd.toml"
    old = config.parse(OLD, str(file))
    file.write_text(NEW)
    running = Running(old, failing, error)
    # What failed was not taken for what is in force: the second time it is tried again.
    refused = asyncio.run(reload(running.reloader, times=2))
    assert all(str(error) in str(each) for each in refused)
    assert running.reloader.refused is refused[-1]
    assert running._config is old
    assert set(running.done) == {"registry", "table", "waker", "relay"}
    assert all(each is old for each in running.done.values())
