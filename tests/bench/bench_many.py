"""500,000 concurrent connections through one gateway, and what each part of them costs.

One gateway (tests/bench/lab.py) with steerd, late by HTTP Host, half of the connections IPv4 and half IPv6, in STEPS of
as many. After each step: the rate at which its connections were opened (is it still the first step's?), and memory by
parts. Client and server programs are many, since a process may have 20,000 files open on some machines. At the end
every single connection has to bring a byte there and back, and steerd's CPU time is measured while they are idle.

What was found (results/many.json): all 500,000 stood, and were opened at the same rate from the first to the last. Of
8.7 KB each, 8.1 KB are the two ends' sockets and files; conntrack's entry takes 256 bytes, and up to 240 more for its
extensions (translation, synproxy's numbers). steerd's processes have 160 MB, and no more than with 100,000: what a
worker remembers of decided connections is forgotten after a minute, and bounded (core.pending.Limits.remembered).

This takes 6 GB, and more conntrack entries than most machines allow: the limit (nf_conntrack_max) belongs to the
machine, not to a namespace. So it is raised while this runs, which is said, and put back at the end, also when this is
interrupted; only SIGKILL leaves it raised.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench import byname, memory, report
from tests.bench.bench_idle import DAEMONS, REQUEST, way
from tests.bench.lab import Held, Lab, Programs, VoidRoundError
from tests.bench.memory import Memory
from tests.bench.peers import Choice
from tests.bench.scenario import Bar, Chart, Goal, Result, count_of

CONNECTIONS = count_of(500_000)
STEPS = 5
A_CLIENT = count_of(10_000)
SERVERS = 28
PARALLEL = 64
IDLE_SECONDS = 10.0
SETTLE_SECONDS = 2.0
MAX_VOID = 3
_LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")


@contextmanager
def room_in_conntrack(entries: int, console: Console) -> Iterator[None]:
    """For so many, on this machine, until the block ends."""
    before = _LIMIT.read_text().strip()
    if int(before) >= entries:
        yield
        return
    console.print(
        f"This raises net.netfilter.nf_conntrack_max of this machine from {before} to {entries} while it runs."
    )
    try:
        _LIMIT.write_text(f"{entries}\n")
        yield
    finally:
        _LIMIT.write_text(f"{before}\n")
        console.print(f"net.netfilter.nf_conntrack_max is {_LIMIT.read_text().strip()} again.")


class Bench:
    """The gateway, and what is open."""

    def __init__(self, stack: ExitStack) -> None:
        self._lab = Lab(stack, [DAEMONS], Programs("hold"), SERVERS)
        self._gateway = self._lab.gateway("steered")
        self._lab.steerd(self._gateway, byname.routes(Choice.HTTP, DAEMONS.size))
        self.held: list[Held] = []
        self.void = 0

    def warm_up(self) -> None:
        """Puts all targets into the kernel's maps."""
        for version in (4, 6):
            self._hold(version, 8 * DAEMONS.size).release()
        time.sleep(SETTLE_SECONDS)

    def open(self, count: int) -> float:
        """So many more; the rate."""
        seconds = 0.0
        for number in range(count // A_CLIENT):
            held = self._hold((4, 6)[number % 2], A_CLIENT)
            self.held.append(held)
            seconds += held.seconds
        return count / seconds

    def _hold(self, version: int, count: int) -> Held:
        """A client that fails is counted, and another one tries."""
        while True:
            try:
                return self._lab.hold(way(self._gateway, "late", version), DAEMONS, count, PARALLEL)
            except VoidRoundError:
                self.void += 1
                if self.void > MAX_VOID:
                    raise

    def memory(self) -> dict[str, int]:
        """Bytes now, by part."""
        main, *workers = self._gateway.system_pids()
        found: Memory = memory.taken([])
        return {
            "main_process": memory.share(main),
            "workers": sum(map(memory.share, workers)),
            **found.kernel,
        }

    def entries(self) -> int:
        """In the gateway's conntrack."""
        return int(self._gateway.host.sh("cat /proc/sys/net/netfilter/nf_conntrack_count"))

    def idle_cores(self) -> float:
        """Cores that steerd takes while nobody says anything."""
        pids = self._gateway.system_pids()
        cpu, began = memory.cpu_seconds(pids), time.monotonic()
        time.sleep(IDLE_SECONDS)
        return (memory.cpu_seconds(pids) - cpu) / (time.monotonic() - began)


def run(console: Console) -> Result:
    """All steps; about four minutes."""
    with ExitStack() as stack:
        stack.enter_context(room_in_conntrack(2 * CONNECTIONS, console))
        bench = Bench(stack)
        bench.warm_up()
        idle_before = bench.idle_cores()
        before = bench.memory()
        rates: list[float] = []
        steps: list[dict[str, float]] = []
        for step in range(1, STEPS + 1):
            rates.append(bench.open(CONNECTIONS // STEPS))
            time.sleep(SETTLE_SECONDS)
            now = bench.memory()
            cost = {name: (now[name] - before[name]) / (CONNECTIONS * step // STEPS) for name in now}
            steps.append(cost)
            console.print(f"{CONNECTIONS * step // STEPS:,} open; the last ones at {rates[-1]:,.0f} a second")
        entries, idle = bench.entries(), bench.idle_cores()
        alive = sum(held.still_there() for held in bench.held)
    if alive < CONNECTIONS:
        raise SystemExit(f"bench: only {alive} of {CONNECTIONS} connections were still there at the end")
    table = report.table("bytes a connection, both ends included", "open", "opened/s", *steps[0])
    for step, (rate, cost) in enumerate(zip(rates, steps, strict=True), 1):
        parts = (f"{value:,.1f}" for value in cost.values())
        table.add_row(f"{CONNECTIONS * step // STEPS:,}", f"{rate:,.0f}", *parts)
    console.print(table)
    figures: dict[str, Any] = {
        "connections": CONNECTIONS,
        "alive_at_the_end": alive,
        "conntrack_entries": entries,
        "opened_per_s": [round(rate) for rate in rates],
        "bytes_a_connection": {name: round(value, 1) for name, value in steps[-1].items()},
        "main_process_mb": round(now["main_process"] / 1e6, 1),
        "workers_mb": round(now["workers"] / 1e6, 1),
        "steerd_idle_cores": {"with_none": round(idle_before, 5), "with_all": round(idle, 5)},
        "conditions": {
            "request_bytes": len(REQUEST), "steps": STEPS, "servers": SERVERS, "clients": len(bench.held),
            "void_clients": bench.void,
        },
    }  # fmt: skip
    of_steerd = steps[-1]["main_process"] + steps[-1]["workers"]
    ratios = {
        "alive/opened": alive / CONNECTIONS,
        "rate_last_step/first_step": rates[-1] / statistics.median(rates[:2]),
        "steerd_bytes/conntrack_bytes": of_steerd / steps[-1]["conntrack"],
    }
    bars = [Bar(name.replace("_", " "), value, ours=name in ("main_process", "workers"))
            for name, value in steps[-1].items()]  # fmt: skip
    chart = Chart("parts", f"Bytes for each of {CONNECTIONS:,} connections, both ends included (less is better)", bars)
    goals = [Goal("alive/opened", 1)]
    return Result("many", ratios, figures, goals, [chart])
