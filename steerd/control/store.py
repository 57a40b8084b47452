"""The LMDB environment that the registry lives in, the target ids in it, and the plan.

One writer, the main process; its write transactions come one after the other, from whatever thread. A transaction is on
the disk before anybody is told of it (LMDB's default, kept), and a reader sees all of it or nothing. Readers take no
lock and wait for nobody; what one reads stays as it is until its transaction ends, so transactions are short: as long
as one lasts, no page that it could read is used again. An environment must not be taken through fork(2) (LMDB's locks
and reader slots belong to a process); whoever is forked opens its own.

  meta     "schema" -> u32; "next_id", "next_group" -> u32; "next_serial" -> u64; others know their own keys
  ids      address (4 or 16) | length u32 | port u16  ->  first target id u32
  targets  first target id u32                        ->  length u32 | port u16 | address (4 or 16)
  groups   group id u32                               ->  core.choice.Group as msgpack
  members  BLAKE2b-32 of what `groups` holds          ->  group id u32
  plan     "plan" -> core.engine.Plan as msgpack; "serial" -> u64, another one for each plan

All numbers in network order, so that LMDB sorts them as numbers. A target is a block of one address; `extension_pool`
takes whole blocks. An id is given once and never gets a second meaning: the kernel's maps and packets under way may
still hold it when the configuration that asked for it is long gone. Neither does that of a group.

Schemas. A registry of an older schema is brought up to this one when it is opened, in one transaction; one of a newer
schema is refused and left alone.

  1  routes by index of service and number of probe; no dynamic routes
  2  routes by number of shape (core.router); control.routes, control.leases
  3  groups (core.choice), which routes may lead to; control.drains
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import msgspec

from steerd.core.choice import GROUP, Group, Member
from steerd.core.engine import NO_TARGET, IdBlock, Plan, TargetIds
from steerd.core.marks import FIRST_TARGET_ID
from steerd.core.pools import Block
from steerd.errors import RegistryError
from steerd.model import Choice, IPAddress, Target, UnixDaemon

SCHEMA = 3

# An upper bound for the file, not what it takes: address space only (64-bit), and LMDB grows into it.
_MAP_SIZE = 16 << 30
_MAX_READERS = 512
_MAX_DATABASES = 32

_ID = struct.Struct("!I")
_MOST = (1 << 32) - 1
_SERIAL = struct.Struct("!Q")
_ID_KEY_TAIL = struct.Struct("!IH")
ID_KEY_TAIL = _ID_KEY_TAIL.size
"""Bytes of a key of `ids` behind the address."""
_ONE = (1).to_bytes(4, "big")
_TARGET_HEAD = struct.Struct("!IH")
_decode_group = msgspec.msgpack.Decoder(Group).decode


def _path(state_dir: str) -> Path:
    return Path(state_dir) / "registry"


class PackedTarget(NamedTuple):
    """A model.Target, its address as 4 or 16 bytes."""

    address: bytes
    port: int


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
        self.on_new_ids: Callable[[Block, int, IdBlock], None] = lambda _block, _port, _ids: None
        """Is told of ids that are given for the first time, while the transaction that gives them is under way."""
        self.on_answers_changed: Callable[[], None] = lambda: None
        """Is called under the lock when a change is in force, for workers, that answers to extensions may depend on
        (core.offload), before anybody is told so."""
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
        self._groups = self.env.open_db(b"groups")
        self._members = self.env.open_db(b"members")
        self._plan = self.env.open_db(b"plan")
        self.relays = self.env.open_db(b"relays")
        self.relayed = self.env.open_db(b"relayed")

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
        # From 2 to 3 there is nothing to do but to keep a steerd away that would take a group for a target.
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
        return IdGiver(txn, self, highest)

    def next_serial(self, txn: lmdb.Transaction[bytes]) -> int:
        """A number from 1 on that was never given before."""
        packed = txn.get(b"next_serial", db=self.meta)
        serial = 1 if packed is None else int(_SERIAL.unpack(packed)[0])
        txn.put(b"next_serial", _SERIAL.pack(serial + 1), db=self.meta)
        return serial

    def target(self, txn: lmdb.Transaction[bytes], target_id: int) -> Target | None:
        """What an id stands for, or None if it was never given."""
        return target_of(txn, self._targets, target_id)

    def packed_target(self, txn: lmdb.Transaction[bytes], target_id: int) -> PackedTarget | None:
        """As `target`, its address as bytes."""
        return packed_target_of(txn, self._targets, target_id)

    def ids_at(self, txn: lmdb.Transaction[bytes], address: IPAddress, port: int | None) -> Iterator[int]:
        """The ids of single targets with this address, and port (0: `same`; None: any)."""
        beginning = address.packed + _ONE
        with txn.cursor(db=self._ids) as cursor:
            there = cursor.set_range(beginning)
            while there and cursor.key().startswith(beginning):
                key = cursor.key()
                length, found = _ID_KEY_TAIL.unpack(key[-_ID_KEY_TAIL.size :])
                if len(key) == len(address.packed) + _ID_KEY_TAIL.size and length == 1 and port in (None, found):
                    yield _ID.unpack(cursor.value())[0]
                there = cursor.next()

    def group(self, txn: lmdb.Transaction[bytes], group_id: int) -> Group | None:
        """What the id of a group stands for, or None if it was never given."""
        return group_of(txn, self._groups, group_id)

    def targets(self, txn: lmdb.Transaction[bytes], first: int, limit: int) -> list[tuple[int, Target]]:
        """Up to `limit` targets with their ids, from the id `first` on."""
        found: list[tuple[int, Target]] = []
        with txn.cursor(db=self._targets) as cursor:
            wanted = _ID.pack(min(first, _MOST))
            there = cursor.set_range(wanted)
            if not (there and cursor.key() == wanted):
                # The block before may reach as far as this.
                there = cursor.prev() if there else cursor.last()
                there = there or cursor.first()
            while there and len(found) < limit:
                first_id, value = _ID.unpack(cursor.key())[0], cursor.value()
                length, port = _TARGET_HEAD.unpack_from(value)
                address = ipaddress.ip_address(bytes(value[_TARGET_HEAD.size :]))
                for id_ in range(max(first, first_id), min(first_id + length, max(first, first_id) + limit)):
                    found.append((id_, Target(address + (id_ - first_id), port)))
                there = cursor.next()
        return found[:limit]

    def written(self, txn: lmdb.Transaction[bytes], target: Target) -> UnixDaemon | Target:
        """A target as people write it: where the relay stands, the daemon behind it."""
        return written(txn, self.relayed, target)

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
    """A reader's environment; raises lmdb.Error if there is none, OSError if its owner cannot be become."""
    with _not_as_root(state_dir):
        return lmdb.open(
            str(_path(state_dir)), readonly=True, map_size=_MAP_SIZE, max_dbs=_MAX_DATABASES, max_readers=_MAX_READERS
        )


@contextmanager
def _not_as_root(state_dir: str) -> Iterator[None]:
    """LMDB writes to lock.mdb, even to read. What it is a link to is the doing of the directory's owner, who must not
    have root write anywhere."""
    owner = Path(state_dir).stat().st_uid if Path(state_dir).exists() else 0
    if os.geteuid() != 0 or owner == 0:
        yield
        return
    os.seteuid(owner)
    try:
        yield
    finally:
        os.seteuid(0)


def target_of(txn: lmdb.Transaction[bytes], targets: Any, target_id: int) -> Target | None:
    """What an id stands for among `targets` (the database), or None if it was never given."""
    packed = packed_target_of(txn, targets, target_id)
    return None if packed is None else Target(ipaddress.ip_address(packed.address), packed.port)


def packed_target_of(txn: lmdb.Transaction[bytes], targets: Any, target_id: int) -> PackedTarget | None:
    """As `target_of`, without an object for the address: for who asks 65,536 times."""
    wanted = _ID.pack(target_id)
    value = txn.get(wanted, db=targets)
    if value is not None:
        return PackedTarget(value[_TARGET_HEAD.size :], _TARGET_HEAD.unpack_from(value)[1])
    with txn.cursor(db=targets) as cursor:
        # The block before may reach as far as this.
        if not (cursor.prev() if cursor.set_range(wanted) else cursor.last()):
            return None
        place = target_id - _ID.unpack(cursor.key())[0]
        value = cursor.value()
    length, port = _TARGET_HEAD.unpack_from(value)
    if place >= length:
        return None
    return PackedTarget((ipaddress.ip_address(value[_TARGET_HEAD.size :]) + place).packed, port)


def group_of(txn: lmdb.Transaction[bytes], groups: Any, group_id: int) -> Group | None:
    """What the id of a group stands for among `groups` (the database), or None if it was never given."""
    packed = txn.get(_ID.pack(group_id), db=groups)
    return None if packed is None else _decode_group(packed)


def written(txn: lmdb.Transaction[bytes], relayed: Any, target: Target) -> UnixDaemon | Target:
    """The daemon on a unix socket that a target stands for, by `relayed` (the database), or the target itself."""
    name = txn.get(target.address.packed, db=relayed)
    return target if name is None else UnixDaemon.of_name(str(name, "utf-8"))


def plan_of(txn: lmdb.Transaction[bytes], plan: Any) -> Plan | None:
    """The plan in the database `plan`, or None if there never was one."""
    blob = txn.get(b"plan", db=plan)
    return None if blob is None else msgspec.msgpack.decode(blob, type=Plan)


class IdGiver:
    """Looks target ids up, and gives new ones, inside one write transaction."""

    def __init__(self, txn: lmdb.Transaction[bytes], store: Store, highest: int) -> None:
        self._txn = txn
        self._store = store
        self._highest = highest

    def for_targets(
        self,
        targets: Sequence[Target],
        choice: Choice | None = None,
        in_pool: Callable[[IPAddress], bool] | None = None,
    ) -> TargetIds:
        """The ids of at most one target of each family; with a choice of as many as there are. `in_pool` says whether
        an address is an alias."""
        if choice is None:
            by_version = {t.address.version: self.for_block(Block(t.address, 1), t.port).first_id for t in targets}
            return TargetIds(by_version.get(4, NO_TARGET), by_version.get(6, NO_TARGET))
        return TargetIds(
            *(self._for_family([t for t in targets if t.address.version == v], choice, in_pool) for v in (4, 6))
        )

    def _for_family(
        self, targets: Sequence[Target], choice: Choice, in_pool: Callable[[IPAddress], bool] | None
    ) -> int:
        ids = [self.for_block(Block(target.address, 1), target.port).first_id for target in targets]
        if len(ids) < 2:
            return ids[0] if ids else NO_TARGET
        assert in_pool is not None, "several targets of a family, and nobody knows which are aliases"
        members = tuple(
            Member(id_, target.address.packed + target.port.to_bytes(2, "big"), not in_pool(target.address))
            for id_, target in zip(ids, targets, strict=True)
        )
        return self._for_group(Group(*choice, members))

    def _for_group(self, group: Group) -> int:
        packed = msgspec.msgpack.encode(group)
        digest = hashlib.blake2b(packed, digest_size=32).digest()
        known = self._number(digest, self._store._members)
        if known is not None:
            return known
        next_ = self._number(b"next_group", self._store.meta)
        group_id = GROUP if next_ is None else next_
        self._txn.put(digest, _ID.pack(group_id), db=self._store._members)
        self._txn.put(_ID.pack(group_id), packed, db=self._store._groups)
        self._txn.put(b"next_group", _ID.pack(group_id + 1), db=self._store.meta)
        return group_id

    def for_block(self, block: Block, port: int) -> IdBlock:
        """The ids of consecutive addresses with one port (0: `same`)."""
        key = block.first.packed + _ID_KEY_TAIL.pack(block.length, port)
        known = self._number(key, self._store._ids)
        first_id = self._number(b"next_id", self._store.meta) if known is None else known
        assert first_id is not None  # a registry is born with "next_id"
        if first_id + block.length - 1 > self._highest:
            raise RegistryError(
                f"the mark bits have room for target ids up to {self._highest}, and {block.first} (+{block.length - 1})"
                f" would need {first_id + block.length - 1}: widen gateway.mark_bits"
            )
        if known is None:
            packed_id = _ID.pack(first_id)
            self._txn.put(key, packed_id, db=self._store._ids)
            value = _TARGET_HEAD.pack(block.length, port) + block.first.packed
            self._txn.put(packed_id, value, db=self._store._targets)
            self._txn.put(b"next_id", _ID.pack(first_id + block.length), db=self._store.meta)
            self._store.on_new_ids(block, port, IdBlock(first_id, block.length))
        return IdBlock(first_id, block.length)

    def _number(self, key: bytes, database: Any) -> int | None:
        packed = self._txn.get(key, db=database)
        return None if packed is None else int(_ID.unpack(packed)[0])
