"""Sessions: who says a known session id is at its daemon, whatever the routes say, and as `on_new_source` allows.

Topology: tests/netns/gateway.py. The client's other addresses stand for other clients. Daemon number N listens on the
alias N; routes lead to number 9.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host

POOL = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
"""
KEYS = {554: "rtsp.session", 80: "http.cookie.sid", 81: "http.header.X-Session"}
REQUEST = {
    554: "PLAY rtsp://a.example/1 RTSP/1.0\r\nCSeq: 4\r\nSession: {};timeout=60\r\n\r\n",
    80: "GET / HTTP/1.1\r\nHost: a.example\r\nCookie: theme=dark; sid={}\r\n\r\n",
    81: "GET / HTTP/1.1\r\nHost: a.example\r\nx-session: {}\r\n\r\n",
}
SERVICE = """
[services.s{port}]
endpoints = ["203.0.113.10:{port}/tcp", "[2001:db8::10]:{port}/tcp"]
{inspect}
routes = [{{ when = {{ "{parser}.host" = "a.example" }}, target = {route} }}]
[services.s{port}.sessions]
key = "{key}"
on_new_source = "{rule}"
entries = [{entries}]
"""
INSPECT = 'inspect = ["rtsp", "http"]'
PROXIED = f'inspect = ["proxy", "rtsp", "http"]\ntrusted_proxies = ["{CLIENT4}/32", "{CLIENT6}/128"]'
SOURCES = {4: (CLIENT4, "198.51.100.2"), 6: (CLIENT6, "2001:db8:1::2")}
DAEMONS = 10


def targets(number: int, pool: str = "64") -> str:
    """A daemon as `target` has it, both families."""
    return f'["10.{pool}.0.{number}:8080", "[fd00:{pool}::{number:x}]:8080"]'


def entry(session_id: str, number: int, source: str | None = None) -> str:
    written = f', source = "{source}"' if source else ""
    return f'{{ id = "{session_id}", target = {targets(number)}{written} }}'


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.client.sh(f"ip -6 addr add {SOURCES[6][1]}/64 dev eth0 nodad")
        yield made


def configure(lab: Gateway, rule: str, *entries: str, pool: str = POOL, inspect: str = INSPECT) -> None:
    services = (
        SERVICE.format(
            port=port,
            parser="rtsp" if port == 554 else "http",
            route=targets(9),
            key=key,
            rule=rule,
            inspect=inspect,
            entries=", ".join(entries),
        )
        for port, key in KEYS.items()
    )
    lab.configure(pool + "".join(services))


def serve(lab: Gateway, rule: str, *entries: str, inspect: str = INSPECT) -> None:
    configure(lab, rule, *entries, inspect=inspect)
    lab.start()
    lab.respond(("10.64.0.0", DAEMONS, 8080), ("fd00:64::", DAEMONS, 8080))


def reload(lab: Gateway) -> None:
    before = lab.count_events("reloaded")
    assert lab.daemon is not None
    lab.daemon.send_signal(1)
    lab.wait(lambda: lab.count_events("reloaded") > before, "the configuration is reloaded")


def connect(lab: Gateway, session: str, version: int, source: str, port: int = 554, header: str = "") -> socket.socket:
    """A connection whose request, perhaps behind a proxy's header, is on its way."""
    client = lab.socket(None, version=version, source=(source, 0))
    client.connect((ENDPOINT4 if version == 4 else ENDPOINT6, port))
    client.sendall((header + REQUEST[port].format(session)).encode())
    return client


def heard(client: socket.socket) -> tuple[int, str] | None:
    """(number of the daemon that answered, whom it sees); None: reset."""
    with client:
        try:
            answer = client.recv(256)
        except ConnectionResetError:
            return None
        assert answer, "closed without a word"
        # The daemon's line; its echo of the request may follow at once.
        alias, _, seen, _ = answer.partition(b"\n")[0].decode().split()
        return int(ipaddress.ip_address(alias)) & 0xFF, seen


def ask(
    lab: Gateway, session: str, version: int, source: str, port: int = 554, header: str = ""
) -> tuple[int, str] | None:
    return heard(connect(lab, session, version, source, port, header))


def steerctl(lab: Gateway, *arguments: str) -> str:
    command = [sys.executable, "-m", "steerd.cli.ctl", "session", *arguments, "--config", str(lab.config)]
    return lab.host.sh(f"cd {ROOT}; {' '.join(command)}")


def sources(lab: Gateway, port: int = 554) -> dict[str, str | None]:
    """The sources of all sessions of a service, by id, as the API says them."""
    return {each["id"]: each["source"] for each in json.loads(steerctl(lab, "list", f"s{port}", "--json"))}


def await_sources(lab: Gateway, port: int, **expected: str) -> None:
    """Wait until what workers claimed is written down."""
    lab.wait(lambda: sources(lab, port) == expected, f"the sources are {expected}")


@pytest.mark.parametrize("port", KEYS)
@pytest.mark.parametrize("version", [4, 6])
def test_allow_any_source_before_any_route(lab: Gateway, port: int, version: int) -> None:
    serve(lab, "allow", entry("d1/4711", 1), entry("d2", 2, "198.51.100.7"))
    for source in SOURCES[version]:
        assert ask(lab, "d1/4711", version, source, port) == (1, source)
        assert ask(lab, "d2", version, source, port) == (2, source)
        assert ask(lab, "unknown", version, source, port) == (9, source)
    assert sources(lab, port) == {"d1/4711": None, "d2": "198.51.100.7"}


@pytest.mark.parametrize("port", KEYS)
@pytest.mark.parametrize("version", [4, 6])
def test_move_to_whoever_came_last(lab: Gateway, port: int, version: int) -> None:
    first, second = SOURCES[version]
    serve(lab, "move", entry("d1", 1, first), entry("d2", 2))
    for source in (first, second, first, second):
        for session, number in (("d1", 1), ("d2", 2)):
            assert ask(lab, session, version, source, port) == (number, source)
        await_sources(lab, port, d1=source, d2=source)
    reload(lab)
    assert sources(lab, port) == {"d1": second, "d2": second}
    assert ask(lab, "d2", version, first, port) == (2, first)
    lab.kill()
    lab.start()
    await_sources(lab, port, d1=second, d2=first)  # a move outlives a killed main process
    # A source that is written anew counts.
    configure(lab, "move", entry("d1", 1, "198.51.100.9"), entry("d2", 2))
    reload(lab)
    assert sources(lab, port) == {"d1": "198.51.100.9", "d2": first}


@pytest.mark.parametrize("port", KEYS)
@pytest.mark.parametrize("version", [4, 6])
def test_deny_every_source_but_one(lab: Gateway, port: int, version: int) -> None:
    first, second = SOURCES[version]
    serve(lab, "deny", entry("d1", 1, first), entry("d2", 2))
    assert ask(lab, "d1", version, second, port) is None
    assert ask(lab, "d1", version, first, port) == (1, first)
    # Without a source yet: the first one that comes, at once, and before as after the main process wrote it down.
    assert ask(lab, "d2", version, second, port) == (2, second)
    assert ask(lab, "d2", version, first, port) is None
    lab.kill()
    lab.start()
    for _ in range(2):
        assert ask(lab, "d2", version, first, port) is None
        assert ask(lab, "d2", version, second, port) == (2, second)
        await_sources(lab, port, d1=first, d2=second)
        reload(lab)
    status = lab.host.sh(f"cd {ROOT}; {sys.executable} -m steerd.cli.ctl status {lab.config}")
    assert "session_refused" in status


@pytest.mark.parametrize("version", [4, 6])
def test_behind_a_trusted_proxy_the_source_is_the_client_that_it_names(lab: Gateway, version: int) -> None:
    """Clients of both families, whatever the proxy's own; the daemon sees the proxy, who is its peer."""
    proxy, stranger = SOURCES[version]
    serve(lab, "deny", entry("d1", 1, proxy), entry("d2", 2), entry("d3", 3), inspect=PROXIED)
    header = {
        client: f"PROXY TCP{6 if ':' in client else 4} {client} {client} 5555 554\r\n"
        for client in ("192.0.2.9", "192.0.2.10", "2001:db8:2::9")
    }
    assert ask(lab, "d1", version, proxy) == (1, proxy)
    assert ask(lab, "d1", version, proxy, header=header["192.0.2.9"]) is None
    assert ask(lab, "d2", version, stranger, header=header["192.0.2.9"]) is None
    for _ in range(2):
        for session, number, client, other in (
            ("d2", 2, "192.0.2.9", "192.0.2.10"),
            ("d3", 3, "2001:db8:2::9", "192.0.2.9"),
        ):
            assert ask(lab, session, version, proxy, header=header[client]) == (number, proxy)
            assert ask(lab, session, version, proxy, header=header[other]) is None
            assert ask(lab, session, version, proxy) is None
        await_sources(lab, 554, d1=proxy, d2="192.0.2.9", d3="2001:db8:2::9")


@pytest.mark.parametrize("version", [4, 6])
def test_of_sources_that_race_for_a_session_one_has_it(lab: Gateway, version: int) -> None:
    sessions = [f"r{number}" for number in range(40)]
    serve(lab, "deny", *(entry(session, 1) for session in sessions))
    winners: dict[str, str] = {}
    for session in sessions:
        clients = [(source, connect(lab, session, version, source)) for source in SOURCES[version] * 3]
        answers = [(source, heard(client)) for source, client in clients]
        (winner,) = {source for source, answer in answers if answer is not None}
        assert all(answer == ((1, source) if source == winner else None) for source, answer in answers)
        winners[session] = winner
    await_sources(lab, 554, **winners)


@pytest.mark.parametrize("version", [4, 6])
def test_sessions_come_and_go_while_it_runs(lab: Gateway, version: int) -> None:
    first, second = SOURCES[version]
    serve(lab, "deny", entry("toml", 1))
    assert ask(lab, "d3", version, first) == (9, first)
    for number in (3, 4):
        target = f"10.64.0.{number}:8080" if version == 4 else f"[fd00:64::{number}]:8080"
        assert steerctl(lab, "add", "s554", "d3", target, "--source", first) == f"d3: {target}\n"
        assert ask(lab, "d3", version, first) == (number, first)
        assert ask(lab, "d3", version, second) is None
    lab.kill()
    lab.start()
    assert ask(lab, "d3", version, first) == (4, first)
    assert sources(lab) == {"d3": first, "toml": None}
    assert steerctl(lab, "remove", "s554", "d3") == "d3: removed\n"
    assert ask(lab, "d3", version, second) == (9, second)


@pytest.mark.parametrize("version", [4, 6])
def test_a_session_whose_alias_is_gone_is_refused_until_it_is_back(lab: Gateway, version: int) -> None:
    """Never left to the routes, and never to an address that is not ours any more."""
    client, _ = SOURCES[version]
    serve(lab, "allow")
    steerctl(lab, "add", "s554", "d1", "10.64.0.1:8080", "[fd00:64::1]:8080")
    assert ask(lab, "d1", version, client) == (1, client)
    configure(
        lab, "allow", pool=POOL.replace("10.64.0.0/24", "10.64.0.8/29").replace("fd00:64::/120", "fd00:64::8/125")
    )
    reload(lab)
    assert ask(lab, "d1", version, client) is None
    assert ask(lab, "unknown", version, client) == (9, client)
    configure(lab, "allow")
    reload(lab)
    assert ask(lab, "d1", version, client) == (1, client)
