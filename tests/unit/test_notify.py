"""What systemd is told, by way of a socket of its kind."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerd.kernel.notify import Notifier


@pytest.fixture(params=["file", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A name for NOTIFY_SOCKET, and what is heard there."""
    name = str(tmp_path / "notify") if request.param == "file" else f"@steerd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(name.replace("@", "\0", 1))
        heard.settimeout(30)
        yield name, heard


def test_every_word(systemd: tuple[str, socket.socket]) -> None:
    name, heard = systemd
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier(environment)
    assert notifier.watchdog_seconds == 30.0
    assert environment == {"HOME": "/"}, "what is started must not inherit it"
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.ready("2 of 2 workers")
    notifier.alive()
    notifier.status("1 of 2 workers")
    notifier.reloading()
    notifier.stopping()
    said = [heard.recv(1000).decode() for _ in range(5)]
    first, stamp = said[3].split("\nMONOTONIC_USEC=")
    assert [*said[:3], first, said[4]] == [
        "READY=1\nSTATUS=2 of 2 workers", "WATCHDOG=1", "STATUS=1 of 2 workers", "RELOADING=1",
        "STOPPING=1\nSTATUS=Stopping",
    ]  # fmt: skip
    assert before <= int(stamp) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_without_systemd_nothing_is_said() -> None:
    notifier = Notifier({})
    notifier.ready("nobody hears it")
    assert notifier.watchdog_seconds is None


def test_a_watchdog_of_another_process_is_not_ours() -> None:
    assert Notifier({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).watchdog_seconds is None


def test_systemd_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).alive()
