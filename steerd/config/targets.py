"""Targets: of routes, defaults, sessions; and which of several is chosen."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Iterable

from steerd.config import schema
from steerd.config.conditions import Conditions, normal_key
from steerd.config.reader import Reader, described, shown
from steerd.config.texts import UNIX_PREFIXES, parse_target, parse_unix, why_unusable
from steerd.config.values import Config, Relay
from steerd.config.wake import read_wake
from steerd.core.choice import MAX_MEMBERS, SOURCE
from steerd.core.pools import Pool, PoolMap
from steerd.core.wake import Wake
from steerd.model import Choice, Endpoint, IPAddress, Policy, Target

_SHOWN = 4
"""Pools, and prefixes of each, that a sentence names."""

Place = Callable[[str, Pool], tuple[IPAddress, ...] | None]
"""The aliases of a pool for a daemon's name (core.relays.Seats.place)."""


class Scene:
    """What routes and defaults are checked against, where mistakes go, the targets marked `wildcard`, and those with
    `wake`."""

    def __init__(self, pools: dict[str, Pool], endpoints: dict[str, dict[str, Endpoint]], reader: Reader) -> None:
        self.reader = reader
        self.in_file = True
        """Whether what is checked is in the file; else in a request, which is no TOML."""
        self.pools = pools
        self.endpoints = endpoints
        self.endpoint_keys = {e.address: key for service in endpoints.values() for key, e in service.items()}
        self.wildcard: dict[Target, None] = {}
        self.wakes: dict[IPAddress, tuple[Wake, str]] = {}
        """With the key of the target that says so first."""
        self.relay: Relay | None = None
        self.place: Place | None = None
        """None: what is checked cannot lead to a daemon on a unix socket."""
        self.is_tcp = True
        """Whether nothing but TCP comes to what is checked."""
        self._aliases = PoolMap(pools.values())

    @classmethod
    def of_request(cls, config: Config, reader: Reader) -> Scene:
        """For what is checked against a configuration that is in force."""
        endpoints = {
            service.name: {f"services.{service.name}.endpoints[{i}]": each for i, each in enumerate(service.endpoints)}
            for service in config.services
        }
        scene = cls(config.pools, endpoints, reader)
        scene.in_file = False
        return scene

    def clear(self) -> None:
        """Forget what targets said so far."""
        self.wildcard.clear()
        self.wakes.clear()

    def check_for_request(self, key: str) -> None:
        """Report what a target outside the file cannot say."""
        for name, found in (("wildcard", self.wildcard), ("wake", self.wakes)):
            if found:
                self.reader.problem(key, f"Has {name}, which a target can have in the configuration only.")

    def pool_of(self, address: IPAddress) -> Pool | None:
        """Whose alias an address is; None: nobody's."""
        found = self._aliases.find(address)
        return None if found is None else found[0]


def check_families(found: Iterable[int], wanted: set[int], path: str, reader: Reader) -> None:
    """Whether one of the address families that are found (in targets, say) is one of connections that come."""
    found = sorted(set(found))
    if found and wanted and wanted.isdisjoint(found):
        families = " and ".join(f"IPv{version}" for version in sorted(wanted))
        reader.problem(path, f"Has addresses of IPv{found[0]} only, but what comes here is {families}.")


def read_choice(
    choose: Policy | None, hash_: str | None, beginning: str, conditions: Conditions | None, reader: Reader
) -> Choice | None:
    """`beginning`: of the keys `choose` and `hash`. `conditions` None: nothing can be said about keys."""
    if choose is None and hash_ is None:
        return None
    where = f"{beginning}hash"
    if hash_ is not None and choose != "hash":
        if not reader.is_bad(f"{beginning}choose"):
            reader.problem(where, 'Means nothing unless choose = "hash".')
        return None
    if choose is None:
        return None
    key = SOURCE if hash_ is None or reader.is_bad(where) else normal_key(hash_)
    if key != SOURCE and conditions is not None:
        try:
            conditions.parser_of(key)
        except ValueError as error:
            reader.problem(where, str(error))
    return Choice(choose, key)


def read_targets(
    value: object,
    path: str,
    versions: set[int],
    scene: Scene,
    choice: Choice | None = None,
    choose: str | None = None,
) -> tuple[Target, ...]:
    """Targets from one text, one table, or a list of them; `versions`: families of connections that may come. `choose`:
    the key that would say how one of several is chosen, if there is one."""
    reader = scene.reader
    if value == []:
        reader.problem(path, 'Names no target; one would be "10.64.0.1:8080".')
    items = [(f"{path}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else [(path, value)]
    found: list[Target] = []
    counts = {4: 0, 6: 0}
    for key, item in items:
        for target in _read_target(key, item, scene):
            version = target.address.version
            counts[version] += 1
            if reader.is_bad(key):  # one mistake, though a daemon on a unix socket is two targets
                pass
            elif target in found:
                reader.problem(key, f"{target} is there twice.")
            elif counts[version] == 2 and choice is None and choose is None:
                reader.problem(key, f"Is a second IPv{version} target; at most one of each family is possible.")
            elif counts[version] == 2 and choice is None and not reader.is_bad(choose or ""):
                reader.problem(
                    key, f"Is a second IPv{version} target; {choose} must say how one is chosen: {described(Policy)}."
                )
            elif counts[version] == MAX_MEMBERS + 1:
                reader.problem(
                    key, f"Is IPv{version} target number {counts[version]}; at most {MAX_MEMBERS} are possible."
                )
            found.append(target)
    for target in found if len(found) > 1 else ():
        if counts[target.address.version] > 1 and not target.port and not reader.is_bad(path):
            reader.problem(
                path, f"{target} keeps the client's port; each of several needs its own, to tell whether it listens."
            )
    if not reader.is_bad(path):
        check_families((each.address.version for each in found), versions, path, reader)
    return tuple(found)


def _read_target(key: str, item: object, scene: Scene) -> tuple[Target, ...]:
    """The target of one text or table, or those that stand for a daemon on a unix socket; empty: it has a mistake."""
    reader = scene.reader
    where = key
    if isinstance(item, dict):
        raw = reader.read(schema.Target, item, key)
        where = f"{key}.address"
    elif isinstance(item, str):
        raw = schema.Target(item)
    else:
        reader.problem(
            key, f'Must be a target such as "10.64.0.1:8080", or a table or list of them, not {shown(item)}.'
        )
        return ()
    if raw.address.startswith(UNIX_PREFIXES):
        return _read_unix_targets(key, where, raw, scene)
    if raw.proxy_protocol is not None:
        reader.problem(f"{key}.proxy_protocol", 'Means nothing but for "unix:/path"; other daemons see the client.')
    target = reader.attempt(where, parse_target, raw.address)
    if target is None:
        return ()
    if raw.wildcard:
        scene.wildcard[target] = None
    if (endpoint_key := scene.endpoint_keys.get(target.address)) is not None:
        reader.problem(
            where, f"{target.address} is the address of an endpoint ({endpoint_key}); steering there would be a loop."
        )
        return (target,)
    pool = scene.pool_of(target.address)
    if pool is not None and scene.relay is not None and pool.name == scene.relay.pool:
        reader.problem(
            where, f"{target.address} is in the pool {pool.name}, whose aliases the relay gives away itself."
        )
    if pool is not None and raw.external:
        reader.problem(f"{key}.external", f"{target.address} is in the pool {pool.name}, so it is not external.")
    elif pool is None and raw.external:
        if (kind := why_unusable(ipaddress.ip_network(target.address))) is not None:
            reader.problem(where, f"{target.address} is {kind}; nothing can be steered there.")
    elif pool is None and not (reader.is_bad("pools") or reader.is_bad(f"{key}.external")):
        external = (
            f'write {{ address = "{target}", external = true }}.'
            if scene.in_file
            else 'say that it is external (steerctl: --external; in JSON: "external": true).'
        )
        reader.problem(where, f"{target.address} is in no pool{_listed(scene.pools)}; use an alias, or {external}")
    _read_target_wake(key, raw, target.address, scene)
    return (target,)


def _listed(pools: dict[str, Pool]) -> str:
    """What pools there are, in brackets."""
    some = [f"{name}: {', '.join(map(str, pool.prefixes[:_SHOWN]))}" for name, pool in list(pools.items())[:_SHOWN]]
    more = ", ..." if len(pools) > _SHOWN else ""
    return f" ({'; '.join(some)}{more})" if some else ""


def _read_unix_targets(key: str, where: str, raw: schema.Target, scene: Scene) -> tuple[Target, ...]:
    """The targets, at most one of each family, where the relay stands for a daemon on a unix socket."""
    reader = scene.reader
    daemon = reader.attempt(where, functools.partial(parse_unix, proxy_protocol=raw.proxy_protocol), raw.address)
    if daemon is None:
        return ()
    for option in ("external", "wildcard", "wake", "user", "wake_timeout", "sleep_after"):
        if getattr(raw, option):
            reader.problem(f"{key}.{option}", "Means nothing for a daemon on a unix socket.")
    if not scene.is_tcp:
        reader.problem(where, f"{daemon} can take TCP alone, and the service has UDP endpoints, too.")
    if scene.place is None:
        reader.problem(where, f"{daemon} is on a unix socket; only routes and what is in the file can lead there.")
    elif scene.relay is None:
        reader.problem(
            where,
            f'{daemon} needs the relay: [gateway.relay] with pool = "NAME", a pool whose aliases it can stand on.',
        )
    elif (pool := scene.pools.get(scene.relay.pool)) is not None:
        addresses = scene.place(daemon.name, pool)
        if addresses is not None:
            return tuple(Target(address, scene.relay.port) for address in addresses)
        reader.problem(where, f"The pool {pool.name} has no alias left for {daemon}.")
    return ()


def _read_target_wake(key: str, raw: schema.Target, address: IPAddress, scene: Scene) -> None:
    reader = scene.reader
    wake = read_wake(raw, key, reader)
    if wake is None:
        return
    where = f"{key}.wake"
    if raw.external:
        reader.problem(where, "Means nothing for an external target: whether it listens cannot be seen here.")
    if wake.needs_lease:
        reader.problem(where, "Names {lease}, but an alias that is named in the file is never leased.")
    former, former_key = scene.wakes.setdefault(address, (wake, key))
    if former != wake:
        reader.problem(where, f"Is another one than that of {former_key}; an alias has one daemon.")
