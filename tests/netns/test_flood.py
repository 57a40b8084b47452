"""A flood of spoofed SYNs that carry an extension: bounded work for the agent, bounded conntrack, real clients served.

Topology: tests/netns/gateway.py; the client host is also where the flood comes from.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from steerd.model import Reason
from steerd.telemetry.counters import Counters
from tests.netns.gateway import ROOT, gateway
from tests.netns.lab import Host

STRANGERS, BURST = 1000, 1000
CONFIG = f"""
[gateway.limits]
source_rate = 2000
stranger_rate = {STRANGERS}
stranger_burst = {BURST}

[pools.tenants]
prefixes = ["10.64.0.0/22"]

[services.main]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = {{ pool = "tenants", by = "extension", port = 8080 }}
"""
FLOOD, RATE = 5_000_000, 20_000  # it is ended before
CLIENTS, EACH, PAUSE = 8, 125, 0.04


def test_a_flood_of_spoofed_syns_is_bounded_and_real_clients_are_served(new_host: Callable[[str], Host]) -> None:
    with gateway(new_host) as lab:
        # The spoofed sources are "behind" the client host, which swallows the answers.
        lab.host.sh("ip route add 10.128.0.0/9 via 198.51.100.1")
        lab.configure(CONFIG)
        lab.start()
        lab.respond(("10.64.0.0", 1000, 8080))
        workers = [event["pid"] for event in lab.events() if event["event"] == "worker bound"]
        flood = lab.spawn(lab.client, sys.executable, "-m", "tests.netns.flood", str(FLOOD), str(RATE))
        counters = Counters.open(lab.directory / "run" / "counters")

        def decisions_so_far() -> int:
            return counters.total(Reason.ARITHMETIC)

        lab.wait(lambda: lab.counters()["over_strangers"] > 1000, "the flood is on")
        before = decisions_so_far()
        started = time.monotonic()
        cpu = sum(map(cpu_seconds, workers))
        # Each client address is a stranger at first: turned away, let in when it comes again a second later.
        command = [sys.executable, "-m", "tests.netns.load", "4", "443", "10.64.0.0", "1", "1000", str(EACH)]
        loads = [
            subprocess.Popen(
                lab.client.command(*command, str(number), str(PAUSE), f"198.51.100.{number + 2}"),
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for number in range(CLIENTS)
        ]
        good = wrong = failed = most_entries = 0
        for load in loads:
            while load.poll() is None:
                entries = int(lab.host.sh("cat /proc/sys/net/netfilter/nf_conntrack_count"))
                most_entries = max(most_entries, entries)
                time.sleep(0.2)
            output, _ = load.communicate()
            results = [int(word) for word in output.splitlines()[-1].split()]
            good, wrong, failed = good + results[0], wrong + results[1], failed + results[2]
        seconds = time.monotonic() - started
        cpu = sum(map(cpu_seconds, workers)) - cpu
        still_on = flood.poll() is None
        flood.kill()
        assert still_on, "the flood ended before the real clients did, so nothing was shown"
        decisions = decisions_so_far() - before
        print(
            f"flood of {RATE} SYNs/s; real connections {good} good, {wrong} wrong, {failed} failed in"
            f" {seconds:.1f} s; decisions {decisions}; conntrack entries at most {most_entries};"
            f" workers' CPU {cpu / seconds:.0%} of one core"
        )
        assert wrong == 0
        assert good >= 0.99 * CLIENTS * EACH
        # What gets past the limits: strangers, those of them that came again, and the real clients.
        assert decisions <= 2 * (STRANGERS * seconds + BURST) + 1000
        # Nobody answers the SYN-ACKs: an entry lives for 5 s behind the third one, sent after 7 s.
        assert most_entries <= 12 * STRANGERS + BURST + 1000


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100
