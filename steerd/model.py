"""The nouns that every part shares: values without behaviour that reads or writes anything.

Addresses are kept as packed bytes wherever a packet is near (4 bytes IPv4, 16 bytes IPv6, network order), because
that is what a header holds; `str` forms exist only for people.
"""

from __future__ import annotations

import enum
import ipaddress
from typing import Literal, NamedTuple

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

TCP = 6
UDP = 17
PROTOCOL_NAMES = {TCP: "tcp", UDP: "udp"}
PROTOCOL_NUMBERS = {"tcp": TCP, "udp": UDP}

Keys = dict[str, str]
"""What inspection found, by name: {"http.host": "a.example", "portext.dst": "7"}. Values are text; payload bytes that
are not text are mapped one byte to one character (latin-1), so that nothing is lost and nothing can fail."""


class Answer(enum.Enum):
    """What a parser says when it has no keys (yet)."""

    NEED_MORE = "need-more"
    """The bytes so far are a proper beginning of this protocol, and more of them could change the answer."""
    NOT_MINE = "not-mine"
    """Whatever follows, this is not the parser's protocol (or it is malformed)."""


class Extension(NamedTuple):
    """A port extension as a packet carried it: 16 more bits for each port; 0 means "not extended"."""

    dst: int
    src: int


class Flow(NamedTuple):
    """The 4-tuple of a connection, or of a flow of datagrams, as its client sends it: packed addresses, ports in host
    byte order."""

    src: bytes
    sport: int
    dst: bytes
    dport: int

    @property
    def version(self) -> int:
        return 4 if len(self.src) == 4 else 6


class Endpoint(NamedTuple):
    """A public `address:port/proto`, or an inclusive range of ports on one address."""

    address: IPAddress
    first_port: int
    last_port: int
    protocol: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        ports = str(self.first_port) if self.first_port == self.last_port else f"{self.first_port}-{self.last_port}"
        return f"{host}:{ports}/{PROTOCOL_NAMES[self.protocol]}"


class Target(NamedTuple):
    """Where a connection is steered to. Port 0 stands for `same`: the port the client used."""

    address: IPAddress
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port or 'same'}"


class UnixDaemon(NamedTuple):
    """A daemon on a unix socket, which is reached through the relay (steerd.relay)."""

    kind: Literal["unix", "unix-fd"]
    """`unix`: what clients send is copied; `unix-fd`: it gets the connection itself."""
    path: str
    """Absolute, or the name of an abstract socket behind an @."""
    proxy_protocol: bool = False
    """Copies begin with a header of the PROXY protocol, version 2."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    @property
    def name(self) -> str:
        """All of it as one text."""
        return f"{self}\0v2" if self.proxy_protocol else str(self)

    @classmethod
    def of_name(cls, name: str) -> UnixDaemon:
        text, _, option = name.partition("\0")
        kind, _, path = text.partition(":")
        return cls("unix" if kind == "unix" else "unix-fd", path, bool(option))


class Match(enum.Enum):
    """How a route's value is compared with a key."""

    EXACT = "exact"
    SUFFIX = "suffix"
    """Written `*.example`: the key ends with `.example` (and has something before it)."""
    PREFIX = "prefix"
    """Written `/api/*`: the key begins with `/api/`."""


class Condition(NamedTuple):
    """One `key = value` of a route; `value` is the text without its `*`."""

    key: str
    match: Match
    value: str


Policy = Literal["first-alive", "round-robin", "hash"]


class Choice(NamedTuple):
    """How one of several targets of an address family is chosen (core.choice)."""

    policy: Policy
    key: str = "source"
    """For "hash": the key whose value is hashed, or "source", the client's address."""


class Route(NamedTuple):
    """Conditions that must all hold, perhaps a source prefix, and at most one target of each address family, or several
    with a choice."""

    name: str
    """Where it was written, for people: `services.web.routes[3]`."""
    conditions: tuple[Condition, ...]
    source: IPNetwork | None
    targets: tuple[Target, ...]
    choice: Choice | None = None


class Reason(enum.IntEnum):
    """Why a packet was answered as it was. Closed: one decision has one reason, one counter, one log line.

    The number is the slot of its counter in shared memory: append, never reorder.
    """

    ROUTE = 0
    """A route matched."""
    ARITHMETIC = 1
    """`extension_pool` mapped the extension onto a pool."""
    DEFAULT = 2
    """No route matched what was found, and the service has a default target."""
    UNMATCHED = 3
    """No route matched what was found, and the service has no default target."""
    UNEXTENDED_PASS = 4
    """No extension, and `unextended = "pass"`: left to the gateway's own socket."""
    UNEXTENDED_DEFAULT = 5
    """No extension, and `unextended = "default"`."""
    UNEXTENDED_UNMATCHED = 6
    """No extension, and `unextended = "unmatched"`."""
    NO_FAMILY = 7
    """What matched has no target of the client's address family."""
    NO_ENDPOINT = 8
    """Not an endpoint of the configuration in force (a packet that was under way during a reload): dropped."""
    NOT_READABLE = 9
    """Headers that end too early or contradict each other: dropped."""
    NOT_LOADED = 10
    """The kernel refused the target's map element: dropped, since the packet could only have gone astray."""
    FAULT = 11
    """An exception while deciding: dropped, counted, logged once."""
    LATE = 12
    """The SYN does not say enough: the first payload will decide. Counted are SYNs that a worker has seen, for their
    options or Fast Open data."""
    SILENCE = 13
    """The client said nothing for `first_payload_timeout`, and the service has a target for that."""
    TOO_LONG = 14
    """A first payload of `pending.connection_bytes` does not suffice for a decision."""
    TOO_SLOW = 15
    """A first payload did not suffice within `first_payload_timeout`."""
    CONFLICT = 16
    """Two segments of a first payload disagree about a byte or about its end."""
    ENDED = 17
    """The client closed before its first payload sufficed."""
    UNANSWERED = 18
    """The client repeats a first payload that was decided already, and nothing came of it."""
    SESSION = 19
    """A session id that is known: its target."""
    SESSION_REFUSED = 20
    """A session id that is known, from a source that may not use it, or with a target that is not for use now."""
    UNTRUSTED_PROXY = 21
    """A PROXY header from a source that is not among `trusted_proxies`."""
    UNKNOWN_CONNECTION = 22
    """A QUIC packet from the middle of a connection that nothing here knows: no flow, no server id, none learnt."""
    DRAINED = 23
    """What matched leads to a drained target, or to several that are all drained."""
    DEAD = 24
    """What matched leads to several targets, and nothing listens on any of them that is not drained."""
    ASLEEP = 25
    """The target's daemon does not listen yet: it is being started, and the connection waits for it. Once it listens,
    or does not in time, the connection is decided anew."""
    NOT_WOKEN = 26
    """The target's daemon sleeps, and cannot be woken now (`wake.max_awake`, `wake.starts_per_second`), or did not
    listen in time."""


DRAINED = 1
"""A bit of a target's state: an operator wants no new connections there."""
DEAD = {TCP: 2, UDP: 4}
"""Bits of a target's state: nothing listens on its address and port. Only of targets that are looked at: one of several
of a route, say."""


class Outcome(enum.Enum):
    """What is done with the packet."""

    STEER = "steer"
    PASS = "pass"
    RESET = "reset"
    DROP = "drop"
    ALERT = "tls-alert"
    """A TLS alert `unrecognized_name` to who speaks TLS, and a reset."""
    WAIT = "wait"
    """Until the target's daemon listens: dropped, and perhaps held."""
    LATE = "late"
    """A SYN that the kernel answers by itself; the first payload will decide."""
