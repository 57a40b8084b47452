"""Several targets for a route, and drains: a dead or drained daemon gets nobody new, within a second, and who is there
stays.

Topology: tests/netns/gateway.py (one client, one gateway, endpoints 203.0.113.10 and 2001:db8::10). Three daemons, each
in a process of its own, on the aliases 1, 2 and 3.
"""

from __future__ import annotations

import errno
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from scapy.layers.dns import DNS, DNSQR

from steerd.control import client as api_client
from steerd.model import Extension
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, SLOWER, Gateway, gateway
from tests.netns.lab import Host

ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
CLIENT = {4: CLIENT4, 6: CLIENT6}
ALIAS = {4: "10.64.0.{}", 6: "fd00:64::{}"}
VERSIONS = (4, 6)
POLICIES = ("first-alive", "round-robin", "hash")
THREE = ", ".join(f'"10.64.0.{n}:8080", "[fd00:64::{n}]:8080"' for n in (1, 2, 3))
CONFIG = f"""
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]

[services.early]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
routes = [
    {{ when = {{ portext.dst = 1 }}, target = [{THREE}], choose = "first-alive" }},
    {{ when = {{ portext.dst = 2 }}, target = [{THREE}], choose = "round-robin" }},
    {{ when = {{ portext.dst = 3 }}, target = [{THREE}], choose = "hash", hash = "portext.src" }},
]
[services.late]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
default = [{THREE}]
choose = "round-robin"
routes = [
    {{ when = {{ http.host = "first-alive" }}, target = [{THREE}], choose = "first-alive" }},
    {{ when = {{ http.host = "round-robin" }}, target = [{THREE}], choose = "round-robin" }},
    {{ when = {{ http.host = "hash" }}, target = [{THREE}], choose = "hash", hash = "http.cookie.sid" }},
    {{ when = {{ http.host = "alone" }}, target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] }},
]
[services.flows]
endpoints = ["203.0.113.10:500/udp", "[2001:db8::10]:500/udp"]
inspect = ["prefix"]
default = [{THREE}]
choose = "round-robin"
routes = [{{ when = {{ prefix = "first" }}, target = [{THREE}], choose = "first-alive" }}]
[services.names]
endpoints = ["203.0.113.10:53/udp", "[2001:db8::10]:53/udp"]
inspect = ["dns"]
default = [{THREE}]
choose = "round-robin"
"""


class Lab:
    """The gateway, and its daemons by number."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        gateway.configure(CONFIG)
        gateway.start()
        self.daemons: dict[int, list[subprocess.Popen[str]]] = {}
        for number in (1, 2, 3):
            self.begin(number)
        self.wait_until_alive(1, 2, 3)

    def begin(self, number: int) -> None:
        runs = [(ALIAS[version].format(number), 1, 8080) for version in VERSIONS]
        self.daemons[number] = [self.gateway.respond(*runs, program=p) for p in ("responder", "udp_responder")]

    def kill(self, number: int) -> None:
        for process in self.daemons.pop(number):
            process.kill()
            process.wait()

    def kill_and_see(self, number: int) -> float:
        """Kill a daemon, and wait until steerd has seen that, over both protocols and families; how long that took."""

        def seen() -> int:
            events = (event for event in self.gateway.events() if event["event"] == "targets changed")
            return sum(len(event["dead"]) for event in events)

        before = seen()
        self.kill(number)
        killed = time.monotonic()
        self.gateway.wait(lambda: seen() == before + 2 * len(VERSIONS), f"{number} is dead")
        return time.monotonic() - killed

    def wait_until_alive(self, *numbers: int) -> None:
        """Until the daemon has seen all of them listen, over both protocols and families."""
        wanted = {str(number) for number in numbers}

        def answer() -> bool:
            ways = [partial(self.early, 2), partial(self.udp, "x")]
            return all({way(version) for _ in range(8)} == wanted for way in ways for version in VERSIONS)

        self.gateway.wait(answer, f"{wanted} are seen")

    def api(self, method: str, *path: str, **query: str) -> Any:
        return api_client.request(str(self.gateway.directory / "run"), method, *path, query=query)

    def steerctl(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "steerd.cli.ctl", *arguments, "--config", str(self.gateway.config), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    # ---- each returns the number of the daemon that answered, or "refused" ----

    def early(self, extension: int, version: int, source_extension: int = 7) -> str:
        try:
            return number_of(self.gateway.ask(Extension(extension, source_extension), 443, version=version))
        except (ConnectionError, AssertionError):
            return "refused"

    def open(self, host: str, version: int, sid: int = 1) -> tuple[socket.socket, str]:
        """A connection that stands, and its daemon."""
        client = self.gateway.socket(None, version=version)
        client.connect((ENDPOINT[version], 80))
        client.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nCookie: sid={sid}\r\n\r\n".encode())
        try:
            return client, number_of(client.recv(200).decode())
        except (ConnectionError, IndexError):
            return client, "refused"

    def late(self, host: str, version: int, sid: int = 1) -> str:
        client, number = self.open(host, version, sid)
        client.close()
        return number

    def queries(self, version: int, count: int) -> Counter[str]:
        """Who answers queries that all come from one port."""
        found: Counter[str] = Counter()
        with self.flow(version, 53) as client:
            for number in range(count):
                client.send(bytes(DNS(id=number, rd=1, qd=DNSQR(qname="a.example"))))
                found[number_of(client.recv(2000).decode("latin-1"))] += 1
        return found

    def flow(self, version: int, port: int = 500) -> socket.socket:
        with self.gateway.client.entered():
            made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        made.settimeout(15 * SLOWER)
        made.connect((ENDPOINT[version], port))
        return made

    def udp(self, text: str, version: int) -> str:
        with self.flow(version) as client:
            return said(client, text)


def said(client: socket.socket, text: str) -> str:
    """Who answers a datagram."""
    client.send(text.encode())
    try:
        return number_of(client.recv(2000).decode())
    except (TimeoutError, ConnectionRefusedError):
        return "refused"


def number_of(line: str) -> str:
    """`10.64.0.3 8080 ...` -> 3."""
    return line.split(maxsplit=1)[0].replace(":", ".").rpartition(".")[2]


def echoed(client: socket.socket) -> bool:
    """Whether a connection still carries something there and back."""
    client.sendall(b"still there?")
    data = b""
    while not data.endswith(b"still there?"):
        got = client.recv(4096)
        if not got:
            return False
        data += got
    return True


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Lab]:
    with gateway(new_host) as made:
        yield Lab(made)


def test_a_dead_daemon_gets_nobody_new_within_a_second_and_a_hash_moves_its_clients_alone(lab: Lab) -> None:
    sids = range(12)

    def hashed(version: int) -> tuple[list[str], list[str]]:
        return (
            [lab.late("hash", version, sid) for sid in sids],
            [lab.early(3, version, source_extension) for source_extension in range(1, 9)],
        )

    before = {version: hashed(version) for version in VERSIONS}
    for version in VERSIONS:
        assert lab.late("first-alive", version) == lab.early(1, version) == lab.udp("first", version) == "1"
        assert Counter(lab.late("round-robin", version) for _ in range(12)).keys() == {"1", "2", "3"}
        assert Counter(lab.late("nobody", version) for _ in range(12)).keys() == {"1", "2", "3"}
        # One port is one worker's: there the turns are exact, and each query is one.
        assert lab.queries(version, 6) == {"1": 2, "2": 2, "3": 2}
        assert {"1"} < set(before[version][0])
    standing = [lab.open("round-robin", version) for version in VERSIONS for _ in range(6)]

    for _ in range(8):
        if lab.kill_and_see(1) < 1.0 * SLOWER:
            break  # this machine may be slow once, and not every time
        lab.begin(1)
        lab.wait_until_alive(1, 2, 3)
    assert 1 not in lab.daemons, "it is promised within a second"
    for version in VERSIONS:
        assert lab.late("first-alive", version) == lab.early(1, version) == lab.udp("first", version) == "2"
        assert Counter(lab.late("round-robin", version) for _ in range(12)).keys() == {"2", "3"}
        assert Counter(lab.early(2, version) for _ in range(6)).keys() == {"2", "3"}
        assert Counter(lab.udp("x", version) for _ in range(6)).keys() == {"2", "3"}
        assert lab.queries(version, 8) == {"2": 4, "3": 4}
        after = hashed(version)
        for old, new in zip((*before[version][0], *before[version][1]), (*after[0], *after[1]), strict=True):
            assert new == old if old != "1" else new in ("2", "3")
        # One that is alone is steered to, dead or not: its kernel says so at once.
        assert lab.late("alone", version) == "refused"
    for client, number in standing:
        assert number == "1" or echoed(client)
        client.close()

    lab.begin(1)
    lab.wait_until_alive(1, 2, 3)
    assert {version: hashed(version) for version in VERSIONS} == before

    for each in (1, 2, 3):
        lab.kill_and_see(each)
    for version in VERSIONS:
        answers = {lab.late("hash", version), lab.late("nobody", version), lab.early(1, version), lab.udp("x", version)}
        assert answers == {"refused"}


def test_a_drained_daemon_gets_nobody_new_and_keeps_who_is_there_over_kill_and_reload(lab: Lab) -> None:
    gateway = lab.gateway
    standing = {version: lab.open("alone", version) for version in VERSIONS}
    flows = {version: lab.flow(version) for version in VERSIONS}
    assert {said(client, "first") for client in flows.values()} == {"1"}
    for alias in ("10.64.0.1", "fd00:64::1"):
        assert lab.api("PUT", "drains", alias)["connections"] >= 1

    def is_drained() -> None:
        for version in VERSIONS:
            assert lab.late("alone", version) == "refused"
            assert lab.late("first-alive", version) == lab.early(1, version) == lab.udp("first", version) == "2"
            assert "1" not in {lab.late("round-robin", version) for _ in range(6)}
            client, number = standing[version]
            assert number == "1"
            assert echoed(client)
            assert said(flows[version], "still there?") == "1"

    is_drained()
    gateway.kill()
    gateway.start()
    is_drained()
    loaded = gateway.count_events("reloaded")
    gateway.config.write_text(gateway.config.read_text() + "\n# changed\n")
    assert gateway.daemon is not None
    gateway.daemon.send_signal(signal.SIGHUP)
    gateway.wait(lambda: gateway.count_events("reloaded") > loaded, "the configuration is reloaded")
    is_drained()

    assert [drain["target"] for drain in lab.api("GET", "drains")["drains"]] == ["10.64.0.1", "fd00:64::1"]
    targets = {target["target"]: target for target in lab.api("GET", "targets", connections="true")["targets"]}
    first, second = targets["10.64.0.1:8080"], targets["10.64.0.2:8080"]
    assert (first["drained"], first["listening"], first["connections"] >= 2) == (True, ["tcp", "udp"], True)
    assert (second["drained"], second["listening"], second["dead"]) == (False, ["tcp", "udp"], [])
    # The last flow of datagrams would go by its idle timeout.
    for version in VERSIONS:
        standing[version][0].close()
        flows[version].close()
        alias = ALIAS[version].format(1)
        lab.api("DELETE", "flows", target=alias)
        assert lab.steerctl("drain", alias, "--wait", "--timeout", str(30 * SLOWER))["connections"] == 0
        lab.api("DELETE", "drains", alias)
        assert lab.late("alone", version) == lab.late("first-alive", version) == "1"


def test_a_syn_that_comes_again_goes_where_it_went_before(lab: Lab) -> None:
    """Conntrack holds its first way; at another one it would be dropped as stale."""
    lost = """
        table inet lost {
            chain out { type filter hook output priority raw; tcp sport 8080 tcp flags & syn == syn drop; }
        }"""
    gateway = lab.gateway
    gateway.host.sh(f"nft -f - <<'RULES'\n{lost}\nRULES")
    before = gateway.counters()["diverted"]
    clients = [gateway.socket(Extension(2, 7), version=version) for version in VERSIONS]
    for client, version in zip(clients, VERSIONS, strict=True):
        client.setblocking(False)
        assert client.connect_ex((ENDPOINT[version], 443)) == errno.EINPROGRESS
    gateway.wait(lambda: gateway.counters()["diverted"] >= before + 6, "each has sent its SYN three times")
    gateway.host.sh("nft delete table inet lost")
    for client in clients:
        client.setblocking(True)
        client.settimeout(15 * SLOWER)
        assert number_of(client.recv(200).decode()) in ("1", "2", "3")
        client.close()
    assert [gateway.counters()[name] for name in ("stale", "challenged")] == [0, 0]
