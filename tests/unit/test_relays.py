"""Which aliases stand for which daemon on a unix socket: in the configuration, in the registry, over time."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerd import config
from steerd.config import Config
from steerd.control import relays, transfer
from steerd.control.registry import Registry
from steerd.core.pools import Pool
from steerd.core.relays import Seats
from steerd.errors import ConfigError, KernelError, RegistryError, RequestError
from steerd.model import IPAddress, Target, UnixDaemon

TEXT = """
[gateway.relay]
pool = "relays"
[pools.relays]
prefixes = ["10.65.0.0/30", "fd00:65::/126"]
quarantine = {quarantine}
[pools.tenants]
prefixes = ["10.64.0.0/24"]
[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
routes = [{routes}]
[services.other]
endpoints = ["203.0.113.10:81/tcp"]
inspect = ["http"]
"""
SHORT, LONG = 0, 600
PORT = 21300


def text(*paths: str, quarantine: int = SHORT) -> str:
    """Routes to daemons: `/a` is http://a/."""
    routes = (f'{{ when = {{ http.host = "{path[1:]}" }}, target = "unix:{path}" }}' for path in paths)
    return TEXT.format(quarantine=quarantine, routes=",".join(routes))


def addresses(index: int) -> tuple[IPAddress, ...]:
    return ipaddress.ip_address("10.65.0.0") + index, ipaddress.ip_address("fd00:65::") + index


class Relay(relays.NoEffects):
    """Listens where it is told."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[IPAddress, ...]] = {}
        self.refuses = False

    def listen(self, places: relays.Places, port: int) -> None:
        if self.refuses:
            raise KernelError("the relay does not answer")
        assert port == PORT
        self.places = dict(places)


class Lab:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.relay = Relay()
        self.registry = Registry(str(directory), relay_effects=self.relay)

    def publish(self, written: str) -> Config:
        read = config.parse(written, "f.toml", self.registry.relays.seats())
        self.registry.relays.reserve(read)
        self.registry.publish(read)
        self.registry.relays.listen(read)
        return read

    def start_anew(self) -> None:
        self.registry.close()
        self.registry = Registry(str(self.directory), relay_effects=self.relay)

    def put(self, host: str, target: object, service: str = "web") -> None:
        self.registry.routes.put(service, {"http.host": host}, target, None)

    def shown(self) -> dict[str, tuple[list[str], bool]]:
        views, _ = self.registry.routes.page("web", "", 100)
        return {view.when["http.host"]: (view.targets, view.usable) for view in views}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.registry.close()


def test_in_a_file_they_are_targets_like_others() -> None:
    read = config.parse(text("/a", "/b", "/a2"), "f.toml")
    assert read.relayed == {"unix:/a": addresses(0), "unix:/b": addresses(1), "unix:/a2": addresses(2)}
    web = read.services[1]
    assert [route.targets for route in web.routes] == [
        tuple(Target(address, PORT) for address in addresses(index)) for index in range(3)
    ]


def test_one_daemon_told_and_not_told_is_two() -> None:
    told = '{ address = "unix:/a", proxy_protocol = "v2" }'
    read = config.parse(text("/a") + f"default = {told}\n", "f.toml")
    assert read.relayed == {"unix:/a\0v2": addresses(0), "unix:/a": addresses(1)}
    for name in read.relayed:
        assert UnixDaemon.of_name(name).name == name
    assert str(UnixDaemon.of_name("unix-fd:@x")) == "unix-fd:@x"


DEFAULT = "[pools.relays]\nprefixes = ['10.65.0.0/32']\n[services.web]\nendpoints = ['203.0.113.10:80/tcp']\ndefault = "
RELAY = "[gateway.relay]\npool = 'relays'\n"


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (
            DEFAULT + "'unix:/a'",
            'services.web.default: unix:/a needs the relay: [gateway.relay] with pool = "NAME", a pool whose aliases it'
            " can stand on.",
        ),
        (
            RELAY + DEFAULT + "'unix:a'",
            'services.web.default: Must have an absolute path, or "@name" for an abstract socket, not "a".',
        ),
        (
            RELAY + DEFAULT + "'unix:@'",
            'services.web.default: Must have an absolute path, or "@name" for an abstract socket, not "@".',
        ),
        (
            RELAY + DEFAULT + f"'unix:/{'x' * 107}'",
            "services.web.default: Has a path of 108 bytes; at most 107 are possible.",
        ),
        (
            RELAY + DEFAULT + "{ address = 'unix-fd:/a', proxy_protocol = 'v2' }",
            "services.web.default.address: Gets the connection itself, and with it who the client is; proxy_protocol is"
            " for unix:/path.",
        ),
        (
            RELAY + DEFAULT + "{ address = 'unix:/a', external = true }",
            "services.web.default.external: Means nothing for a daemon on a unix socket.",
        ),
        (
            RELAY + DEFAULT + "{ address = '10.65.0.9:80', external = true, proxy_protocol = 'v2' }",
            'services.web.default.proxy_protocol: Means nothing but for "unix:/path"; other daemons see the client.',
        ),
        (
            RELAY + DEFAULT + "{ address = 'unix:/a', proxy_protocol = 'v1' }",
            'services.web.default.proxy_protocol: Must be "v2", not "v1".',
        ),
        (
            RELAY + DEFAULT + "'10.65.0.0:80'",
            "services.web.default: 10.65.0.0 is in the pool relays, whose aliases the relay gives away itself.",
        ),
        (
            RELAY + DEFAULT + "'unix:/a'\non_silence = 'unix:/b'\ninspect = ['http']",
            "services.web.on_silence: The pool relays has no alias left for unix:/b.",
        ),
        (
            "[gateway.relay]\npool = 'relay'\n" + DEFAULT + "'10.65.0.0:80'",
            'gateway.relay.pool: "relay" is not a pool; did you mean "relays"?',
        ),
        (
            RELAY + DEFAULT.replace("/tcp'", "/tcp', '203.0.113.10:80/udp'") + "'unix:/a'",
            "services.web.default: unix:/a can take TCP alone, and the service has UDP endpoints, too.",
        ),
    ],
)  # fmt: skip
def test_mistakes(written: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(written, "f.toml")
    assert str(caught.value) == f"f.toml: {problem}"


def test_the_relays_pool_is_for_nothing_else(lab: Lab) -> None:
    more = (
        "[services.e]\nendpoints = ['203.0.113.10:82/tcp']\ninspect = ['port-extension']\n"
        "extension_pool = { pool = 'relays', by = 'extension' }\n"
    )
    with pytest.raises(ConfigError, match=r"services\.e\.extension_pool\.pool: Is \"relays\", whose aliases the relay"):
        config.parse(text() + more, "f.toml")
    lab.publish(text())
    with pytest.raises(RequestError, match="relays is the relay's, which gives its aliases away itself"):
        lab.registry.leases.add("a", "relays", service=None, when={}, source=None, port=0, ttl=None, now=0)


def test_daemons_keep_their_aliases_whatever_comes_and_goes(lab: Lab) -> None:
    assert lab.publish(text("/a", "/b")).relayed == {"unix:/a": addresses(0), "unix:/b": addresses(1)}
    lab.start_anew()
    assert lab.publish(text("/new", "/b", quarantine=LONG)).relayed == {
        "unix:/new": addresses(2),
        "unix:/b": addresses(1),
    }
    # /a is not in use any more, but nobody else gets what stood for it a moment ago.
    assert lab.relay.places.keys() == {"unix:/a", "unix:/b", "unix:/new"}
    assert lab.publish(text("/newer", quarantine=LONG)).relayed == {"unix:/newer": addresses(3)}
    with pytest.raises(ConfigError, match="The pool relays has no alias left for unix:/newest"):
        lab.publish(text("/newest", quarantine=LONG))
    assert lab.publish(text("/a", quarantine=LONG)).relayed == {"unix:/a": addresses(0)}
    # Once the quarantine is over, the lowest that is free.
    lab.publish(text("/newer"))
    assert lab.relay.places == {"unix:/newer": addresses(3)}
    assert lab.publish(text("/x", "/newer")).relayed == {"unix:/x": addresses(0), "unix:/newer": addresses(3)}


def test_dynamic_routes_lead_there_once_the_relay_listens(lab: Lab) -> None:
    lab.publish(text("/a"))
    lab.relay.refuses = True
    with pytest.raises(KernelError):
        lab.put("b", "unix:/b")
    assert lab.shown() == {"a": (["unix:/a"], True)}
    lab.relay.refuses = False
    lab.put("b", "unix:/b")
    assert lab.relay.places.keys() == {"unix:/a", "unix:/b"}
    lab.put("c", {"address": "unix-fd:@c"})
    assert lab.relay.places == {"unix:/a": addresses(0), "unix:/b": addresses(1), "unix-fd:@c": addresses(2)}
    expected = {"a": (["unix:/a"], True), "b": (["unix:/b"], True), "c": (["unix-fd:@c"], True)}
    assert lab.shown() == expected
    lab.start_anew()
    lab.publish(text("/a"))
    assert lab.shown() == expected
    # As long as one leads there it is in use.
    lab.publish(text())
    assert lab.relay.places.keys() == {"unix:/b", "unix-fd:@c"}
    lab.registry.routes.remove("web", {"http.host": "b"}, None)
    lab.publish(text())
    assert lab.relay.places.keys() == {"unix-fd:@c"}


def test_routes_that_are_added_at_the_same_time_are_both_listened_for(lab: Lab) -> None:
    lab.publish(text())
    told = lab.relay.listen
    begun = threading.Event()

    def slowly(places: relays.Places, port: int) -> None:
        is_first = not begun.is_set()
        begun.set()
        time.sleep(0.2 if is_first else 0)
        told(places, port)

    lab.relay.listen = slowly  # type: ignore[method-assign]
    first = threading.Thread(target=lab.put, args=("b", "unix:/b"))
    first.start()
    assert begun.wait(10)
    lab.put("c", "unix:/c")
    first.join()
    assert lab.relay.places.keys() == {"unix:/b", "unix:/c"}


def test_what_is_refused(lab: Lab) -> None:
    lab.publish(text("/a", "/b", "/c", "/d"))
    with pytest.raises(RequestError, match="The pool relays has no alias left for unix:/e"):
        lab.put("e", "unix:/e")
    with pytest.raises(RequestError, match="absolute path"):
        lab.put("e", "unix:e")
    with pytest.raises(RequestError, match="whose aliases the relay gives away itself"):
        lab.put("e", "10.65.0.1:80")
    assert lab.shown().keys() == {"a", "b", "c", "d"}


def test_export_and_import(lab: Lab, tmp_path: Path) -> None:
    lab.publish(text("/a"))
    lab.put("b", "unix:/b")
    lab.put("c", {"address": "unix:/c", "proxy_protocol": "v2"})
    exported = b"".join(transfer.export(lab.registry))
    assert b'"target":["unix:/b"]' in exported
    assert b'"target":[{"address":"unix:/c","proxy_protocol":"v2"}]' in exported
    other = Lab(tmp_path / "other")
    other.publish(text("/z", "/y"))
    assert transfer.load(other.registry, exported).added == 2
    assert b"".join(transfer.export(other.registry)) == exported
    assert other.relay.places["unix:/c\0v2"] == addresses(3)
    other.registry.close()


def test_another_pool_is_another_place_and_old_routes_refuse(lab: Lab) -> None:
    lab.publish(text("/a"))
    lab.put("b", "unix:/b")
    moved = text("/a").replace("10.65.0.0/30", "10.66.0.0/30")
    lab.publish(moved)
    assert lab.shown() == {"a": (["unix:/a"], True), "b": (["unix:/b"], False)}
    lab.put("b", "unix:/b")
    assert lab.shown()["b"] == (["unix:/b"], True)
    # An alias that stood for /b is nobody else's while a route still leads there.
    assert lab.publish(text("/a", "/x", "/y")).relayed == {
        "unix:/a": addresses(0),
        "unix:/x": addresses(2),
        "unix:/y": addresses(3),
    }
    assert lab.shown()["b"] == (["unix:/b"], False)


def test_the_port_belongs_to_it(lab: Lab) -> None:
    lab.publish(text("/a"))
    lab.put("b", "unix:/b")
    registry = lab.registry
    other = config.parse(text("/a").replace('"relays"', '"relays"\nport = 1', 1), "f.toml", registry.relays.seats())
    registry.publish(other)
    assert lab.shown() == {"a": (["unix:/a"], True), "b": (["unix:/b"], False)}
    assert other.services[1].routes[0].targets[0].port == 1


def test_a_configuration_that_was_read_by_itself_cannot_take_what_is_anothers(lab: Lab) -> None:
    lab.publish(text("/a", quarantine=LONG))
    with pytest.raises(RegistryError, match=r"10\.65\.0\.0 stands for unix:/a, and cannot stand for unix:/b as well"):
        lab.registry.publish(config.parse(text("/b", quarantine=LONG), "f.toml"))
    assert lab.shown() == {"a": (["unix:/a"], True)}


def test_sessions_of_requests_cannot_lead_there(lab: Lab) -> None:
    sessions = '[services.tv]\nendpoints = ["203.0.113.10:554/tcp"]\ninspect = ["rtsp"]\n' + (
        '[services.tv.sessions]\nkey = "rtsp.session"\non_new_source = "deny"\n'
        'entries = [{ id = "1", target = "unix:/tv" }]\n'
    )
    lab.publish(text() + sessions)
    assert lab.relay.places == {"unix:/tv": addresses(0)}
    assert lab.registry.sessions.get("tv", "1").usable
    with pytest.raises(RequestError, match="only routes and what is in the file can lead there"):
        lab.registry.sessions.put("tv", "2", "unix:/tv", None)


def test_seats() -> None:
    pool = Pool("p", (ipaddress.ip_network("10.0.0.0/29"), ipaddress.ip_network("fd00::/127")))

    def ip(*texts: str) -> tuple[IPAddress, ...]:
        return tuple(ipaddress.ip_address(each) for each in texts)

    held = {"kept": ip("10.0.0.3"), "grown": ip("10.0.0.0"), "hindered": ip("10.0.0.1"), "elsewhere": ip("10.9.9.9")}
    holders = {address: name for name, addresses in held.items() for address in addresses}
    holders |= dict.fromkeys(ip("fd00::1"), "somebody")
    seats = Seats(held, lambda address, name: holders.get(address, name) != name)
    assert seats.place("new", pool) == ip("10.0.0.2")
    assert seats.place("new", pool) == seats.given["new"]
    assert seats.place("kept", pool) == ip("10.0.0.3")
    assert seats.place("grown", pool) == ip("10.0.0.0", "fd00::")
    assert seats.place("hindered", pool) == ip("10.0.0.4")
    assert [seats.place(name, pool) for name in ("elsewhere", "more", "last", "none")] == [
        ip("10.0.0.5"), ip("10.0.0.6"), ip("10.0.0.7"), None,
    ]  # fmt: skip
