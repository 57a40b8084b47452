"""What the operations of the API work on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

from msgspec import Meta, Struct

from steerd.config import Config
from steerd.control.flows import Entry
from steerd.control.registry import Registry
from steerd.errors import SteerdError
from steerd.model import IPAddress, Target


class WorkerStatus(Struct, frozen=True):
    """One worker and its queue. Numbers are null where the queue is not bound, or cannot be looked at."""

    worker: int
    queue: int
    is_bound: bool
    owner: int | None
    """The netlink port of who bound it, nearly always its process id."""
    waiting: int | None
    """Packets."""
    queue_dropped: int | None
    """Packets, since the queue was bound: it was full."""
    socket_dropped: int | None
    """Packets, since the queue was bound: the netlink socket was full."""


class ConntrackUse(Struct, frozen=True):
    """How full conntrack is, with everybody's entries."""

    entries: int
    limit: int


class Machinery(Struct, frozen=True):
    """How the daemon and the kernel stand."""

    version: str
    pid: int
    started: float
    """Seconds since the epoch."""
    refused_reload: str | None
    """What was wrong when the last reload was refused: the file and its keys; null: it was not refused."""
    workers: list[WorkerStatus]
    decisions: dict[str, int]
    """By reason, over all workers."""
    counters: dict[str, int]
    """What else workers count, over all of them."""
    gauges: dict[str, int]
    """What is undecided in the workers now, over all of them."""
    kernel: dict[str, int] | None
    """The table's counters, in packets; null: they cannot be read."""
    conntrack: ConntrackUse | None
    """Null: it cannot be read."""


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What is logged."""

    level: Literal["debug", "info", "warning", "error"]
    """The least that is logged."""
    access_log: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    """Decisions: 0 none but those that failed, 1 every one, N one of N."""


class Machine(Protocol):
    """What operations need of the daemon and the kernel. The daemon is it; tests have another one."""

    async def reload(self) -> SteerdError | None:
        """Put what the configuration file says now in force, and come back when it is: with None, or, where what was in
        force stays, with why (ConfigError: the file has mistakes)."""

    def status(self) -> Machinery:
        """How all stands now. Called in a thread."""

    def target_state(self, target_id: int) -> int:
        """What is known of a target: bits of model.DRAINED, model.DEAD. Called in a thread."""

    def listening(self, targets: Sequence[Target]) -> list[list[int]]:
        """Of each target the protocols (model.TCP, model.UDP) in which a socket of this host takes connections there
        now; of one that keeps the client's port, none. Called in a thread. Raises KernelError."""

    def elsewhere(self, addresses: Collection[IPAddress]) -> set[IPAddress]:
        """Those that are not addresses of this machine now. Called in a thread. Raises KernelError."""

    def log_settings(self) -> LogSettings:
        """What is logged now."""

    def put_log_settings(self, settings: LogSettings) -> None:
        """Log this from now on, in all processes, until the daemon ends, or a reload brings another
        setting."""

    def entries(self, answered_by: bytes) -> Generator[Entry, None, None]:
        """Every connection and flow of datagrams that conntrack translates; only those that an address (packed)
        answers, unless it is empty. Raises KernelError."""

    def end_flows(self, answered_by: bytes, is_wanted: Callable[[Entry], bool]) -> int:
        """End those of `entries` that are wanted; how many were ended. Raises KernelError."""


class Context(NamedTuple):
    """All that is known to an operation beside its request."""

    registry: Registry
    machine: Machine

    @property
    def config(self) -> Config:
        """The configuration in force. Raises RegistryError if there is none yet."""
        return self.registry.routes.force.config
