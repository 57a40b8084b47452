"""Conntrack's entries are read as they are. Flows from before the table was there are forgotten, so that their next
datagram is a first one again: those, and no others."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from steerd.kernel import conntrack as kernel
from steerd.kernel.conntrack import Conntrack
from steerd.model import TCP, UDP, Endpoint, Flow
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
        ip daddr 203.0.113.10 tcp dport 443 dnat ip to 10.64.0.1:8443
        ip6 daddr 2001:db8::10 tcp dport 443 dnat ip6 to [fd00:64::1]:8443
    }
}
"""
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


@pytest.fixture
def host(new_host: Callable[[str], Host]) -> Host:
    """It has the endpoint and the alias, and the translation above."""
    made = new_host("host")
    made.sh("ip addr add 203.0.113.10/32 dev lo; ip -6 addr add 2001:db8::10/128 dev lo nodad")
    made.sh("ip addr add 10.64.0.1/32 dev lo; ip -6 addr add fd00:64::1/128 dev lo nodad")
    made.sh(f"nft -f - <<'END'\n{NAT}\nEND")
    return made


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Closes what is put on it."""
    with contextlib.ExitStack() as made:
        yield made


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


@pytest.mark.parametrize("version", [4, 6])
def test_every_entry_is_read_as_client_and_daemon_see_it(host: Host, stack: contextlib.ExitStack, version: int) -> None:
    host.sh("sysctl -qw net.netfilter.nf_conntrack_timestamp=1")
    begun = time.time()
    endpoint, alias = ADDRESS[version], ALIAS[version]
    with host.entered():
        listening = stack.enter_context(socket.create_server((alias, 8443), family=FAMILIES[version]))
        clients = [stack.enter_context(socket.create_connection((endpoint, 443), timeout=5)) for _ in range(2)]
        plain = stack.enter_context(socket.create_connection((alias, 8443), timeout=5))
        asking = stack.enter_context(socket.socket(FAMILIES[version], socket.SOCK_DGRAM))
        asking.connect((endpoint, 502))
        asking.send(b"x")
        # No ports, and hence no entry to read.
        host.sh(f"ping -c 1 -W 5 {endpoint}")
        accepted = [stack.enter_context(listening.accept()[0]) for _ in range(3)]
        found = {(e.protocol, e.flow.sport): e for e in kernel.entries()}
        assert len(found) == 4
        steered = {key: entry for key, entry in found.items() if entry.is_translated}
        for client in clients:
            source, port, *_ = client.getsockname()
            entry = steered.pop((TCP, port))
            assert entry.flow == Flow(packed(source), port, packed(endpoint), 443)
            assert entry.delivered == Flow(packed(source), port, packed(alias), 8443)
            assert (entry.tcp_state, entry.is_over, entry.is_answered) == ("established", False, True)
            assert entry.seconds_left > 100
            assert entry.started is not None and begun - 1 <= entry.started <= time.time() + 1
        (datagrams,) = steered.values()
        assert (datagrams.protocol, datagrams.tcp_state, datagrams.is_answered) == (UDP, None, False)
        assert datagrams.delivered == datagrams.flow._replace(dst=packed(endpoint), dport=7000)
        assert 0 < datagrams.seconds_left <= 30
        untranslated = found[TCP, plain.getsockname()[1]]
        assert untranslated.flow == untranslated.delivered

        def ports(**which: object) -> set[int]:
            return {entry.flow.sport for entry in kernel.entries(**which)}  # type: ignore[arg-type]

        of_clients = {client.getsockname()[1] for client in clients}
        assert ports(translated=True) == of_clients | {asking.getsockname()[1]}
        assert ports(answered_by=packed(alias)) == of_clients | {plain.getsockname()[1]}
        assert ports(answered_by=packed(alias), translated=True) == of_clients
        assert ports(answered_by=packed(ALIAS[10 - version])) == set()
        stack.callback((conntrack := Conntrack()).close)
        assert conntrack.delete_entry(found[TCP, clients[0].getsockname()[1]])
        assert not conntrack.delete_entry(found[TCP, clients[0].getsockname()[1]])
        assert clients[0].getsockname()[1] not in ports()
        port = clients[1].getsockname()[1]
        for each in (clients[1], *accepted):
            each.close()
        over = [(e.flow.sport, e.tcp_state) for e in kernel.entries(translated=True) if e.is_over]
        assert over == [(port, "time_wait")]


@pytest.mark.parametrize("version", [4, 6])
def test_only_flows_to_endpoints_or_from_aliases_without_translation_and_answer_are_forgotten(
    host: Host, version: int
) -> None:
    family = FAMILIES[version]
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

    with host.entered(), contextlib.closing(Conntrack()) as conntrack:
        assert known() == {0, 500, 501, 502, 600}
        elsewhere = ipaddress.ip_network("10.64.0.4/30")
        assert conntrack.forget_unsteered([endpoint._replace(first_port=1, last_port=499)], [elsewhere]) == 0
        assert conntrack.forget_unsteered([endpoint], [POOL[10 - version]]) == 1
        assert known() == {0, 501, 502, 600}
        assert conntrack.forget_unsteered([endpoint], [elsewhere, POOL[version]]) == 1
        assert known() == {501, 502, 600}
        assert conntrack.forget_unsteered([endpoint], [POOL[version]]) == 0
    for each in sockets:
        each.close()
