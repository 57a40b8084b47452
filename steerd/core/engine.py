"""From a packet to a decision. Pure: the plan and the packet go in, a decision comes out.

A plan is a configuration after compilation: target ids instead of addresses, probes instead of routes. The main
process writes it into the registry, every worker reads it from there, and both see the same one.

How a SYN, or the first payload of a connection, is decided:
1. The endpoint it was sent to names the service.
2. A PROXY header from a trusted proxy names the client, whose address counts from here on, and what is behind it is
   inspected. From anybody else it is refused: the daemon would believe it.
   The service's payload parsers are asked in `inspect` order. The first one that recognises its protocol is the last
   one that is asked; `prefix` and `regex`, which recognise none, only add their keys. One that needs more bytes is
   waited for, and holds back those behind it: the answer must not depend on how the bytes were cut into segments.
3. A known session id leads to its session's target, or is refused (core.sessions), before any route.
4. The best route for these keys, the extension's and the source wins (core.router says which is best). Without one,
   `extension_pool` maps the extension by arithmetic. Without that, `default` or `unmatched`.
5. Of several targets one is chosen (core.choice). A target that is drained takes nobody new: `unmatched`. Whether it
   is counts at the moment of the decision.

A flow of datagrams is decided in the same way, by the datagrams so far, with the parsers that read datagrams. QUIC is
special: what comes from the middle of a connection (the client moved to another address, or its flow was forgotten)
names no host, only a connection id. If the daemons put their server ids into these (wire.quic_lb), that is a key like
any other, `quic.server-id`. Without a route for it the datagram is refused, and never given to the default: that
daemon would not know the connection either.

A SYN that has neither an extension nor enough data (Fast Open) says too little for that. At a *late* service its first
payload will decide; elsewhere `unextended` speaks for it.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec

from steerd.core import offload
from steerd.core.choice import GROUP, Chooser, no_group
from steerd.core.pending import Limits, Patience
from steerd.core.router import Probe, lookup, matches
from steerd.core.sessions import Claim, Session, SessionsPlan, judge
from steerd.model import DRAINED, UDP, Answer, Extension, Keys, Outcome, Reason
from steerd.wire import portext, proxy, quic, quic_lb
from steerd.wire.packet import Packet
from steerd.wire.parser import reads_briefly
from steerd.wire.registry import DATAGRAMS, REGISTRY, DatagramParser, Inspect, InspectDatagrams, Parser

NO_TARGET = 0
# A named tuple's own constructor takes three times as long.
_new = tuple.__new__
NOT_EXTENDED = Extension(0, 0)

# Reasons of what a route led to; all but the first also of what something else led to.
_BY_ROUTE = (Reason.ROUTE, Reason.NO_FAMILY, Reason.DRAINED, Reason.DEAD, Reason.ASLEEP)

Watch = Callable[[str, Keys | Answer], None]
"""Is told what each parser that is asked answers, by name."""
_Data = TypeVar("_Data")


class TargetIds(msgspec.Struct, frozen=True, array_like=True):
    """The ids of what one route or default steers to, one for each address family; NO_TARGET where it has none. Where
    it has several targets of a family, that of their group (core.choice)."""

    ipv4: int = NO_TARGET
    ipv6: int = NO_TARGET

    def pack(self) -> bytes:
        """8 bytes, for the registry: two 32-bit numbers in network order."""
        return self.ipv4.to_bytes(4, "big") + self.ipv6.to_bytes(4, "big")


class IdBlock(msgspec.Struct, frozen=True, array_like=True):
    """Target ids `first_id` .. `first_id + length - 1` stand for as many aliases in a row."""

    first_id: int
    length: int


class Mapping(msgspec.Struct, frozen=True, array_like=True):
    """`extension_pool`: the extension (or extended port) `first + i` means the i-th alias of the client's family."""

    by_extended_port: bool
    first: int
    ipv4: list[IdBlock]
    ipv6: list[IdBlock]

    def target_id(self, extension: Extension, dport: int, version: int) -> int:
        """The id of the alias that an extension stands for; NO_TARGET if it lies outside the pool."""
        if not extension.dst:
            return NO_TARGET
        number = extension.dst * 65536 + dport if self.by_extended_port else extension.dst
        index = number - self.first
        if index < 0:
            return NO_TARGET
        for block in self.ipv4 if version == 4 else self.ipv6:
            if index < block.length:
                return block.first_id + index
            index -= block.length
        return NO_TARGET


class EndpointPlan(msgspec.Struct, frozen=True, array_like=True):
    """An endpoint and the index of its service; `address` is packed."""

    address: bytes
    protocol: int
    first_port: int
    last_port: int
    service: int


class PayloadParser(msgspec.Struct, frozen=True, array_like=True):
    """A parser by name, and the values that the service's routes compare its keys with."""

    name: str
    patterns: list[str]


class ServicePlan(msgspec.Struct, frozen=True, array_like=True):
    """One service, ready to decide."""

    name: str
    reads_extension: bool
    payload_parsers: list[PayloadParser]
    probes: list[Probe]
    mapping: Mapping | None
    default: TargetIds
    unmatched: Outcome
    unextended: Reason
    """One of the three UNEXTENDED_* reasons, or LATE. Of datagrams, LATE means that all are inspected."""
    first_payload_timeout: float
    """Seconds."""
    on_silence: TargetIds | None
    """None: a client that says nothing is of no interest."""
    sessions: SessionsPlan | None = None
    """None: the service has no session ids."""
    datagram_parsers: list[PayloadParser] = []
    connection_ids: list[quic_lb.Config] = []
    """How QUIC daemons put their server ids into connection ids."""
    trusted_proxies: list[tuple[bytes, int]] | None = None
    """Packed network address and prefix length of each; None: the PROXY protocol is not inspected."""


class WakeRange(msgspec.Struct, frozen=True, array_like=True):
    """`length` consecutive aliases from `first` (packed) on, whose daemons may be asleep."""

    first: bytes
    length: int
    timeout: float
    """Seconds for which a connection is held until its daemon listens."""

    def __contains__(self, address: bytes) -> bool:
        place = int.from_bytes(address, "big") - int.from_bytes(self.first, "big")
        return len(address) == len(self.first) and 0 <= place < self.length


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """All that a worker needs besides the routes themselves."""

    mark_low: int
    mark_high: int
    numbers: portext.Numbers
    endpoints: list[EndpointPlan]
    services: list[ServicePlan]
    pending: Limits
    """Bounds on undecided connections."""
    waking: list[WakeRange] = []
    """Aliases whose daemons are started when a connection comes; the first that holds an address counts."""


class Decision(NamedTuple):
    """What is done with a packet, and why."""

    outcome: Outcome
    reason: Reason
    target_id: int = NO_TARGET
    service: str = ""
    keys: Keys = {}  # noqa: RUF012  (never written to: one empty dict serves all)
    malformed: bool = False
    """The packet carried a port extension of ours that cannot be read."""
    claim: Claim | None = None
    """To be made before the packet is steered; if it is not granted, `give_up` says what becomes of the packet."""
    parser: str = ""
    """Who gave the keys: a payload parser, by name, or portext.NAME; "" if nobody gave any."""


_READ_MORE = Decision(Outcome.DROP, Reason.NO_ENDPOINT)
"""In the place of a decision: it takes a key that the service's parsers were not asked for before."""


class _Ranges(NamedTuple):
    """Port ranges on one address, in ascending order and without overlap."""

    first: list[int]
    last: list[int]
    service: list[int]


class _Service(NamedTuple):
    """A ServicePlan with its parsers made."""

    plan: ServicePlan
    inspectors: list[tuple[str, Inspect, bool]]
    """Each with its name, and whether it is exclusive."""
    brief: list[Parser | DatagramParser]
    """Those that are asked for the keys that routes look at, and no others."""
    routes_source_extensions: bool
    trusted: list[tuple[int, int, int]] | None
    """Of `plan.trusted_proxies`: bytes of an address, how many low bits do not count, and the others."""
    datagram_inspectors: list[tuple[str, InspectDatagrams, bool]]
    decides_every_datagram: bool
    decides_by_extension: bool


def no_session(_service: str, _session_id: str) -> Session | None:
    """For an engine that is to know no sessions."""
    return None


def no_state(_target_id: int) -> int:
    """For an engine that is to know nothing about targets."""
    return 0


class _Reading(NamedTuple):
    """What a first payload says."""

    keys: Keys
    enough: bool
    """More bytes would change nothing."""
    source: bytes
    """The client's packed address, from whichever header names it."""
    refused: Reason | None = None
    """Why it goes nowhere: an untrusted PROXY header, or, unless a route says otherwise, an unknown connection."""
    parser: str = ""
    """The one that recognised its protocol; else the last one that gave keys."""


class Engine:
    """Decides for one plan. `get` looks a route up: router key -> packed TargetIds, or None; `find` a session, by
    service and id; `state` the state of a target (bits of steerd.model); `chooser` chooses among several targets, and
    outlives the plan. `watch` is for those who want to explain a decision (core.explain)."""

    def __init__(
        self,
        plan: Plan,
        get: Callable[[bytes], bytes | None],
        find: Callable[[str, str], Session | None] = no_session,
        watch: Watch | None = None,
        state: Callable[[int], int] = no_state,
        chooser: Chooser | None = None,
    ) -> None:
        self._get = get
        self._find = find
        self._state = state
        self._chooser = chooser or Chooser(no_group, state)
        self._numbers = plan.numbers
        self._watch = watch
        self._services = [_made(service, _keys_of(service), watch) for service in plan.services]
        self._ranges: dict[tuple[bytes, int], _Ranges] = {}
        for endpoint in sorted(plan.endpoints, key=lambda endpoint: endpoint.first_port):
            ranges = self._ranges.setdefault((endpoint.address, endpoint.protocol), _Ranges([], [], []))
            ranges.first.append(endpoint.first_port)
            ranges.last.append(endpoint.last_port)
            ranges.service.append(endpoint.service)

    def decide_syn(self, packet: Packet) -> Decision:
        """Decide for a SYN, whether it carries an extension, data, both or nothing. Outcome LATE: not yet."""
        service = self._service_at(packet)
        if service is None:
            return Decision(Outcome.DROP, Reason.NO_ENDPOINT)
        plan = service.plan

        extension, malformed = self._extension(service, packet)
        extended = extension.dst or (extension.src and service.routes_source_extensions)
        reading = _read(service, packet, packet.payload) if packet.payload else _nothing_read(packet)
        if plan.unextended is Reason.LATE and not (extended or reading.enough):
            return Decision(Outcome.LATE, Reason.LATE, NO_TARGET, plan.name, reading.keys, malformed)
        otherwise = plan.unextended
        if extension.dst or reading.keys or plan.unextended is Reason.LATE:
            otherwise = Reason.DEFAULT if plan.default != TargetIds() else Reason.UNMATCHED
        reading.keys.update(portext.keys(extension, packet.dport))
        decision = self._choose(service, packet, reading, extension, otherwise, malformed)
        return self.decide_syn(packet) if decision is _READ_MORE else decision

    def decide_first(self, packet: Packet, data: bytes) -> Decision | Literal[Answer.NEED_MORE]:
        """Decide by the first payload of a connection: `data`, from its first byte on. `packet` is any of its segments.

        Once it has decided, more bytes change nothing.
        """
        service = self._service_at(packet)
        if service is None or service.plan.unextended is not Reason.LATE:
            return Decision(Outcome.DROP, Reason.NO_ENDPOINT)
        reading = _read(service, packet, data)
        if not reading.enough:
            return Answer.NEED_MORE
        otherwise = Reason.DEFAULT if service.plan.default != TargetIds() else Reason.UNMATCHED
        decision = self._choose(service, packet, reading, NOT_EXTENDED, otherwise, False)
        return self.decide_first(packet, data) if decision is _READ_MORE else decision

    def decide_datagrams(self, packet: Packet, payloads: Sequence[bytes]) -> Decision | Literal[Answer.NEED_MORE]:
        """Decide for a flow by its datagrams so far, one or more; `packet` is the last of them."""
        service = self._service_at(packet)
        if service is None:
            return Decision(Outcome.DROP, Reason.NO_ENDPOINT)
        plan = service.plan
        extension, malformed = self._extension(service, packet)
        reading = _read_datagrams(service, packet, payloads)
        if not reading.enough:
            return Answer.NEED_MORE
        otherwise = plan.unextended
        if extension.dst or reading.keys or plan.unextended is Reason.LATE:
            otherwise = Reason.DEFAULT if plan.default != TargetIds() else Reason.UNMATCHED
        reading.keys.update(portext.keys(extension, packet.dport))
        decision = self._choose(service, packet, reading, extension, otherwise, malformed)
        if decision is _READ_MORE:
            return self.decide_datagrams(packet, payloads)
        if decision.outcome in (Outcome.RESET, Outcome.ALERT):
            return decision._replace(outcome=Outcome.DROP)
        return decision

    def decide_keys(self, packet: Packet, keys: Keys) -> Decision:
        """Decide as if inspection had found these keys in what the packet's connection, or flow, says first; of the
        packet, its payload is not read. For explanations: no client is decided by this."""
        service = self._service_at(packet)
        if service is None:
            return Decision(Outcome.DROP, Reason.NO_ENDPOINT)
        plan = service.plan
        extension, malformed = self._extension(service, packet)
        reading = _as_if_read(service, packet, dict(keys))
        otherwise = plan.unextended
        if extension.dst or reading.keys or plan.unextended is Reason.LATE:
            otherwise = Reason.DEFAULT if plan.default != TargetIds() else Reason.UNMATCHED
        reading.keys.update(portext.keys(extension, packet.dport))
        decision = self._choose(service, packet, reading, extension, otherwise, malformed)
        if decision is _READ_MORE:
            return self.decide_keys(packet, keys)
        if packet.protocol == UDP and decision.outcome in (Outcome.RESET, Outcome.ALERT):
            return decision._replace(outcome=Outcome.DROP)
        return decision

    def lasting_target(self, packet: Packet) -> int:
        """Where `decide_syn` steers this SYN, and every other one to the same endpoint that has the same destination
        extension and no data, until something is changed (core.offload); NO_TARGET if more than that decides."""
        service = self._service_at(packet)
        if service is None or not service.decides_by_extension or packet.payload:
            return NO_TARGET
        plan = service.plan
        extension, _ = self._extension(service, packet)
        if not extension.dst:
            return NO_TARGET
        target_id = NO_TARGET
        entry = lookup(plan.probes, portext.keys(extension, packet.dport), packet.src, self._get)
        if entry is not None:
            target_id = int.from_bytes(entry[:4] if packet.version == 4 else entry[4:8], "big")
        elif plan.mapping is not None:
            target_id = plan.mapping.target_id(extension, packet.dport, packet.version)
        return NO_TARGET if target_id >= GROUP or self._state(target_id) & DRAINED else target_id

    def route_of(self, packet: Packet, decision: Decision) -> tuple[bytes, bytes] | None:
        """Which route led to a decision that was made a moment ago on this packet: its key in the table, and what the
        table holds for it. None: no route did. For logs."""
        service = self._service_at(packet)
        if (
            service is None
            or decision.reason not in _BY_ROUTE
            or (decision.reason is not Reason.ROUTE and not decision.keys)
        ):
            return None
        plan, keys, source = service.plan, decision.keys, packet.src
        if service.trusted is not None and "proxy.source" in keys:
            source = ipaddress.ip_address(keys["proxy.source"]).packed
        if plan.sessions is not None and judge(plan.sessions, plan.name, keys, source, packet.version, self._find):
            return None
        return next(((key, value) for _, key, value in matches(plan.probes, keys, source, self._get)), None)

    def plan_at(self, packet: Packet) -> ServicePlan | None:
        """The service that a packet is for; None if it was not sent to an endpoint."""
        service = self._service_at(packet)
        return None if service is None else service.plan

    def decides_every_datagram(self, packet: Packet) -> bool:
        """Whether each datagram of this one's service is decided by itself."""
        service = self._service_at(packet)
        return service is not None and service.decides_every_datagram

    def decide_silence(self, packet: Packet) -> Decision:
        """Decide for a client that completed its handshake and said nothing in time."""
        service = self._service_at(packet)
        if service is None or service.plan.on_silence is None:
            return Decision(Outcome.DROP, Reason.NO_ENDPOINT)
        ids = service.plan.on_silence
        reading = _Reading({}, True, packet.src)
        target_id = ids.ipv4 if packet.version == 4 else ids.ipv6
        return self._steer(service, packet, reading, Reason.SILENCE, target_id, False)

    def give_up(self, packet: Packet, reason: Reason) -> Decision:
        """What `unmatched` says to a connection that cannot be decided, for this reason."""
        service = self._service_at(packet)
        if service is None:
            return Decision(Outcome.DROP, Reason.NO_ENDPOINT)
        return Decision(service.plan.unmatched, reason, NO_TARGET, service.plan.name)

    def patience(self, packet: Packet) -> Patience:
        """How long a connection's first payload is waited for, and whether its absence means something."""
        service = self._service_at(packet)
        if service is None:
            return Patience(0.0, False)
        return Patience(service.plan.first_payload_timeout, service.plan.on_silence is not None)

    def _extension(self, service: _Service, packet: Packet) -> tuple[Extension, bool]:
        """A packet's port extension, if the service reads it, and whether it has one that cannot be read."""
        found = portext.find(packet, self._numbers) if service.plan.reads_extension else None
        return (found if isinstance(found, Extension) else NOT_EXTENDED), found is portext.MALFORMED

    def _choose(
        self,
        service: _Service,
        packet: Packet,
        reading: _Reading,
        extension: Extension,
        otherwise: Reason,
        malformed: bool,
    ) -> Decision:
        """A known session; else the best route; else arithmetic; else what `otherwise` says. _READ_MORE: to be asked
        again, with what the service's parsers say then."""
        plan = service.plan
        keys = reading.keys
        parser = reading.parser or (portext.NAME if extension != NOT_EXTENDED else "")
        if reading.refused is Reason.UNTRUSTED_PROXY:
            return Decision(plan.unmatched, reading.refused, NO_TARGET, plan.name, keys, malformed, None, parser)
        if plan.sessions is not None:
            ruling = judge(plan.sessions, plan.name, keys, reading.source, packet.version, self._find)
            if ruling is not None and ruling.refused:
                return Decision(
                    plan.unmatched, Reason.SESSION_REFUSED, NO_TARGET, plan.name, keys, malformed, None, parser
                )
            if ruling is not None:
                decision = self._steer(service, packet, reading, Reason.SESSION, ruling.target_id, malformed, parser)
                return decision._replace(claim=ruling.claim) if decision.outcome is Outcome.STEER else decision
        if plan.probes:
            entry = lookup(plan.probes, keys, reading.source, self._get)
            if entry is not None:
                target_id = int.from_bytes(entry[:4] if packet.version == 4 else entry[4:8], "big")
                return self._steer(service, packet, reading, Reason.ROUTE, target_id, malformed, parser)
        if plan.mapping is not None:
            target_id = plan.mapping.target_id(extension, packet.dport, packet.version)
            if target_id:
                return self._steer(service, packet, reading, Reason.ARITHMETIC, target_id, malformed, portext.NAME)
        if reading.refused is not None:
            return Decision(plan.unmatched, reading.refused, NO_TARGET, plan.name, keys, malformed, None, parser)
        if otherwise is Reason.UNEXTENDED_PASS:
            return Decision(Outcome.PASS, otherwise, NO_TARGET, plan.name, keys, malformed, None, parser)
        if otherwise in (Reason.DEFAULT, Reason.UNEXTENDED_DEFAULT):
            target_id = plan.default.ipv4 if packet.version == 4 else plan.default.ipv6
            return self._steer(service, packet, reading, otherwise, target_id, malformed, parser)
        return Decision(plan.unmatched, otherwise, NO_TARGET, plan.name, keys, malformed, None, parser)

    def _service_at(self, packet: Packet) -> _Service | None:
        ranges = self._ranges.get((packet.dst, packet.protocol))
        if ranges is None:
            return None
        position = bisect_right(ranges.first, packet.dport) - 1
        if position < 0 or packet.dport > ranges.last[position]:
            return None
        return self._services[ranges.service[position]]

    def _steer(
        self,
        service: _Service,
        packet: Packet,
        reading: _Reading,
        reason: Reason,
        target_id: int,
        malformed: bool,
        parser: str = "",
    ) -> Decision:
        """To a target, or to the one that is chosen of a group, if that may be."""
        plan, keys = service.plan, reading.keys
        refused = None
        if target_id >= GROUP:
            key = self._chooser.key(target_id)
            if _is_unread(service, key):
                more = _made(plan, {*_keys_of(plan), key}, self._watch)
                self._services = [more if each is service else each for each in self._services]
                return _READ_MORE
            flow = None if service.decides_every_datagram else packet.flow
            target_id, refused = self._chooser.choose(target_id, packet.protocol, reading.source, keys, flow)
        elif target_id == NO_TARGET:
            refused = Reason.NO_FAMILY
        elif self._state(target_id) & DRAINED:
            refused = Reason.DRAINED
        if refused is not None:
            return Decision(plan.unmatched, refused, NO_TARGET, plan.name, keys, malformed, None, parser)
        steered: Decision = _new(Decision, (Outcome.STEER, reason, target_id, plan.name, keys, malformed, None, parser))
        return steered


def _keys_of(plan: ServicePlan) -> set[str]:
    """The keys that a service's routes and sessions look at. Those by which its groups choose are not known yet."""
    keys = {part.key for probe in plan.probes for part in probe.parts}
    return keys if plan.sessions is None else {*keys, plan.sessions.key}


def _made(plan: ServicePlan, keys: Collection[str], watch: Watch | None) -> _Service:
    """A service whose parsers tell these keys, and others where that costs nothing."""
    streams = [parser for parser in plan.payload_parsers if parser.name != proxy.PARSER.name]
    used = [REGISTRY[parser.name] for parser in streams], [DATAGRAMS[parser.name] for parser in plan.datagram_parsers]
    return _Service(
        plan,
        [_inspector(parser, keys, watch) for parser in streams],
        [parser for parsers in used for parser in parsers if reads_briefly(parser, keys)],
        any(part.key == portext.SRC for probe in plan.probes for part in probe.parts),
        _trusted(plan.trusted_proxies),
        [_datagram_inspector(parser, keys, watch) for parser in plan.datagram_parsers],
        any(parser.every for parser in used[1]),
        offload.decides_by_extension(plan.probes, plan.sessions),
    )


def _is_unread(service: _Service, key: str) -> bool:
    """Whether a parser could tell a key, and was not asked to."""
    return any(parser.gives(key) and not reads_briefly(parser, [key]) for parser in service.brief)


def _inspector(parser: PayloadParser, keys: Collection[str], watch: Watch | None) -> tuple[str, Inspect, bool]:
    registered = REGISTRY[parser.name]
    brief = registered.brief if reads_briefly(registered, keys) else None
    inspect = brief.inspect if brief else registered.make(tuple(parser.patterns))
    return parser.name, _watched(parser.name, inspect, watch), registered.exclusive


def _datagram_inspector(
    parser: PayloadParser, keys: Collection[str], watch: Watch | None
) -> tuple[str, InspectDatagrams, bool]:
    registered = DATAGRAMS[parser.name]
    brief = registered.brief if reads_briefly(registered, keys) else None
    inspect = brief.inspect if brief else registered.make(tuple(parser.patterns))
    return parser.name, _watched(parser.name, inspect, watch), registered.exclusive


def _watched(
    name: str, inspect: Callable[[_Data], Keys | Answer], watch: Watch | None
) -> Callable[[_Data], Keys | Answer]:
    if watch is None:
        return inspect

    def inspect_and_tell(data: _Data) -> Keys | Answer:
        answer = inspect(data)
        watch(name, answer)
        return answer

    return inspect_and_tell


def _trusted(proxies: list[tuple[bytes, int]] | None) -> list[tuple[int, int, int]] | None:
    if proxies is None:
        return None
    shifted = [(len(packed), len(packed) * 8 - length, packed) for packed, length in proxies]
    return [(size, shift, int.from_bytes(packed, "big") >> shift) for size, shift, packed in shifted]


def _is_trusted(proxies: list[tuple[int, int, int]], source: bytes) -> bool:
    number = int.from_bytes(source, "big")
    return any(size == len(source) and number >> shift == prefix for size, shift, prefix in proxies)


def _nothing_read(packet: Packet) -> _Reading:
    reading: _Reading = _new(_Reading, ({}, False, packet.src, None, ""))
    return reading


def _read(service: _Service, packet: Packet, payload: bytes) -> _Reading:
    keys: Keys = {}
    source = packet.src
    parser = ""
    if service.trusted is not None:
        if not _is_trusted(service.trusted, packet.src):
            claimed = proxy.is_claimed(payload)
            if claimed is Answer.NEED_MORE:
                return _Reading(keys, False, source)
            if claimed:
                header = proxy.read(payload)
                keys = dict(header.keys) if isinstance(header, proxy.Header) else keys
                return _Reading(keys, True, source, Reason.UNTRUSTED_PROXY, proxy.PARSER.name)
        header = proxy.read(payload)
        if header is Answer.NEED_MORE:
            return _Reading(keys, False, source)
        if isinstance(header, proxy.Header):
            keys = dict(header.keys)
            parser = proxy.PARSER.name
            source = header.source or source
            payload = payload[header.length :]
            if not payload and service.inspectors:
                return _Reading(keys, False, source)
    for name, inspect, exclusive in service.inspectors:
        answer = inspect(payload)
        if answer is Answer.NEED_MORE:
            return _Reading(keys, False, source)
        if answer is not Answer.NOT_MINE:
            keys |= answer
            parser = name
            if exclusive:
                break
    return _Reading(keys, True, source, None, parser)


def _read_datagrams(service: _Service, packet: Packet, payloads: Sequence[bytes]) -> _Reading:
    keys: Keys = {}
    refused = None
    parser = ""
    for name, inspect, exclusive in service.datagram_inspectors:
        answer = inspect(payloads)
        if answer is Answer.NEED_MORE:
            return _Reading(keys, False, packet.src)
        if answer is not Answer.NOT_MINE:
            keys |= answer
            parser = name
            if exclusive:
                break
    if keys.get(quic.PACKET) in quic.MID_CONNECTION:
        refused = Reason.UNKNOWN_CONNECTION
        server_id = quic_lb.server_id(service.plan.connection_ids, bytes.fromhex(keys[quic.CONNECTION_ID]))
        if server_id is not None:
            keys[quic.SERVER_ID] = server_id.hex()
    return _Reading(keys, True, packet.src, refused, parser)


def _as_if_read(service: _Service, packet: Packet, keys: Keys) -> _Reading:
    """What a payload with these keys would have said."""
    if any(key.startswith("proxy.") for key in keys) and service.trusted is not None:
        if not _is_trusted(service.trusted, packet.src):
            return _Reading(keys, True, packet.src, Reason.UNTRUSTED_PROXY)
        if "proxy.source" in keys:
            return _Reading(keys, True, ipaddress.ip_address(keys["proxy.source"]).packed)
    refused = Reason.UNKNOWN_CONNECTION if keys.get(quic.PACKET) in quic.MID_CONNECTION else None
    return _Reading(keys, True, packet.src, refused)
