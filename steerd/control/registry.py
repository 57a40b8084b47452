"""The registry: what must outlive a process, and what all workers read, in one LMDB environment.

One writer, the main process; workers read through LMDB's shared memory, without locks. A transaction is on the disk
before anybody is told of it (LMDB's default, kept).

  meta     "schema" -> u32; "next_id" -> u32
  ids      address (4 or 16) | length u32 | port u16  ->  first target id u32
  targets  first target id u32                        ->  length u32 | port u16 | address (4 or 16)
  routes   router key (core.router)                   ->  target id IPv4 u32 | target id IPv6 u32
  plan     "plan"                                     ->  core.engine.Plan as msgpack

All numbers in network order, so that LMDB sorts them as numbers. A target is a block of one address; `extension_pool`
takes whole blocks. An id is given once and never gets a second meaning: the kernel's maps and packets under way may
still hold it when the configuration that asked for it is long gone.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from steerd.config import PORT_EXTENSION, Config, Service, Unextended
from steerd.core.engine import (
    EndpointPlan,
    IdBlock,
    Mapping,
    PayloadParser,
    Plan,
    ServicePlan,
    TargetIds,
)
from steerd.core.marks import FIRST_TARGET_ID
from steerd.core.pending import Limits
from steerd.core.pools import Block
from steerd.core.router import compile_routes
from steerd.errors import RegistryError
from steerd.model import Reason, Route, Target
from steerd.wire.registry import REGISTRY, Parser

SCHEMA = 1

# An upper bound for the file, not what it takes: address space only (64-bit), and LMDB grows into it.
_MAP_SIZE = 16 << 30
_MAX_READERS = 512

_ID = struct.Struct("!I")
_ID_KEY_TAIL = struct.Struct("!IH")
_TARGET_HEAD = struct.Struct("!IH")

_UNEXTENDED = {
    Unextended.PASS: Reason.UNEXTENDED_PASS,
    Unextended.DEFAULT: Reason.UNEXTENDED_DEFAULT,
    Unextended.UNMATCHED: Reason.UNEXTENDED_UNMATCHED,
    Unextended.INSPECT: Reason.LATE,
}


def _path(state_dir: str) -> Path:
    return Path(state_dir) / "registry"


class Registry:
    """The writer's side; the main process holds the only one."""

    def __init__(self, state_dir: str) -> None:
        path = self._path = _path(state_dir)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._env = lmdb.open(str(path), map_size=_MAP_SIZE, max_dbs=8, max_readers=_MAX_READERS)
        except (OSError, lmdb.Error) as error:
            raise RegistryError(f"the registry in {path} cannot be opened: {error}") from error
        self._meta = self._env.open_db(b"meta")
        self._ids = self._env.open_db(b"ids")
        self._targets = self._env.open_db(b"targets")
        self._routes = self._env.open_db(b"routes")
        self._plan = self._env.open_db(b"plan")
        with self._env.begin(write=True) as txn:
            schema = txn.get(b"schema", db=self._meta)
            if schema is None:
                txn.put(b"schema", _ID.pack(SCHEMA), db=self._meta)
                txn.put(b"next_id", _ID.pack(FIRST_TARGET_ID), db=self._meta)
            elif schema != _ID.pack(SCHEMA):
                found = _ID.unpack(schema)[0]
                raise RegistryError(f"the registry in {path} has schema {found}, and this steerd reads schema {SCHEMA}")

    def close(self) -> None:
        self._env.close()

    def forget_dead_readers(self) -> int:
        """Free the reader slots of workers that were killed; returns how many."""
        return int(self._env.reader_check())

    def publish(self, config: Config) -> Plan:
        """Give ids to all targets of a configuration and put its plan and routes in force, in one transaction.

        Raises RegistryError if the mark bits have no room for the ids; then nothing has changed.
        """
        try:
            return self._publish(config)
        except lmdb.Error as error:
            raise RegistryError(f"the registry in {self._path} cannot be written: {error}") from error

    def _publish(self, config: Config) -> Plan:
        with self._env.begin(write=True) as txn:
            ids = _IdGiver(txn, self._meta, self._ids, self._targets, config.gateway.mark.highest_id)
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

    def _publish_service(self, txn: lmdb.Transaction, ids: _IdGiver, index: int, service: Service) -> ServicePlan:
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
        )


def _patterns(parser: Parser, routes: Iterable[Route]) -> set[str]:
    """The values that routes compare this parser's keys with."""
    return {condition.value for route in routes for condition in route.conditions if parser.gives(condition.key)}


class _IdGiver:
    """Looks target ids up, and gives new ones, inside one write transaction."""

    def __init__(self, txn: lmdb.Transaction, meta: Any, ids: Any, targets: Any, highest: int) -> None:
        self._txn = txn
        self._meta = meta
        self._ids = ids
        self._targets = targets
        self._highest = highest

    def for_targets(self, targets: Iterable[Target]) -> TargetIds:
        """The ids of at most one target of each family."""
        by_version = {t.address.version: self.for_block(Block(t.address, 1), t.port).first_id for t in targets}
        return TargetIds(by_version.get(4, 0), by_version.get(6, 0))

    def for_block(self, block: Block, port: int) -> IdBlock:
        """The ids of consecutive addresses with one port (0: `same`)."""
        key = block.first.packed + _ID_KEY_TAIL.pack(block.length, port)
        known = self._number(key, self._ids)
        first_id = self._number(b"next_id", self._meta) if known is None else known
        assert first_id is not None  # a registry is born with "next_id"
        if first_id + block.length - 1 > self._highest:
            raise RegistryError(
                f"the mark bits have room for target ids up to {self._highest}, and {block.first} (+{block.length - 1})"
                f" would need {first_id + block.length - 1}: widen gateway.mark_bits"
            )
        if known is None:
            packed_id = _ID.pack(first_id)
            self._txn.put(key, packed_id, db=self._ids)
            value = _TARGET_HEAD.pack(block.length, port) + block.first.packed
            self._txn.put(packed_id, value, db=self._targets)
            self._txn.put(b"next_id", _ID.pack(first_id + block.length), db=self._meta)
        return IdBlock(first_id, block.length)

    def _number(self, key: bytes, database: Any) -> int | None:
        packed = self._txn.get(key, db=database)
        return None if packed is None else int(_ID.unpack(packed)[0])


class Reader:
    """A worker's side. One read transaction stays open; `refresh` moves it on to what was published last."""

    def __init__(self, state_dir: str) -> None:
        path = _path(state_dir)
        try:
            self._env = lmdb.open(str(path), readonly=True, map_size=_MAP_SIZE, max_dbs=8, max_readers=_MAX_READERS)
            self._targets = self._env.open_db(b"targets", create=False)
            self._routes = self._env.open_db(b"routes", create=False)
            self._plan = self._env.open_db(b"plan", create=False)
            self._txn = self._env.begin()
        except lmdb.Error as error:
            raise RegistryError(f"the registry in {path} cannot be read: {error}") from error

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

    def target(self, target_id: int) -> Target | None:
        """What an id stands for, or None if it was never given."""
        with self._txn.cursor(db=self._targets) as cursor:
            wanted = _ID.pack(target_id)
            found = cursor.set_range(wanted)
            if not (found and cursor.key() == wanted) and not (cursor.prev() if found else cursor.last()):
                return None
            first_id = _ID.unpack(cursor.key())[0]
            value = cursor.value()
        length, port = _TARGET_HEAD.unpack_from(value)
        if target_id - first_id >= length:
            return None
        return Target(ipaddress.ip_address(value[_TARGET_HEAD.size :]) + (target_id - first_id), port)

    def close(self) -> None:
        self._txn.abort()
        self._env.close()
