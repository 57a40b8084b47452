"""Late steering under load: no connection at the wrong daemon, no request carried out twice.

Every source port is used again at once for another name: after either side's closing, after a reset, and after the
client vanished without a word, while the configuration is reloaded and workers are stopped and killed. Both ends are
asked: the client who answered, the daemons (tests/netns/ledger.py) what came to them, and how often. With
STEERD_LATE_CONNECTIONS in the environment there are so many connections in each test instead of thousands. Topology:
tests/netns/gateway.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tests.netns.gateway import ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.late_load import Tally

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
CLIENTS = 4


class Book(NamedTuple):
    """What the daemons' ledger says."""

    requests: int
    wrong: int
    twice: int


class Loaded:
    """A gateway with daemons that keep a ledger."""

    def __init__(self, lab: Gateway) -> None:
        self.lab = lab
        lab.configure(CONFIG)
        lab.start()
        self._ledger = subprocess.Popen(
            lab.host.command(sys.executable, "-m", "tests.netns.ledger", f"{HOSTS}", "8080"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self._ledger.stdout is not None and self._ledger.stdout.readline() == "listening\n"

    def close(self) -> None:
        self._ledger.kill()
        self._ledger.communicate()

    def book(self) -> Book:
        """The daemons' side of it, so far."""
        assert self._ledger.stdin is not None and self._ledger.stdout is not None
        self._ledger.stdin.write("\n")
        self._ledger.stdin.flush()
        return Book(*map(int, self._ledger.stdout.readline().split()))

    def clients(self, count: int, endings: str = "fin,reset", threads: int = 1) -> list[subprocess.Popen[str]]:
        """Four clients of `count` connections each, two of each family."""
        return [
            subprocess.Popen(
                self.lab.client.command(
                    sys.executable, "-m", "tests.netns.late_load", "4" if n % 2 else "6", "80", f"{HOSTS}", f"{count}",
                    f"{n}", f"{20000 + 1000 * n}", f"{max(50, threads)}", endings, f"{threads}",
                ),
                stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )
            for n in range(CLIENTS)
        ]  # fmt: skip

    def workers(self) -> list[int]:
        """Process ids of those that run."""
        return [event["pid"] for event in self.lab.events() if event["event"] == "worker bound"][-2:]

    def kill_worker(self) -> None:
        """And wait until there is another one."""
        bound = self.lab.count_events("worker bound")
        os.kill(self.workers()[-1], signal.SIGKILL)
        self.lab.wait(lambda: self.lab.count_events("worker bound") > bound, "the worker is back")


@pytest.fixture
def loaded(new_host: Callable[[str], Host]) -> Iterator[Loaded]:
    with gateway(new_host) as lab:
        made = Loaded(lab)
        try:
            yield made
        finally:
            made.close()


def share(otherwise: int) -> int:
    """How many connections each client makes: `otherwise` in all, unless the environment says how many."""
    return int(os.environ.get("STEERD_LATE_CONNECTIONS", otherwise)) // CLIENTS


def results(processes: list[subprocess.Popen[str]]) -> list[Tally]:
    return [Tally(*map(int, process.communicate(timeout=900)[0].split())) for process in processes]


def test_ports_that_are_used_again_at_once_under_reload(loaded: Loaded) -> None:
    lab = loaded.lab
    count = share(12000)
    running = loaded.clients(count)
    reloads = 0
    while any(process.poll() is None for process in running):
        lab.configure(CONFIG + MORE if reloads % 2 == 0 else CONFIG)
        assert lab.daemon is not None
        lab.daemon.send_signal(signal.SIGHUP)
        reloads += 1
        lab.wait(lambda: lab.count_events("reloaded") == reloads, "the daemon has reloaded")  # noqa: B023
        time.sleep(0.2)
    assert results(running) == [(count, 0, 0, 0)] * CLIENTS
    assert loaded.book() == (count * CLIENTS, 0, 0)
    assert reloads >= 2


def test_workers_that_are_killed_lead_nobody_astray(loaded: Loaded) -> None:
    loaded.lab.expected_warnings.append("worker died")
    running = loaded.clients(500)
    kills = 3  # more would meet the daemon's growing pause before it starts a worker that keeps dying
    for _ in range(kills):
        time.sleep(0.3)
        loaded.kill_worker()
    for good, wrong, failed, twice in results(running):
        assert (good + failed, wrong, twice) == (500, 0, 0)
        assert failed <= kills, "a killed worker costs undecided connections at most"
    assert loaded.book()[1:] == (0, 0)


def test_clients_that_vanish_and_come_back_from_the_same_port_for_another_name(loaded: Loaded) -> None:
    """Their old connections still stand, in conntrack and at their daemons."""
    loaded.lab.allow_unasked = True  # an old daemon may still speak to its old connection
    count = share(2000)
    running = loaded.clients(count, "vanish", 50)
    assert results(running) == [(count, 0, 0, 0)] * CLIENTS
    assert loaded.book() == (count * CLIENTS, 0, 0)
    assert loaded.lab.counters()["vanished"] > count


def test_clients_that_vanish_while_a_worker_sleeps_and_is_killed(loaded: Loaded) -> None:
    """What was sent meanwhile, and sent again, waits for a worker; the next worker knows nothing of the last one's.

    No FINs here: Linux opens a connection behind its own TIME_WAIT with a sequence number ahead of its clock. Having
    vanished from that one, it would at once go back to numbers that conntrack takes for the old connection's. A client
    that has lost its power comes back later than that, or with numbers of chance.
    """
    loaded.lab.allow_unasked = True
    loaded.lab.expected_warnings.append("worker died")
    count = share(2000)
    running = loaded.clients(count, "vanish,reset", 50)
    time.sleep(0.5)
    for _ in range(2):
        sleeping = loaded.workers()[-1]
        os.kill(sleeping, signal.SIGSTOP)
        time.sleep(1.2)
        os.kill(sleeping, signal.SIGCONT)
        time.sleep(0.3)
        loaded.kill_worker()
    for good, wrong, failed, twice in results(running):
        assert (good + failed, wrong, twice) == (count, 0, 0)
        assert failed <= 5, "a killed worker costs undecided connections at most"
    assert loaded.book()[1:] == (0, 0)
