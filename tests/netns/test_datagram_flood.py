"""Floods of first datagrams from spoofed sources: bounded work, memory and conntrack, real flows go on.

Topology: tests/netns/gateway.py; the client host is also where the flood comes from.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from steerd.model import Reason
from steerd.telemetry.counters import Counters, Extra
from tests.initials import client_hello, flight
from tests.netns.datagram_flood import HELLO_SIZE, PORTS, query
from tests.netns.datagram_load import ALIAS
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_flood import cpu_seconds

STRANGERS, BURST = 1000, 1000
HELD = 1000
"""Undecided flows of each worker."""
SERVICES = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]

[services.flows]
endpoints = ["203.0.113.10:500/udp", "[2001:db8::10]:500/udp"]
inspect = ["prefix"]
routes = [
    { when.prefix = "a", target = ["10.64.0.1:9000", "[fd00:64::1]:9000"] },
    { when.prefix = "b", target = ["10.64.0.2:9000", "[fd00:64::2]:9000"] },
]

[services.quic]
endpoints = ["203.0.113.10:443/udp", "[2001:db8::10]:443/udp"]
inspect = ["quic"]
routes = [
    { when."quic.sni" = "*.a.example", target = ["10.64.0.1:9443", "[fd00:64::1]:9443"] },
    { when."quic.sni" = "*.b.example", target = ["10.64.0.2:9443", "[fd00:64::2]:9443"] },
]

[services.names]
endpoints = ["203.0.113.10:53/udp", "[2001:db8::10]:53/udp"]
inspect = ["dns"]
routes = [
    { when."dns.qname" = "*.a.example", target = ["10.64.0.1:9053", "[fd00:64::1]:9053"] },
    { when."dns.qname" = "*.b.example", target = ["10.64.0.2:9053", "[fd00:64::2]:9053"] },
]
"""
RATE = 20_000
SECONDS = 250
"""It is ended before, with the real flows."""
ESTABLISHED = 20
PAUSE = 0.004


def limits(**values: int) -> str:
    return "[gateway.limits]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        # The spoofed sources are "behind" the client host, which swallows the answers.
        made.host.sh("ip route add 10.128.0.0/9 via 198.51.100.1; ip -6 route add 2001:db8:f::/48 via 2001:db8:1::1")
        yield made


def start(lab: Gateway, head: str) -> None:
    """steerd, and the daemons behind it."""
    lab.configure(head + SERVICES)
    lab.start()
    # A process for each service, so that the flood of one does not keep the others' daemons busy.
    for port in (9000, 9443, 9053):
        lab.respond(("10.64.0.1", 2, port), ("fd00:64::1", 2, port), program="udp_responder")


def counted(lab: Gateway) -> Counters:
    return Counters.open(lab.directory / "run" / "counters")


def decided_by(counters: Counters) -> int:
    """Datagrams that a worker has judged."""
    return sum(counters.total(word) for word in (Reason.ROUTE, Reason.UNMATCHED, Extra.HELD_DATAGRAMS))


def workers(lab: Gateway) -> list[int]:
    return [event["pid"] for event in lab.events() if event["event"] == "worker bound"]


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def dropped_by_the_machine() -> int:
    """Packets that found no room in front of the network stack, whosever they were, since this machine lacked CPU."""
    rows = Path("/proc/net/softnet_stat").read_text().splitlines()
    return sum(int(row.split()[1], 16) for row in rows)


def entries(lab: Gateway) -> int:
    return int(lab.host.sh("cat /proc/sys/net/netfilter/nf_conntrack_count"))


def client(lab: Gateway, version: int, kind: str) -> socket.socket:
    """A connected socket of the client's, to the service that floods of this kind are for."""
    with lab.client.entered():
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    made.settimeout(15)
    made.connect((ENDPOINT4 if version == 4 else ENDPOINT6, PORTS[kind]))
    return made


@pytest.mark.parametrize(
    ("version", "kind", "flows", "rate"),
    [(4, "junk", 1000, RATE), (4, "half", 1000, RATE), (4, "query", 1000, RATE), (6, "half", 300, RATE // 2)],
)
def test_a_flood_is_bounded_and_real_flows_go_on(lab: Gateway, version: int, kind: str, flows: int, rate: int) -> None:
    start(lab, limits(stranger_rate=STRANGERS, stranger_burst=BURST) + f"[gateway.pending]\nconnections = {HELD}\n")
    arguments = map(str, (version, flows, PAUSE, ESTABLISHED))
    load = subprocess.Popen(
        lab.client.command(sys.executable, "-m", "tests.netns.datagram_load", *arguments),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert load.stdout is not None and load.stdout.readline() == "ready\n"
    before_flood = max(map(memory, workers(lab)))
    # A source comes again after five seconds at the earliest.
    flood = lab.spawn(
        lab.client, sys.executable, "-m", "tests.netns.datagram_flood",
        *map(str, (version, kind, 5 * rate, SECONDS * rate, rate)),
    )  # fmt: skip
    lab.wait(lambda: lab.counters()["over_strangers"] > 1000, "the flood is on")
    counters = counted(lab)
    decided, dropped = decided_by(counters), dropped_by_the_machine()
    started, cpu = time.monotonic(), sum(map(cpu_seconds, workers(lab)))
    assert load.stdin is not None
    load.stdin.write("\n")
    load.stdin.flush()
    most_entries = most_memory = 0
    while load.poll() is None:
        most_entries = max(most_entries, entries(lab))
        most_memory = max(most_memory, *map(memory, workers(lab)))
        time.sleep(0.2)
    seconds = time.monotonic() - started
    cpu = sum(map(cpu_seconds, workers(lab))) - cpu
    decided = decided_by(counters) - decided
    dropped = dropped_by_the_machine() - dropped
    still_on = flood.poll() is None
    flood.kill()
    result: dict[str, Any] = json.loads(load.communicate()[0])
    print(
        f"IPv{version} flood of {rate} {kind}/s for {seconds:.1f} s: {result}; decided or held {decided};"
        f" conntrack entries at most {most_entries}; workers' CPU {cpu / seconds:.0%} of one core; a worker's memory"
        f" {before_flood / 1e6:.1f} -> {most_memory / 1e6:.1f} MB; evicted {counters.total(Extra.EVICTED_TOTAL)};"
        f" {lab.counters()['over_strangers']} turned away; dropped by the machine {dropped}"
    )
    assert still_on, "the flood ended before the real flows did, so nothing was shown"
    assert (result["wrong"], result["good"] + result["failed"]) == (0, flows)
    assert result["good"] >= 0.99 * flows
    assert sum(result["returned"]) >= result["sent"] * ESTABLISHED - dropped
    # What gets past the limits: strangers, those of them that came again, and the real flows.
    assert decided <= 2 * (STRANGERS * seconds + BURST) + 10 * flows
    if kind == "half":
        assert counters.total(Extra.EVICTED_TOTAL) > 0
        assert most_memory - before_flood < 2 * HELD * 4096 + (8 << 20)
    # What was not decided, or is no route's, makes no entry; a query's answer keeps its own for 30 s.
    kept = 2 * (STRANGERS * (seconds + 2) + BURST) if kind == "query" else 0
    assert most_entries <= 2 * flows + ESTABLISHED + 50 + kept


@pytest.mark.parametrize("version", [4, 6])
def test_one_sources_flood_is_limited_before_the_queue(lab: Gateway, version: int) -> None:
    start(lab, limits(source_rate=100, source_burst=100))
    command = (sys.executable, "-m", "tests.netns.datagram_flood", *map(str, (version, "junk", 1, 5000, 5000)))
    started, dropped = time.monotonic(), dropped_by_the_machine()
    flood = lab.spawn(lab.client, *command)
    lab.wait(lambda: lab.counters()["over_source"] > 1000, "the flood is on")
    with client(lab, version, "junk") as asking:
        asking.send(b"a")
        assert asking.recv(2048).startswith(ALIAS[version].format(1).encode())
    assert flood.wait(60) == 0
    seconds = time.monotonic() - started
    counters = lab.counters()
    assert counters["diverted"] <= 100 + 100 * seconds + 1
    arrived = counters["diverted"] + counters["over_source"]
    assert 5001 - (dropped_by_the_machine() - dropped) <= arrived <= 5001
    assert counters["over_strangers"] == 0


@pytest.mark.parametrize("version", [4, 6])
def test_one_sources_undecided_flows_push_out_its_own(lab: Gateway, version: int) -> None:
    start(lab, "[gateway.pending]\nsource_connections = 20\n")
    first, second = flight(client_hello(b"www.a.example", b"h3", size=HELLO_SIZE))
    with ExitStack() as stack:
        flows = [stack.enter_context(client(lab, version, "half")) for _ in range(200)]
        for asking in flows:
            asking.send(first)
        counters = counted(lab)
        lab.wait(lambda: counters.total(Extra.HELD_DATAGRAMS) == 200, "all are held")
        # Either worker keeps 20 of the 100 or so that it has.
        assert counters.total(Extra.EVICTED_SOURCE) == 200 - 2 * 20
        assert counters.total(Extra.EVICTED_TOTAL) == 0
        flows[-1].send(second)
        assert flows[-1].recv(2048).startswith(ALIAS[version].format(1).encode())


@pytest.mark.parametrize("version", [4, 6])
def test_what_no_route_matches_or_is_undecided_leaves_no_conntrack_entry(lab: Gateway, version: int) -> None:
    start(lab, "")
    half, _ = flight(client_hello(b"www.a.example", b"h3", size=HELLO_SIZE))
    with ExitStack() as stack:
        for kind, said in (("junk", b"x"), ("half", half), ("query", query("www.c.example"))):
            for _ in range(20):
                stack.enter_context(client(lab, version, kind)).send(said)
        counters = counted(lab)
        lab.wait(lambda: decided_by(counters) == 60, "all were seen")
        assert "udp" not in lab.host.sh("cat /proc/net/nf_conntrack")
