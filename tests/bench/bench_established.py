"""Established connections: what they carry and how fast they answer, against plain kernel DNAT and HAProxy.

Gateways and kinds: tests/bench/byname.py. `late` connections are opened by the name in a TLS hello (tests/vectors), and
have the most to be translated: addresses, ports, and sequence numbers. `early` ones are opened by a port extension, an
IP option on every packet, and are compared with DNAT whose clients carry the same (`dnat_option`). Once they stand:

- exchanges: 64 bytes there and back, 1 and 64 connections at a time; p50 and p99 are times, less is better;
- bulk: 1 and 64 connections at a time, up and down. HAProxy splices, so that payload stays in the kernel.

steerd's and DNAT's packets take the same way, through conntrack alone, with no process in it, but steerd's pass the
chains of its table as well. `hooks` is DNAT with these chains beside it, empty: what the kernel takes to come by them,
whatever is in them, and so the least that a table that guards aliases can cost. In runs of a few minutes on a machine
of the cloud an exchange of 20 us took longer by 9 to 23 % (`late`), by 6 to 10 % (`early`), and by 1 % with the chains
empty; one at a time, rounds of the same kind differ by up to 30 %. It is 0.5 us a packet: its way through six chains,
and, of late connections, two sequence numbers to be translated.

A round of bulk carries half a gigabyte or more and takes no longer than a second.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench import byname, report
from tests.bench.byname import LABELS, Kind, kinds
from tests.bench.lab import PARTS, Bulk, Exchange, Run
from tests.bench.peers import Choice
from tests.bench.scenario import Bar, Chart, Goal, Result, Spread, count_of, rounds_of, spread

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
HELLO = (VECTORS / "tls-curl-7.88.1-get.bin").read_bytes().replace(byname.CAPTURED_NAME, byname.NAME_TEMPLATE)
ECHO = Run("echo", len(HELLO), first=0, size=1)
SINK = Run("sink", len(HELLO), first=1, size=1)
SOURCE = Run("source", len(HELLO), first=2, size=1)
ROUNDS = rounds_of(9)
BULK_ROUNDS = rounds_of(5)
EXCHANGE_COUNTS = {1: count_of(6000), 64: count_of(300)}
AT_A_TIME = (1, 64)
SYSTEMS = ("late", "dnat", "haproxy", "hooks")
KINDS = (
    *kinds(SYSTEMS, HELLO),
    *kinds(SYSTEMS[:2], HELLO, "6", 6),
    Kind("early", "late", HELLO, extended=True),
    Kind("dnat_option", "dnat", HELLO, extended=True),
)
PAIRS = (
    ("late", "dnat"),
    ("late", "haproxy"),
    ("late6", "dnat6"),
    ("early", "dnat_option"),
    ("hooks", "dnat"),
    ("late", "hooks"),
)
AGAINST_DNAT = ("late/dnat", "late6/dnat6", "early/dnat_option")

Exchanges = Mapping[int, Mapping[str, Sequence[Exchange]]]
"""By how many at a time, and kind."""
Carried = Mapping[tuple[str, int], Mapping[str, Sequence[Bulk]]]
"""By way (up, down), how many at a time, and kind."""


def run(console: Console) -> Result:
    """All kinds in turn; about four minutes."""
    with ExitStack() as stack:
        bench = byname.Bench(stack, console, Choice.TLS, [ECHO, SINK, SOURCE], SYSTEMS)
        exchanges = {
            parallel: bench.in_turn(
                f"exchanges, {parallel} at a time", ROUNDS, KINDS,
                partial(bench.lab.exchanges, run=ECHO, count=count, parallel=parallel),
            )
            for parallel, count in EXCHANGE_COUNTS.items()
        }  # fmt: skip
        carried = {
            (way, parallel): bench.in_turn(
                f"bulk {way}, {parallel} at a time", BULK_ROUNDS, KINDS,
                partial(bench.lab.bulk, run=daemon, parallel=parallel),
            )
            for way, daemon in (("up", SINK), ("down", SOURCE))
            for parallel in AT_A_TIME
        }  # fmt: skip
    figures: dict[str, Any] = {kind.name: _figures(kind.name, exchanges, carried) for kind in KINDS}
    figures["conditions"] = {
        "rounds": ROUNDS, "bulk_rounds": BULK_ROUNDS, "message_bytes": 64, "parts": PARTS, "all_on_one_machine": True,
        "void_rounds": bench.lab.void,
    }  # fmt: skip
    ratios: dict[str, Spread] = {}
    for ours, theirs in PAIRS:
        ratios |= _ratios(ours, theirs, exchanges, carried)
    report.show_ratios(console, ratios)
    _show(console, figures)
    return Result("established", ratios, figures, _goals(), _charts(exchanges, carried))


def _figures(kind: str, exchanges: Exchanges, carried: Carried) -> dict[str, Any]:
    return {
        "exchange": {
            f"{parallel}_at_a_time": {
                "per_s": round(statistics.median(e.rate for e in measured[kind])),
                "p50_us": round(statistics.median(e.p50_us for e in measured[kind]), 1),
                "p99_us": round(statistics.median(e.p99_us for e in measured[kind]), 1),
            }
            for parallel, measured in exchanges.items()
        },
        "bulk": {
            f"{way}_{parallel}_at_a_time": {
                "gbit_per_s": report.rounded(spread([b.bits_per_s / 1e9 for b in measured[kind]]), 2),
                "cpu_ms_per_mb": round(statistics.mean(b.cpu_ms_per_mb for b in measured[kind]), 3),
            }
            for (way, parallel), measured in carried.items()
        },
    }


def _ratios(ours: str, theirs: str, exchanges: Exchanges, carried: Carried) -> dict[str, Spread]:
    ratios = {}
    for parallel, measured in exchanges.items():
        us, them = measured[ours], measured[theirs]
        name = f"exchange_{parallel}_{{}}_{ours}/{theirs}"
        ratios[name.format("p50")] = report.paired((e.p50_us for e in us), (e.p50_us for e in them))
        ratios[name.format("p99")] = report.paired((e.p99_us for e in us), (e.p99_us for e in them))
    for (way, parallel), carrying in carried.items():
        ratios[f"bulk_{way}_{parallel}_{ours}/{theirs}"] = report.paired(
            (b.bits_per_s for b in carrying[ours]), (b.bits_per_s for b in carrying[theirs])
        )
        ratios[f"bulk_{way}_{parallel}_{ours}/{theirs}_per_cpu_second"] = report.paired(
            (b.cpu_ms_per_mb for b in carrying[theirs]), (b.cpu_ms_per_mb for b in carrying[ours])
        )
    return ratios


def _goals() -> list[Goal]:
    goals = [
        Goal(f"exchange_{parallel}_{time}_{pair}", 1.05, at_least=False)
        for pair in AGAINST_DNAT
        for parallel in EXCHANGE_COUNTS
        for time in ("p50", "p99")
    ]
    bounds = dict.fromkeys(AGAINST_DNAT, 0.97) | {"late/haproxy": 1.3}
    return goals + [
        Goal(f"bulk_{way}_{parallel}_{pair}", bound)
        for pair, bound in bounds.items()
        for way in ("up", "down")
        for parallel in AT_A_TIME
    ]


def _charts(exchanges: Exchanges, carried: Carried) -> list[Chart]:
    bulk = [
        Bar(
            f"{LABELS[system]}, {way}, {parallel} at a time",
            report.paired((b.bits_per_s for b in measured[system]), (b.bits_per_s for b in measured["dnat"])),
            ours=system == "late",
            note=f"{statistics.median(b.bits_per_s for b in measured[system]) / 1e9:.1f} Gbit/s",
        )
        for (way, parallel), measured in carried.items()
        for system in ("late", "haproxy")
    ]
    times = [
        Bar(
            f"{LABELS[system]}, {time}, {parallel} at a time",
            report.paired((getattr(e, field) for e in measured[system]), (getattr(e, field) for e in measured["dnat"])),
            ours=system == "late",
            note=f"{statistics.median(getattr(e, field) for e in measured[system]):.0f} us",
        )
        for parallel, measured in exchanges.items()
        for time, field in (("p50", "p50_us"), ("p99", "p99_us"))
        for system in ("late", "haproxy")
    ]
    return [
        Chart("bulk", "Established connections: bytes a second as a ratio to DNAT (more is better)", bulk, 1),
        Chart("exchange", "Established connections: request and response, time as a ratio to DNAT (less is better)",
              times, 1),
    ]  # fmt: skip


def _show(console: Console, figures: Mapping[str, Any]) -> None:
    exchanges = report.table(
        "request and response in us (p50 / p99)", "", *(f"{parallel} at a time" for parallel in EXCHANGE_COUNTS)
    )
    ways = [f"{way}_{parallel}_at_a_time" for way in ("up", "down") for parallel in AT_A_TIME]
    bulk = report.table("Gbit/s; CPU ms a MB", "", *(way.replace("_", " ") for way in ways))
    for kind in KINDS:
        found = figures[kind.name]
        times = found["exchange"].values()
        exchanges.add_row(kind.name, *(f"{us['p50_us']:.0f} / {us['p99_us']:.0f}" for us in times))
        cells = []
        for way in ways:
            rate = found["bulk"][way]["gbit_per_s"]
            text = f"{rate['median']:.1f} ({rate['lowest']:.1f}-{rate['highest']:.1f})"
            cells.append(f"{text}; {found['bulk'][way]['cpu_ms_per_mb']:.2f}")
        bulk.add_row(kind.name, *cells)
    console.print(exchanges)
    console.print(bulk)
