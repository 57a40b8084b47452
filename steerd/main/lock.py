"""Only one steerd runs here."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, NamedTuple

from steerd.errors import KernelError, SteerdError
from steerd.kernel import queue


class RunsAlreadyError(SteerdError):
    """Another steerd has the lock."""

    def __init__(self, process: str, path: Path) -> None:
        super().__init__(f"steerd runs already, as process {process} (it holds {path})")
        self.process = process


class Lock(NamedTuple):
    """What only one steerd can hold: the file in its run_dir, which names it, and a queue, of which each network
    namespace has one. Two daemons with different directories would take each other's aliases away."""

    file: IO[str]
    reservation: queue.Reservation

    def release(self) -> None:
        """Let another one run."""
        self.reservation.close()
        self.file.close()


def take_lock(run_dir: str) -> Lock:
    """Make sure that no other steerd runs here; raises SteerdError naming the process that does."""
    path = Path(run_dir) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError as error:
        raise SteerdError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with handle:
            handle.seek(0)
            raise RunsAlreadyError(handle.read().strip(), path) from None
    try:
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
    except OSError as error:
        raise SteerdError(f"{path} cannot be written: {error.strerror}") from error
    try:
        return Lock(handle, queue.Reservation())
    except KernelError as error:
        handle.close()
        raise SteerdError(
            f"{error}: another steerd, with another run_dir, runs in this network namespace already, or this one may"
            " not use queues at all (it takes CAP_NET_ADMIN)"
        ) from None
