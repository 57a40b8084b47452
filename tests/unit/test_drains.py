"""Drains: on the disk before they are acknowledged, and marked for every id that they are for."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerd import config
from steerd.control import transfer
from steerd.control.drains import DrainView
from steerd.control.places import parse_place
from steerd.control.registry import Registry
from steerd.control.states import States
from steerd.core.choice import Chooser
from steerd.core.engine import Decision, Engine
from steerd.errors import RegistryError, RequestError
from steerd.model import DEAD, DRAINED, TCP, Answer, Extension, Outcome, Reason
from steerd.wire import portext
from steerd.wire.packet import Packet

NOW = 1_800_000_000.5
SINCE = 1_800_000_000
TEXT = """
[pools.tenants]
prefixes = ["10.64.0.0/16", "fd00:64::/112"]
mode = "anyip"
[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension", "http"]
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
default = "10.64.200.1:8080"
routes = [
    { when = { http.host = "a.example" }, target = ["10.64.200.2:8080", "[fd00:64::2:2]:8080"] },
    { when = { http.host = "same.example" }, target = "10.64.200.3:same" },
    { when = { http.host = "out.example" }, target = { address = "192.0.2.1:80", external = true } },
]
""".replace("[fd00:64::2:2]", "[fd00:64::f002]")


class Lab:
    """A registry with a configuration in force, and a worker's eyes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.start()

    def start(self, text: str = TEXT) -> None:
        """As a daemon starts: the registry is as it was, and states know nothing."""
        self.states = States.create(str(self.directory), (1 << 23) - 1)
        self.registry = Registry(str(self.directory), states=self.states)
        self.publish(text)

    def publish(self, text: str) -> None:
        self.registry.publish(config.parse(text, "/etc/steerd.toml"))

    def restart(self) -> None:
        self.registry.close()
        self.start()

    def drain(self, target: str) -> bool:
        return self.registry.drains.add(target, NOW)[1]

    def decide(self, host: str, version: int = 4, extension: int = 0) -> Decision:
        reader = self.registry.reader()
        states = States.open(str(self.directory))
        plan = reader.refresh()
        engine = Engine(plan, reader.route, state=states.get, chooser=Chooser(reader.group, states.get))
        endpoint = ipaddress.ip_address("203.0.113.10" if version == 4 else "2001:db8::10")
        client = ipaddress.ip_address("192.0.2.9" if version == 4 else "2001:db8::9").packed
        options = portext.encode_ipv4(Extension(extension, 0), portext.Numbers()) if extension else b""
        packet = Packet(version, client, endpoint.packed, TCP, 1, 443, 0, 1, 0, options, b"", b"", b"")
        if extension:
            decision: Decision | Answer = engine.decide_syn(packet)
        else:
            decision = engine.decide_first(packet, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert isinstance(decision, Decision)
        reader.rest()
        return decision

    def ask(self, host: str, version: int = 4, extension: int = 0) -> str:
        """The target, or why not."""
        decision = self.decide(host, version, extension)
        if decision.outcome is not Outcome.STEER:
            return decision.reason.name
        return str(self.registry.reader().target(decision.target_id))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.registry.close()


def test_a_drained_target_takes_nobody_until_it_is_drained_no_more(lab: Lab) -> None:
    assert lab.ask("a.example") == "10.64.200.2:8080"
    assert lab.drain("10.64.200.2:8080")
    assert lab.ask("a.example") == "DRAINED"
    assert lab.ask("a.example", 6) == "[fd00:64::f002]:8080"
    assert lab.ask("other.example") == "10.64.200.1:8080"
    assert not lab.drain("10.64.200.2:8080")
    lab.registry.drains.remove("10.64.200.2:8080")
    assert lab.ask("a.example") == "10.64.200.2:8080"
    with pytest.raises(RequestError, match=r"10\.64\.200\.2:8080 is not drained"):
        lab.registry.drains.remove("10.64.200.2:8080")


def test_a_drain_of_an_address_is_for_all_its_ports(lab: Lab) -> None:
    lab.registry.routes.put("web", {"http.host": "b.example"}, "10.64.200.2:81", None)
    assert lab.drain("10.64.200.2")
    assert [lab.ask("a.example"), lab.ask("b.example")] == ["DRAINED"] * 2
    # Both at once: one of them may end.
    assert lab.drain("10.64.200.2:81")
    lab.registry.drains.remove("10.64.200.2")
    assert [lab.ask("a.example"), lab.ask("b.example")] == ["10.64.200.2:8080", "DRAINED"]


def test_arithmetic_and_routes_are_two_ways_to_one_target(lab: Lab) -> None:
    extension = 200 * 256 + 3
    lab.drain("10.64.200.2:8080")
    assert lab.ask("", extension=extension) == "DRAINED"
    assert lab.ask("", extension=extension + 1) == "10.64.200.3:8080"
    assert lab.ask("a.example") == "DRAINED"


def test_new_ids_of_a_drained_target_are_drained_from_the_first_packet_on(lab: Lab) -> None:
    lab.drain("10.64.0.77:9999")
    lab.drain("[fd00:64::77]")
    lab.registry.routes.put("web", {"http.host": "new.example"}, ["10.64.0.77:9999", "[fd00:64::77]:1"], None)
    assert [lab.ask("new.example"), lab.ask("new.example", 6)] == ["DRAINED"] * 2
    lab.registry.routes.put("web", {"http.host": "new.example"}, "10.64.0.77:9998", None)
    assert lab.ask("new.example") == "10.64.0.77:9998"
    # A configuration brings new ids, too, and blocks of them.
    lab.publish(TEXT.replace("port = 8080 }", "port = 9999 }"))
    assert lab.ask("", extension=78) == "DRAINED"
    assert lab.ask("", extension=79) == "10.64.0.78:9999"


def test_ids_of_a_transaction_that_failed_leave_no_mark_on_whoever_gets_them(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.drain("10.64.0.77:9999")
    with monkeypatch.context() as broken:
        broken.setattr(lab.registry.routes, "_settle", lambda _txn: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lab.registry.routes.put("web", {"http.host": "new.example"}, "10.64.0.77:9999", None)
    lab.registry.routes.put("web", {"http.host": "new.example"}, "10.64.0.78:9999", None)
    assert lab.ask("new.example") == "10.64.0.78:9999"


def test_drains_outlive_restarts_and_reloads(lab: Lab) -> None:
    drained = ["10.64.200.2:8080", "10.64.200.3:same", "192.0.2.1:80", "fd00:64::f002"]
    for target in drained:
        lab.drain(target)
    for text in (None, TEXT, TEXT + "# changed", TEXT):
        if text is None:
            lab.restart()
        else:
            lab.publish(text)
        assert lab.registry.drains.all() == [DrainView(target, SINCE) for target in sorted(drained)]
        assert lab.ask("a.example") == lab.ask("a.example", 6) == "DRAINED"
        assert lab.ask("same.example") == lab.ask("out.example") == "DRAINED"
        assert lab.ask("", extension=200 * 256 + 3) == "DRAINED"
        assert lab.ask("other.example") == "10.64.200.1:8080"


def test_a_drain_that_ends_while_its_target_is_out_of_use_is_over_when_that_is_back(lab: Lab) -> None:
    lab.drain("10.64.200.2:8080")
    without = TEXT.replace('extension_pool = { pool = "tenants", by = "extension", port = 8080 }', "")
    lab.publish(without)
    lab.registry.drains.remove("10.64.200.2:8080")
    lab.publish(TEXT)
    assert lab.ask("", extension=200 * 256 + 3) == "10.64.200.2:8080"
    lab.publish(without)
    lab.drain("10.64.200.2:8080")
    lab.publish(TEXT)
    assert lab.ask("", extension=200 * 256 + 3) == "DRAINED"


def test_what_is_not_on_the_disk_does_not_drain(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(lab.registry._store, "writing", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lab.drain("10.64.200.2:8080")
    assert lab.registry.drains.all() == []
    assert lab.ask("a.example") == "10.64.200.2:8080"


def test_other_states_stay(lab: Lab) -> None:
    target_id = lab.decide("a.example").target_id
    lab.states.put(target_id, DEAD[TCP], True)
    lab.drain("10.64.200.2:8080")
    assert lab.states.get(target_id) == DRAINED | DEAD[TCP]
    lab.registry.drains.remove("10.64.200.2:8080")
    assert lab.states.get(target_id) == DEAD[TCP]


def test_a_group_goes_on_with_those_that_are_not_drained(lab: Lab) -> None:
    lab.registry.routes.put("web", {"http.host": "n.example"}, ["10.64.0.1:1", "10.64.0.2:1"], None, "first-alive")
    lab.drain("10.64.0.1")
    assert lab.ask("n.example") == "10.64.0.2:1"
    lab.drain("10.64.0.2:1")
    assert lab.decide("n.example").reason is Reason.DRAINED


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("10.64.0.1:0", "invalid", "is no target"),
        ("10.64.0.1:65536", "invalid", "is no target"),
        ("10.64.0.1:x", "invalid", "is no target"),
        ("10.64.0.1:²", "invalid", "is no target"),
        ("a.example:80", "invalid", "is no target"),
        ("[fd00:64::1", "invalid", "is no target"),
        ("[fd00:64::1]80", "invalid", "is no target"),
        ("[10.64.0.1]:80", "invalid", "is no target"),
        ("fe80::1%eth0", "invalid", "is no target"),
        ("", "invalid", "is no target"),
        ("10.99.0.1:80", "not_found", r"10\.99\.0\.1 is in no pool, and nothing leads there"),
        ("10.64.200.3:443", "conflict", r"keeps the port that the client used; drain 10\.64\.200\.3 as a whole"),
    ],
)
def test_what_can_not_be_drained(lab: Lab, target: str, code: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        lab.drain(target)
    assert (caught.value.code, caught.value.field) == (code, "target")
    assert lab.registry.drains.all() == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("10.64.0.1", "10.64.0.1"),
        ("10.64.0.1:80", "10.64.0.1:80"),
        ("10.64.0.1:same", "10.64.0.1:same"),
        ("fd00:64::1", "fd00:64::1"),
        ("[fd00:64::1]", "fd00:64::1"),
        ("[FD00:64:0::1]:80", "[fd00:64::1]:80"),
        ("[fd00:64::1]:same", "[fd00:64::1]:same"),
    ],
)
def test_how_a_target_is_written(written: str, shown: str) -> None:
    assert str(parse_place(written)) == shown
    assert parse_place(shown) == parse_place(written)


def test_drains_are_exported_and_imported(lab: Lab, tmp_path: Path) -> None:
    for target in ("fd00:64::f002", "10.64.200.2:8080", "10.64.200.2"):
        lab.drain(target)
    text = b"".join(transfer.export(lab.registry))
    assert [line for line in text.decode().splitlines() if "drain" in line] == [
        f'{{"kind":"drain","target":"{target}","since":{SINCE}}}'
        for target in ("10.64.200.2", "10.64.200.2:8080", "fd00:64::f002")
    ]
    (tmp_path / "other").mkdir()
    other = Lab(tmp_path / "other")
    assert transfer.load(other.registry, text) == transfer.Loaded(added=3)
    assert b"".join(transfer.export(other.registry)) == text
    assert transfer.load(other.registry, text) == transfer.Loaded(unchanged=3)
    assert other.ask("a.example") == other.ask("a.example", 6) == "DRAINED"
    other.registry.close()


def test_there_is_nothing_to_drain_before_there_is_a_configuration(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path))
    with pytest.raises(RegistryError, match="holds no configuration yet"):
        registry.drains.add("10.64.0.1", NOW)
    registry.close()
