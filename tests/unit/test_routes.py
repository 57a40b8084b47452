"""Dynamic routes: put and removed while everything runs, beside those of the configuration and by the same rules."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerd import config
from steerd.config.texts import parse_target
from steerd.control import routes as routes_module
from steerd.control.registry import Registry
from steerd.core.choice import Chooser, Group
from steerd.core.engine import Engine, no_state
from steerd.errors import RegistryError, RequestError, SteerdError
from steerd.model import TCP, Answer, Outcome
from steerd.wire import wireguard
from steerd.wire.packet import Packet

TEXT = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
mode = "anyip"

[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["http", "prefix", "regex"]

[[services.web.routes]]
when = { "http.host" = "static.example" }
target = ["10.64.0.1:8080", "[fd00:64::1]:8080"]

[[services.web.routes]]
when = { "http.host" = "*.wide.example" }
source = "198.51.100.0/24"
target = "10.64.0.2:same"

[services.other]
endpoints = ["203.0.113.10:80/tcp"]
inspect = ["http"]
default = "10.64.0.99:80"
"""
HOST = {"http.host": "a.example"}


class Shown(NamedTuple):
    """What a list says of a route."""

    when: dict[str, str]
    source: str | None
    targets: list[str]
    origin: str
    usable: bool


class Lab:
    """A registry with a configuration in force."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.registry = Registry(str(directory))
        self.publish(TEXT)

    def publish(self, text: str) -> None:
        self.registry.publish(config.parse(text, "/etc/steerd.toml"))

    def put(self, when: Mapping[str, object], target: object, source: str | None = None, service: str = "web") -> bool:
        return self.registry.routes.put(service, when, target, source)[1]

    def remove(self, when: Mapping[str, object], source: str | None = None, service: str = "web") -> None:
        self.registry.routes.remove(service, when, source)

    def views(self, service: str = "web", limit: int = 1000) -> list[Shown]:
        found: list[Shown] = []
        after: str | None = ""
        while after is not None:
            views, after = self.registry.routes.page(service, after, limit)
            found += [Shown(view.when, view.source, view.targets, view.origin, view.usable) for view in views]
        return found

    def reopen(self) -> None:
        self.registry.close()
        self.registry = Registry(str(self.directory))

    def worker(self) -> Worker:
        return Worker(self.registry)


class Worker:
    """What a worker does."""

    def __init__(self, registry: Registry) -> None:
        self.reader = registry.reader()
        self.chooser = Chooser(self.reader.group, no_state)
        self.engine: Engine | None = None
        self.refreshed = 0

    def decide(self, payload: str, source: str = "192.0.2.1", version: int = 4, port: int = 443) -> str | None:
        if self.reader.advance() or self.engine is None:
            self.engine = Engine(self.reader.refresh(), self.reader.route, chooser=self.chooser)
            self.refreshed += 1
        endpoint = ipaddress.ip_address("203.0.113.10" if version == 4 else "2001:db8::10")
        client = ipaddress.ip_address(source).packed
        packet = Packet(version, client, endpoint.packed, TCP, 1, port, 0, 1, 0, b"", b"", b"", b"")
        decision = self.engine.decide_first(packet, payload.encode("latin-1"))
        assert decision is not Answer.NEED_MORE
        self.reader.rest()
        return str(self.reader.target(decision.target_id)) if decision.outcome is Outcome.STEER else None

    def ask(self, host: str, source: str = "192.0.2.1", version: int = 4, port: int = 443) -> str | None:
        return self.decide(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n", source, version, port)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.registry.close()


def refused(lab: Lab, *arguments: object) -> tuple[str, str | None, str]:
    with pytest.raises(RequestError) as caught:
        lab.put(*arguments)  # type: ignore[arg-type]
    return caught.value.code, caught.value.field, caught.value.message


# ---- put, change, remove ----


def test_a_route_counts_for_the_next_packet_and_no_worker_reads_its_plan_again(lab: Lab) -> None:
    worker = lab.worker()
    assert worker.ask("a.example") is None
    assert lab.put(HOST, ["10.64.0.5:80", "[fd00:64::5]:81"])
    assert worker.ask("a.example") == "10.64.0.5:80"
    assert worker.ask("a.example", "2001:db8::7", 6) == "[fd00:64::5]:81"
    before = worker.refreshed
    assert before == 2  # static routes have the same shape, but no dynamic one had it
    assert lab.put({"http.host": "b.example"}, "10.64.0.6:80")
    assert not lab.put(HOST, "10.64.0.7:80")
    assert worker.ask("b.example") == "10.64.0.6:80"
    assert worker.ask("a.example") == "10.64.0.7:80"
    assert worker.ask("a.example", "2001:db8::7", 6) is None
    lab.remove(HOST)
    assert worker.ask("a.example") is None
    assert worker.ask("b.example") == "10.64.0.6:80"
    assert worker.refreshed == before


# ---- several targets ----

SEVERAL = ["10.64.0.5:80", "10.64.0.6:80", "[fd00:64::5]:80", "[fd00:64::6]:80", "[fd00:64::7]:80"]


def in_use(lab: Lab) -> list[list[str]]:
    return [[str(member.target) for member in group.members] for group in lab.registry.groups_in_use()]


def test_several_targets_of_a_family_are_a_group(lab: Lab) -> None:
    worker = lab.worker()
    view, is_new = lab.registry.routes.put("web", HOST, SEVERAL, None, "round-robin")
    assert (view.targets, view.choose, view.hash, view.usable, is_new) == (SEVERAL, "round-robin", None, True, True)
    assert lab.views()[-1] == (HOST, None, SEVERAL, "dynamic", True)
    assert {worker.ask("a.example", f"192.0.2.{n}") for n in range(4)} == {"10.64.0.5:80", "10.64.0.6:80"}
    assert {worker.ask("a.example", f"2001:db8::{n}", 6) for n in range(6)} == set(SEVERAL[2:])
    assert in_use(lab) == [SEVERAL[:2], SEVERAL[2:]]
    # Another choice is another route to the same; the same again changes nothing.
    view, _ = lab.registry.routes.put("web", HOST, SEVERAL[:3], None, "hash", "http.cookie.sid")
    assert (view.targets, view.choose, view.hash) == (SEVERAL[:3], "hash", "http.cookie.sid")
    assert worker.ask("a.example", "2001:db8::1", 6) == SEVERAL[2]
    assert in_use(lab) == [SEVERAL[:2]]
    with lab.registry.reading() as txn:
        assert not lab.registry.routes.is_used(txn, ipaddress.ip_address("fd00:64::7").packed)
        assert lab.registry.routes.is_used(txn, ipaddress.ip_address("10.64.0.6").packed)
    lab.reopen()
    lab.publish(TEXT)
    assert lab.views()[-1] == (HOST, None, SEVERAL[:3], "dynamic", True)
    assert in_use(lab) == [SEVERAL[:2]]
    lab.remove(HOST)
    assert in_use(lab) == []


def test_a_group_is_made_once_and_its_id_never_means_anything_else(lab: Lab) -> None:
    def groups() -> set[tuple[int, Group]]:
        with lab.registry.reading() as txn:
            found = lab.registry.routes.groups_in_use(txn)
        reader = lab.registry.reader()
        return {(id_, group) for id_ in found if (group := reader.group(id_)) is not None}

    lab.registry.routes.put("web", HOST, SEVERAL[:2], None, "hash")
    before = groups()
    lab.registry.routes.put("web", {"http.host": "b.example"}, SEVERAL[:2], None, "hash")
    assert groups() == before
    lab.remove(HOST)
    assert groups() == before
    lab.registry.routes.put("web", {"http.host": "b.example"}, SEVERAL[1::-1], None, "hash")
    after = groups()
    assert after != before
    lab.registry.routes.put("web", HOST, SEVERAL[:2], None, "hash")
    assert groups() == before | after


def test_a_group_is_for_use_while_all_its_members_are(lab: Lab) -> None:
    worker = lab.worker()
    targets = ["10.64.0.5:80", {"address": "192.0.2.9:80", "external": True}]
    lab.registry.routes.put("web", HOST, targets, None, "first-alive")
    assert worker.ask("a.example") == "10.64.0.5:80"
    lab.publish(TEXT.replace("10.64.0.0/24", "10.64.0.0/25").replace("10.64.0.99", "10.64.0.9"))
    assert worker.ask("a.example") == "10.64.0.5:80"
    moved = TEXT.replace("10.64.0.", "10.65.0.")
    lab.publish(moved)
    assert lab.views()[-1] == (HOST, None, ["10.64.0.5:80", "192.0.2.9:80"], "dynamic", False)
    assert worker.ask("a.example") is None
    lab.publish(TEXT)
    assert worker.ask("a.example") == "10.64.0.5:80"


def test_static_groups_and_those_of_defaults_are_in_use_too(lab: Lab) -> None:
    text = TEXT.replace('default = "10.64.0.99:80"', 'default = ["10.64.0.98:80", "10.64.0.99:80"]\nchoose = "hash"')
    text = text.replace(
        '["10.64.0.1:8080", "[fd00:64::1]:8080"]', '["10.64.0.1:80", "10.64.0.3:80"]\nchoose = "round-robin"'
    )
    lab.publish(text)
    assert in_use(lab) == [["10.64.0.1:80", "10.64.0.3:80"], ["10.64.0.98:80", "10.64.0.99:80"]]
    views, _ = lab.registry.routes.page("web", "", 1)
    assert (views[0].targets, views[0].choose) == (["10.64.0.1:80", "10.64.0.3:80"], "round-robin")
    lab.publish(TEXT)
    assert in_use(lab) == []


def test_what_several_targets_must_be(lab: Lab) -> None:
    put = lab.registry.routes.put
    for arguments, field, message in (
        ((SEVERAL, None), "target[1]", "choose must say how one is chosen"),
        ((SEVERAL, None, "any"), "choose", 'not "any"'),
        ((SEVERAL, None, "hash", "tls.sni"), "hash", "which inspect does not name"),
        ((SEVERAL, None, None, "http.host"), "hash", 'unless choose = "hash"'),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            put("web", HOST, *arguments)
        assert (caught.value.code, caught.value.field) == ("invalid", field)


# ---- the plan ----


def test_the_first_route_of_a_shape_and_the_last_one_change_the_plan(lab: Lab) -> None:
    worker = lab.worker()
    when = {"http.host": "*.example", "http.path": "/api/*"}
    worker.ask("a.example")
    lab.put(when, "[fd00:64::5]:80", "2001:db8::/32")
    assert worker.ask("a.example") is None
    probes = len(lab.registry.routes.force.config.services[1].routes) + 1
    assert worker.engine is not None
    assert len(worker.reader.refresh().services[1].probes) == probes
    lab.remove(when, "2001:db8::/32")
    assert len(worker.reader.refresh().services[1].probes) == probes - 1


def test_everything_is_there_after_a_restart(lab: Lab) -> None:
    lab.put(HOST, "10.64.0.5:80")
    lab.put({"http.path": "/" + "x" * 600}, "10.64.0.6:80", "198.51.100.0/24")
    lab.put(HOST, {"address": "192.0.2.9:80", "external": True}, None, "other")
    views = lab.views(), lab.views("other")
    assert views[0][2:] == [
        (HOST, None, ["10.64.0.5:80"], "dynamic", True),
        ({"http.path": "/" + "x" * 600}, "198.51.100.0/24", ["10.64.0.6:80"], "dynamic", True),
    ]
    lab.reopen()
    with pytest.raises(RegistryError, match=r"^the registry holds no configuration yet"):
        lab.put(HOST, "10.64.0.5:80")
    lab.publish(TEXT)
    assert (lab.views(), lab.views("other")) == views
    worker = lab.worker()
    assert worker.ask("a.example") == "10.64.0.5:80"
    assert worker.ask("a.example", port=80) == "192.0.2.9:80"
    assert worker.decide(f"GET /{'x' * 600} HTTP/1.1\r\nHost: z\r\n\r\n", "198.51.100.9") == "10.64.0.6:80"


def test_lists_come_in_pages(lab: Lab) -> None:
    for number in range(25):
        lab.put({"http.host": f"h{number}.example"}, f"10.64.0.{number}:80")
    lab.put({"http.host": "*.example"}, "10.64.0.3:80")
    whole = lab.views()
    assert len(whole) == 28
    assert [origin for *_, origin, _ in whole] == ["static"] * 2 + ["dynamic"] * 26
    for limit in (1, 2, 3, 7, 27, 28):
        assert lab.views(limit=limit) == whole
    assert lab.registry.routes.count("web") == (2, 26)
    for token in ("x", "s", "d", "dzz", "d00", "s-1"):
        with pytest.raises(RequestError, match="the page before"):
            lab.registry.routes.page("web", token, 10)


@pytest.mark.parametrize("condition", ["prefix", "regex"])
def test_patterns_that_a_parser_must_know_get_to_it(lab: Lab, condition: str) -> None:
    text = {"prefix": "SSH-", "regex": "^SSH-[12]"}[condition]
    worker = lab.worker()
    assert worker.decide("SSH-2.0-x\r\n") is None
    lab.put({condition: text}, "10.64.0.5:80")
    assert worker.decide("SSH-2.0-x\r\n") == "10.64.0.5:80"
    more = {"prefix": "hex:fe0102", "regex": "^\xfe\x01\x02"}[condition]
    lab.put({condition: more}, "10.64.0.6:80")
    assert worker.decide("\xfe\x01\x02\x03\r\n") == "10.64.0.6:80"
    lab.publish(TEXT)
    assert worker.decide("\xfe\x01\x02\x03\r\n") == "10.64.0.6:80"
    assert {shown.when[condition]: shown.targets for shown in lab.views() if shown.origin == "dynamic"} == {
        text: ["10.64.0.5:80"],
        more: ["10.64.0.6:80"],
    }
    lab.remove({condition: text})
    assert worker.decide("SSH-2.0-x\r\n") is None


# ---- what is refused ----


def test_what_the_configuration_would_refuse_is_refused_with_the_same_sentences(lab: Lab) -> None:
    assert refused(lab, HOST, "10.65.0.1:80") == (
        "invalid",
        "target",
        "10.65.0.1 is in no pool (tenants: 10.64.0.0/24, fd00:64::/120); use an alias, or say that"
        " it is external (steerctl: --external; in JSON:"
        ' "external": true).',
    )
    assert refused(lab, {"tls.sni": "a"}, "10.64.0.5:80") == (
        "invalid",
        "when.tls.sni",
        'Is a key of the parser "tls", which inspect does not name.',
    )
    assert refused(lab, {}, "10.64.0.5:80")[:2] == ("invalid", None)
    assert refused(lab, HOST, "10.64.0.5:80", "198.51.100.1/24")[:2] == ("invalid", "source")
    assert refused(lab, HOST, None)[:2] == ("invalid", "target")
    assert refused(lab, HOST, [])[:2] == ("invalid", "target")
    assert refused(lab, HOST, "10.64.0.5:80", None, "nobody") == (
        "not_found",
        "service",
        "nobody is not a service of /etc/steerd.toml.",
    )
    assert refused(lab, HOST, {"address": "10.64.0.5:80", "wildcard": True})[:2] == ("invalid", "target")
    assert lab.put(HOST, "10.64.0.5:80")  # mistakes leave nothing behind


def test_a_route_of_the_configuration_is_not_for_the_api(lab: Lab) -> None:
    sentence = "The same route is in /etc/steerd.toml: services.web.routes[1]; change it there, and reload."
    when = {"http.host": "*.wide.example"}
    assert refused(lab, when, "10.64.0.5:80", "198.51.100.0/24") == ("conflict", "when", sentence)
    there = r"^The route is in /etc/steerd\.toml, as services\.web\.routes\[1\]; take it out there, and reload\.$"
    with pytest.raises(RequestError, match=there):
        lab.remove(when, "198.51.100.0/24")
    assert lab.put(when, "10.64.0.5:80")  # another source is another route
    with pytest.raises(RequestError, match=r"^The service web has no such route\.$"):
        lab.remove({"http.host": "never.example"})


def test_a_route_that_ties_with_another_is_refused(lab: Lab) -> None:
    lab.put({"http.header.x": "1"}, "10.64.0.5:80")
    sentence = (
        'Ties with the dynamic route {"http.header.x":"1"}: one connection can match both, and neither comes first;'
        " add a condition."
    )
    assert refused(lab, {"http.header.y": "2"}, "10.64.0.6:80") == ("conflict", "when", sentence)
    assert lab.put({"http.header.y": "2"}, "10.64.0.6:80", "198.51.100.0/24")  # the source makes it another
    assert lab.put({"http.header.x": "2"}, "10.64.0.6:80")
    lab.remove({"http.header.x": "1"})
    lab.remove({"http.header.x": "2"})
    assert lab.put({"http.header.y": "2"}, "10.64.0.6:80")


def test_a_tie_with_the_configuration_names_its_place(lab: Lab) -> None:
    when = {"http.host": "wide.example*"}  # as long as `*.wide.example`, which begins with a dot
    lab.publish(
        TEXT.replace('source = "198.51.100.0/24"\n', "")
        .replace("*.wide.example", "*wide.example")
        .replace("*wide", "*.wide")
    )
    assert refused(lab, {"http.host": "wide.example.*"}, "10.64.0.5:80")[2].startswith(
        "Ties with services.web.routes[1] of /etc/steerd.toml:"
    )
    assert lab.put(when, "10.64.0.5:80")


def test_more_shapes_than_can_be_tried_are_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "MAX_PROBES", 3)
    lab.put({"http.path": "/a"}, "10.64.0.5:80")
    assert "and no more can be looked up" in refused(lab, {"http.method": "GET"}, "10.64.0.5:80")[2]
    lab.put({"http.path": "/b"}, "10.64.0.5:80")


def test_where_something_fails_nothing_has_changed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the disk and in memory: the next change builds on what is there."""
    worker = lab.worker()
    worker.ask("a.example")
    before = lab.views()

    def full(*_: object) -> None:
        raise RegistryError("the registry cannot be written: no space")

    with monkeypatch.context() as broken:
        broken.setattr(lab.registry._store, "put_plan", full)
        with pytest.raises(RegistryError, match="no space"):
            lab.put({"http.path": "/a"}, "10.64.0.5:80")
    assert lab.views() == before
    assert lab.registry.routes.count("web") == (2, 0)
    assert lab.put({"http.path": "/a"}, "10.64.0.5:80")
    assert worker.decide("GET /a HTTP/1.1\r\nHost: z\r\n\r\n") == "10.64.0.5:80"


# ---- a new configuration ----


def test_routes_outlive_a_time_without_their_service_or_parser(lab: Lab) -> None:
    lab.put(HOST, "10.64.0.5:80", None, "other")
    lab.put({"regex": "^x"}, "10.64.0.5:80")
    without = TEXT[: TEXT.index("[services.other]")].replace(', "regex"', "")
    lab.publish(without)
    worker = lab.worker()
    assert worker.ask("a.example", port=80) is None
    assert [usable for *_, usable in lab.views()] == [True, True, False]
    lab.publish(TEXT)
    assert worker.ask("a.example", port=80) == "10.64.0.5:80"
    assert worker.decide("xyz\r\n") == "10.64.0.5:80"


def test_a_new_static_route_goes_before_an_equal_dynamic_one_until_it_is_gone(lab: Lab) -> None:
    lab.put(HOST, "10.64.0.5:80")
    worker = lab.worker()
    lab.publish(TEXT.replace("static.example", "a.example"))
    assert worker.ask("a.example") == "10.64.0.1:8080"
    assert lab.views()[2] == (HOST, None, ["10.64.0.5:80"], "dynamic", False)
    lab.publish(TEXT)
    assert worker.ask("a.example") == "10.64.0.5:80"


def test_a_route_whose_alias_is_gone_is_refused_until_it_is_back(lab: Lab) -> None:
    """And not left to another route, which would be a guess."""
    lab.put(HOST, ["10.64.0.5:80", "[fd00:64::5]:80"])
    lab.put({"http.host": "*.example"}, ["10.64.0.200:80", "[fd00:64::6]:80"])
    lab.put({"http.host": "b.example"}, {"address": "192.0.2.9:80", "external": True})
    worker = lab.worker()
    smaller = TEXT.replace("10.64.0.0/24", "10.64.0.128/25").replace("10.64.0.1:8080", "10.64.0.129:8080")
    smaller = smaller.replace("10.64.0.2:same", "10.64.0.130:same").replace("10.64.0.99", "10.64.0.199")
    for text in (smaller, smaller, smaller.replace("8080", "8081")):
        lab.publish(text)
        assert worker.ask("a.example") is None
        assert worker.ask("a.example", "2001:db8::7", 6) == "[fd00:64::5]:80"
        assert worker.ask("c.example") == "10.64.0.200:80"
        assert worker.ask("b.example") == "192.0.2.9:80"
    assert (HOST, None, ["10.64.0.5:80", "[fd00:64::5]:80"], "dynamic", False) in lab.views()
    assert not lab.put(HOST, "10.64.0.205:80")
    assert worker.ask("a.example") == "10.64.0.205:80"
    assert not lab.put({"http.host": "b.example"}, {"address": "10.64.0.5:80", "external": True})
    lab.publish(TEXT)
    assert worker.ask("b.example") == "10.64.0.5:80"
    # An external target that has become an endpoint would be a loop.
    lab.put({"http.host": "b.example"}, {"address": "192.0.2.9:80", "external": True})
    lab.publish(TEXT.replace("203.0.113.10:80/tcp", "192.0.2.9:80/tcp"))
    assert worker.ask("b.example") is None


def test_of_two_configurations_that_cannot_be_published_the_first_stays(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.put({"http.path": "/a"}, "10.64.0.5:80")
    worker = lab.worker()
    monkeypatch.setattr("steerd.core.router.MAX_PROBES", 3)
    more = TEXT.replace(
        "[services.other]",
        '[[services.web.routes]]\nwhen = { "http.method" = "GET" }\ntarget = "10.64.0.4:80"\n[services.other]',
    )
    with pytest.raises(SteerdError, match=r"the routes of the service web cannot be looked up: Routes of 4"):
        lab.publish(more)
    assert worker.decide("GET /a HTTP/1.1\r\nHost: z\r\n\r\n") == "10.64.0.5:80"
    assert worker.ask("static.example") == "10.64.0.1:8080"
    lab.put({"http.path": "/b"}, "10.64.0.5:80")


# ---- against a model ----

HOSTS = ("a.example", "b.example", "*.example", "a.*", "static.example")
operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "remove", "publish", "reopen"]),
        st.fixed_dictionaries(
            {}, optional={"http.host": st.sampled_from(HOSTS), "http.path": st.sampled_from(["/", "/a*"])}
        ),
        st.sampled_from([None, "198.51.100.0/24", "2001:db8::/32"]),
        st.integers(0, 5),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(operations)
def test_what_is_acknowledged_is_what_is_there(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, dict[str, object], str | None, int]]
) -> None:
    lab = Lab(tmp_path_factory.mktemp("registry"))
    model: dict[tuple[object, ...], str] = {}
    for verb, when, source, number in steps:
        key = (tuple(sorted(when.items())), source)
        target = f"10.64.0.{number}:80" if source != "2001:db8::/32" else f"[fd00:64::{number + 1}]:80"
        if verb == "put":
            try:
                assert lab.put(when, target, source) is (key not in model)
                model[key] = target
            except RequestError as error:
                assert error.code == ("conflict" if when else "invalid") or source is None
        elif verb == "remove" and key in model:
            lab.remove(when, source)
            del model[key]
        elif verb == "reopen":
            lab.reopen()
            lab.publish(TEXT)
        elif verb == "publish":
            lab.publish(TEXT)
        found = {
            (tuple(sorted(shown.when.items())), shown.source): shown.targets[0]
            for shown in lab.views()
            if shown.origin == "dynamic"
        }
        assert found == model
    with lab.registry._store.env.begin() as txn:
        uses = dict(txn.cursor(db=lab.registry.routes._uses))
    expected: dict[bytes, int] = {}
    for target in model.values():
        packed = parse_target(target).address.packed
        expected[packed] = expected.get(packed, 0) + 1
    assert {address: int.from_bytes(packed, "big") for address, packed in uses.items()} == expected
    lab.registry.close()


# ---- datagrams ----

DATAGRAMS = """
[pools.tenants]
prefixes = ["10.64.0.0/24"]
[services.tunnels]
endpoints = ["203.0.113.10:51820/udp"]
inspect = ["wireguard", "prefix"]
routes = [{ when.wireguard.public-key = "aGfFP/CshhRguvtn5UD4kh1DeIYBSOVotdR5YzEMADQ=", target = "10.64.0.1:51820" }]
"""


def wireguard_key(number: int) -> str:
    return base64.b64encode(number.to_bytes(32)).decode()


def test_parsers_of_datagrams_know_the_values_of_all_routes(lab: Lab) -> None:
    lab.publish(DATAGRAMS)

    def patterns() -> dict[str, list[str]]:
        reader = lab.registry.reader()
        (service,) = reader.refresh().services
        reader.rest()
        return {parser.name: parser.patterns for parser in service.datagram_parsers}

    static = "aGfFP/CshhRguvtn5UD4kh1DeIYBSOVotdR5YzEMADQ="
    assert patterns() == {"wireguard": [static], "prefix": []}
    lab.put({"wireguard.public-key": wireguard_key(1)}, "10.64.0.2:51820", service="tunnels")
    lab.put({"prefix": "hello"}, "10.64.0.3:51820", service="tunnels")
    assert patterns() == {"wireguard": [wireguard_key(1), static], "prefix": ["hello"]}
    lab.remove({"wireguard.public-key": wireguard_key(1)}, service="tunnels")
    assert patterns() == {"wireguard": [static], "prefix": ["hello"]}


def test_more_values_than_a_parser_can_know_are_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker could not make its engine of such a plan."""
    monkeypatch.setattr(wireguard, "MAX_KEYS", 2)
    lab.publish(DATAGRAMS)
    lab.put({"wireguard.public-key": wireguard_key(1)}, "10.64.0.2:51820", service="tunnels")
    many = "^the routes of the service tunnels have values that its parser wireguard cannot take: 3 public keys"
    with pytest.raises(RegistryError, match=many):
        lab.put({"wireguard.public-key": wireguard_key(2)}, "10.64.0.2:51820", service="tunnels")
    assert [view.when for view in lab.views("tunnels")][1:] == [{"wireguard.public-key": wireguard_key(1)}]
    more = DATAGRAMS.replace("routes = [", f'routes = [{{ when.wireguard.public-key = "{wireguard_key(3)}",'
                             ' target = "10.64.0.1:1" }, ')  # fmt: skip
    with pytest.raises(RegistryError, match=many):
        lab.publish(more)
