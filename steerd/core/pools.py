"""Pools: prefixes whose addresses are aliases, numbered from 0 in each address family by itself.

Every address of a prefix counts, the first and the last one too: an alias is a host route of its own (/32, /128), so
nothing in a prefix is a "network" or a "broadcast" address.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Literal, NamedTuple

from steerd.core.wake import Wake
from steerd.model import IPAddress, IPNetwork

Mode = Literal["addresses", "anyip"]


class Block(NamedTuple):
    """`length` consecutive addresses from `first` on."""

    first: IPAddress
    length: int


class Pool(NamedTuple):
    """Prefixes in the order they were written; `size` (if any) keeps the first so many addresses of each family."""

    name: str
    prefixes: tuple[IPNetwork, ...]
    mode: Mode = "addresses"
    size: int | None = None
    quarantine: int = 600
    """Seconds for which an alias whose lease has ended is not leased to another name."""
    wake: Wake | None = None
    """How the daemons of its aliases are started when a connection comes; None: they are not."""

    def blocks(self, version: int) -> list[Block]:
        """The pool's aliases of one address family (4 or 6) as runs of consecutive addresses, in index order."""
        left = self.size
        blocks = []
        for prefix in self.prefixes:
            if prefix.version != version:
                continue
            count = prefix.num_addresses if left is None else min(left, prefix.num_addresses)
            if count:
                blocks.append(Block(prefix.network_address, count))
            left = None if left is None else left - count
        return blocks

    def alias_count(self, version: int) -> int:
        """How many aliases of one address family the pool has."""
        return sum(block.length for block in self.blocks(version))

    def address(self, version: int, index: int) -> IPAddress:
        """The alias with this index; raises IndexError outside 0 .. alias_count - 1."""
        if index >= 0:
            for block in self.blocks(version):
                if index < block.length:
                    return block.first + index
                index -= block.length
        raise IndexError(f"pool {self.name} has no such IPv{version} alias")

    def place_of(self, address: IPAddress) -> int | None:
        """Which of the pool's aliases of its family an address is; None: it is none."""
        passed = 0
        for first, length in self.blocks(address.version):
            if 0 <= int(address) - int(first) < length:
                return passed + int(address) - int(first)
            passed += length
        return None

    def __contains__(self, address: object) -> bool:
        """Whether an address is one of the pool's aliases."""
        return isinstance(address, IPAddress) and self.place_of(address) is not None


class _Span(NamedTuple):
    """Aliases of a pool in a row, as numbers."""

    first: int
    last: int
    pool: Pool
    place: int
    """Index of the first one in its pool."""


class PoolMap:
    """Which alias of which pool an address is; made once to be asked about many. The pools must not overlap."""

    def __init__(self, pools: Iterable[Pool]) -> None:
        self._spans: dict[int, list[_Span]] = {4: [], 6: []}
        for pool in pools:
            for version, spans in self._spans.items():
                index = 0
                for first, length in pool.blocks(version):
                    spans.append(_Span(int(first), int(first) + length - 1, pool, index))
                    index += length
        for spans in self._spans.values():
            spans.sort(key=lambda span: span[:2])
        self._firsts = {version: [span.first for span in spans] for version, spans in self._spans.items()}

    def find(self, address: IPAddress) -> tuple[Pool, int] | None:
        """The pool, and the alias's index in it; None: the address is in none."""
        number = int(address)
        at = bisect_right(self._firsts[address.version], number) - 1
        if at < 0:
            return None
        first, last, pool, place = self._spans[address.version][at]
        return (pool, place + number - first) if number <= last else None

    def runs(self, version: int) -> list[tuple[int, int]]:
        """The first and the last address of each run of aliases, as numbers, in ascending order."""
        return [(span.first, span.last) for span in self._spans[version]]
