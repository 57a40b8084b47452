"""Flows from before the table was there are forgotten, so that their next datagram is a first one again: those, and no
others."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable

import pytest

from steerd.kernel.conntrack import Conntrack
from steerd.model import UDP, Endpoint
from tests.netns.lab import Host

ADDRESS = {4: "203.0.113.10", 6: "2001:db8::10"}
ALIAS = {4: "10.64.0.1", 6: "fd00:64::1"}
POOL = {4: ipaddress.ip_network("10.64.0.0/30"), 6: ipaddress.ip_network("fd00:64::/126")}
PORTS = {"unsteered": 500, "answered": 501, "translated": 502, "no endpoint's": 600}
NAT = """
table inet nat {
    chain translate {
        type nat hook output priority -100
        ip daddr 203.0.113.10 udp dport 502 dnat ip to 203.0.113.10:7000
        ip6 daddr 2001:db8::10 udp dport 502 dnat ip6 to [2001:db8::10]:7000
    }
}
"""


@pytest.mark.parametrize("version", [4, 6])
def test_only_flows_to_endpoints_or_from_aliases_without_translation_and_answer_are_forgotten(
    new_host: Callable[[str], Host], version: int
) -> None:
    host = new_host("host")
    host.sh("ip addr add 203.0.113.10/32 dev lo; ip -6 addr add 2001:db8::10/128 dev lo nodad")
    host.sh("ip addr add 10.64.0.1/32 dev lo; ip -6 addr add fd00:64::1/128 dev lo nodad")
    host.sh(f"nft -f - <<'END'\n{NAT}\nEND")
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    sockets = []

    def bound(port: int, address: str = ADDRESS[version]) -> socket.socket:
        with host.entered():
            sockets.append(socket.socket(family, socket.SOCK_DGRAM))
        sockets[-1].bind((address, port))
        sockets[-1].settimeout(5)
        return sockets[-1]

    daemons = {name: bound(7000 if name == "translated" else port) for name, port in PORTS.items()}
    for source, (name, port) in enumerate(PORTS.items(), 40000):
        client = bound(source)
        client.sendto(b"x", (ADDRESS[version], port))
        _, address = daemons[name].recvfrom(10)
        if name == "answered":
            daemons[name].sendto(b"y", address)
            assert client.recv(10) == b"y"
    bound(40004, ALIAS[version]).sendto(b"late answer", (ADDRESS[version], 600))
    endpoint = Endpoint(ipaddress.ip_address(ADDRESS[version]), 500, 510, UDP)

    def known() -> set[int]:
        entries = host.sh("cat /proc/net/nf_conntrack")
        found = re.findall(r"udp +17 \d+ src=(\S+) dst=\S+ sport=4000\d dport=(\d+) ", entries)
        return {int(port) if ipaddress.ip_address(source) not in POOL[version] else 0 for source, port in found}

    with host.entered():
        conntrack = Conntrack()
    try:
        assert known() == {0, 500, 501, 502, 600}
        elsewhere = ipaddress.ip_network("10.64.0.4/30")
        assert conntrack.forget_unsteered([endpoint._replace(first_port=1, last_port=499)], [elsewhere]) == 0
        assert conntrack.forget_unsteered([endpoint], [POOL[10 - version]]) == 1
        assert known() == {0, 501, 502, 600}
        assert conntrack.forget_unsteered([endpoint], [elsewhere, POOL[version]]) == 1
        assert known() == {501, 502, 600}
        assert conntrack.forget_unsteered([endpoint], [POOL[version]]) == 0
    finally:
        conntrack.close()
        for each in sockets:
            each.close()
