"""The session table: sessions of the configuration and of the API side by side, on the disk before anybody is told, and
never a session at a target that the configuration in force does not allow."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerd import config
from steerd.control.registry import Registry
from steerd.control.sessions import SessionView
from steerd.core.engine import Plan
from steerd.core.marks import FIRST_TARGET_ID
from steerd.core.sessions import Claim, OnNewSource
from steerd.errors import RegistryError, RequestError
from steerd.model import Target
from tests.unit.test_registry import another_process, reading

TEXT = """
[gateway]
mark_bits = "{mark_bits}"
[pools.p]
prefixes = [{pools}]
mode = "anyip"
[services.tv]
endpoints = ["203.0.113.10:554/tcp", "[2001:db8::10]:554/tcp"]
inspect = ["rtsp"]
default = "{default}"
[services.tv2]
endpoints = ["203.0.113.11:554/tcp"]
inspect = ["rtsp"]
default = "{default}"
"""
SESSIONS = """
[services.{name}.sessions]
key = "rtsp.session"
on_new_source = "{rule}"
entries = [{entries}]
"""
BOTH = '"10.64.0.0/24", "fd00:64::/120"'
A, B = "198.51.100.7", "198.51.100.8"


def entry(session_id: str, target: str = "10.64.0.1:554", source: str | None = None) -> str:
    """One of the configuration's sessions."""
    written = f', source = "{source}"' if source else ""
    return f'{{ id = "{session_id}", target = "{target}"{written} }}'


def publish(
    registry: Registry,
    *entries: str,
    rule: OnNewSource = "deny",
    pools: str = BOTH,
    default: str = "10.64.0.200:554",
    mark_bits: str = "8-31",
    services: tuple[str, ...] = ("tv", "tv2"),
) -> Plan:
    """Put a configuration in force whose service `tv` has these sessions, and `tv2` none (but a key)."""
    text = TEXT.format(pools=pools, default=default, mark_bits=mark_bits)
    for name in services:
        listed = ",\n".join(entries) if name == "tv" else ""
        text += SESSIONS.format(name=name, rule=rule, entries=listed)
    return registry.publish(config.parse(text, "steerd.toml"))


def all_of(registry: Registry, service: str = "tv") -> dict[str, tuple[list[str], str | None, str, bool]]:
    """Everything that the table says of a service's sessions."""
    return {v.id: (v.targets, v.source, v.origin, v.usable) for v in registry.sessions.page(service, "", 10**6)}


def claim(registry: Registry, session_id: str, source: str, *, exclusive: bool) -> int:
    """Claim a session for a source, by the serial that it has now; returns how many sources changed."""
    found = registry.sessions.find("tv", session_id)
    assert found is not None
    packed = ipaddress.ip_address(source).packed
    return registry.sessions.claim([Claim("tv", session_id, found.serial, packed, exclusive)])


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(str(tmp_path))
    publish(made)
    yield made
    made.close()


@contextlib.contextmanager
def reopened(registry: Registry, tmp_path: Path) -> Iterator[Registry]:
    registry.close()
    again = Registry(str(tmp_path))
    yield again
    again.close()


# ---- the API's ----


def test_a_session_is_there_until_it_is_removed(registry: Registry) -> None:
    view, is_new = registry.sessions.put("tv", "d1", "10.64.0.1:554", A)
    assert is_new
    assert view == SessionView("tv", "d1", ["10.64.0.1:554"], A, "api", True)
    assert registry.sessions.get("tv", "d1") == view
    other, _ = registry.sessions.put("tv2", "d1", {"address": "192.0.2.7:same", "external": True}, None)
    assert other == SessionView("tv2", "d1", ["192.0.2.7:same"], None, "api", True)
    assert registry.sessions.get("tv", "d1") == view
    registry.sessions.remove("tv", "d1")
    assert all_of(registry) == {}
    assert all_of(registry, "tv2") == {"d1": (["192.0.2.7:same"], None, "api", True)}
    assert registry.sessions.find("tv", "d1") is None


def test_a_session_has_a_target_of_each_family(registry: Registry) -> None:
    view, _ = registry.sessions.put("tv", "d1", ["[fd00:64::1]:554", "10.64.0.1:80"], "2001:db8:1::7")
    assert (view.targets, view.source) == (["10.64.0.1:80", "[fd00:64::1]:554"], "2001:db8:1::7")
    found = registry.sessions.find("tv", "d1")
    assert found is not None
    assert found.source == ipaddress.ip_address("2001:db8:1::7").packed
    assert {found.ipv4, found.ipv6} == {FIRST_TARGET_ID + 1, FIRST_TARGET_ID + 2}


def test_what_is_defined_anew_begins_anew(registry: Registry) -> None:
    """Another serial, so that no claim on the old session reaches the new one, and the source as it is written."""
    registry.sessions.put("tv", "d1", "10.64.0.1:554", None)
    old = registry.sessions.find("tv", "d1")
    assert old is not None
    assert claim(registry, "d1", A, exclusive=True) == 1
    view, is_new = registry.sessions.put("tv", "d1", "10.64.0.1:554", None)
    assert (view.source, is_new) == (None, False)
    late = Claim("tv", "d1", old.serial, ipaddress.ip_address(B).packed, True)
    assert registry.sessions.claim([late]) == 0
    assert registry.sessions.get("tv", "d1").source is None
    registry.sessions.remove("tv", "d1")
    registry.sessions.put("tv", "d1", "10.64.0.1:554", None)
    assert registry.sessions.claim([late]) == 0


@pytest.mark.parametrize(
    ("service", "field", "message"),
    [
        ("tele", "service", "tele is not a service of steerd.toml."),
        ("tv2", "service", "The service tv2 has no sessions: steerd.toml names no key for them."),
    ],
)
def test_a_service_without_sessions(registry: Registry, service: str, field: str, message: str) -> None:
    publish(registry, services=("tv",))
    table = registry.sessions
    for ask in (
        lambda: table.put(service, "d1", "10.64.0.1:554", None),
        lambda: table.remove(service, "d1"),
        lambda: table.get(service, "d1"),
        lambda: table.page(service, "", 1),
    ):
        with pytest.raises(RequestError) as caught:
            ask()
        assert (caught.value.code, caught.value.field, str(caught.value)) == ("not_found", field, message)


def test_what_is_not_there_is_not_found(registry: Registry) -> None:
    for session_id in ("d1", "", "é", "x" * 257, "\0"):
        for ask in (registry.sessions.get, registry.sessions.remove):
            with pytest.raises(RequestError, match=r"^The service tv has no session of this id\.$") as caught:
                ask("tv", session_id)
            assert (caught.value.code, caught.value.field) == ("not_found", "id")


LENGTH = "Must be 1 to 256 printable ASCII characters, without a space at either end."
URL = "Must not be . or .., which cannot stand in a URL."


@pytest.mark.parametrize(
    ("session_id", "target", "source", "field", "message"),
    [
        ("", "10.64.0.1:554", None, "id", LENGTH),
        ("x" * 257, "10.64.0.1:554", None, "id", LENGTH),
        ("é", "10.64.0.1:554", None, "id", LENGTH),
        ("a\nb", "10.64.0.1:554", None, "id", LENGTH),
        (" a", "10.64.0.1:554", None, "id", LENGTH),
        ("a ", "10.64.0.1:554", None, "id", LENGTH),
        (".", "10.64.0.1:554", None, "id", URL),
        ("..", "10.64.0.1:554", None, "id", URL),
        (
            "a;b",
            "10.64.0.1:554",
            None,
            "id",
            "Has a ;, where the value of rtsp.session ends: no client can ever say it.",
        ),
        (
            "a",
            "10.65.0.1:554",
            None,
            "target",
            "10.65.0.1 is in no pool (p: 10.64.0.0/24, fd00:64::/120); use an alias, or say that it"
            ' is external (steerctl: --external; in JSON: "external": true).',
        ),
        (
            "a",
            "203.0.113.11:554",
            None,
            "target",
            "203.0.113.11 is the address of an endpoint (services.tv2.endpoints[0]); steering there would be a loop.",
        ),
        (
            "a",
            [{"address": "127.0.0.1:554", "external": True}],
            None,
            "target[0].address",
            "127.0.0.1 is a loopback address; nothing can be steered there.",
        ),
        (
            "a",
            ["10.64.0.1:554", "10.64.0.2:554"],
            None,
            "target[1]",
            "Is a second IPv4 target; at most one of each family is possible.",
        ),
        ("a", [], None, "target", 'Names no target; one would be "10.64.0.1:8080".'),
        (
            "a",
            None,
            None,
            "target",
            'Must be a target such as "10.64.0.1:8080", or a table or list of them, not None.',
        ),
        (
            "a",
            {"address": "10.64.0.1:554", "wildcard": True},
            None,
            "target",
            "Has wildcard, which a target can have in the configuration only.",
        ),
        ("a", "10.64.0.1:554", "host", "source", '"host" is not an IP address; names are not looked up.'),
        ("a", "10.64.0.1:554", "127.0.0.1", "source", "127.0.0.1 is a loopback address; no client comes from there."),
        (
            "a",
            "10.64.0.1:554",
            "fe80::1",
            "source",
            "fe80::1 is a link-local address; no client comes from there.",
        ),
    ],
)
def test_what_cannot_be_a_session_is_refused_with_the_field_and_a_sentence(
    registry: Registry, session_id: str, target: object, source: str | None, field: str, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        registry.sessions.put("tv", session_id, target, source)
    assert (caught.value.code, caught.value.field, str(caught.value)) == ("invalid", field, message)
    assert all_of(registry) == {}


def test_a_target_of_a_family_that_never_comes_is_refused(registry: Registry) -> None:
    with pytest.raises(RequestError, match=r"^Has addresses of IPv6 only, but what comes here is IPv4\.$"):
        registry.sessions.put("tv2", "a", "[fd00:64::1]:554", None)


def test_before_anything_is_published_there_is_nothing_to_ask(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path))
    with pytest.raises(RegistryError, match=r"^the registry holds no configuration yet"):
        registry.sessions.put("tv", "d1", "10.64.0.1:554", None)
    registry.close()


def test_pages_are_sorted_and_of_one_service(registry: Registry) -> None:
    for session_id in ("b", "a", "d", "c", "~", "B"):
        registry.sessions.put("tv", session_id, "10.64.0.1:554", None)
    registry.sessions.put("tv2", "aa", "10.64.0.1:554", None)

    def page(after: str, limit: int) -> str:
        return "".join(view.id for view in registry.sessions.page("tv", after, limit))

    assert page("", 100) == "Babcd~"
    assert page("", 3) == "Bab"
    assert page("b", 3) == "cd~"
    assert page("bb", 1) == "c"
    assert page("~", 3) == ""
    assert page("\x7f" * 1000 + "é", 3) == ""
    assert [view.id for view in registry.sessions.page("tv2", "", 9)] == ["aa"]


# ---- the configuration's ----


def test_a_session_of_the_configuration_is_its_to_change(registry: Registry) -> None:
    publish(registry, entry("d1", source=A))
    assert all_of(registry) == {"d1": (["10.64.0.1:554"], A, "configuration", True)}
    message = r"^The session d1 of tv is in steerd\.toml; change it there, and reload\.$"
    with pytest.raises(RequestError, match=message) as caught:
        registry.sessions.put("tv", "d1", "10.64.0.2:554", None)
    assert (caught.value.code, caught.value.field) == ("conflict", "id")
    with pytest.raises(RequestError, match=message):
        registry.sessions.remove("tv", "d1")
    publish(registry, entry("d1", "10.64.0.2:554", A), entry("d2"))
    assert all_of(registry) == {
        "d1": (["10.64.0.2:554"], A, "configuration", True),
        "d2": (["10.64.0.1:554"], None, "configuration", True),
    }
    publish(registry, entry("d2"))
    assert list(all_of(registry)) == ["d2"]


def test_both_kinds_live_side_by_side_over_reloads_and_restarts(registry: Registry, tmp_path: Path) -> None:
    registry.sessions.put("tv", "api", "10.64.0.1:554", A)
    publish(registry, entry("toml"))
    expected = {
        "api": (["10.64.0.1:554"], A, "api", True),
        "toml": (["10.64.0.1:554"], None, "configuration", True),
    }
    assert all_of(registry) == expected
    with reopened(registry, tmp_path) as again:
        publish(again, entry("toml"))
        assert all_of(again) == expected
        publish(again, services=("tv2",))
        publish(again)
        assert all_of(again) == {"api": expected["api"]}


def test_an_id_that_both_name_is_the_configurations_from_then_on(registry: Registry) -> None:
    registry.sessions.put("tv", "d1", "10.64.0.1:554", A)
    publish(registry, entry("d1", "10.64.0.2:554", B))
    assert all_of(registry) == {"d1": (["10.64.0.2:554"], B, "configuration", True)}
    publish(registry)
    assert all_of(registry) == {}


def test_a_source_that_was_claimed_stays_for_as_long_as_the_same_one_is_written(registry: Registry) -> None:
    publish(registry, entry("first"), entry("moved", source=A), rule="move")
    assert claim(registry, "first", A, exclusive=False) == claim(registry, "moved", B, exclusive=False) == 1

    def sources() -> list[str | None]:
        return [registry.sessions.get("tv", name).source for name in ("first", "moved")]

    def serials() -> set[int]:
        return {found.serial for name in ("first", "moved") if (found := registry.sessions.find("tv", name))}

    before = serials()

    publish(registry, entry("first", "10.64.0.9:554"), entry("moved", source=A), rule="deny")
    assert sources() == [A, B]
    assert serials() == before
    publish(registry, entry("first", source=B), entry("moved"), rule="deny")
    assert sources() == [B, None]
    assert not serials() & before


# ---- only where the configuration allows it ----


def test_a_session_whose_target_is_in_no_pool_any_more_is_not_used_and_comes_back(registry: Registry) -> None:
    registry.sessions.put("tv", "pool", ["10.64.0.9:554", "[fd00:64::9]:554"], A)
    registry.sessions.put("tv", "out", ["10.64.0.9:554", {"address": "[2001:db8:2::9]:554", "external": True}], A)
    publish(registry, pools='"10.64.0.200/32", "10.64.0.8/31"')
    assert {name: usable for name, (_, _, _, usable) in all_of(registry).items()} == {"pool": False, "out": True}
    found = registry.sessions.find("tv", "pool")
    assert found is not None and not found.usable
    publish(registry, pools='"10.64.0.200/32", "10.64.0.0/29"')
    assert {name: usable for name, (_, _, _, usable) in all_of(registry).items()} == {"pool": False, "out": False}
    publish(registry)
    assert {name: usable for name, (_, _, _, usable) in all_of(registry).items()} == {"pool": True, "out": True}


def test_a_session_whose_target_becomes_an_endpoint_is_not_used(registry: Registry) -> None:
    registry.sessions.put("tv", "d1", {"address": "203.0.113.12:554", "external": True}, None)
    text = TEXT.format(pools=BOTH, default="10.64.0.200:554", mark_bits="8-31").replace("203.0.113.11", "203.0.113.12")
    registry.publish(config.parse(text + SESSIONS.format(name="tv", rule="deny", entries=""), "steerd.toml"))
    assert all_of(registry)["d1"] == (["203.0.113.12:554"], None, "api", False)


def test_an_id_that_does_not_fit_into_narrower_mark_bits_is_not_used(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path))
    publish(registry)
    big = (
        TEXT.format(pools='"10.64.0.0/12"', default="10.64.0.200:554", mark_bits="8-31") + "[services.ext]\n"
        'endpoints = ["203.0.113.12:1-65535/tcp"]\ninspect = ["port-extension"]\nunextended = "unmatched"\n'
        'extension_pool = { pool = "p", by = "extension", port = 8080 }\n'
    )
    registry.publish(config.parse(big + SESSIONS.format(name="tv", rule="deny", entries=""), "steerd.toml"))
    registry.sessions.put("tv", "high", "10.64.0.1:554", None)
    publish(registry, mark_bits="0-19")
    assert all_of(registry)["high"] == (["10.64.0.1:554"], None, "api", False)
    with pytest.raises(RegistryError, match=r"^the mark bits have room for target ids up to 524287, and 10\.64\.0\.3"):
        registry.sessions.put("tv", "d2", "10.64.0.3:554", None)
    assert list(all_of(registry)) == ["high"]
    registry.close()


# ---- claims ----


@pytest.mark.parametrize(
    ("rule", "exclusive", "written", "expected"),
    [
        ("deny", True, None, B),
        ("deny", True, A, A),
        ("deny", False, A, A),  # made while the service still said "move"
        ("move", False, None, B),
        ("move", False, A, B),
        ("allow", False, A, A),
        ("allow", False, None, B),
    ],
)
def test_whom_a_claim_makes_the_source(
    registry: Registry, rule: OnNewSource, exclusive: bool, written: str | None, expected: str
) -> None:
    publish(registry, rule=rule)
    registry.sessions.put("tv", "d1", "10.64.0.1:554", written)
    assert claim(registry, "d1", B, exclusive=exclusive) == (written != expected)
    assert registry.sessions.get("tv", "d1").source == expected
    assert claim(registry, "d1", expected, exclusive=exclusive) == 0


def test_a_claim_on_what_is_gone_means_nothing(registry: Registry) -> None:
    registry.sessions.put("tv", "d1", "10.64.0.1:554", None)
    found = registry.sessions.find("tv", "d1")
    assert found is not None
    registry.sessions.remove("tv", "d1")
    assert registry.sessions.claim([Claim("tv", "d1", found.serial, b"\1\2\3\4", True)]) == 0
    assert all_of(registry) == {}


# ---- ids ----

_put = st.tuples(st.just("put"), st.integers(0, 7), st.sampled_from([0, 80]))
_publish = st.tuples(st.just("publish"), st.integers(0, 7), st.sampled_from([0, 80]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(_put, _publish), min_size=1, max_size=8))
def test_an_id_keeps_its_meaning_whoever_asks_for_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    registry = Registry(str(tmp_path_factory.mktemp("ids")))
    given_ids: dict[Target, int] = {}
    publish(registry)
    for what, index, port in steps:
        target = Target(ipaddress.ip_address("10.64.0.0") + index, port)
        if what == "put":
            registry.sessions.put("tv", f"s{index}", str(target), None)
            found = registry.sessions.find("tv", f"s{index}")
            assert found is not None
            assert given_ids.setdefault(target, found.ipv4) == found.ipv4
        else:
            plan = publish(registry, default=str(target))
            assert given_ids.setdefault(target, plan.services[0].default.ipv4) == plan.services[0].default.ipv4
    assert len(set(given_ids.values())) == len(given_ids)
    registry.close()


# ---- other processes ----


def _serve(directory: Path, requests: Connection) -> None:
    """A writer in a process of its own: "put ID SOURCE", "move ID SOURCE", "remove ID"; answers when it is done."""
    registry = Registry(str(directory))
    publish(registry, rule="move")
    requests.send("ready")
    while True:
        match requests.recv().split():
            case ["put", session_id, source]:
                registry.sessions.put("tv", session_id, "10.64.0.7:554", source)
            case ["move", session_id, source]:
                claim(registry, session_id, source, exclusive=False)
            case ["remove", session_id]:
                registry.sessions.remove("tv", session_id)
        requests.send("done")


def test_a_worker_sees_each_change_at_once(tmp_path: Path) -> None:
    with another_process(lambda requests: _serve(tmp_path, requests)) as writer:
        writer.recv()

        def after(request: str) -> str | None:
            writer.send(request)
            assert writer.recv() == "done"
            found = reader.session("tv", "d1")
            if found is None:
                return None
            assert str(reader.target(found.ipv4)) == "10.64.0.7:554"
            return str(ipaddress.ip_address(found.source))

        with reading(tmp_path) as reader:
            reader.refresh()
            assert reader.session("tv", "d1") is None
            assert after(f"put d1 {A}") == A
            assert after(f"move d1 {B}") == B
            assert after("remove d1") is None
            for strange in ("", "é", "\udc80", "d1\0", "x" * 100_000):
                assert reader.session("tv", strange) is None


def test_what_was_acknowledged_outlives_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Each writer puts and moves sessions until it is killed; all that it had answered is there, whole."""
    rng = random.Random(2)
    expected: dict[str, str] = {}
    for turn in range(40):

        def write(progress: Connection, turn: int = turn) -> None:
            registry = Registry(str(tmp_path))
            publish(registry, rule="move")
            progress.send("ready")
            for number in range(10_000):
                session_id = f"s{turn}-{number}"
                progress.send(("begun", session_id, A))
                registry.sessions.put("tv", session_id, "10.64.0.7:554", A)
                progress.send(("done", session_id, A))
                progress.send(("begun", session_id, B))
                claim(registry, session_id, B, exclusive=False)
                progress.send(("done", session_id, B))

        begun = ("", "")
        with another_process(write) as progress:
            progress.recv()
            time.sleep(rng.uniform(0, 0.02))
        with contextlib.suppress(EOFError):
            while progress.poll():
                what, session_id, source = progress.recv()
                if what == "done":
                    expected[session_id] = source
                begun = (session_id, source) if what == "begun" else ("", "")
        # What was begun is there, or is not.
        made = Registry(str(tmp_path))
        publish(made, rule="move")
        found = {name: source for name, (_, source, _, _) in all_of(made).items()}
        made.close()
        if found.get(begun[0], "") == begun[1]:
            expected[begun[0]] = begun[1]
        expected.pop("", None)
        assert found == expected
