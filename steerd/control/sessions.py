"""The session table: which session id of which service belongs to which target and source (core.sessions).

  sessions   service | 0x00 | session id   ->   _Record as msgpack

Sessions of the configuration and sessions of the API live side by side in it, and each knows where it came from:

- `publish` makes those of the configuration what the configuration says: it adds, changes and removes them, and leaves
  the others alone. An id that both name is the configuration's from then on; the API cannot change it.
- `put` and `remove` are the API's. A session of the API outlives restarts, and a time in which its service, or the
  service's `sessions`, is not in the configuration; then it is not in force, and back as soon as they are.

What a target must be is checked against the configuration in force, in the same transaction that writes it down; and
again with each new configuration: a session whose target is neither in a pool nor external any more stays, but is not
`usable`, and its connections are refused.

The source that a session has *now* may be another than the one that was written for it (`claim`). It is kept for as
long as the written one stays the same, over reloads and restarts; a `put` and a changed `source` in the configuration
begin anew.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import lmdb
import msgspec
from msgspec.structs import replace

from steerd.config import Config, Service
from steerd.config.sessions import check_session
from steerd.control.relays import Standing
from steerd.control.store import IdGiver, Store
from steerd.core.choice import GROUP
from steerd.core.pools import PoolMap
from steerd.core.sessions import MAX_ID, Claim, Session, SessionEntry
from steerd.errors import ConfigError, RegistryError, RequestError
from steerd.model import IPAddress


class SessionView(msgspec.Struct, frozen=True):
    """One session for people and programs outside."""

    service: str
    id: str
    targets: list[str]
    source: str | None
    """None: no client came yet, and none was written down."""
    origin: Literal["configuration", "api"]
    usable: bool
    """False: the targets are not for use under the configuration in force; clients are refused."""


class _Record(Session, frozen=True, array_like=True, gc=False):
    """What the table holds: what workers read first, then what is the main process's own."""

    written: bytes
    """The source that was written for it; empty: none."""
    of_configuration: bool
    external4: bool
    """The target was in no pool, and said so."""
    external6: bool


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Record).decode
_decode_session = msgspec.msgpack.Decoder(Session).decode


def find(txn: lmdb.Transaction[bytes], sessions: Any, service: str, session_id: str) -> Session | None:
    """The session with this id, whatever characters a client may have put into it."""
    if len(session_id) > MAX_ID or not session_id.isascii():
        return None
    found = txn.get(_key(service, session_id), db=sessions)
    return None if found is None else _decode_session(found)


def _key(service: str, session_id: str) -> bytes:
    return b"%b\0%b" % (service.encode("ascii"), session_id.encode("ascii"))


class SessionTable:
    """The writer's side. Its methods may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sessions = store.env.open_db(b"sessions")
        # What is in force; changes under the store's lock.
        self._config: Config | None = None
        self._services: dict[str, Service] = {}

    def publish(self, txn: lmdb.Transaction[bytes], ids: IdGiver, config: Config) -> Callable[[], None]:
        """Make the configuration's sessions what it says, inside the transaction that puts the configuration in force.

        Returns what to call, still under the store's lock, once the transaction is on the disk.
        """
        written = {
            _key(service.name, entry.id): entry
            for service in config.services
            if service.sessions is not None
            for entry in service.sessions.entries
        }
        places = Places(config)
        gone, changed = [], []
        for key, record in self._records(txn):
            if key in written:
                continue
            if record.of_configuration:
                gone.append(key)
            elif (usable := self._is_usable(txn, record, places)) != record.usable:
                changed.append((key, replace(record, usable=usable)))
        for key in gone:
            txn.delete(key, db=self._sessions)
        for key, record in changed:
            txn.put(key, _encode(record), db=self._sessions)
        for key, entry in sorted(written.items()):
            record = self._record(txn, ids, places, key, entry, of_configuration=True)
            if txn.get(key, db=self._sessions) != _encode(record):
                self._write(txn, key, record)

        def took_effect() -> None:
            self._config, self._services = config, {service.name: service for service in config.services}

        return took_effect

    def put(self, service: str, session_id: str, target: object, source: str | None) -> tuple[SessionView, bool]:
        """Define a session, or define it anew. Returns it, and whether its id is a new one.

        `target` as a route's in the configuration: text, {"address": text, "external": true}, or a list of them. Raises
        RequestError for what it must not be, RegistryError where no target id is left.
        """
        with self._store.writing() as txn:
            config, found = self._of(service)
            try:
                entry = check_session(config, found, session_id, target, source)
            except ConfigError as error:
                problem = error.problems[0]
                raise RequestError("invalid", problem.key, problem.message) from error
            key = _key(service, session_id)
            old = self._get(txn, key)
            if old is not None and old.of_configuration:
                raise _in_configuration(config, service, session_id)
            ids = self._store.ids(txn, config.gateway.mark.highest_id)
            # Without the old one: a new serial, and the source as it is written now.
            self._delete(txn, key)
            record = self._record(txn, ids, Places(config), key, entry, of_configuration=False)
            self._write(txn, key, record)
            return self._view(txn, service, session_id, record), old is None

    def remove(self, service: str, session_id: str) -> None:
        """Forget a session of the API; raises RequestError if there is none, or if it is the configuration's."""
        with self._store.writing() as txn:
            config, _ = self._of(service)
            record = self._existing(txn, service, session_id)
            if record.of_configuration:
                raise _in_configuration(config, service, session_id)
            self._delete(txn, _key(service, session_id))

    def get(self, service: str, session_id: str) -> SessionView:
        """One session; raises RequestError if there is none."""
        self._of(service)
        with self._store.env.begin() as txn:
            return self._view(txn, service, session_id, self._existing(txn, service, session_id))

    def page(self, service: str, after: str, limit: int) -> list[SessionView]:
        """Up to `limit` sessions of a service, sorted by id, from the first one behind the id `after` on."""
        self._of(service)
        views: list[SessionView] = []
        beginning = _key(service, "")
        start = beginning + after.encode("utf-8", "surrogatepass")[: MAX_ID + 1]
        with self._store.env.begin() as txn, txn.cursor(db=self._sessions) as cursor:
            there = cursor.set_range(start)
            if there and after and cursor.key() == start:
                there = cursor.next()
            while there and len(views) < limit and cursor.key().startswith(beginning):
                session_id = str(cursor.key()[len(beginning) :], "ascii")
                views.append(self._view(txn, service, session_id, _decode(cursor.value())))
                there = cursor.next()
        return views

    def count(self) -> int:
        """How many sessions all services have together."""
        with self._store.env.begin() as txn:
            return int(txn.stat(self._sessions)["entries"])

    def find(self, service: str, session_id: str) -> Session | None:
        """As a worker finds it."""
        with self._store.env.begin() as txn:
            return find(txn, self._sessions, service, session_id)

    def claim(self, claims: Iterable[Claim]) -> int:
        """Write claimed sources down, as far as they are still to be had; returns how many sessions have another one.

        One transaction for all of them. A claim on a session that was removed or defined anew means nothing; unless the
        service now says "move", a session that has a source keeps it.
        """
        changed = 0
        with self._store.writing() as txn:
            for claim in claims:
                key = _key(claim.service, claim.id)
                record = self._get(txn, key)
                if record is None or record.serial != claim.serial or record.source == claim.source:
                    continue
                service = self._services.get(claim.service)
                sessions = None if service is None else service.sessions
                may_move = not claim.exclusive and sessions is not None and sessions.on_new_source == "move"
                if record.source and not may_move:
                    continue
                self._write(txn, key, replace(record, source=claim.source))
                changed += 1
        return changed

    def _of(self, name: str) -> tuple[Config, Service]:
        """The configuration in force, and one of its services, which has sessions."""
        with self._store.lock:
            config, service = self._config, self._services.get(name)
        if config is None:
            raise RegistryError("the registry holds no configuration yet: it is published when the daemon starts")
        if service is None:
            raise RequestError("not_found", "service", f"{name} is not a service of {config.file}.")
        if service.sessions is None:
            raise RequestError(
                "not_found", "service", f"The service {name} has no sessions: {config.file} names no key for them."
            )
        return config, service

    def _record(
        self,
        txn: lmdb.Transaction[bytes],
        ids: IdGiver,
        places: Places,
        key: bytes,
        entry: SessionEntry,
        *,
        of_configuration: bool,
    ) -> _Record:
        """A session as it is written down; what is known of its source stays if the same was written before."""
        written = entry.source.packed if entry.source is not None else b""
        old = self._get(txn, key)
        kept = old if old is not None and old.written == written else None
        targets = ids.for_targets(entry.targets)
        external = {t.address.version: not places.in_pool(t.address) for t in entry.targets}
        return _Record(
            serial=self._store.next_serial(txn) if kept is None else kept.serial,
            ipv4=targets.ipv4,
            ipv6=targets.ipv6,
            source=written if kept is None else kept.source,
            usable=True,
            written=written,
            of_configuration=of_configuration,
            external4=external.get(4, False),
            external6=external.get(6, False),
        )

    def _is_usable(self, txn: lmdb.Transaction[bytes], record: _Record, places: Places) -> bool:
        return all(
            places.usable(txn, self._store, target_id, external)
            for target_id, external in ((record.ipv4, record.external4), (record.ipv6, record.external6))
            if target_id
        )

    def _existing(self, txn: lmdb.Transaction[bytes], service: str, session_id: str) -> _Record:
        is_possible = session_id.isascii() and len(session_id) <= MAX_ID
        record = self._get(txn, _key(service, session_id)) if is_possible else None
        if record is None:
            raise RequestError("not_found", "id", f"The service {service} has no session of this id.")
        return record

    def _view(self, txn: lmdb.Transaction[bytes], service: str, session_id: str, record: _Record) -> SessionView:
        targets = (self._store.target(txn, target_id) for target_id in (record.ipv4, record.ipv6) if target_id)
        return SessionView(
            service=service,
            id=session_id,
            targets=[str(target) for target in targets],
            source=str(ipaddress.ip_address(record.source)) if record.source else None,
            origin="configuration" if record.of_configuration else "api",
            usable=record.usable,
        )

    def _records(self, txn: lmdb.Transaction[bytes]) -> Iterator[tuple[bytes, _Record]]:
        with txn.cursor(db=self._sessions) as cursor:
            for key, value in cursor:
                yield bytes(key), _decode(value)

    def _get(self, txn: lmdb.Transaction[bytes], key: bytes) -> _Record | None:
        found = txn.get(key, db=self._sessions)
        return None if found is None else _decode(found)

    def _write(self, txn: lmdb.Transaction[bytes], key: bytes, record: _Record) -> None:
        txn.put(key, _encode(record), db=self._sessions)

    def _delete(self, txn: lmdb.Transaction[bytes], key: bytes) -> None:
        txn.delete(key, db=self._sessions)


def _in_configuration(config: Config, service: str, session_id: str) -> RequestError:
    return RequestError(
        "conflict", "id", f"The session {session_id} of {service} is in {config.file}; change it there, and reload."
    )


class Places:
    """Where a configuration allows targets to be, ready to be asked about many."""

    def __init__(self, config: Config) -> None:
        self._highest_id = config.gateway.mark.highest_id
        self._endpoints = {endpoint.address for service in config.services for endpoint in service.endpoints}
        self._aliases = PoolMap(config.pools.values())
        self._known: dict[tuple[int, bool], bool] = {}
        self._standing = Standing(config)

    def fingerprint(self) -> bytes:
        """Bytes that change whenever what is allowed changes."""
        endpoints = sorted(address.packed for address in self._endpoints)
        runs = [self._aliases.runs(version) for version in (4, 6)]
        blocks = [[str(run[end]) for run in each] for end in (0, 1) for each in runs]
        allowed = msgspec.msgpack.encode([self._highest_id, endpoints, blocks, self._standing.fingerprint()])
        return hashlib.blake2b(allowed, digest_size=16).digest()

    def in_pool(self, address: IPAddress) -> bool:
        """Whether an address is an alias of some pool."""
        return self._aliases.find(address) is not None

    def usable(self, txn: lmdb.Transaction[bytes], store: Store, target_id: int, external: bool) -> bool:
        """Whether connections may be steered to a target (`external`: it may lie outside the pools), or to a group: to
        each of its members, as if the others were not there."""
        known = self._known.get((target_id, external))
        if known is None and target_id >= GROUP:
            group = store.group(txn, target_id)
            members = () if group is None else group.members
            known = bool(members) and all(self.usable(txn, store, each.id, each.external) for each in members)
            self._known[target_id, external] = known
        elif known is None:
            target = store.target(txn, target_id) if target_id <= self._highest_id else None
            known = (
                target is not None
                and (self.in_pool(target.address) or (external and target.address not in self._endpoints))
                and self._standing.allows(txn, store, target)
            )
            self._known[target_id, external] = known
        return known
