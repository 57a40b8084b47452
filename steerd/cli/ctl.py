"""`steerctl`: for operators. Looks at a running steerd, and probes an extended port from a client's side."""

from __future__ import annotations

import ast
import contextlib
import enum
import inspect
import itertools
import json
import re
import socket
import sys
import time
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steerd import config as configuration
from steerd.cli import explain as explaining
from steerd.cli.main import DEFAULT_CONFIG, EXIT_BAD_CONFIG, EXIT_FAILED, ConfigFile, progress_bar
from steerd.errors import ConfigError, SteerdError
from steerd.kernel import ruleset
from steerd.model import Reason
from steerd.telemetry.counters import Counters, Extra

_BATCH_LINES = 10_000
_UNBOUNDED = 10_000

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
session = typer.Typer(no_args_is_help=True, help="Sessions: which session id belongs to which target and source.")
app.add_typer(session, name="session")
lease = typer.Typer(no_args_is_help=True, help="Leases: which name has which alias of a pool.")
app.add_typer(lease, name="lease")
route = typer.Typer(no_args_is_help=True, help="Routes: those of the configuration, and others that come and go.")
app.add_typer(route, name="route")

Service = Annotated[str, typer.Argument(help="Name of the service.")]
SessionId = Annotated[str, typer.Argument(help="What clients say.", metavar="ID")]
Config = Annotated[Path, typer.Option(help="The daemon's configuration, in TOML.", metavar="FILE")]
Name = Annotated[str, typer.Argument(help="Whose lease it is.")]
Conditions = Annotated[
    list[str] | None,
    typer.Option("--key", help="A condition, as in `tls.sni=a.example`; may be repeated.", metavar="KEY=VALUE"),
]
Source = Annotated[str | None, typer.Option(help="Only clients of this prefix.", metavar="PREFIX")]
Ttl = Annotated[str | None, typer.Option(help="When it ends unless renewed: 90s, 15m, 12h, 7d.", metavar="TIME")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


@app.command()
def status(
    file: ConfigFile = DEFAULT_CONFIG,
    legend: Annotated[bool, typer.Option("--legend", help="Say of each counter what it means.")] = False,
) -> None:
    """What the workers decided, what the kernel's table counted, and how the queues stand.

    Exit status: 0, 1 if no daemon runs, 2 bad configuration or usage.
    """
    from steerd import daemon
    from steerd.control.client import socket_path
    from steerd.kernel import queue
    from steerd.kernel.nftables import Nftables

    gateway = configuration.load(file).gateway
    counters = Counters.open(Path(gateway.run_dir) / "counters")
    console = _console()
    is_running = _answers(socket_path(gateway.run_dir))
    if not is_running:
        typer.echo(f"Nobody answers at {socket_path(gateway.run_dir)}: steerd does not run. What it had counted:\n")

    def row(name: str, count: int, meanings: dict[str, str]) -> tuple[str, ...]:
        return (name, f"{count:,}", meanings[name]) if legend else (name, f"{count:,}")

    more = ("meaning",) if legend else ()
    decisions = Table("decisions by reason", "packets", *more, title="workers")
    reasons, extras = _meanings(Reason), _meanings(Extra)
    for reason, count in daemon.total_decisions(counters).items():
        if count:
            decisions.add_row(*row(reason, count, reasons))
    for extra in Extra:
        decisions.add_row(*row(extra.name.lower(), counters.total(extra), extras))
    console.print(decisions)

    kernel = Table("counter", "packets", *more, title="table inet steerd")
    comments = _comments()
    with contextlib.closing(Nftables()) as nftables:
        for name, packets in sorted(nftables.counters().items()):
            kernel.add_row(*row(name, packets, comments))
    console.print(kernel)

    queues = Table("queue", "owner", "waiting", "dropped: queue full", "dropped: socket full", title="queues")
    states = queue.states()
    for number in range(gateway.first_queue, gateway.first_queue + gateway.workers):
        if (state := states.get(number)) is None:
            queues.add_row(str(number), "nobody: its packets are dropped", "", "", "")
        else:
            dropped = (f"{state.queue_dropped:,}", f"{state.user_dropped:,}")
            queues.add_row(str(number), str(state.owner), f"{state.waiting:,}", *dropped)
    console.print(queues)
    if not is_running:
        raise typer.Exit(EXIT_FAILED)


def _console() -> Console:
    """For tables. Who reads them from a file or a pipe gets every line whole."""
    return Console(width=None if sys.stdout.isatty() else _UNBOUNDED)


def _answers(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(str(path))
        except PermissionError:
            return True
        except OSError:
            return False
    return True


def _meanings(words: type[enum.Enum]) -> dict[str, str]:
    """What is written below each member of an enumeration, by the member's name in lower case."""
    (definition,) = ast.parse(inspect.getsource(words)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for member, text in itertools.pairwise(definition.body):
        match member, text:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(meaning))):
                found[name.lower()] = " ".join(meaning.split())
    return found


def _comments() -> dict[str, str]:
    """What the table says of each of its counters."""
    return dict(re.findall(r'counter (\w+) \{ comment "(.*?)"', ruleset.template_path().read_text()))


@app.command()
def probe(
    host: Annotated[str, typer.Argument(help="Name or address.")],
    port: Annotated[int, typer.Argument(help="1..4294967295; above 65535 it is an extended port.", min=1)],
    extension: Annotated[
        int | None, typer.Option(help="Destination extension; default: the port's upper bits.")
    ] = None,
    source_extension: Annotated[int, typer.Option(help="Source extension.")] = 0,
    via: Annotated[Literal["ip", "tcp"], typer.Option(help="The header that carries the option.")] = "ip",
    max_hops: Annotated[int, typer.Option(help="Hops to try.")] = 30,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each answer.")] = 1.0,
) -> None:
    """Send SYNs that carry a port extension, hop by hop, and say in words what came back. Needs root."""
    from steerd.cli import probe as probing

    try:
        status = probing.probe(
            host,
            port,
            extension=extension,
            source_extension=source_extension,
            via=via,
            max_hops=max_hops,
            timeout=timeout,
            out=typer.echo,
        )
    except SteerdError:
        raise
    except OSError as error:
        raise SteerdError(f"{host} cannot be probed: {error.strerror}.") from error
    sys.exit(status)


@app.command()
def explain(
    capture: explaining.CaptureFile = None,
    hexadecimal: explaining.Hex = None,
    to: explaining.To = None,
    client: explaining.From = None,
    sni: explaining.Sni = None,
    host: explaining.Host = None,
    path: explaining.PathOf = None,
    key: explaining.Key = None,
    extension: explaining.DstExtension = None,
    source_extension: explaining.SrcExtension = None,
    live_seconds: explaining.Live = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Say step by step what would become of a connection, by what is in force: the daemon's registry, if it can be
    read (as root), else the configuration alone.

    Exit status: 0 steered, 1 not steered, 2 bad configuration or usage.
    """
    question = explaining.asked(
        capture, hexadecimal, live_seconds, to, client, sni, host, path, key, extension, source_extension
    )
    status = explaining.explain(configuration.load(config), question, from_registry=True, as_json=as_json)
    raise typer.Exit(status)


@session.command("list")
def list_sessions(service: Service, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """All sessions of a service, those of the configuration and those that were added."""
    found = _pages(config, "sessions", "services", service, "sessions")
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("id", "target", "source", "from", "state", title=f"sessions of {service}")
    for each in found:
        table.add_row(*(Text(text, overflow="fold") for text in _session_row(each)))
    _console().print(table)


@session.command("add")
def add_session(
    service: Service,
    session_id: SessionId,
    targets: Annotated[
        list[str], typer.Argument(help="ADDRESS:PORT, or ADDRESS:same; one for each address family.", metavar="TARGET")
    ],
    source: Annotated[str | None, typer.Option(help="The client's address. Default: the first that comes.")] = None,
    external: Annotated[bool, typer.Option("--external", help="The targets are in no pool.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Define a session, or define it anew."""
    body = {"target": [{"address": target, "external": external} for target in targets], "source": source}
    made = _ask(config, "PUT", "services", service, "sessions", session_id, body=body)
    typer.echo(json.dumps(made) if as_json else f"{made['id']}: {', '.join(made['targets'])}")


@session.command("remove")
def remove_session(
    service: Service, session_id: SessionId, config: Config = DEFAULT_CONFIG, as_json: Json = False
) -> None:
    """Forget a session that was added; its connections go on."""
    _ask(config, "DELETE", "services", service, "sessions", session_id)
    typer.echo(json.dumps({"service": service, "id": session_id}) if as_json else f"{session_id}: removed")


@lease.command("list")
def list_leases(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """All leases."""
    found = _pages(config, "leases", "leases")
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("name", "pool", "addresses", "ends", "route", "state", title="leases")
    for each in found:
        table.add_row(*(Text(text, overflow="fold") for text in _lease_row(each)))
    _console().print(table)


@lease.command("add")
def add_lease(
    name: Name,
    pool: Annotated[str, typer.Option(help="The pool that the alias is of.")],
    service: Annotated[str | None, typer.Option(help="The service whose connections the alias gets.")] = None,
    key: Conditions = None,
    source: Source = None,
    port: Annotated[str, typer.Option(help="The daemon's port on the alias; `same` is the client's.")] = "same",
    ttl: Ttl = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Give an alias of a pool to a name, and a route to it: the one it had before if that is free, else the lowest."""
    body: dict[str, Any] = {"pool": pool, "port": int(port) if port.isdecimal() else port}
    body |= {"service": service, "when": _conditions(key), "source": source, "ttl": _seconds(ttl)}
    made = _ask(config, "PUT", "leases", name, body=body)
    typer.echo(json.dumps(made) if as_json else f"{name}: {', '.join(made['addresses'])}")


@lease.command("renew")
def renew_lease(name: Name, ttl: Ttl = None, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Let a lease end later: after the time it was given, or another one, from now on."""
    made = _ask(config, "POST", "leases", name, "renew", body={"ttl": _seconds(ttl)})
    typer.echo(json.dumps(made) if as_json else f"{name}: ends {_moment(made['expires'])}")


@lease.command("release")
def release_lease(name: Name, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Take the alias from a name: its route goes, its connections end, and nobody else gets it for a while."""
    ended = _ask(config, "DELETE", "leases", name)
    text = f"{name}: released, {ended['flows']} flows ended, in quarantine until {_moment(ended['until'])}"
    typer.echo(json.dumps(ended) if as_json else text)


@route.command("list")
def list_routes(service: Service, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """All routes of a service, and where each comes from."""
    found = _pages(config, "routes", "services", service, "routes")
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("when", "source", "target", "from", "state", title=f"routes of {service}")
    for each in found:
        table.add_row(*(Text(text, overflow="fold") for text in _route_row(each)))
    _console().print(table)


@route.command("add")
def add_route(
    service: Service,
    targets: Annotated[
        list[str], typer.Argument(help="ADDRESS:PORT, or ADDRESS:same; one for each address family.", metavar="TARGET")
    ],
    key: Conditions = None,
    source: Source = None,
    external: Annotated[bool, typer.Option("--external", help="The targets are in no pool.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Define a route, or give it another target; it counts from the next connection on."""
    to = [{"address": target, "external": external} for target in targets]
    body = {"when": _conditions(key), "source": source, "target": to}
    made = _ask(config, "PUT", "services", service, "routes", body=body)
    typer.echo(json.dumps(made) if as_json else f"{_when(made)}: {', '.join(made['targets'])}")


@route.command("remove")
def remove_route(
    service: Service, key: Conditions = None, source: Source = None, config: Config = DEFAULT_CONFIG
) -> None:
    """Take a route away that was added; its connections go on."""
    query = {"when": json.dumps(_conditions(key))} | ({} if source is None else {"source": source})
    _ask(config, "DELETE", "services", service, "routes", query=query)
    typer.echo("removed")


@app.command("export")
def export_registry(config: Config = DEFAULT_CONFIG) -> None:
    """Write routes that were added, and leases, to standard output: one JSON object a line."""
    from steerd.control import client

    for piece in client.download(configuration.load(config).gateway.run_dir, "export"):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


@app.command("import")
def import_registry(
    file: Annotated[
        Path, typer.Argument(help="What `export` wrote; - is standard input.", metavar="FILE", allow_dash=True)
    ],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Add the routes and leases of a file, ten thousand at a time; nothing is removed, and what is there stays."""
    from steerd.control import client

    run_dir = configuration.load(config).gateway.run_dir
    total = {"added": 0, "changed": 0, "unchanged": 0}
    number = 1
    with sys.stdin.buffer if str(file) == "-" else _opened(file) as lines, progress_bar("lines") as progress:
        size = Path(file).stat().st_size if str(file) != "-" and Path(file).is_file() else None
        sent = 0
        while batch := list(itertools.islice(lines, _BATCH_LINES)):
            text = b"".join(batch)
            done = client.request(run_dir, "POST", "import", query={"line": str(number)}, body=text)
            total = {name: count + done[name] for name, count in total.items()}
            number += len(batch)
            sent += len(text)
            if progress is not None:
                # Of lines to come nobody knows the number, but their share of the file.
                progress(number - 1, round((number - 1) * size / sent) if size else 0)
    words = ", ".join(f"{count:,} {name}" for name, count in total.items())
    typer.echo(json.dumps(total) if as_json else words)


def _opened(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise SteerdError(f"{file} cannot be read: {error.strerror}.") from error


def _pages(config: Path, what: str, *path: str) -> list[dict[str, Any]]:
    """All of a list that the API gives in pages."""
    found: list[dict[str, Any]] = []
    after: str | None = ""
    while after is not None:
        page = _ask(config, "GET", *path, query={"after": after})
        found += page[what]
        after = page["next"]
    return found


def _conditions(written: list[str] | None) -> dict[str, str]:
    conditions = {}
    for each in written or []:
        key, equals, value = each.partition("=")
        if not equals:
            raise SteerdError(f"{each} is no condition; one is written KEY=VALUE, as in tls.sni=a.example.")
        if key in conditions:
            raise SteerdError(f"The key {key} is there twice; a route compares each key once.")
        conditions[key] = value
    return conditions


def _seconds(text: str | None) -> int | None:
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if not text[:-1].isdecimal() or text[-1:] not in units:
        raise SteerdError(f"{text} is no time; one is written 90s, 15m, 12h or 7d.")
    return int(text[:-1]) * units[text[-1]]


def _moment(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _when(route: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in route["when"].items()) or "any"


def _route_row(route: dict[str, Any]) -> tuple[str, ...]:
    origin = route["origin"] if route["place"] is None else f"static ({route['place']})"
    state = "in force" if route["usable"] else "not in force under this configuration"
    return _when(route), route["source"] or "", ", ".join(route["targets"]), origin, state


def _lease_row(lease: dict[str, Any]) -> tuple[str, ...]:
    route = lease["route"]
    shown = "" if route is None else f"{route['service']}: {_when(route)}"
    state = "in force" if lease["usable"] else "its alias is in no pool of the configuration"
    return lease["name"], lease["pool"], ", ".join(lease["addresses"]), _moment(lease["expires"]), shown, state


def _session_row(session: dict[str, Any]) -> tuple[str, ...]:
    return (
        session["id"],
        ", ".join(session["targets"]),
        session["source"] or "the first that comes",
        session["origin"],
        "in force" if session["usable"] else "refused: the configuration allows its target no more",
    )


def _ask(config: Path, method: str, *path: str, query: dict[str, str] | None = None, body: object = None) -> Any:
    from steerd.control import client

    return client.request(configuration.load(config).gateway.run_dir, method, *path, query=query, body=body)


def main() -> None:
    """The console script. Exit status: 0 fine, 1 failed, 2 bad configuration or usage."""
    try:
        app()
    except ConfigError as error:
        typer.echo(str(error), err=True)
        sys.exit(EXIT_BAD_CONFIG)
    except (SteerdError, ValueError) as error:
        typer.echo(f"steerctl: {error}", err=True)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
