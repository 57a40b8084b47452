"""Leases: a name gets an alias and a route to it while everything runs, and loses both with its connections.

Topology: tests/netns/gateway.py. Daemons listen on all aliases of the pool from the beginning.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host

ALIASES = 4
BODY = """
[pools.tenants]
prefixes = ["10.64.0.0/30", "fd00:64::/126"]
quarantine = 600

[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
"""
CLIENTS = {4: CLIENT4, 6: CLIENT6}
ENDPOINTS = {4: ENDPOINT4, 6: ENDPOINT6}


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(BODY)
        made.start()
        made.respond(("10.64.0.0", ALIASES, 8080), ("fd00:64::", ALIASES, 8080))
        yield made


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Closes what is put on it."""
    with contextlib.ExitStack() as made:
        yield made


def steerctl(lab: Gateway, *arguments: str, check: bool = True) -> str:
    command = [sys.executable, "-m", "steerd.cli.ctl", *arguments, "--config", str(lab.config)]
    return lab.host.sh(f"cd {ROOT}; {' '.join(command)} 2>&1", check=check)


def add(lab: Gateway, name: str, *more: str) -> list[str]:
    """Lease an alias for http://NAME.example/; its addresses."""
    made = steerctl(
        lab, "lease", "add", name, "--pool", "tenants", "--service", "web", "--key", f"http.host={name}.example",
        "--port", "8080", "--json", *more,
    )  # fmt: skip
    addresses: list[str] = json.loads(made)["addresses"]
    return addresses


def connect(lab: Gateway, name: str, version: int) -> socket.socket:
    client = lab.socket(None, version=version)
    client.connect((ENDPOINTS[version], 80))
    client.sendall(f"GET / HTTP/1.1\r\nHost: {name}.example\r\n\r\n".encode())
    return client


def heard(client: socket.socket) -> str | None:
    """The alias that answered; None: reset."""
    try:
        answer = client.recv(4096)
    except ConnectionResetError:
        return None
    assert answer, "closed without a word"
    return answer.split()[0].decode()


def ask(lab: Gateway, name: str, version: int) -> str | None:
    with connect(lab, name, version) as client:
        return heard(client)


def flows(lab: Gateway, address: str) -> int:
    """Conntrack entries whose daemon has this address."""
    family = "ipv6" if ":" in address else "ipv4"
    return int(lab.host.sh(f"conntrack -L -f {family} --reply-src {address} 2>/dev/null | wc -l"))


def reaches(lab: Gateway, name: str, addresses: list[str]) -> None:
    for address in addresses:
        version = ipaddress.ip_address(address).version
        assert ask(lab, name, version) == address


def test_a_name_has_its_alias_from_one_moment_to_the_next(lab: Gateway, stack: contextlib.ExitStack) -> None:
    assert ask(lab, "a", 4) is None
    assert add(lab, "a") == ["10.64.0.0", "fd00:64::"]
    assert add(lab, "b") == ["10.64.0.1", "fd00:64::1"]
    reaches(lab, "a", ["10.64.0.0", "fd00:64::"])
    reaches(lab, "b", ["10.64.0.1", "fd00:64::1"])
    # Established connections of both; only those of the one that is released end.
    held = {(name, version): stack.enter_context(connect(lab, name, version)) for name in "ab" for version in (4, 6)}
    for client in held.values():
        assert heard(client) is not None
    assert flows(lab, "10.64.0.0") > 0 < flows(lab, "fd00:64::")
    assert "released, " in steerctl(lab, "lease", "release", "a")
    assert flows(lab, "10.64.0.0") == flows(lab, "fd00:64::") == 0
    assert ask(lab, "a", 4) is None is ask(lab, "a", 6)
    for (name, _), client in held.items():
        if name == "b":
            client.sendall(b"more")
            assert client.recv(100)
    # In quarantine for others, free for the one who had it.
    assert add(lab, "c") == ["10.64.0.2", "fd00:64::2"]
    assert add(lab, "a") == ["10.64.0.0", "fd00:64::"]
    reaches(lab, "a", ["10.64.0.0", "fd00:64::"])
    assert add(lab, "d") == ["10.64.0.3", "fd00:64::3"]
    assert "The pool tenants is full: of 4 aliases 4 are leased, 0 in quarantine" in steerctl(
        lab, "lease", "add", "e", "--pool", "tenants", check=False
    )


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_leases_outlive_the_daemon(lab: Gateway, how: str) -> None:
    add(lab, "a")
    add(lab, "b", "--ttl", "1s")
    steerctl(lab, "route", "add", "web", "10.64.0.3:8080", "--key", "http.host=own.example")
    exported = steerctl(lab, "export")
    if how == "killed":
        lab.kill()
    else:
        lab.stop()
    lab.start()
    reaches(lab, "a", ["10.64.0.0", "fd00:64::"])
    assert ask(lab, "own", 4) == "10.64.0.3"
    lab.wait(lambda: ask(lab, "b", 4) is None, "b's time is over")
    assert [line for line in exported.splitlines() if '"a"' in line or '"own' in line] == [
        line for line in steerctl(lab, "export").splitlines() if '"a"' in line or '"own' in line
    ]


def test_a_lease_ends_with_its_time(lab: Gateway) -> None:
    add(lab, "a", "--ttl", "1s")
    lab.wait(lambda: lab.count_events("lease ended") == 1, "the lease ended")
    assert ask(lab, "a", 4) is None
    assert json.loads(steerctl(lab, "lease", "list", "--json")) == []


def test_an_address_that_somebody_took_away_is_brought_back_first(lab: Gateway) -> None:
    lab.expected_warnings.append("aliases were removed by somebody; they are back")
    lab.host.sh("ip addr del 10.64.0.0/32 dev $(ip -br addr show to 10.64.0.0/32 | cut -d' ' -f1)")
    assert add(lab, "a") == ["10.64.0.0", "fd00:64::"]
    assert "10.64.0.0/32" in lab.host.sh("ip addr show to 10.64.0.0/32")


def test_import_and_export_while_it_runs(lab: Gateway) -> None:
    lines = "".join(
        json.dumps(
            {
                "kind": "route",
                "service": "web",
                "when": {"http.host": f"h{number}.example"},
                "target": [f"10.64.0.{number % 4}:8080", f"[fd00:64::{number % 4}]:8080"],
            }
        )
        + "\n"
        for number in range(20_000)
    )
    file = lab.directory / "lines"
    file.write_text(lines)
    assert steerctl(lab, "import", str(file)) == "20,000 added, 0 changed, 0 unchanged\n"
    for number in (0, 7, 19_999):
        assert ask(lab, f"h{number}", 4) == f"10.64.0.{number % 4}"
    text = steerctl(lab, "export")
    file.write_text(text)
    assert steerctl(lab, "import", str(file)) == "0 added, 0 changed, 20,000 unchanged\n"
    steerctl(lab, "route", "remove", "web", "--key", "http.host=h7.example")
    assert ask(lab, "h7", 4) is None
    assert ask(lab, "h8", 4) == "10.64.0.0"
