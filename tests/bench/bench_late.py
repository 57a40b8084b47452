"""Late steering by the name in a TLS ClientHello, against plain kernel DNAT, HAProxy and nginx stream.

Four gateways (tests/bench/lab.py): steerd, one nft rule a family, HAProxy, nginx (tests/bench/peers.py). A connection
is connect, send a ClientHello, read the daemon's name (which is checked), close. The hellos are those of real programs
(tests/vectors) with the daemon's name written into them: curl's, one segment, and for the kinds `..._browser`
Chromium's, two segments. The daemon answers after as many bytes; nobody does any cryptography, so that what is left is
what the gateway costs. DNAT cannot look at names: there every daemon has a port of its own, `dnat to tcp dport map`.

Three sorts of rounds, each in turn over all systems:
- connections: 64 at a time for the rate, 1 and 32 at a time for latency (connect to first byte of the answer);
- exchanges: 64 bytes there and back on established connections, 1 and 32 at a time;
- bulk: one established connection for a second, up and down.
The `p50` ratios are times, less is better; all others are rates. `..._per_cpu_second` compares connections for each
second of CPU time, everybody included; `..._at_best` is the same as if the workers' own code took no time at all, so
that nothing but the kernel's work were left of them.

**Where the time goes** (us of CPU a connection, IPv4, one segment, 64 at a time, 2 cores of an AMD EPYC, Linux 6.18, a
machine with neighbours: figures of one run differ by a tenth from those of the next). Two measurements; perf itself
takes some of the second:

    everybody (/proc)       late 180 = client and server 93 + workers in the kernel 45 + in Python 41
                            DNAT 94, HAProxy 178 (itself 101, of which 87 in the kernel), nginx 184
    workers (perf, by call  Python 50, verdict 30 (the cookie, the kernel's own connection to the daemon), copy 23 (the
    chain: 110 in all)      payload delivered, the daemon woken), recv 2, poll 1, switches and interrupts 4;
                            within these: nft rules 11, conntrack 4, routing again after translation 5

Deciding alone takes 19 us in a loop, of which reading the hello 8. Among the kernel's work it takes 130 us for the
first packet of a batch, 26 for the fifth and 21 for the fifteenth (medians): the rest of Python's share is cold caches.

So the aims of 0.8 x DNAT and 1.5 x HAProxy are not reached, and no faster worker alone would reach them here: if Python
took no time at all (`..._at_best`), 0.66 and 1.26 would remain. A late connection is opened twice, by the client and to
the daemon, and its payload arrives twice; DNAT opens one. Two segments cost a worker 3.6 times as much in Python and
2.6 times in the kernel as one.
"""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import Progress

from tests.bench import peers, report
from tests.bench.lab import (
    ALIAS_PORT,
    ENDPOINT_PORT,
    FIRST_ALIAS,
    FIRST_TRANSLATED_PORT,
    PARTS,
    Exchange,
    Gateway,
    Lab,
    Round,
    Run,
    Way,
)
from tests.bench.scenario import Result, Spread, rounds_of, spread

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
# The clients write a daemon's number over the three zeros; the length must stay as it was captured.
CAPTURED_NAME, NAME_TEMPLATE = b"shop.example", b"t000.example"
NAME = "t{:03x}.example"
HELLO = (VECTORS / "tls-curl-7.88.1-get.bin").read_bytes().replace(CAPTURED_NAME, NAME_TEMPLATE)
BROWSER_HELLO = (VECTORS / "tls-chromium-156.0.8078.79-first.bin").read_bytes().replace(CAPTURED_NAME, NAME_TEMPLATE)

DAEMONS = Run("answer", len(HELLO), first=0, size=1024)
BROWSER_DAEMONS = Run("answer", len(BROWSER_HELLO), first=1024, size=256)
ECHO = Run("echo", len(HELLO), first=1280, size=1)
SINK = Run("sink", len(HELLO), first=1281, size=1)
SOURCE = Run("source", len(HELLO), first=1282, size=1)

ROUNDS = rounds_of(9)
BROWSER_ROUNDS = rounds_of(5)
COUNT = 5_000
PARALLEL = 64
LATENCY_ROUNDS = rounds_of(3)
LATENCY_COUNTS = {1: 1500, 32: 6000}
EXCHANGE_ROUNDS = rounds_of(9)
EXCHANGE_COUNTS = {1: 4000, 32: 300}
BULK_ROUNDS = rounds_of(9)


class Kind(NamedTuple):
    """One of the things that take turns."""

    name: str
    system: str
    version: int = 4
    hello: bytes = HELLO


SYSTEMS = ("late", "dnat", "haproxy", "nginx")
CONNECTIONS = tuple(
    Kind(f"{system}{suffix}", system, version) for version, suffix in ((4, ""), (6, "6")) for system in SYSTEMS
)
BROWSER = tuple(Kind(f"{system}_browser", system, hello=BROWSER_HELLO) for system in SYSTEMS)
ESTABLISHED = (*CONNECTIONS[: len(SYSTEMS)], Kind("late6", "late", 6), Kind("dnat6", "dnat", 6))

Rounds = dict[str, list[Round]]
Exchanges = Mapping[int, dict[str, list[Exchange]]]
"""By how many at a time, and kind."""
Bulk = Mapping[str, dict[str, list[float]]]
"""Bits a second by way (up, down), and kind."""
_R = TypeVar("_R")


def _name(number: int) -> str:
    return NAME.format(number)


def _routes(size: int) -> str:
    """The rest of steerd's service: a route for each name."""
    text = 'inspect = ["tls"]\n'
    for number in range(size):
        four, six = (ipaddress.ip_address(FIRST_ALIAS[version]) + number for version in (4, 6))
        text += (
            f'[[services.everything.routes]]\nwhen = {{ "tls.sni" = "{_name(number)}" }}\n'
            f'target = ["{four}:{ALIAS_PORT}", "[{six}]:{ALIAS_PORT}"]\n'
        )
    return text


class Bench:
    """The four gateways, and how to measure one kind on its own."""

    def __init__(self, stack: ExitStack, console: Console) -> None:
        self.lab = Lab(stack, [DAEMONS, BROWSER_DAEMONS, ECHO, SINK, SOURCE])
        self._gateways = {system: self.lab.gateway(system) for system in SYSTEMS}
        self.lab.steerd(self._gateways["late"], _routes(self.lab.size))
        self.lab.translate(self._gateways["dnat"])
        peers.haproxy(self.lab, self._gateways["haproxy"], _name)
        peers.nginx(self.lab, self._gateways["nginx"], _name)
        self._progress = stack.enter_context(Progress(console=console))

    def in_turn(
        self, what: str, number: int, kinds: Sequence[Kind], measure: Callable[[Way], _R]
    ) -> dict[str, list[_R]]:
        """Rounds of each kind."""
        task = self._progress.add_task(what, total=number * len(kinds))

        def measured(kind: Kind) -> _R:
            found = measure(self._way(kind))
            self._progress.advance(task)
            return found

        return self.lab.in_turn(number, kinds, measured)

    def _way(self, kind: Kind) -> Way:
        gateway: Gateway = self._gateways[kind.system]
        port, ports = (FIRST_TRANSLATED_PORT, self.lab.size) if kind.system == "dnat" else (ENDPOINT_PORT, 1)
        at = kind.hello.index(NAME_TEMPLATE) + NAME_TEMPLATE.index(b"000")
        return Way(gateway, kind.version, port, ports, request=kind.hello, request_at=at)


def run(console: Console) -> Result:
    """All kinds in turn; about five minutes."""
    with ExitStack() as stack:
        bench = Bench(stack, console)
        connections, exchanges, bulk = bench.lab.connections, bench.lab.exchanges, bench.lab.bulk

        def opened(what: str, rounds: int, count: int, parallel: int, kinds: Sequence[Kind] = CONNECTIONS) -> Rounds:
            run = DAEMONS if kinds is CONNECTIONS else BROWSER_DAEMONS
            return bench.in_turn(what, rounds, kinds, partial(connections, run=run, count=count, parallel=parallel))

        # Puts (nearly) every target into the kernel's maps, by both workers.
        opened("warm-up", 1, 8 * DAEMONS.size, PARALLEL)
        throughput = opened("connections", ROUNDS, COUNT, PARALLEL)
        opened("warm-up, two segments", 1, 8 * BROWSER_DAEMONS.size, PARALLEL, BROWSER)
        throughput |= opened("connections, two segments", BROWSER_ROUNDS, COUNT, PARALLEL, BROWSER)
        latency = {
            parallel: opened(f"connections, {parallel} at a time", LATENCY_ROUNDS, count, parallel)
            | opened(f"connections, two segments, {parallel} at a time", LATENCY_ROUNDS, count, parallel, BROWSER)
            for parallel, count in LATENCY_COUNTS.items()
        }
        established = {
            parallel: bench.in_turn(
                f"exchanges, {parallel} at a time", EXCHANGE_ROUNDS, ESTABLISHED,
                partial(exchanges, run=ECHO, count=count, parallel=parallel),
            )
            for parallel, count in EXCHANGE_COUNTS.items()
        }  # fmt: skip
        carried = {
            way: bench.in_turn(f"bulk, {way}", BULK_ROUNDS, ESTABLISHED, partial(bulk, run=run))
            for way, run in (("up", SINK), ("down", SOURCE))
        }
    figures = _figures(throughput, latency, established, carried)
    figures["conditions"] = {
        "rounds": ROUNDS, "connections_a_round": COUNT, "at_a_time": PARALLEL, "daemons": DAEMONS.size, "parts": PARTS,
        "hello_bytes": len(HELLO), "browser_hello_bytes": len(BROWSER_HELLO), "pinned": False,
        "all_on_one_machine": True, "void_rounds": bench.lab.void, "versions": peers.versions(),
    }  # fmt: skip
    ratios = _ratios(throughput, established, carried)
    report.show_ratios(console, ratios)
    report.show(console, throughput, figures)
    _show_established(console, figures)
    return Result("late", ratios, figures)


def _figures(
    throughput: Rounds, latency: Mapping[int, Rounds], established: Exchanges, carried: Bulk
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        name: report.figures(rounds, {parallel: measured[name] for parallel, measured in latency.items()})
        for name, rounds in throughput.items()
    }
    for kind in ESTABLISHED:
        figures[kind.name]["exchange"] = {
            f"{parallel}_at_a_time": {
                "per_s": round(statistics.median(e.rate for e in measured[kind.name])),
                "p50_us": round(statistics.median(e.p50_us for e in measured[kind.name]), 1),
                "p99_us": round(statistics.median(e.p99_us for e in measured[kind.name]), 1),
            }
            for parallel, measured in established.items()
        }
        for way, bits in carried.items():
            rate = spread([bit_rate / 1e9 for bit_rate in bits[kind.name]])
            figures[kind.name][f"bulk_{way}_gbit_per_s"] = report.rounded(rate, 2)
    return figures


def _ratios(throughput: Rounds, established: Exchanges, carried: Bulk) -> dict[str, Spread]:
    ratios = {}
    for suffix in ("", "6", "_browser"):
        for theirs in SYSTEMS[1:]:
            pair = f"late{suffix}", f"{theirs}{suffix}"
            ratios["/".join(pair)] = report.rate_ratio(throughput, *pair)
            ratios["/".join(pair) + "_per_cpu_second"] = report.cpu_ratio(throughput, *pair)
            ratios["/".join(pair) + "_at_best"] = report.cpu_ratio(throughput, *pair, without="system_user")
    pairs = [("", "late", theirs) for theirs in SYSTEMS[1:]] + [("6", "late6", "dnat6")]
    for suffix, ours, theirs in pairs:
        for way, bits in carried.items():
            ratios[f"bulk{suffix}_{way}/{theirs}"] = report.paired(bits[ours], bits[theirs])
        for parallel, measured in established.items():
            at_a_time = "" if parallel == 1 else f"_{parallel}"
            ratios[f"established{suffix}{at_a_time}_p50/{theirs}"] = report.paired(
                (e.p50_us for e in measured[ours]), (e.p50_us for e in measured[theirs])
            )
    return ratios


def _show_established(console: Console, figures: dict[str, Any]) -> None:
    exchanges = report.table(
        "established: request and response in us (p50 / p99), one connection in Gbit/s",
        "", "1 at a time", "32 at a time", "up", "down",
    )  # fmt: skip
    for kind in ESTABLISHED:
        latency = [f"{us['p50_us']:.0f} / {us['p99_us']:.0f}" for us in figures[kind.name]["exchange"].values()]
        bulk = [figures[kind.name][f"bulk_{way}_gbit_per_s"] for way in ("up", "down")]
        rates = [f"{rate['median']:.1f} ({rate['lowest']:.1f}-{rate['highest']:.1f})" for rate in bulk]
        exchanges.add_row(kind.name, *latency, *rates)
    console.print(exchanges)
