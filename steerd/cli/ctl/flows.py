"""`steerctl flows`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from steerd.cli.common import UsageError, new_app
from steerd.cli.ctl import ask, complete, given, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json

app = new_app(alone=True)

_KILL_SECONDS = 600.0

Client = Annotated[str | None, typer.Option(help="Only of this address or prefix.", metavar="PREFIX")]
Service = Annotated[str | None, typer.Option(help="Only of this service.", autocompletion=complete.services)]
Target = Annotated[str | None, typer.Option(help="Only to this target.", metavar="ADDRESS[:PORT]")]
Lease = Annotated[str | None, typer.Option(help="Only to the alias of this lease.", autocompletion=complete.leases)]


@app.callback(invoke_without_command=True)
def list_flows(
    context: typer.Context,
    client: Client = None,
    service: Service = None,
    target: Target = None,
    lease: Lease = None,
    limit: given.Limit = None,
    over: Annotated[
        bool, typer.Option("--over", help="Also those that are closed, which the kernel keeps for a while.")
    ] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """What goes where now: connections and flows of datagrams that were steered, as the kernel's conntrack knows them.
    With --json, a JSON object a line.

    The kernel does not know which key decided; shown is the route that leads to the target, where exactly one does. It
    knows how old a flow is only with the sysctl net.netfilter.nf_conntrack_timestamp=1, set before the flow began.
    """
    chosen = _chosen(client, service, target, lease)
    if context.invoked_subcommand is not None:
        if chosen:
            raise UsageError(f"What is said before `{context.invoked_subcommand}` would not count; say it behind.")
        return
    if over:
        chosen["over"] = "true"
    if as_json:
        for piece in _pieces(config, chosen | ({} if limit is None else {"limit": str(limit)})):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    at_most = limit or show.SHOWN
    found = [json.loads(line) for line in islice(_lines(config, chosen | {"limit": str(at_most + 1)}), at_most + 1)]
    columns = ("", "client", "endpoint", "target", "service", "lease", "key", "state", "age", "idle end")
    show.table(show.List("flows", columns, _row), found[:at_most], is_all=len(found) <= at_most)


@app.command("kill")
def kill_flows(
    client: Client = None,
    service: Service = None,
    target: Target = None,
    lease: Lease = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """End flows: the daemon's socket on this machine is closed, and the kernel forgets the flow, so that nothing of it
    passes any more. What the client begins anew is decided anew.

    Clients of daemons on this machine are reset. A daemon on another host, or in another network namespace, is not
    told, and its client may hear of it late, or not at all. A client of datagrams is not told: its next one is decided
    anew.
    """
    from steerd.control import client as api

    chosen = _chosen(client, service, target, lease)
    if not chosen:
        raise UsageError("Say which flows are to end: --client, --service, --target or --lease.")
    if not yes:
        by_target = Counter(json.loads(line)["target"] for line in _lines(config, chosen))
        typer.echo(f"{by_target.total():,} flows to {len(by_target):,} targets.", err=True)
        if not by_target:
            typer.echo(json.dumps({"flows": 0}) if as_json else "0 flows ended")
            return
        typer.confirm("End them?", abort=True, err=True)
    ended = api.request(ask.run_dir(config), "DELETE", "flows", query=chosen, timeout=_KILL_SECONDS)
    show.said(ended, f"{ended['flows']:,} flows ended", as_json)


def _chosen(client: str | None, service: str | None, target: str | None, lease: str | None) -> dict[str, str]:
    given = {"client": client, "service": service, "target": target, "lease": lease}
    return {name: text for name, text in given.items() if text is not None}


def _pieces(config: Path, query: dict[str, str]) -> Iterator[bytes]:
    from steerd.control import client

    return client.download(ask.run_dir(config), "flows", query=query)


def _lines(config: Path, query: dict[str, str]) -> Iterator[bytes]:
    rest = b""
    for piece in _pieces(config, query):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def _row(flow: dict[str, Any]) -> tuple[str, ...]:
    key = "" if flow["when"] is None else show.conditions(flow)
    return (
        flow["protocol"],
        flow["client"],
        flow["endpoint"],
        flow["target"],
        flow["service"],
        flow["lease"] or "",
        key,
        flow["state"] or "",
        "" if flow["age"] is None else show.duration(flow["age"]),
        show.duration(flow["seconds_left"]),
    )
