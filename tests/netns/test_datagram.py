"""Datagram steering: a flow's first datagrams decide, the kernel carries the rest; queries are decided one by one.

Topology: tests/netns/gateway.py. Real QUIC and DNS programs are in test_datagram_programs.py.
"""

from __future__ import annotations

import re
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, NUMBERS, SLOWER, Gateway, gateway
from tests.netns.lab import Host, link

ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
CLIENT = {4: CLIENT4, 6: CLIENT6}
ALIAS = {4: "10.64.0.{}", 6: "fd00:64::{}"}
POOL = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
"""
FLOWS = """
[services.flows]
endpoints = ["203.0.113.10:500/udp", "[2001:db8::10]:500/udp"]
inspect = ["prefix"]
idle_timeout = 77
routes = [
    { when.prefix = "a", target = ["10.64.0.1:9000", "[fd00:64::1]:9000"] },
    { when.prefix = "b", target = ["10.64.0.2:9000", "[fd00:64::2]:9000"] },
    { when.prefix = "same", target = ["10.64.0.3:same", "[fd00:64::3]:same"] },
    { when.prefix = "nobody", target = ["10.64.0.9:9000", "[fd00:64::9]:9000"] },
]
"""
QUERIES = """
[services.names]
endpoints = ["203.0.113.10:53/udp", "[2001:db8::10]:53/udp"]
inspect = ["dns"]
routes = [
    { when.dns.qname = "*.a.example", target = ["10.64.0.1:53", "[fd00:64::1]:53"] },
    { when.dns.qname = "*.b.example", target = ["10.64.0.2:53", "[fd00:64::2]:53"] },
]
"""


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        yield made


@pytest.fixture
def flows(lab: Gateway) -> Gateway:
    """Two daemons by the first byte, one on the client's own port."""
    lab.configure(POOL + FLOWS)
    lab.start()
    respond(lab, 9000, 1, 2)
    respond(lab, 500, 3)
    return lab


def respond(lab: Gateway, port: int, *numbers: int) -> subprocess.Popen[str]:
    runs = [(ALIAS[version].format(number), 1, port) for version in (4, 6) for number in numbers]
    return lab.respond(*runs, program="udp_responder")


def client(lab: Gateway, version: int, port: int = 500, source: int = 0) -> socket.socket:
    """A connected socket of the client's."""
    with lab.client.entered():
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    made.settimeout(15 * SLOWER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((CLIENT[version], source))
    made.connect((ENDPOINT[version], port))
    return made


def answer(asking: socket.socket, data: bytes) -> tuple[str, str, bytes]:
    """What comes back: the daemon and the client as that saw it, each "ADDRESS PORT", and the echo."""
    asking.send(data)
    address, port, host, sport, echo = asking.recv(65536).split(b" ", 4)
    return f"{address.decode()} {port.decode()}", f"{host.decode()} {sport.decode()}", echo


def silent(asking: socket.socket, data: bytes) -> None:
    asking.send(data)
    asking.settimeout(0.3 * SLOWER)
    with pytest.raises(TimeoutError):
        asking.recv(65536)


def dns_query(number: int, host: str) -> bytes:
    """A query for an A record (RFC 1035, section 4.1). By hand: on an emulated machine scapy's import takes seconds."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in host.split("."))
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def name(version: int, number: int, port: int) -> str:
    return f"{ALIAS[version].format(number)} {port}"


@pytest.mark.parametrize("version", [4, 6])
def test_the_first_datagram_decides_and_the_flow_stays(flows: Gateway, version: int) -> None:
    for prefix, daemon in ((b"a1", (1, 9000)), (b"b1", (2, 9000)), (b"same", (3, 500))):
        with client(flows, version) as asking:
            me = f"{CLIENT[version]} {asking.getsockname()[1]}"
            for data in (prefix, b"whatever", b"b", b"a", b""):
                assert answer(asking, data) == (name(version, *daemon), me, data)
    assert flows.counters()["diverted"] == 3


@pytest.mark.parametrize("version", [4, 6])
def test_what_matches_nothing_is_dropped_without_a_word(flows: Gateway, version: int) -> None:
    with client(flows, version) as asking:
        silent(asking, b"x")
    assert flows.counters()["undecided"] == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_burst_from_a_new_port_reaches_one_daemon(flows: Gateway, version: int) -> None:
    """Datagrams that wait for their worker together make several conntrack entries; they become one."""
    for _ in range(20):
        with client(flows, version) as asking:
            for number in range(30):
                asking.send(b"a%d" % number)
            answers = [asking.recv(65536).split(b" ") for _ in range(30)]
            assert {answer[0].decode() for answer in answers} == {ALIAS[version].format(1)}
            assert {answer[4] for answer in answers} == {b"a%d" % number for number in range(30)}


@pytest.mark.parametrize("version", [4, 6])
def test_a_daemon_that_is_not_there_is_heard_of_at_once(flows: Gateway, version: int) -> None:
    with client(flows, version) as asking:
        asking.send(b"nobody")
        with pytest.raises(ConnectionRefusedError):
            asking.recv(65536)


@pytest.mark.parametrize("version", [4, 6])
def test_a_wildcard_listener_never_answers_for_a_daemon(lab: Gateway, version: int) -> None:
    lab.configure(POOL + FLOWS)
    lab.start()
    lab.respond(("0.0.0.0" if version == 4 else "::", 1, 9000), program="udp_responder")
    with client(lab, version) as asking:
        asking.send(b"a")
        with pytest.raises(ConnectionRefusedError):
            asking.recv(65536)
    assert lab.counters()["wildcard"] == 1


@pytest.mark.parametrize("version", [4, 6])
def test_nothing_reaches_an_alias_but_through_a_decision(flows: Gateway, version: int) -> None:
    flows.client.sh("ip route add 10.64.0.0/24 via 198.51.100.254; ip -6 route add fd00:64::/120 via 2001:db8:1::fe")
    with client(flows, version) as asking:
        asking.connect((ALIAS[version].format(1), 9000))
        silent(asking, b"a")
    assert flows.counters()["direct"] == 1


@pytest.mark.parametrize("version", [4, 6])
def test_flows_go_on_without_the_daemon_and_are_not_steered_twice(flows: Gateway, version: int) -> None:
    with client(flows, version) as asking:
        assert answer(asking, b"a")[0] == name(version, 1, 9000)
        flows.kill()
        assert answer(asking, b"b")[0] == name(version, 1, 9000)
        flows.start()
        assert answer(asking, b"b")[0] == name(version, 1, 9000)


@pytest.mark.parametrize("version", [4, 6])
def test_timeouts_are_the_services_own(flows: Gateway, version: int) -> None:
    def seconds(asking: socket.socket) -> int:
        port = asking.getsockname()[1]
        entries = flows.host.sh("cat /proc/net/nf_conntrack")
        found = re.search(rf"udp +17 (\d+) src=\S+ dst=\S+ sport={port} ", entries)
        assert found, entries
        return int(found[1])

    with client(flows, version) as asking:
        answer(asking, b"a")
        assert 20 <= seconds(asking) <= 30
        time.sleep(2.1)  # conntrack calls it a stream after two seconds
        answer(asking, b"a")
        assert 70 <= seconds(asking) <= 77


@pytest.mark.parametrize("version", [4, 6])
def test_a_flow_from_before_the_table_is_steered_when_the_daemon_comes(lab: Gateway, version: int) -> None:
    lab.configure(POOL + FLOWS)
    with lab.host.entered():
        mute = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    mute.bind((ENDPOINT[version], 500))
    with mute, client(lab, version) as asking:
        silent(asking, b"a")
        asking.settimeout(15 * SLOWER)
        lab.start()
        respond(lab, 9000, 1, 2)
        assert answer(asking, b"b")[0] == name(version, 2, 9000)


@pytest.mark.parametrize("version", [4, 6])
def test_an_answer_after_its_flow_is_forgotten_is_dropped(lab: Gateway, version: int) -> None:
    """It would leave with the alias as its source, and be in the way of the client's next flow."""
    lab.configure(POOL + FLOWS)
    lab.start()
    daemon = respond(lab, 9000, 1, 2)
    assert daemon.stdout is not None
    with client(lab, version) as asking:
        assert answer(asking, b"a")[0] == name(version, 1, 9000)
        asking.send(b"held")
        assert daemon.stdout.readline() == "held\n"
        lab.host.sh("conntrack -D -p udp" + (" -f ipv6" if version == 6 else ""))
        daemon.send_signal(signal.SIGUSR1)
        lab.wait(lambda: lab.counters()["orphans"] == 1, "the answer is dropped")
        assert answer(asking, b"b") == (
            name(version, 2, 9000), f"{CLIENT[version]} {asking.getsockname()[1]}", b"b"
        )  # fmt: skip


@pytest.mark.parametrize("version", [4, 6])
def test_path_mtu_discovery_reaches_the_daemon(new_host: Callable[[str], Host], version: int) -> None:
    """client --1300-- router --1500-- gateway: the router's error about a large answer is for the endpoint's address,
    and reaches the daemon on its alias, whose next answer is refused by its own kernel."""
    with gateway(new_host) as lab:
        lab.configure(POOL + FLOWS)
        router = new_host("router")
        lab.client.sh("ip link set eth0 down; ip link del eth0")
        link(lab.client, "eth0", router, "south")
        link(router, "north", lab.host, "eth0")
        lab.client.sh(
            "ip link set eth0 mtu 1300; ip addr add 198.51.100.1/24 dev eth0;"
            "ip -6 addr add 2001:db8:1::1/64 dev eth0 nodad;"
            "ip route add default via 198.51.100.99; ip -6 route add default via 2001:db8:1::99"
        )
        router.sh(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1;"
            "ip link set south mtu 1300; ip addr add 198.51.100.99/24 dev south;"
            "ip -6 addr add 2001:db8:1::99/64 dev south nodad;"
            "ip addr add 192.0.2.1/24 dev north; ip -6 addr add 2001:db8:2::1/64 dev north nodad;"
            "ip route add 203.0.113.10 via 192.0.2.2; ip -6 route add 2001:db8::10 via 2001:db8:2::2"
        )
        lab.host.sh(
            "ip addr add 192.0.2.2/24 dev eth0; ip -6 addr add 2001:db8:2::2/64 dev eth0 nodad;"
            "ip route add 198.51.100.1 via 192.0.2.1; ip -6 route add 2001:db8:1::1 via 2001:db8:2::1"
        )
        lab.start()
        runs = [(ALIAS[v].format(1), 1, 9000) for v in (4, 6)]
        daemon = lab.respond(*runs, program="udp_responder")
        assert daemon.stdout is not None
        with client(lab, version) as asking:
            assert answer(asking, b"a")[0] == name(version, 1, 9000)
            silent(asking, b"size1400")
            # Until the error has come.
            while not select.select([daemon.stdout], [], [], 0.1)[0]:
                asking.send(b"size1400")
            assert "Message too long" in daemon.stdout.readline()
            asking.settimeout(15 * SLOWER)
            assert answer(asking, b"size1200")[0] == name(version, 1, 9000)


@pytest.mark.parametrize("version", [4, 6])
def test_a_port_extension_on_a_datagram(lab: Gateway, version: int) -> None:
    lab.configure(
        POOL
        + '[services.main]\nendpoints = ["203.0.113.10:500/udp", "[2001:db8::10]:500/udp"]\n'
        + 'inspect = ["port-extension"]\nunextended = "unmatched"\n'
        + 'extension_pool = { pool = "tenants", by = "extension", port = 9000 }\n'
    )
    lab.start()
    respond(lab, 9000, 4, 5)
    for extension in (5, 6):
        with client(lab, version) as asking:
            if version == 4:
                encoded = portext.encode_ipv4(Extension(extension, 0), NUMBERS)
                asking.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, encoded)
            else:
                encoded = portext.encode_ipv6(Extension(extension, 0), NUMBERS)
                asking.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, encoded)
            assert answer(asking, b"a")[0] == name(version, extension - 1, 9000)
    with client(lab, version) as asking:
        silent(asking, b"a")


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_left_to_the_gateways_own_socket(lab: Gateway, version: int) -> None:
    lab.configure(
        POOL
        + '[services.main]\nendpoints = ["203.0.113.10:500/udp", "[2001:db8::10]:500/udp"]\n'
        + 'inspect = ["port-extension"]\nunextended = "pass"\n'
        + 'extension_pool = { pool = "tenants", by = "extension", port = 9000 }\n'
    )
    lab.start()
    lab.respond((ENDPOINT[version], 1, 500), program="udp_responder")
    with client(lab, version) as asking:
        for _ in range(3):
            assert answer(asking, b"a")[0] == f"{ENDPOINT[version]} 500"
    assert lab.counters()["diverted"] == 1


# ---- queries ----


@pytest.mark.parametrize("version", [4, 6])
def test_every_query_from_one_port_goes_where_its_name_says(lab: Gateway, version: int) -> None:
    lab.configure(POOL + QUERIES)
    lab.start()
    respond(lab, 53, 1, 2)
    with client(lab, version, 53) as asking:
        me = f"{CLIENT[version]} {asking.getsockname()[1]}"
        for round_ in range(20):
            for letter, number in (("a", 1), ("b", 2)):
                query = dns_query(round_, f"www{round_}.{letter}.example")
                assert answer(asking, query) == (name(version, number, 53), me, query)
        silent(asking, dns_query(0, "www.c.example"))
    counters = lab.counters()
    assert counters["diverted"] == 41
    assert counters["undecided"] == counters["untranslated"] == 0


@pytest.mark.parametrize("version", [4, 6])
def test_queries_at_once_from_one_port_go_where_their_names_say(lab: Gateway, version: int) -> None:
    lab.configure(POOL + QUERIES)
    lab.start()
    respond(lab, 53, 1, 2)
    wanted = {}
    with client(lab, version, 53) as asking:
        for number in range(100):
            letter, alias = (("a", 1), ("b", 2))[number % 2]
            query = dns_query(number, f"www.{letter}.example")
            wanted[query] = ALIAS[version].format(alias)
            asking.send(query)
        for _ in wanted:
            address, _, _, _, query = asking.recv(65536).split(b" ", 4)
            assert wanted[query] == address.decode()
