"""`steerd check --live`: what on this machine would keep a configuration from working. Looks, changes nothing.

Every finding is a Problem: the dotted key that is affected, and what was found, why it matters, what to do.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from steerd.config import Config, Service, Unextended
from steerd.config.parsers import PORT_EXTENSION
from steerd.errors import Problem, SteerdError
from steerd.kernel import firewalls, host, listeners, sysctls
from steerd.kernel.nftables import Nftables
from steerd.model import TCP, UDP, Endpoint, IPAddress

_WILDCARDS = {4: bytes(4), 6: bytes(16)}


def check(config: Config) -> list[Problem]:
    """Every finding about this machine (this network namespace).

    Raises SteerdError without CAP_NET_ADMIN, or where a tool that is needed is missing or fails.
    """
    if not host.may_administer():
        raise SteerdError("check --live must run as root (it needs CAP_NET_ADMIN to see the firewall's rules).")
    tables = host.firewall()
    return [
        *_endpoints_elsewhere(config),
        *_mark_conflicts(config, tables),
        *_deadly_rules(tables),
        *_firewalls(config, tables),
        *_sysctls(config),
        *_wildcard_listeners(config),
        *_own_listeners(config),
        *_groups(config),
        *_wakes(config),
    ]


def _wakes(config: Config) -> Iterator[Problem]:
    """What it takes to start daemons."""
    for key, wake in config.all_wakes.items():
        if wake.unit and shutil.which("busctl") is None:
            yield Problem(key, "Is a unit, but there is no busctl(1) on this machine, by which units are started.")
        if wake.command and not os.access(wake.command[0], os.X_OK):
            yield Problem(key, f"{wake.command[0]} is no program on this machine.")
        if wake.user:
            try:
                is_root = pwd.getpwnam(wake.user).pw_uid == 0
            except KeyError:
                yield Problem(key, f"There is no user {wake.user} on this machine to run it; add it, or name another.")
                continue
            if is_root:
                yield Problem(key, f"{wake.user} is root by another name; what is woken runs as somebody else.")


def _groups(config: Config) -> Iterator[Problem]:
    name = config.gateway.api.read_only_group
    if name is None:
        return
    try:
        grp.getgrnam(name)
    except KeyError:
        yield Problem(
            "gateway.api.read_only_group",
            f"There is no group {name} on this machine, and without it no read-only socket; add it (groupadd --system"
            f" {name}), and the monitors to it.",
        )


def _numbered(service: Service) -> Iterator[tuple[str, Endpoint]]:
    for index, endpoint in enumerate(service.endpoints):
        yield f"services.{service.name}.endpoints[{index}]", endpoint


def _endpoints_elsewhere(config: Config) -> Iterator[Problem]:
    keys: dict[IPAddress, str] = {}
    for key, endpoint in (numbered for service in config.services for numbered in _numbered(service)):
        keys.setdefault(endpoint.address, key)
    here = host.local_addresses(keys)
    for address, key in keys.items():
        if address not in here:
            yield Problem(
                key,
                f"{address} is not an address of this machine, and steerd does not add it, so no connection to it is"
                f" steered; add it (ip address add {address}/{address.max_prefixlen} dev INTERFACE), or a local route.",
            )


def _mark_conflicts(config: Config, tables: list[host.Table]) -> Iterator[Problem]:
    mask = config.gateway.mark.mask
    free = host.ALL_BITS & ~mask
    ours = f"bits of 0x{mask:08x}, in which steerd keeps its decisions"
    remedy = f"limit it to the mask 0x{free:08x}, or choose other mark_bits."
    for rule in host.mark_rules():
        if rule.mask & mask:
            yield Problem(
                "gateway.mark_bits",
                f"The ip rule {rule} compares {ours}; such packets would be routed another way than meant: {remedy}",
            )
    for finding in host.mark_users(tables, mask):
        yield Problem(
            "gateway.mark_bits",
            f"A firewall rule uses {ours}; one would overwrite or misread what the other has written: {remedy}"
            f" It is in {finding}.",
        )


_AT_HOOK = {
    "prerouting": "The first data of a connection that is steered by its payload is such a packet, and late steering"
    " cannot get it past this rule (port extensions in a SYN can); drop such packets at hook input, behind priority"
    " -10 (iptables: chain INPUT of table filter), instead.",
    "input": "The first data of a connection that is steered by its payload is such a packet, and late steering cannot"
    " get it past this rule (port extensions in a SYN can); give the base chain a priority above -10.",
    "output": "Packets with which late steering opens a connection that is steered by its payload are such packets"
    " (port extensions in a SYN need none); take the rule away, since what this machine sends is no threat to it.",
}


def _deadly_rules(tables: list[host.Table]) -> Iterator[Problem]:
    for finding in host.invalid_drops(tables):
        yield Problem(
            "services",
            f"A firewall rule drops packets that conntrack calls invalid: {finding}."
            f" {_AT_HOOK[finding.base.hook or '']}",
        )


def _firewalls(config: Config, tables: list[host.Table]) -> Iterator[Problem]:
    """Firewalls that drop what was steered."""
    early = next((service.name for service in config.services if service.is_early), None)
    late = next((service.name for service in config.services if service.is_late), None)
    for found in firewalls.drops(tables, "input"):
        where = f"chain {found.chain.name} of table {found.table.family} {found.table.name}"
        if found.late and (early or late):
            yield Problem(
                f"services.{early or late}",
                f"The firewall ({where}) drops all that is steered, which it sees as new connections to an alias: add"
                f" {found.remedy}.",
            )
        elif early:
            yield Problem(
                f"services.{early}",
                f"The firewall ({where}) drops what is steered at the SYN or as a datagram (late steering is not"
                f" affected), which it sees as new connections to an alias: add {found.remedy}.",
            )
    pools = config.pools.values()
    outside = next(
        (
            service.name
            for service in config.services
            if service.is_early and any(not any(to.address in pool for pool in pools) for to in service.targets)
        ),
        None,
    )
    for found in firewalls.drops(tables, "forward") if outside else ():
        yield Problem(
            f"services.{outside}",
            f"The firewall (chain {found.chain.name} of table {found.table.family} {found.table.name}) drops what is"
            f" forwarded to targets that are not on this machine (external): add {found.remedy}.",
        )


def _sysctls(config: Config) -> Iterator[Problem]:
    """Sysctls that late steering cannot do without. The daemon sets them when it loads the table: before that, one that
    can be set is no mistake."""
    late = next((service.name for service in config.services if service.is_late), None)
    if late is None:
        return
    with contextlib.closing(Nftables()) as nftables:
        is_loaded = bool(nftables.counters())
    for difference in sysctls.check():
        if difference.fatal or (is_loaded and difference.sysctl.need == "must"):
            yield Problem(f"services.{late}", f"Is steered by first payloads, but {difference}.")


class _Use(NamedTuple):
    """Ports of one protocol and address family that targets use, and where that is written."""

    protocol: int
    version: int
    first: int
    last: int
    key: str
    wildcard: bool
    """Whether a socket on the wildcard address is meant to answer."""
    external: IPAddress | None
    """The target's address, unless it is an alias."""


def _uses(config: Config, service: Service) -> Iterator[_Use]:
    meant = set(config.wildcard)
    path = f"services.{service.name}"
    targets = [(f"{path}.default", target) for target in service.default]
    targets += [(f"{route.name}.target", target) for route in service.routes for target in route.targets]
    for key, target in targets:
        address = target.address
        external = None if any(address in pool for pool in config.pools.values()) else address
        for protocol, first, last in _ports(service, address.version, target.port):
            yield _Use(protocol, address.version, first, last, key, target in meant, external)
    arithmetic = service.extension_pool
    if arithmetic is not None:
        for version in (4, 6):
            if arithmetic.pool.alias_count(version):
                for protocol, first, last in _ports(service, version, arithmetic.port):
                    key = f"{path}.extension_pool"
                    yield _Use(protocol, version, first, last, key, arithmetic.wildcard, None)


def _ports(service: Service, version: int, port: int) -> list[tuple[int, int, int]]:
    """Protocol, first and last port: a target's port, or for `same` all ports on which its clients may come."""
    mine = [endpoint for endpoint in service.endpoints if endpoint.address.version == version]
    if port:
        return [(protocol, port, port) for protocol in sorted({endpoint.protocol for endpoint in mine})]
    return [(e.protocol, e.first_port, e.last_port) for e in mine]


def _wildcard_listeners(config: Config) -> Iterator[Problem]:
    for protocol in _protocols(config):
        yield from _wildcard_listeners_of(config, protocol)


def _protocols(config: Config) -> list[int]:
    return sorted({protocol for service in config.services for protocol in service.protocols})


def _wildcard_listeners_of(config: Config, protocol: int) -> Iterator[Problem]:
    bound = listeners.wildcard_ports(protocol)
    hits = [
        (use, (version, port))
        for service in config.services
        for use in _uses(config, service)
        if not use.wildcard and use.protocol == protocol
        for version, port in bound
        if version == use.version and use.first <= port <= use.last
    ]
    # Targets on other machines have nothing to do with sockets here; external ones may be local nonetheless.
    outside = {use.external for use, _ in hits if use.external is not None}
    elsewhere = outside - host.local_addresses(outside) if outside else outside
    affected: dict[tuple[int, int], str] = {}
    for use, listener in hits:
        if use.external not in elsewhere:
            affected.setdefault(listener, use.key)
    wanted = {(wildcard, port) for _, port in affected for wildcard in _WILDCARDS.values()}
    names = host.processes_listening(wanted, protocol)
    for (version, port), key in sorted(affected.items()):
        name = _wildcard_name(names, version, port)
        yield Problem(
            key,
            f"{'Port' if protocol == TCP else 'UDP port'} {port} of the wildcard address"
            f" ({'0.0.0.0' if version == 4 else '::'}) is taken by {name}, and a target uses this port: its daemon"
            f" cannot bind the alias meanwhile, and steerd {'resets' if protocol == TCP else 'refuses'} what the other"
            " socket would answer in its place; bind that one to addresses of its own, or say wildcard = true if it is"
            " meant to answer.",
        )


def _own_listeners(config: Config) -> Iterator[Problem]:
    """Sockets of the gateway's own that nothing reaches any more. On a single TCP port that is what was asked for; of
    UDP, flows that such a socket has answered go on, and others do not."""
    for protocol in _protocols(config):
        wildcard = listeners.wildcard_ports(protocol)
        specific = listeners.all_listeners(protocol)
        for service in config.services:
            for key, endpoint in _numbered(service):
                is_single = endpoint.first_port == endpoint.last_port
                if service.unextended is Unextended.PASS or endpoint.protocol != protocol:
                    continue
                if protocol == UDP or not is_single:
                    ports = _own_ports(config, service, endpoint, specific, wildcard)
                    yield from _steered_away(key, service, endpoint, ports)


def _own_ports(
    config: Config,
    service: Service,
    endpoint: Endpoint,
    specific: set[tuple[bytes, int]],
    wildcard: set[tuple[int, int]],
) -> set[int]:
    """Ports of a range of ports on which a socket of the gateway's own listens."""
    version = endpoint.address.version
    meant = [
        u for u in _uses(config, service) if u.wildcard and (u.protocol, u.version) == (endpoint.protocol, version)
    ]
    ports = {port for address, port in specific if address == endpoint.address.packed}
    ports |= {
        port for family, port in wildcard if family == version and not any(u.first <= port <= u.last for u in meant)
    }
    return {port for port in ports if endpoint.first_port <= port <= endpoint.last_port}


def _steered_away(key: str, service: Service, endpoint: Endpoint, ports: set[int]) -> Iterator[Problem]:
    version, packed, protocol = endpoint.address.version, endpoint.address.packed, endpoint.protocol
    wanted = {(address, port) for port in ports for address in (packed, *_WILDCARDS.values())}
    names = host.processes_listening(wanted, protocol)
    what = "connections" if protocol == TCP else "datagrams"
    passing = ', or set unextended = "pass"' if PORT_EXTENSION in service.inspect else ""
    for port in sorted(ports):
        name = names.get((packed, port)) or _wildcard_name(names, version, port)
        if endpoint.first_port == endpoint.last_port:
            yield Problem(
                key,
                f"On {endpoint}, {name} listens: {what} to it are steered away and never get there; end it, or bind it"
                f" to another address{passing}.",
            )
        else:
            yield Problem(
                key,
                f"The range {endpoint} covers port {port}, on which {name} listens: {what} to it are steered"
                f" away and never get there; leave port {port} out of the range{passing}.",
            )


def _wildcard_name(names: dict[tuple[bytes, int], str], version: int, port: int) -> str:
    """Who holds the wildcard address; a socket on `::` usually takes IPv4 connections too."""
    wildcards = [_WILDCARDS[4], _WILDCARDS[6]] if version == 4 else [_WILDCARDS[6]]
    return next((names[w, port] for w in wildcards if (w, port) in names), "a process that cannot be seen")
