"""Late steering under load: no connection at the wrong daemon, no request carried out twice.

Every source port is used again at once for another name, from both sides' closing and after resets, while the
configuration is reloaded and workers are killed. Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.netns.gateway import ROOT, Gateway, gateway
from tests.netns.lab import Host

HOSTS = 60
CONFIG = """
[gateway.limits]
source_rate = 100000
source_burst = 100000
[pools.tenants]
prefixes = ["10.64.1.0/24", "fd00:64::1:0/120"]
[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
""" + "".join(
    f'[[services.web.routes]]\nwhen = {{ "http.host" = "h{n}.example" }}\n'
    f'target = ["10.64.1.{n}:8080", "[fd00:64::1:{n:x}]:8080"]\n'
    for n in range(HOSTS)
)  # fmt: skip
MORE = '\n[pools.spare]\nprefixes = ["10.66.0.0/28"]\n'


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(CONFIG)
        made.start()
        made.respond(("10.64.1.0", HOSTS, 8080), ("fd00:64::1:0", HOSTS, 8080))
        yield made


def loads(lab: Gateway, count: int) -> list[subprocess.Popen[str]]:
    """Four clients, two of each family, with 50 ports each."""
    return [
        subprocess.Popen(
            lab.client.command(
                sys.executable, "-m", "tests.netns.late_load", "4" if n % 2 else "6", "80", f"{HOSTS}", f"{count}",
                f"{n}", f"{20000 + 1000 * n}", "50",
            ),
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for n in range(4)
    ]  # fmt: skip


def results(processes: list[subprocess.Popen[str]]) -> list[tuple[int, ...]]:
    return [tuple(map(int, process.communicate(timeout=280)[0].split())) for process in processes]


def test_ports_that_are_used_again_at_once_under_reload(lab: Gateway) -> None:
    count = int(os.environ.get("STEERD_LATE_CONNECTIONS", "12000")) // 4
    running = loads(lab, count)
    reloads = 0
    while any(process.poll() is None for process in running):
        lab.configure(CONFIG + MORE if reloads % 2 == 0 else CONFIG)
        assert lab.daemon is not None
        lab.daemon.send_signal(signal.SIGHUP)
        reloads += 1
        lab.wait(lambda: lab.count_events("reloaded") == reloads, "the daemon has reloaded")  # noqa: B023
        time.sleep(0.2)
    assert results(running) == [(count, 0, 0, 0)] * 4
    assert reloads >= 2


def test_workers_that_are_killed_lead_nobody_astray(lab: Gateway) -> None:
    lab.expected_warnings.append("worker died")
    running = loads(lab, 500)
    kills = 3  # more would meet the daemon's growing pause before it starts a worker that keeps dying
    for _ in range(kills):
        time.sleep(0.3)
        bound = lab.count_events("worker bound")
        pids = [event["pid"] for event in lab.events() if event["event"] == "worker bound"]
        os.kill(pids[-1], signal.SIGKILL)
        lab.wait(lambda: lab.count_events("worker bound") > bound, "the worker is back")  # noqa: B023
    for good, wrong, failed, twice in results(running):
        assert (good + failed, wrong, twice) == (500, 0, 0)
        assert failed <= kills, "a killed worker costs undecided connections at most"
