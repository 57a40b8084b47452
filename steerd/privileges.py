"""What the agent may do on this machine: the few capabilities that it keeps, each with its reason, and how it gets rid
of everything else.

It runs as a user of its own (`gateway.user`) with those capabilities in `NEEDS` that its configuration asks for; so do
its workers and what else it starts (nft). Under systemd that is what steerd.service gives it. Started by hand as root,
it goes there by itself: `prepare` does what only root can do, then it lets go (`settle`). If there is no such user it
stays root, with these capabilities only.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from steerd.config import Config
from steerd.errors import SteerdError
from steerd.kernel import capabilities, queue
from steerd.kernel.capabilities import Capability

ROOT = "root"


class Need(NamedTuple):
    """A capability that the agent, or what it starts, cannot do without."""

    capability: Capability
    reason: str
    when: Callable[[Config], bool]
    """Whether this configuration asks for it."""


_FIRST_FREE_PORT = 1024
"""Ports below belong to CAP_NET_BIND_SERVICE (net.ipv4.ip_unprivileged_port_start, as the kernel has it)."""

NEEDS = (
    Need(Capability.NET_ADMIN, "the nft table, aliases, queues, packet marks, net.* sysctls", lambda _: True),
    Need(Capability.NET_RAW, "first payloads and datagrams go on through raw sockets", lambda _: True),
    Need(Capability.SETUID, "commands that are woken run as their own user", lambda config: config.wakes_commands),
    Need(Capability.SETGID, "... and with that user's groups", lambda config: config.wakes_commands),
    Need(Capability.KILL, "... and are stopped again", lambda config: config.wakes_commands),
    Need(
        Capability.NET_BIND_SERVICE,
        "the relay listens on gateway.relay.port, which is below 1024",
        lambda config: config.gateway.relay is not None and config.gateway.relay.port < _FIRST_FREE_PORT,
    ),
)


class Standing(NamedTuple):
    """Who the agent is once it has given up what it does not need."""

    user: str
    capabilities: tuple[str, ...]
    note: str
    """For the operator; "" if all is as it should be."""


def needed(config: Config) -> tuple[Need, ...]:
    """What of NEEDS this configuration asks for."""
    return tuple(need for need in NEEDS if need.when(config))


def lacking(config: Config) -> str:
    """A sentence about what this process would need for this configuration and does not have; "" if it has it all."""
    held = capabilities.permitted()
    absent = [need for need in needed(config) if need.capability not in held]
    if not absent:
        return ""
    listed = " and ".join(f"{need.capability} ({need.reason})" for need in absent)
    names = " ".join(str(need.capability) for need in absent)
    return (
        f"{config.file}: what is configured needs {listed}, which this process does not have: start it as root, or have"
        f" systemd grant it (systemctl edit steerd: AmbientCapabilities={names} and CapabilityBoundingSet={names} under"
        " [Service]), and restart it"
    )


def prepare(config: Config) -> None:
    """As root: what the agent's user cannot do for itself. May be done again, at any time.

    Makes state_dir and run_dir, hands them over with all that is in them (a run as another user may have left it), and
    lets the user's group read how full the queues are.
    """
    account = _account(config.gateway.user)
    uid, gid = (account.pw_uid, account.pw_gid) if account else (0, 0)
    for key, name in (("state_dir", config.gateway.state_dir), ("run_dir", config.gateway.run_dir)):
        try:
            _hand_over(key, Path(name), uid, gid)
        except OSError as error:
            raise SteerdError(f"{config.file}: gateway.{key}: {name} cannot be prepared: {error.strerror}") from error
    if gid:
        queue.let_group_look(gid)


def settle(config: Config) -> Standing:
    """Give up all but what this configuration needs, for good. As root: `prepare`, and become `gateway.user`.

    Before the first thread. Raises SteerdError if something needed is lacking, or would be after the drop.
    """
    if sentence := lacking(config):
        raise SteerdError(sentence)
    name, note, become = config.gateway.user, "", None
    if os.geteuid() == 0:
        prepare(config)
    if os.geteuid() == 0 and name != ROOT:
        account = _account(name)
        if account is not None:
            become = (account.pw_uid, account.pw_gid, os.getgrouplist(account.pw_name, account.pw_gid))
        else:
            note = f"there is no user {name}: it stays root, with these capabilities only"
    kept = [need.capability for need in needed(config)]
    capabilities.limit(kept, become)
    for path, use, mode in (
        (config.file, "a reload must read it", os.R_OK),
        (sys.executable, "workers are started with it", os.X_OK),
        (__file__, "workers are made of it", os.R_OK),
    ):
        if not os.access(path, mode, effective_ids=True):
            raise SteerdError(
                f"{path} cannot be read by the user {_user_name()}, and {use}: put it where that user can read it, or"
                ' write user = "root" under [gateway]'
            )
    return Standing(_user_name(), tuple(map(str, kept)), note)


def _account(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


# Where one of these is, a directory is steerd's.
_OURS = {"registry", "lock", "sysctls"}


def _hand_over(key: str, directory: Path, uid: int, gid: int) -> None:
    """Make a directory, or give it and what is in it to a user. Neither a link nor a name that changes meanwhile leads
    anywhere else: what is in it, or beside it, may be that user's doing already."""
    with contextlib.ExitStack() as held:
        top = _opened(key, directory, held)
        names = set(os.listdir(top))  # noqa: PTH208 (a path may lead elsewhere by now)
        if os.fstat(top).st_uid != uid and names and not names & _OURS:
            raise SteerdError(
                f"gateway.{key}: {directory} holds files that are not steerd's, and would be given to its user; name a"
                " directory that is steerd's alone"
            )
        for place, subdirectories, files, descriptor in os.fwalk(".", dir_fd=top):
            _give(directory / place, ".", descriptor, uid, gid)
            for name in (*files, *subdirectories):
                _give(directory / place / name, name, descriptor, uid, gid)


def _opened(key: str, directory: Path, held: contextlib.ExitStack) -> int:
    """A descriptor of a directory, which is made if need be, by way of links that only root can have put there."""
    there = _held(held, os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    for part in directory.parts[1:]:
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, dir_fd=there)
        found = os.stat(part, dir_fd=there, follow_symlinks=False)
        follow = stat.S_ISLNK(found.st_mode)
        if follow and (found.st_uid, os.fstat(there).st_uid) != (0, 0):
            raise SteerdError(
                f"gateway.{key}: {part} in {directory} is a link that others than root can make or change"
            )
        flags = os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
        there = _held(held, os.open(part, flags, dir_fd=there))
    return there


def _held(held: contextlib.ExitStack, descriptor: int) -> int:
    held.callback(os.close, descriptor)
    return descriptor


def _give(path: Path, name: str, directory: int, uid: int, gid: int) -> None:
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISLNK(found.st_mode):
            # Those of control.claims lead nowhere.
            if uid == 0 and found.st_uid != 0 and "/" in os.readlink(name, dir_fd=directory):
                raise SteerdError(f"{path} is a link that root would follow, and root did not make it: remove it")
        # A file with two names may be somebody else's by the other one.
        elif found.st_uid != uid and (found.st_nlink == 1 or stat.S_ISDIR(found.st_mode)):
            os.chown(f"/proc/self/fd/{descriptor}", uid, gid)
    finally:
        os.close(descriptor)
