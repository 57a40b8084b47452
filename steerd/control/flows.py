"""Flows: connections, and flows of datagrams, that were steered, as conntrack knows them at this moment.

A flow is one of ours if its client sends to an endpoint of the configuration in force, and it is delivered elsewhere:
to an alias, or to an address that some route, default or session has ever led to.

Conntrack does not know which key decided. What is shown is the lease that has the target, and the route of the flow's
service that leads to the target where exactly one does (and it is not the service's default); of a service with more
than MAX_NAMED routes it is not looked for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import msgspec

from steerd.config import Service
from steerd.control.places import parse_place
from steerd.control.registry import Reader, Registry
from steerd.control.route_records import RouteView
from steerd.errors import RequestError
from steerd.model import PROTOCOL_NAMES, Flow, IPNetwork, Target

MAX_NAMED = 20_000
"""Each of them is read for the sake of names."""


class Entry(Protocol):
    """A flow that somebody translates (kernel.conntrack.Entry)."""

    @property
    def protocol(self) -> int: ...
    @property
    def flow(self) -> Flow:
        """As its client sends it."""
        ...

    @property
    def delivered(self) -> Flow:
        """As its daemon gets it."""
        ...

    @property
    def tcp_state(self) -> str | None: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def seconds_left(self) -> int: ...
    @property
    def started(self) -> float | None: ...


class FlowView(msgspec.Struct, frozen=True):
    """One flow for people and programs outside."""

    protocol: str
    client: str
    endpoint: str
    target: str
    service: str
    lease: str | None
    """Who has the target's address; None: nobody."""
    when: dict[str, str] | None
    """The conditions of the only route that leads there; None: there is none, or more than one."""
    source: str | None
    """The source prefix of that route."""
    state: str | None
    """TCP: established, time_wait and so on."""
    seconds_left: int
    """The kernel forgets the flow when nothing is sent for so long."""
    age: float | None
    """Seconds; None unless the kernel notes when flows begin (sysctl net.netfilter.nf_conntrack_timestamp=1)."""


class Wanted(NamedTuple):
    """Which flows are meant; None: whichever."""

    client: IPNetwork | None = None
    service: str | None = None
    target: Target | None = None
    """Port 0: any."""
    lease: str | None = None
    over: bool = False
    """Those as well that both sides have closed, or that were reset, and that the kernel keeps for a while."""


def wanted(
    client: str | None, service: str | None, target: str | None, lease: str | None, over: bool = False
) -> Wanted:
    """What is written as text. Raises RequestError."""
    return Wanted(
        None if client is None else _prefix(client),
        service,
        None if target is None else _target(target),
        lease,
        over,
    )


class Chooser:
    """Says of conntrack's entries which are wanted; for one request, since it remembers what it has looked up."""

    def __init__(self, registry: Registry, wanted: Wanted) -> None:
        """Raises RequestError for a service or a lease that there is not."""
        config = registry.routes.force.config
        if wanted.service is not None and all(wanted.service != service.name for service in config.services):
            raise RequestError("not_found", "service", f"{wanted.service} is not a service of {config.file}.")
        self._wanted = wanted
        self._of_lease: frozenset[bytes] | None = None
        if wanted.lease is not None:
            addresses = registry.leases.get(wanted.lease).addresses
            self._of_lease = frozenset(ipaddress.ip_address(address).packed for address in addresses)
        self._endpoints: dict[tuple[bytes, int], list[tuple[int, int, str]]] = {}
        for service in config.services:
            for each in service.endpoints:
                place = self._endpoints.setdefault((each.address.packed, each.protocol), [])
                place.append((each.first_port, each.last_port, service.name))
        self._pools = [
            (prefix.network_address.packed, prefix.broadcast_address.packed)
            for pool in config.pools.values()
            for prefix in pool.prefixes
        ]
        self._reader = registry.reader()
        self._targets: dict[bytes, bool] = {}

    @property
    def only_target(self) -> bytes:
        """The one address (packed) that all wanted flows are delivered to; empty: there may be others."""
        if self._wanted.target is not None:
            return self._wanted.target.address.packed
        return next(iter(self._of_lease)) if self._of_lease is not None and len(self._of_lease) == 1 else b""

    def service_of(self, entry: Entry) -> str | None:
        """The service of a flow that is wanted; None: it is not, or it is none of ours."""
        flow, delivered, wanted = entry.flow, entry.delivered, self._wanted
        name = self._at(entry.protocol, flow)
        if name is None or (wanted.service is not None and wanted.service != name):
            return None
        if self._of_lease is not None and delivered.dst not in self._of_lease:
            return None
        if wanted.target is not None and not _is(delivered, wanted.target):
            return None
        if wanted.client is not None and not _is_within(flow.src, wanted.client):
            return None
        if not self._is_target(delivered.dst) or (entry.is_over and not wanted.over):
            return None
        return name

    def _at(self, protocol: int, flow: Flow) -> str | None:
        for first, last, name in self._endpoints.get((flow.dst, protocol), ()):
            if first <= flow.dport <= last:
                return name
        return None

    def _is_target(self, address: bytes) -> bool:
        known = self._targets.get(address)
        if known is None:
            known = any(len(first) == len(address) and first <= address <= last for first, last in self._pools)
            known = self._targets[address] = known or self._reader.is_target(address)
        return known


def views(registry: Registry, chosen: Iterable[tuple[Entry, str]], now: float) -> Iterator[FlowView]:
    """Flows with their services, for people and programs outside. `now`: seconds since the epoch."""
    names = _Names(registry)
    for entry, service in chosen:
        flow, target = entry.flow, entry.delivered
        route = names.route(service, target)
        started = entry.started
        yield FlowView(
            PROTOCOL_NAMES[entry.protocol],
            _end(flow.src, flow.sport),
            _end(flow.dst, flow.dport),
            _end(target.dst, target.dport),
            service,
            names.lease(target.dst),
            None if route is None else route.when,
            None if route is None else route.source,
            entry.tcp_state,
            entry.seconds_left,
            None if started is None else max(0.0, round(now - started, 3)),
        )


class _Names:
    """What leads to targets; for one request."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._reader: Reader = registry.reader()
        self._services = {service.name: service for service in registry.routes.force.config.services}
        self._leases: dict[bytes, str | None] = {}
        self._routes: dict[str, dict[str, list[RouteView]]] = {}

    def lease(self, address: bytes) -> str | None:
        """Who has an address."""
        if address not in self._leases:
            self._leases[address] = self._reader.lease_of(address)
        return self._leases[address]

    def route(self, service: str, target: Flow) -> RouteView | None:
        """The only route of a service that leads to where a flow is delivered."""
        routes = self._routes.get(service)
        if routes is None:
            routes = self._routes[service] = self._of(self._services[service])
        address = ipaddress.ip_address(target.dst)
        texts = (str(Target(address, target.dport)), str(Target(address, 0)))
        found = [route for text in texts for route in routes.get(text, ())]
        if len(found) != 1 or any(str(default) in texts for default in self._services[service].default):
            return None
        return found[0]

    def _of(self, service: Service) -> dict[str, list[RouteView]]:
        found: dict[str, list[RouteView]] = {}
        if sum(self._registry.routes.count(service.name)) > MAX_NAMED:
            return found
        after: str | None = ""
        while after is not None:
            page, after = self._registry.routes.page(service.name, after, 1000)
            for route in page:
                for target in route.targets:
                    found.setdefault(target, []).append(route)
        return found


def _end(address: bytes, port: int) -> str:
    return str(Target(ipaddress.ip_address(address), port))


def _is(delivered: Flow, target: Target) -> bool:
    return delivered.dst == target.address.packed and target.port in (0, delivered.dport)


def _is_within(address: bytes, prefix: IPNetwork) -> bool:
    first = prefix.network_address.packed
    return len(first) == len(address) and first <= address <= prefix.broadcast_address.packed


def _prefix(text: str) -> IPNetwork:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        message = f"Must be an address or a prefix, as in 198.51.100.0/24: {error}."
        raise RequestError("invalid", "client", message) from error


def _target(text: str) -> Target:
    place = parse_place(text)
    if place.port == 0:
        message = f"{text} is no filter: a flow is delivered to a port; write {place.address} for whichever."
        raise RequestError("invalid", "target", message)
    return Target(place.address, place.port or 0)
