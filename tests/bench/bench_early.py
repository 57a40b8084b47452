"""Early steering against plain kernel DNAT, a hand-written nft map, HAProxy and nginx stream: connections a second,
latency, and CPU time of everybody who took part.

A gateway each (tests/bench/lab.py). A connection is connect, read the daemon's name (which is checked), close. To the
first three every connection goes to one port and carries the extension of its alias:

- early: steerd, whose kernel part steers by itself what a worker has decided once (steerd/core/offload.py);
- early_upcall: steerd, asked by clients that write padding in front of the extension: every SYN goes to a worker;
- map: `dnat to @nh,192,16 map`, written by hand for what the clients here send, and nothing else: one option, at one
  place of the header, and a rule a family. It knows no route by source, no default, no other option in front or behind,
  no option of TCP's; nothing keeps a client that reuses its port with another extension from the old target, who reads
  its counters learns nothing about reasons, and whoever changes it does so by hand.

To the others, which cannot read options, it goes to a port of its alias's own: what one would do without steerd.

- dnat: one nft rule a family, `dnat to tcp dport map`; with the same option on every packet, since the option alone
  costs the kernel something, and without it (`..._no_option`);
- hooks: dnat, and beside it the base chains of steerd's table, empty: what the kernel takes to come by them, whatever
  is in them, and so the least that a table that guards aliases can cost;
- haproxy, nginx: which choose by port (tests/bench/peers.py); without option. sslh cannot.

Fair play: client, server, number of sockets, aliases, connections at a time, CPUs are the same. `all` is the CPU time
of client, server and system together, and `..._per_cpu_second` compares connections per second of it, which holds on a
busy machine too (`machine_...` is everything that ran meanwhile, whosever it was). The kinds take turns, round by
round; between rounds conntrack is emptied, so that no limit has to be raised, and no source port is used twice in one
bench.

**Where the time goes** (CPU a connection, everybody included, IPv4, 2 cores of an AMD EPYC, Linux 6.18): DNAT does 0.95
of what it does alone for each CPU second if steerd's chains are beside it, empty (`hooks/dnat`), and steerd 0.87 to
0.89: so the aim, 0.95, is what the hooks alone leave, and the rules in them cost as much again, less than 1 us a
packet. Nearly all of it is charged to the clients, whose packets pass the chains; workers take less than 1 us of 85 to
105. Where each SYN goes to a worker (`early_upcall`) 25 us more are the kernel's in its name (reading the packet, the
verdict, the SYN's further way) and 18 Python's.
"""

from __future__ import annotations

import ipaddress
from contextlib import ExitStack
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from tests.bench import peers, report
from tests.bench.lab import (
    ALIAS_PORT,
    ENDPOINT_PORT,
    EXTENDED,
    FIRST_ALIAS,
    FIRST_TRANSLATED_PORT,
    PARTS,
    Gateway,
    Lab,
    Round,
    Run,
    Way,
    extension_option,
)
from tests.bench.peers import Choice, by_port
from tests.bench.scenario import Goal, Result, count_of, rounds_of

DAEMONS = Run("answer", request=0, first=0, size=1024)
# Many short rounds: whatever else the machine does then disturbs neighbours alike, and a few rounds are quiet.
ROUNDS = rounds_of(11)
COUNT = count_of(6_000)
PARALLEL = 64
LATENCY_ROUNDS = rounds_of(3)
LATENCY_COUNTS = {1: count_of(1500), 32: count_of(6000)}


class Kind(NamedTuple):
    """One of the things that take turns."""

    name: str
    system: str
    version: int
    option: bool
    padding: bytes = b""
    """In front of the extension."""


def _kinds(version: int, suffix: str) -> tuple[Kind, ...]:
    return (
        *(Kind(f"{system}{suffix}", system, version, option=True) for system in ("early", "map", "dnat")),
        Kind(f"dnat{suffix}_no_option", "dnat", version, option=False),
    )


PEERS = ("haproxy", "nginx")
HOOKS = "hooks"
NO_OPERATIONS = b"\x01" * 4
KINDS = (
    *_kinds(4, ""),
    Kind("early_upcall", "early", 4, option=True, padding=NO_OPERATIONS),
    Kind(HOOKS, HOOKS, 4, option=True),
    *(Kind(peer, peer, 4, option=False) for peer in PEERS),
    *_kinds(6, "6"),
)
SYSTEMS = ("early", "map", "dnat", HOOKS, *PEERS)
LABELS = {
    "early": "steerd",
    "early_upcall": "steerd, every SYN decided",
    "map": "an nft map by hand",
    "dnat": "DNAT, a port each",
    HOOKS: "DNAT, and steerd's chains, empty",
    "haproxy": "HAProxy, a port each",
    "nginx": "nginx stream, a port each",
}


def _start(lab: Lab) -> dict[str, Gateway]:
    """A gateway for each system, which runs."""
    gateways = {system: lab.gateway(system) for system in SYSTEMS}
    lab.steerd(gateways["early"], EXTENDED)
    _map(gateways["map"])
    for system in ("dnat", HOOKS):
        lab.translate(gateways[system])
    lab.empty_chains(gateways[HOOKS], gateways["early"])
    peers.haproxy(lab, gateways["haproxy"], Choice.PORT, by_port)
    peers.nginx(lab, gateways["nginx"], Choice.PORT, by_port)
    return gateways


def _map(gateway: Gateway) -> None:
    """Rules that find the extension where these clients write it."""
    gateway.host.sh("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=10")
    matches = {4: "ip hdrlength 7 @nh,160,32 0x9e085354", 6: "ip6 nexthdr 60 @nh,336,32 0x1e065354"}
    extension = {4: "@nh,192,16", 6: "@nh,368,16"}
    rules = ""
    for version, family in ((4, "ip"), (6, "ip6")):
        base = ipaddress.ip_address(FIRST_ALIAS[version])
        pairs = ", ".join(f"{number + 1} : {base + number} . {ALIAS_PORT}" for number in range(DAEMONS.size))
        rules += (
            f"{family} daddr {gateway.endpoint[version]} tcp dport {ENDPOINT_PORT} {matches[version]}"
            f" dnat {family} to {extension[version]} map {{ {pairs} }}\n"
        )
    path = gateway.directory / "map.nft"
    path.write_text(f"table inet plain {{ chain steer {{\ntype nat hook prerouting priority dstnat;\n{rules}}}\n}}\n")
    gateway.host.sh(f"nft -f {path}")


def _way(kind: Kind, gateway: Gateway) -> Way:
    one_port = kind.system in ("early", "map")
    port, ports = (ENDPOINT_PORT, 1) if one_port else (FIRST_TRANSLATED_PORT, DAEMONS.size)
    option, at = extension_option(kind.version) if kind.option else (b"", 0)
    at += len(kind.padding)
    return Way(gateway, kind.version, port, ports, option=kind.padding + option, option_at=at)


def run(console: Console) -> Result:
    """All kinds in turn, then their latency; about two minutes."""
    with ExitStack() as stack:
        lab = Lab(stack, [DAEMONS])
        gateways = _start(lab)
        progress = stack.enter_context(Progress(console=console))
        task = progress.add_task("rounds", total=(1 + ROUNDS + LATENCY_ROUNDS * len(LATENCY_COUNTS)) * len(KINDS))

        def rounds(number: int, count: int, parallel: int) -> dict[str, list[Round]]:
            def measure(kind: Kind) -> Round:
                found = lab.connections(_way(kind, gateways[kind.system]), DAEMONS, count, parallel)
                progress.advance(task)
                return found

            return lab.in_turn(number, KINDS, measure)

        # Puts (nearly) every target into the kernel's maps, by both workers.
        rounds(1, count_of(8 * DAEMONS.size), PARALLEL)
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
        "all_on_one_machine": True, "void_rounds": lab.void,
    }  # fmt: skip
    ratios = {}
    for theirs in ("dnat", "map", HOOKS, "haproxy", "nginx", "dnat_no_option"):
        ratios[f"early/{theirs}"] = report.rate_ratio(throughput, "early", theirs)
        ratios[f"early/{theirs}_per_cpu_second"] = report.cpu_ratio(throughput, "early", theirs)
    ratios["hooks/dnat"] = report.rate_ratio(throughput, HOOKS, "dnat")
    ratios["hooks/dnat_per_cpu_second"] = report.cpu_ratio(throughput, HOOKS, "dnat")
    ratios["early_upcall/dnat"] = report.rate_ratio(throughput, "early_upcall", "dnat")
    ratios["early_upcall/dnat_per_cpu_second"] = report.cpu_ratio(throughput, "early_upcall", "dnat")
    for theirs in ("dnat6", "map6", "dnat6_no_option"):
        ratios[f"early6/{theirs}"] = report.rate_ratio(throughput, "early6", theirs)
        ratios[f"early6/{theirs}_per_cpu_second"] = report.cpu_ratio(throughput, "early6", theirs)
    report.show_ratios(console, ratios)
    report.show(console, throughput, figures)
    goals = [Goal(f"early{suffix}/dnat{suffix}", 0.95) for suffix in ("", "6")]
    charts = [
        report.rate_chart(throughput, "early", LABELS),
        report.cpu_chart(figures, "early", LABELS),
        report.latency_chart(latency[1], "early", LABELS),
    ]
    return Result("early", ratios, figures, goals, charts)
