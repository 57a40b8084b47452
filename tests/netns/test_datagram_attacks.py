"""Attacks on datagram steering, each of which once worked. Topology: tests/netns/gateway.py."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from tests.initials import client_hello, flight
from tests.netns.gateway import SLOWER, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_datagram import ALIAS, CLIENT, ENDPOINT, FLOWS, POOL, answer, client, name, respond

QUIC = """
[services.web]
endpoints = ["203.0.113.10:443/udp", "[2001:db8::10]:443/udp"]
inspect = ["quic"]
routes = [
    { when.quic.sni = "a.example", target = ["10.64.0.1:9000", "[fd00:64::1]:9000"] },
    { when.quic.sni = "b.example", target = ["10.64.0.2:9000", "[fd00:64::2]:9000"] },
]
"""


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        yield made


def initial(host: str, number: int, size: int = 0) -> list[bytes]:
    """The first datagrams of a connection of its own."""
    return flight(client_hello(host.encode(), b"h3", size=size), dcid=bytes([number]) * 8)


@pytest.mark.parametrize("size", [0, 1500])
@pytest.mark.parametrize("version", [4, 6])
def test_a_port_that_is_used_again_for_another_name_never_reaches_the_old_daemon(
    lab: Gateway, version: int, size: int
) -> None:
    lab.configure(POOL + QUIC)
    lab.start()
    respond(lab, 9000, 1, 2)

    def ask(asking: socket.socket, host: str, number: int) -> None:
        for each in initial(host, number, size):
            asking.send(each)

    def is_answered(asking: socket.socket) -> bool:
        for _ in range(2 if size else 1):
            assert asking.recv(65536).split(b" ", 1)[0].decode() == ALIAS[version].format(1)
        return True

    with client(lab, version, 443) as asking:
        ask(asking, "a.example", 1)
        assert is_answered(asking)
        ask(asking, "b.example", 2)
        asking.settimeout(1.0 * SLOWER)
        with pytest.raises(TimeoutError):
            asking.recv(65536)
        asking.settimeout(15 * SLOWER)
        ask(asking, "a.example", 3)
        assert is_answered(asking)
        # What is no beginning goes on in the flow that stands.
        assert answer(asking, b"\x40" + bytes(1300))[0] == name(version, 1, 9000)
        broken = bytearray(initial("b.example", 4)[0])
        broken[-1] ^= 1
        assert answer(asking, bytes(broken))[0] == name(version, 1, 9000)
    assert lab.counters()["stale"] >= 1


@pytest.mark.parametrize("version", [4, 6])
def test_a_source_that_no_client_has_is_not_steered(lab: Gateway, version: int) -> None:
    """One datagram with an alias as its source, and two daemons would answer each other for ever."""
    lab.configure(POOL + FLOWS)
    lab.host.sh("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0")
    lab.start()
    respond(lab, 9000, 1, 2)
    header = IP if version == 4 else IPv6
    spoofed = bytes(header(src=ALIAS[version].format(2), dst=ENDPOINT[version]) / UDP(sport=9000, dport=500) / b"a")
    with lab.client.entered():
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        raw.sendto(spoofed, (ENDPOINT[version], 0))
    lab.wait(lambda: lab.counters()["impossible"] == 1, "it is dropped")
    assert lab.counters()["diverted"] == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_wildcard_listener_does_not_take_over_a_dead_daemons_flow(lab: Gateway, version: int) -> None:
    lab.configure(POOL + FLOWS)
    lab.start()
    daemon = lab.respond((ALIAS[version].format(1), 1, 9000), program="udp_responder")
    with client(lab, version) as asking:
        assert answer(asking, b"a") == (name(version, 1, 9000), f"{CLIENT[version]} {asking.getsockname()[1]}", b"a")
        daemon.kill()
        daemon.wait()
        lab.respond(("0.0.0.0" if version == 4 else "::", 1, 9000), program="udp_responder")
        asking.send(b"a")
        with pytest.raises(ConnectionRefusedError):
            asking.recv(65536)


@pytest.mark.parametrize("version", [4, 6])
def test_a_client_does_not_choose_what_is_learnt(lab: Gateway, version: int) -> None:
    """The connection id in a Version Negotiation is the one that the client has made up (RFC 9000 section 17.2.1)."""
    lab.configure(POOL + QUIC.replace("9000", "9443") + 'default = ["10.64.0.3:9443", "[fd00:64::3]:9443"]\n')
    lab.start()
    with lab.host.entered():
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        daemon = socket.socket(family, socket.SOCK_DGRAM)
    daemon.bind((ALIAS[version].format(3), 9443))
    daemon.settimeout(15 * SLOWER)
    with daemon, client(lab, version, 443) as asking:
        asking.send(initial("other.example", 1)[0])
        _, peer = daemon.recvfrom(2000)
        for kind, learnt in ((bytes(4), 0), (b"\0\0\0\1", 1)):
            daemon.sendto(b"\xc0" + kind + b"\x08clientid\x08CHOSENID" + b"\0\0\0\1", peer)
            assert asking.recv(2000)[1:5] == kind
            assert lab.counters()["learnt"] == learnt
