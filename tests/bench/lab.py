"""The hosts and programs of scenarios that open connections through gateways.

                         client (lo: 198.51.100.1 .. .32, 2001:db8:1::1 .. ::20)
                           |               |                 |        one link for each gateway n = 0, 1, ...:
                       gateway 0       gateway 1  ...    gateway n    192.0.2.4n/30, 2001:db8:a:n::/126
    endpoint on lo:   203.0.113.10    203.0.113.20                    203.0.113.10(n+1), 2001:db8::10(n+1)

Every gateway has the same aliases and the same daemons on them, and one thing, the system under test, that leads from
its endpoint to them. A daemon answers with its name, which every client checks.

A round that fails in any connection is void: it is counted and repeated (where a system cannot do better, `loses`, its
failures are counted instead). A wrong daemon ends the bench.

There are PARTS clients, servers, and workers of the system under test. With ENOUGH_CORES, clients have cores of their
own. With fewer, nothing is pinned, so that everything can use both cores of a small machine: the rate is that of the
whole machine, everybody included, and what each took is told by its CPU time. (Tried on two: the generator on one core,
the rest on the other. Then every packet is handed from core to core, and on a virtual machine the interrupts for that
triple the time of an exchange and drown what is compared.)
Only where one thing happens at a time is everybody on one core: whether a wake-up crosses cores is the scheduler's
whim, and would double the time of an exchange in one round and not in the next.

On a machine that is busy otherwise, the scheduler gives more to whoever has more processes: there, CPU time alone means
something.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from steerd.core.pools import Pool
from steerd.kernel import aliases
from steerd.model import Extension
from steerd.wire import portext
from tests.bench.scenario import compile_c
from tests.netns.lab import Host, link

ROOT = Path(__file__).resolve().parents[2]
SOURCES = 32
FIRST_ALIAS = {4: "10.64.0.0", 6: "fd00:64::"}
FIRST_SOURCE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
ENDPOINT_PORT = 443
FIRST_TRANSLATED_PORT = 20000
ALIAS_PORT = 8080
# A round takes a second; one that takes so long has failed.
ROUND_SECONDS = 30
MAX_VOID = 3
HOLD_SECONDS = 60
# What a client says by its status.
WRONG_DAEMON = 3
PARTS = 2
ENOUGH_CORES = 2 * PARTS
# The last FINs have passed, and what they leave behind can be thrown away.
SETTLE_SECONDS = 0.2
START_SECONDS = 30
PACKETS_MILLISECONDS = BULK_MILLISECONDS = 500
_TICKS = os.sysconf("SC_CLK_TCK")

STEERD = """\
[gateway]
state_dir = "{directory}/state"
run_dir = "{directory}/run"
user = "root"
workers = {workers}

[gateway.limits]            # all of these connections come from a few addresses
source_rate = 1000000
source_burst = 1000000
stranger_rate = 1000000
stranger_burst = 1000000
total_rate = 1000000
total_burst = 1000000

[pools.tenants]
prefixes = ["10.64.0.0/21", "fd00:64::/117"]
size = {size}
"""
EXTENDED = f"""\
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = {{ pool = "tenants", by = "extension", port = {ALIAS_PORT} }}
"""
"""The rest of a service that steers by extension."""
SERVICE = """
[services.{name}]
endpoints = ["{endpoint4}:{port}/{protocol}", "[{endpoint6}]:{port}/{protocol}"]
"""


class VoidRoundError(Exception):
    """A round in which something failed."""


class Run(NamedTuple):
    """Daemons of one kind (see server.c) on neighbouring aliases."""

    what: str
    request: int
    """Bytes that they read before they answer."""
    first: int
    size: int


@dataclasses.dataclass
class Gateway:
    """A host with an endpoint and daemons behind it."""

    name: str
    host: Host
    endpoint: dict[int, str]
    directory: Path
    servers: list[subprocess.Popen[str]] = dataclasses.field(default_factory=list)
    system: subprocess.Popen[str] | None = None
    """The system under test: this process and all below it; None: nothing but the kernel."""

    def system_pids(self) -> list[str]:
        if self.system is None:
            return []
        pids = [str(self.system.pid)]
        for pid in pids:  # grows: steerd's workers are its nursery's children
            pids += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return pids


class Way(NamedTuple):
    """How a client asks for a daemon: the settings of tests/bench/common.h."""

    gateway: Gateway
    version: int
    port: int
    ports: int
    option: bytes = b""
    option_at: int = 0
    request: bytes = b""
    request_at: int = 0
    records: str = ""
    loses: bool = False
    """Connections that fail are a part of the result."""


class Named(Protocol):
    """Whatever takes turns."""

    @property
    def name(self) -> str: ...


class Round(NamedTuple):
    """Connections opened in one round. CPU times in microseconds for each connection."""

    rate: float
    p50_us: float
    p99_us: float
    retried: int
    good: int
    failed: int
    cpu_us: dict[str, float]
    generator_cores: float
    """How many cores the clients took, with what the kernel did in their name, such as handing on their packets."""


class Packets(NamedTuple):
    """Datagrams of established flows, there and back."""

    rate: float
    """... a second, both ways counted."""
    lost: int
    cpu_us: float
    """CPU time of client and server for each, with what the kernel did in their name."""


class Programs(NamedTuple):
    """Which C programs are the client that opens, the one that uses what is open, and the server."""

    load: str = "load"
    stream: str = "stream"
    server: str = "server"


class Bulk(NamedTuple):
    """What established connections carried, all together."""

    bits_per_s: float
    cpu_ms_per_mb: float
    """CPU time of client, server and system under test."""


class Exchange(NamedTuple):
    """Requests and responses on established connections."""

    rate: float
    p50_us: float
    p99_us: float


class Held:
    """Connections that stay open until `release`."""

    def __init__(self, process: subprocess.Popen[str], count: int, seconds: float) -> None:
        self._process = process
        self.count = count
        self.seconds = seconds
        """... that it took to open them."""

    def still_there(self) -> int:
        """Have a byte come back on each of them; on how many it did."""
        _tell(self._process)
        return int(_line(self._process))

    def release(self) -> None:
        """Reset them all."""
        _end(self._process)


_K = TypeVar("_K", bound=Named)
_R = TypeVar("_R")


class Lab:
    """The hosts and programs of one run; closed by the stack it is given."""

    def __init__(
        self,
        stack: ExitStack,
        runs: Sequence[Run],
        programs: Programs = Programs(),  # noqa: B008
        servers: int = PARTS,
    ) -> None:
        """`runs`: the daemons on every gateway, from alias 0 on without a gap, in so many server processes."""
        self._stack = stack
        self._servers = servers
        self._who = programs
        self.runs = runs
        self.size = sum(run.size for run in runs)
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steerd-bench-")))
        self._programs = {name: compile_c(Path(__file__).with_name(f"{name}.c"), self.directory) for name in programs}
        self.gateways: list[Gateway] = []
        self.void: dict[str, int] = {}
        self._tuple = 0
        self.client = self._host("client")
        self.client.sh(
            "".join(
                f"ip addr add {ipaddress.ip_address(first) + number} dev lo;"
                for first in FIRST_SOURCE.values()
                for number in range(SOURCES)
            )
        )

    # ---- hosts ----
    def _host(self, role: str) -> Host:
        host = Host(role)
        self._stack.callback(host.close)
        return host

    def spawn(self, host: Host, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """A program on a host."""
        process = subprocess.Popen(
            host.command(*argv), cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
        )
        self._stack.callback(_end, process)
        return process

    def gateway(self, name: str) -> Gateway:
        """One more gateway, with its endpoint, its aliases and its daemons, and nothing that leads to them."""
        number = len(self.gateways)
        host = self._host(name)
        endpoint = {4: f"203.0.113.{10 * (number + 1)}", 6: f"2001:db8::{10 * (number + 1)}"}
        gateway = Gateway(name, host, endpoint, self.directory / name)
        gateway.directory.mkdir()
        self.gateways.append(gateway)
        device = f"eth{number}"
        link(self.client, device, host, "eth0")
        client4, gateway4 = f"192.0.2.{4 * number + 1}", f"192.0.2.{4 * number + 2}"
        client6, gateway6 = f"2001:db8:a:{number}::1", f"2001:db8:a:{number}::2"
        self.client.sh(
            f"ip addr add {client4}/30 dev {device}; ip addr add {client6}/126 dev {device} nodad;"
            f"ip route add {endpoint[4]} via {gateway4}; ip route add {endpoint[6]} via {gateway6}"
        )
        host.sh(
            f"ip addr add {gateway4}/30 dev eth0; ip addr add {gateway6}/126 dev eth0 nodad;"
            f"ip addr add {endpoint[4]}/32 dev lo; ip addr add {endpoint[6]}/128 dev lo nodad;"
            f"ip route add 198.51.100.0/24 via {client4}; ip route add 2001:db8:1::/64 via {client6};"
            # What manuals of proxies ask for; the same everywhere.
            "sysctl -qw net.core.somaxconn=4096 net.ipv4.ip_local_port_range='1024 65535' net.ipv4.tcp_tw_reuse=1"
        )
        with host.entered():
            aliases.reconcile([_pool(self.size)])
        gateway.servers = [self._serve(gateway, part) for part in range(self._servers)]
        return gateway

    def _serve(self, gateway: Gateway, part: int) -> subprocess.Popen[str]:
        """One of the server processes of a gateway: its share of every run."""
        arguments: list[str] = []
        listening = 0
        for run in self.runs:
            begin, end = (run.first + run.size * n // self._servers for n in (part, part + 1))
            for first in FIRST_ALIAS.values():
                arguments += [run.what, str(run.request), str(ipaddress.ip_address(first) + begin), str(end - begin)]
                listening += end - begin
        process = self.spawn(gateway.host, str(self._programs[self._who.server]), str(ALIAS_PORT), *arguments)
        if _line(process) != f"listening {listening}":
            raise SystemExit("bench: a server did not start")
        return process

    # ---- systems under test ----
    def service(self, gateway: Gateway, name: str, port: int, protocol: str) -> str:
        """The beginning of a service of steerd's, in TOML."""
        return SERVICE.format(
            name=name, endpoint4=gateway.endpoint[4], endpoint6=gateway.endpoint[6], port=port, protocol=protocol
        )

    def steerd(self, gateway: Gateway, service: str, head: str | None = None, workers: int = PARTS) -> None:
        """steerd on a gateway; `service`: the rest of its service's configuration, in TOML, behind `head`, or behind a
        TCP endpoint."""
        head = self.service(gateway, "everything", ENDPOINT_PORT, "tcp") if head is None else head
        config, log = gateway.directory / "steerd.toml", gateway.directory / "log"
        config.write_text(
            STEERD.format(
                directory=gateway.directory,
                workers=workers,
                size=self.size,
            )
            + head
            + service
        )
        with log.open("w") as stderr:
            gateway.system = self.spawn(gateway.host, sys.executable, "-m", "steerd", "run", str(config), stderr=stderr)
        self.wait(gateway, log, lambda: '"event": "ready"' in log.read_text())

    def translate(self, gateway: Gateway, protocol: str = "tcp") -> None:
        """Plain DNAT: a port of the endpoint for each alias."""
        # As steerd has it for what it steers; finished connections must not fill the table.
        gateway.host.sh("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=10")
        rules = ""
        for version, family in ((4, "ip"), (6, "ip6")):
            base = ipaddress.ip_address(FIRST_ALIAS[version])
            pairs = ", ".join(f"{FIRST_TRANSLATED_PORT + n} : {base + n} . {ALIAS_PORT}" for n in range(self.size))
            rules += f"{family} daddr {gateway.endpoint[version]} dnat {family} to {protocol} dport map {{ {pairs} }}\n"
        path = gateway.directory / "dnat.nft"
        path.write_text(
            f"table inet plain {{ chain translate {{\ntype nat hook prerouting priority dstnat;\n{rules}}}\n}}\n"
        )
        gateway.host.sh(f"nft -f {path}")

    def empty_chains(self, gateway: Gateway, steerd: Gateway) -> None:
        """The base chains of a gateway's steerd, at the same hooks and without a rule: what these alone cost."""
        listed = json.loads(steerd.host.sh("nft -j list chains inet"))["nftables"]
        chains = [
            found for each in listed if (found := each.get("chain", {})).get("hook") and found["table"] == "steerd"
        ]
        rules = "".join(
            f"chain {each['name']} {{ type {each['type']} hook {each['hook']} priority {each['prio']}; }}\n"
            for each in chains
        )
        path = gateway.directory / "empty.nft"
        path.write_text(f"table inet empty {{\n{rules}}}\n")
        gateway.host.sh(f"nft -f {path}")

    def wait(self, gateway: Gateway, log: Path, condition: Callable[[], bool]) -> None:
        """Until the system under test is ready; ends the bench with its log if it does not get there."""
        assert gateway.system is not None
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if gateway.system.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: {gateway.name} did not start:\n{log.read_text()}")
            time.sleep(0.02)

    # ---- measuring ----
    def in_turn(self, number: int, kinds: Iterable[_K], measure: Callable[[_K], _R]) -> dict[str, list[_R]]:
        """`number` rounds of each kind, A B C A B C ...; void ones are repeated and counted."""
        measured: dict[str, list[_R]] = {kind.name: [] for kind in kinds}
        for _ in range(number):
            for kind in kinds:
                measured[kind.name].append(self._valid(kind, measure))
        return measured

    def _valid(self, kind: _K, measure: Callable[[_K], _R]) -> _R:
        while True:
            try:
                return measure(kind)
            except VoidRoundError as reason:
                self.void[kind.name] = self.void.get(kind.name, 0) + 1
                print(f"bench: a round of {kind.name} is void: {reason}", file=sys.stderr)
                if self.void[kind.name] > MAX_VOID:
                    raise SystemExit(f"bench: too many rounds of {kind.name} are void") from reason
            finally:
                self._settle()

    def _settle(self) -> None:
        """Forget the connections of the round that has ended, so that no table fills up in the course of a bench."""
        time.sleep(SETTLE_SECONDS)
        self._asked.host.sh("conntrack -F 2>/dev/null", check=False)

    def connections(self, way: Way, run: Run, count: int, parallel: int) -> Round:
        """Open `count` connections in all to the daemons of a run, `parallel` at a time."""
        clients = min(PARTS, parallel)
        processes = [
            self._client(self._who.load, way, count // clients, first=run.first, daemons=run.size,
                         count=count // clients, parallel=parallel // clients, seconds=ROUND_SECONDS)
            for _ in range(clients)
        ]  # fmt: skip
        self._place(way.gateway, processes, parallel)
        before = self._cpu(way.gateway)
        results = _go(processes)
        after = self._cpu(way.gateway)
        good, wrong, failed = (sum(int(result[column]) for result in results) for column in range(3))
        if wrong:
            raise SystemExit(f"bench: {way.gateway.name}: {wrong} connections were answered by the wrong daemon")
        if not good or (failed and not way.loses):
            raise VoidRoundError(f"{failed} of {count} connections failed")
        start, end = min(float(result[3]) for result in results), max(float(result[4]) for result in results)
        cpu = {name: after[name] - before[name] for name in after}
        cpu["client_user"] = sum(float(result[5]) for result in results)
        cpu["client_kernel"] = sum(float(result[6]) for result in results)
        cpu["all"] = sum(seconds for name, seconds in cpu.items() if not name.startswith("machine"))
        return Round(
            rate=good / (end - start),
            p50_us=statistics.median(float(result[7]) for result in results),
            p99_us=max(float(result[8]) for result in results),
            retried=sum(int(result[9]) for result in results),
            good=good,
            failed=failed,
            cpu_us={name: seconds * 1e6 / good for name, seconds in cpu.items()},
            generator_cores=(cpu["client_user"] + cpu["client_kernel"]) / (end - start),
        )

    def exchanges(self, way: Way, run: Run, count: int, parallel: int) -> Exchange:
        """`count` requests and responses on each of so many established connections."""
        (result,) = self._stream(way, "exchange", run, count, parallel)
        total, start, end = int(result[0]), float(result[1]), float(result[2])
        return Exchange(total / (end - start), float(result[5]), float(result[6]))

    def bulk(self, way: Way, run: Run, parallel: int) -> Bulk:
        """What so many established connections carry in half a second: up to a sink, down from a source."""
        before = self._cpu(way.gateway)
        (result,) = self._stream(way, {"sink": "up", "source": "down"}[run.what], run, 1, parallel)
        after = self._cpu(way.gateway)
        size, start, end, user, system = int(result[0]), *map(float, result[1:5])
        used = sum(after[name] - before[name] for name in after if not name.startswith("machine")) + user + system
        return Bulk(size * 8 / (end - start), used * 1e3 / (size / 1e6))

    def hold(self, way: Way, run: Run, count: int, parallel: int) -> Held:
        """Open so many connections to the daemons of a run (each is checked), and keep them open; the lab's program
        `load` must be "hold". Raises VoidRoundError if one fails."""
        process = self._client(self._who.load, way, count, first=run.first, daemons=run.size, count=count,
                               parallel=parallel, seconds=HOLD_SECONDS)  # fmt: skip
        _tell(process)
        words = _line(process).split()
        if process.poll() == WRONG_DAEMON:
            raise SystemExit("bench: a connection was answered by the wrong daemon")
        if not words or int(words[1]):
            _end(process)
            raise VoidRoundError(f"{words[1] if words else 'all'} of {count} connections failed")
        return Held(process, count, float(words[3]) - float(words[2]))

    def packets(self, way: Way, run: Run, size: int, flows: int) -> Packets:
        """Datagrams of so many bytes on established flows, there and back in bursts, everybody on one core."""
        process = self._client(
            self._who.stream, way, flows, daemon=run.first, parallel=flows, size=size, milliseconds=PACKETS_MILLISECONDS
        )
        self._place(way.gateway, [process], 1)
        before = self._cpu(way.gateway)["server"]
        (result,) = _go([process])
        server = self._cpu(way.gateway)["server"] - before
        returned, lost = int(result[0]), int(result[1])
        start, end, user, system = map(float, result[2:6])
        return Packets(2 * returned / (end - start), lost, (user + system + server) * 1e6 / (2 * returned))

    def _stream(self, way: Way, what: str, run: Run, count: int, parallel: int) -> list[list[str]]:
        settings: dict[str, int | str] = {
            "what": what,
            "daemon": run.first,
            "count": count,
            "parallel": parallel,
            "milliseconds": BULK_MILLISECONDS,
        }
        processes = [self._client(self._who.stream, way, parallel, **settings)]
        self._place(way.gateway, processes, 1 if what == "exchange" and parallel == 1 else PARTS)
        return _go(processes)

    def _client(self, program: str, way: Way, tuples: int, **settings: int | str) -> subprocess.Popen[str]:
        """A client, ready to go; it will use that many source addresses and ports."""
        settings |= {
            "version": way.version,
            "endpoint": way.gateway.endpoint[way.version],
            "port": way.port,
            "ports": way.ports,
            "alias": FIRST_ALIAS[way.version],
            "option": way.option.hex(),
            "option_at": way.option_at,
            "request": way.request.hex(),
            "request_at": way.request_at,
            "records": way.records,
            "source": FIRST_SOURCE[way.version],
            "sources": SOURCES,
            "tuple": self._tuple,
        }
        self._tuple += tuples
        self._asked = way.gateway
        process = self.spawn(
            self.client,
            str(self._programs[program]),
            *(f"{name}={value}" for name, value in settings.items()),
            stderr=subprocess.DEVNULL if way.loses else None,
        )
        if _line(process) != "ready":
            raise SystemExit("bench: a client did not start")
        return process

    def _place(self, gateway: Gateway, clients: list[subprocess.Popen[str]], parallel: int) -> None:
        """Everybody where `placement` says."""
        of_clients, of_others = placement(sorted(os.sched_getaffinity(0)), parallel)
        for processes, cores in (
            ([str(process.pid) for process in clients], of_clients),
            ([str(process.pid) for process in gateway.servers] + gateway.system_pids(), of_others),
        ):
            for pid in processes:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(task.name), cores)

    def _cpu(self, gateway: Gateway) -> dict[str, float]:
        """Seconds of CPU time used so far: by parts of the gateway, and by the whole machine."""
        user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
        used = {
            "server": sum(sum(_times(str(process.pid))) for process in gateway.servers),
            "machine_user": (user + nice) / _TICKS,
            "machine_kernel": (system + irq + softirq) / _TICKS,
        }
        times = [_times(pid) for pid in gateway.system_pids()]
        if times:
            used["system_user"] = sum(user for user, _ in times)
            used["system_kernel"] = sum(kernel for _, kernel in times)
        return used


def extension_option(version: int) -> tuple[bytes, int]:
    """The IP option with a port extension, and the place in it of the extension itself: of a Way."""
    none, numbers = Extension(0, 0), portext.Numbers()
    option = portext.encode_ipv4(none, numbers) if version == 4 else portext.encode_ipv6(none, numbers)
    return option, option.index(numbers.exid.to_bytes(2, "big")) + 2


def placement(cores: Sequence[int], parallel: int) -> tuple[Sequence[int], Sequence[int]]:
    """The cores of clients, and those of servers and of the system under test."""
    if parallel == 1:
        return cores[:1], cores[:1]
    if len(cores) < ENOUGH_CORES:
        return cores, cores
    return cores[-PARTS:], cores[:-PARTS]


def _pool(size: int) -> Pool:
    return Pool("tenants", (ipaddress.ip_network("10.64.0.0/21"), ipaddress.ip_network("fd00:64::/117")), size=size)


def _go(processes: list[subprocess.Popen[str]]) -> list[list[str]]:
    """Have clients that are ready run together; the words of the line that each ends with."""
    for process in processes:
        _tell(process)
    results = [_line(process).split() for process in processes]
    statuses = [process.wait() for process in processes]
    for process in processes:
        _end(process)
    if WRONG_DAEMON in statuses:
        raise SystemExit("bench: a connection was answered by the wrong daemon")
    if any(statuses):
        raise VoidRoundError("a client gave up")
    return results


def _tell(process: subprocess.Popen[str]) -> None:
    """The word that a program waits for."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


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
