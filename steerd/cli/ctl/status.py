"""`steerctl status`.

What it shows is the API's (GET /v1/status). Where no daemon answers, it is put together from what a daemon leaves
behind: counters in run_dir, the kernel's table and queues.
"""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from steerd.cli.common import Exit, meanings
from steerd.cli.ctl import ask, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json
from steerd.errors import KernelError, NoAnswerError

_SECONDS = 10.0
_MOST = 8
_LABEL = 15


def status(
    file: Annotated[Path | None, typer.Argument(help="As --config.", metavar="FILE")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every counter and every queue, and not what fits one screen.")
    ] = False,
    legend: Annotated[bool, typer.Option("--legend", help="All, and of each counter what it means.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """How it stands: what the workers decided, what the kernel's table counted, queues, conntrack.

    Without --all, what fits one screen: the largest counters of each kind, and the sum of the others.
    """
    path = file or config
    run_dir = ask.run_dir(path)
    from steerd.control import client

    try:
        state = client.request(run_dir, "GET", "status", timeout=_SECONDS)
        is_running = True
    except NoAnswerError as error:
        if not path.exists():  # the default one, else this were not reached
            raise
        state, is_running = _left_behind(path), False
        if not as_json:
            typer.echo(f"{str(error)[0].upper()}{str(error)[1:]} What it had counted:\n")
    if as_json:
        typer.echo(json.dumps({"running": is_running} | state))
    elif everything or legend:
        _print_all(state["machine"], legend)
    else:
        typer.echo("\n".join(in_short(state, is_running)))
    if not is_running:
        raise typer.Exit(Exit.NO_ANSWER)


def _left_behind(file: Path) -> dict[str, Any]:
    """What there is to see without a daemon, as the API gives it. Raises NoAnswerError if nothing was counted."""
    from steerd import config as configuration
    from steerd.kernel import queue
    from steerd.kernel.nftables import Nftables
    from steerd.model import Reason
    from steerd.telemetry.counters import Counters, Extra, Gauge

    gateway = configuration.load(file).gateway
    counters = Counters.open(Path(gateway.run_dir) / "counters")
    kernel: dict[str, int] | None = None
    queues: list[queue.QueueState | None] = [None] * gateway.workers
    # Others than root may not look.
    with contextlib.suppress(KernelError), contextlib.closing(Nftables()) as nftables:
        kernel = nftables.counters()
    with contextlib.suppress(KernelError):
        queues = queue.states_from(gateway.first_queue, gateway.workers)
    workers = [
        {
            "worker": index,
            "queue": gateway.first_queue + index,
            "is_bound": state is not None,
            "owner": None if state is None else state.owner,
            "waiting": None if state is None else state.waiting,
            "queue_dropped": None if state is None else state.queue_dropped,
            "socket_dropped": None if state is None else state.user_dropped,
        }
        for index, state in enumerate(queues)
    ]
    machine = {
        "version": None,
        "pid": None,
        "started": None,
        "refused_reload": None,
        "workers": workers,
        "decisions": counters.totals(Reason),
        "counters": counters.totals(Extra),
        "gauges": counters.totals(Gauge),
        "kernel": kernel,
        "conntrack": None,
    }
    return {"file": str(file), "machine": machine, "holds": None}


# ---- one screen ----


def in_short(state: dict[str, Any], is_running: bool) -> list[str]:
    """Lines that fit one screen, whatever was counted."""
    machine, holds = state["machine"], state["holds"]
    lines = []
    if is_running:
        since = f"{show.moment(machine['started'])}, for {show.duration(show.age(machine['started']))}"
        lines.append(f"steerd {machine['version']} runs as process {machine['pid']} since {since}.")
    if machine["refused_reload"] is not None:
        lines += _labelled("reload", f"REFUSED: {machine['refused_reload']} (`steerctl reload` says why)", most=2)
    lines += _labelled("configuration", state["file"], most=2)
    if holds is not None:
        routes = holds["static_routes"] + holds["dynamic_routes"]
        numbers = {name: holds[name] for name in ("services", "endpoints", "aliases")}
        numbers |= {"routes": routes, "leases": holds["leases"], "in quarantine": holds["quarantined"]}
        unheard = holds["unheard_targets"]
        silent = f", nobody listens on {unheard:,} (steerctl targets)" if unheard else ""
        lines += _labelled("holds", ", ".join(f"{count:,} {name}" for name, count in numbers.items()), most=2)
        lines += _labelled("targets", f"{holds['targets']:,}{silent}", most=1)
    lines += _labelled("workers", _workers(machine["workers"]), most=2)
    if machine["conntrack"] is not None:
        use = machine["conntrack"]
        share = f" ({100 * use['entries'] // use['limit']} %)" if use["limit"] else ""
        lines += _labelled("conntrack", f"{use['entries']:,} of {use['limit']:,} entries{share}", most=1)
    decisions, kernel = machine["decisions"], machine["kernel"]
    rest = {**machine["counters"], **machine["gauges"]}
    room = (show.HEIGHT - 1) - len(lines) - 4
    upper = min(_MOST, room - 3)
    lines += [""]
    lines += show.beside(
        _largest(f"decisions: {sum(decisions.values()):,}", decisions, upper),
        ["table: not readable"] if kernel is None else _largest("table inet steerd, packets", kernel, upper),
    )
    lines += [""]
    lines += _largest("workers, what else they count", rest, room - upper)
    return lines


def _labelled(label: str, text: str, most: int) -> list[str]:
    indent = " " * _LABEL
    return textwrap.wrap(
        " ".join(text.split()), show.WIDTH, initial_indent=f"{label:<{_LABEL}}", subsequent_indent=indent,
        max_lines=most, placeholder=" ...",
    )  # fmt: skip


def _workers(workers: list[dict[str, Any]]) -> str:
    def total(name: str) -> int:
        return sum(worker[name] or 0 for worker in workers)

    bound = sum(worker["is_bound"] for worker in workers)
    warning = "" if bound == len(workers) else " (THE PACKETS OF THE OTHERS ARE DROPPED)"
    dropped = f"dropped {total('queue_dropped'):,} (queue full), {total('socket_dropped'):,} (socket full)"
    return f"{bound} of {len(workers)} bound{warning}, {total('waiting'):,} packets waiting, {dropped}"


def _largest(title: str, counts: dict[str, int], most: int) -> list[str]:
    """A title, and at most so many counters: the largest ones, and the sum of the others. Those that are zero are left
    out."""
    found = sorted((item for item in counts.items() if item[1]), key=lambda item: -item[1])
    if len(found) > most:
        found, others = found[: most - 1], found[most - 1 :]
        found.append((f"{len(others)} others", sum(count for _, count in others)))
    return [title, *(f"  {name:<21} {count:>15,}" for name, count in found)]


# ---- all ----


def _print_all(machine: dict[str, Any], legend: bool) -> None:
    from rich.table import Table

    from steerd.model import Reason
    from steerd.telemetry.counters import Extra, Gauge

    console = show.console()
    more = ("meaning",) if legend else ()

    def row(name: str, count: int, meanings: dict[str, str]) -> tuple[str, ...]:
        return (name, f"{count:,}", meanings.get(name, "")) if legend else (name, f"{count:,}")

    decisions = Table("decisions by reason", "packets", *more, title="workers")
    for reason, count in machine["decisions"].items():
        if count:
            decisions.add_row(*row(reason, count, meanings(Reason)))
    said = meanings(Extra) | meanings(Gauge)
    for name, count in (machine["counters"] | machine["gauges"]).items():
        decisions.add_row(*row(name, count, said))
    console.print(decisions)

    kernel = Table("counter", "packets", *more, title="table inet steerd")
    comments = _comments() if legend else {}
    for name, packets in sorted((machine["kernel"] or {}).items()):
        kernel.add_row(*row(name, packets, comments))
    console.print(kernel)

    queues = Table("queue", "owner", "waiting", "dropped: queue full", "dropped: socket full", title="queues")
    for worker in machine["workers"]:
        if worker["owner"] is None:
            queues.add_row(str(worker["queue"]), "nobody: its packets are dropped", "", "", "")
        else:
            counts = (f"{worker[name]:,}" for name in ("waiting", "queue_dropped", "socket_dropped"))
            queues.add_row(str(worker["queue"]), str(worker["owner"]), *counts)
    console.print(queues)


def _comments() -> dict[str, str]:
    """What the table says of each of its counters."""
    from steerd.kernel import ruleset

    return dict(re.findall(r'counter (\w+) \{ comment "(.*?)"', ruleset.template_path().read_text()))
