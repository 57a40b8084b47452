"""What a configuration is to the rest of steerd: values without a known mistake."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from steerd.config.parsers import PORT_EXTENSION, is_every, keys_of
from steerd.core.marks import MarkLayout
from steerd.core.pools import Pool
from steerd.core.sessions import Sessions
from steerd.core.wake import Limits as WakeLimits
from steerd.core.wake import Wake
from steerd.model import TCP, UDP, Choice, Endpoint, IPAddress, IPNetwork, Outcome, Route, Target
from steerd.wire import quic_lb
from steerd.wire.portext import Numbers

MAX_PORT = 65535
_Rate = Annotated[int, Meta(ge=1, le=(1 << 32) - 1)]
# The kernel multiplies by HZ (at most 1000) in 32 bits (net/netfilter/nf_conntrack_proto_tcp.c).
Seconds = Annotated[int, Meta(ge=1, le=((1 << 32) - 1) // 1000)]


class Limits(Struct, frozen=True):
    """How many packets that need a decision (SYNs, segments of first payloads, first datagrams) get as far as a worker:
    per second, and at once (burst)."""

    source_rate: _Rate = 1000
    """One IPv4 address, or one IPv6 /64."""
    source_burst: _Rate = 2000
    """... and how many at once."""
    stranger_rate: _Rate = 2000
    """All sources together that never completed a connection. Beyond it, a SYN or datagram must come twice (a DNS query
    from any port)."""
    stranger_burst: _Rate = 4000
    """... and how many at once."""
    total_rate: _Rate = 50000
    """All sources together."""
    total_burst: _Rate = 50000
    """... and how many at once."""


class Timeouts(Struct, frozen=True):
    """Conntrack timeouts of steered connections, in seconds."""

    syn_sent: Seconds = 5
    """The daemon has not answered yet."""
    syn_recv: Seconds = 5
    """The client has not answered the daemon yet."""
    time_wait: Seconds = 10
    """Both sides have closed."""
    close: Seconds = 2
    """It was reset."""
    udp_unreplied: Seconds = 30
    """Flows of datagrams that no daemon has answered yet; at most as long as their service's `idle_timeout`."""


class Pending(Struct, frozen=True):
    """Bounds on connections whose first payload does not suffice yet, for each worker; and the same again on flows of
    datagrams."""

    connection_bytes: Annotated[int, Meta(ge=1 << 15, le=1 << 20)] = 1 << 15
    """Bytes of one connection. No parser wants more than the least that is allowed here."""
    source_connections: Annotated[int, Meta(ge=1, le=1 << 20)] = 64
    """Connections of one IPv4 address, or one IPv6 /64."""
    connections: Annotated[int, Meta(ge=1, le=1 << 20)] = 4096
    """Connections in all. New ones push out the oldest, here and above."""


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
    port: Annotated[int, Meta(ge=1, le=MAX_PORT)] = 21300
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
    def is_early(self) -> bool:
        """Whether anything is steered by a packet that goes on to the target itself: a SYN, a datagram."""
        by_syn = self.unextended is not Unextended.INSPECT or PORT_EXTENSION in self.inspect
        return UDP in self.protocols or by_syn

    @property
    def protocols(self) -> set[int]:
        """model.TCP, model.UDP or both: what the endpoints speak."""
        return {endpoint.protocol for endpoint in self.endpoints}

    @property
    def targets(self) -> Iterator[Target]:
        """All that the configuration names, perhaps several times; those of `extension_pool` it does not name."""
        yield from self.default
        yield from self.on_silence
        for route in self.routes:
            yield from route.targets
        for entry in () if self.sessions is None else self.sessions.entries:
            yield from entry.targets

    @property
    def decides_every_datagram(self) -> bool:
        """Whether each datagram is decided by itself, and not the flow by its first ones."""
        return any(is_every(word) for word in self.inspect)

    @property
    def key_order(self) -> tuple[tuple[str, ...], ...]:
        """The keys of each parser in `inspect`, in that order, as the router wants them."""
        return tuple(keys_of(parser) for parser in self.inspect)


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
