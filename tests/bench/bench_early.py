"""Early steering against plain kernel DNAT: connections a second, latency, and CPU time of everybody who took part.

Two gateways (tests/bench/lab.py): `steered`, with steerd, and `translated`, with one nft rule a family. A connection is
connect, read the daemon's name (which is checked), close. To `steered` every connection goes to one port and carries
the extension of its alias; to `translated` it goes to a port of its alias's own, which `dnat to tcp dport map`
translates: what one would write without steerd. Both are measured with the same IP option on every packet, since the
option alone costs the kernel something; a third figure is DNAT without it.

Fair play: client, server, number of sockets, aliases, connections at a time, CPUs are the same. `all` is the CPU time
of client, server and steerd together, and `..._per_cpu_second` compares connections per second of it, which holds on a
busy machine too (`machine_...` is everything that ran meanwhile, whosever it was). The kinds take turns, round by
round; between rounds conntrack is emptied, so that no limit has to be raised, and no source port is used twice in one
bench.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from steerd.model import Extension
from steerd.wire import portext
from tests.bench import report
from tests.bench.lab import ALIAS_PORT, ENDPOINT_PORT, FIRST_TRANSLATED_PORT, PARTS, Gateway, Lab, Round, Run, Way
from tests.bench.scenario import Goal, Result, rounds_of

DAEMONS = Run("answer", request=0, first=0, size=1024)
# Many short rounds: whatever else the machine does then disturbs neighbours alike, and a few rounds are quiet.
ROUNDS = rounds_of(15)
COUNT = 6_000
PARALLEL = 64
LATENCY_ROUNDS = rounds_of(3)
LATENCY_COUNTS = {1: 1500, 32: 6000}

SERVICE = f"""\
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = {{ pool = "tenants", by = "extension", port = {ALIAS_PORT} }}
"""


class Kind(NamedTuple):
    """One of the things that take turns."""

    name: str
    version: int
    steered: bool
    option: bool


KINDS = tuple(
    kind
    for version, suffix in ((4, ""), (6, "6"))
    for kind in (
        Kind(f"early{suffix}", version, steered=True, option=True),
        Kind(f"dnat{suffix}", version, steered=False, option=True),
        Kind(f"dnat{suffix}_no_option", version, steered=False, option=False),
    )
)


def _way(kind: Kind, gateway: Gateway) -> Way:
    none, numbers = Extension(0, 0), portext.Numbers()
    option = portext.encode_ipv4(none, numbers) if kind.version == 4 else portext.encode_ipv6(none, numbers)
    port, ports = (ENDPOINT_PORT, 1) if kind.steered else (FIRST_TRANSLATED_PORT, DAEMONS.size)
    at = option.index(numbers.exid.to_bytes(2, "big")) + 2
    return Way(gateway, kind.version, port, ports, option=option if kind.option else b"", option_at=at)


def run(console: Console) -> Result:
    """All kinds in turn, then their latency; about two minutes."""
    with ExitStack() as stack:
        lab = Lab(stack, [DAEMONS])
        steered, translated = lab.gateway("steered"), lab.gateway("translated")
        lab.steerd(steered, SERVICE)
        lab.translate(translated)
        progress = stack.enter_context(Progress(console=console))
        task = progress.add_task("rounds", total=(1 + ROUNDS + LATENCY_ROUNDS * len(LATENCY_COUNTS)) * len(KINDS))

        def rounds(number: int, count: int, parallel: int) -> dict[str, list[Round]]:
            def measure(kind: Kind) -> Round:
                found = lab.connections(_way(kind, steered if kind.steered else translated), DAEMONS, count, parallel)
                progress.advance(task)
                return found

            return lab.in_turn(number, KINDS, measure)

        # Puts (nearly) every target into the kernel's maps, by both workers.
        rounds(1, 8 * DAEMONS.size, PARALLEL)
        throughput = rounds(ROUNDS, COUNT, PARALLEL)
        latency = {parallel: rounds(LATENCY_ROUNDS, count, parallel) for parallel, count in LATENCY_COUNTS.items()}
    figures: dict[str, Any] = {
        kind.name: report.figures(
            throughput[kind.name], {parallel: measured[kind.name] for parallel, measured in latency.items()}
        )
        for kind in KINDS
    }
    figures["conditions"] = {
        "rounds": ROUNDS, "connections_a_round": COUNT, "at_a_time": PARALLEL, "aliases": DAEMONS.size, "parts": PARTS,
        "pinned": False, "all_on_one_machine": True, "void_rounds": lab.void,
    }  # fmt: skip
    ratios = {}
    for ours, theirs in (("early", "dnat"), ("early6", "dnat6")):
        ratios[f"{ours}/{theirs}"] = report.rate_ratio(throughput, ours, theirs)
        ratios[f"{ours}/{theirs}_no_option"] = report.rate_ratio(throughput, ours, f"{theirs}_no_option")
        ratios[f"{ours}/{theirs}_per_cpu_second"] = report.cpu_ratio(throughput, ours, theirs)
    report.show_ratios(console, ratios)
    report.show(console, throughput, figures)
    goals = [Goal(f"early{suffix}/dnat{suffix}", 0.95) for suffix in ("", "6")]
    chart = report.rate_chart(throughput, "early", "dnat", {"early": "steerd", "dnat": "DNAT, a port each"})
    return Result("early", ratios, figures, goals, [chart])
