"""What the scenarios share whose clients ask for a daemon by its name: gateways, kinds, their rounds, figures, ratios.

One gateway (tests/bench/lab.py) for each system: steerd, one nft rule a family, HAProxy, nginx, sslh (tests/bench/
peers.py). DNAT cannot look at names: there every daemon has a port of its own, `dnat to tcp dport map`. Nor can an nft
map by hand: where a connection is translated to is settled by its SYN, which has no name in it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import Progress

from tests.bench import peers, report
from tests.bench.lab import (
    ALIAS_PORT,
    ENDPOINT_PORT,
    EXTENDED,
    FIRST_ALIAS,
    FIRST_TRANSLATED_PORT,
    Lab,
    Run,
    Way,
    extension_option,
)
from tests.bench.peers import Choice
from tests.bench.report import Rounds
from tests.bench.scenario import Chart, Spread, count_of, rounds_of

# The clients write a daemon's number over the three zeros; the length is that of the captured name.
CAPTURED_NAME, NAME_TEMPLATE = b"shop.example", b"t000.example"
NAME = "t{:03x}.example"
EXTENDED_PORT = 444
# sslh-select has a backlog of 50; beyond it, SYNs would have to be repeated.
PARALLEL = 48
COUNT = count_of(5_000)
LATENCY_ROUNDS = rounds_of(3)
LATENCY_COUNTS = {1: count_of(1500), 32: count_of(6000)}
LABELS = {
    "late": "steerd",
    "dnat": "DNAT, a port each",
    "hooks": "DNAT, and steerd's chains, empty",
    "haproxy": "HAProxy",
    "nginx": "nginx stream",
    "sslh": "sslh-select",
}
_KEY = {Choice.TLS: "tls.sni", Choice.HTTP: "http.host"}
_R = TypeVar("_R")


class Kind(NamedTuple):
    """One of the things that take turns."""

    name: str
    system: str
    request: bytes
    version: int = 4
    extended: bool = False
    """Asks by a port extension instead; DNAT's clients carry it for nothing, since the option costs something."""


class Bench:
    """The gateways, and how to measure one kind on its own."""

    def __init__(
        self, stack: ExitStack, console: Console, choice: Choice, runs: Sequence[Run], systems: Sequence[str]
    ) -> None:
        self.lab = Lab(stack, runs)
        self._gateways = {system: self.lab.gateway(system) for system in systems}
        steerd = self._gateways["late"]
        extended = self.lab.service(steerd, "extended", EXTENDED_PORT, "tcp") + EXTENDED
        self.lab.steerd(steerd, routes(choice, self.lab.size) + extended)
        self.lab.translate(self._gateways["dnat"])
        if "hooks" in systems:
            self.lab.translate(self._gateways["hooks"])
            self.lab.empty_chains(self._gateways["hooks"], steerd)
        for system, start in (("haproxy", peers.haproxy), ("nginx", peers.nginx), ("sslh", peers.sslh)):
            if system in systems:
                start(self.lab, self._gateways[system], choice, NAME.format)
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

    def opened(self, kinds: Sequence[Kind], run: Run, rounds: int) -> tuple[Rounds, Mapping[int, Rounds]]:
        """Connections to the daemons of a run: for the rate, and (by how many at a time) for latency."""

        def measured(what: str, rounds: int, count: int, parallel: int) -> Rounds:
            measure = partial(self.lab.connections, run=run, count=count, parallel=parallel)
            return self.in_turn(f"{run.request} bytes: {what}", rounds, kinds, measure)

        # Puts (nearly) every target into the kernel's maps, by both workers.
        measured("warm-up", 1, count_of(8 * run.size), PARALLEL)
        throughput = measured("connections", rounds, COUNT, PARALLEL)
        latency = {
            parallel: measured(f"{parallel} at a time", LATENCY_ROUNDS, count, parallel)
            for parallel, count in LATENCY_COUNTS.items()
        }
        return throughput, latency

    def _way(self, kind: Kind) -> Way:
        port, ports = EXTENDED_PORT if kind.extended else ENDPOINT_PORT, 1
        if kind.system in ("dnat", "hooks"):
            port, ports = FIRST_TRANSLATED_PORT, self.lab.size
        option, option_at = extension_option(kind.version) if kind.extended else (b"", 0)
        at = kind.request.index(NAME_TEMPLATE) + NAME_TEMPLATE.index(b"000")
        return Way(
            self._gateways[kind.system], kind.version, port, ports,
            option=option, option_at=option_at, request=kind.request, request_at=at, loses=kind.system == "sslh",
        )  # fmt: skip


def kinds(systems: Sequence[str], request: bytes, suffix: str = "", version: int = 4) -> tuple[Kind, ...]:
    """One for each system."""
    return tuple(Kind(f"{system}{suffix}", system, request, version) for system in systems)


def figures(throughput: Rounds, latency: Mapping[int, Rounds]) -> dict[str, Any]:
    """Of each kind."""
    return {
        name: report.figures(rounds, {parallel: measured[name] for parallel, measured in latency.items()})
        for name, rounds in throughput.items()
    }


def ratios(throughput: Rounds, systems: Sequence[str], suffix: str = "") -> dict[str, Spread]:
    """Ours to each of the others, of kinds with such a suffix."""
    found = {}
    for theirs in systems[1:]:
        pair = f"{systems[0]}{suffix}", f"{theirs}{suffix}"
        found["/".join(pair)] = report.rate_ratio(throughput, *pair)
        found["/".join(pair) + "_per_cpu_second"] = report.cpu_ratio(throughput, *pair)
        found["/".join(pair) + "_at_best"] = report.cpu_ratio(throughput, *pair, without="system_user")
    return found


def charts(
    throughput: Rounds, latency: Mapping[int, Rounds], found: Mapping[str, Any], systems: Sequence[str]
) -> list[Chart]:
    """Connections a second, their CPU time, and the latency of one at a time; `found`: the figures of each kind."""
    labels = {system: LABELS[system] for system in systems}
    return [
        report.rate_chart(throughput, "late", labels),
        report.cpu_chart(found, "late", labels),
        report.latency_chart(latency[1], "late", labels),
    ]


def routes(choice: Choice, size: int) -> str:
    """The rest of steerd's service, in TOML: a route for each name."""
    key = _KEY[choice]
    text = f'inspect = ["{key.partition(".")[0]}"]\n'
    for number in range(size):
        four, six = (ipaddress.ip_address(FIRST_ALIAS[version]) + number for version in (4, 6))
        text += (
            f'[[services.everything.routes]]\nwhen = {{ "{key}" = "{NAME.format(number)}" }}\n'
            f'target = ["{four}:{ALIAS_PORT}", "[{six}]:{ALIAS_PORT}"]\n'
        )
    return text
