"""The relay's seats: which aliases stand for which daemon on a unix socket, over restarts (core.relays).

  relays    name of the daemon (model.UnixDaemon.name)   ->  _Seat as msgpack: the aliases it has
  relayed   address (4 or 16)                            ->  name of the daemon that it stands for, or stood for

A daemon is *in use* while the configuration in force or a dynamic route leads to it. One that is not keeps its aliases
for as long as the relay's pool has its quarantine, so that no stale decision reaches another daemon there; the relay
goes on listening on them. They are given up when a configuration is put in force after that.

**In one step.** Before a route leads to a new daemon, its seat is on the disk, and the relay listens there
(`prepare`; `Effects.listen`). If the route is refused then, the seat is one that is not in use.

If a configuration changes the pool or the port, daemons get other aliases. Dynamic routes still lead to the old ones:
they refuse (`Standing`), and are to be put again. The old aliases stand for nobody else while such a route is left.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import lmdb
import msgspec

from steerd.config import Config
from steerd.config.texts import unix_daemons
from steerd.control.store import Store
from steerd.core.pools import Pool
from steerd.core.relays import Seats, fits
from steerd.errors import RegistryError
from steerd.model import IPAddress, Target, UnixDaemon

Places = Mapping[str, tuple[IPAddress, ...]]


class Effects(Protocol):
    """What seats need of the relay. Called without locks, from whatever thread."""

    def listen(self, places: Places, port: int) -> None:
        """Have the relay listen for these daemons, and no others; raises SteerdError if it does not."""


class NoEffects:
    """For a registry without a relay."""

    def listen(self, places: Places, port: int) -> None:
        """Nobody listens."""


class _Seat(msgspec.Struct, array_like=True):
    addresses: list[bytes]
    unused_since: float
    """Seconds since the epoch; 0: it is in use."""


class RelayTable:
    """The writer's side. Its methods may be called from any thread."""

    def __init__(self, store: Store, effects: Effects) -> None:
        self._store = store
        self._effects = effects
        self._relays = store.relays
        self._relayed = store.relayed
        self._telling = threading.Lock()
        self._is_taken: Callable[[lmdb.Transaction[bytes], bytes], bool] = lambda _txn, _address: False
        # What follows changes under the store's lock.
        self._config: Config | None = None
        self._seats: dict[str, _Seat] = {}
        with store.env.begin() as txn:
            self._load(txn)

    def ask_routes(self, is_taken: Callable[[lmdb.Transaction[bytes], bytes], bool]) -> None:
        """Who says whether dynamic routes or leases lead to an address."""
        self._is_taken = is_taken

    def _load(self, txn: lmdb.Transaction[bytes]) -> None:
        with txn.cursor(db=self._relays) as cursor:
            self._seats = {name.decode(): msgspec.msgpack.decode(value, type=_Seat) for name, value in cursor}

    def seats(self) -> Seats:
        """What a configuration is to be read with."""
        return Seats(self.places(), self._is_anothers)

    def places(self) -> dict[str, tuple[IPAddress, ...]]:
        """The aliases of each daemon, in use or not: where the relay must listen."""
        with self._store.lock:
            return {name: _addresses(seat) for name, seat in self._seats.items()}

    def place(self, name: str, pool: Pool) -> tuple[IPAddress, ...] | None:
        """The aliases of a daemon that has some, in the pool as it is now."""
        with self._store.lock:
            seat = self._seats.get(name)
            found = None if seat is None else _addresses(seat)
            return found if found is None or fits(found, pool) else None

    def _is_anothers(self, address: IPAddress, name: str) -> bool:
        packed = address.packed
        with self._store.env.begin() as txn:
            holder = txn.get(packed, db=self._relayed)
            return self._is_taken(txn, packed) if holder is None else str(holder, "utf-8") != name

    def prepare(self, target: object) -> None:
        """See to it that what the target of a request names on unix sockets has aliases, and the relay listens there;
        what cannot be is left for those who check the request. Raises RegistryError and what `Effects` raise."""
        names = [daemon.name for daemon in unix_daemons(target)]
        with self._store.lock:
            config = self._config
            if not names or config is None or config.gateway.relay is None:
                return
            pool = config.pools[config.gateway.relay.pool]
            seats = self.seats()
            found = {name: seats.place(name, pool) for name in names if self.place(name, pool) is None}
            self._reserve({name: addresses for name, addresses in found.items() if addresses is not None})
        # Also for those that have a seat already: the relay may not have been told, or not have done it.
        self.listen(config)

    def reserve(self, config: Config) -> None:
        """The same for a configuration that is about to be put in force."""
        with self._store.lock:
            self._reserve(config.relayed)
        self.listen(config)

    def listen(self, config: Config) -> None:
        """Have the relay listen where it must under a configuration. Raises what `Effects` raise."""
        # What is told last must be what was looked up last.
        with self._telling:
            if config.gateway.relay is None:
                self._effects.listen({}, 0)
            else:
                self._effects.listen(self.places(), config.gateway.relay.port)

    def _reserve(self, given: Places) -> None:
        with self._store.writing() as txn:
            changed = {
                name: self._write(txn, name, addresses, time.time())
                for name, addresses in given.items()
                if name not in self._seats or _addresses(self._seats[name]) != addresses
            }
        self._seats.update(changed)

    def publish(self, txn: lmdb.Transaction[bytes], config: Config) -> Callable[[], None]:
        """Write down what a configuration has given, and give up what nobody uses, inside the transaction that puts it
        in force. Returns what to call, still under the store's lock, once that is on the disk.

        Raises RegistryError if the configuration was not read with `seats`, and has given what is another's.
        """
        relay = config.gateway.relay
        now = time.time()
        until = now - (config.pools[relay.pool].quarantine if relay else Pool._field_defaults["quarantine"])
        seats: dict[str, _Seat] = {}
        for name, addresses in config.relayed.items():
            seats[name] = self._write(txn, name, addresses, 0.0)
        for name, seat in self._seats.items():
            if name in seats:
                continue
            is_led_to = any(self._is_taken(txn, packed) for packed in seat.addresses)
            since = 0.0 if is_led_to else seat.unused_since or now
            if is_led_to or since > until:
                seats[name] = self._write(txn, name, _addresses(seat), since)
            else:
                txn.delete(name.encode(), db=self._relays)
        held = {packed for seat in seats.values() for packed in seat.addresses}
        with txn.cursor(db=self._relayed) as cursor:
            stale = [packed for packed, _ in cursor if packed not in held and not self._is_taken(txn, packed)]
        for packed in stale:
            txn.delete(packed, db=self._relayed)

        def took_effect() -> None:
            self._config, self._seats = config, seats

        return took_effect

    def _write(
        self, txn: lmdb.Transaction[bytes], name: str, addresses: tuple[IPAddress, ...], unused_since: float
    ) -> _Seat:
        seat = _Seat([address.packed for address in addresses], unused_since)
        if self._seats.get(name) == seat:
            return seat
        for packed in seat.addresses:
            holder = txn.get(packed, db=self._relayed)
            if holder is not None and str(holder, "utf-8") != name:
                raise RegistryError(
                    f"{ipaddress.ip_address(packed)} stands for {UnixDaemon.of_name(str(holder, 'utf-8'))}, and cannot"
                    f" stand for {UnixDaemon.of_name(name)} as well: try again"
                )
            txn.put(packed, name.encode(), db=self._relayed)
        txn.put(name.encode(), msgspec.msgpack.encode(seat), db=self._relays)
        return seat


class Standing:
    """Where the relay stands under a configuration, ready to be asked about many targets."""

    def __init__(self, config: Config) -> None:
        self._relay = config.gateway.relay
        self._pool = None if self._relay is None else config.pools[self._relay.pool]

    def fingerprint(self) -> list[str]:
        """Texts that change whenever an answer of `allows` can."""
        return [repr(self._relay), repr(self._pool)]

    def allows(self, txn: lmdb.Transaction[bytes], store: Store, target: Target) -> bool:
        """Whether a target has nothing to do with the relay, or is where it stands now for the same daemon as ever."""
        name = txn.get(target.address.packed, db=store.relayed)
        if name is None:
            return self._pool is None or target.address not in self._pool
        seat = txn.get(name, db=store.relays)
        return (
            self._relay is not None
            and target.port == self._relay.port
            and seat is not None
            and target.address.packed in msgspec.msgpack.decode(seat, type=_Seat).addresses
        )


def _addresses(seat: _Seat) -> tuple[IPAddress, ...]:
    return tuple(ipaddress.ip_address(packed) for packed in seat.addresses)
