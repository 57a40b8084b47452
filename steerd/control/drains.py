"""Drains: targets that take no new connections. What goes on there goes on, until its end.

  drains   address (4 or 16) | port u16, or none   ->  seconds since the epoch u64, when it was asked for

A drain is of one target, written as in a route (`10.64.0.1:8080`, `10.64.0.1:same`), or of a whole alias
(`10.64.0.1`). It is on the disk before it is acknowledged, outlives restarts and reloads, and ends by `remove` only: an
alias that changes hands stays drained.

Workers do not look here. They see the bit DRAINED in the states of target ids (control.states), which is set for every
id that a drain is for: of ids that there are, when a drain comes or a configuration is put in force; of new ones,
before the transaction that gives them is on the disk, so that no route leads to a drained target even for a moment.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import lmdb
import msgspec

from steerd.config import Config
from steerd.control.places import Place, parse_place
from steerd.control.routes import RouteTable
from steerd.control.states import States
from steerd.control.store import IdGiver, Store
from steerd.core.engine import IdBlock
from steerd.core.pools import Block
from steerd.errors import RequestError
from steerd.model import DRAINED

_PORT = struct.Struct("!H")
_SINCE = struct.Struct("!Q")


class DrainView(msgspec.Struct, frozen=True):
    """One drain for people and programs outside."""

    target: str
    since: int
    """Seconds since the epoch."""


class DrainLine(msgspec.Struct, frozen=True, tag_field="kind", tag="drain"):
    """One drain in an export."""

    target: str
    since: int


class _Arithmetic(NamedTuple):
    """Aliases that `extension_pool` leads to."""

    block: Block
    port: int
    ids: IdBlock


class DrainTable:
    """The writer's side. Its methods may be called from any thread."""

    def __init__(self, store: Store, routes: RouteTable, states: States | None) -> None:
        """`states`: what workers see; None: there are no workers."""
        self._store = store
        self._routes = routes
        self._states = states
        self._table = store.env.open_db(b"drains")
        # What follows changes under the store's lock.
        self._drains: dict[Place, int] = {}
        self._arithmetic: list[_Arithmetic] = []
        self._marked: set[int] = set()
        with store.env.begin() as txn, txn.cursor(db=self._table) as cursor:
            for key, value in cursor:
                self._drains[_place(key)] = _SINCE.unpack(value)[0]
        store.on_new_ids = self._on_new_ids

    def publish(self, txn: lmdb.Transaction[bytes], ids: IdGiver, config: Config) -> Callable[[], None]:
        """Let a configuration's targets be drained as they should be, inside the transaction that puts it in force.

        Returns what to call, still under the store's lock, once the transaction is on the disk.
        """
        arithmetic = [
            _Arithmetic(block, pool.port, ids.for_block(block, pool.port))
            for service in config.services
            if (pool := service.extension_pool) is not None
            for version in (4, 6)
            for block in pool.pool.blocks(version)
        ]
        # What the old configuration leads to counts until then, too.
        self._mark(txn, [*self._arithmetic, *arithmetic])

        def took_effect() -> None:
            self._arithmetic = arithmetic

        return took_effect

    def add(self, target: str, now: float) -> tuple[DrainView, bool]:
        """Let a target take no new connections. Returns the drain, and whether it is new. Raises RequestError for what
        is no target here."""
        place = parse_place(target)
        with self._store.lock:
            with self._store.writing() as txn:
                self._check(txn, place)
                since = self._drains.get(place)
                if since is None:
                    txn.put(_key(place), _SINCE.pack(int(now)), db=self._table)
            if since is not None:
                return DrainView(str(place), since), False
            self._drains[place] = int(now)
            self._mark_again()
            return DrainView(str(place), int(now)), True

    def restore(self, txn: lmdb.Transaction[bytes], line: DrainLine) -> Callable[[], None] | None:
        """Write a line of an export down, inside a transaction. Returns what to call, still under the store's lock,
        once that is on the disk; None: it is there already. Raises RequestError."""
        place = parse_place(line.target)
        self._check(txn, place)
        if self._drains.get(place) == line.since:
            return None
        txn.put(_key(place), _SINCE.pack(line.since), db=self._table)

        def took_effect() -> None:
            self._drains[place] = line.since
            self._mark_again()

        return took_effect

    def lines(self, txn: lmdb.Transaction[bytes]) -> Iterator[DrainLine]:
        """All drains, by address and port."""
        with txn.cursor(db=self._table) as cursor:
            for key, value in cursor:
                yield DrainLine(str(_place(key)), _SINCE.unpack(value)[0])

    def remove(self, target: str) -> None:
        """Let a target take connections again. Raises RequestError if it is not drained."""
        place = parse_place(target)
        with self._store.lock:
            if place not in self._drains:
                raise RequestError("not_found", "target", f"{place} is not drained.")
            with self._store.writing() as txn:
                txn.delete(_key(place), db=self._table)
            del self._drains[place]
            self._mark_again()

    def get(self, target: str) -> DrainView:
        """One drain. Raises RequestError if there is none."""
        place = parse_place(target)
        with self._store.lock:
            since = self._drains.get(place)
        if since is None:
            raise RequestError("not_found", "target", f"{place} is not drained.")
        return DrainView(str(place), since)

    def all(self) -> list[DrainView]:
        """All drains, by address and port."""
        with self._store.lock:
            found = sorted(self._drains.items(), key=lambda item: _key(item[0]))
        return [DrainView(str(place), since) for place, since in found]

    def _check(self, txn: lmdb.Transaction[bytes], place: Place) -> None:
        """Whether a drain means something; a slip of the pen must not look like one that does."""
        known = [*self._ids(txn, Place(place.address, None), self._arithmetic)]
        if not known and not self._routes.force.places.in_pool(place.address):
            raise RequestError("not_found", "target", f"{place.address} is in no pool, and nothing leads there.")
        if place.port and [*self._ids(txn, Place(place.address, 0), self._arithmetic)]:
            raise RequestError(
                "conflict",
                "target",
                f"{place.address}:same, which is or was a target, keeps the port that the client used; drain"
                f" {place.address} as a whole.",
            )

    def _on_new_ids(self, block: Block, port: int, ids: IdBlock) -> None:
        """Ids that are being given mean nothing yet, or what a transaction that failed made of them."""
        if self._states is None or not (self._drains or self._marked):
            return
        self._marked.difference_update(range(ids.first_id, ids.first_id + ids.length))
        self._states.clear(ids.first_id, ids.length)
        for place in self._drains:
            self._set(set(_within(place, _Arithmetic(block, port, ids))), True)

    def _mark_again(self) -> None:
        with self._store.env.begin() as txn:
            self._mark(txn, self._arithmetic)
        self._store.on_answers_changed()

    def _mark(self, txn: lmdb.Transaction[bytes], arithmetic: list[_Arithmetic]) -> None:
        """Let states say of every id what drains say."""
        wanted = {id_ for place in self._drains for id_ in self._ids(txn, place, arithmetic)}
        gone = self._marked - wanted
        self._set(wanted - self._marked, True)
        self._set(gone, False)

    def _set(self, ids: set[int], on: bool) -> None:
        if self._states is None:
            return
        for id_ in ids:
            self._states.put(id_, DRAINED, on)
        self._marked = self._marked | ids if on else self._marked - ids

    def _ids(self, txn: lmdb.Transaction[bytes], place: Place, arithmetic: list[_Arithmetic]) -> Iterator[int]:
        """The ids that mean a place; of arithmetic, those that these blocks have."""
        yield from self._store.ids_at(txn, place.address, place.port)
        for each in arithmetic:
            yield from _within(place, each)


def _within(place: Place, aliases: _Arithmetic) -> Iterator[int]:
    """The id in a block that means a place."""
    index = int(place.address) - int(aliases.block.first)
    same_family = place.address.version == aliases.block.first.version
    if same_family and 0 <= index < aliases.block.length and place.port in (None, aliases.port):
        yield aliases.ids.first_id + index


def _key(place: Place) -> bytes:
    return place.address.packed + (b"" if place.port is None else _PORT.pack(place.port))


def _place(key: bytes) -> Place:
    width = 4 if len(key) < 16 else 16
    port = _PORT.unpack_from(key, width)[0] if len(key) > width else None
    return Place(ipaddress.ip_address(bytes(key[:width])), port)
