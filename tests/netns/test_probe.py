"""`steerctl probe` over a router: its words for each hop, and for routers that drop, refuse or strip the option.

    client                          router                                   server
    c0 10.9.1.2/24, fd00:9:1::2/64 -- r0 .1, ::1    r1 10.9.2.1, fd00:9:2::1 -- s0 .2, ::2    port 4464 open

Run as a process of its own: scapy reads the routes of the namespace it is imported in.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.netns.lab import Host, link

ROOT = Path(__file__).parent.parent.parent
ANSWERED, SILENT = 15.0, 0.3
"""How long an answer is waited for, where there is one and where there is none."""
IPV4, IPV6 = "10.9.2.2", "fd00:9:2::2"
ROUTER = {IPV4: "10.9.1.1", IPV6: "fd00:9:1::1"}
CARRIER = {(IPV4, "ip"): "IPv4 option", (IPV6, "ip"): "IPv6 destination option"}

both_families = pytest.mark.parametrize("host", [IPV4, IPV6])
both_ways = pytest.mark.parametrize("via", ["ip", "tcp"])


class Lab(NamedTuple):
    client: Host
    router: Host
    server: Host

    def probe(self, host: str, via: str, port: int = 70000, seconds: float = ANSWERED) -> tuple[int, list[str]]:
        """(exit status, the lines said behind the first one)."""
        program = (
            "from steerd.cli.probe import probe\n"
            f"print(probe('{host}', {port}, source_extension=9, via='{via}', timeout={seconds}, out=print))\n"
        )
        said = self.client.sh(f'cd {ROOT}; {sys.executable} -W error::ResourceWarning -c "{program}"').splitlines()
        carrier = CARRIER.get((host, via), "TCP option")
        assert said[0] == f"SYN to {host} port {port % 65536} with extension 1, source extension 9 ({carrier})"
        return int(said[-1]), said[1:-1]

    def router_rule(self, rule: str, hook: str = "forward") -> None:
        priority = "priority -300" if hook == "prerouting" else "priority 0"
        self.router.sh(f"nft 'add table inet t; add chain inet t c {{ type filter hook {hook} {priority}; }}'")
        self.router.sh(f"nft 'add rule inet t c {rule}'")


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Lab]:
    near, router, far = new_host("client"), new_host("router"), new_host("server")
    for host in (near, router, far):
        # Otherwise link-local addresses are tentative for a second or two, and neighbours are not found meanwhile.
        host.sh("sysctl -q -w net.ipv6.conf.default.accept_dad=0")
    link(near, "c0", router, "r0")
    link(router, "r1", far, "s0")
    for host, interface, network, number in (
        (near, "c0", 1, 2), (router, "r0", 1, 1), (router, "r1", 2, 1), (far, "s0", 2, 2),
    ):  # fmt: skip
        host.sh(f"ip addr add 10.9.{network}.{number}/24 dev {interface}")
        host.sh(f"ip addr add fd00:9:{network}::{number}/64 dev {interface} nodad")
    for host, network in ((near, 1), (far, 2)):
        host.sh(f"ip route add default via 10.9.{network}.1; ip -6 route add default via fd00:9:{network}::1")
    # Off: by default a router sends one ICMP error a second to an address, and tests would wait for it.
    router.sh("sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
    router.sh("sysctl -q -w net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0")
    with far.entered():
        listener = socket.create_server(("::", 4464), family=socket.AF_INET6, dualstack_ipv6=True)
    with listener:
        yield Lab(near, router, far)


@both_families
@both_ways
def test_an_open_port_behind_a_router(lab: Lab, host: str, via: str) -> None:
    assert lab.probe(host, via) == (
        0,
        [
            f"hop 1: time exceeded from {ROUTER[host]}; the option had come that far",
            f"hop 2: SYN-ACK from {host}: the port is open",
        ],
    )
    assert "SYN-RECV" not in lab.server.sh("ss -Htan"), "the kernel has reset what was opened"
    assert lab.client.sh("ss -Htan").strip() == ""


@both_families
def test_a_closed_port(lab: Lab, host: str) -> None:
    status, said = lab.probe(host, "ip", 70001)
    assert status == 1
    assert said[-1] == f"hop 2: reset from {host}: the port is closed, or a firewall says so"


@pytest.mark.parametrize(
    ("host", "via", "rule"),
    [
        (IPV4, "ip", "ip hdrlength > 5 drop"),
        (IPV6, "ip", "exthdr dst exists drop"),
        (IPV4, "tcp", "tcp option 253 exists drop"),
    ],
)
@pytest.mark.parametrize("hook", ["forward", "prerouting"])
def test_a_router_that_drops_the_option_is_named(lab: Lab, host: str, via: str, rule: str, hook: str) -> None:
    lab.router_rule(rule, hook)
    carrier = CARRIER.get((host, via), "TCP option")
    expired = f"hop 1: time exceeded from {ROUTER[host]}; the option had come that far"
    silence = f"nothing within {SILENT} s"
    heard = hook == "forward"
    first_silent = 2 if heard else 1
    expected = [
        *([expired] if heard else []),
        *(f"hop {hop}: {silence}" for hop in range(first_silent, first_silent + 5)),
        f"hop limit 64: {silence}",
        f"Without the {carrier} the same SYN is answered (SYN-ACK from {host}: the port is open)."
        f" Either the path drops the option, behind {f'hop 1 ({ROUTER[host]})' if heard else 'this machine'}, or the"
        " gateway's firewall drops what it leads to (on the gateway: nft/install.sh --status).",
    ]
    # A slow machine may take an answer for silence once, and not every time.
    tries = (lab.probe(host, via, seconds=SILENT) for _ in range(5))
    assert any(each == (1, expected) for each in tries), expected


@both_families
def test_silence_with_and_without_the_option(lab: Lab, host: str) -> None:
    lab.router_rule("tcp dport 4464 drop")
    status, said = lab.probe(host, "ip", seconds=SILENT)
    assert status == 1
    assert said[-1].endswith("It is not the option: nobody answers there, or a firewall drops every SYN to port 4464.")


@both_families
def test_prohibited(lab: Lab, host: str) -> None:
    lab.router_rule("tcp dport 4464 reject with icmpx type admin-prohibited")
    status, said = lab.probe(host, "ip")
    assert status == 1
    assert said[-1] == f"hop 2: administratively prohibited from {ROUTER[host]}; the option had come that far"


def test_a_router_that_strips_the_tcp_option(lab: Lab) -> None:
    lab.router_rule("reset tcp option 253", "prerouting")
    status, said = lab.probe(IPV4, "tcp")
    assert said[0] == f"hop 1: time exceeded from {ROUTER[IPV4]}; the option was removed before it"
    assert status == 0


def test_a_probe_without_an_extension_is_refused(lab: Lab) -> None:
    said = lab.client.sh(
        f"cd {ROOT}; {sys.executable} -c \"from steerd.cli.probe import probe; probe('{IPV4}', 4464)\" 2>&1",
        check=False,
    )
    assert "ValueError: A probe needs an extension" in said
