"""Reload: another configuration is put in force as a difference, and nobody notices but those whom it concerns.

The test under load holds each connection against the routes that were valid between its SYN (or first payload, or
query) and its answer: `Validity` notes when each target was asked for and when it was no longer in force. With
STEERD_LONG=1 in the environment (`make test-long`) that test reloads for 60 s.

Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from steerd.control import client as api
from steerd.core.marks import OURS_ID, MarkLayout
from steerd.kernel import ruleset
from steerd.kernel.inject import Injector
from steerd.kernel.nftables import Nftables
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.late_load import alias
from tests.netns.reload_load import Told, host

SECONDS = 60 if os.environ.get("STEERD_LONG") == "1" else 15
PERIOD = 0.1
DAEMONS = 61
STATIC, DYNAMIC = 12, 12
"""Keys whose routes are in the file, and keys whose routes come through the API; keys are numbered in this order."""
STANDING = 6
LIMITS = """
[gateway.limits]
source_rate = 100000
source_burst = 100000
stranger_rate = 100000
stranger_burst = 100000
total_burst = {total_burst}
"""
POOL = """
[pools.tenants]
prefixes = ["10.64.1.0/24", "fd00:64::1:0/120"]
"""
SERVICES = {
    "early": """
[services.early]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
""",
    "late": """
[services.late]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
""",
    "query": """
[services.query]
endpoints = ["203.0.113.10:53/udp", "[2001:db8::10]:53/udp"]
inspect = ["dns"]
""",
    "flow": """
[services.flow]
endpoints = ["203.0.113.10:500/udp", "[2001:db8::10]:500/udp"]
inspect = ["prefix"]
""",
}
SPARE = """
[pools.spare]
prefixes = ["10.66.0.0/28", "fd00:66::/124"]
[services.spare]
endpoints = ["203.0.113.10:{first}-9010/tcp", "[2001:db8::10]:{first}-9010/tcp", "203.0.113.10:9000-9010/udp"]
inspect = ["prefix"]
default = "10.66.0.1:80"
"""
PORT = {"early": 8080, "late": 8080, "query": 5353, "flow": 5353}
CONFIG = POOL + SERVICES["late"]


def conditions(kind: str, key: int) -> dict[str, str | int]:
    """What a route for this key says, as tests/netns/reload_load.py asks for it."""
    found: dict[str, dict[str, str | int]] = {
        "early": {"portext.dst": key + 1},
        "late": {"http.host": host(key)},
        "query": {"dns.qname": host(key)},
        "flow": {"prefix": f"k{key}."},
    }
    return found[kind]


def targets(kind: str, daemon: int) -> list[str]:
    return [f"{alias(4, daemon)}:{PORT[kind]}", f"[{alias(6, daemon)}]:{PORT[kind]}"]


class Validity:
    """Which daemon was the right one for a key, and from when to when."""

    def __init__(self) -> None:
        self._eras: dict[tuple[str, int], list[tuple[float, float, int]]] = {}

    def begins(self, kind: str, key: int, daemon: int, now: float) -> None:
        """From now on, and perhaps not before `ends` of the one before, connections may go to another daemon."""
        self._eras.setdefault((kind, key), []).append((now, float("inf"), daemon))

    def ends(self, kind: str, key: int, now: float) -> None:
        """Now at the latest none goes to the last daemon but one."""
        eras = self._eras[kind, key]
        if len(eras) > 1:
            eras[-2] = (eras[-2][0], now, eras[-2][2])

    def daemons(self, kind: str, key: int, began: float, answered: float) -> set[int]:
        """Those that it may have gone to."""
        return {daemon for first, last, daemon in self._eras[kind, key] if first <= answered and began <= last}


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(CONFIG)
        yield made


def test_a_sighup_that_comes_while_the_daemon_starts_is_a_reload(lab: Gateway) -> None:
    def send() -> None:
        assert lab.daemon is not None
        pid = lab.daemon.pid
        # Python's own start, before the first line of ours, can hold nothing back.
        lab.wait(lambda: holds_back_sighup(pid), "the daemon's first line")
        os.kill(pid, signal.SIGHUP)

    lab.start(send)
    lab.wait(lambda: lab.count_events("reloaded") == 1, "the daemon has reloaded")


@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_of_a_worker_that_knows_more_than_the_table_goes_nowhere(lab: Gateway, version: int) -> None:
    """A service that becomes late: its plan is there before the table is. The gateway itself must not answer that
    nobody listens; the client will repeat its SYN."""
    lab.allow_unasked = True
    lab.configure(CONFIG + SPARE.format(first=9000).replace('inspect = ["prefix"]', ""))
    lab.start()
    ip, client, endpoint = ((IP, CLIENT4, ENDPOINT4), (IPv6, CLIENT6, ENDPOINT6))[version == 6]

    def syn(port: int) -> bytes:
        return bytes(ip(src=client, dst=endpoint) / TCP(sport=40000, dport=port, flags="S"))

    with lab.host.entered(), contextlib.closing(Injector(MarkLayout(8, 31).field(OURS_ID))) as worker:
        with pytest.raises(PermissionError):
            worker.send(syn(9000))
        worker.send(syn(80))
    assert lab.counters()["answered"] == 1


def test_steerctl_reload_answers_when_it_is_in_force_or_says_what_is_wrong(lab: Gateway) -> None:
    def steerctl() -> tuple[int, str, str]:
        command = lab.host.command(sys.executable, "-m", "steerd.cli.ctl", "reload", "--config", str(lab.config))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    lab.start()
    lab.configure(CONFIG + SPARE.format(first=9000))
    assert steerctl() == (0, f"{lab.config} is in force: services 2, pools 2\n", "")
    assert "9000-9010" in lab.host.sh("nft list set inet steerd late4")
    lab.expected_warnings = ["not reloaded; the running configuration stays", "endpoint elsewhere"]
    lab.host.sh("ip addr del 203.0.113.10/32 dev lo")
    lacking = "203.0.113.10 is not an address of this machine now; no connection to it is steered until it is"
    assert steerctl() == (0, f"{lab.config} is in force: services 2, pools 2\n{lacking}\n", "")
    assert [event["why"] for event in lab.events() if event["event"] == "endpoint elsewhere"] == [lacking]
    lab.host.sh("ip addr add 203.0.113.10/32 dev lo")
    lab.configure(CONFIG + SPARE.format(first=9000).replace("/28", "/99") + "frob = 1\n")
    status, said, error = steerctl()
    assert (status, said) == (1, "")
    assert f"{lab.config}: pools.spare.prefixes[0]: " in error
    assert f"{lab.config}: services.spare.frob: " in error
    assert "9000-9010" in lab.host.sh("nft list set inet steerd late4")
    lab.stop()
    (stopped,) = (event for event in lab.events() if event["event"] == "stopped")
    assert stopped["left"] == f"table and aliases (remove them with: steerd down {lab.config})"


def holds_back_sighup(pid: int) -> bool:
    blocked = re.search(r"^SigBlk:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert blocked is not None
    return int(blocked[1], 16) >> signal.SIGHUP - 1 & 1 == 1


def rules_and_elements(lab: Gateway) -> tuple[set[tuple[str, int]], dict[str, bytes]]:
    """As the kernel has them; a rule that is loaded again has another handle."""
    with lab.host.entered(), contextlib.closing(Nftables()) as nftables:
        return ruleset.our_rules(nftables), ruleset.our_elements(nftables)


def reload(lab: Gateway, text: str) -> None:
    lab.configure(text)
    api.request(f"{lab.directory}/run", "POST", "reload")


def test_what_stays_the_same_is_not_touched(lab: Gateway) -> None:
    lab.start()
    rules, elements = rules_and_elements(lab)
    route = '[[services.late.routes]]\nwhen.http.host = "%s.example"\ntarget = "10.64.1.1:80"\n'
    for text in (CONFIG, CONFIG + route % "a", CONFIG + route % "b", CONFIG):
        reload(lab, text)
        assert rules_and_elements(lab) == (rules, elements)
    reload(lab, CONFIG + SPARE.format(first=9000))
    now_rules, now_elements = rules_and_elements(lab)
    assert {name for name in elements if elements[name] != now_elements[name]} == {
        "aliases4", "aliases6", "datagram4", "early4", "early6", "late4", "late6",
    }  # fmt: skip
    assert {chain for chain, _ in rules ^ now_rules} == {"idle4"}
    reload(lab, CONFIG)
    assert rules_and_elements(lab)[1] == elements


def test_ranges_that_grow_and_shrink(lab: Gateway) -> None:
    def text(prefix: int, first: int) -> str:
        return (
            CONFIG + f'[pools.spare]\nprefixes = ["10.66.0.0/{prefix}", "fd00:66::/{prefix + 96}"]\n'
            f'[services.spare]\nendpoints = ["203.0.113.10:{first}-9010/tcp", "[2001:db8::10]:{first}-9010/tcp"]\n'
            f'default = {{ address = "10.66.0.1:{first}", wildcard = true }}\n'
        )

    lab.configure(text(28, 9000))
    lab.start()
    for step in ((27, 9000), (27, 8990), (28, 9005), (24, 9005), (28, 9000)):
        reload(lab, text(*step))
        sets = lab.host.sh(
            "for s in aliases4 aliases6 late4 early6 wildcard4 early4; do nft list set inet steerd $s; done"
        )
        assert re.findall(r"10\.66\.0\.0/\d+", sets) == [f"10.66.0.0/{step[0]}"]
        assert re.findall(r"fd00:66::/\d+", sets) == [f"fd00:66::/{step[0] + 96}"]
        assert re.findall(r"(\d+)-9010", sets) == [f"{step[1]}"] * 2
        assert re.findall(r"10\.66\.0\.1 \. (\d+)", sets) == [f"{step[1]}"]


def test_what_somebody_took_from_the_sets_is_back_after_a_reload(lab: Gateway) -> None:
    lab.start()
    before = lab.host.sh("nft list set inet steerd late4")
    lab.host.sh("nft delete element inet steerd late4 { 203.0.113.10 . 80 }")
    assert lab.host.sh("nft list set inet steerd late4") != before
    reload(lab, CONFIG)
    assert lab.host.sh("nft list set inet steerd late4") == before


class Reloading:
    """A gateway whose routes go elsewhere again and again."""

    def __init__(self, lab: Gateway) -> None:
        self.lab = lab
        self.validity = Validity()
        self.reloads = 0
        self._chosen = random.Random(1)
        self._spawned: list[subprocess.Popen[str]] = []

    # ---- the configuration ----

    def write(self) -> dict[tuple[str, int], int]:
        """The next configuration into the file; which daemon each static key has in it."""
        homes = {(kind, key): self._chosen.randrange(DAEMONS) for kind in SERVICES for key in range(STATIC)}
        text = LIMITS.format(total_burst=50000 + self.reloads // 5 % 2) + POOL
        for kind, service in SERVICES.items():
            text += service
            for key in range(STATIC):
                when = ", ".join(f'"{name}" = {json.dumps(value)}' for name, value in conditions(kind, key).items())
                text += f"[[services.{kind}.routes]]\nwhen = {{ {when} }}\n"
                text += f"target = {json.dumps(targets(kind, homes[kind, key]))}\n"
        if self.reloads % 2:
            text += SPARE.format(first=9000 + self.reloads % 3)
        self.lab.configure(text)
        return homes

    def start(self) -> None:
        self._now_homes(self.write())
        self.lab.start()
        for kind in SERVICES:
            for key in range(STATIC, STATIC + DYNAMIC):
                self.put(kind, key)

    def _now_homes(self, homes: dict[tuple[str, int], int]) -> None:
        now = time.monotonic()
        for (kind, key), daemon in homes.items():
            self.validity.begins(kind, key, daemon, now)

    def put(self, kind: str, key: int) -> None:
        """Another daemon for a dynamic key."""
        daemon = self._chosen.randrange(DAEMONS)
        body = {"when": conditions(kind, key), "target": targets(kind, daemon)}
        self.validity.begins(kind, key, daemon, time.monotonic())
        api.request(f"{self.lab.directory}/run", "PUT", "services", kind, "routes", body=body)
        self.validity.ends(kind, key, time.monotonic())

    def reload(self) -> None:
        """And wait until it is in force. By the API and by SIGHUP, in turn."""
        homes = self.write()
        self._now_homes(homes)
        if self.reloads % 2:
            api.request(f"{self.lab.directory}/run", "POST", "reload")
        else:
            self._by_signal()
        now = time.monotonic()
        for kind, key in homes:
            self.validity.ends(kind, key, now)
        self.reloads += 1

    def _by_signal(self) -> None:
        assert self.lab.daemon is not None
        until = time.monotonic() + 60
        # To read all of the log each time would take longer than a reload.
        with self.lab.log.open() as log:
            log.seek(0, os.SEEK_END)
            self.lab.daemon.send_signal(signal.SIGHUP)
            said = ""
            while '"event": "reloaded"' not in said:
                assert time.monotonic() < until and "not reloaded" not in said, said
                time.sleep(0.005)
                said += log.read()

    # ---- load ----

    def load(self, kind: str, version: int, keys: int, threads: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.lab.client.command(
                sys.executable, "-m", "tests.netns.reload_load", kind, f"{version}", f"{keys}", f"{threads}", "1"
            ),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self._spawned.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    def daemons(self) -> subprocess.Popen[str]:
        self.lab.respond(*((alias(version, 0), DAEMONS, 5353) for version in (4, 6)), program="udp_responder")
        process = subprocess.Popen(
            self.lab.host.command(sys.executable, "-m", "tests.netns.ledger", f"{DAEMONS}", "8080", "any"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self._spawned.append(process)
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        return process

    def close(self) -> None:
        for process in self._spawned:
            process.kill()
            process.communicate()


def told(process: subprocess.Popen[str]) -> Told:
    """What a client says at its end."""
    return Told(**json.loads(process.communicate(timeout=120)[0]))


@pytest.fixture
def reloading(lab: Gateway) -> Iterator[Reloading]:
    made = Reloading(lab)
    try:
        yield made
    finally:
        made.close()


def test_ten_reloads_a_second_under_load_lead_nobody_astray_and_drop_nobody(reloading: Reloading) -> None:
    reloading.start()
    ledger = reloading.daemons()
    standing = [reloading.load("standing", version, STANDING, 1) for version in (4, 6)]
    loads = {
        (kind, version): reloading.load(kind, version, STATIC + DYNAMIC, 2)
        for kind in ("early", "late", "query")
        for version in (4, 6)
    }
    begun = due = time.monotonic()
    costs: list[float] = []
    while due < begun + SECONDS:
        time.sleep(max(0.0, due - time.monotonic()))
        due = max(due + PERIOD, time.monotonic())
        for kind in ("early", "late", "query"):
            reloading.put(kind, STATIC + len(costs) % DYNAMIC)
        asked = time.monotonic()
        reloading.reload()
        costs.append(time.monotonic() - asked)
    took = time.monotonic() - begun
    wrong, failed, connections = [], [], 0
    for (kind, version), process in loads.items():
        said = told(process)
        failed += said.failed
        connections += len(said.answers)
        for key, began, answered, name in said.answers:
            right = {alias(version, daemon) for daemon in reloading.validity.daemons(kind, key, began, answered)}
            if name not in right:
                wrong.append(f"{kind} IPv{version} key {key} from {began:.4f} to {answered:.4f}: {name}, not {right}")
    for process in standing:
        said = told(process)
        failed += said.failed
        assert said.said > 0
    assert ledger.stdin is not None and ledger.stdout is not None
    ledger.stdin.write("\n")
    ledger.stdin.flush()
    requests, _, twice = map(int, ledger.stdout.readline().split())
    costs.sort()
    half, longest = costs[len(costs) // 2], costs[-1]
    print(
        f"{connections} connections; {len(costs)} reloads in {took:.1f} s, half of them in {half:.3f} s, all in"
        f" {longest:.3f} s; {len(wrong)} wrong; {len(failed)} failed; {twice} of {requests} requests twice"
    )
    assert wrong == []
    assert failed == []
    assert twice == 0
    # So that the test tests something, on however slow a machine.
    assert connections > SECONDS
    assert reloading.reloads > SECONDS // 3
