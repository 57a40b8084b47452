"""Leases: aliases of a pool given to names, with a route each, kept over restarts (core.leases says who gets which).

  leases    name                           ->  _Lease as msgpack
  leased    address (4 or 16)              ->  name of its lease
  released  first address (4 or 16)        ->  _Released as msgpack: who had an alias last

**In one step or not at all.** A lease is one transaction: the lease itself, the ids of its targets and its route
(control.routes). Before it, the kernel must hold the addresses, since a worker follows the route from the moment the
transaction ends; so an alias is chosen, made ready, chosen again and written down, and if the second choice is another
one, it begins anew. The kernel's verdict maps learn an id when the first connection needs it, as always.

**The end of a lease** (released, or past its time) is one transaction as well: the route and the lease go, the alias is
in quarantine for as long as its pool says. Then its flows are ended in conntrack. A worker may have looked the route up
just before and steer one more connection there; it meets the former holder, since nobody else gets the alias in
quarantine, and whatever is left of it is ended before another name gets the alias. If the main process dies in between,
`publish` finds what is in quarantine when it starts again, and ends the flows.

Times are seconds since the epoch, since they must mean something after a restart; `now` is a parameter.

A route that is put by itself cannot lead to a leased alias, and an alias that routes of their own, or the configuration
by name, lead to is not leased. `extension_pool` reaches all aliases of its pool by number, leased or not.
"""

from __future__ import annotations

import heapq
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, Protocol

import lmdb
import msgspec
from msgspec import Meta

from steerd.config import Config
from steerd.control.route_records import RouteView
from steerd.control.routes import RouteTable
from steerd.control.store import Store
from steerd.core.leases import Seats
from steerd.core.pools import Pool, PoolMap
from steerd.errors import RegistryError, RequestError
from steerd.model import IPAddress, Target

MAX_COUNT = (1 << 63) - 1
MAX_TTL = 10 * 365 * 86400
_Moment = Annotated[float, Meta(ge=0.0, le=253402300799.0)]
"""Seconds since the epoch, up to the year 9999: what later ones are called nobody says."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,127}")


class Effects(Protocol):
    """What leases need of the kernel. Called without locks, from whatever thread."""

    def make_ready(self, addresses: Sequence[IPAddress]) -> None:
        """See to it that these are addresses of this machine; raises SteerdError if they cannot be."""

    def end_flows(self, addresses: Sequence[IPAddress]) -> int:
        """End all flows that are steered to these addresses; returns how many. Raises SteerdError."""


class NoEffects:
    """For a registry without a kernel: every address is ready, and no flow leads there."""

    def make_ready(self, addresses: Sequence[IPAddress]) -> None:
        """Nothing to do."""

    def end_flows(self, addresses: Sequence[IPAddress]) -> int:  # noqa: ARG002
        """Nothing to end."""
        return 0


class LeaseView(msgspec.Struct, frozen=True):
    """One lease for people and programs outside."""

    name: str
    pool: str
    addresses: list[str]
    expires: float | None
    """Seconds since the epoch; None: it has no end."""
    ttl: int | None
    """Seconds for which it is renewed; None: it has no end."""
    route: RouteView | None
    usable: bool
    """False: its alias is in no pool of the configuration in force any more."""


class ReleasedView(msgspec.Struct, frozen=True):
    """What a release did."""

    name: str
    addresses: list[str]
    until: float
    """The end of the quarantine, in seconds since the epoch."""
    flows: int
    """So many were ended."""


class PoolView(msgspec.Struct, frozen=True):
    """One pool for people and programs outside."""

    name: str
    prefixes: list[str]
    mode: str
    ipv4: int
    """So many aliases."""
    ipv6: int
    """At most MAX_COUNT is said: JSON as others read it has no larger numbers."""
    leased: int
    quarantined: int


class AliasView(msgspec.Struct, frozen=True):
    """One alias of a pool, in each family that has one of this index."""

    pool: str
    index: int
    addresses: list[str]
    state: Literal["leased", "quarantined", "named", "free"]
    """Named: the configuration by name, or a route of its own, leads there, so it is not leased either."""
    lease: str | None
    """The name that has it; of one in quarantine, that had it last."""


class LeaseLine(msgspec.Struct, frozen=True, tag_field="kind", tag="lease", omit_defaults=True):
    """One lease in an export."""

    name: str
    pool: str
    addresses: list[str]
    service: str | None = None
    when: dict[str, str | int] = {}
    source: str | None = None
    port: Annotated[int, Meta(ge=1, le=65535)] | Literal["same"] = "same"
    ttl: Annotated[int, Meta(ge=1, le=MAX_TTL)] | None = None
    expires: _Moment | None = None


class ReleasedLine(msgspec.Struct, frozen=True, tag_field="kind", tag="released", omit_defaults=True):
    """One lease that has ended, in an export: who had an alias last, and until when nobody else gets it."""

    name: str
    pool: str
    addresses: list[str]
    until: _Moment


class _Lease(msgspec.Struct, array_like=True):
    serial: int
    pool: str
    addresses: list[bytes]
    port: int
    """0: `same`."""
    route: bytes
    """Its key in the table; empty: it has none."""
    ttl: int
    """0: it has no end."""
    expires: float


class _Released(msgspec.Struct, array_like=True):
    name: str
    pool: str
    addresses: list[bytes]
    until: float


class _Force:
    """The aliases of a configuration in force, and which of them are taken."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.seats = {name: Seats(max(pool.alias_count(4), pool.alias_count(6))) for name, pool in config.pools.items()}
        self.named = {target.address.packed for service in config.services for target in service.targets}
        self._aliases = PoolMap(config.pools.values())

    def addresses(self, pool: Pool, index: int) -> list[IPAddress]:
        """The alias of an index, in each family that has one there."""
        return [pool.address(version, index) for version in (4, 6) if index < pool.alias_count(version)]

    def seat(self, packed: bytes) -> tuple[str, int] | None:
        """The pool and index of an address."""
        found = self._aliases.find(ipaddress.ip_address(packed))
        return None if found is None else (found[0].name, found[1])

    def seats_of(self, addresses: Iterable[bytes]) -> Iterable[tuple[Seats, int]]:
        """The seats that addresses take: one, unless pools were changed since they were leased."""
        found = {seat for packed in addresses if (seat := self.seat(packed)) is not None}
        return ((self.seats[pool], index) for pool, index in found)


class LeaseTable:
    """The writer's side. Its methods may be called from any thread."""

    def __init__(self, store: Store, routes: RouteTable, effects: Effects) -> None:
        self._store = store
        self._routes = routes
        self._effects = effects
        self._leases = store.env.open_db(b"leases")
        self._released = store.env.open_db(b"released")
        # What follows changes under the store's lock.
        self._force: _Force | None = None
        self._ends: list[tuple[float, str]] = []

    def publish(self, txn: lmdb.Transaction[bytes], config: Config) -> Callable[[], None]:
        """Count anew which aliases are taken, for a configuration that is being put in force. Returns what to call,
        still under the store's lock, once that is on the disk."""
        force = _Force(config)
        ends = []
        for name, lease in self._all(txn):
            for seats, index in force.seats_of(lease.addresses):
                seats.take(index)
            if lease.expires:
                ends.append((lease.expires, name))
        for released in self._all_released(txn):
            for seats, index in force.seats_of(released.addresses):
                if not seats.is_taken(index):
                    seats.release(index, released.name, released.until)

        def took_effect() -> None:
            self._force, self._ends = force, ends
            heapq.heapify(self._ends)

        return took_effect

    def reconcile(self, now: float) -> int:
        """End what ended while nobody looked, and the flows of what is in quarantine; returns how many flows."""
        ended = sum(view.flows for view in self.expire(now))
        with self._store.env.begin() as txn:
            addresses = [
                ipaddress.ip_address(packed)
                for released in self._all_released(txn)
                if released.until > now
                for packed in released.addresses
            ]
        return ended + (self._effects.end_flows(addresses) if addresses else 0)

    # ---- one lease ----

    def add(
        self,
        name: str,
        pool: str,
        *,
        service: str | None,
        when: Mapping[str, object],
        source: str | None,
        port: int,
        ttl: int | None,
        now: float,
    ) -> LeaseView:
        """Give an alias of a pool to a name, with a route to it where a service is named. `port` 0 is `same`, `ttl`
        seconds, None for ever; the rest as in the configuration.

        Raises RequestError for what it must not be and where no alias is free, RegistryError and what `Effects` raise.
        """
        if not _NAME.fullmatch(name):
            raise RequestError(
                "invalid",
                "name",
                "Must be 1 to 128 of the letters A-Z, a-z, the digits and . _ @ : -, with a letter or digit first.",
            )
        if service is None and (when or source is not None):
            raise RequestError(
                "invalid", "service", "Is missing; a route needs the service whose connections it leads."
            )
        while True:
            with self._store.lock, self._store.env.begin() as txn:
                index, addresses = self._choose(txn, name, pool, now)
                last = self._in_force().seats[pool].last_holder(index)
            self._effects.make_ready(addresses)
            if last != name:
                self._effects.end_flows(addresses)
            with self._store.lock:
                with self._routes.changing() as txn:
                    if self._choose(txn, name, pool, now) != (index, addresses):
                        continue
                    expires = now + ttl if ttl else 0.0
                    lease = _Lease(
                        self._store.next_serial(txn), pool, [a.packed for a in addresses], port, b"", ttl or 0, expires
                    )
                    lease.route = self._add_route(txn, name, lease, service, when, source)
                    self._write(txn, name, lease)
                    view = self._view(txn, name, lease)
                self._took(name, lease)
            return view

    def release(self, name: str, now: float) -> ReleasedView:
        """Take an alias from a name, and end its flows. Raises RequestError if it has none; if the flows cannot be
        ended, what `Effects` raise, and the lease has ended all the same."""
        views = self._end([name], now, lambda _: True)
        if not views:
            raise _no_lease(name)
        return views[0]

    def renew(self, name: str, ttl: int | None, now: float) -> LeaseView:
        """Let a lease end `ttl` seconds from now; None: as many as it was given. Raises RequestError."""
        with self._store.lock:
            with self._store.writing() as txn:
                lease = self._existing(txn, name)
                lease.ttl = lease.ttl if ttl is None else ttl
                lease.expires = now + lease.ttl if lease.ttl else 0.0
                self._put(txn, name, lease)
                view = self._view(txn, name, lease)
            self._will_end(name, lease)
        return view

    def expire(self, now: float) -> list[ReleasedView]:
        """End the leases whose time has come."""
        with self._store.lock:
            due = []
            while self._ends and self._ends[0][0] <= now:
                due.append(heapq.heappop(self._ends))
        try:
            # Some were renewed or released since, or stand there twice.
            return self._end([name for _, name in due], now, lambda lease: 0 < lease.expires <= now)
        except Exception:
            with self._store.lock:
                for end in due:
                    heapq.heappush(self._ends, end)
            raise

    def next_end(self) -> float | None:
        """When `expire` may have something to do; None: never, as things are."""
        with self._store.lock:
            return self._ends[0][0] if self._ends else None

    def get(self, name: str) -> LeaseView:
        """One lease; raises RequestError if there is none."""
        with self._store.env.begin() as txn:
            return self._view(txn, name, self._existing(txn, name))

    # ---- many ----

    def page(self, after: str, limit: int) -> list[LeaseView]:
        """Up to `limit` leases, sorted by name, from the first one behind the name `after` on."""
        views: list[LeaseView] = []
        start = after.encode("utf-8", "surrogatepass")[:256]
        with self._store.env.begin() as txn, txn.cursor(db=self._leases) as cursor:
            there = cursor.set_range(start) if start else cursor.first()
            if there and start and cursor.key() == start:
                there = cursor.next()
            while there and len(views) < limit:
                views.append(self._view(txn, str(cursor.key(), "ascii"), _decode(cursor.value())))
                there = cursor.next()
        return views

    def count(self) -> int:
        """How many leases there are."""
        with self._store.env.begin() as txn:
            return int(txn.stat(self._leases)["entries"])

    def pools(self, now: float) -> list[PoolView]:
        """All pools of the configuration in force."""
        with self._store.lock:
            force = self._in_force()
            return [
                PoolView(
                    name,
                    [str(prefix) for prefix in pool.prefixes],
                    pool.mode,
                    pool.alias_count(4),
                    min(pool.alias_count(6), MAX_COUNT),
                    force.seats[name].leased,
                    force.seats[name].quarantined(now),
                )
                for name, pool in sorted(force.config.pools.items())
            ]

    def aliases(
        self, pool: str, state: Literal["leased", "quarantined"] | None, first: int, limit: int, now: float
    ) -> list[AliasView]:
        """Up to `limit` aliases of a pool, from the index `first` on; of one state, or all of them. Raises RequestError
        if there is no such pool."""
        with self._store.lock, self._store.env.begin() as txn:
            force = self._in_force()
            if pool not in force.seats:
                raise RequestError("not_found", "pool", f"{pool} is not a pool of {force.config.file}.")
            seats = force.seats[pool]
            every = range(first, min(first + limit, seats.capacity))
            indices = every if state is None else seats.some(state, first, limit, now)
            return [self._alias(txn, force, force.config.pools[pool], index, now) for index in indices]

    def _alias(self, txn: lmdb.Transaction[bytes], force: _Force, pool: Pool, index: int, now: float) -> AliasView:
        addresses = force.addresses(pool, index)
        seats = force.seats[pool.name]
        names = (txn.get(address.packed, db=self._routes.leased) for address in addresses)
        name = next((str(name, "ascii") for name in names if name is not None), None)
        if name is not None:
            state: Literal["leased", "quarantined", "named", "free"] = "leased"
        elif seats.is_quarantined(index, now):
            state, name = "quarantined", seats.last_holder(index)
        else:
            state = "named" if self._is_used(txn, force, addresses) else "free"
        return AliasView(pool.name, index, [str(address) for address in addresses], state, name)

    def _is_used(self, txn: lmdb.Transaction[bytes], force: _Force, addresses: Iterable[IPAddress]) -> bool:
        """Whether the configuration by name, or a route of its own, leads to one of them."""
        return any(each.packed in force.named or self._routes.is_used(txn, each.packed) for each in addresses)

    def lines(self, txn: lmdb.Transaction[bytes]) -> Iterator[LeaseLine | ReleasedLine]:
        """All leases, by name, then those that have ended, by name and address."""
        for name, lease in self._all(txn):
            view = self._view(txn, name, lease)
            route = view.route
            yield LeaseLine(
                name,
                lease.pool,
                view.addresses,
                None if route is None else route.service,
                {} if route is None else dict(route.when),
                None if route is None else route.source,
                lease.port or "same",
                view.ttl,
                view.expires,
            )
        ended = [
            ReleasedLine(r.name, r.pool, [str(ipaddress.ip_address(packed)) for packed in r.addresses], r.until)
            for r in self._all_released(txn)
        ]
        yield from sorted(ended, key=lambda line: (line.name, line.addresses))

    def restore(self, txn: lmdb.Transaction[bytes], line: LeaseLine | ReleasedLine) -> Callable[[], None] | None:
        """Write a line of an export down, inside `RouteTable.changing`. Returns what to call, still under the store's
        lock, once that is on the disk; None: all of it is there already. Raises RequestError."""
        if not _NAME.fullmatch(line.name):
            raise RequestError("invalid", "name", "Is not the name of a lease.")
        force = self._in_force()
        addresses = [_address(text) for text in line.addresses]
        packed = [address.packed for address in addresses]
        if not packed or any((force.seat(each) or ("",))[0] != line.pool for each in packed):
            raise RequestError("conflict", "addresses", f"Not all of them are aliases of a pool {line.pool}.")
        holders = {txn.get(each, db=self._routes.leased) for each in packed}
        if isinstance(line, ReleasedLine):
            return self._restore_released(txn, line, packed, holders)
        if holders - {None, line.name.encode()} or any(self._routes.is_used(txn, each) for each in packed):
            raise RequestError("conflict", "addresses", "Somebody else has one of them.")
        old = self._get(txn, line.name)
        if old is not None:
            if (old.addresses, old.ttl, old.expires) == (packed, line.ttl or 0, line.expires or 0.0):
                return None
            raise RequestError("conflict", "name", f"{line.name} has a lease already, and another one.")
        port = 0 if line.port == "same" else line.port
        serial = self._store.next_serial(txn)
        lease = _Lease(serial, line.pool, packed, port, b"", line.ttl or 0, line.expires or 0.0)
        lease.route = self._add_route(txn, line.name, lease, line.service, line.when, line.source)
        self._write(txn, line.name, lease)
        return lambda: self._took(line.name, lease)

    def _restore_released(
        self, txn: lmdb.Transaction[bytes], line: ReleasedLine, packed: list[bytes], holders: set[bytes | None]
    ) -> Callable[[], None] | None:
        if holders != {None}:
            raise RequestError("conflict", "addresses", "Somebody has one of them.")
        released = _Released(line.name, line.pool, packed, line.until)
        value = msgspec.msgpack.encode(released)
        if txn.get(packed[0], db=self._released) == value:
            return None
        txn.put(packed[0], value, db=self._released)
        return lambda: self._left(released)

    # ---- parts ----

    def _in_force(self) -> _Force:
        if self._force is None:
            raise RegistryError("the registry holds no configuration yet: it is published when the daemon starts")
        return self._force

    def _choose(
        self, txn: lmdb.Transaction[bytes], name: str, pool_name: str, now: float
    ) -> tuple[int, list[IPAddress]]:
        force = self._in_force()
        pool = force.config.pools.get(pool_name)
        if pool is None:
            raise RequestError("not_found", "pool", f"{pool_name} is not a pool of {force.config.file}.")
        relay = force.config.gateway.relay
        if relay is not None and relay.pool == pool_name:
            raise RequestError("invalid", "pool", f"{pool_name} is the relay's, which gives its aliases away itself.")
        old = self._get(txn, name)
        if old is not None:
            has = " and ".join(str(ipaddress.ip_address(packed)) for packed in old.addresses)
            raise RequestError("conflict", "name", f"{name} has a lease already: {has} of the pool {old.pool}.")
        seats = force.seats[pool_name]

        def is_used(index: int) -> bool:
            return self._is_used(txn, force, force.addresses(pool, index))

        index = seats.choose(name, now, is_used)
        if index is None:
            leased, waiting = seats.leased, seats.quarantined(now)
            used = seats.capacity - leased - waiting
            raise RequestError(
                "conflict",
                "pool",
                f"The pool {pool_name} is full: of {seats.capacity} aliases {leased} are leased, {waiting} in"
                f" quarantine, and {used} used by routes of their own or by the configuration.",
            )
        return index, force.addresses(pool, index)

    def _add_route(
        self,
        txn: lmdb.Transaction[bytes],
        name: str,
        lease: _Lease,
        service: str | None,
        when: Mapping[str, object],
        source: str | None,
    ) -> bytes:
        """The key of the lease's route; empty if it has none."""
        if service is None:
            return b""
        force, found = self._routes.of(service)
        coming = {endpoint.address.version for endpoint in found.endpoints}
        addresses = [ipaddress.ip_address(packed) for packed in lease.addresses]
        # Of families in which nobody comes the alias needs no route; if there is no other, the checks will say so.
        useful = [address for address in addresses if address.version in coming] or addresses
        if source is not None:
            useful = [a for a in useful if (":" in source) == (a.version == 6)] or useful
        targets = [str(Target(address, lease.port)) for address in useful]
        route = self._routes.check(service, when, targets, source)
        ids = self._store.ids(txn, force.config.gateway.mark.highest_id)
        return self._routes.write(txn, ids, service, route, name)[1]

    def _write(self, txn: lmdb.Transaction[bytes], name: str, lease: _Lease) -> None:
        for packed in lease.addresses:
            txn.put(packed, name.encode(), db=self._routes.leased)
            txn.delete(packed, db=self._released)
        self._put(txn, name, lease)

    def _end(self, names: Sequence[str], now: float, is_due: Callable[[_Lease], bool]) -> list[ReleasedView]:
        """End leases: in one transaction, then in conntrack."""
        if not names:
            return []
        ended: list[_Released] = []
        with self._store.lock:
            with self._routes.changing() as txn:
                for name in names:
                    lease = self._get(txn, name)
                    if lease is None or not is_due(lease):
                        continue
                    if lease.route:
                        self._routes.delete(txn, lease.route)
                    txn.delete(name.encode(), db=self._leases)
                    for packed in lease.addresses:
                        txn.delete(packed, db=self._routes.leased)
                    pool = self._in_force().config.pools.get(lease.pool)
                    until = now + (Pool._field_defaults["quarantine"] if pool is None else pool.quarantine)
                    released = _Released(name, lease.pool, lease.addresses, until)
                    txn.put(lease.addresses[0], msgspec.msgpack.encode(released), db=self._released)
                    ended.append(released)
            for released in ended:
                self._left(released)
        if not ended:
            return []
        flows = self._effects.end_flows([ipaddress.ip_address(p) for released in ended for p in released.addresses])
        return [
            ReleasedView(r.name, [str(ipaddress.ip_address(p)) for p in r.addresses], r.until, flows if not n else 0)
            for n, r in enumerate(ended)
        ]

    def _took(self, name: str, lease: _Lease) -> None:
        for seats, index in self._in_force().seats_of(lease.addresses):
            seats.take(index)
        self._will_end(name, lease)

    def _left(self, released: _Released) -> None:
        for seats, index in self._in_force().seats_of(released.addresses):
            seats.release(index, released.name, released.until)

    def _will_end(self, name: str, lease: _Lease) -> None:
        if lease.expires:
            heapq.heappush(self._ends, (lease.expires, name))

    def _view(self, txn: lmdb.Transaction[bytes], name: str, lease: _Lease) -> LeaseView:
        with self._store.lock:
            force = self._force
        return LeaseView(
            name=name,
            pool=lease.pool,
            addresses=[str(ipaddress.ip_address(packed)) for packed in lease.addresses],
            expires=lease.expires or None,
            ttl=lease.ttl or None,
            route=self._routes.view(txn, lease.route) if lease.route else None,
            usable=force is not None and all(force.seat(packed) is not None for packed in lease.addresses),
        )

    def _existing(self, txn: lmdb.Transaction[bytes], name: str) -> _Lease:
        lease = self._get(txn, name)
        if lease is None:
            raise _no_lease(name)
        return lease

    def _get(self, txn: lmdb.Transaction[bytes], name: str) -> _Lease | None:
        found = txn.get(name.encode(), db=self._leases) if _NAME.fullmatch(name) else None
        return None if found is None else _decode(found)

    def _put(self, txn: lmdb.Transaction[bytes], name: str, lease: _Lease) -> None:
        txn.put(name.encode(), msgspec.msgpack.encode(lease), db=self._leases)

    def _all(self, txn: lmdb.Transaction[bytes]) -> Iterator[tuple[str, _Lease]]:
        with txn.cursor(db=self._leases) as cursor:
            for name, value in cursor:
                yield str(name, "ascii"), _decode(value)

    def _all_released(self, txn: lmdb.Transaction[bytes]) -> Iterator[_Released]:
        with txn.cursor(db=self._released) as cursor:
            for _, value in cursor:
                yield _decode_released(value)


_decode = msgspec.msgpack.Decoder(_Lease).decode
_decode_released = msgspec.msgpack.Decoder(_Released).decode


def _no_lease(name: str) -> RequestError:
    return RequestError("not_found", "name", f"There is no lease of the name {name}.")


def _address(text: str) -> IPAddress:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise RequestError("invalid", "addresses", f"{text} is not an IP address.") from None
