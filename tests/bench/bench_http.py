"""Late steering by the Host of an HTTP request, against plain kernel DNAT, HAProxy and sslh.

Gateways and kinds: tests/bench/byname.py. A connection is connect, send curl's request (tests/vectors) with the
daemon's name in it, read the daemon's name (which is checked), close: one request on a connection, so that what counts
is opening it. HAProxy looks for the Host in TCP mode and passes the connection on, as steerd does; as an HTTP proxy it
would do more. nginx stream cannot see it. sslh has a regular expression for each name and tries one after the other,
for IPv4 here, in one thread. Where the time goes is as in bench_late.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tests.bench import byname, report
from tests.bench.byname import NAME_TEMPLATE, kinds
from tests.bench.lab import PARTS, Run
from tests.bench.peers import Choice
from tests.bench.scenario import Goal, Result, rounds_of

CAPTURED = (Path(__file__).resolve().parents[1] / "vectors" / "http-curl-7.88.1-get.bin").read_bytes()
REQUEST = CAPTURED.replace(CAPTURED.partition(b"Host: ")[2].partition(b"\r\n")[0], NAME_TEMPLATE)
DAEMONS = Run("answer", len(REQUEST), first=0, size=1024)
ROUNDS = rounds_of(9)
SYSTEMS = ("late", "dnat", "haproxy", "sslh")
SYSTEMS6 = SYSTEMS[:3]
KINDS = (*kinds(SYSTEMS, REQUEST), *kinds(SYSTEMS6, REQUEST, "6", 6))


def run(console: Console) -> Result:
    """All kinds in turn; about two minutes."""
    with ExitStack() as stack:
        bench = byname.Bench(stack, console, Choice.HTTP, [DAEMONS], SYSTEMS)
        throughput, latency = bench.opened(KINDS, DAEMONS, ROUNDS)
    figures = byname.figures(throughput, latency)
    figures["conditions"] = {
        "rounds": ROUNDS, "connections_a_round": byname.COUNT, "at_a_time": byname.PARALLEL, "daemons": DAEMONS.size,
        "parts": PARTS, "request_bytes": len(REQUEST), "all_on_one_machine": True, "void_rounds": bench.lab.void,
    }  # fmt: skip
    ratios = byname.ratios(throughput, SYSTEMS) | byname.ratios(throughput, SYSTEMS6, "6")
    report.show_ratios(console, ratios)
    report.show(console, throughput, figures)
    goals = [Goal("late/dnat", 0.8), Goal("late/haproxy", 1.5), Goal("late6/dnat6", 0.8), Goal("late6/haproxy6", 1.5)]
    return Result("http", ratios, figures, goals, byname.charts(throughput, latency, figures, SYSTEMS))
