"""The main process's side of the relay: starts it when there is something to listen on, and again whenever it dies, and
tells it what to listen on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import structlog

from steerd.errors import KernelError
from steerd.kernel import python
from steerd.main import back_off
from steerd.main.back_off import BackOff
from steerd.relay.engine import Listen

_ANSWER_SECONDS = 15.0
# One that a main process left behind, killed a moment ago, may still hold the addresses.
_BIND_SECONDS = 5.0
_BETWEEN_TRIES = 0.1
_LONGEST_ANSWER = 1 << 26


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Keeper:
    """Lives in the main process's event loop."""

    def __init__(self, log: structlog.typing.FilteringBoundLogger) -> None:
        self._log = log
        self._wanted: list[Listen] = []
        self._is_wanted = asyncio.Event()
        self._is_up = asyncio.Event()
        self._running: _Running | None = None
        # One question at a time.
        self._asking = asyncio.Lock()

    async def listen(self, wanted: Sequence[Listen]) -> None:
        """Have the relay listen on these and no others. Raises KernelError if it does not listen on all of them; it
        goes on trying when it is started again."""
        self._wanted = list(wanted)
        if not wanted and not self._is_wanted.is_set():
            return
        self._is_wanted.set()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._is_up.wait()
        except TimeoutError as error:
            raise KernelError("the relay for unix sockets does not start; the log says why") from error
        assert self._running is not None
        process = self._running.process
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                failed = await self._tell()
        except (OSError, ValueError, TimeoutError) as error:
            # A late answer must not be taken for the next one.
            process.kill()
            raise KernelError("the relay for unix sockets does not answer; it is started again") from error
        if failed:
            raise KernelError(_failure(failed))

    async def keep(self) -> None:
        """Run the relay for ever. When it is cancelled the relay is let go: it ends with its last connection."""
        await self._is_wanted.wait()
        pauses = BackOff()
        while True:
            born = time.monotonic()
            try:
                self._running = await _start()
            except OSError as error:  # no memory or no process to be had: that may pass
                self._log.error("relay cannot be started", why=str(error))
                await asyncio.sleep(back_off.LONGEST_SECONDS)
                continue
            process = self._running.process
            try:
                await self._begin(process.pid)
                await _end_of(process)
            finally:
                self._is_up.clear()
                self._running.writer.close()
            pause = pauses.after(time.monotonic() - born)
            self._log.warning(
                "relay died; the connections that it copied are cut",
                pid=process.pid,
                status=process.returncode,
                again_in_seconds=pause,
            )
            await asyncio.sleep(pause)

    async def _begin(self, pid: int) -> None:
        """Have a new process listen where it must, and say if it cannot."""
        deadline = time.monotonic() + _BIND_SECONDS
        try:
            while (failed := await self._tell()) and time.monotonic() < deadline:
                await asyncio.sleep(_BETWEEN_TRIES)
        except (OSError, ValueError):  # it is dead already
            return
        if failed:
            self._log.error("relay cannot listen everywhere", why=_failure(failed))
        self._log.info("relay listens", daemons=len({each.daemon for each in self._wanted}), pid=pid)
        self._is_up.set()

    async def _tell(self) -> dict[str, str]:
        """What of `_wanted` could not be had. Raises OSError, or ValueError for what is no answer."""
        async with self._asking:
            assert self._running is not None
            _, reader, writer = self._running
            writer.write(msgspec.json.encode(self._wanted) + b"\n")
            await writer.drain()
            line = await reader.readline()
            if not line:
                raise ConnectionResetError
            return msgspec.json.decode(line, type=dict[str, str])


async def _start() -> _Running:
    """Not by asyncio.create_subprocess_exec, which kills the process when we forget it."""
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as undo:
        undo.callback(ours.close)
        with theirs:
            process = subprocess.Popen(python.command("steerd.relay"), stdin=theirs.fileno(), stdout=theirs.fileno())
        undo.callback(process.kill)
        reader, writer = await asyncio.open_connection(sock=ours, limit=_LONGEST_ANSWER)
        undo.pop_all()
    return _Running(process, reader, writer)


async def _end_of(process: subprocess.Popen[bytes]) -> None:
    """Wait for it."""
    ended = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    asyncio.get_running_loop().add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
    process.wait()


def _failure(failed: dict[str, str]) -> str:
    address, why = next(iter(failed.items()))
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"the relay for unix sockets cannot listen on {address}{more}: {why}"
