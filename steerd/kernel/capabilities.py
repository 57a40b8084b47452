"""A process's user and capabilities: looking at them, and giving all but a few up for good (capabilities(7)).

Capabilities belong to a thread. Call `limit` before there is a second one.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Collection
from pathlib import Path

from steerd.errors import KernelError

# linux/prctl.h and linux/capability.h
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 4, 8, 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 2, 4
_VERSION_3 = 0x20080522
_SETPCAP = 8

_libc = ctypes.CDLL(None, use_errno=True)


class Capability(enum.IntEnum):
    """Those that steerd may have a use for, by their numbers in linux/capability.h."""

    KILL = 5
    SETGID = 6
    SETUID = 7
    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    NET_RAW = 13

    def __str__(self) -> str:
        return f"CAP_{self.name}"


def effective() -> set[int]:
    """Numbers of the capabilities that count for this thread now."""
    return _of_status("CapEff")


def permitted() -> set[int]:
    """Numbers of the capabilities that this thread has or may take up."""
    return _of_status("CapPrm")


def limit(kept: Collection[Capability], account: tuple[int, int, list[int]] | None) -> None:
    """Keep these capabilities, and never get another one, nor anything that is executed from here on.

    `account`: uid, gid and all groups of the user to become, None to stay who it is. Raises KernelError, after which
    the process must end: part of it may be done.
    """
    for number in range(_last() + 1):
        # Who may not lower the bound gains nothing by a high one: that is what no_new_privs is for.
        if number not in kept and _SETPCAP in permitted() and _prctl(_PR_CAPBSET_READ, number):
            _prctl(_PR_CAPBSET_DROP, number)
    if account is not None:
        uid, gid, groups = account
        _prctl(_PR_SET_KEEPCAPS, 1)
        try:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            raise KernelError(f"user {uid} cannot be become: {error.strerror}") from error
        # Otherwise /proc/self belongs to root from now on.
        _prctl(_PR_SET_DUMPABLE, 1)
    _capset(kept)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in kept:
        # What is executed (workers, nft) has them by this, whoever we are.
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _of_status(name: str) -> set[int]:
    status = Path("/proc/thread-self/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")), 16)
    return {number for number in range(64) if mask >> number & 1}


def _last() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def _prctl(option: int, *arguments: int) -> int:
    four = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    result: int = _libc.prctl(option, *four)
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise KernelError(f"privileges cannot be given up: prctl {option} {arguments}: {reason}")
    return result


def _capset(kept: Collection[Capability]) -> None:
    """Permitted, effective and inheritable alike."""
    mask = sum(1 << capability for capability in kept)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    if _libc.capset(header, (ctypes.c_uint32 * 6)(low, low, low, high, high, high)):
        reason = os.strerror(ctypes.get_errno())
        raise KernelError(f"privileges cannot be given up: capset to {mask:#x}: {reason}")
