"""One worker or two, and what more of them would do: measured, and a model from the parts that more workers slow down.

Gateways (tests/bench/lab.py): steerd with one worker, steerd with two, plain DNAT. Connections are late (by HTTP Host)
and early (an extension in an IP option), 64 at a time, all kinds in turn. On a machine with few cores the rate is that
of the whole machine, client and daemons included: there a second worker helps little, whatever it costs. What says more
is `worker_us`: the CPU time of all workers for each connection, with what the kernel does in their name (the verdict,
which opens the connection to the daemon; the copy of the payload). Whatever two workers wait for each other, for locks
or for cache lines that both write, is in it.

`python_together/alone`: two workers without a kernel (tests/bench/unplugged.py), each on a core of its own, decide at
the same time by one registry: what Python's part, LMDB and the counters cost more than if one does so alone.

**Model**: with w1 and w2 the time of a connection in one worker and in one of two, and s = w2 / w1 - 1 (at least 0), N
workers with a core each, and cores enough for all others, decide N / (w1 * (1 + s * (N - 1))) connections a second:
each worker slows down each other one by as much as the second slowed down the first. Nothing else is serial: workers
share no lock in user space (LMDB's readers have none), each has a queue, counters and sockets of its own, and the main
process takes no part in a decision. `limit`: where that goes with ever more workers, 1 / (w1 * s).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from steerd.model import Extension
from steerd.wire import portext
from tests.bench import byname, report
from tests.bench.bench_decisions import BY_ROUTES, Server
from tests.bench.bench_early import NO_OPERATIONS
from tests.bench.bench_idle import REQUEST, REQUEST_AT
from tests.bench.lab import ALIAS_PORT, ENDPOINT_PORT, FIRST_TRANSLATED_PORT, Gateway, Lab, Round, Run, Way
from tests.bench.peers import Choice
from tests.bench.scenario import Bar, Chart, Result, Spread, count_of, rounds_of, spread

LATE = Run("answer", len(REQUEST), first=0, size=1024)
EARLY = Run("answer", request=0, first=1024, size=1024)
ROUNDS = rounds_of(9)
COUNT = count_of(6_000)
PARALLEL = 64
EARLY_PORT = 444
MODEL = (1, 2, 4, 8, 16)
PYTHON_KINDS = ("early", "sni", "http", "quic")
EARLY_SERVICE = f"""\
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = {{ pool = "tenants", by = "extension", port = {ALIAS_PORT} }}
"""


class Kind(NamedTuple):
    """One of the things that take turns."""

    name: str
    run: Run
    workers: int
    """0: plain DNAT."""


KINDS = (
    Kind("late_1", LATE, 1),
    Kind("late_2", LATE, 2),
    Kind("late_dnat", LATE, 0),
    Kind("early_1", EARLY, 1),
    Kind("early_2", EARLY, 2),
    Kind("early_dnat", EARLY, 0),
)


def _way(kind: Kind, gateway: Gateway, size: int) -> Way:
    if kind.run is LATE:
        request = {"request": REQUEST, "request_at": REQUEST_AT}
        option = {}
    else:
        none, numbers = Extension(0, 0), portext.Numbers()
        # Padding in front, so that the kernel does not steer by itself what was decided before (steerd.core.offload).
        text = NO_OPERATIONS + portext.encode_ipv4(none, numbers)
        request = {}
        option = {"option": text, "option_at": text.index(numbers.exid.to_bytes(2, "big")) + 2}
    if not kind.workers:
        port, ports = FIRST_TRANSLATED_PORT, size
    else:
        port, ports = (ENDPOINT_PORT if kind.run is LATE else EARLY_PORT), 1
    settings: dict[str, Any] = {**request, **option}
    return Way(gateway, 4, port, ports, **settings)


def _python() -> dict[str, dict[str, list[float]]]:
    """Microseconds of CPU for a decision, alone and together."""
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "together": []} for name in PYTHON_KINDS}
    with ExitStack() as stack:
        first = Server(stack, BY_ROUTES, 4)
        second = first.another(stack)
        for _ in range(ROUNDS + 1):
            for name, us in found.items():
                us["alone"].append(first.ask(name))
                second.order(name)
                us["together"].append(first.ask(name))
                second.answer()
    # The first round has used all targets.
    return {name: {how: values[1:] for how, values in us.items()} for name, us in found.items()}


def run(console: Console) -> Result:
    """All kinds in turn; about two minutes."""
    python = _python()
    with ExitStack() as stack:
        lab = Lab(stack, [LATE, EARLY])
        gateways = {workers: lab.gateway(f"workers{workers}") for workers in (1, 2, 0)}
        for workers in (1, 2):
            services = lab.service(gateways[workers], "everything", ENDPOINT_PORT, "tcp")
            services += byname.routes(Choice.HTTP, LATE.size)
            services += lab.service(gateways[workers], "early", EARLY_PORT, "tcp") + EARLY_SERVICE
            lab.steerd(gateways[workers], services, head="", workers=workers)
        lab.translate(gateways[0])
        progress = stack.enter_context(Progress(console=console))
        task = progress.add_task("rounds", total=(1 + ROUNDS) * len(KINDS))

        def rounds(number: int, count: int) -> dict[str, list[Round]]:
            def measure(kind: Kind) -> Round:
                found = lab.connections(_way(kind, gateways[kind.workers], lab.size), kind.run, count, PARALLEL)
                progress.advance(task)
                return found

            return lab.in_turn(number, KINDS, measure)

        # Puts (nearly) every target into the kernel's maps, by all workers.
        rounds(1, 8 * LATE.size)
        measured = rounds(ROUNDS, COUNT)
    return _result(console, measured, python, lab.void)


def _worker_us(each: Round) -> float:
    return each.cpu_us["system_user"] + each.cpu_us["system_kernel"]


def _result(
    console: Console,
    measured: Mapping[str, Sequence[Round]],
    python: Mapping[str, Mapping[str, Sequence[float]]],
    void: Mapping[str, int],
) -> Result:
    figures: dict[str, Any] = {name: report.figures(found, {}) for name, found in measured.items()}
    ratios: dict[str, Spread] = {}
    modelled: dict[str, dict[int, float]] = {}
    for way in ("late", "early"):
        one, two = measured[f"{way}_1"], measured[f"{way}_2"]
        ratios[f"{way}_2/{way}_1"] = report.rate_ratio(measured, f"{way}_2", f"{way}_1")
        ratios[f"{way}_2/dnat"] = report.rate_ratio(measured, f"{way}_2", f"{way}_dnat")
        slower = ratios[f"{way}_worker_us_2/1"] = report.paired(map(_worker_us, two), map(_worker_us, one))
        alone, more = statistics.median(map(_worker_us, one)), max(0.0, slower.median - 1)
        modelled[way] = {n: n / (alone * (1 + more * (n - 1))) * 1e6 for n in MODEL}
        figures[f"{way}_model"] = {
            "worker_us": round(alone, 1),
            "each_other_slows_by": round(more, 3),
            "connections_per_s": {str(n): round(rate) for n, rate in modelled[way].items()},
            "limit_per_s": round(1e6 / (alone * more)) if more else None,
        }
    for name, us in python.items():
        ratios[f"python_{name}_together/alone"] = report.paired(us["together"], us["alone"])
    figures["python_us"] = {
        name: {how: report.rounded(spread(values), 2) for how, values in us.items()} for name, us in python.items()
    }
    figures["conditions"] = {
        "rounds": ROUNDS, "connections_a_round": COUNT, "at_a_time": PARALLEL, "void_rounds": void,
    }  # fmt: skip
    _show(console, measured, modelled)
    report.show_ratios(console, ratios)
    bars = [
        Bar(f"{way}, {n} worker{'s' * (n > 1)}", rate / modelled[way][1], ours=way == "late", note=f"{rate:,.0f} /s")
        for way in modelled
        for n, rate in modelled[way].items()
    ]
    title = "Model: connections a second with a core for each worker, as a ratio to one worker (more is better)"
    return Result("workers", ratios, figures, (), [Chart("model", title, bars)])


def _show(
    console: Console, measured: Mapping[str, Sequence[Round]], modelled: Mapping[str, Mapping[int, float]]
) -> None:
    table = report.table(
        "connections/s on this machine, all parts together", "", "median", "us in workers", "us in all"
    )
    for name, found in measured.items():
        in_workers = "" if "dnat" in name else f"{statistics.median(map(_worker_us, found)):.1f}"
        in_all = f"{statistics.median(each.cpu_us['all'] for each in found):.1f}"
        table.add_row(name, str(spread([each.rate for each in found])), in_workers, in_all)
    console.print(table)
    model = report.table("model: connections/s with a core for each worker", "", *(str(n) for n in MODEL))
    for way, rates in modelled.items():
        model.add_row(way, *(f"{rate:,.0f}" for rate in rates.values()))
    console.print(model)
