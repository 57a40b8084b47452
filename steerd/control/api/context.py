"""What the operations of the API work on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from steerd.control.registry import Registry
from steerd.errors import SteerdError


class Machine(Protocol):
    """What operations need of the daemon and the kernel. The daemon is it; tests have another one."""

    async def reload(self) -> SteerdError | None:
        """Put what the configuration file says now in force, and come back when it is: with None, or, where what was in
        force stays, with why (ConfigError: the file has mistakes)."""


class Context(NamedTuple):
    """All that is known to an operation beside its request."""

    registry: Registry
    machine: Machine
