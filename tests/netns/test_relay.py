"""Daemons on unix sockets behind the gateway: client, endpoint, alias, relay, unix socket, on the real kernel."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from steerd.control import client
from steerd.errors import SteerdError
from steerd.model import Answer
from steerd.wire import proxy
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host

POOLS = """
[gateway.relay]
pool = "relays"

[pools.relays]
prefixes = ["10.65.0.0/{bits4}", "fd00:65::/{bits6}"]
mode = "{mode}"
quarantine = 0

[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
"""
SMALL = POOLS.format(bits4=28, bits6=124, mode="addresses")
CLIENTS = {4: CLIENT4, 6: CLIENT6}
ENDPOINTS = {4: ENDPOINT4, 6: ENDPOINT6}
DIED = "relay died; the connections that it copied are cut"
GONE = "a daemon cannot be connected to; its clients are reset"


def route(name: str, target: str) -> str:
    return f'[[services.web.routes]]\nwhen = {{ http.host = "{name}.example" }}\ntarget = {target}\n'


class Lab:
    """A gateway with daemons on unix sockets, which live in this process."""

    def __init__(self, made: Gateway, stack: contextlib.ExitStack) -> None:
        self.gateway = made
        self.stack = stack

    def path(self, name: str) -> str:
        return f"{self.gateway.directory}/{name}"

    def daemon(self, name: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """One that listens on its path, or with an @ on an abstract name."""
        with self.gateway.host.entered():  # abstract names belong to a network namespace
            listener = self.stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        listener.bind(f"\0{name[1:]}" if name[0] == "@" else self.path(name))
        if kind != socket.SOCK_DGRAM:
            listener.listen(2000)
        listener.settimeout(60)
        return listener

    def connect(self, host: str, version: int, port: int = 80) -> tuple[socket.socket, bytes]:
        """A client that has sent its request, and the request."""
        client = self.stack.enter_context(self.gateway.socket(None, version=version))
        client.connect((ENDPOINTS[version], port))
        request = f"GET / HTTP/1.1\r\nHost: {host}.example\r\n\r\n".encode()
        client.sendall(request)
        return client, request

    def accept(self, listener: socket.socket) -> socket.socket:
        daemon = self.stack.enter_context(listener.accept()[0])
        daemon.settimeout(60)
        return daemon

    def take(self, channel: socket.socket) -> tuple[bytes, socket.socket]:
        """What a daemon is handed over: the message, and the connection."""
        data, descriptors, _, _ = socket.recv_fds(channel, 1000, 1)
        daemon = self.stack.enter_context(socket.socket(fileno=descriptors[0]))
        daemon.settimeout(60)
        return data, daemon

    def pair(self, host: str, version: int, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
        """A client and its daemon, whose connection works in both directions."""
        client, request = self.connect(host, version)
        daemon = self.accept(listener)
        assert daemon.recv(1000) == request
        speak(client, daemon)
        return client, daemon

    @property
    def run_dir(self) -> str:
        return f"{self.gateway.directory}/run"

    def api(self, method: str, *path: str, **more: Any) -> Any:
        return client.request(self.run_dir, method, *path, **more)

    def steerctl(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "steerd.cli.ctl", *arguments, "--config", str(self.gateway.config)]
        return self.gateway.host.sh(f"cd {ROOT}; {' '.join(command)} 2>&1")

    def reload(self, text: str) -> None:
        done = self.gateway.count_events("reloaded")
        assert self.gateway.daemon is not None
        self.gateway.configure(text)
        self.gateway.daemon.send_signal(signal.SIGHUP)
        self.gateway.wait(lambda: self.gateway.count_events("reloaded") > done, "reloaded")

    def relay(self) -> int:
        """The process id of the one that listens now."""
        return int([event["pid"] for event in self.gateway.events() if event["event"] == "relay listens"][-1])


def speak(client: socket.socket, daemon: socket.socket) -> None:
    for here, there in ((daemon, client), (client, daemon)):
        here.sendall(b"more")
        assert there.recv(100) == b"more"


def says_who(data: bytes, client: socket.socket, version: int, port: int = 80) -> int:
    """Check a PROXY header: this client, and the endpoint. Returns its length."""
    header = proxy.read(data)
    assert not isinstance(header, Answer)
    assert header.keys == {
        "proxy.version": "2",
        "proxy.source": CLIENTS[version],
        "proxy.source-port": str(client.getsockname()[1]),
        "proxy.destination": ENDPOINTS[version],
        "proxy.destination-port": str(port),
    }
    return header.length


def is_told(daemon: socket.socket, client: socket.socket, version: int, request: bytes, port: int = 80) -> None:
    """The daemon gets a header, and what the client has sent."""
    data = b""
    while not data.endswith(request):
        more = daemon.recv(1000)
        assert more, data
        data += more
    assert data[says_who(data, client, version, port) :] == request


def is_reset(client: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(100) == b""
        return False
    return True


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Lab]:
    with gateway(new_host) as made, contextlib.ExitStack() as stack:
        yield Lab(made, stack)


def started(lab: Lab, text: str) -> Lab:
    lab.gateway.configure(text)
    lab.gateway.start()
    return lab


def test_from_the_client_to_a_unix_socket_and_back(lab: Lab) -> None:
    plain, told, handed, early = (lab.path(name) for name in ("plain", "told", "handed", "early"))
    listeners = {name: lab.daemon(name) for name in ("plain", "told", "@abstract", "early")}
    listeners["handed"] = lab.daemon("handed", socket.SOCK_SEQPACKET)
    started(
        lab,
        SMALL
        + route("plain", f'"unix:{plain}"')
        + route("told", f'{{ address = "unix:{told}", proxy_protocol = "v2" }}')
        + route("handed", f'"unix-fd:{handed}"')
        + route("abstract", '"unix:@abstract"')
        + f"""
[services.early]
endpoints = ["203.0.113.10:8000-8999/tcp", "[2001:db8::10]:8000-8999/tcp"]
default = {{ address = "unix:{early}", proxy_protocol = "v2" }}
""",
    )
    channel: socket.socket | None = None
    for version in (4, 6):
        for name in ("plain", "@abstract"):
            client, daemon = lab.pair(name.strip("@"), version, listeners[name])
            client.shutdown(socket.SHUT_WR)
            assert daemon.recv(10) == b""
            daemon.sendall(b"last")
            daemon.close()
            assert client.recv(10) == b"last"
            assert client.recv(10) == b""

        client, request = lab.connect("told", version)
        is_told(lab.accept(listeners["told"]), client, version, request)

        client, request = lab.connect("handed", version)
        channel = channel or lab.accept(listeners["handed"])
        data, daemon = lab.take(channel)
        assert len(data) == says_who(data, client, version)
        assert daemon.getpeername()[:2] == (CLIENTS[version], client.getsockname()[1])
        assert ipaddress.ip_address(daemon.getsockname()[0]) in ipaddress.ip_network(
            "10.65.0.0/28" if version == 4 else "fd00:65::/124"
        )
        assert daemon.recv(1000) == request
        speak(client, daemon)

        # Decided by its SYN, on a range of ports.
        client, request = lab.connect("any", version, 8765)
        is_told(lab.accept(listeners["early"]), client, version, request, 8765)


def test_established_connections_outlive_reloads_and_restarts(lab: Lab) -> None:
    listeners = {name: lab.daemon(name) for name in "abc"}
    handed = lab.daemon("handed", socket.SOCK_STREAM)
    both = route("a", f'"unix:{lab.path("a")}"') + route("h", f'"unix-fd:{lab.path("handed")}"')
    started(lab, SMALL + both)
    first = lab.pair("a", 4, listeners["a"])
    client, _ = lab.connect("h", 6)
    channel = lab.accept(handed)
    _, daemon = lab.take(channel)
    daemon.recv(1000)
    speak(client, daemon)
    others = [(client, daemon)]
    pid = lab.relay()

    # Now a's name leads to b, and what led to a is gone.
    lab.reload(SMALL + route("a", f'"unix:{lab.path("b")}"') + route("c", f'"unix:{lab.path("c")}"'))
    lab.pair("a", 4, listeners["b"])
    others.append(lab.pair("c", 6, listeners["c"]))
    speak(*first)
    assert lab.relay() == pid

    # The relay dies: what it copied is cut, what it handed over is not; it is back with the same aliases.
    lab.gateway.expected_warnings.append(DIED)
    os.kill(pid, signal.SIGKILL)
    assert first[0].recv(100) == b""
    lab.gateway.wait(lambda: lab.gateway.count_events("relay listens") == 2, "the relay listens again")
    speak(*others[0])
    others[1] = lab.pair("c", 6, listeners["c"])
    others.append(lab.pair("a", 4, listeners["b"]))

    # The main process stops, or is killed: the relay carries on what it has, and the next one listens.
    for end in (lab.gateway.stop, lab.gateway.kill):
        left_behind = lab.relay()
        end()
        lab.gateway.start()
        for established in others:
            speak(*established)
        assert lab.relay() != left_behind
        assert Path(f"/proc/{left_behind}").exists()
        others[1][0].close()
        others[2][0].close()
        for established in others[1:]:
            established[1].close()
        lab.gateway.wait(
            partial(has_ended, left_behind), "the relay that was left behind ends with its last connection"
        )
        others[1:] = [lab.pair("c", 6, listeners["c"]), lab.pair("a", 4, listeners["b"])]


def has_ended(pid: int) -> bool:
    """Even if nobody has waited for it."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    return True


def test_routes_that_come_and_go(lab: Lab) -> None:
    listeners = {name: lab.daemon(name) for name in "abc"}
    started(lab, SMALL + route("a", f'"unix:{lab.path("a")}"'))
    b, c = f"unix:{lab.path('b')}", f"unix:{lab.path('c')}"
    lab.api("PUT", "services", "web", "routes", body={"when": {"http.host": "b.example"}, "target": b})
    lab.steerctl("route", "add", "web", c, "--key", "http.host=c.example", "--proxy-protocol")
    lab.pair("a", 4, listeners["a"])
    lab.pair("b", 6, listeners["b"])
    assert [
        (each["when"]["http.host"], each["targets"], each["origin"], each["usable"])
        for each in lab.api("GET", "services", "web", "routes")["routes"]
    ] == [
        ("a.example", [f"unix:{lab.path('a')}"], "static", True),
        ("b.example", [b], "dynamic", True),
        ("c.example", [c], "dynamic", True),
    ]
    exported = b"".join(client.download(lab.run_dir, "export"))
    assert [json.loads(line)["target"] for line in exported.splitlines()[1:]] == [
        [b],
        [{"address": c, "proxy_protocol": "v2"}],
    ]
    lab.gateway.stop()
    lab.gateway.start()
    lab.pair("b", 4, listeners["b"])
    lab.api("DELETE", "services", "web", "routes", query={"when": '{"http.host": "b.example"}'})
    assert is_reset(lab.connect("b", 4)[0])
    assert lab.api("POST", "import", body=exported) == {"added": 1, "changed": 0, "unchanged": 1}
    lab.pair("b", 4, listeners["b"])
    told, request = lab.connect("c", 6)
    is_told(lab.accept(listeners["c"]), told, 6, request)
    with pytest.raises(SteerdError, match="is in the pool relays, whose aliases the relay gives away itself"):
        lab.api("PUT", "services", "web", "routes", body={"when": {"http.host": "d"}, "target": "10.65.0.3:80"})


def test_a_daemon_that_is_not_there(lab: Lab) -> None:
    started(lab, SMALL + route("a", f'"unix:{lab.path("a")}"'))
    lab.gateway.expected_warnings.append(GONE)
    for version in (4, 6, 4, 6):
        assert is_reset(lab.connect("a", version)[0])
    assert lab.gateway.count_events(GONE) == 2, "once for each address family"
    listener = lab.daemon("a")
    lab.pair("a", 4, listener)


def test_a_thousand_daemons_on_unix_sockets(lab: Lab) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lab.stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kinds = {f"d{number}": ("unix", "unix-fd")[number % 2] for number in range(1000)}
    listeners = {name: lab.daemon(name) for name in kinds}
    routes = (route(name, f'"{kind}:{lab.path(name)}"') for name, kind in kinds.items())
    limits = "limits = { source_rate = 100000, source_burst = 100000 }\npending = { source_connections = 4096 }\n"
    lab.gateway.configure(POOLS.format(bits4=22, bits6=118, mode="anyip") + "".join(routes), limits)
    lab.gateway.start()
    asked = {name: lab.connect(name, 4 if number % 3 else 6) for number, name in enumerate(kinds)}
    for name, kind in kinds.items():
        daemon = lab.accept(listeners[name])
        if kind == "unix-fd":
            daemon = lab.take(daemon)[1]
        client, request = asked[name]
        assert daemon.recv(1000) == request
        daemon.sendall(name.encode())
        assert client.recv(100) == name.encode()
