"""Floods: what steerd's CPU time is under them, and what becomes of good connections meanwhile.

Topology, floods and good connections are those of tests/netns/test_late_failure.py: a gateway with the limits that it
has by default, a late service, and two floods at a time, one of each family, from random spoofed addresses. In turn,
round by round:

- *none*: no flood, for comparison;
- *syn*: SYNs without anything;
- *payload*: segments with whole requests, with a cookie that is wrong; *piece*: with the beginning of one, each three
  times, as often as makes steerd acknowledge a real client's.

Under each: the CPU time of steerd (workers and main process) in WATCHED_SECONDS, and then GOOD connections of clients
that nobody knows yet, 25 at a time in each family: how many get their answer, and how fast they all are. A flood's rate
is what the gateway's table counted. The generator is a Python program; how much of a core it takes is told.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from contextlib import ExitStack
from typing import NamedTuple

from rich.console import Console

from steerd.telemetry.counters import Counters, Extra
from tests.bench import memory, report
from tests.bench.scenario import Bar, Chart, Goal, Result, Spread, count_of, rounds_of, spread
from tests.netns.gateway import Gateway
from tests.netns.lab import Host
from tests.netns.test_late_failure import clients, entries, open_to_strangers, start_floods, tally

KINDS = ("none", "syn", "payload", "piece")
LABELS = {
    "none": "no flood",
    "syn": "SYNs",
    "payload": "junk payloads",
    "piece": "beginnings of requests",
}
ROUNDS = rounds_of(3)
GOOD = count_of(500)
"""Of each family."""
WATCHED_SECONDS = 3.0
_ON_SECONDS = 1.0
# They are ended before.
_LONG_ENOUGH = 150
_ARRIVED = ("answered", "diverted", "over_strangers", "over_source", "over_total")


class Watched(NamedTuple):
    """One round."""

    flood_per_s: float
    """Packets that the table saw, both families."""
    upcalls_per_s: float
    workers: float
    """Cores."""
    main: float
    generator: float
    entries: int
    """In conntrack, of the endpoint."""
    success: float
    """Share of the good connections that were answered by their daemons."""
    good_per_s: float


class Bench:
    """The gateway."""

    def __init__(self, lab: Gateway) -> None:
        assert lab.daemon is not None
        self._lab = lab
        self._workers = [str(event["pid"]) for event in lab.events() if event["event"] == "worker bound"]
        self._main = [str(lab.daemon.pid)]
        self.not_genuine = Counters.open(lab.directory / "run" / "counters")

    def measure(self, kind: str) -> Watched:
        """A round under one kind of flood."""
        floods = [] if kind == "none" else start_floods(self._lab, kind, _LONG_ENOUGH)
        time.sleep(_ON_SECONDS)
        pids = {"workers": self._workers, "main": self._main, "generator": [str(each.pid) for each in floods]}
        cpu = {name: memory.cpu_seconds(each) for name, each in pids.items()}
        counted, began = self._lab.counters(), time.monotonic()
        time.sleep(WATCHED_SECONDS)
        seconds, after = time.monotonic() - began, self._lab.counters()
        cores = {name: (memory.cpu_seconds(each) - cpu[name]) / seconds for name, each in pids.items()}
        rates = {name: (after[name] - counted[name]) / seconds for name in _ARRIVED if name in after}
        found = entries(self._lab)
        success, good_per_s = self._good()
        self._end(floods)
        return Watched(sum(rates.values()), rates["diverted"], **cores, entries=found,
                       success=success, good_per_s=good_per_s)  # fmt: skip

    def _good(self) -> tuple[float, float]:
        began = time.monotonic()
        tallies = [tally(process) for process in clients(self._lab, GOOD, "strangers")]
        seconds = time.monotonic() - began
        good, wrong, failed, twice = map(sum, zip(*tallies, strict=True))
        if wrong or twice:
            raise SystemExit(f"bench: {wrong} connections were answered by the wrong daemon, {twice} answered twice")
        return good / (good + failed), good / seconds

    def _end(self, floods: list[subprocess.Popen[str]]) -> None:
        if any(each.poll() is not None for each in floods):
            raise SystemExit("bench: a flood ended before the good connections did, so nothing was shown")
        for each in floods:
            each.kill()
            each.wait()


def run(console: Console) -> Result:
    """All kinds in turn; about three minutes."""
    with ExitStack() as stack:

        def new_host(role: str) -> Host:
            host = Host(role)
            stack.callback(host.close)
            return host

        lab = stack.enter_context(open_to_strangers(new_host))
        lab.expected_warnings.append("queues overflowed; the clients will repeat")
        bench = Bench(lab)
        rounds: dict[str, list[Watched]] = {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):
            for kind, found in rounds.items():
                found.append(bench.measure(kind))
        not_genuine = bench.not_genuine.total(Extra.NOT_GENUINE)
    figures = {
        kind: {
            "flood_per_s": round(statistics.median(w.flood_per_s for w in found)),
            "upcalls_per_s": round(statistics.median(w.upcalls_per_s for w in found)),
            "workers_cores": report.rounded(spread([w.workers for w in found]), 4),
            "main_process_cores": report.rounded(spread([w.main for w in found]), 4),
            "generator_cores": round(statistics.median(w.generator for w in found), 2),
            "conntrack_entries": max(w.entries for w in found),
            "good_success": report.rounded(spread([w.success for w in found]), 5),
            "good_per_s": report.rounded(spread([w.good_per_s for w in found]), 0),
        }
        for kind, found in rounds.items()
    }
    ratios: dict[str, Spread] = {}
    for kind in KINDS[1:]:
        ratios[f"{kind}_good_success"] = spread([w.success for w in rounds[kind]])
        ratios[f"{kind}_good_rate/none"] = report.paired(
            (w.good_per_s for w in rounds[kind]), (w.good_per_s for w in rounds["none"])
        )
        ratios[f"{kind}_workers_cores"] = spread([w.workers for w in rounds[kind]])
    _show(console, figures)
    report.show_ratios(console, ratios)
    bars = [
        Bar(LABELS[kind], spread([w.workers + w.main for w in found]), ours=True,
            note=f"{figures[kind]['flood_per_s']:,}/s; {statistics.median(w.success for w in found):.1%} served")
        for kind, found in rounds.items()
    ]  # fmt: skip
    chart = Chart("cpu", "steerd's CPU time under floods, in cores (less is better)", bars)
    goals = [Goal(f"{kind}_good_success", 0.99) for kind in KINDS[1:]]
    conditions = {"rounds": ROUNDS, "good_of_each_family": GOOD, "watched_s": WATCHED_SECONDS}
    return Result("floods", ratios, {**figures, "not_genuine": not_genuine, "conditions": conditions}, goals, [chart])


def _show(console: Console, figures: dict[str, dict[str, object]]) -> None:
    table = report.table("floods (medians)", "", *(name.replace("_", " ") for name in figures["none"]))
    for kind, found in figures.items():
        table.add_row(kind, *(_shown(value) for value in found.values()))
    console.print(table)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        value = value["median"]
    return f"{value:,}"
