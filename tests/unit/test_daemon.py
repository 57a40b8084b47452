"""A reload that fails half-way, whatever fails: what was in force is in force again, and the daemon lives."""

from __future__ import annotations

import asyncio
import errno
import os
from types import SimpleNamespace
from typing import cast

import pytest
import structlog

from steerd import config
from steerd.config import Config
from steerd.daemon import Daemon
from steerd.errors import KernelError

NO_DESCRIPTOR = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
OLD, NEW = (config.parse(f"[gateway.limits]\ntotal_rate = {rate}", "steerd.toml") for rate in (1000, 2000))


class Running:
    """What a reload touches of a daemon; each step notes which configuration it was done for, and one fails for NEW."""

    def __init__(self, failing: str, error: Exception) -> None:
        self._failing = failing
        self._error = error
        self.done: dict[str, Config] = {}
        self._config = OLD
        self._text = ""
        self._changing_aliases, self._changing_table = asyncio.Lock(), asyncio.Lock()
        self._log = structlog.get_logger()
        self._registry = SimpleNamespace(relays=SimpleNamespace(reserve=lambda _config: None))
        self._waker = SimpleNamespace(configure=lambda new: self._note("waker", new))

    def _read(self) -> tuple[Config, str]:
        return NEW, "new"

    def _note(self, step: str, new: Config) -> None:
        self.done[step] = new
        if step == self._failing and new is NEW:
            raise self._error

    def _publish(self, new: Config) -> None:
        self._note("registry", new)

    def _change_table(self, new: Config) -> None:
        self._note("table", new)

    def _let_listen(self) -> None:
        self.done["relay"] = self._config

    def _apply(self, new: Config) -> None:
        Daemon._apply(cast(Daemon, self), new)


@pytest.mark.parametrize("error", [NO_DESCRIPTOR, KernelError("no memory")])
@pytest.mark.parametrize("failing", ["registry", "table", "waker"])
def test_a_reload_that_fails_half_way_is_undone(failing: str, error: Exception) -> None:
    running = Running(failing, error)
    refused = asyncio.run(Daemon._reload_once(cast(Daemon, running)))
    assert str(error) in str(refused)
    assert (running._config, running._text) == (OLD, "")
    assert set(running.done) == {"registry", "table", "waker", "relay"}
    assert all(each is OLD for each in running.done.values())
