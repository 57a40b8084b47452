"""The nursery and the main process's side of it, with workers that find no registry and so end at once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from steerd.main.nursery import Nursery
from steerd.orders import WorkerSettings


def settings(directory: Path) -> WorkerSettings:
    return WorkerSettings(0, 100, 1000, 100000, str(directory), str(directory), str(directory / "counters"), "json")


def with_nursery(use: Callable[[Nursery], Awaitable[None]]) -> None:
    async def run() -> None:
        nursery = Nursery()
        try:
            await use(nursery)
        finally:
            nursery.close()

    asyncio.run(run())


def test_a_worker_that_cannot_start_is_born_and_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def use(nursery: Nursery) -> None:
        seen = []
        for _ in range(3):
            worker = await nursery.start(settings(tmp_path))
            assert not await worker.is_ready()
            assert (await worker.end(), worker.status) == (1, 1)
            await worker.kill()
            assert worker.pid is not None and not Path(f"/proc/{worker.pid}").exists()
            seen.append(worker.pid)
        assert len(set(seen)) == 3

    with_nursery(use)
    assert "counters" in capfd.readouterr().err


def test_a_nursery_that_was_killed_is_replaced(tmp_path: Path) -> None:
    async def use(nursery: Nursery) -> None:
        first = nursery._process
        first.kill()
        first.wait()
        worker = await nursery.start(settings(tmp_path))
        assert not await worker.is_ready()
        assert await worker.end() == 1
        await worker.kill()
        assert nursery._process.pid != first.pid and nursery._process.poll() is None

    with_nursery(use)


def test_the_end_of_a_nursery_is_the_end_of_what_it_says(tmp_path: Path) -> None:
    """Stopped before it takes the order, and killed: nobody can say how the worker ended."""

    async def use(nursery: Nursery) -> None:
        nursery._process.send_signal(signal.SIGSTOP)
        worker = await nursery.start(settings(tmp_path))
        nursery._process.kill()
        assert not await worker.is_ready()
        assert (await worker.end(), worker.pid) == (None, None)
        await worker.kill()

    with_nursery(use)


def test_a_nursery_that_does_not_answer_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerd.main.nursery._ANSWER_SECONDS", 0.1)

    async def use(nursery: Nursery) -> None:
        stopped = nursery._process
        stopped.send_signal(signal.SIGSTOP)
        workers = [await nursery.start(settings(tmp_path)) for _ in range(2)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(worker.kill() for worker in workers))
        assert stopped.poll() == -signal.SIGKILL
        worker = await nursery.start(settings(tmp_path))
        assert await worker.end() == 1
        await worker.kill()

    with_nursery(use)


def test_a_hangup_is_for_the_main_process(tmp_path: Path) -> None:
    """Whoever closes the terminal, or sends one to all processes of the service, wants a reload."""

    async def use(nursery: Nursery) -> None:
        first = nursery._process
        for _ in range(2):
            worker = await nursery.start(settings(tmp_path))
            assert await worker.end() == 1
            await worker.kill()
            first.send_signal(signal.SIGHUP)
        assert nursery._process is first and first.poll() is None

    with_nursery(use)


def nursery_of(parent: int, orders: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "steerd.nursery", str(parent)], stdin=orders.fileno())


def test_it_ends_with_its_orders() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = nursery_of(os.getpid(), theirs)
    ours.close()
    assert process.wait(60) == 0


def test_without_its_main_process_it_ends_by_itself() -> None:
    """It asks for the signal first and looks then, so that no moment is left in between."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert nursery_of(1, theirs).wait(60) == 0
