"""What an attacker, an unlucky client or another tool on the box may do: no connection may reach the wrong daemon, none
that is established may be cut, and nobody from outside may make the agent busy.

Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.flood import checksum
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, NUMBERS, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_guard import ALIAS, CONFIG, TCP_REPAIR

CLIENT = {4: CLIENT4, 6: CLIENT6}
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
LINGER_RESET = b"\1\0\0\0\0\0\0\0"
ARE_BACK = "rules of steerd were removed by somebody; they are back"


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(CONFIG)
        made.start()
        yield made


def send_syn(lab: Gateway, port: int, extension: int, *, valid_checksum: bool = True) -> None:
    """One SYN to the endpoint as anybody could send it: a source and port of choice, a sequence number of chance."""
    source, destination = socket.inet_aton(CLIENT4), socket.inet_aton(ENDPOINT4)
    option = portext.encode_ipv4(Extension(extension, 0), NUMBERS)
    tcp = struct.pack("!HHIIBBHHH", port, 443, random.getrandbits(32), 0, 0x50, 2, 64240, 0, 0)
    total = checksum(source + destination + struct.pack("!HH", socket.IPPROTO_TCP, len(tcp)) + tcp)
    total ^= 0 if valid_checksum else 0x1234
    tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
    header = struct.pack("!BBHHHBBH4s4s", 0x47, 0, 28 + len(tcp), 0, 0, 64, socket.IPPROTO_TCP, 0, source, destination)
    with lab.client.entered(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(header + option + tcp, (ENDPOINT4, 0))


def reset_by_daemon(lab: Gateway, extension: Extension | None, source: tuple[str, int], version: int = 4) -> None:
    """A connection that its daemon resets: conntrack keeps the entry for a while, in state CLOSE."""
    with lab.socket(extension, version=version, source=source) as connection:
        connection.connect((ENDPOINT[version], 443))
        assert connection.recv(256)
        connection.send(b"reset")
        with pytest.raises(ConnectionResetError):
            connection.recv(256)


def vanish(connection: socket.socket) -> None:
    """Close in repair mode: the socket goes without a word, as if the client had lost its power."""
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    connection.close()


@pytest.mark.parametrize("version", [4, 6])
def test_a_reset_4_tuple_without_extension_does_not_meet_the_old_daemon(lab: Gateway, version: int) -> None:
    """`unextended = "pass"`: this SYN is the gateway's own, though conntrack still translates its 4-tuple."""
    lab.respond((ALIAS[version].format(0), 10, 8080), (ENDPOINT[version], 1, 443))
    source = (CLIENT[version], 40000)
    reset_by_daemon(lab, Extension(5, 0), source, version)
    assert lab.ask(None, 443, version=version, source=source).startswith(f"{ENDPOINT[version]} 443 ")


@pytest.mark.parametrize(
    "rule",
    [
        "hook prerouting priority mangle; policy accept; meta mark set ct mark",
        "hook prerouting priority -140; policy accept; meta mark set meta mark & 0x000000ff",
    ],
)
def test_a_decision_that_another_tool_wipes_out_is_dropped(lab: Gateway, rule: str) -> None:
    """`iptables -t mangle -A PREROUTING -j CONNMARK --restore-mark`, of every multi-WAN setup, sets the whole mark."""
    lab.respond(("10.64.0.0", 10, 8080), (ENDPOINT4, 1, 443))
    hook, _, action = rule.partition("policy accept; ")
    lab.host.sh(
        f"nft 'add table ip other; add chain ip other c {{ type filter {hook} }}; add rule ip other c {action}'"
        " && iptables-nft -t mangle -I PREROUTING -j CONNMARK --restore-mark"
    )
    lab.expected_warnings = [
        "packets were dropped since their target was missing in the kernel's maps; workers load their targets again"
    ]
    with lab.socket(Extension(5, 0)) as connection:
        connection.settimeout(1.5)
        try:
            connection.connect((ENDPOINT4, 443))
        except TimeoutError:
            return
        assert connection.recv(256).split()[0] == b"10.64.0.4"


def test_another_tools_marks_are_no_decision(lab: Gateway) -> None:
    """0x1000 is the mark of the first target id. Set by another tool, it must move no connection anywhere."""
    lab.respond(("10.64.0.0", 10, 8080), (ENDPOINT4, 1, 443), ("198.51.100.254", 1, 80))
    assert lab.ask(Extension(1, 0), 443).startswith("10.64.0.0 ")
    lab.host.sh(
        "nft 'add table ip other; add chain ip other c { type filter hook prerouting priority raw; };"
        " add rule ip other c meta mark set 0x1000'"
    )
    assert lab.ask(None, 443).startswith(f"{ENDPOINT4} 443 ")
    with lab.client.entered():
        connection = socket.create_connection(("198.51.100.254", 80), timeout=15)
    with connection:
        assert connection.recv(256).startswith(b"198.51.100.254 80 ")


def test_a_flushed_ruleset_is_back_at_once(lab: Gateway) -> None:
    lab.allow_unasked = True
    lab.respond(("10.64.0.0", 100, 8080), (ENDPOINT4, 1, 443))
    answers: Counter[str] = Counter()
    own_socket: list[tuple[float, float]] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            began = time.monotonic()
            with lab.socket(Extension(5, 0)) as connection:
                connection.settimeout(1)
                try:
                    connection.connect((ENDPOINT4, 443))
                    name = connection.recv(256).split(b" ")[0].decode()
                    answers[name] += 1
                    if name == ENDPOINT4:
                        own_socket.append((began, time.monotonic()))
                except OSError as error:
                    answers[type(error).__name__] += 1

    def many_are_answered() -> None:
        enough = answers["10.64.0.4"] + 100
        lab.wait(lambda: answers["10.64.0.4"] > enough, "the daemon answers")

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    without_rules = []
    try:
        for _ in range(8):
            many_are_answered()
            back = lab.count_events(ARE_BACK)
            flushed = time.monotonic()
            lab.host.sh("nft flush ruleset")
            lab.wait(lambda: lab.count_events(ARE_BACK) > back, "the rules are back")  # noqa: B023
            without_rules.append((flushed, time.monotonic()))
            if without_rules[-1][1] < flushed + 0.5:
                break  # this machine may be slow once, and not every time
        many_are_answered()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        # A worker may meet the table while it is not there, or is there without the worker's targets.
        lab.expected_warnings = [event["event"] for event in lab.events() if event["level"] in ("warning", "error")]
    # Nobody can hold a packet without rules. But they are back as soon as the kernel has told the daemon.
    assert without_rules[-1][1] < without_rules[-1][0] + 0.5, without_rules
    for began, answered in own_socket:
        assert any(began < back and flushed < answered for flushed, back in without_rules), (began, without_rules)


@pytest.mark.parametrize("command", ["flush table inet steerd", "flush chain inet steerd divert"])
def test_rules_that_somebody_flushed_come_back(lab: Gateway, command: str) -> None:
    """The table is still there, but empty: every SYN goes to the gateway's own socket, every alias stands open."""
    lab.respond(("10.64.0.0", 10, 8080), (ENDPOINT4, 1, 443))
    lab.host.sh(f"nft {command}")
    lab.wait(lambda: lab.count_events(ARE_BACK), "the rules are back")
    lab.expected_warnings = [event["event"] for event in lab.events() if event["level"] == "warning"]
    assert lab.ask(Extension(5, 0), 443).startswith("10.64.0.4 ")


def test_the_fall_backs_rules_come_back(lab: Gateway) -> None:
    """Without them nothing is let through (chain queue4), but it must not stay so."""
    if "xt_NFQUEUE" not in lab.log.read_text():
        lab.host.sh("nft list table inet steerd | grep -q 'queue'")  # this kernel needs no fall-back
        return
    lab.allow_unasked = True
    lab.respond(("10.64.0.0", 10, 8080))
    lab.host.sh("nft flush chain inet steerd worker0")
    lab.wait(lambda: lab.count_events(ARE_BACK), "the rules are back")
    lab.expected_warnings = [event["event"] for event in lab.events() if event["level"] == "warning"]
    assert lab.ask(Extension(5, 0), 443).startswith("10.64.0.4 ")


def test_a_spoofed_syn_that_is_refused_cuts_no_live_connection(lab: Gateway) -> None:
    """`reject with tcp reset` sets the packet's conntrack entry to CLOSE (nf_ct_set_closing), whatever its state. One
    spoofed SYN, with the right port and any sequence number, and the connection is gone two seconds later."""
    lab.allow_unasked = True
    lab.respond(("10.64.0.0", 10, 8080))
    with lab.socket(Extension(5, 0), source=(CLIENT4, 40500)) as connection:
        connection.connect((ENDPOINT4, 443))
        assert connection.recv(256).startswith(b"10.64.0.4 ")
        send_syn(lab, 40500, extension=60000)
        time.sleep(3.5)
        connection.send(b"still there?")
        assert connection.recv(256) == b"still there?"


def test_a_syn_with_a_wrong_checksum_does_not_make_workers_load_again(lab: Gateway) -> None:
    """Conntrack calls it invalid, so it is never translated. That is no missing map element, and nobody's mistake."""
    lab.allow_unasked = True
    for port in range(3):
        send_syn(lab, 40600 + port, extension=7, valid_checksum=False)
        time.sleep(1.2)
    warnings = [event["event"] for event in lab.events() if event["level"] == "warning"]
    lab.expected_warnings = warnings
    assert warnings == []


def test_an_ipv6_client_that_vanished_and_asks_for_another_target_gets_there(lab: Gateway) -> None:
    """Early demux looks at the first next-header only, so a SYN with a destination options header has no socket."""
    lab.allow_unasked = True
    lab.respond(("fd00:64::", 100, 8080))
    source = (CLIENT6, 41000)
    vanishing = lab.socket(Extension(5, 0), version=6, source=source)
    vanishing.connect((ENDPOINT6, 443))
    assert vanishing.recv(256).startswith(b"fd00:64::4 ")
    vanish(vanishing)
    assert lab.ask(Extension(6, 0), 443, version=6, source=source).startswith("fd00:64::5 ")


def test_a_client_that_vanished_gets_there_without_early_demux(lab: Gateway) -> None:
    lab.allow_unasked = True
    lab.respond(("10.64.0.0", 100, 8080))
    lab.host.sh("sysctl -qw net.ipv4.tcp_early_demux=0")
    source = (CLIENT4, 41000)
    vanishing = lab.socket(Extension(5, 0), source=source)
    vanishing.connect((ENDPOINT4, 443))
    assert vanishing.recv(256).startswith(b"10.64.0.4 ")
    vanish(vanishing)
    assert lab.ask(Extension(6, 0), 443, source=source).startswith("10.64.0.5 ")


def test_a_client_that_vanished_from_the_gateways_own_socket_is_steered(lab: Gateway) -> None:
    """It was passed at first, then asks with an extension: conntrack holds the 4-tuple without a translation."""
    lab.allow_unasked = True
    lab.respond(("10.64.0.0", 100, 8080), (ENDPOINT4, 1, 443))
    source = (CLIENT4, 41100)
    vanishing = lab.socket(None, source=source)
    vanishing.connect((ENDPOINT4, 443))
    assert vanishing.recv(256).startswith(ENDPOINT4.encode())
    vanish(vanishing)
    try:
        assert lab.ask(Extension(5, 0), 443, source=source).startswith("10.64.0.4 ")
    finally:
        lab.expected_warnings = [event["event"] for event in lab.events() if event["level"] == "warning"]


def test_an_alias_may_open_connections_of_its_own(lab: Gateway) -> None:
    """Answers to a connection that a daemon opened from its alias are no way in."""
    lab.allow_unasked = True
    lab.client.sh("ip route add 10.64.0.0/24 via 198.51.100.254")
    with lab.client.entered(), socket.create_server((CLIENT4, 7777)) as server:
        with lab.host.entered():
            connection = socket.create_connection((CLIENT4, 7777), timeout=15, source_address=("10.64.0.4", 0))
        connection.close()
        server.settimeout(15)
        accepted, peer = server.accept()
        accepted.close()
        assert peer[0] == "10.64.0.4"


def test_a_decided_syn_never_leaves_the_gateway_for_an_alias_that_is_gone(lab: Gateway) -> None:
    """On a router, an alias that somebody removed is an address like any other: of somebody else's machine, perhaps."""
    lab.allow_unasked = True
    lab.respond(("10.64.0.0", 10, 8080))
    lab.host.sh(
        "sysctl -qw net.ipv4.ip_forward=1; ip route add default via 198.51.100.1;"
        " nft 'add table ip spy; add counter ip spy out; add chain ip spy c { type filter hook forward priority 0; };"
        " add rule ip spy c ip daddr 10.64.0.4 counter name out'"
    )
    lab.expected_warnings = ["aliases were removed by somebody; they are back"]
    device = lab.host.sh("ip -o addr show to 10.64.0.4").split()[1]
    done = threading.Event()

    def keep_sending() -> None:
        while not done.is_set():
            send_syn(lab, random.randint(1024, 65535), extension=5)

    sender = threading.Thread(target=keep_sending)
    sender.start()
    try:
        for _ in range(10):
            lab.host.sh(f"ip addr del 10.64.0.4/32 dev {device}")
            lab.wait(lambda: lab.host.sh("ip -o addr show to 10.64.0.4"), "the alias is back")
    finally:
        done.set()
        sender.join()
    assert "packets 0 " in lab.host.sh("nft list counter ip spy out")
