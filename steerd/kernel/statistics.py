"""What the kernel itself counts of this network namespace, beside the table and the queues."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from steerd.errors import KernelError

_SYNPROXY = Path("/proc/thread-self/net/stat/synproxy")
_CONNTRACK = Path("/proc/sys/net/netfilter")


class Conntrack(NamedTuple):
    """How full conntrack's table is."""

    entries: int
    max: int
    """0: there is no limit."""


def synproxy() -> dict[str, int]:
    """What synproxy counted, over all CPUs, by the kernel's own names (net/netfilter/nf_synproxy_core.c,
    synproxy_cpu_seq_show); {} where it was never used. Each CPU's counts are 32 bits wide, and begin again at 0."""
    try:
        names, *cpus = _SYNPROXY.read_text().splitlines()
    except FileNotFoundError:
        return {}
    columns = zip(names.split(), *(line.split() for line in cpus), strict=True)
    # The first column has been 0 for ever.
    return {name: sum(int(count, 16) for count in counts) for name, *counts in columns if name != "entries"}


def conntrack() -> Conntrack:
    """Raises KernelError where there is no conntrack."""
    try:
        return Conntrack(*(int((_CONNTRACK / f"nf_conntrack_{name}").read_text()) for name in ("count", "max")))
    except OSError as error:
        raise KernelError(f"{error.filename} cannot be read: {error.strerror}") from error
