"""The route table: which keys lead to which target ids (core.router), for all services, in LMDB.

  routes   number of the shape u32 | source prefix | values   ->  target ids IPv4 u32, IPv6 u32 | place in `routes` u32
  dynamic  the same with router.DYNAMIC in the number         ->  target ids IPv4 u32, IPv6 u32 | flags u8 | more
  shapes   number u32                                         ->  ShapeRecord as msgpack
  uses     address (4 or 16), or 0x00 | group id u32          ->  how many dynamic routes of no lease lead there, u32
  leased   address (4 or 16)                                  ->  name of the lease that has it

Workers look in `routes` and `dynamic`, entry by entry, and keep nothing of them; what they keep is the plan, which
holds the shapes. `more` is, if flag UNUSABLE is set, the real target ids (8 bytes), and, where the key holds a digest,
the values themselves (control.route_records).

**Where a route comes from.** *Static* routes are the configuration's: `publish` makes `routes` what it says, all at
once. *Dynamic* ones are put and removed one by one, or by the ten thousand in one transaction (control.transfer), and
outlive restarts; so do those of leases (control.leases), which come and go with their lease. All follow the same rules.
A dynamic route that equals a static one or a lease's, or ties with any, is refused, and the sentence names the other. A
`put` of one that equals a dynamic one gives it another target.

**When a configuration changes** dynamic routes stay, even where they can do nothing now: their service or a parser is
gone (then they are not in the plan, and back as soon as these are), a static route equals them (which then counts), or
a target is neither in a pool nor external any more. The last ones match and refuse: workers see no target id. To find
them means to look at each route, so it is done only when pools or endpoints have changed.

**A new shape** is a new plan, since workers must know what to look for; it is written in the transaction that brings
the shape's first route or takes its last one. Everything else changes an entry, and no worker need be told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import lmdb
import msgspec

from steerd.config import Config, Service
from steerd.config.conditions import condition_text
from steerd.config.routes import RouteChecker
from steerd.control.relays import RelayTable
from steerd.control.route_records import (
    EXTERNAL4,
    EXTERNAL6,
    ID,
    IDS,
    LEASE,
    Entry,
    KnownShape,
    RouteLine,
    RouteView,
    ShapeRecord,
    TargetOptions,
    as_written,
    choice_texts,
    described,
    group_key,
    group_keys,
)
from steerd.control.sessions import Places
from steerd.control.store import IdGiver, Store
from steerd.control.ties import Ties
from steerd.core.choice import GROUP
from steerd.core.engine import PayloadParser
from steerd.core.router import (
    DYNAMIC,
    MAX_PROBES,
    Probe,
    Shape,
    can_rank,
    canonical,
    compile_routes,
    has_digest,
    make_probes,
    route_at,
    shape_of,
    table_key,
    values_of,
)
from steerd.errors import ConfigError, RegistryError, RequestError
from steerd.model import Choice, Route, Target
from steerd.wire import portext
from steerd.wire.registry import PATTERNED, check_patterns

_BEHIND_STATIC = 1 << 62


class _Force:
    """What of a configuration in force the table must know."""

    def __init__(self, config: Config, relays: RelayTable) -> None:
        self.config = config
        self.places = Places(config)
        self.services = {service.name: service for service in config.services}
        self._relays = relays
        self._checkers: dict[str, RouteChecker] = {}
        self.static: dict[str, dict[Shape, list[Route]]] = {}
        for service in config.services:
            shapes = self.static[service.name] = {}
            for route in service.routes:
                shapes.setdefault(shape_of(route), []).append(route)

    def checker(self, service: str) -> RouteChecker:
        """Checks routes of a service. Made when it is needed: most configurations are never asked."""
        found = self._checkers.get(service)
        if found is None:
            found = self._checkers[service] = RouteChecker(self.config, self.services[service], self._relays.place)
        return found


Change = Literal["added", "changed", "unchanged"]


class RouteTable:
    """The writer's side. Its methods may be called from any thread; those that take a transaction, inside
    `changing`."""

    def __init__(self, store: Store, relays: RelayTable) -> None:
        self._store = store
        self._relays = relays
        relays.ask_routes(self._is_led_to)
        self._static = store.env.open_db(b"routes")
        self._dynamic = store.env.open_db(b"dynamic")
        self._shapes = store.env.open_db(b"shapes")
        self._uses = store.env.open_db(b"uses")
        self.leased = store.env.open_db(b"leased")
        # What follows changes under the store's lock.
        self._force: _Force | None = None
        self._static_groups: frozenset[int] = frozenset()
        self._known: dict[str, dict[Shape, KnownShape]] = {}
        self._by_number: dict[int, KnownShape] = {}
        # Of the transaction that is under way:
        self._touched: set[KnownShape] = set()
        self._more_uses: Counter[bytes] = Counter()
        self._plan_is_stale = False
        self._answers_changed = False
        self._ties = Ties()
        self._load()

    # ---- transactions ----

    @contextmanager
    def changing(self) -> Iterator[lmdb.Transaction[bytes]]:
        """A transaction in which routes may change: on the disk, and what workers see, when the block ends; undone if
        it raises. Raises RegistryError."""
        with self._store.lock:
            try:
                with self._store.writing() as txn:
                    yield txn
                    self._settle(txn)
            except BaseException:
                self._load()
                raise
            changed = self._answers_changed
            self._begin()
            if changed:
                self._store.on_answers_changed()

    def _begin(self) -> None:
        self._touched.clear()
        self._more_uses.clear()
        self._plan_is_stale = False
        self._answers_changed = False
        self._ties.clear()

    def _load(self) -> None:
        """Know what is on the disk, and nothing else."""
        self._begin()
        self._known, self._by_number = {}, {}
        with self._store.env.begin() as txn, txn.cursor(db=self._shapes) as cursor:
            for packed, value in cursor:
                record = msgspec.msgpack.decode(value, type=ShapeRecord)
                shape = Shape(record.parts, record.version, record.source_length)
                self._remember(KnownShape(ID.unpack(packed)[0], record.service, shape, record.routes))

    def _remember(self, known: KnownShape) -> None:
        self._known.setdefault(known.service, {})[known.shape] = known
        self._by_number[known.number] = known

    def _settle(self, txn: lmdb.Transaction[bytes]) -> None:
        """Write what the transaction has left to the end."""
        for known in self._touched:
            record = ShapeRecord(known.service, *known.shape, known.routes)
            txn.put(ID.pack(known.number), msgspec.msgpack.encode(record), db=self._shapes)
        for address, more in self._more_uses.items():
            uses = self._uses_of(txn, address) + more
            if uses:
                txn.put(address, ID.pack(uses), db=self._uses)
            else:
                txn.delete(address, db=self._uses)
        if self._plan_is_stale and self._force is not None and (plan := self._store.plan(txn)) is not None:
            services = [
                msgspec.structs.replace(
                    service_plan,
                    probes=list(self._probes(self._force, service)),
                    payload_parsers=self.parsers(txn, service, [p.name for p in service_plan.payload_parsers]),
                    datagram_parsers=self.parsers(txn, service, [p.name for p in service_plan.datagram_parsers]),
                )
                for service, service_plan in zip(self._force.config.services, plan.services, strict=True)
            ]
            self._store.put_plan(txn, msgspec.structs.replace(plan, services=services))

    def _uses_of(self, txn: lmdb.Transaction[bytes], address: bytes) -> int:
        packed = txn.get(address, db=self._uses)
        return 0 if packed is None else int(ID.unpack(packed)[0])

    # ---- the configuration ----

    def publish(
        self, txn: lmdb.Transaction[bytes], ids: IdGiver, config: Config
    ) -> tuple[dict[str, list[Probe]], Callable[[], None]]:
        """Make the static routes what a configuration says, inside the transaction that puts it in force.

        Returns the probes of each service, static and dynamic, and what to call, still under the store's lock, once the
        transaction is on the disk.
        """
        force = _Force(config, self._relays)
        entries: dict[bytes, bytes] = {}
        groups: set[int] = set()
        for service in config.services:
            compiled = compile_routes(service.routes, service.key_order, partial(self._number, service.name))
            found = [ids.for_targets(route.targets, route.choice, force.places.in_pool) for route in service.routes]
            packed = [each.pack() for each in found]
            groups.update(id_ for each in found for id_ in (each.ipv4, each.ipv6) if id_ >= GROUP)
            entries.update((key, packed[place] + ID.pack(place)) for key, place in compiled.entries)
        self._replace_static(txn, entries)
        self._look_at_targets(txn, force)
        self._plan_is_stale = False
        self._answers_changed = True

        def took_effect() -> None:
            self._force = force
            self._static_groups = frozenset(groups)

        return {service.name: list(self._probes(force, service)) for service in config.services}, took_effect

    def _replace_static(self, txn: lmdb.Transaction[bytes], entries: dict[bytes, bytes]) -> None:
        """Make the static routes these, and write only what differs."""
        with txn.cursor(db=self._static) as cursor:
            before = {bytes(key): bytes(value) for key, value in cursor}
        for key in before.keys() - entries.keys():
            txn.delete(key, db=self._static)
        with txn.cursor(db=self._static) as cursor:
            cursor.putmulti(sorted(entries.items() - before.items()))

    def parsers(self, txn: lmdb.Transaction[bytes], service: Service, names: Iterable[str]) -> list[PayloadParser]:
        """Parsers of a service, with the values of all its routes that they must know. Raises RegistryError for more
        values than one can know: no worker could use such a plan."""
        found = [PayloadParser(name, self._patterns(txn, service, name)) for name in names]
        for parser in found:
            try:
                check_patterns(parser.name, parser.patterns)
            except ValueError as error:
                raise RegistryError(
                    f"the routes of the service {service.name} have values that its parser {parser.name} cannot take:"
                    f" {error}"
                ) from error
        return found

    def _patterns(self, txn: lmdb.Transaction[bytes], service: Service, parser: str) -> list[str]:
        key = PATTERNED.get(parser)
        if key is None:
            return []
        found = {c.value for route in service.routes for c in route.conditions if c.key == key}
        for known in self._known.get(service.name, {}).values():
            if known.routes and any(part.key == key for part in known.shape.parts):
                for route in self._routes_of(txn, known):
                    found |= {c.value for c in route.conditions if c.key == key}
        return sorted(found)

    def _probes(self, force: _Force, service: Service) -> tuple[Probe, ...]:
        known = self._known.get(service.name, {})
        static = [(shape, known[shape].number) for shape in force.static[service.name]]
        dynamic = [
            (each.shape, each.number | DYNAMIC)
            for each in known.values()
            if each.routes and can_rank(each.shape, service.key_order)
        ]
        try:
            return make_probes([*static, *dynamic], service.key_order)
        except ValueError as error:
            raise RegistryError(f"the routes of the service {service.name} cannot be looked up: {error}") from error

    def _look_at_targets(self, txn: lmdb.Transaction[bytes], force: _Force) -> None:
        """Find the dynamic routes whose targets are for use, and those whose are not, if that can have changed."""
        mark = force.places.fingerprint()
        if txn.get(b"places", db=self._store.meta) == mark:
            return
        txn.put(b"places", mark, db=self._store.meta)
        changed = []
        with txn.cursor(db=self._dynamic) as cursor:
            for key, value in cursor:
                entry = Entry.unpack(value)
                usable = partial(force.places.usable, txn, self._store)
                now = entry._replace(
                    usable4=not entry.ids.ipv4 or usable(entry.ids.ipv4, bool(entry.flags & EXTERNAL4)),
                    usable6=not entry.ids.ipv6 or usable(entry.ids.ipv6, bool(entry.flags & EXTERNAL6)),
                )
                if now != entry:
                    changed.append((bytes(key), now.pack()))
        for key, value in changed:
            txn.put(key, value, db=self._dynamic)

    def of(self, service: str) -> tuple[_Force, Service]:
        """The configuration in force, and one of its services. Raises RequestError, RegistryError."""
        force = self.force
        found = force.services.get(service)
        if found is None:
            raise RequestError("not_found", "service", f"{service} is not a service of {force.config.file}.")
        return force, found

    @property
    def force(self) -> _Force:
        """The configuration in force, with what was made of it. Raises RegistryError if there is none yet."""
        with self._store.lock:
            if self._force is None:
                raise RegistryError("the registry holds no configuration yet: it is published when the daemon starts")
            return self._force

    # ---- one dynamic route ----

    def put(
        self,
        service: str,
        when: Mapping[str, object],
        target: object,
        source: str | None,
        choose: str | None = None,
        hash_: str | None = None,
    ) -> tuple[RouteView, bool]:
        """Define a dynamic route, or give it another target; all of it as in the configuration. Returns it, and whether
        it is new.

        Raises RequestError for what it must not be, RegistryError where no target id is left.
        """
        self._relays.prepare(target)
        with self.changing() as txn:
            force, _ = self.of(service)
            route = self.check(service, when, target, source, choose, hash_)
            ids = self._store.ids(txn, force.config.gateway.mark.highest_id)
            change, key = self.write(txn, ids, service, route)
            known, entry = self._at(txn, key)
            return self._view(txn, known, key, entry), change == "added"

    def remove(self, service: str, when: Mapping[str, object], source: str | None) -> None:
        """Take a dynamic route away; its connections go on. Raises RequestError if there is none, or if it is the
        configuration's or a lease's."""
        with self.changing() as txn:
            force, found = self.of(service)
            route = self.check_match(service, when, source)
            known = self._known.get(service, {}).get(shape_of(route))
            key = b"" if known is None else table_key(known.number | DYNAMIC, known.shape, route)
            value = txn.get(key, db=self._dynamic) if key else None
            if value is None:
                if (other := self._static_equal(txn, force, found, shape_of(route), route)) is not None:
                    raise RequestError(
                        "conflict",
                        "when",
                        f"The route is in {force.config.file}, as {other.name}; take it out there, and reload.",
                    )
                raise RequestError("not_found", "when", f"The service {service} has no such route.")
            entry = Entry.unpack(value)
            if entry.flags & LEASE:
                raise RequestError(
                    "conflict", "when", f"This is the route of the lease {self._lease(txn, entry)}; release that."
                )
            self.delete(txn, key)

    def check(
        self,
        service: str,
        when: Mapping[str, object],
        target: object,
        source: str | None,
        choose: str | None = None,
        hash_: str | None = None,
    ) -> Route:
        """The route of a request, checked by itself. Raises RequestError."""
        with self._store.lock:
            try:
                return self.of(service)[0].checker(service).check(when, target, source, choose, hash_)
            except ConfigError as error:
                raise _not_right(error) from error

    def check_match(self, service: str, when: Mapping[str, object], source: str | None) -> Route:
        """What the route of a request matches, without targets. Raises RequestError."""
        with self._store.lock:
            try:
                return self.of(service)[0].checker(service).check_match(when, source)
            except ConfigError as error:
                raise _not_right(error) from error

    def write(
        self, txn: lmdb.Transaction[bytes], ids: IdGiver, service: str, route: Route, lease: str | None = None
    ) -> tuple[Change, bytes]:
        """Put a checked route into the table, for a lease or for itself. Returns what that changed, and its key.

        Raises RequestError if it equals or ties with another, or leads to what is not its lease's.
        """
        force, found = self.of(service)
        shape = shape_of(route)
        if (other := self._static_equal(txn, force, found, shape, route)) is not None:
            raise RequestError(
                "conflict",
                "when",
                f"The same route is in {force.config.file}: {other.name}; change it there, and reload.",
            )
        number = self._number(service, shape)
        known = self._known[service][shape]
        key = table_key(number | DYNAMIC, shape, route)
        value = txn.get(key, db=self._dynamic)
        old = None if value is None else Entry.unpack(value)
        if old is not None and (lease is not None or old.flags & LEASE):
            raise RequestError("conflict", "when", f"The same route is there already: {self._name(txn, old, route)}.")
        flags = 0 if lease is None else LEASE
        for to in route.targets:
            holder = txn.get(to.address.packed, db=self.leased)
            if lease is None and holder is not None:
                raise RequestError(
                    "conflict",
                    "target",
                    f"{to.address} is leased to {str(holder, 'ascii')}; a route of its own would outlive the lease.",
                )
            if not force.places.in_pool(to.address):
                flags |= EXTERNAL4 if to.address.version == 4 else EXTERNAL6
        values = values_of(route) if has_digest(shape, key) else b""
        target_ids = ids.for_targets(route.targets, route.choice, force.places.in_pool)
        entry = Entry(target_ids, flags, True, True, values)
        if old == entry:
            return "unchanged", key
        if old is None:
            self._refuse_ties(txn, force, found, shape, route)
            if not known.routes and len(self._probes(force, found)) >= MAX_PROBES:
                raise RequestError(
                    "conflict",
                    "when",
                    f"The routes of {service} have {MAX_PROBES} different combinations of keys, pattern lengths and"
                    " source prefix lengths, and no more can be looked up for each connection.",
                )
            self._count(known, 1)
            self._ties.route_added(service, shape, route)
        elif lease is None:
            self._use(txn, old, -1)
        if lease is None:
            # An import brings a million: what `_use` would look up is known here.
            for to in route.targets:
                self._more_uses[to.address.packed] += 1
            for group in group_keys(entry.ids) if route.choice is not None else ():
                self._more_uses[group] += 1
        txn.put(key, entry.pack(), db=self._dynamic)
        self._note_change(shape)
        return "added" if old is None else "changed", key

    def delete(self, txn: lmdb.Transaction[bytes], key: bytes) -> None:
        """Take the dynamic route at a key away."""
        known, entry = self._at(txn, key)
        txn.delete(key, db=self._dynamic)
        self._note_change(known.shape)
        self._count(known, -1)
        self._ties.route_gone()
        if not entry.flags & LEASE:
            self._use(txn, entry, -1)

    def view(self, txn: lmdb.Transaction[bytes], key: bytes) -> RouteView:
        """The dynamic route at a key."""
        known, entry = self._at(txn, key)
        return self._view(txn, known, key, entry)

    def groups_in_use(self, txn: lmdb.Transaction[bytes]) -> set[int]:
        """Ids of the groups that routes lead to."""
        with self._store.lock:
            found = set(self._static_groups)
        with txn.cursor(db=self._uses) as cursor:
            there = cursor.set_range(group_key(0)[:1])
            while there and cursor.key()[:1] == group_key(0)[:1]:
                if len(cursor.key()) == len(group_key(0)):
                    found.add(ID.unpack_from(cursor.key(), 1)[0])
                there = cursor.next()
        return found

    def is_used(self, txn: lmdb.Transaction[bytes], address: bytes) -> bool:
        """Whether dynamic routes of no lease lead to an address."""
        return self._uses_of(txn, address) + self._more_uses[address] > 0

    def _is_led_to(self, txn: lmdb.Transaction[bytes], address: bytes) -> bool:
        return self.is_used(txn, address) or txn.get(address, db=self.leased) is not None

    # ---- many ----

    def page(self, service: str, after: str, limit: int) -> tuple[list[RouteView], str | None]:
        """Up to `limit` routes of a service, static ones first, and the `after` of the next page."""
        _, found = self.of(service)
        place, start = _from_token(after)
        with self._store.env.begin() as txn:
            views = [self._static_view(txn, service, route) for route in found.routes[place : place + limit]]
            if len(views) == limit:
                return views, f"s{place + limit}"
            for known, key, value in self._walk(txn, [service], start):
                if len(views) == limit:
                    return views, f"d{key.hex()}"
                views.append(self._view(txn, known, key, Entry.unpack(value)))
        return views, None

    def count(self, service: str) -> tuple[int, int]:
        """How many static and dynamic routes a service has."""
        _, found = self.of(service)
        with self._store.lock:
            return len(found.routes), sum(known.routes for known in self._known.get(service, {}).values())

    def lines(self, txn: lmdb.Transaction[bytes]) -> Iterator[RouteLine]:
        """All dynamic routes of no lease, in an order that depends on nothing but the routes."""
        for known, key, value in self._walk(txn, sorted(self._known), b""):
            entry = Entry.unpack(value)
            if not entry.flags & LEASE:
                route = route_at(known.shape, key, entry.values)
                yield RouteLine(
                    known.service,
                    {c.key: condition_text(c) for c in route.conditions},
                    self._targets(txn, entry),
                    None if route.source is None else str(route.source),
                    **choice_texts(self._choice(txn, entry)),
                )

    def _walk(
        self, txn: lmdb.Transaction[bytes], services: Iterable[str], start: bytes
    ) -> Iterator[tuple[KnownShape, bytes, bytes]]:
        """Dynamic routes from the key `start` on (b"": all), by service, shape and key."""
        with self._store.lock:
            shapes = [
                known
                for service in services
                for known in sorted(self._known.get(service, {}).values(), key=lambda known: canonical(known.shape))
            ]
        if start:
            first = ID.unpack_from(start)[0] & ~DYNAMIC
            numbers = [known.number for known in shapes]
            shapes = shapes[numbers.index(first) :] if first in numbers else []
        for known in shapes:
            for key, value in self._range(txn, known, start):
                yield known, key, value
            start = b""

    def _range(
        self, txn: lmdb.Transaction[bytes], known: KnownShape, start: bytes = b""
    ) -> Iterator[tuple[bytes, bytes]]:
        beginning = ID.pack(known.number | DYNAMIC)
        with txn.cursor(db=self._dynamic) as cursor:
            there = cursor.set_range(start or beginning)
            while there:
                key, value = cursor.item()
                if not key.startswith(beginning):
                    return
                yield key, value
                there = cursor.next()

    def _routes_of(self, txn: lmdb.Transaction[bytes], known: KnownShape) -> Iterator[Route]:
        """All dynamic routes of a shape, without targets."""
        for key, value in self._range(txn, known):
            yield route_at(known.shape, key, Entry.unpack(value).values)

    # ---- conflicts ----

    def _static_equal(
        self, txn: lmdb.Transaction[bytes], force: _Force, service: Service, shape: Shape, route: Route
    ) -> Route | None:
        """The configuration's route that matches the same."""
        if shape not in force.static[service.name]:
            return None
        value = txn.get(table_key(self._known[service.name][shape].number, shape, route), db=self._static)
        return None if value is None else service.routes[ID.unpack_from(value, IDS.size)[0]]

    def _refuse_ties(
        self, txn: lmdb.Transaction[bytes], force: _Force, service: Service, shape: Shape, route: Route
    ) -> None:
        def shapes() -> set[Shape]:
            known = self._known[service.name].values()
            return {*force.static[service.name], *(each.shape for each in known if each.routes)}

        def routes(shape: Shape) -> Iterator[Route]:
            yield from force.static[service.name].get(shape, [])
            if (known := self._known[service.name].get(shape)) is not None:
                yield from self._routes_of(txn, known)

        other = self._ties.find(service, shape, route, shapes, routes)
        if other is not None:
            name = f"{other.name} of {force.config.file}" if other.name else f"the dynamic route {described(other)}"
            raise RequestError(
                "conflict",
                "when",
                f"Ties with {name}: one connection can match both, and neither comes first; add a condition.",
            )

    # ---- small parts ----

    def _number(self, service: str, shape: Shape) -> int:
        """The number of a shape; a new one if it has none."""
        known = self._known.get(service, {}).get(shape)
        if known is None:
            known = KnownShape(max(self._by_number, default=0) + 1, service, shape, 0)
            self._remember(known)
            self._touched.add(known)
        return known.number

    def _count(self, known: KnownShape, more: int) -> None:
        is_new = not known.routes
        known.routes += more
        self._touched.add(known)
        if is_new or not known.routes:
            self._ties.shapes_changed()
            self._plan_is_stale = True
        if known.is_patterned:
            self._plan_is_stale = True

    def _note_change(self, shape: Shape) -> None:
        """A route of this shape has come, gone or changed: does it match where nothing but an extension is known?"""
        if all(part.key in portext.KEYS for part in shape.parts):
            self._answers_changed = True

    def _use(self, txn: lmdb.Transaction[bytes], entry: Entry, more: int) -> None:
        for target, _ in self._leads_to(txn, entry):
            self._more_uses[target.address.packed] += more
        for key in group_keys(entry.ids):
            self._more_uses[key] += more

    def _at(self, txn: lmdb.Transaction[bytes], key: bytes) -> tuple[KnownShape, Entry]:
        value = txn.get(key, db=self._dynamic)
        if value is None:
            raise RegistryError("a route that a lease names is not in the registry")
        return self._by_number[ID.unpack_from(key)[0] & ~DYNAMIC], Entry.unpack(value)

    def _leads_to(self, txn: lmdb.Transaction[bytes], entry: Entry) -> Iterator[tuple[Target, bool]]:
        """Each target of a route, and whether it is external."""
        for id_, external in ((entry.ids.ipv4, EXTERNAL4), (entry.ids.ipv6, EXTERNAL6)):
            if id_ >= GROUP and (group := self._store.group(txn, id_)) is not None:
                yield from ((member.target, member.external) for member in group.members)
            elif id_ and (target := self._store.target(txn, id_)) is not None:
                yield target, bool(entry.flags & external)

    def _targets(self, txn: lmdb.Transaction[bytes], entry: Entry) -> list[str | TargetOptions]:
        """What the route was given as its targets."""
        found = (as_written(self._store.written(txn, to), external) for to, external in self._leads_to(txn, entry))
        return list(dict.fromkeys(found))

    def _choice(self, txn: lmdb.Transaction[bytes], entry: Entry) -> Choice | None:
        for id_ in (entry.ids.ipv4, entry.ids.ipv6):
            if id_ >= GROUP and (group := self._store.group(txn, id_)) is not None:
                return Choice(group.policy, group.key)
        return None

    def _lease(self, txn: lmdb.Transaction[bytes], entry: Entry) -> str:
        target = self._store.target(txn, entry.ids.ipv4 or entry.ids.ipv6)
        name = None if target is None else txn.get(target.address.packed, db=self.leased)
        return "" if name is None else str(name, "ascii")

    def _name(self, txn: lmdb.Transaction[bytes], entry: Entry, route: Route) -> str:
        if entry.flags & LEASE:
            return f"that of the lease {self._lease(txn, entry)}"
        return f"the dynamic route {described(route)}"

    def _view(self, txn: lmdb.Transaction[bytes], known: KnownShape, key: bytes, entry: Entry) -> RouteView:
        route = route_at(known.shape, key, entry.values)
        with self._store.lock:
            service = None if self._force is None else self._force.services.get(known.service)
        is_in_plan = service is not None and can_rank(known.shape, service.key_order)
        static_key = ID.pack(known.number) + key[ID.size :]
        return RouteView(
            service=known.service,
            when={c.key: condition_text(c) for c in route.conditions},
            source=None if route.source is None else str(route.source),
            targets=[each if isinstance(each, str) else each.address for each in self._targets(txn, entry)],
            **choice_texts(self._choice(txn, entry)),
            origin=f"lease {self._lease(txn, entry)}" if entry.flags & LEASE else "dynamic",
            usable=is_in_plan and entry.usable4 and entry.usable6 and txn.get(static_key, db=self._static) is None,
            place=None,
        )

    def _static_view(self, txn: lmdb.Transaction[bytes], service: str, route: Route) -> RouteView:
        return RouteView(
            service=service,
            when={c.key: condition_text(c) for c in route.conditions},
            source=None if route.source is None else str(route.source),
            targets=list(dict.fromkeys(str(self._store.written(txn, target)) for target in route.targets)),
            **choice_texts(route.choice),
            origin="static",
            usable=True,
            place=route.name,
        )


def _not_right(error: ConfigError) -> RequestError:
    problem = error.problems[0]
    return RequestError("invalid", problem.key or None, problem.message)


def _from_token(after: str) -> tuple[int, bytes]:
    """Where a page begins: the place among static routes, and the key of a dynamic one. Raises RequestError."""
    if not after:
        return 0, b""
    if re.fullmatch(r"s[0-9]{1,9}", after):
        return int(after[1:]), b""
    if re.fullmatch(r"d([0-9a-f]{2}){4,511}", after):
        return _BEHIND_STATIC, bytes.fromhex(after[1:])
    raise RequestError("invalid", "after", "Must be the `next` of the page before.")
