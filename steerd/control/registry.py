"""The registry: what must outlive a process, and what all workers read, in one LMDB environment.

One writer, the main process; workers read through LMDB's shared memory, without locks. A transaction is on the disk
before anybody is told of it. Target ids are in control.store, sessions in control.sessions; here are the other two:

  routes   router key (core.router)                   ->  target id IPv4 u32 | target id IPv6 u32
  plan     "plan"                                     ->  core.engine.Plan as msgpack
"""

from __future__ import annotations

from collections.abc import Iterable

import lmdb
import msgspec

from steerd.config import PORT_EXTENSION, PROXY, Config, Service, Unextended
from steerd.control import sessions as session_table
from steerd.control.sessions import SessionTable
from steerd.control.store import IdGiver, Store, open_to_read, target_of
from steerd.core.engine import EndpointPlan, Mapping, PayloadParser, Plan, ServicePlan
from steerd.core.pending import Limits
from steerd.core.router import compile_routes
from steerd.core.sessions import Session, SessionsPlan
from steerd.errors import RegistryError
from steerd.model import Reason, Route, Target
from steerd.wire.registry import REGISTRY, Parser

_UNEXTENDED = {
    Unextended.PASS: Reason.UNEXTENDED_PASS,
    Unextended.DEFAULT: Reason.UNEXTENDED_DEFAULT,
    Unextended.UNMATCHED: Reason.UNEXTENDED_UNMATCHED,
    Unextended.INSPECT: Reason.LATE,
}


class Registry:
    """The writer's side; the main process holds the only one."""

    def __init__(self, state_dir: str) -> None:
        self._store = Store(state_dir)
        self._routes = self._store.env.open_db(b"routes")
        self._plan = self._store.env.open_db(b"plan")
        self.sessions = SessionTable(self._store)

    def close(self) -> None:
        self._store.close()

    def forget_dead_readers(self) -> int:
        """Free the reader slots of workers that were killed; returns how many."""
        return int(self._store.env.reader_check())

    def publish(self, config: Config) -> Plan:
        """Give ids to all targets of a configuration and put its plan, routes and sessions in force, in one
        transaction.

        Raises RegistryError if the mark bits have no room for the ids; then nothing has changed.
        """
        with self._store.lock:
            with self._store.writing() as txn:
                ids = self._store.ids(txn, config.gateway.mark.highest_id)
                plan = self._publish(txn, ids, config)
                sessions_took_effect = self.sessions.publish(txn, ids, config)
            sessions_took_effect()
        return plan

    def _publish(self, txn: lmdb.Transaction, ids: IdGiver, config: Config) -> Plan:
        txn.drop(self._routes, delete=False)
        services = []
        for index, service in enumerate(config.services):
            services.append(self._publish_service(txn, ids, index, service))
        plan = Plan(
            mark_low=config.gateway.mark.low,
            mark_high=config.gateway.mark.high,
            numbers=config.gateway.port_extension,
            endpoints=[
                EndpointPlan(e.address.packed, e.protocol, e.first_port, e.last_port, index)
                for index, service in enumerate(config.services)
                for e in service.endpoints
            ],
            services=services,
            pending=Limits(*msgspec.structs.astuple(config.gateway.pending)),
        )
        txn.put(b"plan", msgspec.msgpack.encode(plan), db=self._plan)
        return plan

    def _publish_service(self, txn: lmdb.Transaction, ids: IdGiver, index: int, service: Service) -> ServicePlan:
        routes = service.routes
        compiled = compile_routes(index, routes, service.key_order)
        packed = [ids.for_targets(route.targets).pack() for route in routes]
        with txn.cursor(db=self._routes) as cursor:
            cursor.putmulti(sorted((key, packed[number]) for key, number in compiled.entries))
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
            payload_parsers=[
                PayloadParser(name, sorted(_patterns(REGISTRY[name], routes)))
                for name in service.inspect
                if name != PORT_EXTENSION
            ],
            probes=list(compiled.probes),
            mapping=mapping,
            default=ids.for_targets(service.default),
            unmatched=service.unmatched,
            unextended=_UNEXTENDED[service.unextended],
            first_payload_timeout=service.first_payload_timeout,
            on_silence=ids.for_targets(service.on_silence) if service.on_silence else None,
            trusted_proxies=[(p.network_address.packed, p.prefixlen) for p in service.trusted_proxies]
            if PROXY in service.inspect
            else None,
            sessions=SessionsPlan(service.sessions.key, service.sessions.on_new_source) if service.sessions else None,
        )


def _patterns(parser: Parser, routes: Iterable[Route]) -> set[str]:
    """The values that routes compare this parser's keys with."""
    return {condition.value for route in routes for condition in route.conditions if parser.gives(condition.key)}


class Reader:
    """A worker's side. One read transaction stays open; `refresh` moves it on to what was published last. Sessions and
    the meaning of target ids are read as they are now: nothing else depends on them."""

    def __init__(self, state_dir: str) -> None:
        try:
            self._env = open_to_read(state_dir)
            self._targets = self._env.open_db(b"targets", create=False)
            self._routes = self._env.open_db(b"routes", create=False)
            self._plan = self._env.open_db(b"plan", create=False)
            self._sessions = self._env.open_db(b"sessions", create=False)
            self._txn = self._env.begin()
        except lmdb.Error as error:
            raise RegistryError(f"the registry in {state_dir}/registry cannot be read: {error}") from error

    def refresh(self) -> Plan:
        """See what is in force now, and return its plan; raises RegistryError if nothing was ever published."""
        self._txn.abort()
        self._txn = self._env.begin()
        blob = self._txn.get(b"plan", db=self._plan)
        if blob is None:
            raise RegistryError("the registry holds no plan: the main process publishes one before it starts workers")
        plan: Plan = msgspec.msgpack.decode(blob, type=Plan)
        return plan

    def route(self, key: bytes) -> bytes | None:
        """The packed TargetIds behind a router key."""
        entry: bytes | None = self._txn.get(key, db=self._routes)
        return entry

    def session(self, service: str, session_id: str) -> Session | None:
        """The session of a service that has this id, as it is at this moment."""
        with self._env.begin() as txn:
            return session_table.find(txn, self._sessions, service, session_id)

    def target(self, target_id: int) -> Target | None:
        """What an id stands for, or None if it was never given."""
        with self._env.begin() as txn:
            return target_of(txn, self._targets, target_id)

    def close(self) -> None:
        self._txn.abort()
        self._env.close()
