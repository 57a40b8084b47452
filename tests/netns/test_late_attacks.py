"""Attacks on late steering, and accidents that look like them: what must hold for first payloads, whoever sends what.

Topology: tests/netns/gateway.py, and behind the gateway a target on another host:

                      gateway                                   far
    192.0.2.1/24  2001:db8:2::1/64  ---- veth ----  192.0.2.7/24  2001:db8:2::7/64

One gateway serves all tests. Its workers hold few undecided connections, so that a short flood is a flood.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import NamedTuple

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from steerd import model
from steerd.telemetry.counters import Counters, Extra
from steerd.wire import segment
from steerd.wire.packet import ACK, Packet
from tests.netns.conftest import hosts
from tests.netns.gateway import SLOWER, Gateway, gateway
from tests.netns.lab import Host, link
from tests.netns.test_guard import TCP_REPAIR
from tests.netns.test_late import ALIAS, CLIENT, ENDPOINT, POOL, both, line_of, name, request, rest_of

WEB, SILENT, FORGETFUL, PROXIED, EXTERNAL = 80, 81, 82, 83, 84
TIMER = 0.5
FAR = {4: "192.0.2.7", 6: "2001:db8:2::7"}
HELD = 64
FLOOD_RATE = 2000
SPOOFED = {4: "10.128.0.0/9", 6: "2001:db8:a::/48"}
CLOSE_BY_RESET = b"\1\0\0\0\0\0\0\0"
# <linux/tcp.h>
TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 20, 21
RECEIVE_QUEUE, SEND_QUEUE = 1, 2
REPAIR_OFF_WITHOUT_A_PROBE = -1
TOTAL_RETRANS = 100


def to(number: int) -> str:
    """A target: the aliases, one of each family, whose addresses end with this number."""
    return f'["{ALIAS[4].format(number)}:8080", "[{ALIAS[6].format(number)}]:8080"]'


def service(title: str, port: int, more: str, routes: dict[str, str]) -> str:
    """A service at `port` of both endpoints; `routes`: target by host."""
    lines = "".join(
        f'    {{ when = {{ "http.host" = "{host}" }}, target = {target} }},\n' for host, target in routes.items()
    )
    return f"""
[services.{title}]
endpoints = ["{ENDPOINT[4]}:{port}/tcp", "[{ENDPOINT[6]}]:{port}/tcp"]
inspect = ["http"]
{more}
routes = [
{lines}]
"""


OUTSIDE = f"""[
    {{ address = "{FAR[4]}:8080", external = true }},
    {{ address = "[{FAR[6]}]:8080", external = true }},
]"""
CONFIG = (
    f"[gateway.pending]\nconnections = {HELD}\n"
    + POOL
    + service(
        "web", WEB, "",
        {"a.example": to(1), "b.example": to(2), "xa.example": to(2), "c.example": to(3), "d.example": to(4)},
    )
    + service("silent", SILENT, f"first_payload_timeout = {TIMER}\non_silence = {to(5)}", {"a.example": to(1)})
    + service("forgetful", FORGETFUL, f"first_payload_timeout = {TIMER}\non_silence = {to(6)}", {"a.example": to(1)})
    + service(
        "proxied", PROXIED, f'trusted_proxies = ["192.0.2.0/24", "2001:db8:2::/64"]\ndefault = {to(1)}',
        {"b.example": to(2)},
    ).replace('["http"]', '["proxy", "http"]')
    + service("external", EXTERNAL, "", {"far.example": OUTSIDE})
)  # fmt: skip


class Lab(NamedTuple):
    """The gateway, the host behind it, and the workers' counters."""

    gateway: Gateway
    far: Host
    counters: Counters


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with hosts() as new_host, gateway(new_host) as made:
        far = new_host("far")
        link(made.host, "far0", far, "eth0")
        made.host.sh(
            "ip addr add 192.0.2.1/24 dev far0; ip -6 addr add 2001:db8:2::1/64 dev far0 nodad;"
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1;"
            f"ip route add {SPOOFED[4]} via {CLIENT[4]}; ip -6 route add {SPOOFED[6]} via {CLIENT[6]}"
        )
        far.sh(
            f"ip addr add {FAR[4]}/24 dev eth0; ip -6 addr add {FAR[6]}/64 dev eth0 nodad;"
            "ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8:2::1"
        )
        made.client.sh(
            "nft -f - <<'RULES'\n"
            "table inet spoofed { counter heard { }; chain arriving { type filter hook prerouting priority raw;\n"
            f"ip daddr {SPOOFED[4]} counter name heard drop; ip6 daddr {SPOOFED[6]} counter name heard drop; }}; }}\n"
            "RULES"
        )
        made.configure(CONFIG)
        made.start()
        made.respond(*((ALIAS[version].format(n), 1, 8080) for version in (4, 6) for n in (1, 2, 5)))
        yield Lab(made, far, Counters.open(made.directory / "run" / "counters"))


def connect(lab: Lab, version: int, port: int = WEB, source_port: int = 0) -> socket.socket:
    client = lab.gateway.socket(None, version=version, source=(CLIENT[version], source_port))
    client.connect((ENDPOINT[version], port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def listen(host: Host, address: str) -> socket.socket:
    """A daemon of the test's own, on port 8080."""
    with host.entered():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 8080), family=family)
    listener.settimeout(15 * SLOWER)
    return listener


def carried_out(client: socket.socket) -> tuple[str, bytes]:
    """The line of the daemon that answers, and all that it read."""
    line = line_of(client)
    client.shutdown(socket.SHUT_WR)
    return line, rest_of(client)


# ---- segments made by hand ----


@pytest.fixture
def by_hand(lab: Lab) -> Iterator[Lab]:
    """Segments that are made by hand need no timestamps here."""
    lab.gateway.client.sh("sysctl -qw net.ipv4.tcp_timestamps=0")
    yield lab
    lab.gateway.client.sh("sysctl -qw net.ipv4.tcp_timestamps=1")


def next_segment(client: socket.socket, version: int, payload: bytes) -> IP | IPv6:
    """What this client's kernel would send next, if it was told to send `payload`."""
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    numbers = []
    for queue in (SEND_QUEUE, RECEIVE_QUEUE):
        client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers.append(client.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_WITHOUT_A_PROBE)
    (source, sport), (destination, dport) = client.getsockname()[:2], client.getpeername()[:2]
    header = (IP if version == 4 else IPv6)(src=source, dst=destination)
    return header / TCP(sport=sport, dport=dport, flags="PA", seq=numbers[0], ack=numbers[1]) / Raw(payload)


def let_it_think_it_sent(client: socket.socket, payload: bytes) -> None:
    """The client's kernel counts these bytes as sent, and does not send them (unless nobody acknowledges them)."""
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
    client.sendall(payload)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_WITHOUT_A_PROBE)


def raw_socket(lab: Lab, version: int) -> socket.socket:
    with lab.gateway.client.entered():
        return socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)


def send(lab: Lab, version: int, packet: bytes) -> None:
    with raw_socket(lab, version) as raw:
        raw.sendto(packet, (ENDPOINT[version], 0))


def spoofed(version: int, port: int, payload: bytes, count: int) -> list[bytes]:
    """Segments of no handshake, each of a source, a port and numbers of chance: with `payload`, or bare ACKs."""
    chosen = random.Random(version)
    packets = []
    for _ in range(count):
        if version == 4:
            source = bytes((10, chosen.randrange(128, 256), chosen.randrange(256), chosen.randrange(1, 255)))
        else:
            source = bytes.fromhex("20010db8000a") + chosen.randbytes(10)
        first = Packet(
            version, source, ip_address(ENDPOINT[version]).packed, model.TCP, chosen.randrange(1024, 65536), port, ACK,
            chosen.getrandbits(32), chosen.getrandbits(32), b"", b"", b"", b"", 64240,
        )  # fmt: skip
        if payload:
            packets += segment.data(first, payload, fin=False, size=len(payload))
        else:
            packets.append(segment.bare_ack(first))
    return packets


@contextlib.contextmanager
def flood(lab: Lab, version: int, packets: list[bytes]) -> Iterator[None]:
    """FLOOD_RATE of these packets a second until the block ends; it begins when workers have seen many of them."""
    stop = threading.Event()
    raw = raw_socket(lab, version)

    def keep_sending() -> None:
        started = time.monotonic()
        for number, packet in enumerate(itertools.cycle(packets)):
            raw.sendto(packet, (ENDPOINT[version], 0))
            if number % 20 == 0 and stop.wait(max(0.0, started + number / FLOOD_RATE - time.monotonic())):
                return

    before = lab.gateway.counters()["diverted"]
    sender = threading.Thread(target=keep_sending)
    sender.start()
    try:
        lab.gateway.wait(lambda: lab.gateway.counters()["diverted"] > before + FLOOD_RATE, "the flood is on")
        yield
    finally:
        stop.set()
        sender.join()
        raw.close()


def heard(lab: Lab) -> int:
    """Packets that reached those whose addresses were used."""
    listed = json.loads(lab.gateway.client.sh("nft -j list counter inet spoofed heard"))["nftables"]
    return sum(int(each["counter"]["packets"]) for each in listed if "counter" in each)


# ---- damage on the way ----


@both
def test_a_segment_with_a_wrong_checksum_decides_nothing(by_hand: Lab, version: int) -> None:
    with connect(by_hand, version) as client:
        damaged = bytearray(bytes(next_segment(client, version, request("a.example"))))
        damaged[damaged.index(b"a.example")] = ord("b")
        send(by_hand, version, bytes(damaged))
        time.sleep(0.1)
        client.sendall(request("a.example"))
        line, read = carried_out(client)
        assert line.startswith(name(version, 1))
        assert read == request("a.example")


@both
def test_a_second_segment_with_a_wrong_checksum_decides_nothing(by_hand: Lab, version: int) -> None:
    start, end = b"GET / HTTP/1.1\r\nHost: ", b"a.example\r\n\r\n"
    with connect(by_hand, version) as client:
        client.sendall(start)
        damaged = bytearray(bytes(next_segment(client, version, end)))
        damaged[damaged.index(end)] = ord("b")
        send(by_hand, version, bytes(damaged))
        time.sleep(0.1)
        client.sendall(end)
        line, read = carried_out(client)
        assert line.startswith(name(version, 1))
        assert read == start + end


# ---- other tools' marks ----


def mark_of(lab: Lab, version: int, index: int) -> int:
    """The mark that stands for an alias as target; it must have been used."""
    listed = json.loads(lab.gateway.host.sh(f"nft -j list map inet steerd targets{version}"))["nftables"]
    (elements,) = (each["map"]["elem"] for each in listed if "map" in each)
    (mark,) = (mark for mark, target in elements if target["concat"] == [ALIAS[version].format(index), 8080])
    assert isinstance(mark, int)
    return mark


@pytest.mark.parametrize(
    "rules",
    [
        "chain arriving { type filter hook prerouting priority raw; meta mark set MARK; }",
        "chain arriving { type filter hook prerouting priority mangle; meta mark set ct mark; };"
        "chain leaving { type filter hook output priority mangle + 1; ct mark set MARK; }",
    ],
    ids=["set", "restored"],
)
@both
def test_another_tools_mark_is_no_decision(lab: Lab, version: int, rules: str) -> None:
    """Neither for a first payload nor for a bare ACK, which no worker would have seen."""
    with connect(lab, version) as client:
        client.sendall(request("a.example"))
        assert carried_out(client)[0].startswith(name(version, 1))
    rules = rules.replace("MARK", str(mark_of(lab, version, 1)))
    lab.gateway.host.sh(f"nft 'table inet other {{ {rules}; }}'")
    try:
        with connect(lab, version) as client:
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(100)
            client.settimeout(15 * SLOWER)
            client.sendall(request("b.example"))
            line, read = carried_out(client)
            assert line.startswith(name(version, 2))
            assert read == request("b.example")
    finally:
        lab.gateway.host.sh("nft delete table inet other")


# ---- a lost reset ----


def test_a_request_whose_reset_is_lost_is_carried_out_once(lab: Lab) -> None:
    """The daemon reads it and resets. Two seconds later conntrack has forgotten that; the client has not."""
    with contextlib.ExitStack() as stack:
        daemons = [stack.enter_context(listen(lab.gateway.host, ALIAS[version].format(3))) for version in (4, 6)]
        clients = [stack.enter_context(connect(lab, version)) for version in (4, 6)]
        lab.gateway.client.sh(
            "nft 'table inet loss { chain arriving { type filter hook prerouting priority raw;"
            f" ip saddr {ENDPOINT[4]} drop; ip6 saddr {ENDPOINT[6]} drop; }}; }}'"
        )
        stack.callback(lab.gateway.client.sh, "nft delete table inet loss")
        for client, daemon in zip(clients, daemons, strict=True):
            client.sendall(request("c.example"))
            connection, _ = daemon.accept()
            with connection:
                assert connection.recv(4096) == request("c.example")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_BY_RESET)
        # The clients repeat themselves 0.2, 0.4, 0.8, 1.7, 3.3 and 6.8 s after the beginning.
        assert select.select(daemons, [], [], 8)[0] == []


# ---- PROXY headers of anybody ----

HTTP = request("x.example")
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
ADDRESSES = bytes([6, 6, 6, 6, 203, 0, 113, 10]) + struct.pack("!HH", 666, 80)


def version_2(command: int, family: int, block: bytes) -> bytes:
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(block)) + block


CLAIMS = {
    "v1": b"PROXY TCP4 6.6.6.6 203.0.113.10 666 80\r\n",
    "v1-unknown": b"PROXY UNKNOWN\r\n",
    "v1-port-with-leading-zero": b"PROXY TCP4 6.6.6.6 203.0.113.10 0666 80\r\n",
    "v1-bare-lf": b"PROXY TCP4 6.6.6.6 203.0.113.10 666 80\n",
    "v1-two-spaces": b"PROXY TCP4  6.6.6.6 203.0.113.10 666 80\r\n",
    "v1-address-with-leading-zero": b"PROXY TCP4 06.6.6.6 203.0.113.10 666 80\r\n",
    "v1-family-of-the-other": b"PROXY TCP6 6.6.6.6 203.0.113.10 666 80\r\n",
    "v1-space-at-the-end": b"PROXY TCP4 6.6.6.6 203.0.113.10 666 80 \r\n",
    "v1-small-letters": b"PROXY tcp4 6.6.6.6 203.0.113.10 666 80\r\n",
    "v1-too-long": b"PROXY UNKNOWN " + b"x" * 200 + b"\r\n",
    "v2": version_2(0x21, 0x11, ADDRESSES),
    "v2-local": version_2(0x20, 0x00, b""),
    "v2-half-a-tlv": version_2(0x21, 0x11, ADDRESSES + b"\x04\x00"),
    "v2-tlv-too-long": version_2(0x21, 0x11, ADDRESSES + b"\x04\x00\x09x"),
    "v2-authority-twice": version_2(0x21, 0x11, ADDRESSES + b"\x02\0\1a\x02\0\1b"),
    "v2-wrong-checksum": version_2(0x21, 0x11, ADDRESSES + b"\x03\0\4abcd"),
    "v2-longer-than-is-read": version_2(0x21, 0x11, ADDRESSES + b"\x04" + struct.pack("!H", 8190) + bytes(8190)),
    "v2-unknown-command": version_2(0x22, 0x11, ADDRESSES),
    "v2-unknown-version": version_2(0x31, 0x11, ADDRESSES),
    "v2-unknown-family": version_2(0x21, 0x41, ADDRESSES),
    "v2-addresses-too-short": version_2(0x21, 0x11, ADDRESSES[:4]),
}


@both
@pytest.mark.parametrize("cut", [0, 3], ids=["whole", "cut"])
def test_whatever_begins_like_a_proxy_header_is_refused_to_strangers(lab: Lab, version: int, cut: int) -> None:
    """Malformed or not: the default's daemon, which speaks PROXY, may be more tolerant than steerd, and believe it."""
    answered = {}
    for form, claim in CLAIMS.items():
        with connect(lab, version, PROXIED) as client:
            if cut:
                client.sendall(claim[:cut])
                time.sleep(0.01)
            client.sendall((claim + HTTP)[cut:])
            with contextlib.suppress(ConnectionResetError):
                answered[form] = client.recv(100)
    assert answered == {}


@both
@pytest.mark.parametrize("method", [b"PROPFIND", b"PROXY-ME"])
def test_what_only_begins_like_the_word_proxy_is_no_proxy_header(lab: Lab, version: int, method: bytes) -> None:
    with connect(lab, version, PROXIED) as client:
        client.sendall(HTTP.replace(b"GET", method))
        assert line_of(client).startswith(name(version, 1))


# ---- urgent bytes ----


@both
@pytest.mark.parametrize("cut", [0, 30], ids=["one-segment", "two-segments"])
def test_an_urgent_byte_is_inspected_and_read_alike(by_hand: Lab, version: int, cut: int) -> None:
    """Linux takes it out of what a daemon reads, unless the daemon asks for it inline: this request would have been
    routed as xa.example, and read as a.example."""
    data = request("xa.example")
    with connect(by_hand, version) as client:
        first = next_segment(client, version, data[:cut] or data)
        first[TCP].flags = "PAU"
        first[TCP].urgptr = data.index(b"a.example")  # RFC 6093 section 2.1: one behind the urgent byte
        let_it_think_it_sent(client, first[Raw].load)
        send(by_hand, version, bytes(first))
        if cut:
            client.sendall(data[cut:])
        try:
            line, read = carried_out(client)
        except ConnectionResetError:
            return  # refused is as good
        assert line.startswith(name(version, 2))
        assert read == data


# ---- floods of segments of no handshake ----


def counted(lab: Lab, *words: Extra) -> int:
    return sum(lab.counters.total(word) for word in words)


@both
def test_spoofed_acks_do_not_starve_silent_clients(lab: Lab, version: int) -> None:
    """A silent client repeats nothing: whoever is pushed out is never served."""
    words = (Extra.EVICTED_SOURCE, Extra.EVICTED_TOTAL, Extra.FULL_SOURCE, Extra.FULL_TOTAL)
    before = counted(lab, *words), heard(lab)
    with flood(lab, version, spoofed(version, SILENT, b"", 3 * FLOOD_RATE)), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(lab, version, SILENT)) for _ in range(6)]
        for client in clients:
            assert line_of(client).startswith(name(version, 5))
    assert (counted(lab, *words), heard(lab)) == before, "nobody was held, and nobody was told anything"


@both
def test_spoofed_segments_draw_no_answer_and_take_no_room(lab: Lab, version: int) -> None:
    """However often they are repeated. Else they would be acknowledged to a stranger, and never be pushed out."""
    words = (Extra.ACKNOWLEDGED, Extra.FULL_SOURCE, Extra.FULL_TOTAL)
    before = counted(lab, *words), heard(lab)
    thrice = [packet for packet in spoofed(version, WEB, b"G", FLOOD_RATE) for _ in range(3)]
    long_request = request("a.example")[:-2] + b"X-Long: " + b"y" * 3000 + b"\r\n\r\n"
    with flood(lab, version, thrice):
        for _ in range(3):
            with connect(lab, version) as client:
                client.sendall(long_request)
                line, read = carried_out(client)
                assert line.startswith(name(version, 1))
                assert read == long_request
    assert (counted(lab, *words), heard(lab)) == before


def test_spoofed_requests_draw_no_answer(lab: Lab) -> None:
    """Repeated for as long as a client would that nobody answers: its third attempt is one too many."""
    before = heard(lab)
    packets = [
        (version, spoofed(version, WEB, request(f"{host}.example"), 1)[0]) for version in (4, 6) for host in "ax"
    ]
    for _ in range(4):
        for version, packet in packets:
            send(lab, version, packet)
        time.sleep(1.1)  # longer than steerd.core.pending.Limits.settle_seconds
    assert heard(lab) == before


# ---- a port used again at once ----


@both
def test_a_port_that_is_used_again_at_once_reaches_the_right_daemon(lab: Lab, version: int) -> None:
    """The daemon said much and closed first. So the client's new numbers lie within the window of the old entry."""
    old, new = (listen(lab.gateway.host, ALIAS[version].format(n)) for n in (3, 4))
    repeated = []
    with old, new:
        for source_port in (22001, 22002, 22003, 22004, 22005):
            with connect(lab, version, WEB, source_port) as client:
                client.sendall(request("c.example"))
                connection, _ = old.accept()
                with connection:
                    assert connection.recv(4096) == request("c.example")
                    connection.sendall(bytes(60_000))
                assert len(rest_of(client)) == 60_000
            with connect(lab, version, WEB, source_port) as client:
                client.sendall(request("d.example"))
                connection, _ = new.accept()
                with connection:
                    assert connection.recv(4096) == request("d.example")
                repeated.append(retransmitted(client))
    # The old entry is found with the first one and gone with the next, within a second; unless this machine is slow.
    assert min(repeated) <= 2, repeated


# ---- silence ----


@both
def test_a_silent_client_waits_for_its_timer_and_no_longer(lab: Lab, version: int) -> None:
    waited: list[float] = []

    def waits_no_longer() -> bool:
        started = time.monotonic()
        with connect(lab, version, SILENT) as client:
            assert line_of(client).startswith(name(version, 5))
        waited.append(time.monotonic() - started)
        return TIMER <= waited[-1] < TIMER + 0.6 * SLOWER

    # Not each time where this machine is slow; where something else is waited for, never.
    assert any(waits_no_longer() for _ in range(20)), waited


@both
def test_a_silent_client_that_resets_is_forgotten(lab: Lab, version: int) -> None:
    """Its daemon hears nothing of it, not even a SYN."""
    family = "ip" if version == 4 else "ip6"
    lab.gateway.host.sh(
        "nft 'table inet watch { counter opened { }; chain arriving { type filter hook input priority 0;"
        f" {family} daddr {ALIAS[version].format(6)} counter name opened; }}; }}'"
    )
    try:
        while True:
            lab.gateway.host.sh("nft reset counter inet watch opened")
            started = time.monotonic()
            with connect(lab, version, FORGETFUL) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_BY_RESET)
            was_quick = time.monotonic() - started < TIMER / 2
            time.sleep(2 * TIMER)
            if was_quick:  # else its timer may have run out before it could reset
                break
        assert "packets 0 " in lab.gateway.host.sh("nft list counter inet watch opened")
    finally:
        lab.gateway.host.sh("nft delete table inet watch")


@both
def test_a_silent_client_that_resets_may_use_its_port_again(lab: Lab, version: int) -> None:
    with connect(lab, version, SILENT, 25000) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_BY_RESET)
    with connect(lab, version, SILENT, 25000) as client:
        client.sendall(request("a.example"))
        assert line_of(client).startswith(name(version, 1))
        time.sleep(2 * TIMER)  # until the old connection's timer has run out, too
        client.sendall(b"and more")
        client.shutdown(socket.SHUT_WR)
        assert rest_of(client) == request("a.example") + b"and more"


# ---- a daemon on another host ----


def retransmitted(client: socket.socket) -> int:
    """Segments that this socket's kernel had to send again."""
    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TOTAL_RETRANS + 4)
    return int(struct.unpack_from("=I", info, TOTAL_RETRANS)[0])


@pytest.fixture
def distant(lab: Lab) -> Callable[[int], socket.socket]:
    """Daemons on the far host, whose SYN-ACKs take a millisecond and more."""
    delay = lab.gateway.spawn(lab.far, sys.executable, "-m", "tests.netns.reorder", "1")
    assert delay.stdout is not None and delay.stdout.readline() == "bound\n"
    for iptables in ("iptables-nft", "ip6tables-nft"):
        lab.far.sh(f"{iptables} -A OUTPUT -p tcp --tcp-flags SYN,ACK SYN,ACK -j NFQUEUE --queue-num 1")
    return lambda version: listen(lab.far, FAR[version])


def test_a_distant_daemon_gets_the_first_payload_at_its_first_sight(
    lab: Lab, distant: Callable[[int], socket.socket]
) -> None:
    """Its SYN-ACK is still under way when the worker has its copy ready."""
    for version in (4, 6):
        repeated = []
        with distant(version) as daemon:
            for _ in range(5):
                with connect(lab, version, EXTERNAL) as client:
                    client.sendall(request("far.example"))
                    connection, _ = daemon.accept()
                    with connection:
                        assert connection.recv(4096) == request("far.example")
                    assert rest_of(client) == b""
                    repeated.append(retransmitted(client))
        assert sorted(repeated)[2] == 0, repeated
