"""`steerctl flows` shows what conntrack knows of steered connections, early, late and datagrams, and nothing else;
`flows kill` ends those that are meant: who can be told is told, and nothing of them passes any more.

Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scapy.layers.dns import DNS, DNSQR

from steerd.model import Extension
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, SLOWER, Gateway, gateway
from tests.netns.lab import Host

BODY = """
[pools.p]
prefixes = ["10.64.0.0/28", "fd00:64::/124"]
[services.early]
endpoints = ["203.0.113.10:70/tcp", "[2001:db8::10]:70/tcp"]
inspect = ["port-extension"]
extension_pool = { pool = "p", by = "extension", port = 8080 }
[services.late]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
routes = [
    { when.http.host = "a.example", target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] },
    { when.http.host = "b.example", target = ["10.64.0.2:8080", "[fd00:64::2]:8080"] },
]
[services.talk]
endpoints = ["203.0.113.10:500/udp", "[2001:db8::10]:500/udp"]
inspect = ["prefix"]
routes = [
    { when.prefix = "a", target = ["10.64.0.1:9000", "[fd00:64::1]:9000"] },
    { when.prefix = "b", target = ["10.64.0.2:9000", "[fd00:64::2]:9000"] },
]
[services.names]
endpoints = ["203.0.113.10:53/udp", "[2001:db8::10]:53/udp"]
inspect = ["dns"]
routes = [{ when.dns.qname = "*.b.example", target = ["10.64.0.2:9000", "[fd00:64::2]:9000"] }]
"""
CLIENT = {4: CLIENT4, 6: CLIENT6}
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
PORTS = {"early": 70, "late": 80, "talk": 500, "names": 53}
FIRST = {
    "late": b"GET / HTTP/1.1\r\nHost: %c.example\r\n\r\n",
    "talk": b"%c",
    "names": bytes(DNS(rd=1, qd=DNSQR(qname="www.b.example"))),
}
NUMBER = {"a": 1, "b": 2}


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(BODY)
        made.start()
        made.respond(("10.64.0.1", 2, 8080), ("fd00:64::1", 2, 8080))
        made.respond(("10.64.0.1", 2, 9000), ("fd00:64::1", 2, 9000), program="udp_responder")
        yield made


def steerctl(lab: Gateway, *arguments: str, status: int = 0) -> str:
    command = lab.host.command(sys.executable, "-m", "steerd.cli.ctl", "flows", *arguments, "--config", str(lab.config))
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60 * SLOWER)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def flows(lab: Gateway, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in steerctl(lab, "--json", *arguments).splitlines()]


def connect(lab: Gateway, service: str, letter: str, version: int) -> socket.socket:
    """A connection or flow that the daemon of a letter has answered."""
    kind = socket.SOCK_DGRAM if service in ("talk", "names") else socket.SOCK_STREAM
    if service == "early":
        made = lab.socket(Extension(NUMBER[letter] + 1, 0), version=version)
    else:
        with lab.client.entered():
            made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
    made.settimeout(15 * SLOWER)
    made.connect((ENDPOINT[version], PORTS[service]))
    if service != "early":
        made.send(FIRST[service].replace(b"%c", letter.encode()))
    said = made.recv(4096)
    assert said.split()[0].decode() == address(letter, version)
    while service == "late" and not said.endswith(b"\r\n\r\n"):  # the echo
        said += made.recv(4096)
    return made


def address(letter: str, version: int) -> str:
    return ("10.64.0.{}" if version == 4 else "fd00:64::{}").format(NUMBER[letter])


def accepted(lab: Gateway) -> int:
    """TCP sockets of daemons that are connected with the client."""
    peers = f"dst {CLIENT4} or dst [{CLIENT6}]"
    return len(lab.host.sh(f"ss -Htn state established '( {peers} )'").splitlines())


def test_flows_are_shown_and_those_that_are_meant_are_ended(lab: Gateway) -> None:
    kinds = [(service, letter, version) for service in FIRST | {"early": b""} for letter in "ab" for version in (4, 6)]
    kinds = [(service, letter, version) for service, letter, version in kinds if (service, letter) != ("names", "a")]
    with contextlib.ExitStack() as stack:
        clients = {kind: stack.enter_context(connect(lab, *kind)) for kind in kinds}
        # Not steered: the gateway's own.
        with lab.host.entered():
            plain = stack.enter_context(socket.create_connection(("10.64.0.1", 8080)))
        found = flows(lab)
        assert len(found) == len(kinds)
        for (service, letter, version), client in clients.items():
            source = f"{CLIENT[version]}:{client.getsockname()[1]}".replace(CLIENT6, f"[{CLIENT6}]")
            (flow,) = (each for each in found if each["client"] == source)
            is_tcp = service in ("early", "late")
            assert flow["service"] == service
            assert flow["protocol"] == ("tcp" if is_tcp else "udp")
            assert flow["state"] == ("established" if is_tcp else None)
            host = address(letter, version) if version == 4 else f"[{address(letter, version)}]"
            assert flow["target"] == f"{host}:{8080 if is_tcp else 9000}"
            assert flow["endpoint"].endswith(f":{PORTS[service]}")
            when = {"late": {"http.host": f"{letter}.example"}, "talk": {"prefix": letter}}
            assert flow["when"] == (when | {"names": {"dns.qname": "*.b.example"}}).get(service)
            assert flow["seconds_left"] > 0
        assert len(flows(lab, "--service", "late")) == 4
        assert len(flows(lab, "--client", f"{CLIENT4}/32")) == 7
        assert len(flows(lab, "--target", "10.64.0.2")) == 4
        assert len(flows(lab, "--target", "[fd00:64::2]:9000")) == 2
        assert "a.example" in steerctl(lab, "--service", "late")
        command = [sys.executable, "-m", "steerd.cli.ctl", "top", "--once", "--json", "--interval", "0.1"]
        top = json.loads(lab.host.sh(f"cd {ROOT}; {' '.join(command)} --config {lab.config}"))
        counts = {(1, 8080): 2, (2, 8080): 2, (1, 9000): 1, (2, 9000): 2}
        hosts = ("10.64.0.{}", "[fd00:64::{}]")
        expected = {f"{host.format(n)}:{port}": count for (n, port), count in counts.items() for host in hosts}
        assert {each["target"]: each["flows"] for each in top["targets"]} == expected

        assert "Say which flows" in steerctl(lab, "kill", "--yes", status=2)
        assert steerctl(lab, "kill", "--target", "10.64.0.1", "--yes") == "3 flows ended\n"
        assert steerctl(lab, "kill", "--target", "fd00:64::1", "--yes") == "3 flows ended\n"
        assert {flow["target"].rpartition(":")[0].strip("[]") for flow in flows(lab)} == {"10.64.0.2", "fd00:64::2"}
        for (service, letter, version), client in clients.items():
            if letter == "b":
                if service == "names":
                    continue
                client.send(b"b more")
                assert client.recv(4096).endswith(b"more")
            elif service == "talk":
                # Decided anew, and from the same port.
                client.send(b"b")
                assert client.recv(4096).split()[0].decode() == address("b", version)
            else:
                # It is told, without any packet of its own.
                with pytest.raises(ConnectionResetError):
                    client.recv(4096)
        # Of the daemons' connections only those with b are left.
        lab.wait(lambda: accepted(lab) == 4, "the daemons of a are told")
        steerctl(lab, "kill", "--client", "0.0.0.0/0", "--yes")
        steerctl(lab, "kill", "--client", "::/0", "--yes")
        lab.wait(lambda: accepted(lab) == 0, "all daemons are told")
        assert flows(lab) == []
        for (service, letter, _), client in clients.items():
            if letter == "b" and service in ("early", "late"):
                with pytest.raises(ConnectionResetError):
                    client.recv(4096)
        # And it goes on.
        for kind in kinds:
            stack.enter_context(connect(lab, *kind))
        assert lab.counters()["untranslated"] == 0
        plain.sendall(b"still here")
