"""Clients that complete their handshake and say nothing: what do 100,000 of them cost?

Topology: tests/netns/gateway.py, with clients that have no sockets (tests/netns/bare.py), half of each family. Four
times, each at a port of its own, and each beginning with what is there already:

- *late*: a service that reads first payloads. Nobody should remember anything.
- *on_silence*: one that has a target for silent clients, too. A worker remembers these, up to its bound
  (`pending.connections`); those beyond push out the oldest ones, which are served only if they speak after all. When
  `first_payload_timeout` is over, those that are left have their target.
- *accepted*: for comparison, fewer of them at a program on the gateway that accepts every connection, behind conntrack.
- *haproxy*: fewer of them at HAProxy, which waits for a first payload as its manual has it (`inspect-delay`), without
  conntrack. It has no `defer-accept`, with which the kernel would ask these clients once more before HAProxy sees them:
  they have no sockets, and would not answer.

Memory is that of the workers, and of HAProxy (VmRSS), and of the kernel's objects for connections (/proc/slabinfo); the
whole of the kernel's slab (/proc/meminfo) is told as well, and is coarser. All of it is the machine's: others must be
quiet.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from steerd.model import Reason
from steerd.telemetry.counters import Counters, Extra
from tests.bench.report import table
from tests.bench.scenario import Bar, Chart, Goal, Result, count_of
from tests.netns import flood
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, Gateway, gateway
from tests.netns.lab import Host

SILENT = count_of(100_000)
ACCEPTED = count_of(16_000)
"""A process may have 20,000 files open on some machines."""
AT_HAPROXY = count_of(9_000)
PORTS = {"late": 80, "on_silence": 25, "accepted": 81, "haproxy": 82}
PATIENCE = 30
LABELS = {
    "late": "steerd",
    "haproxy": "HAProxy",
    "accepted": "a program that accepts",
    "on_silence": "steerd, on_silence",
}
_SLABS = ("nf_conntrack", "TCP", "TCPv6", "request_sock_TCP", "request_sock_TCPv6", "sock_inode_cache")
CONFIG = f"""
[gateway.limits]
source_rate = 1000000
source_burst = 1000000
stranger_rate = 1000000
stranger_burst = 1000000
total_rate = 1000000
total_burst = 1000000
[pools.tenants]
prefixes = ["10.64.1.0/28", "fd00:64::1:0/124"]
[services.late]
endpoints = ["{ENDPOINT4}:80/tcp", "[{ENDPOINT6}]:80/tcp"]
inspect = ["http"]
default = ["10.64.1.1:8080", "[fd00:64::1:1]:8080"]
[services.on_silence]
endpoints = ["{ENDPOINT4}:25/tcp", "[{ENDPOINT6}]:25/tcp"]
inspect = ["http"]
first_payload_timeout = {PATIENCE}
default = ["10.64.1.1:8080", "[fd00:64::1:1]:8080"]
on_silence = ["10.64.1.2:8080", "[fd00:64::1:2]:8080"]
"""
# Objects are counted for the whole machine, so the client must not have any.
UNTRACKED = """
table inet untracked {
    chain sent { type filter hook output priority raw; meta l4proto tcp notrack; }
    chain received { type filter hook prerouting priority raw; meta l4proto tcp notrack; }
}
"""
ACCEPTOR = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], 81), family=family, backlog=4096)
print("listening", flush=True)
connections = []
while True:
    connections.append(listener.accept()[0])
"""


HAPROXY = f"""\
global
    nbthread 2
    maxconn 9200
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend silent
    bind {ENDPOINT4}:82,[{ENDPOINT6}]:82 backlog 4096
    tcp-request inspect-delay 60s
    tcp-request content accept if HTTP
    default_backend daemon
backend daemon
    server daemon 10.64.1.1:8080
"""
NOT_TRACKED = """
table inet not_tracked {
    chain received { type filter hook prerouting priority raw; tcp dport 82 notrack; }
    chain sent { type filter hook output priority raw; tcp sport 82 notrack; }
}
"""


class Memory(NamedTuple):
    """What is there at one moment."""

    programs: int
    """Bytes of the workers and of HAProxy."""
    objects: int
    """Bytes of the kernel's connections: conntrack entries, sockets, half-open connections."""
    slab: int
    """Bytes of all the kernel's objects."""
    entries: int
    """In conntrack."""
    upcalls: int
    """So far."""

    def since(self, before: Memory) -> Memory:
        """The difference."""
        return Memory(*(now - then for now, then in zip(self, before, strict=True)))


def _memory(lab: Gateway, haproxy: int) -> Memory:
    pids = [haproxy, *(event["pid"] for event in lab.events() if event["event"] == "worker bound")]
    return Memory(
        programs=sum(_kilobytes(Path(f"/proc/{pid}/status"), "VmRSS:") for pid in pids) * 1024,
        objects=_objects(),
        slab=_kilobytes(Path("/proc/meminfo"), "Slab:") * 1024,
        entries=int(lab.host.sh("cat /proc/sys/net/netfilter/nf_conntrack_count")),
        upcalls=lab.counters()["diverted"],
    )


def _kilobytes(path: Path, name: str) -> int:
    return next(int(row.split()[1]) for row in path.read_text().splitlines() if row.startswith(name))


def _objects() -> int:
    rows = (row.split() for row in Path("/proc/slabinfo").read_text().splitlines())
    return sum(int(row[1]) * int(row[3]) for row in rows if row[0] in _SLABS)


def _connect(lab: Gateway, port: int, count: int) -> None:
    """Open silent connections, half of each family."""
    for version in ("4", "6"):
        client = lab.spawn(lab.client, sys.executable, "-m", "tests.netns.bare", version, f"{port}", f"{count // 2}")
        output, _ = client.communicate()
        established = int(output.split()[1])
        if established < count // 2:
            raise SystemExit(f"bench: only {established} of {count // 2} handshakes were answered at port {port}")


def _measure(lab: Gateway, haproxy: int, what: str, count: int) -> dict[str, Any]:
    before = _memory(lab, haproxy)
    _connect(lab, PORTS[what], count)
    cost = _memory(lab, haproxy).since(before)
    return {
        "connections": count,
        "programs_bytes": cost.programs,
        "kernel_objects_bytes": cost.objects,
        "kernel_slab_bytes": cost.slab,
        "conntrack_entries": cost.entries,
        "upcalls": cost.upcalls,
        "bytes_a_connection": round((cost.programs + cost.objects) / count, 1),
    }


def _served(counters: Counters) -> dict[str, int]:
    """Wait until the patience with the silent ones is over; what became of them."""
    pushed_out = counters.total(Extra.EVICTED_TOTAL)
    remembered = counters.total(Extra.SILENT) - pushed_out
    deadline = time.monotonic() + PATIENCE + 10
    while counters.total(Reason.SILENCE) < remembered and time.monotonic() < deadline:
        time.sleep(0.5)
    return {
        "remembered": remembered,
        "pushed_out": pushed_out,
        "served_at_last": counters.total(Reason.SILENCE),
    }


def _start(lab: Gateway) -> int:
    """The daemon, what it steers to, the program that accepts everything, and HAProxy, whose process id it returns."""
    lab.allow_unasked = True  # these clients are none of the client's own
    lab.expected_warnings.append("queues overflowed; the clients will repeat")
    lab.client.sh(f"nft -f - <<'RULES'\n{UNTRACKED}\nRULES")
    lab.host.sh(
        f"ip route add {flood.SOURCES4} via 198.51.100.1; ip -6 route add {flood.SOURCES6} via 2001:db8:1::1;"
        "sysctl -qw net.core.somaxconn=4096"
    )
    lab.configure(CONFIG)
    lab.start()
    lab.respond(("10.64.1.1", 2, 8080), ("fd00:64::1:1", 2, 8080))
    for address in (ENDPOINT4, ENDPOINT6):
        acceptor = lab.spawn(lab.host, sys.executable, "-c", ACCEPTOR, address)
        assert acceptor.stdout is not None and acceptor.stdout.readline() == "listening\n"
    lab.host.sh(f"nft -f - <<'RULES'\n{NOT_TRACKED}\nRULES")
    config = lab.directory / "haproxy"
    config.write_text(HAPROXY)
    haproxy = lab.spawn(lab.host, "haproxy", "-db", "-q", "-f", str(config))
    lab.wait(lambda: ":82" in lab.host.sh("ss -Hltn sport = :82"), "HAProxy listens")
    return haproxy.pid


def run(console: Console) -> Result:
    """All four in turn; a minute and a half."""
    with ExitStack() as stack:

        def new_host(role: str) -> Host:
            host = Host(role)
            stack.callback(host.close)
            return host

        lab = stack.enter_context(gateway(new_host))
        haproxy = _start(lab)
        counts = {"late": SILENT, "haproxy": AT_HAPROXY, "accepted": ACCEPTED, "on_silence": SILENT}
        figures = {what: _measure(lab, haproxy, what, count) for what, count in counts.items()}
        counters = Counters.open(lab.directory / "run" / "counters")
        figures["on_silence"] |= _served(counters)
    shown = table("what silent connections cost, in bytes", "", *figures)
    for name in figures["late"]:
        shown.add_row(name, *(f"{each[name]:,}" for each in figures.values()))
    console.print(shown)
    silence = figures["on_silence"]
    console.print(
        f"on_silence: {silence['remembered']:,} remembered, {silence['pushed_out']:,} pushed out,"
        f" {silence['served_at_last']:,} served when their time was over"
    )
    ratios = {
        f"{what}_memory/{theirs}": figures[what]["bytes_a_connection"] / figures[theirs]["bytes_a_connection"]
        for what in ("late", "on_silence")
        for theirs in ("haproxy", "accepted")
    }
    bars = [
        Bar(LABELS[what], found["bytes_a_connection"] / 100, ours=what in ("late", "on_silence"))
        for what, found in figures.items()
    ]
    title = "Memory for 10,000 silent connections at the gateway in MB (less is better)"
    return Result(
        "silent",
        ratios,
        figures,
        [Goal("late_memory/haproxy", 0.05, at_least=False)],
        [Chart("memory", title, bars)],
    )
