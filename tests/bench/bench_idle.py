"""Connections that are decided, stand, and say nothing: what do 10,000 of them cost in memory and in CPU time?

Gateways (tests/bench/lab.py): steerd (late, by HTTP Host), plain DNAT, HAProxy, and one where clients connect to a
daemon's alias straight away, which is what the two ends cost by themselves. CONNECTIONS are opened, each is checked,
and then nobody says anything. `own` is what the system costs beyond the two ends: its processes, and the kernel's
objects. HAProxy has two more sockets for each connection; DNAT and steerd have an entry in conntrack, steerd's with
room for the numbers that the kernel translates for synproxy.

HAProxy may have 20,000 files open on some machines, so it is CONNECTIONS and not 10,000; figures are per connection.
Everybody is warmed up before with connections that are gone when memory is counted first: pools that a program keeps
are not counted for it a second time. HAProxy keeps none (it gives them back when it is idle), so its processes are
compared with what they had at their start. steerd's workers remember each decision for a minute, whether its
connection still stands or not, and at most so many (core.pending.Limits.remembered): that is room which they have
taken after WARM_UPS rounds. bench_many has it in its figures.

Memory is the machine's (tests/bench/memory.py): others must be quiet. Silent clients, which steerd does not remember at
all, are in tests/bench/bench_silent.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from contextlib import ExitStack
from typing import NamedTuple

from rich.console import Console

from tests.bench import byname, memory, peers, report
from tests.bench.byname import NAME, NAME_TEMPLATE
from tests.bench.lab import (
    ALIAS_PORT,
    ENDPOINT_PORT,
    FIRST_ALIAS,
    FIRST_TRANSLATED_PORT,
    Gateway,
    Held,
    Lab,
    Programs,
    Run,
    Way,
)
from tests.bench.memory import Memory
from tests.bench.peers import Choice
from tests.bench.scenario import Bar, Chart, Goal, Result, count_of, is_quick, rounds_of, spread

REQUEST = b"GET / HTTP/1.1\r\nHost: " + NAME_TEMPLATE + b"\r\nUser-Agent: bench\r\n\r\n"
DAEMONS = Run("echo", len(REQUEST), first=0, size=256)
CONNECTIONS = count_of(9_000)
PARALLEL = 64
ROUNDS = rounds_of(3)
IDLE_SECONDS = 1.0 if is_quick() else 5.0
SETTLE_SECONDS = 2.0
# More than any minute has later: so long, and so many, steerd remembers what it has decided, idle or not.
WARM_UPS = 4
SYSTEMS = ("late", "dnat", "haproxy", "straight")
REQUEST_AT = REQUEST.index(NAME_TEMPLATE) + NAME_TEMPLATE.index(b"000")


def way(gateway: Gateway, system: str, version: int = 4) -> Way:
    """How clients ask on the gateway of a system."""
    by_system = {"dnat": (FIRST_TRANSLATED_PORT, DAEMONS.size), "straight": (ALIAS_PORT, 1)}
    port, ports = by_system.get(system, (ENDPOINT_PORT, 1))
    return Way(gateway, version, port, ports, request=REQUEST, request_at=REQUEST_AT)


class Kind(NamedTuple):
    """One of the things that take turns."""

    name: str


class Idle(NamedTuple):
    """One round."""

    memory: Memory
    cpu: float
    """Cores that the system took meanwhile."""


class Bench:
    """The gateways."""

    def __init__(self, stack: ExitStack) -> None:
        self.lab = Lab(stack, [DAEMONS], Programs("hold"))
        gateways = {system: self.lab.gateway(system) for system in SYSTEMS}
        self.lab.steerd(gateways["late"], byname.routes(Choice.HTTP, DAEMONS.size))
        self.lab.translate(gateways["dnat"])
        peers.haproxy(self.lab, gateways["haproxy"], Choice.HTTP, NAME.format, connections=CONNECTIONS + 200)
        gateways["straight"] = dataclasses.replace(gateways["straight"], endpoint=FIRST_ALIAS)
        self.lab.client.sh(f"ip route add {FIRST_ALIAS[4]} via 192.0.2.14")
        self._gateways = gateways
        self._at_first = {system: self._processes(system) for system in SYSTEMS}

    def _processes(self, system: str) -> int:
        return sum(map(memory.share, self._gateways[system].system_pids()))

    def warm_up(self) -> None:
        """Of all but HAProxy, what processes have after their first connections counts as theirs."""
        for system in SYSTEMS:
            for _ in range(WARM_UPS if system == "late" else 1):
                self._hold(system).release()
            if system != "haproxy":
                self._at_first[system] = self._processes(system)

    def measure(self, system: str) -> Idle:
        """One round of a system."""
        time.sleep(SETTLE_SECONDS)
        pids = self._gateways[system].system_pids()
        before = memory.taken([])
        held = self._hold(system)
        time.sleep(SETTLE_SECONDS)
        cost = memory.taken([]).since(before)._replace(processes=self._processes(system) - self._at_first[system])
        cpu, began = memory.cpu_seconds(pids), time.monotonic()
        time.sleep(IDLE_SECONDS)
        cpu = (memory.cpu_seconds(pids) - cpu) / (time.monotonic() - began)
        alive = held.still_there()
        if alive < CONNECTIONS:
            raise SystemExit(f"bench: {system}: only {alive} of {CONNECTIONS} idle connections were still there")
        held.release()
        return Idle(cost, cpu)

    def _hold(self, system: str) -> Held:
        asked = way(self._gateways[system], system)
        run = DAEMONS._replace(size=1) if system == "straight" else DAEMONS
        return self.lab.hold(asked, run, CONNECTIONS, PARALLEL)


def run(console: Console) -> Result:
    """Rounds of all systems in turn; about four minutes."""
    with ExitStack() as stack:
        bench = Bench(stack)
        bench.warm_up()
        rounds = bench.lab.in_turn(ROUNDS, [Kind(system) for system in SYSTEMS], lambda kind: bench.measure(kind.name))
    ends = [each.memory.total for each in rounds["straight"]]
    own = {
        system: [(each.memory.total - end) / CONNECTIONS for each, end in zip(rounds[system], ends, strict=True)]
        for system in SYSTEMS[:-1]
    }
    figures = {
        system: {
            "bytes_a_connection": {
                name: round(statistics.median(parts[name] for parts in map(_parts, found)), 1)
                for name in _parts(found[0])
            },
            "cpu_cores": report.rounded(spread([each.cpu for each in found]), 5),
        }
        | ({"own_bytes_a_connection": report.rounded(spread(own[system]), 1)} if system in own else {})
        for system, found in rounds.items()
    }
    ratios = {"late_memory/haproxy": report.paired(own["late"], own["haproxy"])}
    ratios["late_kernel_memory/dnat"] = report.paired(
        (sum(each.memory.kernel.values()) for each in rounds["late"]),
        (sum(each.memory.kernel.values()) for each in rounds["dnat"]),
    )
    _show(console, figures)
    report.show_ratios(console, ratios)
    bars = [
        Bar(byname.LABELS[system], spread([value / 1e3 * 10_000 / 1e3 for value in values]), ours=system == "late")
        for system, values in own.items()
    ]
    title = "Memory for 10,000 idle connections in MB, without what the two ends cost (less is better)"
    conditions = {"connections": CONNECTIONS, "rounds": ROUNDS, "idle_s": IDLE_SECONDS}
    return Result(
        "idle",
        ratios,
        {**figures, "conditions": {**conditions, "void_rounds": bench.lab.void}},
        [Goal("late_memory/haproxy", 0.05, at_least=False)],
        [Chart("memory", title, bars)],
    )


def _parts(found: Idle) -> dict[str, float]:
    parts = {"processes": found.memory.processes, **found.memory.kernel, "all": found.memory.total}
    return {name: size / CONNECTIONS for name, size in parts.items()}


def _show(console: Console, figures: dict[str, dict[str, dict[str, float]]]) -> None:
    names = next(iter(figures.values()))["bytes_a_connection"]
    table = report.table("bytes for an idle connection, both ends included", "", *names, "own", "CPU, cores")
    for system, found in figures.items():
        own = f"{found['own_bytes_a_connection']['median']:,.0f}" if "own_bytes_a_connection" in found else ""
        parts = (f"{found['bytes_a_connection'][name]:,.0f}" for name in names)
        table.add_row(system, *parts, own, f"{found['cpu_cores']['median']:.4f}")
    console.print(table)
