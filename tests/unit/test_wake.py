"""Waking without a kernel: templates, the table between the main process and workers, what waits in a worker."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerd import config
from steerd.config.routes import RouteChecker
from steerd.control import doors, polkit
from steerd.control.doors import Porter, Visitor
from steerd.core.wake import Door, Doorbell, DoorState, Limits, Policy, Sleepers, Start, Starter, Stop, Wake, escaped
from steerd.errors import ConfigError
from steerd.model import TCP, UDP, Flow

DOOR = Door(16, TCP, 443)
POOL = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
wake = {wake}
{more}
[services.web]
endpoints = ["203.0.113.10:80/tcp"]
default = {target}
"""


def parse(wake: str = '"unit:tenant@{index}.service"', more: str = "", target: str = '"10.64.0.9:80"') -> config.Config:
    return config.parse(POOL.format(wake=wake, more=more, target=target), "steerd.toml")


# ---- templates ----


@given(st.text(min_size=1, max_size=40).filter(lambda text: "\0" not in text))
def test_escaping_is_one_to_one_and_leaves_only_what_a_unit_name_may_have(text: str) -> None:
    found = escaped(text)
    assert re.fullmatch(r"[A-Za-z0-9:_.\\-]+", found)
    undone = re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), found.replace("-", "/").encode("latin-1"))
    assert undone.decode() == text


def test_escaping_is_systemds() -> None:
    """What systemd-escape(1) of systemd 252 answers."""
    said = {
        "alice": "alice",
        "a.b": "a.b",
        ".hidden": r"\x2ehidden",
        "al-ice@example.com": r"al\x2dice\x40example.com",
        "fd00:64::5": "fd00:64::5",
        "a/b": "a-b",
        "Grün": r"Gr\xc3\xbcn",
        r"a\x": r"a\x5cx",
    }
    assert {text: escaped(text) for text in said} == said


def test_a_unit_of_a_lease() -> None:
    wake = Wake("tenant@{lease}.service", (), "", 10.0, None)
    assert wake.starter("al-ice", "10.64.0.1", 1) == Starter("tenant@al\\x2dice.service")
    assert wake.starter(None, "10.64.0.1", 1) is None, "without a lease there is nothing to start"
    with pytest.raises(ValueError, match="longer than a unit's name"):
        wake.starter("@" * 128, "10.64.0.1", 1)


def test_a_command_of_a_lease_is_one_word_each() -> None:
    wake = Wake("", ("/bin/tenant", "--name={lease}", "{alias}", "{index}"), "nobody", 10.0, None)
    starter = wake.starter("a {index} $(b)", "fd00:64::1", 7)
    assert starter == Starter("", ("/bin/tenant", "--name=a {index} $(b)", "fd00:64::1", "7"), "nobody")


# ---- the configuration ----


def test_what_the_configuration_says() -> None:
    found = parse(
        '["/bin/tenant", "{alias}"]',
        'user = "nobody"\nwake_timeout = 3\nsleep_after = 60\n[wake]\nmax_awake = 7\nstarts_per_second = 2\nburst = 3',
        '{ address = "10.64.0.9:80", wake = "unit:nine.service" }',
    )
    tenants = Wake("", ("/bin/tenant", "{alias}"), "nobody", 3.0, 60.0)
    assert found.waking == Limits(7, 2.0, 3)
    assert found.wake_of(ipaddress.ip_address("10.64.0.5")) == (tenants, 5)
    assert found.wake_of(ipaddress.ip_address("fd00:64::5")) == (tenants, 5)
    assert found.wake_of(ipaddress.ip_address("10.64.0.9")) == (Wake("nine.service", (), "", 10.0, None), 9)
    assert found.wake_of(ipaddress.ip_address("10.65.0.1")) is None


@pytest.mark.parametrize(
    ("given_", "key", "words"),
    [
        ('"unit:tenant@{index}.service"', "pools.tenants.user", "Means nothing for a unit"),
        ('"tenant@{lease}.service"', "pools.tenants.wake", "is neither"),
        ('"unit:tenant@{lease}.socket"', "pools.tenants.wake", "not the name of a service unit"),
        ('"unit:{lease}.service"', "pools.tenants.wake", "not the name of a service unit"),
        ('"unit:-x@{lease}.service"', "pools.tenants.wake", "not the name of a service unit"),
        ('"unit:a b@{lease}.service"', "pools.tenants.wake", "not the name of a service unit"),
        ('"unit:tenant@{leese}.service"', "pools.tenants.wake", "{leese} is not a placeholder"),
        ('"unit:tenant@{.service"', "pools.tenants.wake", "brace"),
        ('["/bin/a"]', "pools.tenants.wake", "same for all aliases"),
        ("[]", "pools.tenants.wake", "words of a command"),
        ('["/bin/a", 5]', "pools.tenants.wake", "words of a command"),
        ('["bin/a", "{alias}"]', "pools.tenants.wake", "absolute path"),
        ('["/bin/{alias}"]', "pools.tenants.wake", "absolute path"),
    ],
)
def test_mistakes_in_wake(given_: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(given_, 'user = "nobody"')
    assert [problem.key for problem in caught.value.problems] == [key]
    assert words in caught.value.problems[0].message


@pytest.mark.parametrize(
    ("more", "target", "key", "words"),
    [
        ("", '"10.64.0.9:80"', "pools.tenants.user", "Is missing"),
        ('user = "root"', '"10.64.0.9:80"', "pools.tenants.user", "not root"),
        ('user = "-rf"', '"10.64.0.9:80"', "pools.tenants.user", "not root"),
        ('user = "a"\nwake_timeout = 61', '"10.64.0.9:80"', "pools.tenants.wake_timeout", "from 0.1 to 60"),
        (
            'user = "a"',
            '{ address = "192.0.2.1:80", external = true, wake = "unit:a.service" }',
            "services.web.default.wake",
            "external",
        ),
        (
            'user = "a"',
            '{ address = "10.64.0.9:80", wake = "unit:a@{lease}.service" }',
            "services.web.default.wake",
            "never leased",
        ),
        ('user = "a"', '{ address = "10.64.0.9:80", user = "b" }', "services.web.default.user", "without wake"),
        (
            'user = "a"',
            '{ address = "10.64.0.9:80", wake = "unit:a.service" }\non_silence = '
            '{ address = "10.64.0.9:81", wake = "unit:b.service" }\ninspect = ["http"]',
            "services.web.on_silence.wake",
            "one daemon",
        ),
    ],
)
def test_mistakes_beside_wake(more: str, target: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse('["/bin/tenant", "{alias}"]', more, target)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert words in caught.value.problems[0].message


def test_a_route_that_is_added_while_it_runs_wakes_nothing() -> None:
    found = config.parse(POOL.format(wake='"unit:t@{index}.service"', more="", target='"10.64.0.9:80"').replace(
        "default", 'inspect = ["http"]\ndefault'
    ), "steerd.toml")  # fmt: skip
    checker = RouteChecker(found, found.services[0])
    target = {"address": "10.64.0.1:80", "wake": ["/bin/sh"], "user": "nobody"}
    with pytest.raises(ConfigError, match="Has wake, which a target can have in the configuration only"):
        checker.check({"http.host": "a"}, target, None)
    assert checker.check({"http.host": "a"}, "10.64.0.1:80", None).targets


# ---- polkit ----


def test_the_polkit_rule_allows_the_templates_units_and_no_others() -> None:
    text = polkit.rule(parse('"unit:tenant@{lease}.service"'), "steerd")
    (pattern,) = re.findall(r"^        /(.*)/$", text, re.MULTILINE)
    for lease in ("alice", "al-ice@example.com", "a.b", "-"):
        unit = Wake("tenant@{lease}.service", (), "", 1.0, None).starter(lease, "", 0)
        assert unit is not None and re.search(pattern, unit.unit)
    others = ["tenant@.service", "tenantXalice.service", "tenant@a.serviceX", "x-tenant@a.service", "ssh.service"]
    others += ["tenant@a-b.service", "tenant@a/b.service", "tenant@a@b.service", "tenant@a.service\nssh.service"]
    for other in others:
        assert not re.search(pattern, other), other
    assert '"steerd"' in text and "manage-units" in text
    assert polkit.rule(parse('["/bin/a", "{alias}"]', 'user = "nobody"'), "steerd") == ""


# ---- between processes ----


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Porter, Visitor]]:
    porter = Porter(str(tmp_path))
    visitor = Visitor(str(tmp_path))
    with contextlib.closing(porter), contextlib.closing(visitor):
        yield porter, visitor


def test_a_worker_sees_what_the_main_process_shows(pair: tuple[Porter, Visitor]) -> None:
    porter, visitor = pair
    assert visitor.look(DOOR) is None
    shown = {DOOR: DoorState.OPEN, Door(1 << 23, UDP, 65535): DoorState.WAITING, Door(17, TCP, 1): DoorState.REFUSED}
    porter.show(shown, False)
    assert {door: visitor.look(door) for door in shown} == shown
    assert visitor.look(Door(16, UDP, 443)) is None
    porter.show({}, False)
    assert visitor.look(DOOR) is None


def test_a_table_that_is_half_written_is_not_believed(pair: tuple[Porter, Visitor]) -> None:
    porter, visitor = pair
    porter.show({DOOR: DoorState.OPEN}, False)
    assert visitor.look(DOOR) is DoorState.OPEN
    porter._words[4] ^= 1 << 40
    porter._words[0] += 1
    assert visitor.look(DOOR) is None
    porter._words[1] = 1 << 60
    assert visitor.look(DOOR) is None
    porter.show({DOOR: DoorState.REFUSED}, False)
    assert visitor.look(DOOR) is DoorState.REFUSED


def test_more_doors_than_there_is_room_for_are_shut(pair: tuple[Porter, Visitor]) -> None:
    porter, visitor = pair
    porter.show({Door(n, TCP, 1): DoorState.OPEN for n in range(16, 18 + doors.CAPACITY)}, False)
    assert visitor.look(Door(15 + doors.CAPACITY, TCP, 1)) is DoorState.OPEN
    assert visitor.look(Door(16 + doors.CAPACITY, TCP, 1)) is None


def test_a_door_is_asked_for_once_a_second_and_never_waited_for(pair: tuple[Porter, Visitor]) -> None:
    porter, visitor = pair
    for now in (0.0, 0.5, 0.99, 1.0, 1.5):
        visitor.ask(DOOR, now)
    assert list(porter.asked(64)) == [DOOR, DOOR]
    for target_id in range(16, 5000):  # far more than the socket takes
        visitor.ask(Door(target_id, UDP, 53), 2.0)
    first = list(porter.asked(4))
    assert first == [Door(target_id, UDP, 53) for target_id in range(16, 20)]
    assert 0 < len(list(porter.asked(10000))) < 4000
    assert list(porter.asked(1)) == []


def test_while_nobody_can_be_woken_who_was_asked_for_in_vain_is_refused(
    pair: tuple[Porter, Visitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    porter, visitor = pair
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    porter.show({}, True)
    assert visitor.look(DOOR) is None, "it may be another door of a daemon that is awake"
    visitor.ask(DOOR, now)
    assert visitor.look(DOOR) is None, "the main process had no time to answer"
    now += 0.3
    assert visitor.look(DOOR) is DoorState.REFUSED
    porter.show({DOOR: DoorState.WAITING}, True)
    assert visitor.look(DOOR) is DoorState.WAITING
    porter.show({}, False)
    assert visitor.look(DOOR) is None


# ---- what waits in a worker ----


def flow(number: int) -> Flow:
    return Flow(bytes([10, 0, 0, number]), 1000, bytes(4), 80)


def test_what_is_held_is_bounded_for_a_source_and_for_all() -> None:
    sleepers: Sleepers[str] = Sleepers()
    put = [sleepers.put(flow(n), DOOR, b"a", 10.0, str(n), 2, 3) for n in range(3)]
    assert put == [True, True, False]
    assert sleepers.put(flow(0), DOOR, b"a", 10.0, "again", 2, 3), "it takes its own place"
    assert sleepers.put(flow(3), DOOR, b"b", 10.0, "3", 2, 3)
    assert not sleepers.put(flow(4), DOOR, b"c", 10.0, "4", 2, 3)
    assert sleepers.pop(flow(1)) == "1" and sleepers.pop(flow(1)) is None
    assert sleepers.put(flow(2), DOOR, b"a", 10.0, "2", 2, 3)
    assert (len(sleepers), sleepers.get(flow(0)), sleepers.get(flow(9))) == (3, "again", None)


def test_what_is_held_goes_when_its_door_opens_or_is_refused_or_its_time_is_over() -> None:
    states = {
        Door(16, TCP, 1): DoorState.OPEN,
        Door(17, TCP, 1): DoorState.REFUSED,
        Door(18, TCP, 1): DoorState.WAITING,
    }
    asked: list[Door] = []
    bell = Doorbell(lambda _packet, _id: (DOOR, 1.0), states.get, lambda door, _now: asked.append(door))
    sleepers: Sleepers[int] = Sleepers()
    for target_id in range(16, 20):
        sleepers.put(flow(target_id), Door(target_id, TCP, 1), b"a", 10.0, target_id, 64, 64)
    assert list(sleepers.due(bell, 9.9)) == [(flow(16), 10.0, 16, True), (flow(17), 10.0, 17, False)]
    assert asked == [Door(19, TCP, 1)], "whoever waits for a shut door asks again"
    assert list(sleepers.due(bell, 10.0)) == [(flow(18), 10.0, 18, False), (flow(19), 10.0, 19, False)]
    assert len(sleepers) == 0


# ---- the policy, where its property test (tests/property/test_wake.py) does not say what is right ----

ADDRESS = b"\x0a\x40\0\1"
ONE, OTHER = Starter("t@one.service"), Starter("t@other.service")


def policy(max_awake: int = 10) -> Policy:
    return Policy(Limits(max_awake, 1.0, 5))


def ask(made: Policy, starter: Starter, now: float, door: Door = DOOR) -> list[Start | Stop]:
    return made.ask(door, ADDRESS, starter, 5.0, 60.0, now)


def see(made: Policy, is_listening: bool, now: float, *, waiting: bool = True) -> None:
    for look in made.to_look_at(waiting=waiting):
        made.seen(look, is_listening, now)


def test_a_daemon_is_started_once_and_its_door_opens_when_it_listens() -> None:
    made = policy()
    assert ask(made, ONE, 0.0) == [Start(ONE)]
    assert ask(made, ONE, 1.0) == []
    see(made, False, 1.0)
    assert made.doors() == {DOOR: DoorState.WAITING}
    see(made, True, 2.0)
    assert made.doors() == {DOOR: DoorState.OPEN}
    made.ended(ONE, 3.0)
    assert made.doors() == {}
    assert ask(made, ONE, 4.0) == [Start(ONE)]


def test_another_lease_on_the_alias_waits_until_the_former_daemon_is_gone() -> None:
    made = policy()
    ask(made, ONE, 0.0)
    see(made, True, 1.0)
    assert ask(made, OTHER, 2.0) == [Stop(ONE)]
    assert made.doors() == {}, "nobody is sent to the former one"
    see(made, True, 2.0, waiting=False)
    assert made.doors() == {}
    assert ask(made, OTHER, 3.0) == []
    made.ended(ONE, 4.0)
    assert ask(made, OTHER, 4.0) == [Start(OTHER)]


def test_who_does_not_listen_in_time_is_stopped_and_refused_for_as_long_again() -> None:
    made = policy()
    ask(made, ONE, 0.0)
    assert made.tick(4.9) == []
    assert made.tick(5.0) == [Stop(ONE)]
    assert made.doors() == {DOOR: DoorState.REFUSED}
    assert ask(made, ONE, 6.0, DOOR._replace(port=80)) == []
    assert set(made.doors().values()) == {DoorState.REFUSED}
    see(made, True, 6.0)
    assert set(made.doors().values()) == {DoorState.REFUSED}, "too late"
    made.tick(10.1)
    assert ask(made, ONE, 10.2) == [], "it is not gone yet"
    made.ended(ONE, 11.0)
    made.tick(11.0)
    assert made.doors() == {}
    assert ask(made, ONE, 11.0) == [Start(ONE)]


def test_an_idle_daemon_is_shut_before_it_is_stopped_and_one_connection_keeps_it() -> None:
    made = policy()
    ask(made, ONE, 0.0)
    see(made, True, 2.0)
    assert made.perhaps_idle(64.9) == [], "who waited with it may come for as long again"
    assert made.perhaps_idle(65.0) == [ONE]
    assert made.is_idle(ONE, 65.0) == []
    assert made.doors() == {}
    assert ask(made, ONE, 65.1) == []
    assert made.doors() == {DOOR: DoorState.OPEN}, "it was still awake"
    assert made.perhaps_idle(126.0) == [ONE]
    made.is_idle(ONE, 126.0)
    made.is_busy(ONE, 126.6)
    assert made.doors() == {DOOR: DoorState.OPEN}, "somebody came in the last moment"
    made.is_idle(ONE, 190.0)
    assert made.perhaps_idle(190.4) == []
    assert made.perhaps_idle(190.5) == [ONE]
    assert made.is_idle(ONE, 190.5) == [Stop(ONE)]
    assert ask(made, ONE, 190.6) == [] and made.doors() == {}


def test_ports_of_one_daemon_are_bounded() -> None:
    made = policy()
    ask(made, ONE, 0.0)
    see(made, True, 1.0)
    for port in range(1000, 1100):
        ask(made, ONE, 1.0, Door(16, TCP, port))
    assert len(made.doors()) == 16 and made.doors()[DOOR] is DoorState.OPEN
    see(made, False, 1.0)
    made.tick(6.0)
    assert sorted(made.doors().values()) == [DoorState.OPEN] + [DoorState.REFUSED] * 15
    made.tick(11.0)
    assert made.doors() == {DOOR: DoorState.OPEN}


def test_strays_are_open_only_while_somebody_listens() -> None:
    made = policy()
    made.ask_stray(DOOR, ADDRESS, True, 0.0)
    assert made.doors() == {DOOR: DoorState.OPEN}
    see(made, False, 1.0, waiting=False)
    assert made.doors() == {}
    made.ask_stray(DOOR, ADDRESS, False, 1.0)
    assert made.doors() == {DOOR: DoorState.REFUSED}
    made.tick(4.1)
    assert made.doors() == {}
    for target_id in range(16, 16 + 5000):
        made.ask_stray(Door(target_id, TCP, 80), ADDRESS, False, 5.0)
    assert len(made.doors()) == 4096
    made.stop_at({ADDRESS})
    assert made.doors() == {}


def test_no_more_are_started_than_the_limits_say() -> None:
    made = policy(max_awake=6)
    starters = [Starter(f"t@{number}.service") for number in range(20)]

    def start(number: int, now: float) -> bool:
        address = ADDRESS[:3] + bytes([number])
        return bool(made.ask(Door(16 + number, TCP, 80), address, starters[number], 5.0, None, now))

    assert [start(number, 0.0) for number in range(8)] == [True] * 5 + [False] * 3, "the burst"
    assert made.is_full(0.9) and not made.is_full(1.0)
    assert [start(number, 1.0) for number in range(5, 8)] == [True, False, False], "one a second"
    assert not start(6, 100.0), "as many run as may"
    made.ended(starters[0], 100.0)
    assert [start(6, 101.0), start(7, 101.0)] == [True, False]
