"""The file as it may be written: one struct for each table, one field for each key.

The types say what is read without a mistake (config.reader); what stands below a class or a field is what the manual,
steerd.toml(5), says of it (steerd.cli.man).
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from steerd import paths
from steerd.config.texts import MAX_EXTENDED_PORT
from steerd.config.values import MAX_PORT, Api, Limits, Log, Pending, Relay, Seconds, Timeouts
from steerd.core.pools import Mode
from steerd.core.sessions import OnNewSource
from steerd.core.wake import MAX_TIMEOUT
from steerd.core.wake import Limits as WakeLimits
from steerd.model import Policy
from steerd.wire.portext import Numbers

_WakeTimeout = Annotated[float, Meta(ge=0.1, le=MAX_TIMEOUT)]
_SleepAfter = Annotated[float, Meta(ge=1, le=1 << 31)]


class PortExtension(Struct):
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


class Metrics(Struct):
    """What monitors read."""

    listen: str = ""
    """Where metrics are served for Prometheus: `127.0.0.1:9464`, `[::1]:9464`, or `unix:/path`. Empty: nowhere."""


class Gateway(Struct):
    """What concerns the whole machine."""

    state_dir: str = paths.STATE_DIR
    """What must outlive a restart: routes that were added, leases, sessions, ids of targets."""
    run_dir: str = paths.RUN_DIR
    """Where the API listens, and what a reboot may wipe out."""
    user: Annotated[str, Meta(min_length=1)] = "steerd"
    """Who the daemon becomes when it is started as root, with CAP_NET_ADMIN and CAP_NET_RAW. If there is no such user,
    or with `root`, it stays root, with no more than these."""
    workers: Annotated[int, Meta(ge=1, le=64)] = min(os.cpu_count() or 1, 64)
    """Processes that decide, each with a queue of its own. Default: one for each CPU, at most 64."""
    first_queue: Annotated[int, Meta(ge=0, le=65535)] = 21300
    """The NFQUEUE number of the first worker; the others have those that follow."""
    mark_bits: str = "8-31"
    """Bits of the packet mark, `FIRST-LAST`, that nobody else on this machine uses: they carry decisions. Other bits
    are left alone, and these are clear again before any later chain sees them."""
    queue_length: Annotated[int, Meta(ge=1, le=65536 * 16)] = 4096
    """Packets that may wait for a worker."""
    # The kernel doubles what SO_RCVBUFFORCE is given, in an int; below a page not one packet would fit.
    receive_buffer: Annotated[int, Meta(ge=4096, le=(1 << 30) - 1)] = 8388608
    """Bytes of the queue's socket."""
    access_log: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] = 0
    """0: only decisions that fail are logged; 1: every one, with its keys, cookies and all; N: one of N."""
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    pending: Pending = Pending()
    port_extension: PortExtension = msgspec.field(default_factory=PortExtension)
    api: Api = Api()
    log: Log = Log()
    metrics: Metrics = msgspec.field(default_factory=Metrics)
    relay: Relay | None = None


class Pool(Struct):
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


class ExtensionPool(Struct):
    """Arithmetic from port extensions to the aliases of a pool."""

    pool: str
    """The name of the pool."""
    by: Literal["extension", "extended-port"]
    """`extension`: extension `first` + i is the i-th alias. `extended-port`: extended port `first` + i is, on one
    port."""
    first: Annotated[int, Meta(ge=1, le=MAX_EXTENDED_PORT)] | None = None
    """What the first alias stands for. Default: 1, or with `extended-port` 65537."""
    port: Annotated[int, Meta(ge=1, le=MAX_PORT)] | Literal["same"] = "same"
    """The daemons' port; `same` is the client's."""
    wildcard: bool = False
    """Sockets that are bound to the wildcard address may answer."""


class Target(Struct):
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


class Waking(Struct):
    """Bounds on daemons that are started by their first connection."""

    max_awake: Annotated[int, Meta(ge=1, le=4096)] = WakeLimits().max_awake
    """Daemons at a time."""
    starts_per_second: Annotated[float, Meta(ge=0.01, le=1000)] = WakeLimits().starts_per_second
    """Daemons that are started in a second."""
    burst: Annotated[int, Meta(ge=1, le=4096)] = WakeLimits().burst
    """... and how many at once."""


class Route(Struct):
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


class Session(Struct):
    """One session."""

    id: str
    """What clients say."""
    target: Any
    """As in a route."""
    source: str | None = None
    """The client's address. Default: the first that comes."""


class Sessions(Struct):
    """Session ids that lead to one target each, before any route."""

    key: str
    """The key whose value is the session id."""
    on_new_source: OnNewSource
    """What becomes of a known id from another address: it is allowed, the session moves there, or it is denied."""
    entries: list[Session] = []
    """Sessions that are always there."""


class ConnectionIds(Struct):
    """How daemons put their server ids into connection ids (QUIC-LB)."""

    config: Annotated[int, Meta(ge=0, le=6)]
    """The configuration id in the first byte of a connection id."""
    server_id_length: Annotated[int, Meta(ge=1, le=15)]
    """Bytes."""
    nonce_length: Annotated[int, Meta(ge=4, le=18)]
    """Bytes."""
    key: str | None = None
    """32 hexadecimal digits; without it, server ids are in plain text."""


class Quic(Struct):
    """What else is done for QUIC."""

    rebinding: bool | None = None
    """A client whose address or port changed is known by its connection id. Default: true, unless there are
    `connection_ids`."""
    connection_ids: list[ConnectionIds] = []
    """How daemons put their server ids into connection ids (QUIC-LB)."""


class Service(Struct):
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
    idle_timeout: Seconds | None = None
    """UDP: seconds for which a flow may be idle. Default: 120."""
    quic: Quic | None = None
    """What else is done for QUIC."""
    extension_pool: ExtensionPool | None = None
    """Arithmetic from port extensions to the aliases of a pool; routes come before it."""
    sessions: Sessions | None = None
    """Session ids that lead to one target each, before any route."""
    trusted_proxies: list[str] = []
    """With the parser `proxy`: prefixes whose PROXY header is believed."""
    routes: list[Route] = []
    """Which keys lead where."""


class File(Struct):
    """The whole file."""

    gateway: Gateway = msgspec.field(default_factory=Gateway)
    """What concerns the whole machine."""
    wake: Waking = msgspec.field(default_factory=Waking)
    """Bounds on daemons that are started by their first connection."""
    pools: dict[str, Pool] = {}
    """Local addresses that the daemon adds, for daemons to listen on: `[pools.NAME]`."""
    services: dict[str, Service] = {}
    """Endpoints that share inspection, routes and a default: `[services.NAME]`."""
