"""Relays: which aliases of the relay's pool stand for which daemon on a unix socket. Pure.

A daemon has the aliases of one index of the pool, one in each address family that the pool has there, and keeps them
for as long as it is known and the pool has them. A new one gets the lowest index of whose aliases none is taken. An
alias that stands for one daemon stands for no other one, as long as anything could still lead to it: connections would
arrive at the wrong daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from steerd.core.pools import Pool
from steerd.model import IPAddress


class Seats:
    """Gives aliases while a configuration is read. What it has given is `given`, by the daemon's name."""

    def __init__(
        self,
        held: Mapping[str, tuple[IPAddress, ...]] | None = None,
        is_taken: Callable[[IPAddress, str], bool] = lambda _address, _name: False,
    ) -> None:
        """`held`: who has which aliases; `is_taken`: whether somebody else than this name has an alias."""
        self._held = held or {}
        self._is_taken = is_taken
        self.given: dict[str, tuple[IPAddress, ...]] = {}
        self._next = 0

    def place(self, name: str, pool: Pool) -> tuple[IPAddress, ...] | None:
        """The aliases of a daemon, an IPv4 one first; None: the pool has no free one."""
        if name not in self.given:
            found = self._former(name, pool) or self._free(name, pool)
            if found is None:
                return None
            self.given[name] = found
        return self.given[name]

    def _former(self, name: str, pool: Pool) -> tuple[IPAddress, ...] | None:
        """What it has, or the like, where the pool has become another one."""
        for address in self._held.get(name, ()):
            index = pool.place_of(address)
            found = () if index is None else aliases_at(pool, index)
            if found and not self._are_taken(found, name):
                return found
        return None

    def _free(self, name: str, pool: Pool) -> tuple[IPAddress, ...] | None:
        while found := aliases_at(pool, self._next):
            self._next += 1
            if not self._are_taken(found, name):
                return found
        return None

    def _are_taken(self, addresses: tuple[IPAddress, ...], name: str) -> bool:
        return any(self._is_taken(address, name) for address in addresses)


def aliases_at(pool: Pool, index: int) -> tuple[IPAddress, ...]:
    """The aliases of an index, in each family that has one there; empty behind the last one."""
    return tuple(pool.address(version, index) for version in (4, 6) if index < pool.alias_count(version))


def fits(addresses: tuple[IPAddress, ...], pool: Pool) -> bool:
    """Whether these are all aliases that the pool has at one index."""
    index = pool.place_of(addresses[0])
    return index is not None and aliases_at(pool, index) == addresses
