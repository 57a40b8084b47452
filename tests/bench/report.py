"""What scenarios make of their rounds of connections: figures for the JSON line, ratios, tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.lab import Round
from tests.bench.scenario import Bar, Chart, Spread, spread

Rounds = Mapping[str, Sequence[Round]]
"""By the name of what was measured, in the order of measuring."""
_AT_A_TIME = ("1 at a time", "32 at a time")


def figures(rounds: Sequence[Round], latency: Mapping[int, Sequence[Round]]) -> dict[str, Any]:
    """Of one kind: from rounds for the rate, and rounds for latency at so many connections at a time."""
    cpu = {name: statistics.mean(r.cpu_us[name] for r in rounds) for name in rounds[0].cpu_us}
    return {
        "connections_per_s": rounded(spread([r.rate for r in rounds]), 0),
        "retried": sum(r.retried for r in rounds),
        "failed": sum(r.failed for r in rounds),
        "cpu_us_per_connection": {name: round(microseconds, 1) for name, microseconds in cpu.items()},
        "generator_cores": round(statistics.mean(r.generator_cores for r in rounds), 2),
        "first_byte_us": {
            f"{parallel}_at_a_time": {
                "p50": round(statistics.median(r.p50_us for r in measured)),
                "p99": round(statistics.median(r.p99_us for r in measured)),
            }
            for parallel, measured in latency.items()
        },
    }


def median_of(rounds: Sequence[Round], field: str) -> float:
    """Of one of the fields."""
    values: list[float] = [getattr(r, field) for r in rounds]
    return statistics.median(values)


def rounded(value: Spread, digits: int) -> dict[str, float]:
    """A spread for the JSON line."""
    return {name: round(number, digits) for name, number in value._asdict().items()}


def paired(ours: Iterable[float], theirs: Iterable[float]) -> Spread:
    """Ratios round by round, since what disturbs the machine for a while disturbs neighbours alike."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def rate_ratio(measured: Rounds, ours: str, theirs: str) -> Spread:
    """Connections a second."""
    return paired((r.rate for r in measured[ours]), (r.rate for r in measured[theirs]))


def cpu_ratio(measured: Rounds, ours: str, theirs: str, *, without: str = "") -> Spread:
    """Connections for each second of CPU time of client, server and system, which holds on a busy machine too.
    `without`: a part of ours that is not to count."""
    return paired(
        (r.cpu_us["all"] for r in measured[theirs]),
        (r.cpu_us["all"] - (r.cpu_us[without] if without else 0) for r in measured[ours]),
    )


def rate_chart(
    measured: Rounds, ours: str, systems: Mapping[str, str], dnat: str = "dnat", what: str = "connections"
) -> Chart:
    """How many a second each of `systems` (kinds, and what a reader calls them) opens, as ratios to DNAT, round by
    round, and their median."""
    bars = [
        Bar(
            label,
            rate_ratio(measured, kind, dnat),
            ours=kind == ours,
            note=f"{median_of(measured[kind], 'rate'):,.0f} /s" + _losses(measured[kind]),
        )
        for kind, label in systems.items()
    ]
    title = f"New {what} a second, as a ratio to DNAT in the same run (more is better)"
    return Chart(what.replace(" ", "-"), title, bars, reference=1)


def cpu_chart(
    found: Mapping[str, Any], ours: str, systems: Mapping[str, str], dnat: str = "dnat", what: str = "connections"
) -> Chart:
    """From the figures of kinds: how many each of `systems` opens for a second of CPU time, as ratios to DNAT, which
    holds on a busy machine, too; microseconds of CPU time for each behind it."""
    used = {kind: found[kind]["cpu_us_per_connection"]["all"] for kind in (*systems, dnat)}
    bars = [
        Bar(label, used[dnat] / used[kind], ours=kind == ours, note=f"{used[kind]:.0f} us of CPU each")
        for kind, label in systems.items()
    ]
    title = f"New {what} for each second of CPU time of client, server and system, as a ratio to DNAT (more is better)"
    return Chart(f"cpu-{what.replace(' ', '-')}", title, bars, reference=1)


def latency_chart(measured: Rounds, ours: str, systems: Mapping[str, str]) -> Chart:
    """Connect to first byte, one at a time, as ratios to DNAT; p50 and p99 behind it."""
    bars = [
        Bar(
            label,
            paired((r.p50_us for r in measured[name]), (r.p50_us for r in measured["dnat"])),
            ours=name == ours,
            note=f"p50 {median_of(measured[name], 'p50_us'):.0f} us, p99 {median_of(measured[name], 'p99_us'):.0f} us",
        )
        for name, label in systems.items()
    ]
    title = "Connect to first byte of the answer, one at a time: p50 as a ratio to DNAT (less is better)"
    return Chart("latency", title, bars, reference=1)


def _losses(rounds: Sequence[Round]) -> str:
    if not any(r.failed for r in rounds):
        return ""
    lost = statistics.mean(r.failed / (r.failed + r.good) for r in rounds)
    return f", and {lost:.0%} fail"


def show_ratios(console: Console, ratios: Mapping[str, Spread]) -> None:
    """One a line."""
    for name, ratio in ratios.items():
        console.print(f"{name} = {ratio.median:.3f} ({ratio.lowest:.3f} - {ratio.highest:.3f})", highlight=False)


def show(console: Console, measured: Rounds, found: Mapping[str, Any]) -> None:
    """The tables of rates, latency and CPU time; `found`: the figures of each kind."""
    rates = table("connect to first byte in us (p50 / p99)", "", "connections/s, median", *_AT_A_TIME)
    for name, rounds in measured.items():
        latency = [f"{us['p50']} / {us['p99']}" for us in found[name]["first_byte_us"].values()]
        rates.add_row(name, str(spread([r.rate for r in rounds])), *latency)
    console.print(rates)
    columns = ("client_user", "client_kernel", "server", "system_user", "system_kernel", "all")
    parts = table(
        "CPU time, us a connection (kernel work is charged to whoever it interrupts)",
        "", *(column.replace("_", " ") for column in columns), "load, cores",
    )  # fmt: skip
    for name in measured:
        cpu = found[name]["cpu_us_per_connection"]
        cells = [f"{cpu[column]:.1f}" if column in cpu else "" for column in columns]
        parts.add_row(name, *cells, str(found[name]["generator_cores"]))
    console.print(parts)


def table(title: str, *columns: str) -> Table:
    """An empty one; the first column is for names."""
    made = Table(title=title)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=not number)
    return made
