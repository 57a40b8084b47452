"""Who listens becomes a state; only of members of groups, and of those in pools."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

import pytest

from steerd import config
from steerd.control.states import States
from steerd.core.choice import SOURCE, Group, Member
from steerd.kernel.listeners import Listener
from steerd.main.liveness import LOOK_SECONDS, Liveness
from steerd.model import DEAD, DRAINED, TCP, UDP

TEXT = """
[pools.p]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
default = [{ address = "10.64.0.1:80", wildcard = true }, "10.64.0.2:80"]
choose = "hash"
"""
WITH_UDP = TEXT.replace('443/tcp"', '443/tcp", "203.0.113.10:443/udp"')


def member(id_: int, address: str, port: int = 80, external: bool = False) -> Member:
    return Member(id_, ipaddress.ip_address(address).packed + port.to_bytes(2, "big"), external)


def group(*members: Member) -> Group:
    return Group("hash", SOURCE, members)


class Lab:
    """A machine on which nothing listens but what is said to."""

    def __init__(self, directory: Path) -> None:
        self.states = States.create(str(directory), 1000)
        self.listening: set[tuple[int, str, int]] = set()
        self.asked: list[tuple[int, str, int, bool]] = []
        self.liveness = Liveness(self.states, self._ask)

    def _ask(self, protocol: int, wanted: Sequence[Listener]) -> list[bool]:
        shown = [(protocol, str(ipaddress.ip_address(each.address)), each.port) for each in wanted]
        self.asked += [(*place, each.wildcard) for place, each in zip(shown, wanted, strict=True)]
        return [place in self.listening for place in shown]

    def look(self, *groups: Group, text: str = TEXT) -> tuple[list[str], list[str]]:
        self.asked.clear()
        changes = self.liveness.look(groups, config.parse(text, "f"))
        return [str(target) for target in changes.dead], [str(target) for target in changes.alive]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


A, B, C = member(20, "10.64.0.1"), member(21, "10.64.0.2"), member(22, "fd00:64::3", 443)


def test_what_stops_and_begins_to_listen(lab: Lab) -> None:
    lab.listening = {(TCP, "10.64.0.1", 80), (TCP, "fd00:64::3", 443)}
    lab.states.put(21, DRAINED, True)
    assert lab.look(group(A, B), group(B, C)) == (["10.64.0.2:80"], [])
    assert [lab.states.get(id_) for id_ in (20, 21, 22)] == [0, DEAD[TCP] | DRAINED, 0]
    assert lab.look(group(A, B), group(B, C)) == ([], [])
    lab.listening = {(TCP, "10.64.0.2", 80)}
    assert lab.look(group(A, B), group(B, C)) == (["10.64.0.1:80", "[fd00:64::3]:443"], ["10.64.0.2:80"])
    assert [lab.states.get(id_) for id_ in (20, 21, 22)] == [DEAD[TCP], DRAINED, DEAD[TCP]]


def test_each_protocol_by_itself_and_only_those_that_come(lab: Lab) -> None:
    lab.listening = {(UDP, "10.64.0.1", 80), (TCP, "10.64.0.2", 80)}
    lab.look(group(A, B))
    assert {protocol for protocol, *_ in lab.asked} == {TCP}
    lab.look(group(A, B), text=WITH_UDP)
    assert [lab.states.get(id_) for id_ in (20, 21)] == [DEAD[TCP], DEAD[UDP]]
    lab.look(group(A, B))
    assert [lab.states.get(id_) for id_ in (20, 21)] == [DEAD[TCP], 0]


def test_a_socket_on_the_wildcard_address_counts_where_the_target_says_so(lab: Lab) -> None:
    lab.look(group(A, B))
    assert lab.asked == [(TCP, "10.64.0.1", 80, True), (TCP, "10.64.0.2", 80, False)]


def test_what_is_elsewhere_is_alive_and_what_is_nobodys_is_not_asked_about(lab: Lab) -> None:
    outside = member(23, "192.0.2.1", external=True)
    assert lab.look(group(A, outside)) == (["10.64.0.1:80"], [])
    assert [address for _, address, *_ in lab.asked] == ["10.64.0.1"]
    # Out of use: nobody looks at it any more, so nobody knows that it is dead.
    assert lab.look() == ([], [])
    assert lab.asked == []
    assert lab.states.get(20) == 0


def test_who_is_started_by_a_connection_need_not_listen_before_it(lab: Lab) -> None:
    text = TEXT.replace('"10.64.0.2:80"', '{ address = "10.64.0.2:80", wake = "unit:b.service" }')
    assert lab.look(group(A, B), text=text) == (["10.64.0.1:80"], [])
    assert lab.states.get(21) == 0


def test_one_target_in_two_groups_is_one(lab: Lab) -> None:
    """Even where one was written when it lay in no pool."""
    once = member(20, "10.64.0.1", external=True)
    lab.look(group(A, B), group(once, B))
    assert lab.states.get(20) == DEAD[TCP]
    lab.look(group(once, B))
    assert lab.states.get(20) == DEAD[TCP]
    lab.listening = {(TCP, "10.64.0.1", 80)}
    lab.look(group(A, B))
    assert lab.states.get(20) == 0


def test_looking_takes_a_bounded_share_of_the_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 0.01, 100.0, 102.0))
    monkeypatch.setattr("steerd.main.liveness.time.monotonic", lambda: next(clock))
    lab.look(group(A, B))
    assert lab.liveness.pause == LOOK_SECONDS
    lab.look(group(A, B))
    assert lab.liveness.pause == 10.0
