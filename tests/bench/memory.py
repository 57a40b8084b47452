"""What connections cost in memory: the kernel's objects, by what they are for, and the processes of a system.

The kernel's objects are those of the whole machine (/proc/slabinfo), so others must be quiet, and what is told is the
difference between two moments. A process's memory is its share (Pss) of what is resident.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_GROUPS = {
    "conntrack": ("nf_conntrack",),
    "sockets": ("TCP", "TCPv6", "request_sock_TCP", "request_sock_TCPv6", "tcp_bind_bucket", "tcp_bind2_bucket"),
    "files": ("sock_inode_cache", "filp", "dentry", "lsm_inode_cache", "lsm_file_cache"),
    "epoll": ("eventpoll_epi", "eventpoll_pwq", "ep_head"),
}
"""Caches by what they hold. What is allocated by size alone (`kmalloc-...`) is a group of its own: conntrack's
extensions are there, and parts of sockets."""
BY_SIZE = "by_size"


class Memory(NamedTuple):
    """Bytes at one moment, or the difference between two."""

    processes: int
    kernel: dict[str, int]
    """By group."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.processes + sum(self.kernel.values())

    def since(self, before: Memory) -> Memory:
        """The difference."""
        kernel = {name: size - before.kernel[name] for name, size in self.kernel.items()}
        return Memory(self.processes - before.processes, kernel)


def taken(pids: Iterable[str]) -> Memory:
    """Now; `pids`: the system's processes."""
    group_of = {cache: group for group, caches in _GROUPS.items() for cache in caches}
    kernel = dict.fromkeys((*_GROUPS, BY_SIZE), 0)
    for row in Path("/proc/slabinfo").read_text().splitlines()[2:]:
        name, objects, _, size = row.split()[:4]
        group = group_of.get(name, BY_SIZE if name.startswith("kmalloc-") else None)
        if group is not None:
            kernel[group] += int(objects) * int(size)
    return Memory(sum(share(pid) for pid in pids), kernel)


def share(pid: str) -> int:
    """A process's share of resident memory in bytes: pages that several map are divided among them."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(row for row in rows if row.startswith("Pss:")).split()[1]) * 1024


def cpu_seconds(pids: Iterable[str]) -> float:
    """CPU time of processes so far, to the nanosecond (/proc/PID/task/*/schedstat; threads that have ended do not
    count)."""
    tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
