"""Why a connection goes where it goes, step by step. Pure: a plan, what the registry holds, and packets (or keys) go
in, an explanation comes out.

**It cannot disagree with the engine, since it asks the engine.** Every decision in an explanation is one that
`Engine.decide_*` made; the engine tells what each parser answered, and what it looked up is looked up once more by the
same functions of core.router. Only what the kernel's table does with the decision is words of ours (core.sentences).

Not seen here: limits (of sources, of what may be undecided at a time), a client's old connection that is still in
conntrack, sessions that are claimed by somebody else at the same time, segments that contradict each other, and whether
a daemon listens.
"""

from __future__ import annotations

import heapq
import ipaddress
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from steerd.core import offload, sentences
from steerd.core.choice import GROUP, Chooser, Chosen, Group, no_group
from steerd.core.datagrams import MAX_DATAGRAMS
from steerd.core.engine import NOT_EXTENDED, Decision, EndpointPlan, Engine, Plan, ServicePlan, no_state
from steerd.core.marks import ASK_ID, PASS_ID, RESET_ID, MarkLayout
from steerd.core.router import Probe, failing, matches, seen_by
from steerd.core.sentences import MAX_SHOWN, Kind, Near, Said, Step
from steerd.core.sessions import Session
from steerd.model import (
    PROTOCOL_NAMES,
    TCP,
    UDP,
    Answer,
    Condition,
    Endpoint,
    Extension,
    Flow,
    IPNetwork,
    Keys,
    Outcome,
    Reason,
    Route,
    Target,
    UnixDaemon,
)
from steerd.wire import portext, proxy
from steerd.wire.packet import ACK, RST, SYN, Packet
from steerd.wire.registry import DATAGRAMS, REGISTRY

MAX_LOOKED_AT = 100_000
"""Routes of a service that are looked through for those that nearly match: a few seconds' work."""
MAX_LOOKED_AT_IN_ALL = 1_000_000
"""... by one Explainer, which may have a capture of thousands of connections."""

_MAX_NEAR = 3
_LIKE = 0.6
"""The share of characters that two texts have in common which may have been meant to be the same."""
_CONTROL = SYN | ACK | RST
_SEQUENCE = 0xFFFFFFFF


class Known(NamedTuple):
    """What there is to decide by."""

    plan: Plan
    get: Callable[[bytes], bytes | None]
    """As Engine's."""
    find: Callable[[str, str], Session | None]
    """As Engine's."""
    target: Callable[[int], Target | None]
    """What a target id stands for."""
    routes: Callable[[str, Probe], Iterable[Route]]
    """All routes of a service that a probe may find, each named by where it comes from."""
    origin: Callable[[str, bytes, bytes], str]
    """Where a service's route comes from, by its key in the table and what the table holds for it."""
    is_alias: Callable[[bytes], bool]
    """Whether a packed address is in a pool."""
    state: Callable[[int], int] = no_state
    """As Engine's."""
    group: Callable[[int], Group | None] = no_group
    """What the id of a group stands for."""
    written: Callable[[Target], UnixDaemon | Target] = lambda target: target
    """The target as the configuration has it: where the relay stands, the daemon behind it."""


class Explanation(NamedTuple):
    """Of one connection, flow or datagram."""

    packet: Packet
    """The last packet that was looked at."""
    kind: Kind
    service: str
    """Empty: none."""
    decision: Decision | None
    """None: what there is does not suffice."""
    target: Target | None
    mark: int | None
    """What the packet's mark says in the bits that are ours when the worker lets it go on; None: it does not go on."""
    parsers: tuple[Said, ...]
    matched: tuple[Route, ...]
    """All routes that match, the best first."""
    near: tuple[Near, ...]
    steps: tuple[Step, ...]


class Explainer:
    """Explains by one plan."""

    def __init__(self, known: Known, most_looked_at: int | None = None) -> None:
        """`most_looked_at`: routes that are looked through in all; None: MAX_LOOKED_AT_IN_ALL."""
        self._known = known
        self._most_looked_at = MAX_LOOKED_AT_IN_ALL if most_looked_at is None else most_looked_at
        self._mark = MarkLayout(known.plan.mark_low, known.plan.mark_high)
        self._looked_at = 0
        self._said: list[Said] = []
        self._sessions: list[tuple[str, Session | None]] = []
        self._chooser = _Chooser(known.group, known.state)
        self._engine = Engine(known.plan, known.get, self._find, self._saw, known.state, self._chooser)

    def syn(self, packet: Packet) -> Explanation:
        """Why a SYN is decided as it is."""
        self._begin()
        decision = self._engine.decide_syn(packet)
        return self._explanation(packet, "syn", [packet.payload] if packet.payload else [], decision)

    def first(self, packet: Packet, data: bytes) -> Explanation:
        """Why a connection is decided by its first payload, as far as it came; `packet` is any of its segments."""
        self._begin()
        decision = self._engine.decide_first(packet, data)
        return self._explanation(packet, "first", [data], None if decision is Answer.NEED_MORE else decision)

    def datagrams(self, packet: Packet, payloads: Sequence[bytes]) -> Explanation:
        """Why a flow is decided by its datagrams so far; `packet` is the last of them."""
        self._begin()
        decision = self._engine.decide_datagrams(packet, payloads)
        kind: Kind = "query" if self._engine.decides_every_datagram(packet) else "datagram"
        return self._explanation(packet, kind, payloads, None if decision is Answer.NEED_MORE else decision)

    def payload(self, packet: Packet, data: bytes) -> Explanation:
        """What would become of a client that says this over TCP; `packet` stands for its SYN, without data. Where
        only SYNs decide, the data are in the SYN."""
        plan = self._engine.plan_at(packet)
        if plan is None or plan.unextended is not Reason.LATE:
            return self.syn(packet._replace(payload=data))
        return self._by_syn(packet, "the payload") or self.first(packet, data)

    def parsers(self, packet: Packet) -> list[str]:
        """The payload parsers that a packet's service asks, in that order."""
        plan = self._engine.plan_at(packet)
        if plan is None:
            return []
        return [parser.name for parser in (plan.payload_parsers if packet.protocol == TCP else plan.datagram_parsers)]

    def is_to_endpoint(self, packet: Packet) -> bool:
        """Whether a packet was sent to an endpoint."""
        return self._engine.plan_at(packet) is not None

    def keys(self, packet: Packet, keys: Keys) -> Explanation:
        """What would become of a client that says what has these keys; `packet` stands for its SYN or datagram, with
        its options and without payload."""
        plan = self._engine.plan_at(packet)
        if plan is None or (packet.protocol == TCP and not keys):
            return self.syn(packet)._replace(kind="syn" if packet.protocol == TCP else "datagram")
        self._begin()
        if packet.protocol == UDP:
            kind: Kind = "query" if self._engine.decides_every_datagram(packet) else "datagram"
        else:
            told = self._by_syn(packet, ", ".join(keys)) if plan.unextended is Reason.LATE else None
            if told is not None:
                return told
            kind = "first" if plan.unextended is Reason.LATE else "syn"
        self._begin()
        wanted, ignored_steps = _readable(plan, packet.protocol, keys)
        decision = self._engine.decide_keys(packet, wanted)
        return self._explanation(packet, kind, [], decision, before=ignored_steps)

    def capture(self, packets: Iterable[Packet], *, joined_late: bool = False) -> Iterator[Explanation]:
        """One explanation for each connection and flow to an endpoint, in the order of their first packets, by as many
        of its packets as it takes. `joined_late`: of TCP, only connections whose SYN is there."""
        found: list[list[Packet]] = []
        last: dict[tuple[int, Flow], list[Packet]] = {}
        for packet in packets:
            plan = self._engine.plan_at(packet)
            if plan is None:
                continue
            of = packet.protocol, packet.flow
            before = last.get(of)
            is_new = _is_syn(packet) and before is not None and before[0].seq != packet.seq
            if before is None or is_new or (packet.protocol == UDP and self._engine.decides_every_datagram(packet)):
                last[of] = []
                found.append(last[of])
            last[of].append(packet)
        for connection in found:
            if connection[0].protocol == UDP:
                yield self._captured_datagrams(connection)
            elif _is_syn(connection[0]) or (not joined_late and any(packet.payload for packet in connection)):
                yield self._captured_connection(connection)

    def _by_syn(self, packet: Packet, rest: str) -> Explanation | None:
        """Of a connection to a late service: if its SYN alone decides, by an extension, and `rest` comes too late."""
        told = self.syn(packet)
        if told.decision is None or told.decision.outcome is Outcome.LATE:
            return None
        ignored = Step("ignored", f"The SYN alone decides, by its extension; {rest} would count in the SYN only.")
        return told._replace(steps=(*told.steps, ignored))

    # ---- captures ----

    def _captured_datagrams(self, packets: list[Packet]) -> Explanation:
        told = None
        for count in range(1, min(len(packets), MAX_DATAGRAMS) + 1):
            told = self.datagrams(packets[count - 1], [packet.payload for packet in packets[:count]])
            if told.decision is not None:
                break
        assert told is not None, "a flow has a datagram"
        return told

    def _captured_connection(self, packets: list[Packet]) -> Explanation:
        first = packets[0]
        before: tuple[Step, ...] = (
            Step("capture", "There is no SYN of it; its first segment here is taken for the first."),
        )
        if _is_syn(first):
            told = self.syn(first)
            if told.decision is None or told.decision.outcome is not Outcome.LATE:
                return told
            before = (Step("capture", "Its SYN says too little; the kernel answers it by itself, with a cookie."),)
        else:
            plan = self._engine.plan_at(first)
            told = self._not_asked(first)
            if plan is None or plan.unextended is not Reason.LATE:
                return told
        data, segments = b"", 0
        for last, data in _payload_so_far(packets):
            segments += 1
            told = self.first(last, data)
            if told.decision is not None:
                break
        if not segments:
            return told
        count = Step("capture", f"{segments} segments with {len(data)} bytes of its first payload were looked at.")
        return told._replace(steps=(*before, count, *told.steps))

    def _not_asked(self, packet: Packet) -> Explanation:
        text = "Only SYNs are looked at here; what follows a SYN goes where conntrack sends its connection."
        plan = self._engine.plan_at(packet)
        name = "" if plan is None else plan.name
        return Explanation(packet, "first", name, None, None, None, (), (), (), (Step("table", text),))

    # ---- what the engine says while it decides ----

    def _begin(self) -> None:
        self._said.clear()
        self._sessions.clear()
        self._chooser.asked = None

    def _saw(self, parser: str, answer: Keys | Answer) -> None:
        self._said.append(Said(parser, dict(answer) if isinstance(answer, dict) else answer))

    def _find(self, service: str, session_id: str) -> Session | None:
        found = self._known.find(service, session_id)
        self._sessions.append((session_id, found))
        return found

    # ---- the steps ----

    def _explanation(
        self,
        packet: Packet,
        kind: Kind,
        payloads: Sequence[bytes],
        decision: Decision | None,
        before: Iterable[Step] = (),
    ) -> Explanation:
        plan = self._engine.plan_at(packet)
        steps = [*self._endpoint(packet, plan), *before]
        if plan is None:
            return Explanation(packet, kind, "", decision, None, None, (), (), (), tuple(steps))
        if kind == "first" and plan.unextended is not Reason.LATE:
            return self._not_asked(packet)._replace(decision=decision)
        steps.append(Step("when", sentences.when(plan, kind, has_data=bool(payloads))))
        extension = self._extension(plan, packet)
        if kind != "first":
            steps += self._extension_step(plan, packet)
        steps += sentences.proxy_step(plan, packet, kind, payloads)
        steps += self._parsers(plan, kind, payloads)
        keys = {} if decision is None else decision.keys
        if keys:
            steps.append(Step("keys", ", ".join(f"{key}={sentences.shown(value)}" for key, value in keys.items())))
        matched: tuple[Route, ...] = ()
        near: tuple[Near, ...] = ()
        if decision is not None and decision.outcome is not Outcome.LATE:
            if decision.reason is not Reason.UNTRUSTED_PROXY:
                steps += self._session(plan, decision)
            if decision.reason is not Reason.UNTRUSTED_PROXY and not self._is_known_session:
                source = _source(plan, packet, keys)
                matched = tuple(self._matching(plan, keys, source))
                near, looked_at_all = self._near(plan, keys, source)
                steps += sentences.routes(plan, matched, near, looked_at_all, self._known.written)
                if not matched:
                    steps += sentences.arithmetic(plan, packet, extension, decision)
            steps += self._choice(packet, keys)
        target = self._known.target(decision.target_id) if decision is not None and decision.target_id else None
        mark = self._written(kind, decision)
        steps += sentences.outcome(plan, packet, kind, decision, target, mark, matched, self._is_known_session)
        if target is not None and isinstance(daemon := self._known.written(target), UnixDaemon):
            steps.append(Step("relay", f"There the relay takes the connection, for {daemon}."))
        if decision is not None:
            texts = sentences.chains(packet, kind, decision, target, len(payloads), self._is_diverted(packet))
            steps += [Step("table", text) for text in texts]
            if kind == "syn" and target is not None and self._is_offloaded(packet, decision, target):
                steps.append(Step("kernel", sentences.offloaded(packet.version)))
        return Explanation(
            packet, kind, plan.name, decision, target, mark, tuple(self._said), matched, near, tuple(steps)
        )

    @property
    def _is_known_session(self) -> bool:
        """Whether a session decided, so that no route was asked."""
        return any(session is not None for _, session in self._sessions)

    def _is_offloaded(self, packet: Packet, decision: Decision, target: Target) -> bool:
        """Whether the kernel steers the next SYN like this one by itself (core.offload). A packet that stands for a
        client's SYN has no TCP options."""
        plan = self._known.plan
        return (
            self._engine.lasting_target(packet) == decision.target_id
            and not any(target.address.packed in each for each in plan.waking)
            and (not packet.tcp_options or offload.key(packet, plan.numbers) is not None)
        )

    def _is_diverted(self, packet: Packet) -> bool:
        """Whether the table hands a SYN to a worker although its endpoint is a late one (chains select4, select6)."""
        options = packet.ip_options or packet.dst_options
        return bool(options or packet.payload) or self._known.plan.numbers.tcp_option in _kinds(packet.tcp_options)

    def _endpoint(self, packet: Packet, plan: ServicePlan | None) -> Iterator[Step]:
        asked = f"{sentences.address(packet.dst, packet.dport)}/{PROTOCOL_NAMES[packet.protocol]}"
        if plan is not None:
            yield Step("endpoint", f"{asked} is an endpoint of the service {plan.name}.")
            return
        close = [str(endpoint) for endpoint in self._close_endpoints(packet)]
        there_are = f"; near it: {', '.join(close)}" if close else ""
        yield Step("endpoint", f"{asked} is no endpoint of any service{there_are}.")
        if self._known.is_alias(packet.dst):
            yield Step(
                "table", "It is an alias, which nobody reaches but by a decision: chain direct drops the packet."
            )
        else:
            yield Step("table", "No chain of the table has to do with it: it goes its way as if steerd were not there.")

    def _close_endpoints(self, packet: Packet) -> list[Endpoint]:
        """Of the same address, nearest port first; or else of the same port and family."""

        def distance(plan: EndpointPlan) -> tuple[bool, int]:
            gap = max(plan.first_port - packet.dport, packet.dport - plan.last_port, 0)
            return plan.protocol != packet.protocol, gap

        plans = self._known.plan.endpoints
        found = [plan for plan in plans if plan.address == packet.dst] or [
            plan
            for plan in plans
            if len(plan.address) == len(packet.dst) and plan.first_port <= packet.dport <= plan.last_port
        ]
        return [
            Endpoint(ipaddress.ip_address(plan.address), plan.first_port, plan.last_port, plan.protocol)
            for plan in heapq.nsmallest(_MAX_NEAR, found, key=distance)
        ]

    def _extension(self, plan: ServicePlan, packet: Packet) -> Extension:
        found = portext.find(packet, self._known.plan.numbers) if plan.reads_extension else None
        return found if isinstance(found, Extension) else NOT_EXTENDED

    def _extension_step(self, plan: ServicePlan, packet: Packet) -> Iterator[Step]:
        found = portext.find(packet, self._known.plan.numbers)
        if not plan.reads_extension:
            if found is not None:
                yield Step("extension", "Its port extension is not read: inspect does not name port-extension.")
        elif found is None:
            yield Step("extension", "It carries no port extension.")
        elif isinstance(found, Extension):
            port = found.dst * 65536 + packet.dport
            extended = f"; the extended port is {port}" if found.dst else ""
            yield Step("extension", f"Destination extension {found.dst}, source extension {found.src}{extended}.")
        else:
            yield Step("extension", "It carries a malformed port extension, or more than one: counted, and ignored.")

    def _parsers(self, plan: ServicePlan, kind: Kind, payloads: Sequence[bytes]) -> Iterator[Step]:
        is_stream = kind in ("syn", "first")
        parsers = plan.payload_parsers if is_stream else plan.datagram_parsers
        size = sum(map(len, payloads))
        for said in self._said:
            yield Step("parser", f"{said.parser}: {sentences.answer(said, is_stream, size, len(payloads))}")
        asked = {said.parser for said in self._said}
        rest = [parser.name for parser in parsers if parser.name not in asked and parser.name != proxy.PARSER.name]
        if rest and asked:
            last = self._said[-1]
            why = "needs more first" if last.answer is Answer.NEED_MORE else "recognised its protocol"
            yield Step("parser", f"{', '.join(rest)}: not asked, since {last.parser} {why}.")

    def _session(self, plan: ServicePlan, decision: Decision) -> Iterator[Step]:
        if plan.sessions is None:
            return
        if not self._sessions:
            yield Step("session", f"It carries no session id: {plan.sessions.key} was not found.")
        for session_id, session in self._sessions:
            known = f"The session id {sentences.shown(session_id)} ({plan.sessions.key})"
            if session is None:
                yield Step("session", f"{known} is not known: routes decide.")
                continue
            if not session.usable:
                yield Step("session", f"{known} is known, but its target is not for use under this configuration.")
                continue
            owner = f"belongs to {ipaddress.ip_address(session.source)}" if session.source else "has no source yet"
            text = f"{known} is known and {owner}; on_new_source is {plan.sessions.on_new_source}"
            if decision.reason is Reason.SESSION_REFUSED:
                text += ": refused"
            elif decision.claim is not None:
                text += ": the client's address is written down as its source first"
            yield Step("session", f"{text}.")

    def _matching(self, plan: ServicePlan, keys: Keys, source: bytes) -> Iterator[Route]:
        for probe, key, value in matches(plan.probes, keys, source, self._known.get):
            ids = (int.from_bytes(value[:4], "big"), int.from_bytes(value[4:8], "big"))
            targets = tuple(target for id_ in ids for target in self._targets(id_))
            name = self._known.origin(plan.name, key, value)
            yield seen_by(probe, keys, source)._replace(name=name, targets=targets)

    def _targets(self, id_: int) -> Iterator[Target]:
        """What the id of a target or of a group stands for."""
        if id_ >= GROUP:
            group = self._known.group(id_)
            yield from (member.target for member in (() if group is None else group.members))
        elif id_ and (target := self._known.target(id_)) is not None:
            yield target

    def _choice(self, packet: Packet, keys: Keys) -> Iterator[Step]:
        """How one of several targets was chosen, who did not take part, and why."""
        group = None if self._chooser.asked is None else self._known.group(self._chooser.asked)
        if group is None:
            return
        names: list[str] = []
        skipped: list[str] = []
        for member in group.members:
            why = sentences.absent(self._known.state(member.id), packet.protocol)
            name = str(self._known.written(member.target))
            if why:
                skipped.append(f"{name} ({why})")
            else:
                names.append(name)
        how = {
            "first-alive": "The first one that is alive is chosen",
            "round-robin": "They take turns, in each worker by itself, so it may be any",
            "hash": f"The one is chosen that {sentences.hashed(group.key, keys)} says",
        }[group.policy]
        among = f"{how}, of {', '.join(names)}." if names else "There is nobody to choose."
        yield Step("choice", among + (f" Left out: {', '.join(skipped)}." if skipped else ""))

    def _near(self, plan: ServicePlan, keys: Keys, source: bytes) -> tuple[tuple[Near, ...], bool]:
        """The routes that come closest to matching, and whether all were looked at."""
        routes = itertools.chain.from_iterable(self._known.routes(plan.name, probe) for probe in plan.probes)
        found: list[tuple[float, int, Near]] = []
        room = min(MAX_LOOKED_AT, self._most_looked_at - self._looked_at)
        number = 0
        for number, route in enumerate(itertools.islice(routes, room), 1):
            wrong = failing(route, keys, source)
            if len(wrong) == 1:
                held = len(route.conditions) + (route.source is not None) - 1
                alike = _alike(wrong[0], keys)
                if held or alike >= _LIKE:
                    # The number keeps equals in the order in which they were found.
                    found.append((held + alike, -number, Near(route, wrong[0])))
        best = tuple(near for _, _, near in heapq.nlargest(_MAX_NEAR, found, key=lambda each: each[:2]))
        self._looked_at += number
        return best, next(routes, None) is None

    def _written(self, kind: Kind, decision: Decision | None) -> int | None:
        if decision is None:
            return None
        match decision.outcome:
            case Outcome.STEER:
                return self._mark.field(decision.target_id)
            case Outcome.PASS:
                return self._mark.field(PASS_ID)
            case Outcome.RESET | Outcome.ALERT:
                return self._mark.field(RESET_ID if kind == "syn" else ASK_ID)
        return None


class _Chooser(Chooser):
    """Remembers which group was asked for last."""

    asked: int | None = None

    def choose(self, group_id: int, protocol: int, source: bytes, keys: Keys, flow: Flow | None) -> Chosen:
        self.asked = group_id
        return super().choose(group_id, protocol, source, keys, flow)


# ---- what decides ----


def _is_syn(packet: Packet) -> bool:
    return packet.protocol == TCP and packet.flags & _CONTROL == SYN


def _kinds(tcp_options: bytes) -> Iterator[int]:
    """The kinds of TCP options, as far as they can be told."""
    at = 0
    while at < len(tcp_options) and tcp_options[at]:
        yield tcp_options[at]
        length = 1 if tcp_options[at] == 1 else int.from_bytes(tcp_options[at + 1 : at + 2], "big")
        if not length:
            return
        at += length


def _payload_so_far(packets: Sequence[Packet]) -> Iterator[tuple[Packet, bytes]]:
    """A connection's first payload as it grows: after each segment that makes it longer, that one and all bytes."""
    segments = [packet for packet in packets if packet.payload and not packet.flags & (SYN | RST)]
    syns = [packet for packet in packets if _is_syn(packet)]
    if not segments:
        return
    start = syns[0].seq + 1 if syns else min(segments, key=lambda s: _distance(segments[0].seq, s.seq)).seq
    held: dict[int, bytes] = {}
    data = b""
    for segment in segments:
        at = _distance(start, segment.seq)
        held[at] = max(held.get(at, b""), segment.payload, key=len)
        before = len(data)
        for at in sorted(held):
            if at <= len(data) < at + len(held[at]):
                data += held[at][len(data) - at :]
        if len(data) > before:
            yield segment, data


def _distance(start: int, seq: int) -> int:
    """How far one sequence number lies behind another; negative: before it."""
    return ((seq - start + (1 << 31)) & _SEQUENCE) - (1 << 31)


def _readable(plan: ServicePlan, protocol: int, keys: Keys) -> tuple[Keys, list[Step]]:
    """Of keys, those that the service's parsers could give of one payload, and what is to be said about others."""
    left = dict(keys)
    found: Keys = {}
    steps = []
    done = ""
    registry = REGISTRY if protocol == TCP else DATAGRAMS
    for parser in plan.payload_parsers if protocol == TCP else plan.datagram_parsers:
        known = registry[parser.name]
        mine = {key: value for key, value in left.items() if known.gives(key)}
        for key in mine:
            del left[key]
        if mine and done:
            steps.append(
                Step("ignored", f"{', '.join(mine)}: {done} recognised its protocol, so {parser.name} is not asked.")
            )
        elif mine:
            found |= mine
            done = parser.name if known.exclusive else ""
    if left:
        steps.append(Step("ignored", f"{', '.join(left)}: no parser in the service's inspect gives that."))
    return found, steps


def _source(plan: ServicePlan, packet: Packet, keys: Keys) -> bytes:
    """The client's address, which a trusted proxy's header may name."""
    if plan.trusted_proxies is None or "proxy.source" not in keys:
        return packet.src
    return ipaddress.ip_address(keys["proxy.source"]).packed


def _alike(wrong: Condition | IPNetwork, keys: Keys) -> float:
    """From 0 to 1: how near what was found is to what is wanted, by what they begin and end with alike."""
    if not isinstance(wrong, Condition) or wrong.key not in keys:
        return 0.0
    short, long = sorted((wrong.value[:MAX_SHOWN], keys[wrong.key][:MAX_SHOWN]), key=len)
    if len(short) < _LIKE * len(long):
        return 0.0
    beginning = _common(short, long)
    ending = _common(short[beginning:][::-1], long[beginning:][::-1])
    return (beginning + ending) / max(len(long), 1)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return sum(1 for _ in itertools.takewhile(operator.truth, map(operator.eq, one, other)))
