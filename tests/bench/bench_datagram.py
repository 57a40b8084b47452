"""Datagram steering against plain kernel DNAT, a hand-written nft map and nginx stream: first datagrams a second, and
packets a second of established flows.

A gateway each (tests/bench/lab.py): `steered`, with steerd; `translated`, with one nft rule a family, where every
daemon has a port of its own, since DNAT cannot look at names; `map`, whose rule has the first four bytes of the payload
looked up, `dnat to @th,64,32 map`, which is all that `prefix` does here (a map by hand cannot wait for more, has no
longest beginning, no expression, and cannot read QUIC, which is encrypted); `nginx`, by port, which sees no names in
datagrams either. HAProxy 2.6 and sslh 1.20 pass no datagrams on. A flow is a socket on a new port, what a client says
first, the answer (the daemon's name, which is checked), close. By kind:

- datagram: a few bytes, steered by `prefix`; datagram_dns: a DNS query (each is decided, but here each also has a port
  of its own, so that DNAT can do it too);
- datagram_quic: one Initial of 1,200 bytes, steered by its server name; ..._no_rebinding: the same where steerd does
  not learn connection ids from the daemon's answers (which begin with a long header, as a QUIC server's do);
- datagram_browser: two Initials, as browsers' hellos take; both are answered.

Established flows: FLOWS of them, bursts of 32 datagrams that a daemon sends back, everybody on one core, so that what
is counted is packets for each second of CPU. `established_rebinding` is such a flow of the service that learns
connection ids: what its rule costs every answer.

The kinds take turns, round by round. The figures named connections are flows here.
"""

from __future__ import annotations

import ipaddress
import statistics
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import Progress

from tests.bench import peers, report
from tests.bench.lab import (
    ALIAS_PORT,
    FIRST_ALIAS,
    FIRST_TRANSLATED_PORT,
    PARTS,
    Gateway,
    Lab,
    Packets,
    Programs,
    Round,
    Run,
    Way,
)
from tests.bench.peers import Choice, by_port
from tests.bench.scenario import Result, Spread, count_of, rounds_of, spread
from tests.initials import client_hello, flight
from tests.netns.datagram_flood import HELLO_SIZE, query

DAEMONS = Run("answer", request=0, first=0, size=1024)
NAME = "t{:03x}.example"
ROUNDS = rounds_of(7)
COUNT = count_of(6_000)
PARALLEL = 64
LATENCY_ROUNDS = rounds_of(3)
LATENCY_COUNTS = {1: count_of(1500), 32: count_of(6000)}
PACKET_ROUNDS = rounds_of(7)
FLOWS = 16
SIZES = {"": 64, "_1200": 1200}


class Say(NamedTuple):
    """What clients say first, and the services that look at it: (name, port, what else they say in TOML)."""

    name: str
    key: str
    services: tuple[tuple[str, int, str], ...]
    route: str
    first: Callable[[int], list[bytes]]


def _hello(number: int, size: int = 0) -> list[bytes]:
    return flight(client_hello(NAME.format(number).encode(), b"h3", size=size), dcid=number.to_bytes(8))


SAID = (
    Say("prefix", "prefix", (("prefix", 500, ""),), "t{:03x}", lambda n: [f"t{n:03x}".encode()]),
    Say("dns", "dns.qname", (("dns", 53, ""),), NAME, lambda n: [query(NAME.format(n))]),
    Say("quic", "quic.sni", (("quic", 443, ""), ("still", 444, "quic.rebinding = false\n")), NAME, _hello),
    Say("browser", "quic.sni", (), NAME, lambda n: _hello(n, HELLO_SIZE)),
)
PREFIX, DNS, QUIC, BROWSER = (say.name for say in SAID)


class Kind(NamedTuple):
    """One of the things that take turns; `port`: the steered service's, None where each daemon has one."""

    name: str
    said: str
    port: int | None
    version: int = 4
    system: str = "steered"


def _kinds(version: int, suffix: str) -> tuple[Kind, ...]:
    return (
        Kind(f"datagram{suffix}", PREFIX, 500, version),
        Kind(f"dnat{suffix}", PREFIX, None, version, "translated"),
        Kind(f"map{suffix}", PREFIX, 500, version, "map"),
        Kind(f"datagram{suffix}_dns", DNS, 53, version),
        Kind(f"dnat{suffix}_dns", DNS, None, version, "translated"),
        Kind(f"datagram{suffix}_quic", QUIC, 443, version),
        Kind(f"dnat{suffix}_quic", QUIC, None, version, "translated"),
    )


KINDS = (
    *_kinds(4, ""),
    Kind("nginx", PREFIX, None, 4, "nginx"),
    Kind("nginx_quic", QUIC, None, 4, "nginx"),
    Kind("datagram_quic_no_rebinding", QUIC, 444),
    Kind("datagram_browser", BROWSER, 443),
    Kind("dnat_browser", BROWSER, None, 4, "translated"),
    *_kinds(6, "6"),
)
ESTABLISHED = tuple(
    kind
    for version, suffix in ((4, ""), (6, "6"))
    for kind in (
        Kind(f"established{suffix}", PREFIX, 500, version),
        Kind(f"established{suffix}_rebinding", QUIC, 443, version),
        Kind(f"dnat{suffix}", PREFIX, None, version, "translated"),
    )
)
PAIRS = [
    *((f"datagram{v}{what}", f"dnat{v}{what}") for v in ("", "6") for what in ("", "_dns", "_quic")),
    ("datagram", "map"),
    ("datagram6", "map6"),
    ("datagram", "nginx"),
    ("datagram_quic", "nginx_quic"),
    ("datagram_quic_no_rebinding", "dnat_quic"),
    ("datagram_quic", "datagram_quic_no_rebinding"),
    ("datagram_browser", "dnat_browser"),
]

LABELS = {
    "datagram": "steerd, first bytes",
    "map": "an nft map by hand",
    "dnat": "DNAT, a port each",
    "nginx": "nginx stream, a port each",
}
QUIC_LABELS = {
    "datagram_quic": "steerd, QUIC's server name",
    "dnat_quic": "DNAT, a port each",
    "nginx_quic": "nginx stream, a port each",
}

Rounds = dict[str, list[Round]]
_R = TypeVar("_R")


def _routes(say: Say) -> str:
    """A route for each daemon."""
    text = ""
    for number in range(DAEMONS.size):
        four, six = (ipaddress.ip_address(FIRST_ALIAS[version]) + number for version in (4, 6))
        text += (
            f'    {{ when."{say.key}" = "{say.route.format(number)}",'
            f' target = ["{four}:{ALIAS_PORT}", "[{six}]:{ALIAS_PORT}"] }},\n'
        )
    return f"routes = [\n{text}]\n"


def _records(say: Say) -> bytes:
    """The file that tests/bench/datagrams.h describes."""
    records = b""
    for number in range(DAEMONS.size):
        datagrams = say.first(number)
        records += struct.pack("=H", len(datagrams))
        records += b"".join(struct.pack("=H", len(each)) + each for each in datagrams)
    return records


def _map(gateway: Gateway) -> None:
    """Rules that look up the first bytes of the payload."""
    rules = ""
    for version, family in ((4, "ip"), (6, "ip6")):
        base = ipaddress.ip_address(FIRST_ALIAS[version])
        pairs = ", ".join(
            f"0x{f't{number:03x}'.encode().hex()} : {base + number} . {ALIAS_PORT}" for number in range(DAEMONS.size)
        )
        rules += (
            f"{family} daddr {gateway.endpoint[version]} udp dport 500 dnat {family} to @th,64,32 map {{ {pairs} }}\n"
        )
    path = gateway.directory / "map.nft"
    path.write_text(f"table inet plain {{ chain steer {{\ntype nat hook prerouting priority dstnat;\n{rules}}}\n}}\n")
    gateway.host.sh(f"nft -f {path}")


class Bench:
    """The two gateways, and how to measure one kind on its own."""

    def __init__(self, stack: ExitStack, console: Console) -> None:
        self.lab = Lab(stack, [DAEMONS], Programs("flows", "packets", "responder"))
        self._gateways = {system: self.lab.gateway(system) for system in ("steered", "translated", "map", "nginx")}
        steered = self._gateways["steered"]
        services = "".join(
            self.lab.service(steered, name, port, "udp") + f'inspect = ["{say.key.partition(".")[0]}"]\n'
            + more + _routes(say)
            for say in SAID
            for name, port, more in say.services
        )  # fmt: skip
        self.lab.steerd(steered, services, head="")
        self.lab.translate(self._gateways["translated"], "udp")
        _map(self._gateways["map"])
        peers.nginx(self.lab, self._gateways["nginx"], Choice.PORT, by_port, udp=True)
        for say in SAID:
            (self.lab.directory / say.name).write_bytes(_records(say))
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
        records = str(self.lab.directory / kind.said)
        gateway = self._gateways[kind.system]
        if kind.port is None:
            return Way(gateway, kind.version, FIRST_TRANSLATED_PORT, DAEMONS.size, records=records)
        return Way(gateway, kind.version, kind.port, 1, records=records)


def run(console: Console) -> Result:
    """All kinds in turn; about four minutes."""
    with ExitStack() as stack:
        bench = Bench(stack, console)

        def opened(what: str, rounds: int, count: int, parallel: int) -> Rounds:
            measure = partial(bench.lab.connections, run=DAEMONS, count=count, parallel=parallel)
            return bench.in_turn(what, rounds, KINDS, measure)

        # Puts (nearly) every target into the kernel's maps, by both workers.
        opened("warm-up", 1, 4 * DAEMONS.size, PARALLEL)
        throughput = opened("flows", ROUNDS, COUNT, PARALLEL)
        latency = {
            parallel: opened(f"flows, {parallel} at a time", LATENCY_ROUNDS, count, parallel)
            for parallel, count in LATENCY_COUNTS.items()
        }
        packets = {
            suffix: bench.in_turn(
                f"packets of {size} bytes", PACKET_ROUNDS, ESTABLISHED,
                partial(bench.lab.packets, run=DAEMONS, size=size, flows=FLOWS),
            )
            for suffix, size in SIZES.items()
        }  # fmt: skip
    figures: dict[str, Any] = {
        name: report.figures(rounds, {parallel: measured[name] for parallel, measured in latency.items()})
        for name, rounds in throughput.items()
    }
    figures["established"] = {f"{name}{suffix}": _packet_figures(rounds)
                              for suffix, measured in packets.items() for name, rounds in measured.items()}  # fmt: skip
    figures["conditions"] = {
        "rounds": ROUNDS, "flows_a_round": COUNT, "at_a_time": PARALLEL, "daemons": DAEMONS.size, "parts": PARTS,
        "established_flows": FLOWS, "packet_bytes": list(SIZES.values()), "all_on_one_machine": True,
        "void_rounds": bench.lab.void,
    }  # fmt: skip
    ratios = _ratios(throughput, packets)
    report.show_ratios(console, ratios)
    report.show(console, throughput, figures)
    _show_packets(console, figures["established"])
    charts = [
        report.rate_chart(throughput, "datagram", LABELS, what="flows"),
        report.cpu_chart(figures, "datagram", LABELS, what="flows"),
        report.latency_chart(latency[1], "datagram", LABELS),
        report.rate_chart(throughput, "datagram_quic", QUIC_LABELS, "dnat_quic", "QUIC flows"),
        report.cpu_chart(figures, "datagram_quic", QUIC_LABELS, "dnat_quic", "QUIC flows"),
    ]
    return Result("datagram", ratios, figures, charts=charts)


def _packet_figures(rounds: Sequence[Packets]) -> dict[str, Any]:
    return {
        "packets_per_s": report.rounded(spread([r.rate for r in rounds]), 0),
        "cpu_us_per_packet": round(statistics.median(r.cpu_us for r in rounds), 2),
        "lost": sum(r.lost for r in rounds),
    }


def _ratios(throughput: Rounds, packets: dict[str, dict[str, list[Packets]]]) -> dict[str, Spread]:
    ratios = {}
    for ours, theirs in PAIRS:
        ratios[f"{ours}/{theirs}"] = report.rate_ratio(throughput, ours, theirs)
        ratios[f"{ours}/{theirs}_per_cpu_second"] = report.cpu_ratio(throughput, ours, theirs)
    for suffix, measured in packets.items():
        rates = {name: [r.rate for r in rounds] for name, rounds in measured.items()}
        for v in ("", "6"):
            plain, learning, dnat = f"established{v}", f"established{v}_rebinding", f"dnat{v}"
            ratios[f"established{v}_pps{suffix}/dnat"] = report.paired(rates[plain], rates[dnat])
            ratios[f"established{v}_pps_rebinding{suffix}/dnat"] = report.paired(rates[learning], rates[dnat])
            ratios[f"established{v}_pps_rebinding{suffix}/without"] = report.paired(rates[learning], rates[plain])
    return ratios


def _show_packets(console: Console, figures: dict[str, Any]) -> None:
    table = report.table("established flows, everybody on one core", "", "packets/s, median", "CPU us a packet", "lost")
    for name, found in figures.items():
        rate = "{median:,.0f} ({lowest:,.0f} - {highest:,.0f})".format(**found["packets_per_s"])
        table.add_row(name, rate, str(found["cpu_us_per_packet"]), str(found["lost"]))
    console.print(table)
