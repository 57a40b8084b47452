"""The sentences of an explanation (core.explain): what was found, what was decided and what the kernel's table makes of
it, in an operator's words. The last follow the chains of nft/steerd.nft. Nothing is decided here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from steerd.core.choice import SOURCE
from steerd.core.engine import Decision, ServicePlan
from steerd.core.router import deciding_rule, shape_of
from steerd.model import (
    DEAD,
    DRAINED,
    Answer,
    Condition,
    Extension,
    IPNetwork,
    Keys,
    Match,
    Outcome,
    Reason,
    Route,
    Target,
    UnixDaemon,
)
from steerd.wire import proxy, quic
from steerd.wire.packet import Packet
from steerd.wire.registry import DATAGRAMS, REGISTRY

MAX_SHOWN = 200
_RULES = (
    "they are of one shape, and a static route counts before a dynamic one",
    "it has exact conditions only, the other one has a pattern",
    "its patterns are longer",
    "it has more conditions",
    "its source prefix is longer",
    "its keys come first in the order of inspect",
)
Kind = Literal["syn", "first", "datagram", "query"]
"""What decides: a SYN, the first payload of a TCP connection, the first datagrams of a flow, or one datagram alone."""


class Step(NamedTuple):
    """One step of an explanation: what it is about, in a word, and a sentence."""

    about: str
    text: str


class Said(NamedTuple):
    """What a parser that was asked answered."""

    parser: str
    answer: Keys | Answer


class Near(NamedTuple):
    """A route that would match if this one condition of it held."""

    route: Route
    wrong: Condition | IPNetwork


def absent(state: int, protocol: int) -> str:
    """Why a member with this state takes no part; empty: it does."""
    found = {"drained": DRAINED, "nothing listens there": DEAD[protocol]}
    return ", ".join(why for why, bit in found.items() if state & bit)


def hashed(key: str, keys: Keys) -> str:
    """What the hash of a choice is taken of."""
    if key == SOURCE:
        return "the hash of the client's address"
    if key in keys:
        return f"the hash of {key}"
    return f"the hash of the client's address (there is no {key})"


def shown(text: str) -> str:
    """What a client said, fit for a terminal: escaped where it is not printable ASCII, and not too long."""
    safe = "".join(c if " " <= c <= "~" and c != "\\" else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= MAX_SHOWN else f"{safe[:MAX_SHOWN]}..."


def condition_shown(condition: Condition) -> str:
    """`http.host=*.example`."""
    value = shown(condition.value)
    return (
        f"{condition.key}="
        + {Match.EXACT: value, Match.SUFFIX: f"*{value}", Match.PREFIX: f"{value}*"}[condition.match]
    )


def route_shown(route: Route) -> str:
    """`http.host=a.example from 192.0.2.0/24 (services.web.routes[3])`."""
    when = " ".join(map(condition_shown, route.conditions)) or "any"
    source = "" if route.source is None else f" from {route.source}"
    return f"{when}{source} ({route.name})"


def when(plan: ServicePlan, kind: Kind, *, has_data: bool = False) -> str:
    """At which packet this kind is decided; `has_data`: there is a payload."""
    match kind:
        case "syn":
            if plan.unextended is Reason.LATE and not (plan.reads_extension or has_data):
                return "Late: the first payload decides."
            if plan.unextended is Reason.LATE:
                return "Early, at the SYN, if that says enough; else late, at the first payload."
            return "Early: the SYN decides."
        case "first":
            return "Late: the first payload of the connection decides."
        case "query":
            return "Datagram: each one is decided by itself."
    return "Datagram: the first ones of a flow decide for it."


def proxy_step(plan: ServicePlan, packet: Packet, kind: Kind, payloads: Sequence[bytes]) -> Iterator[Step]:
    """What is made of a PROXY header, where the service reads one."""
    if plan.trusted_proxies is None or kind not in ("syn", "first") or not payloads:
        return
    address = ipaddress.ip_address(packet.src)
    is_trusted = any(
        len(packed) == len(packet.src) and address in ipaddress.ip_network((packed, length))
        for packed, length in plan.trusted_proxies
    )
    header = proxy.read(payloads[0])
    who = f"{address} is {'one' if is_trusted else 'none'} of trusted_proxies"
    if isinstance(header, proxy.Header):
        named = f"names {ipaddress.ip_address(header.source)}" if header.source else "names no client"
        yield Step("proxy", f"A PROXY header of {header.length} bytes {named}; {who}.")
    elif header is Answer.NEED_MORE:
        yield Step("proxy", f"What may be a PROXY header is not complete; {who}.")
    elif not is_trusted and proxy.is_claimed(payloads[0]) is True:
        yield Step("proxy", f"It begins like a PROXY header, but is malformed; {who}.")
    else:
        yield Step("proxy", f"No PROXY header; {who}.")


def answer(said: Said, is_stream: bool, size: int, count: int) -> str:
    """What a parser that was asked says: of a stream with `size` bytes, or of `count` datagrams."""
    if said.answer is Answer.NOT_MINE:
        return "NOT_MINE: another protocol, or malformed."
    if said.answer is not Answer.NEED_MORE:
        found = ", ".join(f"{key}={shown(value)}" for key, value in said.answer.items())
        return found or "its protocol, but nothing to go by."
    if is_stream:
        return f"NEED_MORE: {size} bytes do not suffice; it wants at most {REGISTRY[said.parser].bound}."
    limit = DATAGRAMS[said.parser].datagrams
    return f"NEED_MORE: {count} datagrams with {size} bytes do not suffice; it wants at most {limit} datagrams."


def routes(
    plan: ServicePlan,
    matched: Sequence[Route],
    near: Sequence[Near],
    looked_at_all: bool,
    written: Callable[[Target], UnixDaemon | Target],
) -> Iterator[Step]:
    """Which routes match, in what order, and which nearly do."""
    if not plan.probes:
        yield Step("route", "The service has no routes.")
        return
    if matched:
        to = ", ".join(dict.fromkeys(str(written(target)) for target in matched[0].targets))
        nowhere = "nowhere: its target is not for use under this configuration"
        yield Step("route", f"{route_shown(matched[0])} matches, to {to or nowhere}.")
    else:
        yield Step("route", "No route matches.")
    for other in matched[1:]:
        why = _RULES[deciding_rule(shape_of(matched[0]), shape_of(other))]
        yield Step("route", f"It wins over {route_shown(other)}: {why}.")
    for route, wrong in near:
        text = condition_shown(wrong) if isinstance(wrong, Condition) else f"a source in {wrong}"
        yield Step("near", f"{route_shown(route)} does not match: it wants {text}.")
    if not looked_at_all:
        yield Step("near", "There are more routes than were looked through for those that nearly match.")


def arithmetic(plan: ServicePlan, packet: Packet, extension: Extension, decision: Decision) -> Iterator[Step]:
    """What extension_pool makes of the extension."""
    mapping = plan.mapping
    if mapping is None or not extension.dst:
        return
    number = extension.dst * 65536 + packet.dport if mapping.by_extended_port else extension.dst
    what = f"{'extended port' if mapping.by_extended_port else 'extension'} {number}"
    if decision.reason is Reason.ARITHMETIC:
        yield Step("arithmetic", f"The {what} means alias number {number - mapping.first} of the pool, counted from 0.")
        return
    aliases = sum(block.length for block in (mapping.ipv4 if packet.version == 4 else mapping.ipv6))
    last = mapping.first + aliases - 1
    yield Step("arithmetic", f"The {what} is outside of extension_pool, which has {mapping.first} to {last}.")


def outcome(
    plan: ServicePlan,
    packet: Packet,
    kind: Kind,
    decision: Decision | None,
    target: Target | None,
    mark: int | None,
    matched: Sequence[Route],
    by_session: bool,
) -> Iterator[Step]:
    """What is decided, why, and what the mark says then."""
    if decision is None:
        yield Step(
            "undecided",
            f"More is waited for, {plan.first_payload_timeout:g} s at most. Then {_unmatched(plan, kind)} (too_slow).",
        )
        return
    yield Step("reason", decision.reason.name.lower())
    if decision.reason is Reason.NO_FAMILY:
        what = "The session" if by_session else f"The route {route_shown(matched[0])}" if matched else "The default"
        yield Step("target", f"{what} has no IPv{packet.version} target for use.")
    if decision.reason is Reason.DRAINED:
        yield Step("target", "It is drained: an operator wants no new connections there (steerctl drains).")
    if decision.reason is Reason.DEAD:
        yield Step("target", "Nothing listens on any of the targets that are not drained.")
    if target is not None:
        port = target.port or packet.dport
        yield Step("target", f"{address(target.address.packed, port)}{'' if target.port else ', the port stays'}.")
    said = _outcome_shown(decision.outcome)
    yield Step("outcome", f"{said}{'' if mark is None else f'; mark {mark:#010x} (id {_id_shown(kind, decision)})'}.")


def _unmatched(plan: ServicePlan, kind: Kind) -> str:
    outcome = Outcome.DROP if kind in ("datagram", "query") else plan.unmatched
    return f"it is {_outcome_shown(outcome)}"


def _outcome_shown(outcome: Outcome) -> str:
    return {
        Outcome.STEER: "steered",
        Outcome.PASS: "left to the gateway's own socket",
        Outcome.RESET: "refused with a TCP reset",
        Outcome.DROP: "dropped",
        Outcome.ALERT: "refused with a TLS alert and a reset",
        Outcome.LATE: "not decided yet",
    }[outcome]


def _id_shown(kind: Kind, decision: Decision) -> str:
    if decision.outcome is Outcome.STEER:
        return str(decision.target_id)
    if decision.outcome is Outcome.PASS:
        return "of pass"
    return "of reset" if kind == "syn" else "of ask"


def chains(
    packet: Packet, kind: Kind, decision: Decision, target: Target | None, count: int, is_diverted: bool
) -> Iterator[str]:
    """What the table does, chain by chain."""
    version = packet.version
    outcome = decision.outcome
    if outcome is Outcome.LATE:
        if not is_diverted:
            yield "handshake_untracked: no conntrack entry; no worker sees the SYN."
        else:
            yield f"divert, select{version}: a worker sees it, drops it and sends it again without options and data."
        yield f"handshake{version}: synproxy answers with a cookie. The first payload will decide."
        return
    way = {
        "syn": f"divert, select{version}, limit{version}, queue{version}: the SYN goes to a worker",
        "first": f"divert, first{version}, limit{version}, queue{version}: the payload goes to a worker",
        "datagram": f"divert, datagram{version}, limit{version}, queue{version}: the datagram goes to a worker",
        "query": f"query, limit{version}, queue{version}: the datagram goes to a worker, before conntrack sees it",
    }[kind]
    if kind == "datagram" and quic.PACKET in decision.keys:
        yield f"datagram{version}: if the map learned knows the connection id, the table itself steers it."
    if kind == "syn" and outcome is Outcome.PASS:
        yield f"{way}, or is not diverted at all if it carries neither options of that kind nor data."
        yield f"decided{version}: a mark of pass is cleared; the SYN goes to the gateway's own socket, untranslated."
        return
    yield f"{way}."
    if outcome is Outcome.PASS:
        yield f"decided{version}: a mark of pass is cleared; it goes to the gateway's own socket, untranslated."
    elif outcome is Outcome.DROP:
        yield "The worker drops it; nothing is answered."
    elif outcome is not Outcome.STEER and kind == "syn":
        yield f"decided{version}: reject with tcp reset (counter refused)."
    elif outcome is not Outcome.STEER:
        yield f"handshake{version}, recall{version}: the kernel checks the client's cookie, and opens nothing."
        alert = "an alert (if it spoke TLS) and a reset" if outcome is Outcome.ALERT else "a reset"
        yield f"If the cookie was right, the worker sends the client {alert}; else nothing."
    else:
        yield from _steered(packet, kind, target, count)


def _steered(packet: Packet, kind: Kind, target: Target | None, count: int) -> Iterator[str]:
    version = packet.version
    to = "its target" if target is None else address(target.address.packed, target.port or packet.dport)
    translation = f"dnat to {to} (map {'hosts' if target is not None and not target.port else 'targets'}{version})"
    check = f"decided{version}: translated as decided? Then the mark is cleared, else the packet dropped"
    if kind == "first":
        yield f"handshake{version}: the decision is noted in bound{version}; synproxy checks the cookie."
        yield f"recall{version}: the SYN that the kernel sends gets the mark back. steer_local: {translation}."
        yield f"verify, {check}. Then the worker's copy of the payload follows (chain copies)."
        return
    if kind == "query":
        yield "zone: the conntrack zone of the target, so that other queries from this port may go elsewhere."
    if kind == "datagram" and count > 1:
        yield f"The flow's {count} datagrams are sent by the worker, in order. steer_local: {translation}."
        yield f"verify_udp, {check}."
    else:
        yield f"steer: {translation}. guard, {check}."
    yield "arrive: the daemon's own socket gets it, or one bound to the wildcard address where that is allowed."


def address(packed: bytes, port: int) -> str:
    """`10.64.0.1:80`, `[fd00:64::1]:80`."""
    host = ipaddress.ip_address(packed)
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"


def offloaded(version: int) -> str:
    """What becomes of the next SYN like this one, where the kernel steers it by itself."""
    return (
        "Endpoint and extension alone decide this. Once a worker has, the next SYN with this extension is answered by"
        f" the kernel's map (offload{version}, counter `offloaded`), and by no worker, until a change empties the map."
        " While the access log is on, workers decide all."
    )
