"""Early steering against plain kernel DNAT: connections a second, latency, and CPU time of everybody who took part.

                             client (lo: 198.51.100.1 .. .32, 2001:db8:1::1 .. ::20)
                               |                                      |
         192.0.2.0/30, 2001:db8:a::/126                     192.0.2.4/30, 2001:db8:b::/126
                               |                                      |
                            gateway `steered`                      gateway `translated`
    203.0.113.10, 2001:db8::10, steerd with two workers     203.0.113.20, 2001:db8::20, one nft rule a family
                               1,024 aliases, and as many listening sockets, on each

A connection is: connect, read the daemon's name (which is checked), close. To `steered` every connection goes to one
port and carries the extension of its alias; to `translated` it goes to a port of its alias's own, which
`dnat to tcp dport map` translates: what one would write without steerd. Both are measured with the same IP option on
every packet, since the option alone costs the kernel something; a third figure is DNAT without it.

Fair play: client, server, number of sockets, aliases, connections at a time and CPUs are the same. Nothing is pinned,
and there are two clients and two servers, so that both sides can use both cores of a small machine: the rate is then
that of the whole machine, client and server included. What each part took is told by its CPU time: `all` is that of
client, server and steerd together, and `..._per_cpu_second` compares connections per second of it, which holds on a
busy machine too (`machine_...` is everything that ran meanwhile, whosever it was). The kinds take turns, round by
round; between rounds conntrack is emptied, so that no limit has to be raised and no `ct timeout` is needed for the
plain rule, and no source port is used twice in one bench.
"""

from __future__ import annotations

import ipaddress
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from steerd.core.pools import Pool
from steerd.kernel import aliases
from steerd.model import Extension
from steerd.wire import portext
from tests.bench.scenario import Result, Spread, compile_c, spread
from tests.netns.lab import Host, link

ROOT = Path(__file__).resolve().parents[2]
ALIASES = 1024
SERVERS = CLIENTS = 2
SOURCES = 32
FIRST_ALIAS = {4: "10.64.0.0", 6: "fd00:64::"}
FIRST_SOURCE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
STEERED = {4: "203.0.113.10", 6: "2001:db8::10"}
TRANSLATED = {4: "203.0.113.20", 6: "2001:db8::20"}
STEERED_PORT = 443
FIRST_TRANSLATED_PORT = 20000
ALIAS_PORT = 8080
POOL = Pool("tenants", (ipaddress.ip_network("10.64.0.0/22"), ipaddress.ip_network("fd00:64::/118")))

# Many short rounds: whatever else the machine does then disturbs neighbours alike, and a few rounds are quiet.
ROUNDS = 15
COUNT = 6_000
PARALLEL = 64
LATENCY_ROUNDS = 3
LATENCY_COUNTS = {1: 1500, 32: 6000}
# A round takes half a second; one that takes so long has failed.
ROUND_SECONDS = 30
# The last FINs have passed, and what they leave behind can be thrown away.
SETTLE_SECONDS = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")

CONFIG = f"""\
[gateway]
state_dir = "{{directory}}/state"
run_dir = "{{directory}}/run"
workers = 2

[gateway.limits]            # all of these connections come from a few addresses
source_rate = 1000000
source_burst = 1000000
stranger_rate = 1000000
stranger_burst = 1000000
total_rate = 1000000
total_burst = 1000000

[pools.tenants]
prefixes = ["10.64.0.0/22", "fd00:64::/118"]

[services.everything]
endpoints = ["{STEERED[4]}:{STEERED_PORT}/tcp", "[{STEERED[6]}]:{STEERED_PORT}/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = {{{{ pool = "tenants", by = "extension", port = {ALIAS_PORT} }}}}
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


class Round(NamedTuple):
    """What one round gave. CPU times in microseconds for each connection."""

    rate: float
    p50_us: float
    p99_us: float
    retried: int
    cpu_us: dict[str, float]


class Lab:
    """The hosts and programs of one run; closed by the stack it is given."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steerd-bench-")))
        self._load = compile_c(Path(__file__).with_name("load.c"), self.directory)
        self._server = compile_c(Path(__file__).with_name("server.c"), self.directory)
        self.client = self._host("client")
        self.steered = self._host("steered")
        self.translated = self._host("translated")
        self._link(self.steered, STEERED, 0, "a")
        self._link(self.translated, TRANSLATED, 4, "b")
        self.client.sh(
            "".join(
                f"ip addr add {ipaddress.ip_address(first) + number} dev lo;"
                for first in FIRST_SOURCE.values()
                for number in range(SOURCES)
            )
        )
        self._tuple = 0
        self.daemon = self._start_steerd()
        self._translate()
        self._servers = {True: self._serve(self.steered), False: self._serve(self.translated)}

    def _host(self, role: str) -> Host:
        host = Host(role)
        self._stack.callback(host.close)
        return host

    def _spawn(self, host: Host, *argv: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            host.command(*argv), cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
        )
        self._stack.callback(_end, process)
        return process

    def _link(self, gateway: Host, endpoint: dict[int, str], offset: int, name: str) -> None:
        device = f"eth-{name}"
        link(self.client, device, gateway, "eth0")
        client4, gateway4 = f"192.0.2.{offset + 1}", f"192.0.2.{offset + 2}"
        client6, gateway6 = f"2001:db8:{name}::1", f"2001:db8:{name}::2"
        self.client.sh(
            f"ip addr add {client4}/30 dev {device}; ip addr add {client6}/126 dev {device} nodad;"
            f"ip route add {endpoint[4]} via {gateway4}; ip route add {endpoint[6]} via {gateway6}"
        )
        gateway.sh(
            f"ip addr add {gateway4}/30 dev eth0; ip addr add {gateway6}/126 dev eth0 nodad;"
            f"ip addr add {endpoint[4]}/32 dev lo; ip addr add {endpoint[6]}/128 dev lo nodad;"
            f"ip route add 198.51.100.0/24 via {client4}; ip route add 2001:db8:1::/64 via {client6};"
            "sysctl -qw net.core.somaxconn=4096"
        )

    def _start_steerd(self) -> subprocess.Popen[str]:
        config, log = self.directory / "steerd.toml", self.directory / "log"
        config.write_text(CONFIG.format(directory=self.directory))
        with log.open("w") as stderr:
            process = self._spawn(
                self.steered, sys.executable, "-m", "steerd.cli.main", "run", str(config), stderr=stderr
            )
        deadline = time.monotonic() + 30
        while '"event": "ready"' not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: steerd did not start:\n{log.read_text()}")
            time.sleep(0.02)
        return process

    def _translate(self) -> None:
        """Plain DNAT: a port of the endpoint for each alias."""
        with self.translated.entered():
            aliases.reconcile([POOL])
        rules = ""
        for version, family in ((4, "ip"), (6, "ip6")):
            base = ipaddress.ip_address(FIRST_ALIAS[version])
            pairs = ", ".join(f"{FIRST_TRANSLATED_PORT + n} : {base + n} . {ALIAS_PORT}" for n in range(ALIASES))
            rules += f"{family} daddr {TRANSLATED[version]} dnat {family} to tcp dport map {{ {pairs} }}\n"
        path = self.directory / "dnat.nft"
        path.write_text(
            f"table inet plain {{ chain translate {{\ntype nat hook prerouting priority dstnat;\n{rules}}}\n}}\n"
        )
        self.translated.sh(f"nft -f {path}")

    def _serve(self, host: Host) -> list[subprocess.Popen[str]]:
        share = ALIASES // SERVERS
        processes = []
        for number in range(SERVERS):
            runs: list[str] = []
            for first in FIRST_ALIAS.values():
                runs += [str(ipaddress.ip_address(first) + number * share), str(share)]
            process = self._spawn(host, str(self._server), str(ALIAS_PORT), *runs)
            assert process.stdout is not None
            if process.stdout.readline().strip() != f"listening {2 * share}":
                raise SystemExit("bench: a server did not start")
            processes.append(process)
        return processes

    def round(self, kind: Kind, count: int, parallel: int) -> Round:
        """`count` connections in all; ends the bench if one was answered by the wrong daemon or not at all."""
        clients = CLIENTS if parallel >= CLIENTS else 1
        processes = [self._client(kind, count // clients, parallel // clients) for _ in range(clients)]
        for process in processes:
            if _line(process) != "ready":
                raise SystemExit("bench: a client did not start")
        before = self._cpu(kind)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        results = [_line(process).split() for process in processes]
        after = self._cpu(kind)
        for process in processes:
            _end(process)
        if any(len(result) != 10 for result in results):
            raise SystemExit(f"bench: a client of {kind.name} ended early")
        good, wrong, failed = (sum(int(result[column]) for result in results) for column in range(3))
        if wrong or failed or good != count // clients * clients:
            raise SystemExit(
                f"bench: {kind.name}: {good} answered right, {wrong} by the wrong daemon, {failed} not at all"
            )
        start, end = min(float(result[3]) for result in results), max(float(result[4]) for result in results)
        cpu = {name: after[name] - before[name] for name in after}
        cpu["client"] = sum(float(result[5]) + float(result[6]) for result in results)
        cpu["all"] = sum(seconds for name, seconds in cpu.items() if not name.startswith("machine"))
        time.sleep(SETTLE_SECONDS)
        (self.steered if kind.steered else self.translated).sh("conntrack -F 2>/dev/null")
        return Round(
            rate=good / (end - start),
            p50_us=statistics.median(float(result[7]) for result in results),
            p99_us=max(float(result[8]) for result in results),
            retried=sum(int(result[9]) for result in results),
            cpu_us={name: seconds * 1e6 / good for name, seconds in cpu.items()},
        )

    def _client(self, kind: Kind, count: int, parallel: int) -> subprocess.Popen[str]:
        none = Extension(0, 0)
        numbers = portext.Numbers()
        template = portext.encode_ipv4(none, numbers) if kind.version == 4 else portext.encode_ipv6(none, numbers)
        ports = (STEERED_PORT, 1) if kind.steered else (FIRST_TRANSLATED_PORT, ALIASES)
        endpoint = (STEERED if kind.steered else TRANSLATED)[kind.version]
        process = self._spawn(
            self.client, str(self._load), str(kind.version), endpoint, *map(str, ports),
            FIRST_ALIAS[kind.version], str(ALIASES), template.hex() if kind.option else "-",
            str(template.index(numbers.exid.to_bytes(2, "big")) + 2), FIRST_SOURCE[kind.version], str(SOURCES),
            str(self._tuple), str(count), str(parallel), str(ROUND_SECONDS),
        )  # fmt: skip
        self._tuple += count
        return process

    def _cpu(self, kind: Kind) -> dict[str, float]:
        """Seconds of CPU time used so far: by parts of the gateway, and by the whole machine."""
        workers = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children").read_text().split()
        user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
        used = {
            "server": sum(sum(_times(str(process.pid))) for process in self._servers[kind.steered]),
            "machine_user": (user + nice) / _TICKS,
            "machine_kernel": (system + irq + softirq) / _TICKS,
        }
        if kind.steered:
            used["workers_user"] = sum(_times(worker)[0] for worker in workers)
            used["workers_kernel"] = sum(_times(worker)[1] for worker in workers)
            used["main"] = sum(_times(str(self.daemon.pid)))
        return used


def _times(pid: str) -> tuple[float, float]:
    """(user, kernel) CPU seconds of a process, from /proc/PID/stat; precise to a tick, hence to be summed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / _TICKS, int(fields[12]) / _TICKS


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def run(console: Console) -> Result:
    """All kinds in turn, then their latency; about two minutes."""
    with ExitStack() as stack:
        lab = Lab(stack)
        progress = stack.enter_context(Progress(console=console))
        steps = (1 + ROUNDS + LATENCY_ROUNDS * len(LATENCY_COUNTS)) * len(KINDS)
        task = progress.add_task("rounds", total=steps)

        def rounds(number: int, count: int, parallel: int) -> dict[str, list[Round]]:
            measured: dict[str, list[Round]] = {kind.name: [] for kind in KINDS}
            for _ in range(number):
                for kind in KINDS:
                    measured[kind.name].append(lab.round(kind, count, parallel))
                    progress.advance(task)
            return measured

        rounds(1, 8 * ALIASES, PARALLEL)  # puts (nearly) every target into the kernel's maps, by both workers
        throughput = rounds(ROUNDS, COUNT, PARALLEL)
        latency = {parallel: rounds(LATENCY_ROUNDS, count, parallel) for parallel, count in LATENCY_COUNTS.items()}
    result = _result(throughput, latency)
    _print(console, result, throughput)
    return result


def _result(throughput: dict[str, list[Round]], latency: dict[int, dict[str, list[Round]]]) -> Result:
    figures: dict[str, Any] = {}
    for kind in KINDS:
        rounds = throughput[kind.name]
        rate = spread([r.rate for r in rounds])
        figures[kind.name] = {
            "connections_per_s": round(rate.median),
            "lowest_per_s": round(rate.lowest),
            "highest_per_s": round(rate.highest),
            "retried": sum(r.retried for r in rounds),
            "cpu_us_per_connection": {
                name: round(statistics.mean(r.cpu_us[name] for r in rounds), 1) for name in rounds[0].cpu_us
            },
            "first_byte_us": {
                f"{parallel}_at_a_time": {
                    "p50": round(statistics.median(r.p50_us for r in measured[kind.name])),
                    "p99": round(statistics.median(r.p99_us for r in measured[kind.name])),
                }
                for parallel, measured in latency.items()
            },
        }
    figures["conditions"] = {
        "rounds": ROUNDS, "connections_a_round": COUNT, "at_a_time": PARALLEL, "aliases": ALIASES,
        "clients": CLIENTS, "servers": SERVERS, "workers": 2, "pinned": False, "all_on_one_machine": True,
    }  # fmt: skip

    def ratio(ours: str, theirs: str) -> float:
        # Round by round, since what disturbs the machine for a while disturbs neighbours alike.
        pairs = zip(throughput[ours], throughput[theirs], strict=True)
        return round(statistics.median(a.rate / b.rate for a, b in pairs), 3)

    def per_cpu_second(ours: str, theirs: str) -> float:
        cost = {name: statistics.median(r.cpu_us["all"] for r in throughput[name]) for name in (ours, theirs)}
        return round(cost[theirs] / cost[ours], 3)

    ratios = {}
    for ours, theirs in (("early", "dnat"), ("early6", "dnat6")):
        ratios[f"{ours}/{theirs}"] = ratio(ours, theirs)
        ratios[f"{ours}/{theirs}_no_option"] = ratio(ours, f"{theirs}_no_option")
        ratios[f"{ours}/{theirs}_per_cpu_second"] = per_cpu_second(ours, theirs)
    return Result("early", ratios, figures)


def _print(console: Console, result: Result, throughput: dict[str, list[Round]]) -> None:
    rates = Table(title="connect to first byte in us, 1 and 32 at a time")
    for column in ("", f"connections/s, {ROUNDS} rounds", "p50, 1", "p99", "p50, 32", "p99"):
        rates.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, rounds in throughput.items():
        one, many = result.figures[name]["first_byte_us"].values()
        row: list[object] = [name, _rate(rounds), one["p50"], one["p99"], many["p50"], many["p99"]]
        rates.add_row(*map(str, row))
    console.print(rates)
    parts = Table(title="CPU time, us a connection (kernel work is charged to whoever it interrupts)")
    columns = ("client", "server", "workers_user", "workers_kernel", "main", "all")
    parts.add_column("", no_wrap=True)
    for column in columns:
        parts.add_column(column.replace("_", " "), justify="right")
    for name in throughput:
        cpu = result.figures[name]["cpu_us_per_connection"]
        parts.add_row(name, *(f"{cpu[column]:.1f}" if column in cpu else "" for column in columns))
    console.print(parts)
    for name, value in result.ratios.items():
        console.print(f"{name} = {value:.3f}")


def _rate(rounds: list[Round]) -> Spread:
    return spread([r.rate for r in rounds])
