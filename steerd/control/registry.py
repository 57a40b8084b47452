"""The registry: what must outlive a process, and what all workers read, in one LMDB environment.

One writer, the main process; workers read through LMDB's shared memory, without locks. A transaction is on the disk
before anybody is told of it. Target ids are in control.store, and the layout of the whole; routes in control.routes,
leases in control.leases, sessions in control.sessions, drains in control.drains; what is in them as text, and back, in
control.transfer. Here a configuration becomes a plan, and is put in force with its routes and sessions in one step.

**What a worker reads, and when.** The plan says what to look for, and a worker keeps it; where keys lead to is looked
up in LMDB, decision by decision. Each decision has one read transaction (`Reader.advance` begins it, `Reader.rest` ends
it), so a route that was put a moment ago counts for the next packet, and all that one transaction changed is seen at
once. If that transaction shows another plan, it is taken up first: plan and routes always belong together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import lmdb
import msgspec

from steerd.config import Config, Service, Unextended
from steerd.config.parsers import PORT_EXTENSION, PROXY
from steerd.control import relays
from steerd.control import sessions as session_table
from steerd.control.drains import DrainTable
from steerd.control.leases import Effects, LeaseTable, NoEffects
from steerd.control.relays import RelayTable
from steerd.control.route_records import origin_of, stored_route
from steerd.control.routes import RouteTable
from steerd.control.sessions import Places, SessionTable
from steerd.control.states import States
from steerd.control.store import (
    ID_KEY_TAIL,
    IdGiver,
    PackedTarget,
    Store,
    group_of,
    open_to_read,
    plan_of,
    target_of,
    written,
)
from steerd.core.choice import GROUP, Group
from steerd.core.engine import EndpointPlan, Mapping, Plan, ServicePlan, TargetIds, WakeRange
from steerd.core.pending import Limits
from steerd.core.router import DYNAMIC, Probe
from steerd.core.sessions import Session, SessionsPlan
from steerd.errors import RegistryError
from steerd.model import IPAddress, Reason, Route, Target, UnixDaemon
from steerd.wire.registry import DATAGRAMS, REGISTRY

_UNEXTENDED = {
    Unextended.PASS: Reason.UNEXTENDED_PASS,
    Unextended.DEFAULT: Reason.UNEXTENDED_DEFAULT,
    Unextended.UNMATCHED: Reason.UNEXTENDED_UNMATCHED,
    Unextended.INSPECT: Reason.LATE,
}

_DYNAMIC_BIT = DYNAMIC >> 24


class Registry:
    """The writer's side; the main process holds the only one."""

    def __init__(
        self,
        state_dir: str,
        effects: Effects | None = None,
        relay_effects: relays.Effects | None = None,
        states: States | None = None,
    ) -> None:
        """`effects`: what leases do to the kernel; `relay_effects`: what `unix:` targets do to the relay; None:
        nothing. `states`: of targets, as workers see them."""
        self._store = Store(state_dir)
        self.relays = RelayTable(self._store, relay_effects or relays.NoEffects())
        self.routes = RouteTable(self._store, self.relays)
        self.leases = LeaseTable(self._store, self.routes, effects or NoEffects())
        self.sessions = SessionTable(self._store)
        self.drains = DrainTable(self._store, self.routes, states)
        self._groups_seen: tuple[int, list[Group]] = (-1, [])

    def close(self) -> None:
        self._store.close()

    def on_answers_changed(self, call: Callable[[], None]) -> None:
        """As Store.on_answers_changed. `call` must not raise: what is on the disk by then is not yet noted here."""
        self._store.on_answers_changed = call

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever changes something in several steps."""
        return self._store.lock

    def ids(self, txn: lmdb.Transaction[bytes]) -> IdGiver:
        """Gives target ids inside a transaction, as the configuration in force allows."""
        return self._store.ids(txn, self.routes.force.config.gateway.mark.highest_id)

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction[bytes]]:
        """Everything as it is at one moment."""
        with self._store.env.begin() as txn:
            yield txn

    def written(self, targets: Iterable[Target]) -> list[str]:
        """Targets as they stand in the configuration."""
        with self.reading() as txn:
            return list(dict.fromkeys(str(self._store.written(txn, target)) for target in targets))

    def reader(self) -> Reader:
        """What a worker sees, for this process."""
        return Reader("", self._store.env)

    def groups_in_use(self) -> list[Group]:
        """What routes, defaults and the like lead to now, the configuration's and dynamic ones."""
        with self.reading() as txn:
            if txn.id() != self._groups_seen[0]:
                found = self.routes.groups_in_use(txn)
                plan = self._store.plan(txn)
                for service in () if plan is None else plan.services:
                    for ids in (service.default, service.on_silence or TargetIds()):
                        found |= {id_ for id_ in (ids.ipv4, ids.ipv6) if id_ >= GROUP}
                groups = [group for id_ in sorted(found) if (group := self._store.group(txn, id_)) is not None]
                self._groups_seen = txn.id(), groups
            return self._groups_seen[1]

    def targets(self, first: int, limit: int) -> list[tuple[int, Target, str | None]]:
        """Up to `limit` targets, by id from `first` on, and the name of the lease that has the address of each."""
        with self.reading() as txn:
            found = self._store.targets(txn, first, limit)
            names = (txn.get(target.address.packed, db=self.routes.leased) for _, target in found)
            return [
                (id_, target, None if name is None else str(name, "ascii"))
                for (id_, target), name in zip(found, names, strict=True)
            ]

    @contextmanager
    def packed_targets(self) -> Iterator[Callable[[int], PackedTarget | None]]:
        """Says what target ids stand for at one moment, quickly; None for one that was never given."""
        with self.reading() as txn:
            yield partial(self._store.packed_target, txn)

    def forget_dead_readers(self) -> int:
        """Free the reader slots of workers that were killed; returns how many."""
        return int(self._store.env.reader_check())

    def publish(self, config: Config) -> Plan:
        """Give ids to all targets of a configuration and put its plan, routes and sessions in force, in one
        transaction.

        Raises RegistryError if the mark bits have no room for the ids; then nothing has changed.
        """
        with self._store.lock:
            with self.routes.changing() as txn:
                ids = self._store.ids(txn, config.gateway.mark.highest_id)
                relays_took_effect = self.relays.publish(txn, config)
                probes, routes_took_effect = self.routes.publish(txn, ids, config)
                plan = self._plan(txn, ids, config, probes)
                self._store.put_plan(txn, plan)
                leases_took_effect = self.leases.publish(txn, config)
                sessions_took_effect = self.sessions.publish(txn, ids, config)
                drains_took_effect = self.drains.publish(txn, ids, config)
            relays_took_effect()
            routes_took_effect()
            leases_took_effect()
            sessions_took_effect()
            drains_took_effect()
        return plan

    def _plan(
        self,
        txn: lmdb.Transaction[bytes],
        ids: IdGiver,
        config: Config,
        probes: dict[str, list[Probe]],
    ) -> Plan:
        places = Places(config)
        return Plan(
            mark_low=config.gateway.mark.low,
            mark_high=config.gateway.mark.high,
            numbers=config.gateway.port_extension,
            endpoints=[
                EndpointPlan(e.address.packed, e.protocol, e.first_port, e.last_port, index)
                for index, service in enumerate(config.services)
                for e in service.endpoints
            ],
            services=[
                self._service_plan(txn, ids, service, probes[service.name], places.in_pool)
                for service in config.services
            ],
            pending=Limits(*msgspec.structs.astuple(config.gateway.pending)),
            waking=[
                *(WakeRange(address.packed, 1, wake.timeout) for address, wake in config.wakes.items()),
                *(
                    WakeRange(first.packed, length, pool.wake.timeout)
                    for pool in config.pools.values()
                    if pool.wake is not None
                    for version in (4, 6)
                    for first, length in pool.blocks(version)
                ),
            ],
        )

    def _service_plan(
        self,
        txn: lmdb.Transaction[bytes],
        ids: IdGiver,
        service: Service,
        probes: list[Probe],
        in_pool: Callable[[IPAddress], bool],
    ) -> ServicePlan:
        mapping = None
        if (pool := service.extension_pool) is not None:
            mapping = Mapping(
                by_extended_port=pool.by == "extended-port",
                first=pool.first,
                ipv4=[ids.for_block(block, pool.port) for block in pool.pool.blocks(4)],
                ipv6=[ids.for_block(block, pool.port) for block in pool.pool.blocks(6)],
            )
        return ServicePlan(
            name=service.name,
            reads_extension=PORT_EXTENSION in service.inspect,
            payload_parsers=self.routes.parsers(txn, service, [name for name in service.inspect if name in REGISTRY]),
            datagram_parsers=self.routes.parsers(txn, service, [name for name in service.inspect if name in DATAGRAMS]),
            connection_ids=list(service.connection_ids),
            probes=probes,
            mapping=mapping,
            default=ids.for_targets(service.default, service.choice, in_pool),
            unmatched=service.unmatched,
            unextended=_UNEXTENDED[service.unextended],
            first_payload_timeout=service.first_payload_timeout,
            on_silence=ids.for_targets(service.on_silence, service.choice, in_pool) if service.on_silence else None,
            trusted_proxies=[(p.network_address.packed, p.prefixlen) for p in service.trusted_proxies]
            if PROXY in service.inspect
            else None,
            sessions=SessionsPlan(service.sessions.key, service.sessions.on_new_source) if service.sessions else None,
        )


class Reader:
    """A worker's side; for one thread of the process that makes it, and not to be taken through fork. Between `rest`
    and the next `advance` or `refresh` there is no transaction, and no route can be looked up. Sessions and the meaning
    of target ids are read as they are now: nothing else depends on them."""

    def __init__(self, state_dir: str, env: lmdb.Environment | None = None) -> None:
        """`env`: the writer's, in the process of the writer, where LMDB allows no second one."""
        self._is_borrowed = env is not None
        try:
            self._env = open_to_read(state_dir) if env is None else env
            self._ids = self._env.open_db(b"ids", create=False)
            self._targets = self._env.open_db(b"targets", create=False)
            self._groups = self._env.open_db(b"groups", create=False)
            self._routes = self._env.open_db(b"routes", create=False)
            self._dynamic = self._env.open_db(b"dynamic", create=False)
            self._plan = self._env.open_db(b"plan", create=False)
            self._sessions = self._env.open_db(b"sessions", create=False)
            self._leased = self._env.open_db(b"leased", create=False)
            self._relayed = self._env.open_db(b"relayed", create=False)
            self._txn: lmdb.Transaction[bytes] | None = None
        except (OSError, lmdb.Error) as error:
            raise RegistryError(f"the registry in {state_dir}/registry cannot be read: {error}") from error
        # The last transaction looked at, and the plan it showed; the plan that was taken up last.
        self._seen = -1
        self._serial: bytes | None = None
        self._taken: bytes | None = None

    def advance(self) -> bool:
        """See what is in force now; whether its plan is another one than `refresh` returned last."""
        txn = self._begin()
        if txn.id() != self._seen:
            self._seen = txn.id()
            self._serial = txn.get(b"serial", db=self._plan)
        return self._serial != self._taken

    def rest(self) -> None:
        """Look up no route until the next `advance`, and let old pages go."""
        if self._txn is not None:
            self._txn.abort()
            self._txn = None

    def refresh(self) -> Plan:
        """See what is in force now, and return its plan; raises RegistryError if nothing was ever published."""
        txn = self._begin()
        plan = plan_of(txn, self._plan)
        if plan is None:
            raise RegistryError("the registry holds no plan: the main process publishes one before it starts workers")
        self._seen = txn.id()
        self._serial = self._taken = txn.get(b"serial", db=self._plan)
        return plan

    def _begin(self) -> lmdb.Transaction[bytes]:
        self.rest()
        self._txn = self._env.begin()
        return self._txn

    def route(self, key: bytes) -> bytes | None:
        """What a router key leads to: packed TargetIds, and what else the table keeps with them."""
        assert self._txn is not None, "a route is looked up where no decision is being made"
        return self._txn.get(key, db=self._dynamic if key[0] & _DYNAMIC_BIT else self._routes)

    def routes_of(self, service: str, probe: Probe) -> Iterator[Route]:
        """All routes that a probe may find, as control.route_records.stored_route gives them, while no other method is
        called; for explanations."""
        assert self._txn is not None, "routes are looked up where no decision is being made"
        with self._txn.cursor(db=self._dynamic if probe.number[0] & _DYNAMIC_BIT else self._routes) as cursor:
            there = cursor.set_range(probe.number)
            while there and cursor.key().startswith(probe.number):
                route = stored_route(service, probe, *cursor.item())
                if route is not None:
                    yield route
                there = cursor.next()

    def name_of_route(self, service: str, key: bytes, value: bytes) -> str:
        """Where a route of the table comes from: `services.web.routes[3]`, `dynamic`, or `lease NAME`."""
        name = origin_of(service, key, value)
        if name != "lease":
            return name
        ids = (int.from_bytes(value[:4], "big"), int.from_bytes(value[4:8], "big"))
        targets = [target for id_ in ids if id_ and (target := self.target(id_)) is not None]
        leases = [lease for target in targets if (lease := self.lease_of(target.address.packed)) is not None]
        return f"lease {leases[0]}" if leases else name

    def lease_of(self, address: bytes) -> str | None:
        """The name of the lease that has an address (packed), as it is now."""
        with self._env.begin() as txn:
            name = txn.get(address, db=self._leased)
            return None if name is None else str(name, "ascii")

    def is_target(self, address: bytes) -> bool:
        """Whether an id was ever given to a target, or a run of targets, that begins at an address (packed)."""
        with self._env.begin() as txn, txn.cursor(db=self._ids) as cursor:
            there = cursor.set_range(address)
            while there and cursor.key().startswith(address):
                # Else an IPv6 address that begins like this IPv4 address.
                if len(cursor.key()) == len(address) + ID_KEY_TAIL:
                    return True
                there = cursor.next()
            return False

    def session(self, service: str, session_id: str) -> Session | None:
        """The session of a service that has this id, as it is at this moment."""
        with self._env.begin() as txn:
            return session_table.find(txn, self._sessions, service, session_id)

    def target(self, target_id: int) -> Target | None:
        """What an id stands for, or None if it was never given."""
        with self._env.begin() as txn:
            return target_of(txn, self._targets, target_id)

    def group(self, group_id: int) -> Group | None:
        """What the id of a group stands for, or None if it was never given."""
        with self._env.begin() as txn:
            return group_of(txn, self._groups, group_id)

    def written(self, target: Target) -> UnixDaemon | Target:
        """A target as people write it: where the relay stands, the daemon behind it."""
        with self._env.begin() as txn:
            return written(txn, self._relayed, target)

    def close(self) -> None:
        self.rest()
        if not self._is_borrowed:
            self._env.close()
