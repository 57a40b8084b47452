"""What the route table (control.routes) holds and shows, entry by entry: how routes stand in LMDB, and how people and
programs outside see them. The tables are at the top of control.routes.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, NamedTuple

import msgspec

from steerd.config.conditions import condition_text
from steerd.core.choice import GROUP
from steerd.core.engine import TargetIds
from steerd.core.router import DYNAMIC, Part, Probe, Shape, has_digest, route_at, shape_of_probe
from steerd.model import Choice, Policy, Route, Target, UnixDaemon
from steerd.wire.registry import PATTERNED

LEASE, EXTERNAL4, EXTERNAL6, _UNUSABLE = 1, 2, 4, 8
ID = struct.Struct("!I")
IDS = struct.Struct("!II")
_HEAD = struct.Struct("!IIB")


class RouteView(msgspec.Struct, frozen=True):
    """One route for people and programs outside."""

    service: str
    when: dict[str, str]
    source: str | None
    targets: list[str]
    origin: str
    """`static`, `dynamic`, or `lease NAME`."""
    usable: bool
    """False: the configuration in force has no use for it, or a target is not for use."""
    place: str | None
    """Of a static route: where it is written, `services.web.routes[3]`."""
    choose: Policy | None = None
    """How one of several targets of a family is chosen."""
    hash: str | None = None
    """For "hash": the key that is hashed, or `source`."""


class RouteLine(msgspec.Struct, frozen=True, tag_field="kind", tag="route", omit_defaults=True):
    """One dynamic route in an export."""

    service: str
    when: dict[str, str | int]
    target: list[str | TargetOptions]
    source: str | None = None
    choose: Policy | None = None
    hash: str | None = None


class TargetOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """A target of which more is to be said than its text."""

    address: str
    external: bool = False
    proxy_protocol: Literal["v2"] | None = None


class ShapeRecord(msgspec.Struct, array_like=True):
    """The value of a shape, in `shapes`."""

    service: str
    parts: tuple[Part, ...]
    version: int
    source_length: int
    routes: int
    """Dynamic ones."""


class KnownShape:
    """A shape of one service that has a number."""

    __slots__ = ("is_patterned", "number", "routes", "service", "shape")

    def __init__(self, number: int, service: str, shape: Shape, routes: int) -> None:
        self.number = number
        self.service = service
        self.shape = shape
        self.routes = routes
        self.is_patterned = any(part.key in PATTERNED.values() for part in shape.parts)


class Entry(NamedTuple):
    """The value of a dynamic route, in `dynamic`."""

    ids: TargetIds
    flags: int
    usable4: bool
    usable6: bool
    values: bytes
    """Where the key holds a digest."""

    def pack(self) -> bytes:
        """As it stands in the table."""
        ipv4, ipv6 = self.ids.ipv4, self.ids.ipv6
        if self.usable4 and self.usable6:
            return _HEAD.pack(ipv4, ipv6, self.flags) + self.values
        seen = (ipv4 if self.usable4 else 0, ipv6 if self.usable6 else 0)
        return _HEAD.pack(*seen, self.flags | _UNUSABLE) + IDS.pack(ipv4, ipv6) + self.values

    @classmethod
    def unpack(cls, value: bytes) -> Entry:
        """Out of the table."""
        ipv4, ipv6, flags = _HEAD.unpack_from(value)
        if not flags & _UNUSABLE:
            return cls(TargetIds(ipv4, ipv6), flags, True, True, value[_HEAD.size :])
        real4, real6 = IDS.unpack_from(value, _HEAD.size)
        values = value[_HEAD.size + IDS.size :]
        return cls(TargetIds(real4, real6), flags & ~_UNUSABLE, ipv4 == real4, ipv6 == real6, values)


def stored_route(service: str, probe: Probe, key: bytes, value: bytes) -> Route | None:
    """A route (without targets) from the table that workers look in, named by where it comes from:
    `services.web.routes[3]`, `dynamic` or `lease`. None for a static one of whose values the key holds a digest."""
    shape = shape_of_probe(probe)
    if not key[0] & DYNAMIC >> 24:
        name = origin_of(service, key, value)
        return None if has_digest(shape, key) else route_at(shape, key)._replace(name=name)
    return route_at(shape, key, Entry.unpack(value).values)._replace(name=origin_of(service, key, value))


def origin_of(service: str, key: bytes, value: bytes) -> str:
    """Where a route of the table comes from."""
    if not key[0] & DYNAMIC >> 24:
        return f"services.{service}.routes[{ID.unpack_from(value, IDS.size)[0]}]"
    return "lease" if Entry.unpack(value).flags & LEASE else "dynamic"


def group_key(group_id: int) -> bytes:
    """Five bytes in `uses`, as no address has them; no IPv4 target begins with their first."""
    return b"\0" + ID.pack(group_id)


def group_keys(ids: TargetIds) -> list[bytes]:
    """In `uses`, of the groups among the ids of a route."""
    return [group_key(id_) for id_ in (ids.ipv4, ids.ipv6) if id_ >= GROUP]


def choice_texts(choice: Choice | None) -> dict[str, Any]:
    """`choose` and `hash` of a view or a line."""
    if choice is None:
        return {}
    return {"choose": choice.policy, "hash": choice.key if choice.policy == "hash" else None}


def as_written(written: UnixDaemon | Target, is_external: bool) -> str | TargetOptions:
    """A target as a request has it."""
    if isinstance(written, UnixDaemon) and written.proxy_protocol:
        return TargetOptions(str(written), proxy_protocol="v2")
    return TargetOptions(str(written), external=True) if is_external else str(written)


def described(route: Route) -> str:
    """What a route matches, in a sentence."""
    when = msgspec.json.encode({c.key: condition_text(c) for c in route.conditions}).decode()
    return when if route.source is None else f"{when} from {route.source}"
