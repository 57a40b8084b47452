"""`steerctl status`."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path
from typing import Annotated

import typer

from steerd.cli.common import Exit, meanings
from steerd.cli.ctl import show
from steerd.cli.options import DEFAULT_CONFIG, ConfigFile


def status(
    file: ConfigFile = DEFAULT_CONFIG,
    legend: Annotated[bool, typer.Option("--legend", help="Say of each counter what it means.")] = False,
) -> None:
    """What the workers decided, what the kernel's table counted, and how the queues stand."""
    from rich.table import Table

    from steerd import config as configuration
    from steerd import daemon
    from steerd.control.client import socket_path
    from steerd.kernel import queue
    from steerd.kernel.nftables import Nftables
    from steerd.model import Reason
    from steerd.telemetry.counters import Counters, Extra

    gateway = configuration.load(file).gateway
    counters = Counters.open(Path(gateway.run_dir) / "counters")
    console = show.console()
    is_running = _answers(socket_path(gateway.run_dir))
    if not is_running:
        typer.echo(f"Nobody answers at {socket_path(gateway.run_dir)}: steerd does not run. What it had counted:\n")

    def row(name: str, count: int, meanings: dict[str, str]) -> tuple[str, ...]:
        return (name, f"{count:,}", meanings[name]) if legend else (name, f"{count:,}")

    more = ("meaning",) if legend else ()
    decisions = Table("decisions by reason", "packets", *more, title="workers")
    reasons, extras = meanings(Reason), meanings(Extra)
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
        raise typer.Exit(Exit.NO_ANSWER)


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


def _comments() -> dict[str, str]:
    """What the table says of each of its counters."""
    from steerd.kernel import ruleset

    return dict(re.findall(r'counter (\w+) \{ comment "(.*?)"', ruleset.template_path().read_text()))
