"""Late steering when things go wrong: the agent is killed in the middle, or flooded.

Topology: tests/netns/gateway.py. "Behind" the client are networks of spoofed sources (tests/netns/flood.py), whose
packets it swallows, and others of which it has every address: each stranger that connects is a source of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from steerd.telemetry.counters import Counters, Extra
from tests.netns import flood
from tests.netns.gateway import ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_flood import cpu_seconds
from tests.netns.test_late_load import CONFIG, HOSTS

TRANSFERS = 1000
STRANGERS = {4: "198.18.0.1", 6: "fd00:e::1"}
SOURCE_RATE, STRANGER_RATE, STRANGER_BURST = 1000, 2000, 4000  # what they are if the configuration does not say
FLOOD_RATE, FLOOD_SECONDS = 8000, 250  # they are ended before
GOOD = (500, 0, 0, 0)
FILLED_BY_THE_KERNEL = ("sources", "known", "waiting", "heavy", "bound", "vanished", "genuine")


class Transfers:
    """The client of tests/netns/trickle.py."""

    def __init__(self, lab: Gateway) -> None:
        self._process = subprocess.Popen(
            lab.client.command(sys.executable, "-m", "tests.netns.trickle", "80", f"{HOSTS}", f"{TRANSFERS}"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None and self._process.stdout.readline() == "open\n"

    def bytes_so_far(self) -> int:
        """What came back, on all connections together."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait_for_more(self, lab: Gateway) -> None:
        """Until several more blocks have come back on every connection."""
        so_far = self.bytes_so_far()
        lab.wait(lambda: self.bytes_so_far() > so_far + 3 * 64 * TRANSFERS, "the transfers go on")

    def end(self) -> tuple[int, int]:
        """Close them all; how many held, and how many broke."""
        output, _ = self._process.communicate(timeout=250)
        good, broken = map(int, output.split())
        return good, broken

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_an_agent_that_is_killed_breaks_no_transfer(new_host: Callable[[str], Host]) -> None:
    with gateway(new_host) as lab:
        lab.expected_warnings.append("worker died")
        lab.configure(CONFIG)
        lab.start()
        lab.respond(("10.64.1.0", HOSTS, 8080), ("fd00:64::1:0", HOSTS, 8080))
        transfers = Transfers(lab)
        try:
            transfers.wait_for_more(lab)
            for pid in [event["pid"] for event in lab.events() if event["event"] == "worker bound"]:
                os.kill(pid, signal.SIGKILL)
            lab.kill()
            transfers.wait_for_more(lab)
            # These wait, and repeat their first payloads, until somebody is there to decide.
            new = clients(lab, 50, "")
            time.sleep(1)
            lab.start()
            assert [tally(process) for process in new] == [(50, 0, 0, 0)] * 2
            transfers.wait_for_more(lab)
            assert transfers.end() == (TRANSFERS, 0)
        finally:
            transfers.close()


def clients(lab: Gateway, count: int, strangers: str) -> list[subprocess.Popen[str]]:
    """A client of each family with `count` connections, 25 at a time, perhaps each from a stranger's address."""
    return [
        subprocess.Popen(
            lab.client.command(
                sys.executable, "-m", "tests.netns.late_load", f"{version}", "80", f"{HOSTS}", f"{count}",
                f"{version}", f"{1000 * version}", "50", "fin", "25", strangers and STRANGERS[version],
            ),
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for version in (4, 6)
    ]  # fmt: skip


def tally(process: subprocess.Popen[str]) -> tuple[int, ...]:
    """Good, wrong, failed, echoed twice."""
    return tuple(map(int, process.communicate(timeout=250)[0].split()))


@contextmanager
def open_to_strangers(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    """A gateway with the limits that it has if nobody says anything about them, and a client that can be anybody."""
    with gateway(new_host) as lab:
        lab.client.sh(
            "ip route add local 198.18.0.0/15 dev lo; ip -6 route add local fd00:e::/32 dev lo;"
            "sysctl -qw net.ipv6.ip_nonlocal_bind=1"
        )
        lab.host.sh(
            f"ip route add {flood.SOURCES4} via 198.51.100.1; ip -6 route add {flood.SOURCES6} via 2001:db8:1::1;"
            "ip route add 198.18.0.0/15 via 198.51.100.1; ip -6 route add fd00:e::/32 via 2001:db8:1::1"
        )
        lab.allow_unasked = True  # spoofed sources are no connections of the client's
        _, _, services = CONFIG.partition("[pools.tenants]")
        lab.configure("[pools.tenants]" + services)
        lab.start()
        lab.respond(("10.64.1.0", HOSTS, 8080), ("fd00:64::1:0", HOSTS, 8080))
        yield lab


@pytest.fixture
def flooded(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with open_to_strangers(new_host) as lab:
        yield lab


class Watched(NamedTuple):
    """What happened in some seconds."""

    seconds: float
    workers_cpu: float
    """Seconds of it, user and kernel, of all workers."""
    counted: dict[str, int]
    """By the table."""

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {count / self.seconds:.0f}/s" for name, count in self.counted.items() if count)
        return f"{rates}; workers' CPU {self.workers_cpu / self.seconds:.1%} of one core"


def watch(lab: Gateway, seconds: float) -> Watched:
    """Look on for so long."""
    workers = [event["pid"] for event in lab.events() if event["event"] == "worker bound"]
    began, cpu, before = time.monotonic(), sum(map(cpu_seconds, workers)), lab.counters()
    time.sleep(seconds)
    after = lab.counters()
    cpu = sum(map(cpu_seconds, workers)) - cpu
    return Watched(time.monotonic() - began, cpu, {name: after[name] - before[name] for name in after})


def start_floods(lab: Gateway, kind: str, seconds: int = FLOOD_SECONDS) -> list[subprocess.Popen[str]]:
    """One of each family."""
    packets = f"{FLOOD_RATE * seconds}"
    floods = [
        lab.spawn(lab.client, sys.executable, "-m", "tests.netns.flood", packets, f"{FLOOD_RATE}", kind, version, "80")
        for version in ("4", "6")
    ]
    for each in floods:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    return floods


def serve_strangers(lab: Gateway, floods: list[subprocess.Popen[str]]) -> None:
    """A thousand connections from a thousand sources that nobody knows yet, while the floods are on; then end those."""
    began = time.monotonic()
    assert [tally(process) for process in clients(lab, 500, "strangers")] == [GOOD, GOOD]
    print(f"1,000 real connections in {time.monotonic() - began:.1f} s")
    assert [each.poll() for each in floods] == [None, None], "a flood ended before, so nothing was shown"
    for each in floods:
        each.kill()


def entries(lab: Gateway) -> int:
    """Of connections to the endpoint, in conntrack."""
    command = "(conntrack -L -p tcp --orig-port-dst 80; conntrack -L -f ipv6 -p tcp --orig-port-dst 80) 2>/dev/null"
    return int(lab.host.sh(f"{command} | wc -l"))


def remembered(lab: Gateway, *names: str) -> int:
    """How many elements these sets of the table have, both families."""
    total = 0
    for name in names:
        for version in (4, 6):
            kind = "map" if name == "bound" else "set"
            listed = json.loads(lab.host.sh(f"nft -j list {kind} inet steerd {name}{version}"))
            total += len(listed["nftables"][1][kind].get("elem", []))
    return total


def test_a_flood_of_spoofed_syns_leaves_no_state_and_takes_no_python(flooded: Gateway) -> None:
    floods = start_floods(flooded, "syn")
    flooded.wait(lambda: flooded.counters()["answered"] > 1000, "the flood is on")
    for _ in range(4):
        seen = watch(flooded, 3)
        print(seen)
        if seen.workers_cpu <= 0.03:
            break  # CPU time is counted in clock ticks, which may fall badly once
    assert seen.counted["answered"] > 1000
    assert seen.counted["diverted"] == 0
    assert seen.workers_cpu <= 0.03
    assert entries(flooded) == 0
    assert remembered(flooded, *FILLED_BY_THE_KERNEL) == 0
    before, repeated = flooded.counters()["diverted"], flooded.repeated()
    serve_strangers(flooded, floods)
    upcalls, repeated = flooded.counters()["diverted"] - before, flooded.repeated() - repeated
    assert upcalls < 1100 + repeated, "one upcall for each real connection, unless it is repeated"


@pytest.mark.parametrize("kind", ["payload", "piece"])
def test_a_flood_of_spoofed_first_payloads_is_bounded(flooded: Gateway, kind: str) -> None:
    """Whole requests, and the beginnings of some, sent as often as makes us acknowledge a real client's."""
    floods = start_floods(flooded, kind)
    flooded.wait(lambda: flooded.counters()["over_strangers"] > 1000, "the flood is on")
    seen = watch(flooded, 3)
    print(seen)
    # Each family: strangers, and those of them that come again.
    assert seen.counted["diverted"] <= 2 * 2 * (STRANGER_RATE * seen.seconds + STRANGER_BURST)
    assert entries(flooded) == 0
    serve_strangers(flooded, floods)
    counters = Counters.open(flooded.directory / "run" / "counters")
    assert counters.total(Extra.NOT_GENUINE) > 100
    assert counters.total(Extra.ACKNOWLEDGED) == 0
    assert counters.total(Extra.FULL_TOTAL) == 0, "a spoofer cannot take the room of undecided connections for long"


def test_junk_from_one_source_is_limited_before_the_queue(flooded: Gateway) -> None:
    """Clients that did complete their handshakes, a thousand connections of one source in each family."""
    junk = [
        flooded.spawn(
            flooded.client, sys.executable, "-m", "tests.netns.bare", version, "80", "1000", f"{2 * FLOOD_RATE}",
            f"{FLOOD_SECONDS}",
        )
        for version in ("4", "6")
    ]  # fmt: skip
    for each in junk:
        assert each.stdout is not None and each.stdout.readline() == "established 1000\n"
    flooded.wait(lambda: remembered(flooded, "heavy") == 2, "both sources are over their limit")
    seen = watch(flooded, 3)
    print(seen)
    assert seen.counted["over_source"] > 1000
    assert seen.counted["over_strangers"] == 0, "other strangers' share is theirs"
    assert seen.counted["diverted"] <= 2 * SOURCE_RATE * seen.seconds * 1.1
    serve_strangers(flooded, junk)
