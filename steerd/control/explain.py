"""What `explain` can be asked, and what it answers: for the command line (cli.explain) and for the API.

The bytes of a question are parsed by what workers parse with, and everything else is core.explain's to say.
"""

from __future__ import annotations

import ast
import functools
import inspect
import ipaddress
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from steerd.config import Config
from steerd.config.conditions import as_parsed
from steerd.control.registry import Reader
from steerd.core.explain import Explainer, Explanation, Known
from steerd.core.sentences import condition_shown, route_shown
from steerd.errors import RequestError
from steerd.model import (
    PROTOCOL_NAMES,
    PROTOCOL_NUMBERS,
    TCP,
    UDP,
    Answer,
    Condition,
    Extension,
    Flow,
    IPAddress,
    Keys,
    Reason,
)
from steerd.wire import packet as wire
from steerd.wire import portext
from steerd.wire.packet import Packet
from steerd.wire.portext import Numbers
from steerd.wire.registry import DATAGRAMS, REGISTRY

MAX_PACKETS = 256
"""Of one connection or flow in a capture. First payloads of 32 KiB have 24, unless they come byte by byte."""
_MAX_STRANGERS = 3

_Extension = Annotated[int, Meta(ge=0, le=65535)]


class Question(Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be explained: an endpoint (`to`) and what a client says there, or packets."""

    to: str | None = None
    """As in `203.0.113.10:443/tcp`; extended ports are possible."""
    client: str | None = None
    """As in `198.51.100.7:5000`."""
    sni: str | None = None
    """A server name; its key depends on the protocol."""
    keys: dict[str, str] = {}
    """What else a parser would give."""
    extension: _Extension | None = None
    """The destination extension."""
    source_extension: _Extension | None = None
    hex: Annotated[list[str], Meta(max_length=MAX_PACKETS)] = []
    """Hexadecimal digits: with `to` a first payload, or datagrams; without it IP packets."""


class ParserSaid(Struct, frozen=True):
    """What a parser that was asked answered: `keys`, or why there are none."""

    parser: str
    answer: str
    keys: dict[str, str]


class NearRoute(Struct, frozen=True):
    """A route that would match but for one condition."""

    route: str
    wrong: str


class StepView(Struct, frozen=True):
    """One step: what it is about, in a word, and a sentence."""

    about: str
    text: str


class ExplanationView(Struct, frozen=True):
    """Of one connection, flow or datagram, for people and programs outside. Null: nothing is decided yet, or there is
    none."""

    client: str
    endpoint: str
    kind: str
    service: str | None
    outcome: str | None
    reason: str | None
    meaning: str | None
    keys: dict[str, str]
    target: str | None
    target_id: int | None
    mark: int | None
    parsers: list[ParserSaid]
    matched: list[str]
    near: list[NearRoute]
    steps: list[StepView]


class Asked(NamedTuple):
    """A question that makes sense, as far as that can be said without a plan."""

    to: str | None
    client: str | None
    sni: str | None
    keys: Keys
    extension: Extension | None
    bytes: list[bytes]
    called: Callable[[str], str]
    """What the asker calls a field."""


def check(
    question: Question, keys: Iterable[tuple[str, str]] | None = None, called: Callable[[str], str] = str
) -> Asked:
    """Look at a question. `keys`: instead of the question's, where some may be there twice; `called`: what the asker
    calls a field. Raises RequestError."""
    found: Keys = {}
    for name, value in question.keys.items() if keys is None else keys:
        try:
            parsed, value = as_parsed(name, value)
            if parsed == "proxy.source":
                ipaddress.ip_address(value)
        except ValueError as error:
            raise RequestError("invalid", "keys", f"{name}={value}: {error}") from error
        if parsed in found:
            raise RequestError("invalid", "keys", f"The key {parsed} is there twice.")
        found[parsed] = value
    destination = _extension(found, portext.DST, question.extension)
    source = _extension(found, portext.SRC, question.source_extension)
    if portext.PORT in found:
        raise RequestError(
            "invalid",
            "keys",
            f"{portext.PORT} follows from the port in {called('to')} and {called('extension')}; give these.",
        )
    carried = None if destination is None and source is None else Extension(destination or 0, source or 0)
    if question.to is None and (found or question.client or question.sni or carried):
        raise RequestError("invalid", "to", f"Keys, {called('client')} and extensions go with {called('to')}.")
    if question.hex and (found or question.sni or carried):
        raise RequestError("invalid", "hex", f"The keys of a payload ({called('hex')}) are found in it; give either.")
    return Asked(
        question.to,
        question.client,
        question.sni,
        found,
        carried,
        [_bytes(text, called) for text in question.hex],
        called,
    )


def question_of(asked: Asked) -> Question:
    """The question that `check` makes this of."""
    extension = asked.extension
    return Question(
        to=asked.to,
        client=asked.client,
        sni=asked.sni,
        keys=asked.keys,
        extension=None if extension is None else extension.dst,
        source_extension=None if extension is None else extension.src,
        hex=[data.hex() for data in asked.bytes],
    )


def packets_of(asked: Asked) -> list[Packet]:
    """The packets of a question that names no endpoint. Raises RequestError."""
    found = [wire.parse(data) for data in asked.bytes]
    if None in found:
        raise RequestError(
            "invalid",
            "hex",
            f"{asked.called('hex')} is no IP packet with TCP or UDP in it; to explain a payload, give"
            f" {asked.called('to')}.",
        )
    return [packet for packet in found if packet is not None]


def known_by(reader: Reader, config: Config, state: Callable[[int], int]) -> Known:
    """What there is to decide by, as a reader sees it now; until it is closed."""
    plan = reader.refresh()

    def is_alias(address: bytes) -> bool:
        prefixes = (prefix for pool in config.pools.values() for prefix in pool.prefixes)
        return any(ipaddress.ip_address(address) in prefix for prefix in prefixes)

    return Known(
        plan,
        reader.route,
        reader.session,
        reader.target,
        reader.routes_of,
        reader.name_of_route,
        is_alias,
        state,
        reader.group,
        reader.written,
    )


def explanations(
    explainer: Explainer, asked: Asked, arrived: list[Packet], numbers: Numbers, *, live: bool = False
) -> Iterator[Explanation]:
    """The answers. `arrived`: the packets, where no endpoint is named; `live`: they are what came while somebody
    looked, and not all that was ever said. Raises RequestError."""
    if asked.to is None:
        told = list(explainer.capture(arrived, joined_late=live))
        yield from told
        if not told and not live:
            strangers = {(p.dst, p.dport, p.protocol): p for p in reversed(arrived) if not explainer.is_to_endpoint(p)}
            for packet in list(strangers.values())[-_MAX_STRANGERS:]:
                yield explainer.keys(packet, {})
        return
    packet = _packet(asked, numbers)
    if asked.bytes:
        if packet.protocol == UDP:
            yield explainer.datagrams(packet._replace(payload=asked.bytes[-1]), asked.bytes)
        else:
            yield explainer.payload(packet, b"".join(asked.bytes))
        return
    keys = dict(asked.keys)
    if asked.sni is not None:
        keys |= _server_name(explainer, packet, asked.sni)
    yield explainer.keys(packet, keys)


def first_packets(packets: Iterable[Packet]) -> Iterator[Packet]:
    """Of each connection and flow the first MAX_PACKETS packets that say something: a capture may be of much more than
    what decides."""
    counts: Counter[tuple[int, Flow]] = Counter()
    for packet in packets:
        of = packet.protocol, packet.flow
        if packet.flags & wire.SYN:
            counts[of] = 0
        elif packet.protocol == TCP and not packet.payload:
            continue
        counts[of] += 1
        if counts[of] <= MAX_PACKETS:
            yield packet


# ---- parts of a question ----


def _extension(keys: Keys, name: str, given: int | None) -> int | None:
    text = keys.pop(name, None)
    if text is None:
        return given
    if given is not None or not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise RequestError("invalid", "keys", f"{name} must be there once, and be from 0 to 65535.")
    return int(text)


def _server_name(explainer: Explainer, packet: Packet, name: str) -> Keys:
    """The key of the first parser in `inspect` that gives server names, or else of the protocol's usual one."""
    registry = REGISTRY if packet.protocol == TCP else DATAGRAMS
    usual = "tls.sni" if packet.protocol == TCP else "quic.sni"
    names = (f"{parser}.sni" for parser in explainer.parsers(packet) if f"{parser}.sni" in registry[parser].keys)
    try:
        key, value = as_parsed(next(names, usual), name)
    except ValueError as error:
        raise RequestError("invalid", "sni", str(error)) from error
    return {key: value}


def _packet(asked: Asked, numbers: Numbers) -> Packet:
    """A SYN, or an empty datagram, as the question says."""
    assert asked.to is not None
    text, _, protocol = asked.to.partition("/")
    if protocol not in ("", *PROTOCOL_NUMBERS):
        raise RequestError("invalid", "to", f"{asked.called('to')} ends with {protocol}, which is neither tcp nor udp.")
    number = PROTOCOL_NUMBERS[protocol or "tcp"]
    to, port = _address_and_port("to", text, portext.MAX_EXTENDED_PORT, asked.called)
    extension = asked.extension
    if port > 65535:
        if extension is not None and extension.dst:
            raise RequestError("invalid", "extension", f"The port {port} already says an extension; give either.")
        try:
            high, port = portext.split(port)
        except ValueError as error:
            raise RequestError("invalid", "to", str(error)) from error
        extension = Extension(high, extension.src if extension is not None else 0)
    client: IPAddress = ipaddress.ip_address("0.0.0.0" if to.version == 4 else "::")
    client_port = 0
    if asked.client is not None:
        client, client_port = _address_and_port("client", asked.client, 65535, asked.called)
        if client.version != to.version:
            raise RequestError(
                "invalid", "client", f"{asked.called('client')} and {asked.called('to')} are of two address families."
            )
    ip_options = dst_options = b""
    if extension is not None and to.version == 4:
        ip_options = portext.encode_ipv4(extension, numbers)
    elif extension is not None:
        dst_options = portext.encode_ipv6(extension, numbers)[2:]
    flags = wire.SYN if number == TCP else 0
    return Packet(
        to.version, client.packed, to.packed, number, client_port, port, flags, 0, 0, ip_options, dst_options, b"", b""
    )


def _address_and_port(field: str, text: str, highest: int, called: Callable[[str], str]) -> tuple[IPAddress, int]:
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
        # So many digits and no more: int() takes long for thousands of them, and refuses more.
        number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 10 else -1
        if (":" in bare) != (bare != host) or not 0 <= number <= highest or "%" in bare:
            raise ValueError
    except ValueError:
        raise RequestError(
            "invalid",
            field,
            f"{called(field)} must be ADDRESS:PORT, as in 203.0.113.10:443 or [2001:db8::10]:443, not {text[:80]}.",
        ) from None
    return address, number


def _bytes(text: str, called: Callable[[str], str]) -> bytes:
    try:
        return bytes.fromhex(text.replace(":", " "))
    except ValueError:
        raise RequestError(
            "invalid", "hex", f"{called('hex')} has two hexadecimal digits a byte, not {text[:40]}."
        ) from None


# ---- an answer ----


@functools.cache
def meanings() -> dict[Reason, str]:
    """What each reason means: the sentences below the members of model.Reason."""
    (reason,) = ast.parse(textwrap.dedent(inspect.getsource(Reason))).body
    assert isinstance(reason, ast.ClassDef)
    found = {}
    for member, meaning in zip(reason.body, reason.body[1:], strict=False):
        match member, meaning:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                found[Reason[name]] = " ".join(text.split())
    return found


def view(told: Explanation) -> ExplanationView:
    """For people and programs outside."""
    decision, target = told.decision, told.target
    return ExplanationView(
        client=client_of(told.packet),
        endpoint=endpoint_of(told.packet),
        kind=told.kind,
        service=told.service or None,
        outcome=None if decision is None else decision.outcome.value,
        reason=None if decision is None else decision.reason.name.lower(),
        meaning=None if decision is None else meanings()[decision.reason],
        keys={} if decision is None else decision.keys,
        target=None if target is None else at(target.address, target.port or told.packet.dport),
        target_id=(decision.target_id if decision is not None else 0) or None,
        mark=told.mark,
        parsers=[
            ParserSaid(name, answer.value, {}) if isinstance(answer, Answer) else ParserSaid(name, "keys", answer)
            for name, answer in told.parsers
        ],
        matched=[route_shown(route) for route in told.matched],
        near=[
            NearRoute(route_shown(route), condition_shown(wrong) if isinstance(wrong, Condition) else f"source={wrong}")
            for route, wrong in told.near
        ],
        steps=[StepView(about, text) for about, text in told.steps],
    )


def client_of(packet: Packet) -> str:
    """`address:port` of its sender."""
    return at(ipaddress.ip_address(packet.src), packet.sport)


def endpoint_of(packet: Packet) -> str:
    """`address:port/protocol` that it is sent to."""
    return f"{at(ipaddress.ip_address(packet.dst), packet.dport)}/{PROTOCOL_NAMES[packet.protocol]}"


def at(address: IPAddress, port: int) -> str:
    """As people write it."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
