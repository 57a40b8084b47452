"""The guard fails closed: nothing reaches a daemon, or the gateway itself, but by a decision that was carried out.

Topology: tests/netns/gateway.py. "Under load" means: while other connections come in and must stay right.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from steerd.model import Extension
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host

CONFIG = """
[gateway.limits]
source_rate = 100000
source_burst = 100000
stranger_rate = 100000
stranger_burst = 100000

[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]

[services.main]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
unextended = "pass"
extension_pool = { pool = "tenants", by = "extension", port = 8080 }

[services.other]
endpoints = ["203.0.113.10:444/tcp", "[2001:db8::10]:444/tcp"]
inspect = ["port-extension"]
unextended = "pass"
extension_pool = { pool = "tenants", by = "extension", port = 9090 }
"""
ALIAS = {4: "10.64.0.{}", 6: "fd00:64::{:x}"}
TCP_REPAIR = 19


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(CONFIG)
        made.start()
        yield made


@contextmanager
def load(lab: Gateway, version: int) -> Iterator[None]:
    """Connections to the daemons 1 to 100 all the while; each must be right, and none may fail."""
    command = [sys.executable, "-m", "tests.netns.load", str(version), "443", ALIAS[version].format(0), "1", "100"]
    process = subprocess.Popen(
        lab.client.command(*command, "2000", "1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    try:
        yield
    finally:
        output, _ = process.communicate(timeout=120)
    assert output.splitlines()[-1] == "2000 0 0", output


def refused_at_once(lab: Gateway, act: Callable[[], object], *named: str) -> int:
    """By an answer to the first SYN. Returns how far counters have risen by it (Gateway.at_first_sight)."""

    def is_refused() -> None:
        with pytest.raises(ConnectionRefusedError):
            act()

    return lab.at_first_sight(is_refused, *named)


@pytest.mark.parametrize("version", [4, 6])
def test_no_alias_is_reached_from_outside_but_by_a_decision(lab: Gateway, version: int) -> None:
    lab.respond((ALIAS[version].format(0), 100, 8080))
    before = lab.counters()["direct"]
    with load(lab, version):
        for index in (0, 5, 99):
            with lab.socket(None, version=version) as connection:
                connection.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    connection.connect((ALIAS[version].format(index), 8080))
        # Neither does a packet that conntrack was told to ignore.
        lab.host.sh(
            "nft 'table inet untracked { chain everything { type filter hook prerouting priority raw; "
            f"{'ip' if version == 4 else 'ip6'} daddr {ALIAS[version].format(7)} notrack; }}; }}'"
        )
        with lab.socket(None, version=version) as connection:
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.connect((ALIAS[version].format(7), 8080))
    assert lab.counters()["direct"] >= before + 4


@pytest.mark.parametrize("version", [4, 6])
def test_a_decision_whose_target_is_missing_in_the_map_is_dropped_and_mended(lab: Gateway, version: int) -> None:
    """The gateway's own socket on the endpoint's port must not get the connection; and the daemon repairs the map."""
    lab.respond((ALIAS[version].format(0), 200, 8080), (ENDPOINT4 if version == 4 else ENDPOINT6, 1, 443))

    def daemon_asked() -> str:
        # Always the same source port, hence always the same worker: it believes the element to be there.
        source = (CLIENT4 if version == 4 else CLIENT6, 42000)
        return lab.ask(Extension(150, 0), 443, version=version, source=source, linger=False).split()[0]

    assert daemon_asked() == ALIAS[version].format(149)
    with load(lab, version):
        listed = lab.host.sh(f"nft list map inet steerd targets{version}")
        found = re.search(rf"(0x[0-9a-f]+) : ({ALIAS[version].format(149)} \. 8080)", listed)
        assert found
        lab.host.sh(f"nft delete element inet steerd targets{version} '{{ {found[1]} : {found[2]} }}'")
        before = lab.counters()["untranslated"]
        # The first SYN is dropped; the daemon sees that, workers load again, and a repeated SYN gets through.
        assert daemon_asked() == ALIAS[version].format(149)
        assert lab.counters()["untranslated"] > before
    lab.expected_warnings = [
        "packets were dropped since their target was missing in the kernel's maps; workers load their targets again"
    ]
    assert lab.count_events(lab.expected_warnings[0]) >= 1


def test_a_decided_packet_that_conntrack_ignores_is_dropped(lab: Gateway) -> None:
    lab.respond((ENDPOINT4, 1, 443), ("10.64.0.0", 10, 8080))
    lab.host.sh(
        "nft 'table inet untracked { chain c { type filter hook prerouting priority raw; tcp dport 443 notrack; }; }'"
    )
    with lab.socket(Extension(5, 0)) as connection:
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.connect((ENDPOINT4, 443))
    assert lab.counters()["stale"] >= 1
    lab.expected_warnings = [
        "packets were dropped since their target was missing in the kernel's maps; workers load their targets again"
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_a_wildcard_listener_never_answers_for_a_daemon_that_is_down(lab: Gateway, version: int) -> None:
    lab.respond((ALIAS[version].format(0), 100, 8080))
    anybody = "0.0.0.0" if version == 4 else "::"
    lab.spawn(lab.host, sys.executable, "-c", _WILDCARD_LISTENER, anybody, "9090")
    lab.wait(lambda: lab.host.sh("ss -Hltn sport = 9090"), "the wildcard listener is up")
    with load(lab, version):
        for extension in (150, 200, 256):

            def ask(extension: int = extension) -> None:
                lab.ask(Extension(extension, 0), 444, version=version)

            assert refused_at_once(lab, ask, "wildcard") == 1


_WILDCARD_LISTENER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family)
while True:
    connection, peer = listener.accept()
    connection.send(b"wildcard\\n")
    connection.close()
"""


@pytest.mark.parametrize("version", [4, 6])
def test_a_target_that_says_so_may_be_served_by_a_wildcard_listener(
    new_host: Callable[[str], Host], version: int
) -> None:
    with gateway(new_host) as lab:
        lab.configure(CONFIG.replace("port = 8080 }", "port = 8080, wildcard = true }"))
        lab.start()
        lab.spawn(lab.host, sys.executable, "-c", _WILDCARD_LISTENER, "0.0.0.0" if version == 4 else "::", "8080")
        lab.wait(lambda: lab.host.sh("ss -Hltn sport = 8080"), "the wildcard listener is up")
        assert lab.ask(Extension(150, 0), 443, version=version) == "wildcard"


def test_a_time_wait_socket_does_not_give_way_to_a_wildcard_listener(lab: Gateway) -> None:
    """The daemon closed first, so its side is in TIME_WAIT; then it died. A SYN on the same 4-tuple could make the
    kernel look for a listener again, and there is only the wildcard one."""
    responder = lab.respond(("10.64.0.0", 100, 8080))
    source = (CLIENT4, 33333)
    with lab.socket(Extension(5, 0), source=source) as connection:
        connection.connect((ENDPOINT4, 443))
        connection.recv(256)
        responder.kill()  # its kernel sends the FIN first
        responder.wait()
        assert connection.recv(256) == b""
    lab.spawn(lab.host, sys.executable, "-c", _WILDCARD_LISTENER, "0.0.0.0", "8080")
    lab.wait(lambda: lab.host.sh("ss -Hltn sport = 8080"), "the wildcard listener is up")
    lab.wait(lambda: "8080" in lab.host.sh("nft list set inet steerd wildcard_ports4"), "steerd knows the listener")
    assert "TIME-WAIT" in lab.host.sh("ss -Htan sport = 8080")
    _free_port(lab, source)
    before = lab.repeated()
    with pytest.raises(ConnectionRefusedError):
        lab.ask(Extension(5, 0), 443, source=source)
    assert lab.repeated() - before <= 2


def _free_port(lab: Gateway, source: tuple[str, int]) -> None:
    """End what the client's kernel still keeps of a 4-tuple, without a packet: as if the client had been restarted."""
    lab.client.sh(f"ss -K state all src {source[0]} sport = {source[1]} >/dev/null; true")


def test_a_reset_4_tuple_asked_for_another_target_never_meets_the_old_one(lab: Gateway) -> None:
    """Conntrack keeps translating a connection that the server reset (state CLOSE), and a new SYN on the same 4-tuple
    is taken for part of it: without the check of what was translated, the old daemon would answer."""
    lab.respond(("10.64.0.0", 100, 8080))
    for round_ in range(4):
        source = (CLIENT4, 40000 + round_)
        with lab.socket(Extension(5, 0), source=source) as connection:
            connection.connect((ENDPOINT4, 443))
            assert connection.recv(256).startswith(b"10.64.0.4 ")
            connection.send(b"reset")
            with pytest.raises(ConnectionResetError):
                connection.recv(256)
        assert lab.ask(Extension(6, 0), 443, source=source).startswith("10.64.0.5 ")
    assert lab.counters()["stale"] > 0, "the case did not come up, and nothing was tested"


def test_a_client_that_vanished_and_asks_for_another_target_gets_there(lab: Gateway) -> None:
    """Its old connection still stands on the gateway. The old daemon's socket answers the SYN with a challenge ACK, the
    client resets, and the repeated SYN is steered anew; at no time does the old target accept it."""
    lab.respond(("10.64.0.0", 100, 8080))
    source = (CLIENT4, 41000)
    vanishing = lab.socket(Extension(5, 0), source=source)
    vanishing.connect((ENDPOINT4, 443))
    assert vanishing.recv(256).startswith(b"10.64.0.4 ")
    vanishing.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    vanishing.close()  # in repair mode, a socket goes without a word
    before = lab.repeated()
    assert lab.ask(Extension(6, 0), 443, source=source).startswith("10.64.0.5 ")
    assert lab.repeated() - before <= 2


def test_a_target_that_is_not_listening_is_refused_at_once(lab: Gateway) -> None:
    for version in (4, 6):
        assert refused_at_once(lab, partial(lab.ask, Extension(5, 0), 443, version=version)) == 1


def test_a_flushed_ruleset_comes_back(lab: Gateway) -> None:
    """`systemctl restart nftables` begins with `flush ruleset`."""
    lab.respond(("10.64.0.0", 100, 8080))
    assert lab.ask(Extension(5, 0), 443).startswith("10.64.0.4 ")
    lab.expected_warnings = ["rules of steerd were removed by somebody; they are back"]
    lab.host.sh("nft flush ruleset")
    lab.wait(lambda: lab.count_events(lab.expected_warnings[0]) == 1, "the daemon has noticed")
    lab.wait(lambda: lab.host.sh("nft list chain inet steerd steer", check=False), "the table is back")
    assert lab.ask(Extension(5, 0), 443).startswith("10.64.0.4 ")


def test_admit_is_the_operators_and_is_kept(lab: Gateway) -> None:
    """Rules in chain admit judge before a worker does, and survive a restart of the daemon."""
    lab.respond(("10.64.0.0", 100, 8080))
    lab.host.sh("nft add rule inet steerd admit ip saddr 198.51.100.2 drop")

    def refused_by_admit() -> bool:
        with lab.socket(Extension(5, 0), source=("198.51.100.2", 0)) as connection:
            connection.settimeout(0.3)
            try:
                connection.connect((ENDPOINT4, 443))
            except TimeoutError:
                return True
        return False

    assert refused_by_admit()
    lab.stop()
    lab.start()
    assert refused_by_admit()
    assert lab.ask(Extension(5, 0), 443).startswith("10.64.0.4 ")
