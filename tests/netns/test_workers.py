"""Workers: load is spread, one that dies is replaced, one without a main process goes, and nobody notices.

Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steerd.model import Extension, Reason
from steerd.telemetry.counters import Counters
from tests.netns.gateway import ENDPOINT4, ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_flood import cpu_seconds

LIMITS = """
[gateway.limits]
source_rate = 100000
source_burst = 100000
stranger_rate = 100000
stranger_burst = 100000
"""
POOLS = """
[pools.tenants]
prefixes = ["10.64.0.0/21", "fd00:64::/117"]
"""
SERVICE = """
[services.main]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
"""
CONFIG = LIMITS + POOLS + SERVICE


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(CONFIG)
        made.start()
        yield made


def client_load(lab: Gateway, version: int, count: int, seed: int, last: int = 1000) -> subprocess.Popen[str]:
    alias = "10.64.0.0" if version == 4 else "fd00:64::"
    command = [
        sys.executable,
        "-m",
        "tests.netns.load",
        str(version),
        "443",
        alias,
        "1",
        str(last),
        str(count),
        str(seed),
    ]
    return subprocess.Popen(
        lab.client.command(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def result(process: subprocess.Popen[str]) -> tuple[int, int, int]:
    """(good, wrong, failed) of one load; what went wrong stands in pytest's captured output."""
    output, _ = process.communicate(timeout=250)
    print(output[-2000:])
    good, wrong, failed = map(int, output.splitlines()[-1].split())
    return good, wrong, failed


def pids(lab: Gateway, event: str = "worker bound") -> dict[int, int]:
    return {e["worker"]: e["pid"] for e in lab.events() if e["event"] == event}


@pytest.mark.parametrize("version", [4, 6])
def test_one_client_address_keeps_two_workers_busy(lab: Gateway, version: int) -> None:
    lab.respond(("10.64.0.0", 1000, 8080), ("fd00:64::", 1000, 8080))
    counters = Counters.open(lab.directory / "run" / "counters")
    assert result(client_load(lab, version, 400, 1)) == (400, 0, 0)
    shares = [counters.slot(worker)[Reason.ARITHMETIC] for worker in range(2)]
    # Who asks for what was decided before, the kernel steers by itself.
    assert 400 <= sum(shares) + lab.counters()["offloaded"] <= 400 + lab.repeated()
    assert min(shares) > 100


def test_twenty_thousand_connections_eight_at_a_time_while_aliases_come_and_go(lab: Gateway) -> None:
    """Reloads add and take away a second pool; each connection checks its daemon's name."""
    lab.respond(("10.64.0.0", 1000, 8080), ("fd00:64::", 1000, 8080))
    loads = [client_load(lab, 4 if seed % 2 else 6, 2500, seed) for seed in range(8)]
    more = '[pools.more]\nprefixes = ["10.65.0.0/21", "fd00:65::/117"]\n'
    reloads = 0
    while any(process.poll() is None for process in loads):
        lab.configure(CONFIG + more if reloads % 2 == 0 else CONFIG)
        assert lab.daemon is not None
        lab.daemon.send_signal(signal.SIGHUP)
        reloads += 1
        lab.wait(lambda: lab.count_events("reloaded") == reloads, "the daemon has reloaded")  # noqa: B023
    assert [result(process) for process in loads] == [(2500, 0, 0)] * 8
    assert reloads >= 4


def test_a_killed_worker_is_replaced_and_no_connection_fails(lab: Gateway) -> None:
    lab.respond(("10.64.0.0", 1000, 8080))
    load = client_load(lab, 4, 3000, 1)
    lab.expected_warnings = ["worker died"]
    for round_ in range(3):
        time.sleep(0.3)
        before = pids(lab)
        os.kill(before[round_ % 2], signal.SIGKILL)
        lab.wait(lambda: pids(lab)[round_ % 2] != before[round_ % 2], "another worker is bound")  # noqa: B023
    assert result(load) == (3000, 0, 0)
    assert lab.count_events("worker died") == 3


def test_a_killed_nursery_is_replaced_with_its_workers(lab: Gateway) -> None:
    lab.respond(("10.64.0.0", 1000, 8080))
    lab.expected_warnings = ["worker died"]
    before = pids(lab)
    nursery = Path(f"/proc/{before[0]}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(nursery), signal.SIGKILL)
    lab.wait(lambda: all(pids(lab)[worker] != pid for worker, pid in before.items()), "other workers are bound")
    lab.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before.values()), "the former ones are gone")
    assert result(client_load(lab, 4, 200, 1)) == (200, 0, 0)
    assert lab.count_events("worker died") == 2


def test_sigkill_breaks_no_established_connection_and_the_next_start_changes_nothing(lab: Gateway) -> None:
    assert lab.daemon is not None
    first_start = cpu_seconds(lab.daemon.pid)
    lab.respond(("10.64.0.0", 1000, 8080), ("fd00:64::", 1000, 8080))
    connections = []
    for index in range(100):
        connection = lab.socket(Extension(index + 1, 0), version=4 if index % 2 else 6)
        connection.connect((ENDPOINT4 if index % 2 else "2001:db8::10", 443))
        connections.append(connection)
        assert connection.recv(256)
    echoed: list[int] = []
    stop = threading.Event()

    def talk() -> None:
        while not stop.is_set():
            for number, connection in enumerate(connections):
                connection.sendall(b"still there?")
                if connection.recv(64) == b"still there?":
                    echoed.append(number)
            time.sleep(0.01)

    talker = threading.Thread(target=talk)
    talker.start()
    workers = pids(lab)
    addresses = lab.host.sh("ip -o addr")
    links = lab.host.sh("ip -o link")
    lab.kill()
    lab.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers.values()), "the workers are gone too")
    before = len(echoed)
    lab.wait(lambda: len(echoed) >= before + 200, "the connections go on while the daemon is away")
    lab.start()
    assert lab.daemon is not None
    assert cpu_seconds(lab.daemon.pid) < 1.5 * first_start
    assert lab.ask(Extension(500, 0), 443).startswith("10.64.1.243 ")
    before = len(echoed)
    lab.wait(lambda: len(echoed) >= before + 200, "and when it is back")
    stop.set()
    talker.join(30)
    assert set(echoed) == set(range(100))
    assert lab.host.sh("ip -o addr") == addresses
    assert lab.host.sh("ip -o link") == links
    loaded = [event for event in lab.events() if event["event"] == "table loaded"][-1]
    assert (loaded["aliases_added"], loaded["aliases_removed"]) == (0, 0)
    for connection in connections:
        connection.close()


def test_stop_keeps_table_and_aliases_and_fails_closed_and_down_removes_both(lab: Gateway) -> None:
    lab.respond(("10.64.0.0", 1000, 8080), (ENDPOINT4, 1, 443))
    assert lab.ask(Extension(7, 0), 443).startswith("10.64.0.6 ")
    steerd = f"{sys.executable} -m steerd.cli.main"
    refused = lab.host.sh(f"cd {ROOT}; {steerd} down {lab.config} 2>&1 || echo status $?")
    assert "steerd runs (process " in refused and "; stop it first" in refused
    assert refused.endswith("status 1\n")
    lab.stop()
    assert "chain steer" in lab.host.sh("nft list table inet steerd")
    with lab.socket(Extension(7, 0)) as connection:
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.connect((ENDPOINT4, 443))
    assert "10.64.7.255/32" in lab.host.sh("ip -o addr")
    lab.host.sh(f"cd {ROOT}; {steerd} down {lab.config}")
    assert "steer" not in lab.host.sh("nft list ruleset; ip -o addr; ip -o link")


def test_a_second_daemon_is_refused(lab: Gateway) -> None:
    assert lab.daemon is not None
    said = lab.host.sh(f"cd {ROOT}; {sys.executable} -m steerd.cli.main run {lab.config} 2>&1 || echo status $?")
    assert "steerd runs already, as process" in said
    assert said.endswith("status 1\n")
    other = lab.directory / "other.toml"
    other.write_text(lab.config.read_text().replace(f"{lab.directory}/run", f"{lab.directory}/other-run"))
    assert "other-run" in other.read_text()
    said = lab.host.sh(f"cd {ROOT}; {sys.executable} -m steerd.cli.main run {other} 2>&1 || echo status $?")
    assert "another steerd, with another run_dir, runs in this network namespace already" in said
    assert said.endswith("status 1\n")


def test_aliases_that_somebody_removed_come_back(lab: Gateway) -> None:
    lab.respond(("10.64.0.0", 1000, 8080))
    device = lab.host.sh("ip -o addr show to 10.64.0.6/32").split()[1]
    lab.expected_warnings = ["aliases were removed by somebody; they are back"]
    lab.host.sh(f"ip addr del 10.64.0.6/32 dev {device}")
    lab.wait(lambda: lab.host.sh("ip -o addr show to 10.64.0.6/32"), "the alias is back")
    assert lab.ask(Extension(7, 0), 443).startswith("10.64.0.6 ")


def test_a_reload_with_a_mistake_keeps_the_running_configuration(lab: Gateway) -> None:
    lab.respond(("10.64.0.0", 1000, 8080))
    lab.configure(CONFIG + '[pools.more]\nprefixes = ["10.64.0.0/30"]\n')
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGHUP)
    lab.expected_warnings = ["not reloaded; the running configuration stays"]
    lab.wait(lambda: lab.count_events(lab.expected_warnings[0]) == 1, "the mistake is reported")
    (event,) = (event for event in lab.events() if event["event"] == lab.expected_warnings[0])
    assert f"{lab.config}: pools." in event["why"]
    assert lab.ask(Extension(7, 0), 443).startswith("10.64.0.6 ")
