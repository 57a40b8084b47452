"""Several targets of one address family: which of them a connection goes to. Pure.

They are a *group*, named by an id with the bit GROUP in the place of a target id, and each member has an id of its own.
A member takes part while it is neither dead nor drained (bits of steerd.model, looked up anew for each connection):

    first-alive   the first one, in the order in which they are written
    round-robin   one after the other; each worker counts for itself. A client that repeats itself (a SYN that was not
                  answered) goes where it went before: conntrack remembers it there
    hash          by the client's address, all of it, or by the value of a key; where the client says no such key, by
                  its address. Consistent: when a member goes, its clients are spread over the others, and few of these
                  others' clients move; when it comes back, all is as it was before

The last is Maglev hashing (Eisenbud and others, "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI
2016, section 3.4). The table depends on nothing but the members' addresses and ports, so two gateways send a client to
the same daemon.

If no member takes part the connection is refused, and not sent to one that will not answer.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from steerd.model import DEAD, DRAINED, Flow, Keys, Policy, Reason, Target

GROUP = 1 << 31
"""Set in an id that names a group; target ids are smaller."""
MAX_MEMBERS = 100
"""Of one address family."""
SOURCE = "source"
"""In the place of a key: the client's address."""

# Slots for up to so many members. Primes, as the permutations want it; a hundred times the members, so that shares
# differ by about one in a hundred (section 5.3). How many members take part does not count: another size would move
# everybody.
_SIZES = ((10, 1021), (MAX_MEMBERS, 10007))
_MAX_TABLES = 1024
_MAX_GROUPS = 65536
_MAX_RECENT = 4096


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One target of a group."""

    id: int
    name: bytes
    """Address (4 or 16 bytes) and port (2 bytes, network order)."""
    external: bool
    """It lies in no pool, and says so."""

    @property
    def target(self) -> Target:
        return Target(ipaddress.ip_address(self.name[:-2]), int.from_bytes(self.name[-2:], "big"))


class Group(msgspec.Struct, frozen=True, array_like=True):
    """Two targets or more of one address family, and how one of them is chosen."""

    policy: Policy
    key: str
    """For "hash": SOURCE, or a key of a parser."""
    members: tuple[Member, ...]


class Chosen(NamedTuple):
    """A member, or why there is none."""

    target_id: int
    reason: Reason | None
    """DEAD or DRAINED if target_id is 0."""


class View(NamedTuple):
    """A group as one protocol's connections find it."""

    states: bytes
    """Of all members."""
    usable: tuple[int, ...]
    """Ids of members that take part, in order; for "hash" in that of their names."""
    table: bytes
    """For "hash": place in `usable` by slot."""
    reason: Reason | None
    """Why nobody takes part, if so."""


def no_group(_group_id: int) -> Group | None:
    """For those who know no groups."""
    return None


@functools.lru_cache(_MAX_TABLES)
def maglev(names: tuple[bytes, ...], size: int) -> bytes:
    """The lookup table of section 3.4: for each slot the place in `names` of the one that has it. `names` are 1 to 256,
    different and sorted; `size` is a prime, and greater than their number."""
    permutations = [blake2b(name, digest_size=16).digest() for name in names]
    offsets = [int.from_bytes(each[:8], "big") % size for each in permutations]
    skips = [int.from_bytes(each[8:], "big") % (size - 1) + 1 for each in permutations]
    return fill(offsets, skips, size)


def fill(offsets: Sequence[int], skips: Sequence[int], size: int) -> bytes:
    """Pseudocode 1 of section 3.4: members take turns, and each takes the next slot of its permutation that is free."""
    places = list(offsets)
    free = -1
    table = [free] * size
    left = size
    while True:
        for member, skip in enumerate(skips):
            place = places[member]
            while table[place] != free:
                place = (place + skip) % size
            table[place] = member
            places[member] = (place + skip) % size
            left -= 1
            if not left:
                return bytes(table)


def table_size(members: int) -> int:
    """How many slots the table of a group with so many members has."""
    return next(size for most, size in _SIZES if members <= most)


def view(group: Group, protocol: int, states: bytes) -> View:
    """Who takes part when members have these states."""
    bad = DRAINED | DEAD[protocol]
    members = [member for member, state in zip(group.members, states, strict=True) if not state & bad]
    if not members:
        all_drained = all(state & DRAINED for state in states)
        return View(states, (), b"", Reason.DRAINED if all_drained else Reason.DEAD)
    table = b""
    if group.policy == "hash":
        members.sort(key=lambda member: member.name)
        table = maglev(tuple(member.name for member in members), table_size(len(group.members)))
    return View(states, tuple(member.id for member in members), table, None)


class _Known:
    """A group that was asked for before."""

    __slots__ = ("group", "ids", "turn", "views")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.ids = tuple(member.id for member in group.members)
        self.views: dict[int, View] = {}
        self.turn = 0


class Chooser:
    """Chooses, and remembers what it needs for that: whose turn it is, and tables. One for a worker's life: what a
    group id means never changes. `find` looks a group up, `state` the state of a target."""

    def __init__(self, find: Callable[[int], Group | None], state: Callable[[int], int]) -> None:
        self._find = find
        self._state = state
        self._groups: dict[int, _Known] = {}
        # Two generations, so that what is a while ago is forgotten without a clock.
        self._recent: dict[tuple[int, Flow], int] = {}
        self._recent_before: dict[tuple[int, Flow], int] = {}

    def choose(self, group_id: int, protocol: int, source: bytes, keys: Keys, flow: Flow | None) -> Chosen:
        """The member that a connection goes to. `source` is the packed client address, whoever names it; `flow` the
        packet's 4-tuple; None: it repeats nothing (a query). Raises LookupError for a group that is not there."""
        known = self._groups.get(group_id) or self._take_up(group_id)
        states = bytes(map(self._state, known.ids))
        found = known.views.get(protocol)
        if found is None or found.states != states:
            found = known.views[protocol] = view(known.group, protocol, states)
        if found.reason is not None:
            return Chosen(0, found.reason)
        match known.group.policy:
            case "first-alive":
                return Chosen(found.usable[0], None)
            case "hash":
                key = known.group.key
                text = None if key == SOURCE else keys.get(key)
                value = source if text is None else text.encode("utf-8", "surrogatepass")
                slot = int.from_bytes(blake2b(value, digest_size=8).digest(), "big") % len(found.table)
                return Chosen(found.usable[found.table[slot]], None)
        return Chosen(self._next(group_id, known, found.usable, flow), None)

    def key(self, group_id: int) -> str:
        """By what a group chooses, if by a hash: SOURCE, or a key of a parser. Raises LookupError as `choose` does."""
        return (self._groups.get(group_id) or self._take_up(group_id)).group.key

    def _next(self, group_id: int, known: _Known, usable: Sequence[int], flow: Flow | None) -> int:
        before = None
        if flow is not None:
            before = self._recent.get((group_id, flow)) or self._recent_before.get((group_id, flow))
        if before is not None and before in usable:
            return before
        target_id = usable[known.turn % len(usable)]
        known.turn += 1
        if flow is not None:
            if len(self._recent) >= _MAX_RECENT:
                self._recent_before, self._recent = self._recent, {}
            self._recent[group_id, flow] = target_id
        return target_id

    def _take_up(self, group_id: int) -> _Known:
        group = self._find(group_id)
        if group is None:
            raise LookupError(f"group {group_id} is in the plan or a route, but not among the registry's groups")
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        known = self._groups[group_id] = _Known(group)
        return known
