"""Early, late and datagram steering on a stock kernel: native `queue`, dummy devices, synproxy, the whole daemon.
Topology: tests/netns/gateway.py.

One gateway serves all of it: to start the daemon is the slow part under emulation.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable

import pytest

from steerd.model import Extension, Reason
from steerd.telemetry.counters import Counters
from tests.netns.gateway import CLIENT4, ENDPOINT4, ENDPOINT6, ROOT, SLOWER, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_datagram import ALIAS, FLOWS, QUERIES, answer, client, dns_query, name
from tests.netns.udp_responder import bind

CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/22", "fd00:64::/118"]
[pools.routed]
prefixes = ["10.65.0.0/24", "fd00:65::/120"]
mode = "anyip"

[services.main]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
[[services.main.routes]]
when = { "portext.dst" = 7, "portext.src" = 3 }
target = ["10.65.0.9:same", "[fd00:65::9]:same"]

[services.plain]
endpoints = ["203.0.113.10:444/tcp", "[2001:db8::10]:444/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "tenants", by = "extension", port = 8080 }

[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
routes = [
    { when = { "http.host" = "a.example" }, target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] },
    { when = { "http.host" = "b.example" }, target = ["10.64.0.2:8080", "[fd00:64::2]:8080"] },
]
"""
UNKNOWN_VERSION = b"\x1a\x2a\x3a\x4a"
QUIC = """
[services.quic]
endpoints = ["203.0.113.10:443/udp", "[2001:db8::10]:443/udp"]
inspect = ["quic"]
default = ["10.64.0.1:4433", "[fd00:64::1]:4433"]
[services.quic.quic]
rebinding = true
"""


def late_client(lab: Gateway, version: int) -> socket.socket:
    made = lab.socket(None, version=version)
    made.connect((ENDPOINT4 if version == 4 else ENDPOINT6, 80))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def datagrams_are_steered(lab: Gateway) -> None:
    """A flow stays where its first datagram went, queries go one by one, a connection id is learnt."""
    lab.respond(
        *((ALIAS[version].format(1), 2, port) for version in (4, 6) for port in (9000, 53)), program="udp_responder"
    )
    for version in (4, 6):
        for prefix, index in ((b"a", 1), (b"b", 2)):
            with client(lab, version) as asking:
                for data in (prefix, b"whatever", b"a", b"b"):
                    assert answer(asking, data)[0] == name(version, index, 9000)
        with client(lab, version, 53) as asking:
            for letter, index in (("a", 1), ("b", 2), ("a", 1)):
                query = dns_query(index, f"www.{letter}.example")
                assert answer(asking, query)[0] == name(version, index, 53)
        with lab.host.entered():
            daemon = bind(ALIAS[version].format(1), 4433)
        daemon.settimeout(5 * SLOWER)
        with daemon, client(lab, version, 443) as asking, client(lab, version, 443) as moved:
            asking.send(b"\xc0" + UNKNOWN_VERSION + b"\x08its-name\x05about".ljust(1200, b"."))
            data, peer = daemon.recvfrom(2000)
            assert (data[6:14], peer[:2]) == (b"its-name", asking.getsockname()[:2])
            daemon.sendto(b"\xc0" + UNKNOWN_VERSION + b"\x08its-name\x0a%d-my-name." % version, peer)
            assert asking.recv(2000)[15:24] == b"%d-my-name" % version
            moved.send(b"\x40%d-my-name. and so on" % version)
            assert daemon.recvfrom(2000)[1][:2] == moved.getsockname()[:2]


def test_steering_by_native_queue_dummy_devices_and_synproxy(new_host: Callable[[str], Host]) -> None:
    with gateway(new_host) as lab:
        lab.configure(CONFIG + FLOWS + QUERIES + QUIC)
        lab.start()
        lab.respond(
            ("10.64.0.0", 64, 8080), ("fd00:64::", 64, 8080), ("10.65.0.9", 1, 443), ("fd00:65::9", 1, 443)
        )  # fmt: skip
        (loaded,) = (event for event in lab.events() if event["event"] == "table loaded")
        assert loaded["queue"] == "nft"
        assert loaded["aliases_added"] == 2048
        assert "queue to jhash" in lab.host.sh("nft list chain inet steerd queue4")
        assert "dummy" in lab.host.sh("ip -d link show steer0")
        assert "chain worker" not in lab.host.sh("nft list chains inet")

        for extension in range(1, 33):
            assert lab.ask(Extension(extension, 0), 443).startswith(f"10.64.0.{extension - 1} 8080 {CLIENT4} ")
            answer = lab.ask(Extension(extension, 0), 443, version=6)
            assert answer.startswith(f"fd00:64::{extension - 1:x} 8080 ".replace("::0 ", ":: "))
        assert lab.ask(Extension(7, 3), 443).startswith("10.65.0.9 443 ")
        assert lab.ask(Extension(7, 3), 443, version=6).startswith("fd00:65::9 443 ")
        for refused in (None, Extension(100, 0), Extension(5000, 0)):  # no extension; nobody listens; outside the pool
            with pytest.raises(ConnectionRefusedError):
                lab.ask(refused, 443)

        counters = Counters.open(lab.directory / "run" / "counters")
        assert all(counters.slot(worker)[Reason.ARITHMETIC] > 0 for worker in range(2))
        assert counters.total(Reason.FAULT) == 0
        kernel = lab.counters()
        assert kernel["diverted"] == 2 * 32 + 2 + 3
        assert kernel["refused"] == 2

        # What a worker has decided before, the kernel steers by itself.
        for version, alias in ((4, "10.64.0.8 "), (6, "fd00:64::8 ")):
            assert lab.ask(Extension(9, 0), 444, version=version).startswith(alias)
            lab.wait(
                lambda: "elements" in lab.host.sh(f"nft list map inet steerd offload{version}"),  # noqa: B023
                "the kernel was told",
            )
            before = lab.counters()
            assert lab.ask(Extension(9, 0), 444, version=version).startswith(alias)
            after = lab.counters()
            assert (after["offloaded"], after["diverted"]) == (before["offloaded"] + 1, before["diverted"])

        # A reset connection's 4-tuple, asked for another target: the old translation is found out.
        source = (CLIENT4, 40000)
        with lab.socket(Extension(5, 0), source=source) as connection:
            connection.connect((ENDPOINT4, 443))
            assert connection.recv(256).startswith(b"10.64.0.4 ")
            connection.send(b"reset")
            with pytest.raises(ConnectionResetError):
                connection.recv(256)
        assert lab.ask(Extension(6, 0), 443, source=source).startswith("10.64.0.5 ")

        # Late: whole, in two segments (an ACK of the worker's own opens the connection), and refused.
        for version, alias in ((4, "10.64.0.{}"), (6, "fd00:64::{}")):
            for host, index, cut in (("a", 1, None), ("b", 2, None), ("a", 1, 20)):
                request = f"GET / HTTP/1.1\r\nHost: {host}.example\r\n\r\n".encode()
                with late_client(lab, version) as client:
                    for part in (request[:cut], request[cut:] if cut else b""):
                        client.sendall(part)
                        time.sleep(0.2 if cut else 0)
                    assert client.recv(256).startswith(alias.format(index).encode() + b" 8080 ")
            with late_client(lab, version) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: c.example\r\n\r\n")
                with pytest.raises(ConnectionResetError):
                    client.recv(256)

        datagrams_are_steered(lab)
        assert lab.counters()["learnt"] == 2
        assert counters.total(Reason.FAULT) == 0

        lab.stop()
        lab.host.sh(f"cd {ROOT}; {sys.executable} -m steerd.cli.main down {lab.config}")
        assert "steer" not in lab.host.sh("nft list ruleset; ip -o link; ip route show table local")
