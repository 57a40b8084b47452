"""Becomes a daemon that was woken: `python -I -S launch.py JOB`, a program of its own that imports nothing of steerd.

JOB is JSON: {"uid", "gid", "groups", "command", "environment"}. It waits until its standard input says "go" (by then
the main process has written down who this process is; if it dies before that, so does this one), gives up everything
that root has, and runs the command, without a shell. Exit status 126: it could not give it up, 127: there is no such
command.
"""

import ctypes
import json
import os
import sys

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_EPERM, _EINVAL = 1, 22
GO = b"go\n"


def _give_up_everything(uid: int, gid: int, groups: list[int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, *arguments: int) -> int:
        filled = (*arguments, 0, 0, 0, 0)[:4]
        return 0 if libc.prctl(option, *map(ctypes.c_ulong, filled)) == 0 else ctypes.get_errno()

    for capability in range(64):
        error = prctl(_PR_CAPBSET_DROP, capability)
        if error in (_EINVAL, _EPERM):
            # Beyond the last one that this kernel knows; or it may not be lowered, and no_new_privs must do.
            break
        if error:
            raise OSError(error, "prctl")
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # struct __user_cap_header_struct, and two of struct __user_cap_data_struct: nothing permitted, nothing inheritable.
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
    for option, *arguments in ((_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL), (_PR_SET_NO_NEW_PRIVS, 1)):
        error = prctl(option, *arguments)
        if error:
            raise OSError(error, "prctl")


def main() -> None:
    """See above."""
    job = json.loads(sys.argv[1])
    if os.read(0, len(GO)) != GO:
        sys.exit(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.closerange(3, 1 << 20)
    os.chdir("/")
    os.umask(0o022)
    try:
        _give_up_everything(job["uid"], job["gid"], job["groups"])
    except OSError:
        sys.exit(126)
    try:
        os.execvpe(job["command"][0], job["command"], job["environment"])
    except OSError:
        sys.exit(127)


if __name__ == "__main__":
    main()
