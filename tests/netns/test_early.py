"""Early steering: the decision is made at the SYN, and the right daemon sees the client's own address.

Topology: tests/netns/gateway.py (one client, one gateway, endpoints 203.0.113.10 and 2001:db8::10).
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from collections.abc import Callable, Iterator

import pytest

from steerd import client as steerd_client
from steerd.model import Extension
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host

POOL = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
"""
SERVICE = """
[services.main]
endpoints = [
    "203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp", "203.0.113.10:2000-2999/tcp", "[2001:db8::10]:2000-2999/tcp"
]
inspect = ["port-extension", "http", "prefix"]
"""
ALIAS = {4: "10.64.0.{}", 6: "fd00:64::{:x}"}
CLIENT = {4: CLIENT4, 6: CLIENT6}


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        yield made


def name(version: int, index: int, port: int) -> str:
    """How an answer of the daemon on an alias begins when this client asked."""
    return f"{ipaddress.ip_address(ALIAS[version].format(index))} {port} {CLIENT[version]} "


@pytest.mark.parametrize("version", [4, 6])
def test_arithmetic_by_extension_reaches_the_nth_alias_which_sees_the_client(lab: Gateway, version: int) -> None:
    lab.configure(
        POOL + SERVICE + 'unextended = "unmatched"\n'
        'extension_pool = { pool = "tenants", by = "extension", port = 8080 }\n'
    )
    lab.start()
    lab.respond(("10.64.0.0", 100, 8080), ("fd00:64::", 100, 8080))

    def ask_four() -> None:
        for extension in (1, 2, 50, 100):
            assert lab.ask(Extension(extension, 0), 443, version=version).startswith(name(version, extension - 1, 8080))

    assert lab.at_first_sight(ask_four) == 4


@pytest.mark.parametrize("version", [4, 6])
def test_arithmetic_by_extension_keeps_the_port_with_same(lab: Gateway, version: int) -> None:
    lab.configure(
        POOL + SERVICE + 'unextended = "unmatched"\nextension_pool = { pool = "tenants", by = "extension" }\n'
    )
    lab.start()
    lab.respond(*((ALIAS[v].format(i), 1, port) for v in (4, 6) for i in (4, 9) for port in (443, 2222)))
    for extension in (5, 10):
        for port in (443, 2222):
            assert lab.ask(Extension(extension, 0), port, version=version).startswith(
                name(version, extension - 1, port)
            )


@pytest.mark.parametrize("version", [4, 6])
def test_arithmetic_by_extended_port(lab: Gateway, version: int) -> None:
    lab.configure(
        POOL + SERVICE + 'unextended = "unmatched"\n'
        f'extension_pool = {{ pool = "tenants", by = "extended-port", first = {3 * 65536 + 2000}, port = 9000 }}\n'
    )
    lab.start()
    lab.respond(("10.64.0.0", 256, 9000), ("fd00:64::", 256, 9000))
    for index in (0, 1, 17, 255):
        assert lab.ask(Extension(3, 0), 2000 + index, version=version).startswith(name(version, index, 9000))
    for extension, port in ((3, 2256), (2, 2000), (4, 2000)):  # behind the pool's end, below its beginning, beyond
        with pytest.raises(ConnectionRefusedError):
            lab.ask(Extension(extension, 0), port, version=version)


@pytest.mark.parametrize("version", [4, 6])
def test_routes_by_destination_source_and_both_extensions_and_source_prefix(lab: Gateway, version: int) -> None:
    lab.configure(
        POOL + SERVICE + 'unextended = "unmatched"\n'
        'extension_pool = { pool = "tenants", by = "extension", port = 8080 }\n'
        + "".join(
            f"[[services.main.routes]]\nwhen = {{ {when} }}\n{source}"
            f'target = ["{ALIAS[4].format(index)}:8080", "[{ALIAS[6].format(index)}]:8080"]\n'
            for when, source, index in (
                ('"portext.dst" = 7', "", 100),
                ('"portext.src" = 3', "", 101),
                ('"portext.dst" = 7, "portext.src" = 3', "", 102),
                ('"portext.dst" = 9', 'source = "198.51.100.0/29"\n', 103),
                ('"portext.dst" = 9', 'source = "198.51.100.2/32"\n', 104),
                ('"portext.dst" = 9', 'source = "2001:db8:1::/64"\n', 105),
                (f'"portext.port" = {20 * 65536 + 443}', "", 106),
            )
        )
    )
    lab.start()
    lab.respond(("10.64.0.0", 110, 8080), ("fd00:64::", 110, 8080))

    def asked(dst: int, src: int, port: int = 443, source: tuple[str, int] | None = None) -> str:
        return lab.ask(Extension(dst, src), port, version=version, source=source)

    assert asked(7, 0).startswith(name(version, 100, 8080))
    assert asked(0, 3).startswith(name(version, 101, 8080))
    assert asked(7, 3).startswith(name(version, 102, 8080))
    assert asked(20, 0).startswith(name(version, 106, 8080))
    assert asked(20, 0, 2000).startswith(name(version, 19, 8080))  # another port: the route does not match
    if version == 4:
        assert asked(9, 0).startswith(name(4, 103, 8080))
        assert asked(9, 0, source=("198.51.100.2", 0)).startswith("10.64.0.104 8080 198.51.100.2 ")
        assert asked(9, 0, source=("198.51.100.9", 0)).startswith("10.64.0.8 8080 198.51.100.9 ")
    else:
        assert asked(9, 0).startswith(name(6, 105, 8080))


@pytest.mark.parametrize("version", [4, 6])
def test_the_tcp_option_steers_as_well(lab: Gateway, version: int) -> None:
    lab.configure(
        POOL + SERVICE + 'unextended = "pass"\nextension_pool = { pool = "tenants", by = "extension", port = 8080 }\n'
    )
    lab.start()
    lab.respond(("10.64.0.0", 30, 8080), ("fd00:64::", 30, 8080))
    endpoint = ENDPOINT4 if version == 4 else ENDPOINT6
    with lab.client.entered():
        for extension in (1, 30):
            with steerd_client.connect((endpoint, 443), extension=extension, timeout=10, via="tcp") as connection:
                assert connection.recv(256).decode().startswith(name(version, extension - 1, 8080))


def test_keys_are_logged_with_the_decision(lab: Gateway) -> None:
    lab.configure(
        POOL
        + SERVICE
        + 'unextended = "unmatched"\nextension_pool = { pool = "tenants", by = "extension", port = 8080 }\n',
        gateway="access_log = 1",
    )
    lab.start()
    lab.respond(("10.64.0.0", 30, 8080))
    lab.ask(Extension(7, 3), 443)
    lab.wait(lambda: lab.count_events("decision") == 1, "the decision is logged")
    (event,) = (event for event in lab.events() if event["event"] == "decision")
    assert event["keys"] == {"portext.dst": "7", "portext.src": "3", "portext.port": str(7 * 65536 + 443)}
    assert (event["service"], event["reason"], event["target"]) == ("main", "arithmetic", "10.64.0.6:8080")
    assert event["client"].startswith("198.51.100.1:")
    assert event["endpoint"] == "203.0.113.10:443"


@pytest.mark.parametrize(("unextended", "plain"), [("pass", "own"), ("default", "default"), ("unmatched", "refused")])
@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_without_extension_follows_unextended(lab: Gateway, unextended: str, plain: str, version: int) -> None:
    lab.configure(
        POOL + SERVICE + f'unextended = "{unextended}"\n'
        'default = ["10.64.0.200:8080", "[fd00:64::c8]:8080"]\n'
        'extension_pool = { pool = "tenants", by = "extension", port = 8080 }\n'
    )
    lab.start()
    lab.respond(("10.64.0.0", 201, 8080), ("fd00:64::", 201, 8080), (ENDPOINT4, 1, 443), (ENDPOINT6, 1, 443))
    assert lab.ask(Extension(5, 0), 443, version=version).startswith(name(version, 4, 8080))
    if plain == "refused":
        with pytest.raises(ConnectionRefusedError):
            lab.ask(None, 443, version=version)
    else:
        endpoint = ENDPOINT4 if version == 4 else ENDPOINT6
        own = f"{endpoint} 443 {CLIENT[version]} "
        assert lab.ask(None, 443, version=version).startswith(own if plain == "own" else name(version, 200, 8080))
    # An extension outside the pool is not "no extension": it goes to the default, never to the gateway's own socket.
    assert lab.ask(Extension(5000, 0), 443, version=version).startswith(name(version, 200, 8080))


@pytest.mark.parametrize("version", [4, 6])
def test_unmatched_drop_answers_nothing(lab: Gateway, version: int) -> None:
    lab.configure(
        POOL + SERVICE + 'unextended = "unmatched"\nunmatched = "drop"\n'
        'extension_pool = { pool = "tenants", by = "extension", port = 8080 }\n'
    )
    lab.start()
    with lab.socket(Extension(5000, 0), version=version) as connection:
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.connect((ENDPOINT4 if version == 4 else ENDPOINT6, 443))


def test_a_malformed_extension_counts_and_is_treated_like_none(lab: Gateway) -> None:
    lab.configure(
        POOL
        + SERVICE
        + 'unextended = "unmatched"\nextension_pool = { pool = "tenants", by = "extension", port = 8080 }\n',
        gateway="access_log = 1",
    )
    lab.start()
    lab.respond(("10.64.0.0", 30, 8080))
    with lab.client.entered():
        connection = socket.socket()
    with connection:
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes.fromhex("9e0a5354000700000000 0101"))
        with pytest.raises(ConnectionRefusedError):
            connection.connect((ENDPOINT4, 443))
    lab.wait(lambda: lab.count_events("decision") == 1, "the decision is logged")
    assert [e["reason"] for e in lab.events() if e["event"] == "decision"] == ["unextended_unmatched"]
    status = lab.host.sh(f"cd {ROOT}; {sys.executable} -m steerd.cli.ctl status --all {lab.config}")
    assert re.search(r"malformed_extension\s+│ 1 ", status)
    assert re.search(r"unextended_unmatched\s+│ 1 ", status)


@pytest.mark.parametrize("version", [4, 6])
def test_fast_open_payload_is_inspected(lab: Gateway, version: int) -> None:
    """The client asks with its request inside the SYN; http.host and prefix tell two daemons apart."""
    targets = {index: f'["10.64.0.{index}:8080", "[fd00:64::{index:x}]:8080"]' for index in (1, 2, 9)}
    lab.configure(
        POOL + SERVICE + f'unextended = "default"\ndefault = {targets[9]}\n'
        f'[[services.main.routes]]\nwhen = {{ "http.host" = "a.example" }}\ntarget = {targets[1]}\n'
        f'[[services.main.routes]]\nwhen = {{ "prefix" = "SSH-2.0" }}\ntarget = {targets[2]}\n'
    )
    lab.host.sh("sysctl -qw net.ipv4.tcp_fastopen=0x203")
    lab.client.sh("sysctl -qw net.ipv4.tcp_fastopen=0x5")
    lab.start()
    lab.respond(("10.64.0.0", 10, 8080), ("fd00:64::", 10, 8080))
    for payload, index in (
        (b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", 1),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 2),
        (b"GET / HTTP/1.1\r\nHost: b.example\r\n\r\n", 9),
        (b"GET / HTTP/1.1\r\nHost: a.exam", 9),  # cut short: nothing can be said, as though there were no payload
    ):
        with lab.socket(None, version=version) as connection:
            connection.sendto(payload, socket.MSG_FASTOPEN, (ENDPOINT4 if version == 4 else ENDPOINT6, 443))
            with connection.makefile("rb") as answer:
                assert answer.readline().decode().startswith(name(version, index, 8080))
                assert answer.read(len(payload)) == payload  # what the daemon got, sent back


def test_the_mark_of_other_tools_survives_and_ours_is_gone_after_steer(lab: Gateway) -> None:
    lab.configure(
        POOL
        + SERVICE
        + 'unextended = "unmatched"\nextension_pool = { pool = "tenants", by = "extension", port = 8080 }\n'
    )
    lab.host.sh(
        "nft 'table inet other { chain before { type filter hook prerouting priority -170; "
        "tcp dport 443 meta mark set 0x5a; }; "
        "chain after { type filter hook input priority 0; "
        "tcp dport 8080 meta mark 0x5a counter; tcp dport 8080 meta mark != 0x5a counter; }; }'"
    )
    lab.start()
    lab.respond(("10.64.0.0", 30, 8080))
    lab.ask(Extension(5, 0), 443)
    listed = lab.host.sh("nft list chain inet other after")
    kept, lost = (int(line.split("packets ")[1].split()[0]) for line in listed.splitlines() if "counter" in line)
    assert kept > 0
    assert lost == 0
