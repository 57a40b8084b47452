"""The LMDB environment that the registry lives in, the target ids in it, and the plan.

One writer, the main process; its write transactions come one after the other, from whatever thread. A transaction is on
the disk before anybody is told of it (LMDB's default, kept), and a reader sees all of it or nothing. Readers take no
lock and wait for nobody; what one reads stays as it is until its transaction ends, so transactions are short: as long
as one lasts, no page that it could read is used again. An environment must not be taken through fork(2) (LMDB's locks
and reader slots belong to a process); whoever is forked opens its own.

  meta     "schema" -> u32; "next_id" -> u32; "next_serial" -> u64; others know their own keys
  ids      address (4 or 16) | length u32 | port u16  ->  first target id u32
  targets  first target id u32                        ->  length u32 | port u16 | address (4 or 16)
  plan     "plan" -> core.engine.Plan as msgpack; "serial" -> u64, another one for each plan

All numbers in network order, so that LMDB sorts them as numbers. A target is a block of one address; `extension_pool`
takes whole blocks. An id is given once and never gets a second meaning: the kernel's maps and packets under way may
still hold it when the configuration that asked for it is long gone.

Schemas. A registry of an older schema is brought up to this one when it is opened, in one transaction; one of a newer
schema is refused and left alone.

  1  routes by index of service and number of probe; no dynamic routes
  2  routes by number of shape (core.router); control.routes, control.leases
"""

from __future__ import annotations

import ipaddress
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from steerd.core.engine import IdBlock, Plan, TargetIds
from steerd.core.marks import FIRST_TARGET_ID
from steerd.core.pools import Block
from steerd.errors import RegistryError
from steerd.model import Target

SCHEMA = 2

# An upper bound for the file, not what it takes: address space only (64-bit), and LMDB grows into it.
_MAP_SIZE = 16 << 30
_MAX_READERS = 512
_MAX_DATABASES = 16

_ID = struct.Struct("!I")
_SERIAL = struct.Struct("!Q")
_ID_KEY_TAIL = struct.Struct("!IH")
_TARGET_HEAD = struct.Struct("!IH")


def _path(state_dir: str) -> Path:
    return Path(state_dir) / "registry"


class Store:
    """The writer's environment, made if it is not there; raises RegistryError for one of a newer schema."""

    def __init__(self, state_dir: str) -> None:
        self.path = _path(state_dir)
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o750)
            self.env = lmdb.open(str(self.path), map_size=_MAP_SIZE, max_dbs=_MAX_DATABASES, max_readers=_MAX_READERS)
        except (OSError, lmdb.Error) as error:
            raise RegistryError(f"the registry in {self.path} cannot be opened: {error}") from error
        self.lock = threading.RLock()
        """Held by whoever writes. Values that must change together with what is written are changed under it."""
        meta = self.env.open_db(b"meta")
        with self.env.begin(write=True) as txn:
            schema = txn.get(b"schema", db=meta)
            if schema is None:
                txn.put(b"schema", _ID.pack(SCHEMA), db=meta)
                txn.put(b"next_id", _ID.pack(FIRST_TARGET_ID), db=meta)
            elif schema != _ID.pack(SCHEMA):
                self._upgrade(txn, meta, _ID.unpack(schema)[0])
        self.meta = meta
        self._ids = self.env.open_db(b"ids")
        self._targets = self.env.open_db(b"targets")
        self._plan = self.env.open_db(b"plan")

    def _upgrade(self, txn: lmdb.Transaction[bytes], meta: Any, schema: int) -> None:
        if schema > SCHEMA:
            raise RegistryError(
                f"the registry in {self.path} has schema {schema}, and this steerd reads schemas up to {SCHEMA}: it was"
                " written by a newer steerd, which must be used again"
            )
        if schema < 2:
            # Nothing is lost: both are written anew when a configuration is put in force.
            for name in (b"routes", b"plan"):
                txn.drop(self.env.open_db(name, txn=txn), delete=False)
        txn.put(b"schema", _ID.pack(SCHEMA), db=meta)

    @contextmanager
    def writing(self) -> Iterator[lmdb.Transaction[bytes]]:
        """One write transaction, on the disk when the block ends, undone if it raises. Raises RegistryError."""
        try:
            with self.lock, self.env.begin(write=True) as txn:
                yield txn
        except lmdb.Error as error:
            raise RegistryError(f"the registry in {self.path} cannot be written: {error}") from error

    def ids(self, txn: lmdb.Transaction[bytes], highest: int) -> IdGiver:
        """Gives target ids up to `highest` inside a write transaction."""
        return IdGiver(txn, self.meta, self._ids, self._targets, highest)

    def next_serial(self, txn: lmdb.Transaction[bytes]) -> int:
        """A number from 1 on that was never given before."""
        packed = txn.get(b"next_serial", db=self.meta)
        serial = 1 if packed is None else int(_SERIAL.unpack(packed)[0])
        txn.put(b"next_serial", _SERIAL.pack(serial + 1), db=self.meta)
        return serial

    def target(self, txn: lmdb.Transaction[bytes], target_id: int) -> Target | None:
        """What an id stands for, or None if it was never given."""
        return target_of(txn, self._targets, target_id)

    def put_plan(self, txn: lmdb.Transaction[bytes], plan: Plan) -> None:
        """What workers follow from the end of this transaction on. One that says what is in force is no new one."""
        packed_plan = msgspec.msgpack.encode(plan)
        if txn.get(b"plan", db=self._plan) == packed_plan:
            return
        txn.put(b"plan", packed_plan, db=self._plan)
        packed = txn.get(b"serial", db=self._plan)
        serial = 0 if packed is None else int(_SERIAL.unpack(packed)[0])
        txn.put(b"serial", _SERIAL.pack(serial + 1), db=self._plan)

    def plan(self, txn: lmdb.Transaction[bytes]) -> Plan | None:
        """The plan in force; None if there never was one."""
        return plan_of(txn, self._plan)

    def close(self) -> None:
        self.env.close()


def open_to_read(state_dir: str) -> lmdb.Environment:
    """A reader's environment; raises lmdb.Error if there is none."""
    return lmdb.open(
        str(_path(state_dir)), readonly=True, map_size=_MAP_SIZE, max_dbs=_MAX_DATABASES, max_readers=_MAX_READERS
    )


def target_of(txn: lmdb.Transaction[bytes], targets: Any, target_id: int) -> Target | None:
    """What an id stands for among `targets` (the database), or None if it was never given."""
    with txn.cursor(db=targets) as cursor:
        wanted = _ID.pack(target_id)
        found = cursor.set_range(wanted)
        if not (found and cursor.key() == wanted) and not (cursor.prev() if found else cursor.last()):
            return None
        first_id = _ID.unpack(cursor.key())[0]
        value = cursor.value()
    length, port = _TARGET_HEAD.unpack_from(value)
    if target_id - first_id >= length:
        return None
    return Target(ipaddress.ip_address(bytes(value[_TARGET_HEAD.size :])) + (target_id - first_id), port)


def plan_of(txn: lmdb.Transaction[bytes], plan: Any) -> Plan | None:
    """The plan in the database `plan`, or None if there never was one."""
    blob = txn.get(b"plan", db=plan)
    return None if blob is None else msgspec.msgpack.decode(blob, type=Plan)


class IdGiver:
    """Looks target ids up, and gives new ones, inside one write transaction."""

    def __init__(self, txn: lmdb.Transaction[bytes], meta: Any, ids: Any, targets: Any, highest: int) -> None:
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
