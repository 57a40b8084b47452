"""The configuration: from a TOML file to values that the rest of steerd can use without checking anything again.

`load` and `parse` give a Config, or raise a ConfigError that names every mistake found, each with its dotted key
(routes and lists are counted from 0) and a sentence: what is wrong, what would be right. A value that is already
reported is left out of later checks, so that one mistake is one line.

Three steps, in this file's order:
1. a reader walks the structs below field by field: unknown keys, missing keys, wrong types, numbers out of range;
2. text becomes addresses, endpoints, targets, conditions;
3. the parts are held against each other: what overlaps, what contradicts, what can never match.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import enum
import functools
import ipaddress
import json
import operator
import os
import re
import socket
import string
import tomllib
import types
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from steerd import paths
from steerd.core.choice import MAX_MEMBERS, SOURCE
from steerd.core.marks import FIRST_TARGET_ID, MARK_BITS, MarkLayout
from steerd.core.pools import Mode, Pool
from steerd.core.relays import Seats
from steerd.core.router import MAX_PROBES, conflicts, count_shapes, key_rank
from steerd.core.sessions import MAX_ID, OnNewSource, SessionEntry, Sessions
from steerd.core.wake import MAX_TIMEOUT, Wake, check_template
from steerd.core.wake import Limits as WakeLimits
from steerd.errors import ConfigError, Problem
from steerd.model import (
    PROTOCOL_NAMES,
    PROTOCOL_NUMBERS,
    TCP,
    UDP,
    Choice,
    Condition,
    Endpoint,
    IPAddress,
    IPNetwork,
    Match,
    Outcome,
    Policy,
    Route,
    Target,
    UnixDaemon,
)
from steerd.wire import dns, portext, quic, quic_lb
from steerd.wire.portext import Numbers
from steerd.wire.registry import DATAGRAMS, PARSER_NAMES, PATTERNED, REGISTRY, check_patterns, transports

PORT_EXTENSION = portext.NAME
"""The word in `inspect` that stands for the port extension; it reads headers, hence it is no payload parser."""

QUIC = "quic"
"""The parser that reads connection ids as well."""

PROXY = "proxy"
"""The parser whose header is believed of `trusted_proxies` only."""

MAX_REAL_ADDRESSES = {4: 1 << 20, 6: 1 << 14}
"""The most aliases of all pools in mode `addresses`, by address family. The kernel keeps an address and a route for
each, and reconciling reads them all. For each IPv6 address that is added it walks over all that are there
(addrconf_verify_rtnl in net/ipv6/addrconf.c): 16,384 take two seconds, 65,536 minutes."""
MIN_MARK_BITS = 20
"""The fewest mark bits to live on: the flag, and ids for half a million targets."""
MAX_SERVICES = 65536
"""The router's table keys hold a service's index in 16 bits."""

_IDLE_TIMEOUT = 120
_WAKE_TIMEOUT = 10.0
_MAX_PORT = 65535
_MAX_EXTENDED_PORT = (1 << 32) - 1
_MAX_QUEUES = 65535  # the last one is kernel.queue.RESERVED
_MAX_SOCKET_PATH = 107  # sun_path, with a zero behind it, or before an abstract name (unix(7))
_KERNEL_TCP_OPTIONS = {19: "MD5", 28: "user timeout", 29: "TCP-AO", 30: "MPTCP", 34: "Fast Open", 69: "TCP-ENO"}
_IPV4 = re.compile(r"[0-9.]+")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")  # what useradd(8) allows, and upper case
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

_UNIX = ("unix:", "unix-fd:")
_KINDS: dict[str, Literal["unix", "unix-fd"]] = {"unix": "unix", "unix-fd": "unix-fd"}

Place = Callable[[str, Pool], tuple[IPAddress, ...] | None]
"""The aliases of a pool for a daemon's name (core.relays.Seats.place)."""

_Rate = Annotated[int, Meta(ge=1, le=(1 << 32) - 1)]
# The kernel multiplies by HZ (at most 1000) in 32 bits (net/netfilter/nf_conntrack_proto_tcp.c).
_Seconds = Annotated[int, Meta(ge=1, le=((1 << 32) - 1) // 1000)]
_WakeTimeout = Annotated[float, Meta(ge=0.1, le=MAX_TIMEOUT)]
_SleepAfter = Annotated[float, Meta(ge=1, le=1 << 31)]


# --- What the rest of steerd sees ------------------------------------------------------------------------------------


class Limits(Struct, frozen=True):
    """How many new connections get as far as a worker: per second, and at once (burst)."""

    source_rate: _Rate = 1000
    """One IPv4 address, or one IPv6 /64."""
    source_burst: _Rate = 2000
    """... and how many at once."""
    stranger_rate: _Rate = 2000
    """All sources together that never completed a connection."""
    stranger_burst: _Rate = 4000
    """... and how many at once."""
    total_rate: _Rate = 50000
    """All sources together."""
    total_burst: _Rate = 50000
    """... and how many at once."""


class Timeouts(Struct, frozen=True):
    """Conntrack timeouts of steered connections, in seconds."""

    syn_sent: _Seconds = 5
    """The daemon has not answered yet."""
    syn_recv: _Seconds = 5
    """The client has not answered the daemon yet."""
    time_wait: _Seconds = 10
    """Both sides have closed."""
    close: _Seconds = 2
    """It was reset."""
    udp_unreplied: _Seconds = 30
    """Flows of datagrams that no daemon has answered yet; at most as long as their service's `idle_timeout`."""


class Pending(Struct, frozen=True):
    """Bounds on connections whose first payload does not suffice yet, for each worker; and the same again on flows of
    datagrams."""

    connection_bytes: Annotated[int, Meta(ge=1 << 15, le=1 << 20)] = 1 << 15
    """Bytes of one connection. No parser wants more than the least that is allowed here."""
    source_connections: Annotated[int, Meta(ge=1, le=1 << 20)] = 64
    """Connections of one IPv4 address, or one IPv6 /64."""
    connections: Annotated[int, Meta(ge=1, le=1 << 20)] = 4096
    """Connections in all."""


class Api(Struct, frozen=True):
    """Who may use the API beside root and the group `steerd`."""

    read_only_group: str | None = None
    """The group whose members may look at what is no secret, at a socket of their own. Default: none."""


class Log(Struct, frozen=True):
    """What the daemon and its workers write on standard error."""

    format: Literal["auto", "json", "console"] = "auto"
    """`auto`: for people on a terminal, else JSON lines."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""


class Listen(NamedTuple):
    """Where metrics are served: a TCP address and port, or else the path of a unix socket."""

    host: str
    port: int
    path: str

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Metrics(Struct, frozen=True):
    """What monitors read."""

    listen: Listen | None = None


class Relay(Struct, frozen=True):
    """The relay, which stands on aliases for daemons on unix sockets."""

    pool: str
    """Of whose aliases each daemon gets one, in each address family."""
    port: Annotated[int, Meta(ge=1, le=_MAX_PORT)] = 21300
    """On all of them."""


class Gateway(Struct, frozen=True):
    """What concerns the whole machine."""

    state_dir: str
    """An absolute path, like run_dir."""
    run_dir: str
    user: str
    """Who the agent becomes when it is started as root."""
    workers: int
    first_queue: int
    """NFQUEUE numbers first_queue .. first_queue + workers - 1."""
    mark: MarkLayout
    queue_length: int
    """Packets."""
    receive_buffer: int
    """Bytes."""
    access_log: int
    """0: off; N: one of N decisions is logged."""
    limits: Limits
    timeouts: Timeouts
    pending: Pending
    port_extension: Numbers
    api: Api = Api()
    log: Log = Log()
    metrics: Metrics = Metrics()
    relay: Relay | None = None


class ExtensionPool(Struct, frozen=True):
    """Arithmetic from an extension (or an extended port) to the alias of a pool: `first + i` is the i-th alias."""

    pool: Pool
    by: Literal["extension", "extended-port"]
    first: int
    port: int
    """0 is `same`."""
    wildcard: bool
    """A socket that is bound to the wildcard address may answer for these targets."""


class Unextended(enum.StrEnum):
    """What becomes of a SYN without extension."""

    PASS = "pass"
    """Left to the gateway's own socket."""
    DEFAULT = "default"
    UNMATCHED = "unmatched"
    INSPECT = "inspect"
    """The kernel answers it, and the first payload decides."""


class Service(Struct, frozen=True):
    """Endpoints that share inspection order, routes and a default."""

    name: str
    endpoints: tuple[Endpoint, ...]
    inspect: tuple[str, ...]
    default: tuple[Target, ...]
    """At most one of each address family, or several with a `choice`; empty: none."""
    choice: Choice | None
    """Among the targets of `default`, and of `on_silence`."""
    unmatched: Outcome
    """RESET, DROP or ALERT."""
    unextended: Unextended
    """INSPECT wherever `inspect` names a payload parser, unless it says otherwise. Where it names nothing, DEFAULT or
    UNMATCHED."""
    first_payload_timeout: float
    """Seconds."""
    on_silence: tuple[Target, ...]
    """As `default`; empty: who says nothing is of no interest."""
    idle_timeout: int
    """Seconds for which a flow of datagrams that was answered may be idle."""
    rebinding: bool
    """QUIC: a client whose address or port changed is known by the connection id that its daemon answered with."""
    connection_ids: tuple[quic_lb.Config, ...]
    """QUIC: how daemons put their server ids into connection ids."""
    extension_pool: ExtensionPool | None
    sessions: Sessions | None
    trusted_proxies: tuple[IPNetwork, ...]
    """Sources whose PROXY header is believed; empty unless `inspect` names "proxy"."""
    routes: tuple[Route, ...]
    """Without duplicates and ties."""

    @property
    def is_late(self) -> bool:
        """Whether TCP connections without an extension are decided by their first payload."""
        return self.unextended is Unextended.INSPECT and TCP in self.protocols

    @property
    def protocols(self) -> set[int]:
        """model.TCP, model.UDP or both: what the endpoints speak."""
        return {endpoint.protocol for endpoint in self.endpoints}

    @property
    def decides_every_datagram(self) -> bool:
        """Whether each datagram is decided by itself, and not the flow by its first ones."""
        return any(_is_every(word) for word in self.inspect)

    @property
    def key_order(self) -> tuple[tuple[str, ...], ...]:
        """The keys of each parser in `inspect`, in that order, as the router wants them."""
        return tuple(_keys_of(parser) for parser in self.inspect)


class Config(Struct, frozen=True):
    """A configuration without a known mistake."""

    file: str
    gateway: Gateway
    pools: dict[str, Pool]
    services: tuple[Service, ...]
    """Sorted by name; a service's place here is its index in the router's table."""
    wildcard: tuple[Target, ...]
    """Targets of routes and defaults with `wildcard = true`, each once."""
    waking: WakeLimits
    wakes: dict[IPAddress, Wake]
    """Of aliases whose target in the file says so; of all others, what their pool says counts."""
    relayed: dict[str, tuple[IPAddress, ...]]
    """The aliases of each daemon on a unix socket (by model.UnixDaemon.name): where targets say `unix:`, they lead
    there."""

    @property
    def all_wakes(self) -> dict[str, Wake]:
        """All that the file says about waking, by pool (dotted key) or target."""
        pools = {f"pools.{name}.wake": pool.wake for name, pool in self.pools.items() if pool.wake is not None}
        return pools | {f"wake of {address}": wake for address, wake in self.wakes.items()}

    @property
    def wakes_commands(self) -> bool:
        """Whether a command is started when a connection comes."""
        return any(wake.command for wake in self.all_wakes.values())

    def wake_of(self, address: IPAddress) -> tuple[Wake, int] | None:
        """How the daemon of an alias is started, and the alias's index in its pool; None: it is not."""
        for pool in self.pools.values():
            index = pool.place_of(address)
            if index is not None:
                wake = self.wakes.get(address, pool.wake)
                return None if wake is None else (wake, index)
        return None

    def may_be_wildcard(self, target: Target) -> bool:
        """Whether a socket bound to the wildcard address may answer for a target."""
        pools = (s.extension_pool for s in self.services if s.extension_pool is not None and s.extension_pool.wildcard)
        return target in self.wildcard or any(p.port == target.port and target.address in p.pool for p in pools)


def load(path: str | os.PathLike[str], seats: Seats | None = None) -> Config:
    """Read and check a configuration file; raises ConfigError with every mistake in it, or why it cannot be read.
    `seats`: who gives aliases to daemons on unix sockets; None: as if there had been none before."""
    return parse(read(path), os.fspath(path), seats)


def read(path: str | os.PathLike[str]) -> str:
    """What a configuration file says, unchecked; raises ConfigError if it cannot be read."""
    file = os.fspath(path)
    try:
        return Path(file).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(file, [Problem("file", f"Cannot be read: {error.strerror}.")]) from error
    except UnicodeDecodeError as error:
        message = f"Is not text in UTF-8: the byte at offset {error.start} does not belong there."
        raise ConfigError(file, [Problem("file", message)]) from error


def parse(text: str, file: str, seats: Seats | None = None) -> Config:
    """Check a configuration that is already read; `file` is its name in messages. Raises ConfigError."""
    reader = _Reader()
    raw = reader.read(_File, _toml(text, file), "")
    gateway = _gateway(raw.gateway, reader)
    prefixes = {name: _prefixes(name, pool, reader) for name, pool in raw.pools.items()}
    endpoints = {name: _endpoints(name, service, reader) for name, service in raw.services.items()}
    _check_overlaps(prefixes, endpoints, reader)
    pools = {name: _pool(name, pool, prefixes[name], reader) for name, pool in raw.pools.items()}
    _check_real_addresses(pools, reader)
    scene = _Scene(pools, endpoints, reader)
    seats = Seats() if seats is None else seats
    scene.relay = _relay(gateway.relay, raw.services, pools, reader)
    scene.place = seats.place
    services = [_service(name, raw.services[name], scene) for name in sorted(raw.services)]
    if len(services) > MAX_SERVICES:
        reader.problem("services", f"There are {len(services)} services; at most {MAX_SERVICES} are possible.")
    _check_ids(gateway, services, reader)
    if reader.problems:
        raise ConfigError(file, reader.problems)
    waking = WakeLimits(*msgspec.structs.astuple(raw.wake))
    wakes = {address: wake for address, (wake, _) in scene.wakes.items()}
    return Config(file, gateway, pools, tuple(services), tuple(scene.wildcard), waking, wakes, seats.given)


def check_session(
    config: Config, service: Service, session_id: str, target: object, source: str | None
) -> SessionEntry:
    """A session that is not in the file (but in a request, say), checked as those in it are.

    Raises ConfigError, with the keys `id`, `target` and `source`. The service must have sessions.
    """
    assert service.sessions is not None
    reader = _Reader()
    endpoints = {
        each.name: {f"services.{each.name}.endpoints[{index}]": e for index, e in enumerate(each.endpoints)}
        for each in config.services
    }
    scene = _Scene(config.pools, endpoints, reader)
    scene.in_file = False
    versions: set[int] = {endpoint.address.version for endpoint in service.endpoints}
    entry = _session(_RawSession(session_id, target, source), "", service.sessions.key, versions, scene)
    scene.check_for_request("target")
    if reader.problems:
        raise ConfigError(config.file, reader.problems)
    return entry


class RouteChecker:
    """Checks routes of one service that are not in the file (but in a request, say) as those in it are. Made once for
    many routes."""

    def __init__(self, config: Config, service: Service, place: Place | None = None) -> None:
        """`place` gives aliases to daemons on unix sockets; None: no route can lead there."""
        self._file = config.file
        self._reader = _Reader()
        endpoints = {
            each.name: {f"services.{each.name}.endpoints[{index}]": e for index, e in enumerate(each.endpoints)}
            for each in config.services
        }
        self._scene = _Scene(config.pools, endpoints, self._reader)
        self._scene.in_file = False
        self._scene.relay = config.gateway.relay
        self._scene.place = place
        self._scene.is_tcp = UDP not in service.protocols
        self._conditions = _Conditions(service.inspect, self._reader)
        self._versions: set[int] = {endpoint.address.version for endpoint in service.endpoints}

    def check(
        self,
        when: Mapping[str, object],
        target: object,
        source: str | None,
        choose: str | None = None,
        hash_: str | None = None,
    ) -> Route:
        """The route, without a name. Raises ConfigError, with the keys `when.KEY`, `target`, `source`, `choose` and
        `hash`."""
        route = self.check_match(when, source)
        self._scene.clear()
        coming = _coming(route.source, self._versions, self._conditions)
        policy = next((each for each in get_args(Policy) if each == choose), None)
        if choose is not None and policy is None:
            self._reader.problem("choose", f"Must be {_described(Policy)}, not {_shown(choose)}.")
        choice = _choice(policy, hash_, "", self._conditions, self._reader)
        targets = _targets(target, "target", coming, self._scene, choice, "choose")
        self._scene.check_for_request("target")
        self._give_up()
        return route._replace(targets=targets, choice=choice)

    def check_match(self, when: Mapping[str, object], source: str | None) -> Route:
        """What a route matches, without targets. Raises ConfigError as `check` does."""
        self._reader.clear()
        route = _route(_RawRoute(None, dict(when), source), "", self._conditions, self._versions, self._scene)
        self._give_up()
        assert route is not None  # there was no mistake
        return route

    def _give_up(self) -> None:
        if self._reader.problems:
            raise ConfigError(self._file, self._reader.problems)


# --- 1. From TOML to structs -----------------------------------------------------------------------------------------


class _RawPortExtension(Struct):
    """Numbers of the port extension, where others than its own are wanted."""

    ipv4_option: Annotated[int, Meta(ge=2, le=255)] = Numbers().ipv4_option
    """The number of the IPv4 option."""
    # A host that does not know an option skips it only if its top two bits are 0 (RFC 8200 section 4.2).
    ipv6_option: Annotated[int, Meta(ge=2, le=63)] = Numbers().ipv6_option
    """The number of the IPv6 destination option."""
    tcp_option: Annotated[int, Meta(ge=9, le=255)] = Numbers().tcp_option
    """The kind of the TCP option."""
    exid: Annotated[int, Meta(ge=0, le=65535)] = Numbers().exid
    """The identifier that tells ours from other uses of these numbers."""


class _RawMetrics(Struct):
    """What monitors read."""

    listen: str = ""
    """Where metrics are served for Prometheus: `127.0.0.1:9469`, or `unix:/path`. Empty: nowhere."""


class _RawGateway(Struct):
    """What concerns the whole machine."""

    state_dir: str = paths.STATE_DIR
    """What must outlive a restart: routes that were added, leases, sessions, ids of targets."""
    run_dir: str = paths.RUN_DIR
    """Where the API listens, and what a reboot may wipe out."""
    user: Annotated[str, Meta(min_length=1)] = "steerd"
    """Who the daemon becomes when it is started as root."""
    workers: Annotated[int, Meta(ge=1, le=64)] = min(os.cpu_count() or 1, 64)
    """Processes that decide, each with a queue of its own. Default: one for each CPU, at most 64."""
    first_queue: Annotated[int, Meta(ge=0, le=65535)] = 21300
    """The NFQUEUE number of the first worker; the others have those that follow."""
    mark_bits: str = "8-31"
    """Bits of the packet mark, `FIRST-LAST`, that nobody else on this machine uses: they carry decisions."""
    queue_length: Annotated[int, Meta(ge=1, le=65536 * 16)] = 4096
    """Packets that may wait for a worker."""
    # The kernel doubles what SO_RCVBUFFORCE is given, in an int; below a page not one packet would fit.
    receive_buffer: Annotated[int, Meta(ge=4096, le=(1 << 30) - 1)] = 8388608
    """Bytes of the queue's socket."""
    access_log: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] = 0
    """0: only decisions that fail are logged; 1: every one; N: one of N."""
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    pending: Pending = Pending()
    port_extension: _RawPortExtension = msgspec.field(default_factory=_RawPortExtension)
    api: Api = Api()
    log: Log = Log()
    metrics: _RawMetrics = msgspec.field(default_factory=_RawMetrics)
    relay: Relay | None = None


class _RawPool(Struct):
    """Local addresses, aliases, that the daemon adds, each for a daemon to listen on."""

    prefixes: list[str]
    """Local addresses, IPv4, IPv6 or both."""
    mode: Mode = "addresses"
    """`addresses`: each is added to an interface. `anyip`: a route makes all of them local."""
    size: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)] | None = None
    """How many aliases there are of each family. Default: all of the prefixes."""
    quarantine: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] = 600
    """Seconds for which nobody else gets the alias of a lease that has ended."""
    wake: Any = None
    """What starts the daemon of an alias at its first connection: `unit:NAME.service`, or a command as a list. {lease},
    {alias} and {index} in it are replaced."""
    user: str | None = None
    """Who runs the command of `wake`."""
    wake_timeout: _WakeTimeout | None = None
    """Seconds until the daemon must listen. Default: 10."""
    sleep_after: _SleepAfter | None = None
    """Seconds without a connection after which the daemon is stopped. Default: never."""


class _RawExtensionPool(Struct):
    """Arithmetic from port extensions to the aliases of a pool."""

    pool: str
    """The name of the pool."""
    by: Literal["extension", "extended-port"]
    """`extension`: extension `first` + i is the i-th alias. `extended-port`: extended port `first` + i is, on one
    port."""
    first: Annotated[int, Meta(ge=1, le=_MAX_EXTENDED_PORT)] | None = None
    """What the first alias stands for. Default: 1, or with `extended-port` 65537."""
    port: Annotated[int, Meta(ge=1, le=_MAX_PORT)] | Literal["same"] = "same"
    """The daemons' port; `same` is the client's."""
    wildcard: bool = False
    """Sockets that are bound to the wildcard address may answer."""


class _RawTarget(Struct):
    """A target that needs more words than its address."""

    address: str
    """`address:port`, or `address:same` for the port the client used; `unix:/path` and `unix-fd:/path` by way of the
    relay."""
    external: bool = False
    """It is in no pool; this gateway is its route back."""
    wildcard: bool = False
    """A socket that is bound to the wildcard address may answer."""
    wake: Any = None
    """As of a pool, for this target alone."""
    user: str | None = None
    """Who runs the command of `wake`."""
    wake_timeout: _WakeTimeout | None = None
    """Seconds until the daemon must listen. Default: 10."""
    sleep_after: _SleepAfter | None = None
    """Seconds without a connection after which the daemon is stopped. Default: never."""
    proxy_protocol: Literal["v2"] | None = None
    """Of `unix:`: the daemon is told who the client is."""


class _RawWaking(Struct):
    """Bounds on daemons that are started by their first connection."""

    max_awake: Annotated[int, Meta(ge=1, le=4096)] = WakeLimits().max_awake
    """Daemons at a time."""
    starts_per_second: Annotated[float, Meta(ge=0.01, le=1000)] = WakeLimits().starts_per_second
    """Daemons that are started in a second."""
    burst: Annotated[int, Meta(ge=1, le=4096)] = WakeLimits().burst
    """... and how many at once."""


class _RawRoute(Struct):
    """Conditions, and where the connections go of which they all hold."""

    target: Any
    """Where to: a target, or a list of them, one for each address family; with `choose`, several of each."""
    when: dict[str, Any] = {}
    """Conditions that must all hold: keys and values. `*.example` matches any beginning, `/path/*` any end."""
    source: str | None = None
    """Only clients of this prefix."""
    choose: Policy | None = None
    """How one of several targets of a family is chosen."""
    hash: str | None = None
    """With `choose = "hash"`: the key whose value decides. Default: `source`, the address of the client."""


class _RawSession(Struct):
    """One session."""

    id: str
    """What clients say."""
    target: Any
    """As in a route."""
    source: str | None = None
    """The client's address. Default: the first that comes."""


class _RawSessions(Struct):
    """Session ids that lead to one target each, before any route."""

    key: str
    """The key whose value is the session id."""
    on_new_source: OnNewSource
    """What becomes of a known id from another address: it is allowed, the session moves there, or it is denied."""
    entries: list[_RawSession] = []
    """Sessions that are always there."""


class _RawConnectionIds(Struct):
    """How daemons put their server ids into connection ids (QUIC-LB)."""

    config: Annotated[int, Meta(ge=0, le=6)]
    """The configuration id in the first byte of a connection id."""
    server_id_length: Annotated[int, Meta(ge=1, le=15)]
    """Bytes."""
    nonce_length: Annotated[int, Meta(ge=4, le=18)]
    """Bytes."""
    key: str | None = None
    """32 hexadecimal digits; without it, server ids are in plain text."""


class _RawQuic(Struct):
    """What else is done for QUIC."""

    rebinding: bool | None = None
    """A client whose address or port changed is known by its connection id. Default: true, unless there are
    `connection_ids`."""
    connection_ids: list[_RawConnectionIds] = []
    """How daemons put their server ids into connection ids (QUIC-LB)."""


class _RawService(Struct):
    """Endpoints that share inspection, routes and a default."""

    endpoints: list[str]
    """Where clients connect to: `address:port/tcp` or `/udp`, or `address:first-last/tcp`."""
    inspect: list[str] = []
    """Parsers, in this order; `port-extension` among them reads headers."""
    default: Any = None
    """Where to if no route matches; as the target of a route."""
    choose: Policy | None = None
    """How one of several targets of `default` or `on_silence` is chosen."""
    hash: str | None = None
    """As in a route."""
    unmatched: Literal["reset", "drop", "tls-alert"] = "reset"
    """The answer to who matches nothing, where there is no `default`."""
    unextended: Literal["inspect", "pass", "default", "unmatched"] | None = None
    """With `port-extension`: what becomes of a SYN that carries none. Default: `inspect` where there is a parser, else
    `unmatched`."""
    first_payload_timeout: Annotated[float, Meta(ge=0.01, le=600)] | None = None
    """Seconds within which a first payload must suffice. Default: 10."""
    on_silence: Any = None
    """Where clients go that say nothing for that long; as the target of a route."""
    idle_timeout: _Seconds | None = None
    """UDP: seconds for which a flow may be idle. Default: 120."""
    quic: _RawQuic | None = None
    """What else is done for QUIC."""
    extension_pool: _RawExtensionPool | None = None
    """Arithmetic from port extensions to the aliases of a pool; routes come before it."""
    sessions: _RawSessions | None = None
    """Session ids that lead to one target each, before any route."""
    trusted_proxies: list[str] = []
    """With the parser `proxy`: prefixes whose PROXY header is believed."""
    routes: list[_RawRoute] = []
    """Which keys lead where."""


class _File(Struct):
    """The whole file."""

    gateway: _RawGateway = msgspec.field(default_factory=_RawGateway)
    """What concerns the whole machine."""
    wake: _RawWaking = msgspec.field(default_factory=_RawWaking)
    """Bounds on daemons that are started by their first connection."""
    pools: dict[str, _RawPool] = {}
    """Local addresses that the daemon adds, for daemons to listen on: `[pools.NAME]`."""
    services: dict[str, _RawService] = {}
    """Endpoints that share inspection, routes and a default: `[services.NAME]`."""


FILE, TARGET = _File, _RawTarget
"""What a file, and a target that is written as a table, may hold; for the manual."""

_T = TypeVar("_T")
_S = TypeVar("_S", bound=Struct)


class _Reader:
    """Reads structs out of TOML, collects mistakes, and remembers where they are."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._bad: set[str] = set()
        self._fields: dict[type[Struct], tuple[msgspec.structs.FieldInfo, ...]] = {}

    def problem(self, key: str, message: str) -> None:
        """Report a mistake at a dotted key."""
        self.problems.append(Problem(key, message))
        self._bad.update(("", key))
        self._bad.update(key[: end.start()] for end in re.finditer(r"[.\[]", key))

    def clear(self) -> None:
        """Forget all mistakes."""
        self.problems = []
        self._bad.clear()

    def is_bad(self, key: str) -> bool:
        """Whether a mistake was reported at this key or below it."""
        return key in self._bad

    def attempt(self, key: str, parse: Callable[[str], _T], text: str) -> _T | None:
        """What a function makes of a text; it raises ValueError with a sentence. None: it did, or the text's place was
        reported before."""
        if key in self._bad:
            return None
        try:
            return parse(text)
        except ValueError as error:
            self.problem(key, str(error))
            return None

    def read(self, kind: type[_S], value: object, path: str) -> _S:
        """A struct from a TOML table. What is missing or wrong is reported, and has its default or an empty value."""
        is_table = self._is_table(value, path)
        table: dict[str, object] = value if isinstance(value, dict) else {}
        fields = self._fields.get(kind)
        if fields is None:
            fields = self._fields[kind] = msgspec.structs.fields(kind)
        found: dict[str, object] = {}
        for field in fields:
            key = _join(path, field.name)
            if field.name in table:
                found[field.name] = self._value(field.type, table[field.name], key)
            elif field.required and is_table:
                self.problem(key, f"Is missing; it must be {_described(field.type)}.")
        if not table.keys() <= found.keys():
            names = [field.name for field in fields]
            for name in table:
                if name not in names:
                    self.problem(_join(path, name), f"Is not a known key; {_instead(name, names)}")
        for field in fields:
            if found.get(field.name, msgspec.UNSET) is msgspec.UNSET:
                found.pop(field.name, None)
                if field.required:
                    found[field.name] = _empty(field.type)
        return kind(**found)

    def _value(self, kind: Any, value: object, path: str) -> object:
        """The value of a field; UNSET if it is wrong (and reported)."""
        kind = _without_none(kind)
        if _is_struct(kind):
            return self.read(kind, value, path)
        args = get_args(kind)
        if get_origin(kind) is dict and isinstance(value, dict) and _is_struct(args[1]):
            tables = ((name, table, _join(path, name)) for name, table in value.items())
            return {name: self.read(args[1], table, key) for name, table, key in tables if self._is_table(table, key)}
        if get_origin(kind) is list and isinstance(value, list):
            if _is_struct(args[0]):
                return [self.read(args[0], table, f"{path}[{index}]") for index, table in enumerate(value)]
            items = (self._leaf(args[0], text, f"{path}[{index}]") for index, text in enumerate(value))
            return ["" if item is msgspec.UNSET else item for item in items]
        return self._leaf(kind, value, path)

    def _is_table(self, value: object, path: str) -> bool:
        if not isinstance(value, dict):
            self.problem(path, f"Must be a table, not {_shown(value)}.")
        return isinstance(value, dict)

    def _leaf(self, kind: Any, value: object, path: str) -> object:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            self.problem(path, f"Must be {_described(kind)}, not {_shown(value)}.")
            return msgspec.UNSET


def _toml(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        message = str(error)
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
        line = place[1] if place and place[1] else str(len(text.splitlines()))
        reason = message[: place.start()] if place else message
        raise ConfigError(file, [Problem(f"line {line}", f"Is not TOML: {reason}.")]) from error


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def _without_none(kind: Any) -> Any:
    """`X | None` as X: TOML has no null, so None only ever means "not written"."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    return functools.reduce(operator.or_, (part for part in get_args(kind) if part is not types.NoneType))


def _empty(kind: Any) -> object:
    """What stands for a required value that is missing or wrong."""
    if get_origin(kind) is list:
        return []
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    return "" if kind is str else None


def _described(kind: Any) -> str:
    """A type in an operator's words."""
    kind = _without_none(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"a {'whole ' if args[0] is int else ''}number from {args[1].ge} to {args[1].le}"
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part) for part in args)
    if origin is Literal:
        return " or ".join(f'"{word}"' for word in args)
    if origin is list:
        return "a list of tables" if _is_struct(args[0]) else "a list of texts in quotes"
    if kind is Any:
        return 'a target such as "10.64.0.1:8080"'
    return {str: "text in quotes", bool: "true or false"}.get(kind, "a table")


def _shown(value: object) -> str:
    """A TOML value, short and on one line."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else f"{value[:60]}...", ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, datetime.date | datetime.time):
        return "a date or time"
    return str(value)


def _join(path: str, key: str) -> str:
    key = key if _NAME.fullmatch(key) else json.dumps(key)
    return f"{path}.{key}" if path else key


def _instead(word: str, known: Iterable[str]) -> str:
    """The second half of a sentence about a word that is not known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known here: {', '.join(known)}." if known else "there is none yet."


# --- 2. From text to values; each function raises ValueError with a sentence ------------------------------------------


def parse_endpoint(text: str) -> Endpoint:
    """`203.0.113.10:443/tcp`, `[2001:db8::10]:8000-8999/tcp`."""
    usage = (
        'An endpoint is written "203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp" or with a range of ports, "8000-8999"'
    )
    rest, slash, protocol = text.partition("/")
    host, ports = _host_and_port(rest, usage)
    if not slash:
        raise ValueError(f"{usage}; {_shown(text)} does not end in /tcp or /udp.")
    if protocol not in PROTOCOL_NUMBERS:
        raise ValueError(f"{usage}; {_shown(protocol)} is not a protocol that is steered, only tcp and udp are.")
    address = _address(host)
    if (kind := _unusable(ipaddress.ip_network(address))) is not None:
        raise ValueError(f"{address} is {kind}; an endpoint has an address that clients connect to.")
    first, dash, last = ports.partition("-")
    first_port = _port(first)
    last_port = _port(last) if dash else first_port
    if last_port < first_port:
        raise ValueError(f"The port range {ports} ends before it begins; {last}-{first} would be right.")
    return Endpoint(address, first_port, last_port, PROTOCOL_NUMBERS[protocol])


def parse_target(text: str) -> Target:
    """`10.64.0.5:8080`, `[fd00:64::5]:same`."""
    host, port = _host_and_port(
        text, 'A target is written "10.64.0.1:8080", "[fd00:64::1]:8080", or with the port "same"'
    )
    return Target(_address(host), 0 if port == "same" else _port(port))


def parse_listen(text: str) -> Listen | None:
    """`127.0.0.1:9464`, `[::1]:9464`, `unix:/run/steerd/metrics.sock`; "": nowhere."""
    if not text:
        return None
    kind, _, path = text.partition(":")
    if kind == "unix":
        if len(_directory(path).encode()) > _MAX_SOCKET_PATH:
            raise ValueError(f"The path of a unix socket has at most {_MAX_SOCKET_PATH} bytes.")
        return Listen("", 0, path)
    usage = 'Where to listen is written "127.0.0.1:9464", "[::1]:9464" or "unix:/run/steerd/metrics.sock"'
    host, port = _host_and_port(text, usage)
    return Listen(str(_address(host)), _port(port), "")


def parse_unix(text: str, proxy_protocol: str | None = None) -> UnixDaemon:
    """`unix:/run/app.sock`, `unix:@name` (an abstract socket), `unix-fd:/run/app.sock`."""
    kind, _, path = text.partition(":")
    if kind not in _KINDS:
        raise ValueError(f'A daemon on a unix socket is written "unix:/path" or "unix-fd:/path", not {_shown(text)}.')
    if not path.startswith(("/", "@")) or path == "@" or not path.isprintable():
        raise ValueError(f'Must have an absolute path, or "@name" for an abstract socket, not {_shown(path)}.')
    if len(path.encode()) > _MAX_SOCKET_PATH:
        raise ValueError(f"Has a path of {len(path.encode())} bytes; at most {_MAX_SOCKET_PATH} are possible.")
    if proxy_protocol is not None and kind == "unix-fd":
        raise ValueError("Gets the connection itself, and with it who the client is; proxy_protocol is for unix:/path.")
    return UnixDaemon(_KINDS[kind], path, proxy_protocol is not None)


def unix_daemons(target: object) -> list[UnixDaemon]:
    """The daemons on unix sockets that a target, or list of them, names; mistakes are left for those who check it."""
    found = []
    for each in target if isinstance(target, list) else [target]:
        text, option = (each.get("address"), each.get("proxy_protocol")) if isinstance(each, dict) else (each, None)
        if isinstance(text, str) and text.startswith(_UNIX):
            with contextlib.suppress(ValueError):
                found.append(parse_unix(text, option))
    return found


def _host_and_port(text: str, usage: str) -> tuple[str, str]:
    match = re.fullmatch(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<ipv4>[^\[\]:]*)):(?P<port>[^:\[\]]*)", text)
    if match is None:
        raise ValueError(f"{usage}; {_shown(text)} is neither.")
    host = match["ipv4"] if match["ipv6"] is None else match["ipv6"]
    if (":" in host) != (match["ipv6"] is not None):
        raise ValueError(f"{usage}; only an IPv6 address stands in brackets.")
    return host, match["port"]


def _address(text: str) -> IPAddress:
    if _IPV4.fullmatch(text):
        with contextlib.suppress(OSError):  # several times as fast as ipaddress, and as strict
            return ipaddress.IPv4Address(int.from_bytes(socket.inet_pton(socket.AF_INET, text), "big"))
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{_shown(text)} is not an IP address; names are not looked up.") from None
    if "%" in text:
        raise ValueError(f"{_shown(text)} names an interface; write the address alone.")
    return address


def _port(text: str) -> int:
    if not _is_decimal(text) or not 1 <= int(text) <= _MAX_PORT:
        raise ValueError(f"{_shown(text)} is not a port; ports are 1 to {_MAX_PORT}.")
    return int(text)


def _is_decimal(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,10}", text) is not None


def _network(text: str) -> IPNetwork:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'{_shown(text)} is not a prefix such as "198.51.100.0/24".') from None
    if "%" in text:
        raise ValueError(f"{_shown(text)} names an interface; write the prefix alone.")
    if ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
        raise ValueError(f'{_shown(text)} has bits set behind the prefix length; "{network}" would be right.')
    return network


def _pool_prefix(text: str) -> IPNetwork:
    network = _network(text)
    if (kind := _unusable(network)) is not None:
        raise ValueError(f"{network} is or holds {kind}; no alias can be there.")
    return network


_UNUSABLE: tuple[tuple[IPNetwork, str], ...] = (
    (ipaddress.ip_network("0.0.0.0/8"), "an unspecified address"),
    (ipaddress.ip_network("127.0.0.0/8"), "a loopback address"),
    (ipaddress.ip_network("169.254.0.0/16"), "a link-local address"),
    (ipaddress.ip_network("224.0.0.0/4"), "a multicast address"),
    (ipaddress.ip_network("255.255.255.255/32"), "the broadcast address"),
    (ipaddress.ip_network("::/128"), "the unspecified address"),
    (ipaddress.ip_network("::1/128"), "the loopback address"),
    (ipaddress.ip_network("::ffff:0:0/96"), "an IPv4-mapped address"),
    (ipaddress.ip_network("fe80::/10"), "a link-local address"),
    (ipaddress.ip_network("ff00::/8"), "a multicast address"),
)


def _unusable(network: IPNetwork) -> str | None:
    """Why connections from outside can never be steered to (or from) these addresses; None: they can."""
    for special, kind in _UNUSABLE:
        if special.version == network.version and network.overlaps(special):
            return kind
    return None


def _source_address(text: str) -> IPAddress:
    address = _address(text)
    if (kind := _unusable(ipaddress.ip_network(address))) is not None:
        raise ValueError(f"{address} is {kind}; no client comes from there.")
    return address


def _session_id(text: str, *, key: str) -> str:
    """An id that a client can say as the value of a key, and that can stand in the API's URLs."""
    if not 1 <= len(text) <= MAX_ID or not re.fullmatch(r"[\x20-\x7e]*", text) or text != text.strip(" "):
        raise ValueError(f"Must be 1 to {MAX_ID} printable ASCII characters, without a space at either end.")
    if text in (".", ".."):
        raise ValueError("Must not be . or .., which cannot stand in a URL.")
    if ";" in text and not key.startswith("http.header."):
        raise ValueError(f"Has a ;, where the value of {key} ends: no client can ever say it.")
    return text


def _mark_bits(text: str) -> MarkLayout:
    match = re.fullmatch(r"([0-9]{1,2})-([0-9]{1,2})", text)
    if match is None or not int(match[1]) < int(match[2]) < MARK_BITS:
        raise ValueError(f'Must be a range of bits of the packet mark such as "8-31", not {_shown(text)}.')
    mark = MarkLayout(int(match[1]), int(match[2]))
    if mark.width < MIN_MARK_BITS:
        raise ValueError(f"Has {mark.width} bits; steerd needs at least {MIN_MARK_BITS}.")
    return mark


def _directory(text: str) -> str:
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"Must be an absolute path, not {_shown(text)}.")
    return text


def _group_name(text: str) -> str:
    if not _GROUP.fullmatch(text):
        raise ValueError(f"Must be the name of a group, not {_shown(text)}.")
    return text


def _flatten(table: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """`http.host = "a"` is a table in a table to TOML; `"http.host" = "a"` is not. Both are the key http.host here."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _normal_key(key: str) -> str:
    """Header names are compared without regard to case, and the parsers give them in lower case."""
    return key.lower() if key.lower().startswith(("http.header.", "rtsp.header.")) else key


def _host_name(text: str) -> str:
    """As every parser gives host names: ASCII letters in lower case, without one trailing dot (the root is ".")."""
    text = text.translate(_ASCII_LOWER)
    return text if text == "." else text.removesuffix(".")


_SPELLINGS: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(
        (
            *("http.host", "proxy.authority", "rtsp.host", "sip.host", "minecraft.host"),
            *("tls.sni", "quic.sni", "dtls.sni"),
        ),
        _host_name,
    ),
    "dns.qname": lambda text: _host_name(dns.name(text)),
    "dns.qtype": dns.type_name,
    **dict.fromkeys((quic.SERVER_ID, quic.CONNECTION_ID, "quic.dcid"), str.lower),
}
"""For keys whose values people spell in several ways: the way that the parser spells them."""


_HOSTS = ("http.host", "rtsp.host", "sip.host")
_SERVER_NAMES = ("tls.sni", "quic.sni", "dtls.sni")
# An IPv6 literal in its brackets, or the beginning of one.
_BRACKETED = re.compile(r"\[[^\]]*\]?")
_WITH_PORT = re.compile(r"[^:]*:[0-9]+")


def _check_host(key: str, value: str, written: str) -> None:
    """What no parser ever gives as a host, and no client says as a server name (RFC 6066 section 3)."""
    if key in (*_HOSTS, *_SERVER_NAMES) and not value:
        raise ValueError("Is empty and can never match: who names no host has no such key; use default for that.")
    if key in _HOSTS and ":" in value and not _BRACKETED.fullmatch(value):
        try:
            literal = ipaddress.IPv6Address(value)
        except ValueError:
            raise ValueError(f"{_shown(written)} can never match: it must be a name without a port.") from None
        raise ValueError(f'{_shown(written)} can never match: an IPv6 address is written "[{literal}]" here.')
    if key in _SERVER_NAMES and _WITH_PORT.fullmatch(value):
        raise ValueError(f"{_shown(written)} can never match: clients say a name without a port there.")


def as_parsed(key: str, text: str) -> tuple[str, str]:
    """A key and its value, as people write them, in the way that a parser spells them. Raises ValueError."""
    key = _normal_key(key)
    return key, _SPELLINGS[key](text) if key in _SPELLINGS else text


def _condition(key: str, value: object, parser: str) -> Condition:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"Must be text in quotes or a whole number, not {_shown(value)}.")
    text = str(value)
    if parser == PORT_EXTENSION:
        return _extension_condition(key, text)
    if key == "prefix":
        condition = Condition(key, Match.PREFIX, _payload_prefix(text))
    elif key == "regex":
        # The parser matches; what it gives is the pattern as it is written, whose * and . are not ours.
        condition = Condition(key, Match.EXACT, _not_empty(text))
    else:
        condition = _text_condition(key, _SPELLINGS[key](text) if key in _SPELLINGS else text)
        _check_host(key, condition.value, text)
    if not condition.value.isascii() and max(condition.value) > "\xff":
        raise ValueError(
            "Is compared with bytes, one character each (U+0000 to U+00FF), so it can never match; text in UTF-8 is"
            " written byte by byte: \\u00c3\\u00a9."
        )
    check_patterns(parser, [condition.value])
    return condition


def _text_condition(key: str, text: str) -> Condition:
    stars = text.count("*")
    if stars == 0:
        return Condition(key, Match.EXACT, text)
    if stars == 1 and text.startswith("*.") and len(text) > 2:
        return Condition(key, Match.SUFFIX, text[1:])
    if stars == 1 and text.endswith("*") and len(text) > 1:
        return Condition(key, Match.PREFIX, text[:-1])
    raise ValueError(f'A * stands for a beginning, "*.example", or for an end, "/api/*"; {_shown(text)} is neither.')


def condition_text(condition: Condition) -> str:
    """A condition's value as it is written: what `when` takes."""
    key, match, value = condition
    if key == "prefix":
        is_plain = value.isascii() and value.isprintable() and not value.startswith("hex:")
        return value if is_plain else f"hex:{value.encode('latin-1').hex()}"
    return {Match.EXACT: value, Match.SUFFIX: f"*{value}", Match.PREFIX: f"{value}*"}[match]


def _extension_condition(key: str, text: str) -> Condition:
    low, high = (65536, _MAX_EXTENDED_PORT) if key == "portext.port" else (1, 65535)
    if not _is_decimal(text) or not low <= int(text) <= high:
        raise ValueError(f"Must be a whole number from {low} to {high}, not {_shown(text)}.")
    if int(text) % 65536 == 0:
        raise ValueError(f"{int(text)} is port 0 of extension {int(text) // 65536}, and port 0 is never used.")
    return Condition(key, Match.EXACT, str(int(text)))


def _payload_prefix(text: str) -> str:
    if text.startswith("hex:"):
        try:
            text = bytes.fromhex(text.removeprefix("hex:")).decode("latin-1")
        except ValueError:
            raise ValueError(f'Must have two hexadecimal digits a byte, "hex:160301", not {_shown(text)}.') from None
    return _not_empty(text)


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("Is empty and would match everything; use default for that.")
    return text


# --- 3. The parts against each other ---------------------------------------------------------------------------------


def _gateway(raw: _RawGateway, reader: _Reader) -> Gateway:
    for name, text in (("state_dir", raw.state_dir), ("run_dir", raw.run_dir)):
        reader.attempt(f"gateway.{name}", _directory, text)
    if raw.api.read_only_group is not None:
        reader.attempt("gateway.api.read_only_group", _group_name, raw.api.read_only_group)
    mark = reader.attempt("gateway.mark_bits", _mark_bits, raw.mark_bits)
    last_queue = raw.first_queue + raw.workers - 1
    if last_queue >= _MAX_QUEUES and not (reader.is_bad("gateway.first_queue") or reader.is_bad("gateway.workers")):
        reader.problem(
            "gateway.first_queue",
            f"With {raw.workers} workers the last queue would be {last_queue}; the highest is {_MAX_QUEUES - 1}.",
        )
    numbers = Numbers(*msgspec.structs.astuple(raw.port_extension))
    if (use := _KERNEL_TCP_OPTIONS.get(numbers.tcp_option)) is not None:
        reader.problem(
            "gateway.port_extension.tcp_option",
            f"Is {numbers.tcp_option}, which is taken ({use}); 253 and 254 are for experiments.",
        )
    return Gateway(
        state_dir=raw.state_dir,
        run_dir=raw.run_dir,
        user=raw.user,
        workers=raw.workers,
        first_queue=raw.first_queue,
        mark=mark or MarkLayout(8, 31),
        queue_length=raw.queue_length,
        receive_buffer=raw.receive_buffer,
        access_log=raw.access_log,
        limits=raw.limits,
        timeouts=raw.timeouts,
        pending=raw.pending,
        port_extension=numbers,
        api=raw.api,
        log=raw.log,
        metrics=Metrics(reader.attempt("gateway.metrics.listen", parse_listen, raw.metrics.listen)),
        relay=raw.relay,
    )


def _check_name(kind: str, name: str, reader: _Reader) -> None:
    if not _NAME.fullmatch(name):
        reader.problem(
            _join(kind, name), "Is not a usable name; up to 64 of the letters A-Z, a-z, 0-9, _ and - would be."
        )


def _prefixes(name: str, raw: _RawPool, reader: _Reader) -> dict[str, IPNetwork]:
    """A pool's prefixes by their dotted keys, without those that were reported."""
    _check_name("pools", name, reader)
    path = _join(_join("pools", name), "prefixes")
    if not raw.prefixes and not reader.is_bad(path):
        reader.problem(path, 'Names no prefix; one would be "10.64.0.0/16".')
    found = {f"{path}[{i}]": reader.attempt(f"{path}[{i}]", _pool_prefix, text) for i, text in enumerate(raw.prefixes)}
    return {key: prefix for key, prefix in found.items() if prefix is not None}


def _pool(name: str, raw: _RawPool, prefixes: dict[str, IPNetwork], reader: _Reader) -> Pool:
    path = _join("pools", name)
    wake = _wake(raw, path, reader)
    if wake is not None and not any(_PLACEHOLDER.search(text) for text in (wake.unit, *wake.command)):
        reader.problem(
            f"{path}.wake",
            "Is the same for all aliases of the pool; {lease}, {alias} or {index} in it tells them apart.",
        )
    pool = Pool(name, tuple(prefixes.values()), raw.mode, raw.size, raw.quarantine, wake)
    if reader.is_bad(path):
        return pool
    for version in (4, 6):
        held = sum(prefix.num_addresses for prefix in pool.prefixes if prefix.version == version)
        if raw.size is not None and 0 < held < raw.size:
            reader.problem(f"{path}.size", f"Is {raw.size}, but the IPv{version} prefixes hold {held} addresses.")
    return pool


def _check_real_addresses(pools: dict[str, Pool], reader: _Reader) -> None:
    """Whether the pools in mode `addresses` have more aliases together than the kernel can bear."""
    for version, most in MAX_REAL_ADDRESSES.items():
        aliases = 0
        for pool in pools.values():
            before, aliases = aliases, aliases + (pool.alias_count(version) if pool.mode == "addresses" else 0)
            if before <= most < aliases:
                reader.problem(
                    f"pools.{pool.name}.mode",
                    f'Is "addresses", which makes {aliases} IPv{version} aliases so far; at most {most} can be real'
                    ' addresses. Set size, or mode = "anyip".',
                )


def _endpoints(name: str, raw: _RawService, reader: _Reader) -> dict[str, Endpoint]:
    """A service's endpoints by their dotted keys, without those that were reported."""
    _check_name("services", name, reader)
    path = _join(_join("services", name), "endpoints")
    if not raw.endpoints and not reader.is_bad(path):
        reader.problem(path, 'Names no endpoint; one would be "203.0.113.10:443/tcp".')
    found = {f"{path}[{i}]": reader.attempt(f"{path}[{i}]", parse_endpoint, t) for i, t in enumerate(raw.endpoints)}
    return {key: endpoint for key, endpoint in found.items() if endpoint is not None}


class _Span(NamedTuple):
    """Numbers `first`..`last` of one kind (ports of an address, addresses of a family), and where they are written."""

    kind: tuple[int, ...]
    first: int
    last: int
    place: int
    key: str
    text: str


def _overlapping(spans: Iterable[_Span]) -> Iterator[tuple[_Span, _Span]]:
    """Each span that overlaps another, with one that it overlaps, the one written later first."""
    widest: _Span | None = None
    for span in sorted(spans):
        if widest is None or widest.kind != span.kind:
            widest = span
            continue
        if span.first <= widest.last:
            yield (span, widest) if span.place > widest.place else (widest, span)
        if span.last > widest.last:
            widest = span


def _check_overlaps(
    prefixes: Mapping[str, Mapping[str, IPNetwork]], endpoints: Mapping[str, Mapping[str, Endpoint]], reader: _Reader
) -> None:
    """Endpoints among each other, pool prefixes among each other, and pools over endpoints. Whole prefixes count, even
    where `size` uses only a part of them: in mode `anyip` the kernel takes all of a prefix for local."""
    all_prefixes = [(key, prefix) for pool in prefixes.values() for key, prefix in pool.items()]
    all_endpoints = [(key, endpoint) for service in endpoints.values() for key, endpoint in service.items()]
    port_spans = [
        _Span((e.protocol, e.address.version, int(e.address)), e.first_port, e.last_port, place, key, str(e))
        for place, (key, e) in enumerate(all_endpoints)
    ]
    address_spans = [
        _Span((p.version,), int(p.network_address), int(p.broadcast_address), place, key, str(p))
        for place, (key, p) in enumerate(all_prefixes)
    ]
    for spans in (port_spans, address_spans):
        for later, earlier in _overlapping(spans):
            reader.problem(later.key, f"{later.text} overlaps {earlier.text} ({earlier.key}).")
    for key, prefix in all_prefixes:
        inside = next(((k, e) for k, e in all_endpoints if _holds(prefix, e.address)), None)
        if inside is not None:
            reader.problem(key, f"{prefix} holds {inside[1].address}, the address of an endpoint ({inside[0]}).")


def _holds(prefix: IPNetwork, address: IPAddress) -> bool:
    return address.version == prefix.version and address in prefix


class _Scene:
    """What routes and defaults are checked against, where mistakes go, the targets marked `wildcard`, and those with
    `wake`."""

    def __init__(self, pools: dict[str, Pool], endpoints: dict[str, dict[str, Endpoint]], reader: _Reader) -> None:
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
        self._blocks: dict[int, list[tuple[int, int, Pool]]] = {4: [], 6: []}
        for version, found in self._blocks.items():
            for pool in pools.values():
                found += ((int(first), int(first) + length - 1, pool) for first, length in pool.blocks(version))
            found.sort()
        self._firsts = {version: [first for first, _, _ in found] for version, found in self._blocks.items()}

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
        number = int(address)
        place = bisect_right(self._firsts[address.version], number) - 1
        if place < 0:
            return None
        _, last, pool = self._blocks[address.version][place]
        return pool if number <= last else None


def _service(name: str, raw: _RawService, scene: _Scene) -> Service:
    reader = scene.reader
    path = _join("services", name)
    endpoints = tuple(scene.endpoints[name].values())
    inspect = _inspect(raw.inspect, f"{path}.inspect", reader)
    unextended = _unextended(raw, inspect, endpoints, path, reader)
    # Where an endpoint is wrong, nothing can be said about the families of them all.
    versions: set[int] = {4, 6} if reader.is_bad(f"{path}.endpoints") else {e.address.version for e in endpoints}
    choice = _service_choice(raw, path, inspect, reader)
    scene.is_tcp = all(endpoint.protocol == TCP for endpoint in endpoints)
    default: tuple[Target, ...] = ()
    if raw.default is not None:
        default = _targets(raw.default, f"{path}.default", versions, scene, choice, f"{path}.choose")
    on_silence: tuple[Target, ...] = ()
    if raw.on_silence is not None:
        on_silence = _targets(raw.on_silence, f"{path}.on_silence", versions, scene, choice, f"{path}.choose")
    if not (reader.is_bad(f"{path}.endpoints") or reader.is_bad(f"{path}.inspect")):
        _check_transports(raw, inspect, endpoints, path, reader)
    if unextended is not Unextended.INSPECT and not reader.is_bad(f"{path}.inspect"):
        _check_nothing_inspected(raw, path, reader)
    extension_pool = _extension_pool(raw, path, versions, scene)
    sessions = _sessions(raw.sessions, path, inspect, versions, scene)
    routes = _routes(raw.routes, path, inspect, versions, scene)
    connection_ids = _connection_ids(raw.quic, f"{path}.quic.connection_ids", reader)
    if not reader.is_bad(f"{path}.quic"):
        _check_server_ids(routes, connection_ids, reader)
    ways = {
        # Routes may come while it runs.
        "inspect": raw.inspect,
        "routes": raw.routes,
        "default": raw.default,
        "extension_pool": raw.extension_pool,
        "sessions": raw.sessions is not None,
    }
    if not any(way or reader.is_bad(f"{path}.{key}") for key, way in ways.items()):
        reader.problem(path, "Can never steer anything: it has no inspect, no routes, no default, no extension_pool.")
    return Service(
        name=name,
        endpoints=endpoints,
        inspect=inspect,
        default=default,
        choice=choice,
        unmatched=Outcome(raw.unmatched),
        unextended=unextended,
        first_payload_timeout=10.0 if raw.first_payload_timeout is None else raw.first_payload_timeout,
        on_silence=on_silence,
        idle_timeout=_IDLE_TIMEOUT if raw.idle_timeout is None else raw.idle_timeout,
        rebinding=QUIC in inspect and _rebinding(raw.quic, f"{path}.quic.rebinding", reader),
        connection_ids=connection_ids,
        extension_pool=extension_pool,
        sessions=sessions,
        trusted_proxies=_trusted_proxies(raw, inspect, path, reader),
        routes=routes,
    )


def _service_choice(raw: _RawService, path: str, inspect: tuple[str, ...], reader: _Reader) -> Choice | None:
    key = f"{path}.choose"
    if raw.choose is not None and raw.default is None and raw.on_silence is None and not reader.is_bad(key):
        reader.problem(
            key, "Is how a target of default or on_silence is chosen, and there is neither; routes say theirs."
        )
    conditions = None if reader.is_bad(f"{path}.inspect") else _Conditions(inspect, reader)
    return _choice(raw.choose, raw.hash, f"{path}.", conditions, reader)


def _check_nothing_inspected(raw: _RawService, path: str, reader: _Reader) -> None:
    for key in ("on_silence", "first_payload_timeout"):
        if getattr(raw, key) is not None and not reader.is_bad(f"{path}.{key}"):
            reader.problem(f"{path}.{key}", "Means nothing unless first payloads are inspected: name a parser.")
    if raw.unmatched == "tls-alert" and not reader.is_bad(f"{path}.unmatched"):
        reader.problem(f"{path}.unmatched", 'Is "tls-alert", but no first payload is inspected; name "tls" in inspect.')


def _check_transports(
    raw: _RawService, inspect: tuple[str, ...], endpoints: tuple[Endpoint, ...], path: str, reader: _Reader
) -> None:
    """What is inspected, and other keys, against what the endpoints speak."""
    spoken = {endpoint.protocol: endpoint for endpoint in reversed(endpoints)}
    parsers = [word for word in inspect if word != PORT_EXTENSION]
    for index, word in enumerate(raw.inspect):
        if word in parsers and not any(protocol in spoken for protocol in transports(word)):
            read = " and ".join(PROTOCOL_NAMES[protocol].upper() for protocol in transports(word))
            reader.problem(f"{path}.inspect[{index}]", f"{_shown(word)} reads {read}, and no endpoint is of that kind.")
    for protocol, endpoint in spoken.items():
        if parsers and not any(protocol in transports(word) for word in parsers):
            reader.problem(
                f"{path}.inspect",
                f"Names no parser that reads {PROTOCOL_NAMES[protocol].upper()}, but {endpoint} is an endpoint; name"
                " one, or give the endpoint a service of its own.",
            )
    if UDP in spoken:
        every = [word for word in parsers if _is_every(word)]
        flows = [
            word for word in parsers if UDP in transports(word) and DATAGRAMS[word].exclusive and word not in every
        ]
        if every and flows:
            reader.problem(
                f"{path}.inspect",
                f"Names {_shown(every[0])}, by which every datagram is decided, and {_shown(flows[0])}, by which a"
                " whole flow is; a UDP endpoint can have one of the two.",
            )
    elif raw.idle_timeout is not None:
        reader.problem(f"{path}.idle_timeout", "Means nothing unless an endpoint is UDP.")
    if raw.quic is not None and QUIC not in inspect:
        reader.problem(f"{path}.quic", f'Means nothing unless inspect names "{QUIC}".')
    if TCP not in spoken:
        if raw.on_silence is not None:
            reader.problem(f"{path}.on_silence", "Means nothing unless an endpoint is TCP.")
        if raw.unmatched == "tls-alert":
            reader.problem(f"{path}.unmatched", 'Is "tls-alert", but no endpoint is TCP.')


def _rebinding(raw: _RawQuic | None, path: str, reader: _Reader) -> bool:
    """By default, unless connection ids say themselves where they belong. Then the beginning of one may be that of
    another daemon's, and must not be learnt."""
    if raw is None or raw.rebinding is None:
        return raw is None or not raw.connection_ids
    if raw.rebinding and raw.connection_ids:
        reader.problem(
            path, "Cannot be true beside connection_ids, which tell whose a connection is wherever it moves."
        )
    return raw.rebinding


def _connection_ids(raw: _RawQuic | None, path: str, reader: _Reader) -> tuple[quic_lb.Config, ...]:
    found: dict[int, quic_lb.Config] = {}
    for index, each in enumerate(raw.connection_ids if raw is not None else []):
        where = f"{path}[{index}]"
        if reader.is_bad(where):
            continue
        if each.config in found:
            reader.problem(f"{where}.config", f"Is {each.config} a second time; each configuration has its own number.")
        if each.server_id_length + each.nonce_length > 19:
            reader.problem(
                where,
                f"Makes connection ids of {1 + each.server_id_length + each.nonce_length} bytes; they have at most 20,"
                " of which the first is for the configuration's number.",
            )
        key = None if each.key is None else reader.attempt(f"{where}.key", _aes_key, each.key)
        found[each.config] = quic_lb.Config(each.config, each.server_id_length, each.nonce_length, key)
    return tuple(found.values())


def _check_server_ids(routes: Iterable[Route], configs: Collection[quic_lb.Config], reader: _Reader) -> None:
    digits = sorted({2 * config.server_id_length for config in configs})
    for route in routes:
        for key, match, value in route.conditions:
            if key != quic.SERVER_ID:
                continue
            where = f"{route.name}.when.{key}"
            if not digits:
                reader.problem(where, "Can never match: quic.connection_ids does not say how daemons make theirs.")
            elif match is Match.EXACT and not (len(value) in digits and re.fullmatch("[0-9a-f]*", value)):
                wanted = " or ".join(map(str, digits))
                reader.problem(where, f"Can never match: server ids have {wanted} hexadecimal digits here.")


def _aes_key(text: str) -> bytes:
    if not re.fullmatch(r"[0-9A-Fa-f]{32}", text):
        raise ValueError("Must be a key of 16 bytes: 32 hexadecimal digits.")
    return bytes.fromhex(text)


def _trusted_proxies(raw: _RawService, inspect: tuple[str, ...], path: str, reader: _Reader) -> tuple[IPNetwork, ...]:
    key = f"{path}.trusted_proxies"
    if reader.is_bad(f"{path}.inspect") or reader.is_bad(key):
        return ()
    if PROXY not in inspect:
        if raw.trusted_proxies:
            reader.problem(key, f'Means nothing unless inspect names "{PROXY}".')
        return ()
    if not raw.trusted_proxies:
        reader.problem(key, f'Is missing; since inspect names "{PROXY}", it must name the proxies: "192.0.2.0/24".')
    # Where the first payload is not looked at, a daemon would believe the header of anybody.
    if PORT_EXTENSION in inspect:
        reader.problem(
            f"{path}.inspect",
            f'Names "{PROXY}" and "{PORT_EXTENSION}"; a SYN with an extension is steered before a PROXY header.',
        )
    if raw.on_silence is not None:
        reader.problem(
            f"{path}.on_silence", f'Cannot go with "{PROXY}": who was silent may send a PROXY header afterwards.'
        )
    if next(parser for parser in inspect if parser != PORT_EXTENSION) != PROXY:
        reader.problem(f"{path}.inspect", f'Names "{PROXY}" behind another parser; its header comes first.')
    found = [reader.attempt(f"{key}[{index}]", _network, text) for index, text in enumerate(raw.trusted_proxies)]
    return tuple(network for network in found if network is not None)


def _inspect(words: list[str], path: str, reader: _Reader) -> tuple[str, ...]:
    known = [PORT_EXTENSION, *PARSER_NAMES]
    found: list[str] = []
    for index, word in enumerate(words):
        key = f"{path}[{index}]"
        if reader.is_bad(key):
            continue
        if word not in known:
            reader.problem(key, f"{_shown(word)} is not a parser; {_instead(word, known)}")
        elif word in found:
            reader.problem(key, f"{_shown(word)} is there twice; each parser is asked once.")
        else:
            found.append(word)
    return tuple(found)


def _keys_of(parser: str) -> tuple[str, ...]:
    if parser == PORT_EXTENSION:
        return portext.KEYS
    return REGISTRY[parser].keys if parser in REGISTRY else DATAGRAMS[parser].keys


def _is_every(word: str) -> bool:
    return word in DATAGRAMS and DATAGRAMS[word].every


def _unextended(
    raw: _RawService, inspect: tuple[str, ...], endpoints: tuple[Endpoint, ...], path: str, reader: _Reader
) -> Unextended:
    key = f"{path}.unextended"
    inspects_payload = any(parser != PORT_EXTENSION for parser in inspect)
    if raw.unextended is not None and PORT_EXTENSION not in raw.inspect and not reader.is_bad(f"{path}.inspect"):
        reader.problem(key, f'Means nothing unless inspect names "{PORT_EXTENSION}".')
    if raw.unextended == "inspect" and not inspects_payload and not reader.is_bad(f"{path}.inspect"):
        reader.problem(key, 'Is "inspect", but inspect names no parser that reads a first payload.')
    if raw.unextended == "default" and raw.default is None:
        reader.problem(key, 'Is "default", but the service has no default target.')
    if raw.unextended is not None:
        return Unextended(raw.unextended)
    if inspects_payload:
        return Unextended.INSPECT
    if PORT_EXTENSION not in inspect:
        return Unextended.DEFAULT if raw.default is not None else Unextended.UNMATCHED
    ranges = [endpoint for endpoint in endpoints if endpoint.first_port != endpoint.last_port]
    if ranges and not reader.is_bad(key):
        reader.problem(
            key,
            f'Is missing; since {ranges[0]} is a port range, it must be written out: "pass", "default" or "unmatched".',
        )
    return Unextended.UNMATCHED


def _extension_pool(raw: _RawService, path: str, versions: set[int], scene: _Scene) -> ExtensionPool | None:
    reader = scene.reader
    inspect = f"{path}.inspect"
    path = f"{path}.extension_pool"
    arithmetic = raw.extension_pool
    if arithmetic is None or reader.is_bad(path):
        return None
    if PORT_EXTENSION not in raw.inspect and not reader.is_bad(inspect):
        reader.problem(path, f'Means nothing unless inspect names "{PORT_EXTENSION}".')
    pool = scene.pools.get(arithmetic.pool)
    if pool is None:
        message = f"{_shown(arithmetic.pool)} is not a pool; {_instead(arithmetic.pool, scene.pools)}"
        reader.problem(f"{path}.pool", message)
        return None
    counts = {version: pool.alias_count(version) for version in (4, 6)}
    if not reader.is_bad(_join("pools", pool.name)):
        _check_families((version for version in (4, 6) if counts[version]), versions, f"{path}.pool", reader)

    port = 0 if arithmetic.port == "same" else arithmetic.port
    if arithmetic.by == "extension":
        first, highest, what = arithmetic.first or 1, _MAX_PORT, "extension"
    else:
        first, highest, what = arithmetic.first or 65537, _MAX_EXTENDED_PORT, "extended port"
        if not port:
            reader.problem(f"{path}.port", 'Must be a port from 1 to 65535 where by = "extended-port".')
        if first <= 65536 or first % 65536 == 0:
            reader.problem(
                f"{path}.first",
                f"Is {first}; an extended port is extension * 65536 + port with both at least 1, from 65537 on.",
            )
            return None
    # A pool may go on behind the last number: what lies there is reached by routes alone.
    if first > highest:
        reader.problem(f"{path}.first", f"Is {first}, and the highest {what} is {highest}.")
    return ExtensionPool(pool, arithmetic.by, first, port, arithmetic.wildcard)


def _check_families(found: Iterable[int], wanted: set[int], path: str, reader: _Reader) -> None:
    found = sorted(set(found))
    if found and wanted and wanted.isdisjoint(found):
        families = " and ".join(f"IPv{version}" for version in sorted(wanted))
        reader.problem(path, f"Has addresses of IPv{found[0]} only, but what comes here is {families}.")


def _choice(
    choose: Policy | None, hash_: str | None, beginning: str, conditions: _Conditions | None, reader: _Reader
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
    key = SOURCE if hash_ is None or reader.is_bad(where) else _normal_key(hash_)
    if key != SOURCE and conditions is not None:
        try:
            conditions.parser_of(key)
        except ValueError as error:
            reader.problem(where, str(error))
    return Choice(choose, key)


def _targets(
    value: object,
    path: str,
    versions: set[int],
    scene: _Scene,
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
        for target in _target(key, item, scene):
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
                    key, f"Is a second IPv{version} target; {choose} must say how one is chosen: {_described(Policy)}."
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
        _check_families((each.address.version for each in found), versions, path, reader)
    return tuple(found)


def _target(key: str, item: object, scene: _Scene) -> tuple[Target, ...]:
    """The target of one text or table, or those that stand for a daemon on a unix socket; empty: it has a mistake."""
    reader = scene.reader
    where = key
    if isinstance(item, dict):
        raw = reader.read(_RawTarget, item, key)
        where = f"{key}.address"
    elif isinstance(item, str):
        raw = _RawTarget(item)
    else:
        reader.problem(
            key, f'Must be a target such as "10.64.0.1:8080", or a table or list of them, not {_shown(item)}.'
        )
        return ()
    if raw.address.startswith(_UNIX):
        return _unix_targets(key, where, raw, scene)
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
        if (kind := _unusable(ipaddress.ip_network(target.address))) is not None:
            reader.problem(where, f"{target.address} is {kind}; nothing can be steered there.")
    elif pool is None and not (reader.is_bad("pools") or reader.is_bad(f"{key}.external")):
        external = (
            f'write {{ address = "{target}", external = true }}.'
            if scene.in_file
            else 'say that it is external (steerctl: --external; in JSON: "external": true).'
        )
        reader.problem(where, f"{target.address} is in no pool; use an alias, or {external}")
    _target_wake(key, raw, target.address, scene)
    return (target,)


def _unix_targets(key: str, where: str, raw: _RawTarget, scene: _Scene) -> tuple[Target, ...]:
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


def _relay(
    relay: Relay | None, services: Mapping[str, _RawService], pools: Mapping[str, Pool], reader: _Reader
) -> Relay | None:
    if relay is None:
        return None
    if relay.pool not in pools and not reader.is_bad("gateway.relay.pool"):
        message = f"{_shown(relay.pool)} is not a pool; {_instead(relay.pool, pools)}"
        reader.problem("gateway.relay.pool", message)
    if relay.pool in pools and pools[relay.pool].wake is not None:
        key = f"{_join('pools', relay.pool)}.wake"
        reader.problem(key, "Wakes nobody: the aliases of this pool are the relay's (gateway.relay.pool).")
    for name, service in services.items():
        if service.extension_pool is not None and service.extension_pool.pool == relay.pool:
            key = f"{_join('services', name)}.extension_pool.pool"
            reader.problem(key, f"Is {_shown(relay.pool)}, whose aliases the relay gives away itself.")
    return relay


def _target_wake(key: str, raw: _RawTarget, address: IPAddress, scene: _Scene) -> None:
    reader = scene.reader
    wake = _wake(raw, key, reader)
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


_PLACEHOLDER = re.compile(r"\{[a-z]+\}")
_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.\\-]*(@[A-Za-z0-9:_.\\-]+)?\.service")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


def _wake(raw: _RawPool | _RawTarget, path: str, reader: _Reader) -> Wake | None:
    """What a pool or a target says about waking; None: nothing, or not the right thing."""
    where = f"{path}.wake"
    if raw.wake is None:
        for name in ("user", "wake_timeout", "sleep_after"):
            if getattr(raw, name) is not None and not reader.is_bad(f"{path}.{name}"):
                reader.problem(f"{path}.{name}", "Means nothing without wake, which says what is started.")
        return None
    unit, command = "", tuple[str, ...]()
    try:
        if isinstance(raw.wake, list):
            command = _command(raw.wake)
        else:
            unit = _unit(raw.wake)
    except ValueError as error:
        reader.problem(where, str(error))
    if unit and raw.user is not None:
        reader.problem(f"{path}.user", "Means nothing for a unit, whose own User= counts.")
    if command and raw.user is None and not reader.is_bad(f"{path}.user"):
        reader.problem(f"{path}.user", "Is missing; it must be the user as whom the command is run.")
    if command and raw.user is not None and (raw.user == "root" or not _USER.fullmatch(raw.user)):
        reader.problem(f"{path}.user", f"Must be the name of a user who is not root, not {_shown(raw.user)}.")
    if reader.is_bad(where) or reader.is_bad(f"{path}.user"):
        return None
    timeout = _WAKE_TIMEOUT if raw.wake_timeout is None else raw.wake_timeout
    return Wake(unit, command, raw.user or "", timeout, raw.sleep_after)


def _unit(value: object) -> str:
    usage = 'Must be a unit, "unit:tenant@{lease}.service", or a command, a list of texts'
    if not isinstance(value, str) or not value.startswith("unit:"):
        raise ValueError(f"{usage}; {_shown(value)} is neither.")
    unit = value.removeprefix("unit:")
    check_template(unit)
    if not _UNIT.fullmatch(_PLACEHOLDER.sub("x", unit)) or unit.startswith("{"):
        raise ValueError(f"{usage}; {_shown(unit)} is not the name of a service unit.")
    return unit


def _command(words: list[object]) -> tuple[str, ...]:
    texts = tuple(word for word in words if isinstance(word, str))
    if not texts or len(texts) != len(words) or any("\0" in text for text in texts):
        raise ValueError("Must be the words of a command, each a text in quotes.")
    for text in texts:
        check_template(text)
    if not texts[0].startswith("/") or "{" in texts[0]:
        raise ValueError(f"Must begin with the absolute path of a program, not {_shown(texts[0])}.")
    return texts


def _sessions(
    raw: _RawSessions | None, service_path: str, inspect: tuple[str, ...], versions: set[int], scene: _Scene
) -> Sessions | None:
    reader = scene.reader
    path = f"{service_path}.sessions"
    if raw is None or reader.is_bad(f"{path}.key"):
        return None
    key = _normal_key(raw.key)
    try:
        _check_session_key(key, None if reader.is_bad(f"{service_path}.inspect") else _Conditions(inspect, reader))
    except ValueError as error:
        reader.problem(f"{path}.key", str(error))
        return None
    entries: dict[str, SessionEntry] = {}
    for index, each in enumerate(raw.entries):
        where = f"{path}.entries[{index}]"
        entry = _session(each, where, key, versions, scene)
        if entry.id in entries and not reader.is_bad(f"{where}.id"):
            reader.problem(
                f"{where}.id", f"{_shown(entry.id)} is there twice; a session has one target and one source."
            )
        entries[entry.id] = entry
    return Sessions(key, raw.on_new_source, tuple(entries.values()))


def _check_session_key(key: str, conditions: _Conditions | None) -> None:
    """`conditions` None: what is inspected is not known."""
    name = key.removeprefix("http.cookie.").removeprefix("http.header.")
    if key != "rtsp.session" and (name == key or not name):
        raise ValueError(
            f'Must be "rtsp.session", "http.cookie.NAME" or "http.header.NAME", the key of an id, not {_shown(key)}.'
        )
    if conditions is not None:
        conditions.parser_of(key)


def _session(raw: _RawSession, path: str, key: str, versions: set[int], scene: _Scene) -> SessionEntry:
    reader = scene.reader
    reader.attempt(_join(path, "id"), functools.partial(_session_id, key=key), raw.id)
    source = None if raw.source is None else reader.attempt(_join(path, "source"), _source_address, raw.source)
    target = _join(path, "target")
    targets = () if reader.is_bad(target) else _targets(raw.target, target, versions, scene)
    return SessionEntry(raw.id, targets, source)


def _routes(
    raws: list[_RawRoute], path: str, inspect: tuple[str, ...], versions: set[int], scene: _Scene
) -> tuple[Route, ...]:
    """The routes that are right by themselves; those that contradict each other are reported."""
    reader = scene.reader
    conditions = _Conditions(inspect, reader)
    inspect_known = not reader.is_bad(f"{path}.inspect")
    routes = []
    for index, raw in enumerate(raws):
        key = f"{path}.routes[{index}]"
        route = _route(raw, key, conditions if inspect_known else None, versions, scene)
        if route is not None:
            routes.append(route)
    if inspect_known:
        _check_routes(routes, path, conditions.key_order, reader)
        _check_patterns(routes, path, inspect, reader)
    return tuple(routes)


def _route(raw: _RawRoute, key: str, conditions: _Conditions | None, versions: set[int], scene: _Scene) -> Route | None:
    """One route, or None if it has a mistake; `conditions` None: nothing can be said about those."""
    reader = scene.reader
    # An import may bring a million routes; `_join` would look at each key anew.
    beginning = f"{key}." if key else ""
    found = () if conditions is None else conditions.read(raw.when, f"{beginning}when")
    source_key = f"{beginning}source"
    source = None if raw.source is None else reader.attempt(source_key, _network, raw.source)
    if conditions is not None and not found and raw.source is None and not reader.is_bad(key):
        reader.problem(key, "Has neither a condition nor a source; what matches everything is default.")
    coming = _coming(source, versions, conditions)
    if source is not None and not coming:
        _check_families((source.version,), versions, source_key, reader)
    choice = _choice(raw.choose, raw.hash, beginning, conditions, reader)
    targets: tuple[Target, ...] = ()
    if raw.target is not None:
        targets = _targets(raw.target, f"{beginning}target", coming, scene, choice, f"{beginning}choose")
    return None if reader.is_bad(key) else Route(key, found, source, targets, choice)


def _coming(source: IPNetwork | None, versions: set[int], conditions: _Conditions | None) -> set[int]:
    """The families of connections that a route with this source can be for; a PROXY header's source is of any."""
    if source is None or conditions is None or PROXY in conditions.inspect:
        return versions
    return versions & {source.version}


def _check_routes(routes: list[Route], path: str, key_order: tuple[tuple[str, ...], ...], reader: _Reader) -> None:
    for conflict in conflicts(routes, key_order):
        other = routes[conflict.other].name
        message = (
            f"Has the same conditions and the same source as {other}; one of the two must go."
            if conflict.duplicate
            else f"Ties with {other}: one connection can match both, and neither comes first; add a condition to one."
        )
        reader.problem(routes[conflict.route].name, message)
    shapes = count_shapes(routes)
    if shapes > MAX_PROBES:
        reader.problem(
            f"{path}.routes",
            f"Have {shapes} different combinations of keys, pattern lengths and source prefix lengths; at most"
            f" {MAX_PROBES} can be looked up for each connection.",
        )


def _check_patterns(routes: list[Route], path: str, inspect: tuple[str, ...], reader: _Reader) -> None:
    """Whether each parser can work with the values of all routes together; each by itself is checked before."""
    for parser in (word for word in inspect if word in PATTERNED):
        values = {c.value for route in routes for c in route.conditions if c.key == PATTERNED[parser]}
        try:
            check_patterns(parser, values)
        except ValueError as error:
            reader.problem(f"{path}.routes", f"Have values that the parser {_shown(parser)} cannot take: {error}")


class _Conditions:
    """Reads the conditions of one service's routes."""

    def __init__(self, inspect: tuple[str, ...], reader: _Reader) -> None:
        self.key_order = tuple(_keys_of(parser) for parser in inspect)
        self.inspect = inspect
        self._reader = reader
        self._parsers: dict[str, str | None] = {}

    def read(self, when: Mapping[str, object], path: str) -> tuple[Condition, ...]:
        """The conditions of one route, at the dotted key `path`."""
        found: dict[str, Condition] = {}
        for written, value in _flatten(when):
            key = _normal_key(written)
            where = f"{path}.{written}" if written.isprintable() else f"{path}.{json.dumps(written)}"
            try:
                condition = _condition(key, value, self.parser_of(key))
            except ValueError as error:
                self._reader.problem(where, str(error))
                continue
            if key in found:
                self._reader.problem(where, f"The key {key} is there twice; a route compares each key once.")
            found[key] = condition
        return tuple(found.values())

    def parser_of(self, key: str) -> str:
        if key not in self._parsers:
            known = (*self.inspect, PORT_EXTENSION, *PARSER_NAMES)
            self._parsers[key] = next((p for p in known if key_rank(key, [_keys_of(p)]) is not None), None)
        parser = self._parsers[key]
        if parser in self.inspect:
            return parser
        if parser is not None:
            raise ValueError(f'Is a key of the parser "{parser}", which inspect does not name.')
        readable = [k for keys in self.key_order for k in keys]
        raise ValueError(f"Is not a key of any parser{f'; {_instead(key, readable)}' if readable else '.'}")


def _check_ids(gateway: Gateway, services: list[Service], reader: _Reader) -> None:
    """Whether the mark bits have room for an id of every target and of every alias that arithmetic can reach."""
    if reader.problems:
        return
    singles = {target for service in services for target in service.default}
    singles |= {target for service in services for target in service.on_silence}
    singles |= {target for service in services for route in service.routes for target in route.targets}
    singles |= {t for s in services if s.sessions is not None for entry in s.sessions.entries for t in entry.targets}
    blocks = {(s.extension_pool.pool, s.extension_pool.port) for s in services if s.extension_pool is not None}
    needed = len(singles) + sum(pool.alias_count(4) + pool.alias_count(6) for pool, _ in blocks)
    room = gateway.mark.highest_id - FIRST_TARGET_ID + 1
    if needed > room:
        reader.problem("gateway.mark_bits", f"Have room for {room} targets, but there are {needed}; use more bits.")
