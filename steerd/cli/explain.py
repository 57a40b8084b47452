"""The command `explain` of steerd and of steerctl: where packets, bytes or keys come from, and how what core.explain
says looks. What is asked and answered is control.explain's, as in the API.

A capture is read by scapy (pcap and pcapng), and so is nothing else: its bytes are parsed by what workers parse with.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import typer

from steerd.config import Config
from steerd.control import client
from steerd.control import explain as control
from steerd.control.explain import Asked, ExplanationView, Question
from steerd.control.registry import Reader, Registry
from steerd.control.states import States
from steerd.core.engine import no_state
from steerd.core.explain import Explainer
from steerd.errors import ForbiddenError, NoAnswerError, RegistryError, RequestError, SteerdError
from steerd.model import Outcome
from steerd.wire import packet as wire
from steerd.wire.packet import Packet

EXIT_STEERED, EXIT_NOT_STEERED = 0, 1

_NULL, _ETHERNET, _LOOP, _LINUX_SLL, _LINUX_SLL2 = 0, 1, 108, 113, 276
_RAW = (12, 14, 101, 228, 229)
_HEADER = {_NULL: 4, _LOOP: 4, _LINUX_SLL: 16, _LINUX_SLL2: 20}
_IP = (b"\x08\x00", b"\x86\xdd")
_VLAN = (b"\x81\x00", b"\x88\xa8")
_ETH_P_ALL = 3
_SAY_MORE = "  more        Say what the first payload would hold: --sni, --host, --path, --key or --hex."
_LONGEST = 1 << 18
_RECEIVE_BUFFER = 8 << 20
_LAST_SECONDS = 1.0
_ANY_CLIENT = ("0.0.0.0:0", "[::]:0")
_ADDRESS = re.compile(r"[0-9a-fA-F.:\[\]]+:\d+(/\w+)?")
_OPTIONS = {"client": "--from"}
"""Fields of a question whose options have other names."""


class FromCommandLine(NamedTuple):
    """What the command line asks about."""

    capture: Path | None
    live: float | None
    asked: Asked


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
) -> FromCommandLine:
    """The options put together. Raises typer.BadParameter for what does not go together."""
    sources = [name for name, given in (("PCAP", capture), ("--live", live), ("--to", to)) if given is not None]
    if hexadecimal and to is None:
        sources.append("--hex")
    if len(sources) != 1:
        raise typer.BadParameter(
            f"Exactly one of PCAP, --hex, --live and --to says what to explain, not {' and '.join(sources) or 'none'}."
        )
    if capture is not None and not capture.exists() and _ADDRESS.fullmatch(str(capture)):
        raise typer.BadParameter(f"{capture} is no capture; did you mean --to {capture}?")
    keys = []
    for text in [*([f"http.host={host}"] if host else []), *([f"http.path={path}"] if path else []), *(key or [])]:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text} is no key; one is written KEY=VALUE, as in tls.alpn=h2.")
        keys.append((name, value))
    question = Question(
        to=to,
        client=client,
        sni=sni,
        extension=extension,
        source_extension=source_extension,
        hex=hexadecimal or [],
    )
    with _bad_parameters():
        return FromCommandLine(
            capture, live, control.check(question, keys, lambda name: _OPTIONS.get(name, f"--{name}"))
        )


@contextmanager
def _bad_parameters() -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise typer.BadParameter(error.message) from error


def explain(config: Config, question: FromCommandLine, *, from_registry: bool, as_json: bool) -> int:
    """Answer on standard output; returns the exit status: 0 all steered, 1 not. Raises typer.BadParameter for what
    cannot be understood."""
    with _bad_parameters():
        note, told = _told(config, question, from_registry=from_registry)
    return _say(note, told, question.asked, as_json)


def explain_by_daemon(run_dir: str, asked: Asked, *, as_json: bool) -> int:
    """As `explain`, where there is no configuration to look at but only the daemon; raises what its API does."""
    return _say(*_by_daemon(run_dir, asked), asked, as_json)


def _say(note: str, told: list[ExplanationView], asked: Asked, as_json: bool) -> int:
    if not told:
        raise SteerdError("Nothing here decides anything: there is no SYN, first payload or datagram to an endpoint.")
    if as_json:
        views = [msgspec.to_builtins(each) for each in told]
        typer.echo(json.dumps({"note": note, "explanations": views}, indent=2))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo("\n".join(_wrapped(note, width)))
        for each in told:
            typer.echo("\n" + as_text(each, width))
        if asked.to is not None and not asked.bytes and any(each.outcome == Outcome.LATE.value for each in told):
            typer.echo("\n".join(_wrapped(_SAY_MORE, width, indent=14)))
    return EXIT_STEERED if all(each.outcome == Outcome.STEER.value for each in told) else EXIT_NOT_STEERED


def _told(config: Config, question: FromCommandLine, *, from_registry: bool) -> tuple[str, list[ExplanationView]]:
    """What it is decided by, and the answers: by the registry, if it is wanted and can be read; else by the daemon, if
    it can be asked; else by a registry for a moment that holds what the file says."""
    asked = question.asked
    arrived = _arrived(question)
    why_not = ""
    with contextlib.ExitStack() as held:
        reader = None
        state: Callable[[int], int] = no_state
        if from_registry:
            try:
                reader = Reader(config.gateway.state_dir)
                held.callback(reader.close)
                reader.refresh()
                note = f"By the registry in {config.gateway.state_dir}: what was added while the daemon runs counts."
                # Before the first start there is none, and after it what the last daemon knew.
                with contextlib.suppress(SteerdError):
                    state = States.open(config.gateway.run_dir).get
            except RegistryError as error:
                reader, why_not = None, f" ({error})"
                with contextlib.suppress(NoAnswerError, ForbiddenError):
                    if asked.to is not None:
                        return _by_daemon(config.gateway.run_dir, asked)
        if reader is None:
            directory = held.enter_context(tempfile.TemporaryDirectory(prefix="steerd-explain-"))
            registry = Registry(directory)
            registry.publish(config)
            registry.close()
            reader = Reader(directory)
            held.callback(reader.close)
            note = (
                f"By {config.file} alone{why_not}: routes, leases and sessions that were added while the daemon runs"
                " are not taken into account, and its marks and ids are others."
            )
        known = control.known_by(reader, config, state)
        found = control.explanations(
            Explainer(known), asked, arrived, known.plan.numbers, live=question.live is not None
        )
        return note, [control.view(each) for each in found]


def _by_daemon(run_dir: str, asked: Asked) -> tuple[str, list[ExplanationView]]:
    """What the API says. Raises SteerdError."""
    body = msgspec.to_builtins(control.question_of(asked))
    answer = client.request(run_dir, "POST", "explain", body=body)
    return "According to the running daemon:", msgspec.convert(answer["explanations"], list[ExplanationView])


def _arrived(question: FromCommandLine) -> list[Packet]:
    """The packets of a capture, of the command line, or of the next seconds."""
    if question.capture is not None:
        return list(control.first_packets(_parsed(read_capture(question.capture))))
    if question.live is not None:
        return list(control.first_packets(_parsed(listen(question.live))))
    return control.packets_of(question.asked) if question.asked.to is None else []


def _parsed(packets: Iterable[bytes]) -> Iterator[Packet]:
    for data in packets:
        packet = wire.parse(data)
        if packet is not None:
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
    """The IP packets that arrive in this network namespace for so long, or until Ctrl-C. Raises SteerdError without the
    right to."""
    try:
        link = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    except PermissionError as error:
        raise SteerdError("A live capture needs CAP_NET_RAW: run it as root.") from error
    with link, _interrupts() as interrupt:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        typer.echo(f"Looking for {seconds:g} s at what arrives; Ctrl-C ends it earlier.", err=True)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([link, interrupt], [], [], left)
            if interrupt in ready:
                break
            if link in ready:
                yield from _next_packet(link)
        # What has come by then may still wait to be read; while more and more comes, it is not waited for.
        end = time.monotonic() + _LAST_SECONDS
        while select.select([link], [], [], 0)[0] and time.monotonic() < end:
            yield from _next_packet(link)


def _next_packet(link: socket.socket) -> Iterator[bytes]:
    data, about = link.recvfrom(_LONGEST)
    if about[2] != socket.PACKET_OUTGOING:
        yield data


@contextmanager
def _interrupts() -> Iterator[socket.socket]:
    """A socket that becomes readable with Ctrl-C, which interrupts nothing meanwhile. Ignored, it stays so."""
    hears, tells = socket.socketpair()
    with hears, tells:
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:
            tells.setblocking(False)
            signal.signal(signal.SIGINT, lambda _number, _frame: _tell(tells))
        try:
            yield hears
        finally:
            signal.signal(signal.SIGINT, before)


def _tell(tells: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):  # full of what was told before
        tells.send(b"\0")


# ---- how it looks ----


def as_text(told: ExplanationView, width: int | None = None) -> str:
    """For people: one line for what becomes of it, and one for each step; a step that is longer than `width` is
    continued below its beginning."""
    lines = [_title(told)]
    for about, text in ((step.about, step.text) for step in told.steps):
        line = f"  {about:<11} {text}: {told.meaning}" if about == "reason" else f"  {about:<11} {text}"
        lines += _wrapped(line, width, indent=14)
    return "\n".join(lines)


def _wrapped(line: str, width: int | None, indent: int = 0) -> list[str]:
    if width is None:
        return [line]
    # What is too long for a line, or has a hyphen in it, may be a name to copy.
    return textwrap.wrap(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _title(told: ExplanationView) -> str:
    way = f"{'any client' if told.client in _ANY_CLIENT else told.client} -> {told.endpoint}"
    if told.service is None:
        return f"{way}: no endpoint"
    if told.outcome is None:
        return f"{way}: not decided"
    return f"{way}: {told.outcome}" if told.target is None else f"{way}: steered to {told.target}"
