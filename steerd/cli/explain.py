"""The command `explain` of steerd and of steerctl: where packets, bytes or keys come from, and how what core.explain
says looks.

A capture is read by scapy (pcap and pcapng), and so is nothing else: its bytes are parsed by what workers parse with.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import ipaddress
import json
import socket
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import typer

from steerd import config as configuration
from steerd.config import Config
from steerd.control.registry import Reader, Registry
from steerd.control.states import States
from steerd.core.engine import no_state
from steerd.core.explain import Explainer, Explanation, Known, condition_shown, route_shown
from steerd.errors import RegistryError, SteerdError
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

EXIT_STEERED, EXIT_NOT_STEERED = 0, 1
MAX_PACKETS = 256
"""Of one connection or flow in a capture. First payloads of 32 KiB have 24, unless they come byte by byte."""

_NULL, _ETHERNET, _LOOP, _LINUX_SLL, _LINUX_SLL2 = 0, 1, 108, 113, 276
_RAW = (12, 14, 101, 228, 229)
_HEADER = {_NULL: 4, _LOOP: 4, _LINUX_SLL: 16, _LINUX_SLL2: 20}
_IP = (b"\x08\x00", b"\x86\xdd")
_VLAN = (b"\x81\x00", b"\x88\xa8")
_ETH_P_ALL = 3
_LONGEST = 1 << 18
_RECEIVE_BUFFER = 8 << 20
_MAX_STRANGERS = 3


class Asked(NamedTuple):
    """What the command line asks about."""

    capture: Path | None
    hex: list[str]
    live: float | None
    to: str | None
    client: str | None
    keys: Keys
    sni: str | None
    """Its key depends on the protocol."""
    extension: Extension | None


def asked(
    capture: Path | None,
    hexadecimal: list[str] | None,
    live: float | None,
    to: str | None,
    client: str | None,
    sni: str | None,
    host: str | None,
    path: str | None,
    key: list[str] | None,
    extension: int | None,
    source_extension: int | None,
) -> Asked:
    """The options put together. Raises typer.BadParameter for what does not go together."""
    sources = [name for name, given in (("PCAP", capture), ("--live", live), ("--to", to)) if given is not None]
    if hexadecimal and to is None:
        sources.append("--hex")
    if len(sources) != 1:
        raise typer.BadParameter(
            f"Exactly one of PCAP, --hex, --live and --to says what to explain, not {' and '.join(sources) or 'none'}."
        )
    keys: Keys = {}
    for text in [*([f"http.host={host}"] if host else []), *([f"http.path={path}"] if path else []), *(key or [])]:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text} is no key; one is written KEY=VALUE, as in tls.alpn=h2.")
        try:
            name, value = configuration.as_parsed(name, value)
            if name == "proxy.source":
                ipaddress.ip_address(value)
        except ValueError as error:
            raise typer.BadParameter(f"{text}: {error}") from error
        if name in keys:
            raise typer.BadParameter(f"The key {name} is there twice.")
        keys[name] = value
    destination, source = (
        _extension_key(keys, portext.DST, extension),
        _extension_key(keys, portext.SRC, source_extension),
    )
    if portext.PORT in keys:
        raise typer.BadParameter(f"{portext.PORT} follows from the port in --to and --extension; give these.")
    carried = None if destination is None and source is None else Extension(destination or 0, source or 0)
    if to is None and (keys or client or sni or carried):
        raise typer.BadParameter("Keys, --from and extensions go with --to.")
    if hexadecimal and (keys or sni or carried):
        raise typer.BadParameter("The keys of a payload (--hex) are found in it; give either.")
    return Asked(capture, hexadecimal or [], live, to, client, keys, sni, carried)


def _extension_key(keys: Keys, name: str, given: int | None) -> int | None:
    text = keys.pop(name, None)
    if text is None:
        return given
    if given is not None or not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise typer.BadParameter(f"{name} must be there once, and be from 0 to 65535.")
    return int(text)


def explain(config: Config, question: Asked, *, from_registry: bool, as_json: bool) -> int:
    """Answer on standard output; returns the exit status: 0 all steered, 1 not. Raises typer.BadParameter for what
    cannot be understood."""
    arrived = _arrived(question)
    with known(config, from_registry=from_registry) as (everything, note):
        explainer = Explainer(everything)
        told = list(_explanations(explainer, question, arrived, everything.plan.numbers))
    if not told:
        raise SteerdError("Nothing here decides anything: there is no SYN, first payload or datagram to an endpoint.")
    if as_json:
        typer.echo(json.dumps({"note": note, "explanations": [as_values(each) for each in told]}, indent=2))
    else:
        typer.echo(note)
        for each in told:
            typer.echo("\n" + as_text(each))
    return EXIT_STEERED if all(each.is_steered for each in told) else EXIT_NOT_STEERED


@contextmanager
def known(config: Config, *, from_registry: bool) -> Iterator[tuple[Known, str]]:
    """What there is to decide by, and a sentence on where it comes from: the registry, if it is wanted and can be read;
    else a registry for a moment that holds what the file says."""
    with tempfile.TemporaryDirectory(prefix="steerd-explain-") as directory:
        why_not = ""
        reader = None
        state: Callable[[int], int] = no_state
        if from_registry:
            try:
                reader = Reader(config.gateway.state_dir)
                plan = reader.refresh()
                note = f"By the registry in {config.gateway.state_dir}: what was added while the daemon runs counts."
            except RegistryError as error:
                reader, why_not = None, f" ({error})"
            # Before the first start there is none, and after it what the last daemon knew.
            with contextlib.suppress(SteerdError):
                state = States.open(config.gateway.run_dir).get if reader is not None else state
        if reader is None:
            registry = Registry(directory)
            registry.publish(config)
            registry.close()
            reader = Reader(directory)
            plan = reader.refresh()
            note = (
                f"By {config.file} alone{why_not}: routes, leases and sessions that were added while the daemon runs"
                " are not taken into account, and its marks and ids are others."
            )
        where = reader

        def is_alias(address: bytes) -> bool:
            prefixes = (prefix for pool in config.pools.values() for prefix in pool.prefixes)
            return any(ipaddress.ip_address(address) in prefix for prefix in prefixes)

        try:
            yield (
                Known(
                    plan,
                    where.route,
                    where.session,
                    where.target,
                    where.routes_of,
                    where.name_of_route,
                    is_alias,
                    state,
                    where.group,
                ),
                note,
            )
        finally:
            where.close()


# ---- what is explained ----


def _arrived(question: Asked) -> list[Packet]:
    """The packets of a capture, of the command line, or of the next seconds."""
    if question.capture is not None:
        return list(first_packets(_parsed(read_capture(question.capture))))
    if question.live is not None:
        # One by one: what came before Ctrl-C stays.
        arrived: list[Packet] = []
        with contextlib.suppress(KeyboardInterrupt):
            for packet in first_packets(_parsed(listen(question.live))):
                arrived.append(packet)
        return arrived
    if question.to is None:
        found = [wire.parse(_bytes(text)) for text in question.hex]
        if None in found:
            raise typer.BadParameter("--hex is no IP packet with TCP or UDP in it; to explain a payload, give --to.")
        return [packet for packet in found if packet is not None]
    return []


def _explanations(
    explainer: Explainer, question: Asked, arrived: list[Packet], numbers: Numbers
) -> Iterator[Explanation]:
    if question.to is None:
        told = list(explainer.capture(arrived, joined_late=question.live is not None))
        yield from told
        if not told and question.live is None:
            strangers = {(p.dst, p.dport, p.protocol): p for p in reversed(arrived) if not explainer.is_to_endpoint(p)}
            for packet in list(strangers.values())[-_MAX_STRANGERS:]:
                yield explainer.keys(packet, {})
        return
    packet = _packet(question, numbers)
    if question.hex:
        payloads = [_bytes(text) for text in question.hex]
        if packet.protocol == UDP:
            yield explainer.datagrams(packet._replace(payload=payloads[-1]), payloads)
        else:
            yield explainer.payload(packet, b"".join(payloads))
        return
    keys = dict(question.keys)
    if question.sni is not None:
        keys |= _server_name(explainer, packet, question.sni)
    yield explainer.keys(packet, keys)


def _server_name(explainer: Explainer, packet: Packet, name: str) -> Keys:
    """The key of the first parser in `inspect` that gives server names, or else of the protocol's usual one."""
    registry = REGISTRY if packet.protocol == TCP else DATAGRAMS
    usual = "tls.sni" if packet.protocol == TCP else "quic.sni"
    names = (f"{parser}.sni" for parser in explainer.parsers(packet) if f"{parser}.sni" in registry[parser].keys)
    key, value = configuration.as_parsed(next(names, usual), name)
    return {key: value}


def _packet(question: Asked, numbers: Numbers) -> Packet:
    """A SYN, or an empty datagram, as --from, --to and extensions say."""
    assert question.to is not None
    text, _, protocol = question.to.partition("/")
    if protocol not in ("", *PROTOCOL_NUMBERS):
        raise typer.BadParameter(f"--to ends with {protocol}, which is neither tcp nor udp.")
    number = PROTOCOL_NUMBERS[protocol or "tcp"]
    to, port = _address_and_port("--to", text, portext.MAX_EXTENDED_PORT)
    extension = question.extension
    if port > 65535:
        if extension is not None and extension.dst:
            raise typer.BadParameter(f"The port {port} already says an extension; give either.")
        try:
            high, port = portext.split(port)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        extension = Extension(high, extension.src if extension is not None else 0)
    client: IPAddress = ipaddress.ip_address("0.0.0.0" if to.version == 4 else "::")
    client_port = 0
    if question.client is not None:
        client, client_port = _address_and_port("--from", question.client, 65535)
        if client.version != to.version:
            raise typer.BadParameter("--from and --to are of two address families.")
    ip_options = dst_options = b""
    if extension is not None and to.version == 4:
        ip_options = portext.encode_ipv4(extension, numbers)
    elif extension is not None:
        dst_options = portext.encode_ipv6(extension, numbers)[2:]
    flags = wire.SYN if number == TCP else 0
    return Packet(
        to.version, client.packed, to.packed, number, client_port, port, flags, 0, 0, ip_options, dst_options, b"", b""
    )


def _address_and_port(option: str, text: str, highest: int) -> tuple[IPAddress, int]:
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
        number = int(port)
        if (":" in bare) != (bare != host) or not 0 <= number <= highest or not port.isdecimal():
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"{option} must be ADDRESS:PORT, as in 203.0.113.10:443 or [2001:db8::10]:443, not {text}."
        ) from None
    return address, number


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text.replace(":", " "))
    except ValueError:
        raise typer.BadParameter(f"--hex has two hexadecimal digits a byte, not {text[:40]}.") from None


def _parsed(packets: Iterable[bytes]) -> Iterator[Packet]:
    for data in packets:
        packet = wire.parse(data)
        if packet is not None:
            yield packet


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


# ---- captures ----


def read_capture(file: Path) -> Iterator[bytes]:
    """The IP packets of a capture. Raises typer.BadParameter if it cannot be read."""
    from scapy.error import Scapy_Exception
    from scapy.utils import RawPcapReader

    try:
        # Opened here: scapy leaves what it cannot read open.
        with file.open("rb") as opened:
            reader = RawPcapReader(opened)
            for data, about in reader:
                link = getattr(about, "linktype", None)
                packet = ip_packet(reader.linktype if link is None else link, data)
                if packet is not None:
                    yield packet
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}.") from error
    except (Scapy_Exception, EOFError) as error:
        raise typer.BadParameter(f"{file} is neither pcap nor pcapng.") from error


def ip_packet(link_type: int, frame: bytes) -> bytes | None:
    """The IP packet in a frame of a link type (https://www.tcpdump.org/linktypes.html); None: none, or another type."""
    if link_type in _RAW:
        return frame
    if link_type in _HEADER:
        return frame[_HEADER[link_type] :]
    if link_type != _ETHERNET:
        return None
    at = 12
    while frame[at : at + 2] in _VLAN:
        at += 4
    return frame[at + 2 :] if frame[at : at + 2] in _IP else None


def listen(seconds: float) -> Iterator[bytes]:
    """The IP packets that arrive in this network namespace for so long. Raises SteerdError without the right to."""
    try:
        link = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    except PermissionError as error:
        raise SteerdError("A live capture needs CAP_NET_RAW: run it as root.") from error
    with link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        typer.echo(f"Looking for {seconds:g} s at what arrives; Ctrl-C ends it earlier.", err=True)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            link.settimeout(left)
            try:
                data, about = link.recvfrom(_LONGEST)
            except TimeoutError:
                return
            if about[2] != socket.PACKET_OUTGOING:
                yield data


# ---- how it looks ----


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


def as_text(told: Explanation) -> str:
    """For people: one line for what becomes of it, and one for each step."""
    lines = [_title(told)]
    for about, text in told.steps:
        if about == "reason" and told.decision is not None:
            text = f"{text}: {meanings()[told.decision.reason]}"
        lines.append(f"  {about:<11} {text}")
    return "\n".join(lines)


def _title(told: Explanation) -> str:
    way = f"{_client(told.packet)} -> {_endpoint(told.packet)}"
    if not told.service:
        return f"{way}: no endpoint"
    if told.decision is None:
        return f"{way}: not decided"
    if told.target is None:
        return f"{way}: {told.decision.outcome.value}"
    return f"{way}: steered to {_at(told.target.address, told.target.port or told.packet.dport)}"


def as_values(told: Explanation) -> dict[str, Any]:
    """For programs."""
    decision, target = told.decision, told.target
    return {
        "client": _client(told.packet),
        "endpoint": _endpoint(told.packet),
        "kind": told.kind,
        "service": told.service or None,
        "outcome": None if decision is None else decision.outcome.value,
        "reason": None if decision is None else decision.reason.name.lower(),
        "meaning": None if decision is None else meanings()[decision.reason],
        "keys": {} if decision is None else decision.keys,
        "target": None if target is None else _at(target.address, target.port or told.packet.dport),
        "target_id": (decision.target_id if decision is not None else 0) or None,
        "mark": told.mark,
        "parsers": [
            {"parser": name, "answer": answer.value, "keys": {}}
            if isinstance(answer, Answer)
            else {"parser": name, "answer": "keys", "keys": answer}
            for name, answer in told.parsers
        ],
        "matched": [route_shown(route) for route in told.matched],
        "near": [
            {
                "route": route_shown(route),
                "wrong": condition_shown(wrong) if isinstance(wrong, Condition) else f"source={wrong}",
            }
            for route, wrong in told.near
        ],
        "steps": [{"about": about, "text": text} for about, text in told.steps],
    }


def _client(packet: Packet) -> str:
    return _at(ipaddress.ip_address(packet.src), packet.sport)


def _endpoint(packet: Packet) -> str:
    return f"{_at(ipaddress.ip_address(packet.dst), packet.dport)}/{PROTOCOL_NAMES[packet.protocol]}"


def _at(address: IPAddress, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
