"""Giving up what a process that began as root does not need (capabilities(7), prctl(2))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import resource
import struct

from steerd.errors import SteerdError

CAP_NET_BIND_SERVICE = 10
_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 8, 38
_CAPABILITY_VERSION_3 = 0x20080522
_MOST_DESCRIPTORS = 1 << 20


def become(user: str, capabilities: tuple[int, ...]) -> None:
    """Be this user, with its groups, for good, with these capabilities (of the first 32) and no others. Raises
    SteerdError if there is no such user, or the kernel refuses."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise SteerdError(f"there is no user {user} on this machine") from None
    try:
        _prctl(_PR_SET_KEEPCAPS, 1)
        os.initgroups(user, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
        _keep_capabilities(sum(1 << each for each in capabilities))
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise SteerdError(f"the process cannot become the user {user}: {error.strerror}") from error


def allow_many_descriptors() -> int:
    """Let this process open as many files as it may; returns how many that are."""
    hard = max(resource.getrlimit(resource.RLIMIT_NOFILE)[1], _MOST_DESCRIPTORS)
    with contextlib.suppress(ValueError, OSError):  # not root, or beyond fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _keep_capabilities(mask: int) -> None:
    """Effective and permitted these, none to be inherited (struct __user_cap_header_struct, __user_cap_data_struct)."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", mask, mask, 0, 0, 0, 0)
    if _libc.capset(header, data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


_libc = ctypes.CDLL(None, use_errno=True)
