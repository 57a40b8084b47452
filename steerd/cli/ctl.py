"""`steerctl`: for operators. Looks at a running steerd, and probes an extended port from a client's side."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steerd import config as configuration
from steerd.cli.main import DEFAULT_CONFIG, EXIT_BAD_CONFIG, EXIT_FAILED, ConfigFile
from steerd.errors import ConfigError, SteerdError
from steerd.telemetry.counters import Counters, Extra

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
session = typer.Typer(no_args_is_help=True, help="Sessions: which session id belongs to which target and source.")
app.add_typer(session, name="session")

Service = Annotated[str, typer.Argument(help="Name of the service.")]
SessionId = Annotated[str, typer.Argument(help="What clients say.", metavar="ID")]
Config = Annotated[Path, typer.Option(help="The daemon's configuration, in TOML.", metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


@app.command()
def status(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """What the workers decided, what the kernel's table counted, and how the queues stand."""
    from steerd import daemon
    from steerd.kernel import queue
    from steerd.kernel.nftables import Nftables

    gateway = configuration.load(file).gateway
    counters = Counters.open(Path(gateway.run_dir) / "counters")
    console = Console()

    decisions = Table("decisions by reason", "packets", title="workers")
    for reason, count in daemon.total_decisions(counters).items():
        if count:
            decisions.add_row(reason, f"{count:,}")
    for extra in Extra:
        decisions.add_row(extra.name.lower(), f"{counters.total(extra):,}")
    console.print(decisions)

    kernel = Table("counter", "packets", title="table inet steerd")
    with contextlib.closing(Nftables()) as nftables:
        for name, packets in sorted(nftables.counters().items()):
            kernel.add_row(name, f"{packets:,}")
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


@session.command("list")
def list_sessions(service: Service, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """All sessions of a service, those of the configuration and those that were added."""
    path = ("services", service, "sessions")
    found: list[dict[str, Any]] = []
    after: str | None = ""
    while after is not None:
        page = _ask(config, "GET", *path, query={"after": after})
        found += page["sessions"]
        after = page["next"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("id", "target", "source", "from", "state", title=f"sessions of {service}")
    for each in found:
        table.add_row(*(Text(text, overflow="fold") for text in _session_row(each)))
    Console().print(table)


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
