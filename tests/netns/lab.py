"""Hosts for tests: network namespaces joined by veth pairs, with nothing of the machine's own network in them.

Names begin with `st` and this process's number, so that a leaked one is seen and `sweep` can remove it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def sh(command: str, *, check: bool = True) -> str:
    """Run a shell command and return its standard output; raises CalledProcessError (with stderr in it) on failure."""
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, check=False, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}: {command}\n{done.stdout}{done.stderr}")
    return done.stdout


def _setns(path: str) -> None:
    with open(path) as handle:
        if _libc.setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", path)


class Host:
    """One network namespace. `sh` runs a shell command in it; `entered` moves this thread into it for a while."""

    def __init__(self, role: str) -> None:
        self.name = f"st{os.getpid()}-{next(_numbers)}-{role}"
        self._make()
        try:
            sh(f"ip -n {self.name} link set lo up")
            # Duplicate address detection would keep every IPv6 address silent for its first second or two.
            self.sh("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        sh(f"ip netns add {self.name}")

    def sh(self, command: str, *, check: bool = True) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, "bash", "-ec", command],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{self.name}: exit {done.returncode}: {command}\n{done.stdout}{done.stderr}")
        return done.stdout

    def command(self, *argv: str) -> list[str]:
        """`argv` so that it runs in this namespace (for Popen)."""
        return ["ip", "netns", "exec", self.name, *argv]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread sees the namespace's network until the block ends. Sockets opened inside stay there."""
        with open("/proc/thread-self/ns/net") as before:
            _setns(f"/run/netns/{self.name}")
            try:
                yield
            finally:
                if _libc.setns(before.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns back")

    def close(self) -> None:
        """Kill what still runs inside, then remove the namespace."""
        for pid in sh(f"ip netns pids {self.name}", check=False).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        sh(f"ip netns del {self.name}")


def link(left: Host, left_if: str, right: Host, right_if: str) -> None:
    """A veth pair between two hosts, both ends up."""
    sh(
        f"ip link add {left_if} netns {left.name} type veth peer name {right_if} netns {right.name} && "
        f"ip -n {left.name} link set {left_if} up && ip -n {right.name} link set {right_if} up"
    )


def leaked() -> list[str]:
    """Namespaces of this process that are still there."""
    prefix = f"st{os.getpid()}-"
    return [entry.name for entry in Path("/run/netns").glob(f"{prefix}*")] if Path("/run/netns").is_dir() else []
