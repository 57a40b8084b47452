"""Late steering when things go wrong: the agent is killed in the middle, or flooded.

Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from tests.netns.gateway import ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_late_load import CONFIG, HOSTS

TRANSFERS = 1000


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
        output, _ = self._process.communicate(timeout=60)
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
            new = clients(lab, 50)
            time.sleep(1)
            lab.start()
            assert [tally(process) for process in new] == [(50, 0, 0, 0)] * 2
            transfers.wait_for_more(lab)
            assert transfers.end() == (TRANSFERS, 0)
        finally:
            transfers.close()


def clients(lab: Gateway, count: int) -> list[subprocess.Popen[str]]:
    """A client of each family with `count` connections, 25 at a time."""
    return [
        subprocess.Popen(
            lab.client.command(
                sys.executable, "-m", "tests.netns.late_load", f"{version}", "80", f"{HOSTS}", f"{count}",
                f"{version}", f"{1000 * version}", "50", "fin", "25",
            ),
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for version in (4, 6)
    ]  # fmt: skip


def tally(process: subprocess.Popen[str]) -> tuple[int, ...]:
    """Good, wrong, failed, echoed twice."""
    return tuple(map(int, process.communicate(timeout=120)[0].split()))
