"""Late steering: an ordinary connection goes where its first payload says, and the daemon sees the client itself.

Topology: tests/netns/gateway.py (one client, one gateway, endpoints 203.0.113.10 and 2001:db8::10).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steerd.model import Extension
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, Gateway, gateway
from tests.netns.lab import Host

POOL = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
"""
SERVICE = """
[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["port-extension", "tls", "http"]
routes = [
    { when = { "http.host" = "a.example" }, target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] },
    { when = { "http.host" = "b.example" }, target = ["10.64.0.2:8080", "[fd00:64::2]:8080"] },
    { when = { "http.host" = "down.example" }, target = ["10.64.0.9:8080", "[fd00:64::9]:8080"] },
    { when = { "portext.dst" = 3 }, target = ["10.64.0.3:8080", "[fd00:64::3]:8080"] },
]
"""
CLIENT = {4: CLIENT4, 6: CLIENT6}
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
ALIAS = {4: "10.64.0.{}", 6: "fd00:64::{}"}
HELLO = Path(__file__).parents[1] / "vectors" / "tls-openssl-3.0.19-sni-alpn.bin"
both = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        yield made


@pytest.fixture
def late(lab: Gateway) -> Gateway:
    start(lab)
    return lab


def start(lab: Gateway, more: str = "", settings: str = "") -> None:
    """Start with the service above, `more` lines in it, and eight responders."""
    lab.configure(POOL + SERVICE.replace("routes =", more + "\nroutes ="), settings)
    lab.start()
    lab.respond(("10.64.0.1", 8, 8080), ("fd00:64::1", 8, 8080))


def request(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def connect(lab: Gateway, version: int, source: tuple[str, int] | None = None) -> socket.socket:
    client = lab.socket(None, version=version, source=source)
    client.connect((ENDPOINT[version], 80))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def line_of(client: socket.socket) -> str:
    """The daemon's line, without its end."""
    line = b""
    while not line.endswith(b"\n"):
        data = client.recv(1)
        assert data, f"closed after {line!r}"
        line += data
    return line.decode().strip()


def rest_of(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = b""
    while got := client.recv(65536):
        data += got
    return data


def ask(lab: Gateway, host: str, version: int, source: tuple[str, int] | None = None) -> str:
    """Who answers a request, and whom it saw; everything that was said must have come back from it."""
    with connect(lab, version, source) as client:
        client.sendall(request(host))
        line = line_of(client)
        client.shutdown(socket.SHUT_WR)
        assert rest_of(client) == request(host)
        return line


def is_reset(lab: Gateway, host: str, version: int) -> None:
    with connect(lab, version) as client:
        client.sendall(request(host))
        with pytest.raises(ConnectionResetError):
            client.recv(100)


def name(version: int, index: int) -> str:
    return f"{ALIAS[version].format(index)} 8080 {CLIENT[version]} "


@both
def test_the_first_payload_decides_and_the_daemon_sees_the_client(late: Gateway, version: int) -> None:
    for host, index in (("a", 1), ("b", 2)):

        def asked(host: str = f"{host}.example", index: int = index) -> None:
            assert ask(late, host, version).startswith(name(version, index))

        assert late.at_first_sight(asked) == 1, "one upcall for a request of one segment, its FIN not counted"


@both
def test_early_and_late_on_one_endpoint(late: Gateway, version: int) -> None:
    assert late.ask(Extension(3, 0), 80, version=version).startswith(name(version, 3))
    assert ask(late, "a.example", version).startswith(name(version, 1))


@both
def test_a_syn_with_an_option_that_is_none_of_ours_is_steered_late(late: Gateway, version: int) -> None:
    with late.socket(None, version=version) as client:
        if version == 4:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01\x01\x01\x01")
        else:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, b"\0\0\x01\x04\0\0\0\0")
        client.connect((ENDPOINT[version], 80))
        client.sendall(request("a.example"))
        assert line_of(client).startswith(name(version, 1))


@both
@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_slow_client_is_told_that_its_bytes_are_here(late: Gateway, version: int, size: int) -> None:
    data = request("b.example")
    with connect(late, version) as client:
        for at in range(0, len(data), size):
            client.sendall(data[at : at + size])
            time.sleep(0.02)
        assert line_of(client).startswith(name(version, 2))
        client.shutdown(socket.SHUT_WR)
        assert rest_of(client) == data


@both
def test_what_nothing_matches_is_reset_at_once_and_reaches_nobody(late: Gateway, version: int) -> None:
    assert late.at_first_sight(lambda: is_reset(late, "c.example", version)) == 1


@both
def test_a_daemon_that_does_not_listen_resets_at_once(late: Gateway, version: int) -> None:
    assert late.at_first_sight(lambda: is_reset(late, "down.example", version)) == 1


@both
def test_a_daemon_that_has_spoken_can_still_reset(late: Gateway, version: int) -> None:
    with connect(late, version) as client:
        client.sendall(request("a.example"))
        assert line_of(client).startswith(name(version, 1))
        assert client.recv(100) == request("a.example")
        client.sendall(b"reset")
        with pytest.raises(ConnectionResetError):
            client.recv(100)


@both
def test_a_tls_client_that_nobody_is_there_for_gets_an_alert(lab: Gateway, version: int) -> None:
    start(lab, 'unmatched = "tls-alert"')
    with connect(lab, version) as client:
        client.sendall(HELLO.read_bytes())
        assert client.recv(100) == bytes.fromhex("15030300020270")
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    with connect(lab, version) as client:  # no TLS: a reset and no bytes
        client.sendall(request("c.example"))
        with pytest.raises(ConnectionResetError):
            client.recv(100)


@both
def test_silence_has_a_target_of_its_own(lab: Gateway, version: int) -> None:
    """As for a protocol whose server speaks first, at once: not only when it repeats its answer to the SYN."""
    start(lab, 'on_silence = ["10.64.0.5:8080", "[fd00:64::5]:8080"]\nfirst_payload_timeout = 0.3')

    def is_greeted() -> bool:
        """Before the daemon's kernel repeated anything."""
        before = lab.repeated(lab.host)
        with connect(lab, version) as client:
            assert line_of(client).startswith(name(version, 5))
            at_once = lab.repeated(lab.host) == before
            client.sendall(b"and then the client speaks")
            assert client.recv(100) == b"and then the client speaks"
        return at_once

    assert any(is_greeted() for _ in range(8))
    assert ask(lab, "a.example", version).startswith(name(version, 1))


@both
def test_silent_clients_wait_for_a_daemon_whose_backlog_is_full(lab: Gateway, version: int) -> None:
    """They have nothing to repeat, so steerd opens their connections again."""
    start(lab, 'on_silence = ["10.64.0.9:8025", "[fd00:64::9]:8025"]\nfirst_payload_timeout = 0.2')
    with lab.host.entered():
        daemon = socket.create_server(
            ("10.64.0.9" if version == 4 else "fd00:64::9", 8025),
            family=socket.AF_INET if version == 4 else socket.AF_INET6,
            backlog=1,
        )
    with daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(lab, version)) for _ in range(6)]
        lab.wait(lambda: "SYN_SENT" in lab.host.sh("cat /proc/net/nf_conntrack"), "the backlog is full")
        greeted = [stack.enter_context(daemon.accept()[0]) for _ in clients]
        for each in greeted:
            each.sendall(b"220 ready")
        assert [client.recv(100) for client in clients] == [b"220 ready"] * 6


@both
def test_a_first_payload_that_does_not_end_is_given_up_with_a_reset(lab: Gateway, version: int) -> None:
    start(lab, "first_payload_timeout = 0.5")
    with connect(lab, version) as client:
        client.sendall(b"GET / HT")
        with pytest.raises(ConnectionResetError):
            client.recv(100)


@both
def test_a_fin_directly_behind_the_request_costs_nothing(late: Gateway, version: int) -> None:
    for _ in range(20):
        with connect(late, version) as client:
            client.sendall(request("a.example"))
            client.shutdown(socket.SHUT_WR)
            assert line_of(client).startswith(name(version, 1))
            assert rest_of(client) == request("a.example")


@both
def test_a_port_that_is_used_again_at_once_goes_where_the_new_request_says(late: Gateway, version: int) -> None:
    source = (CLIENT[version], 20000)
    for turn in range(40):
        index = turn % 2 + 1
        host = "ab"[turn % 2] + ".example"
        with connect(late, version, source) as client:
            client.sendall(request(host))
            assert line_of(client).startswith(name(version, index))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close resets


@both
def test_a_client_that_vanished_comes_back_from_the_same_port(late: Gateway, version: int) -> None:
    """Its old entry is still there when its new connection is decided for another daemon."""
    source = (CLIENT[version], 20001)
    old = connect(late, version, source)
    old.sendall(request("a.example"))
    assert line_of(old).startswith(name(version, 1))
    family = "ip" if version == 4 else "ip6"
    late.client.sh(
        "nft 'add table inet gone; add chain inet gone out { type filter hook output priority 0; };"
        f" add rule inet gone out {family} daddr {ENDPOINT[version]} tcp flags & (fin|rst) != 0 drop'"
    )
    old.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    old.close()
    late.client.sh("nft delete table inet gone")
    late.allow_unasked = True  # the old daemon may still speak to the old connection
    assert ask(late, "b.example", version, source).startswith(name(version, 2))
    assert late.counters()["vanished"] >= 1


def worker_pids(lab: Gateway) -> list[int]:
    return [event["pid"] for event in lab.events() if event["event"] == "worker bound"]


@both
def test_a_request_that_was_repeated_while_the_worker_was_slow_is_carried_out_once(late: Gateway, version: int) -> None:
    pids = worker_pids(late)
    clients = [connect(late, version) for _ in range(10)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for client in clients:
        client.sendall(request("a.example"))
        client.shutdown(socket.SHUT_WR)
    time.sleep(2.5)  # several retransmissions, and their FINs, wait in the queues
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    for client in clients:
        assert line_of(client).startswith(name(version, 1))
        assert rest_of(client) == request("a.example")
        client.close()
    time.sleep(1.0)  # a ghost would be opened from what is still under way
    listed = late.host.sh("conntrack -L -p tcp --orig-port-dst 80 2>/dev/null | wc -l").strip()
    assert int(listed) <= len(clients)
    assert late.counters()["unbound"] == 0


@both
def test_a_worker_that_is_killed_costs_undecided_connections_at_most(lab: Gateway, version: int) -> None:
    start(lab, "first_payload_timeout = 250")  # workers may take long to be back
    lab.expected_warnings.append("worker died")
    with connect(lab, version) as decided, connect(lab, version) as undecided:
        decided.sendall(request("a.example"))
        assert line_of(decided).startswith(name(version, 1))
        bound = lab.count_events("worker bound")
        # Stopped first: what a worker has acknowledged to a client that repeats itself goes with the worker.
        for pid in worker_pids(lab):
            os.kill(pid, signal.SIGSTOP)
        undecided.sendall(request("b.example")[:10])
        for pid in worker_pids(lab):
            os.kill(pid, signal.SIGKILL)
        lab.wait(lambda: lab.count_events("worker bound") == bound + 2, "the workers are back")
        decided.sendall(b"x")
        assert decided.recv(100)
        undecided.sendall(request("b.example")[10:])
        assert line_of(undecided).startswith(name(version, 2)), "what was not acknowledged comes again"


def test_spoofed_first_payloads_open_nothing_and_draw_no_answer(late: Gateway) -> None:
    """Data segments of no handshake: the cookie is wrong, so neither a daemon nor the spoofed source hears of it."""
    late.client.sh(
        "cat > /dev/null; python3 - <<'EOF'\n"
        "import socket, struct\n"
        "raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)\n"
        "payload = b'GET / HTTP/1.1\\r\\nHost: a.example\\r\\n\\r\\n'\n"
        "other = b'GET / HTTP/1.1\\r\\nHost: c.example\\r\\n\\r\\n'\n"
        "dst = socket.inet_aton('203.0.113.10')\n"
        "for n in range(200):\n"
        "    body = payload if n % 2 else other\n"
        "    src = socket.inet_aton('198.51.100.%d' % (2 + n % 8))\n"
        "    tcp = struct.pack('!HHIIBBHHH', 30000 + n, 80, 1000 + n, 77, 0x50, 0x18, 1000, 0, 0)\n"
        "    pseudo = src + dst + struct.pack('!HH', 6, 20 + len(body))\n"
        "    total = int.from_bytes(pseudo + tcp + body + b'\\0' * (len(body) % 2), 'big') % 65535\n"
        "    tcp = tcp[:16] + struct.pack('!H', 65535 - total) + tcp[18:]\n"
        "    ip = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 40 + len(body), 0, 0, 64, 6, 0, src, dst)\n"
        "    raw.sendto(ip + tcp + body, ('203.0.113.10', 0))\n"
        "EOF"
    )
    late.wait(lambda: late.counters()["diverted"] == 200, "all of them were looked at")
    time.sleep(0.5)
    assert late.host.sh("conntrack -L -p tcp --orig-port-dst 80 2>/dev/null") == ""
