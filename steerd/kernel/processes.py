"""Daemons that are woken as commands: processes that outlive the main process, and are known again by the next one.

A daemon runs as its user, without capabilities, in a session (hence a process group) of its own, with nothing open but
/dev/null; steerd.kernel.launch says how. It must stay in the foreground: when its first process ends, it has ended, and
what is left of its group is killed.

**Never twice.** A process is told to go on only after `note` was called with its number, so whoever keeps these notes
knows of every daemon that ever ran. Numbers are used again; together with its time of birth a process has only one.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from steerd.core.wake import Starter
from steerd.errors import KernelError
from steerd.kernel import launch

_LAUNCHER = launch.__file__
_START_TIME = 22 - 3
"""Field 22 of /proc/PID/stat (proc(5)), counted from the one behind the command's name."""


class ProcessId(NamedTuple):
    """One process, and no other."""

    pid: int
    born: int
    """In clock ticks since the machine was started."""


class Process:
    """A daemon's first process. `descriptor` (a pidfd) is readable once it has ended."""

    def __init__(self, identity: ProcessId, child: subprocess.Popen[bytes] | None) -> None:
        """Raises ProcessLookupError if there is no such process any more."""
        self.id = identity
        self._child = child
        self.descriptor = os.pidfd_open(identity.pid)
        # The number might have been used again just before.
        if _born(identity.pid) != identity.born:
            os.close(self.descriptor)
            raise ProcessLookupError(identity.pid)

    def signal(self, number: signal.Signals) -> None:
        """To the daemon and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.id.pid, number)

    def bury(self) -> int | None:
        """After its end: kill what is left of its group; returns its exit status if it was ours to know."""
        self.signal(signal.SIGKILL)
        os.close(self.descriptor)
        return None if self._child is None else self._child.wait()


def start(starter: Starter, note: Callable[[ProcessId], None]) -> Process:
    """Start a command. Raises KernelError for a user that there is not, or if there can be no process now; and whatever
    `note` raises, and then nothing has been started."""
    try:
        user = pwd.getpwnam(starter.user)
    except KeyError:
        raise KernelError(f"{starter.user} is not a user of this machine.") from None
    if user.pw_uid == 0:
        raise KernelError(f"{starter.user} is root; a daemon that is woken runs as somebody else.")
    job = {
        "uid": user.pw_uid,
        "gid": user.pw_gid,
        "groups": sorted({user.pw_gid, *(g.gr_gid for g in grp.getgrall() if starter.user in g.gr_mem)}),
        "command": list(starter.command),
        "environment": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": user.pw_dir,
            "USER": starter.user,
            "LOGNAME": starter.user,
        },
    }
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", _LAUNCHER, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={},
        )
    except OSError as error:
        raise KernelError(f"{starter} cannot be started: {error.strerror}.") from error
    assert child.stdin is not None
    with child.stdin:
        try:
            process = Process(ProcessId(child.pid, _born(child.pid)), child)
            note(process.id)
        except BaseException:
            child.kill()
            child.wait()
            raise
        with contextlib.suppress(BrokenPipeError):  # it was killed a moment ago
            child.stdin.write(launch.GO)
            child.stdin.flush()
    return process


def find(identity: ProcessId) -> Process | None:
    """A process that another main process has started; None if it has ended."""
    try:
        return Process(identity, None)
    except ProcessLookupError:
        return None


def _born(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = text[text.rindex(")") + 2 :].split(" ")
    return 0 if fields[0] in "ZX" else int(fields[_START_TIME])
