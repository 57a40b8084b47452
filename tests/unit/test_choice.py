"""Several targets: each policy by example, and what a chooser asks for and remembers."""

from __future__ import annotations

import ipaddress

import pytest

from steerd.core.choice import GROUP, SOURCE, Chooser, Group, Member, fill, maglev, table_size
from steerd.model import DEAD, DRAINED, TCP, UDP, Flow, Keys, Policy, Reason, Target

A, B, C = 20, 21, 22


class Lab:
    """A group of three, and a chooser."""

    def __init__(self, policy: Policy, key: str = SOURCE, count: int = 3) -> None:
        first = ipaddress.ip_address("10.64.0.1")
        members = [Member(A + n, (first + n).packed + (8080).to_bytes(2, "big"), False) for n in range(count)]
        self.group = Group(policy, key, tuple(members))
        self.states = dict.fromkeys(range(A, A + count), 0)
        self.asked: list[int] = []
        self.chooser = Chooser(self._find, self.states.__getitem__)

    def _find(self, group_id: int) -> Group | None:
        self.asked.append(group_id)
        return self.group if group_id == GROUP + 3 else None

    def choose(
        self, source: str = "198.51.100.1", port: int | None = None, keys: Keys | None = None, protocol: int = TCP
    ) -> int | Reason:
        client = ipaddress.ip_address(source).packed
        flow = None if port is None else Flow(client, port, b"\xcb\0\x71\x0a", 443)
        found = self.chooser.choose(GROUP + 3, protocol, client, keys or {}, flow)
        return found.target_id if found.reason is None else found.reason


def test_the_first_that_is_alive() -> None:
    lab = Lab("first-alive")
    assert {lab.choose(port=port) for port in range(5)} == {A}
    lab.states[A] = DEAD[TCP]
    assert lab.choose() == B
    assert lab.choose(protocol=UDP) == A
    lab.states[B] = DRAINED
    assert lab.choose() == C
    assert lab.choose(protocol=UDP) == A
    lab.states[A] = 0
    assert lab.choose() == A


def test_taking_turns() -> None:
    lab = Lab("round-robin")
    assert [lab.choose(port=port) for port in range(6)] == [A, B, C] * 2
    lab.states[B] = DEAD[TCP]
    assert sorted(lab.choose(port=port) for port in range(10, 16)) == [A] * 3 + [C] * 3


def test_who_repeats_itself_goes_where_it_went_but_not_to_the_dead() -> None:
    lab = Lab("round-robin")
    assert [lab.choose(port=1), lab.choose(port=2), lab.choose(port=1), lab.choose(port=2)] == [A, B, A, B]
    # ... and a query repeats nothing.
    assert sorted(lab.choose() for _ in range(6)) == [A, A, B, B, C, C]
    lab.states[A] = DEAD[TCP]
    moved = lab.choose(port=1)
    assert moved in (B, C)
    lab.states[A] = 0
    assert lab.choose(port=1) == moved


def test_what_was_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerd.core.choice._MAX_RECENT", 10)
    lab = Lab("round-robin")
    for port in range(1000):
        lab.choose(port=port)
        assert len(lab.chooser._recent) <= 10
        assert len(lab.chooser._recent_before) <= 10
    assert lab.choose(port=999) == lab.choose(port=999)


def test_a_hash_of_the_source_is_of_the_whole_address_and_of_no_port() -> None:
    lab = Lab("hash")
    assert len({lab.choose(port=port) for port in range(50)}) == 1
    assert {lab.choose(f"2001:db8::{host:x}") for host in range(64)} == {A, B, C}
    assert {lab.choose(f"198.51.100.{host}") for host in range(64)} == {A, B, C}


def test_a_hash_of_a_key_and_where_there_is_none_of_the_source() -> None:
    lab = Lab("hash", "http.cookie.sid")
    for number in range(20):
        keys = {"http.cookie.sid": f"session-{number}", "http.host": "a.example"}
        assert len({lab.choose(f"198.51.100.{host}", keys=keys) for host in range(10)}) == 1
    assert {lab.choose(keys={"http.cookie.sid": f"{number}"}) for number in range(64)} == {A, B, C}
    plain = Lab("hash")
    for host in range(20):
        source = f"198.51.100.{host}"
        assert lab.choose(source, keys={"http.host": "a.example"}) == plain.choose(source)
    assert lab.choose(keys={"http.cookie.sid": "\udcff"}) in (A, B, C)


def test_nobody_is_left() -> None:
    lab = Lab("hash")
    lab.states.update({A: DEAD[TCP], B: DEAD[TCP], C: DEAD[TCP] | DRAINED})
    assert lab.choose() is Reason.DEAD
    assert lab.choose(protocol=UDP) in (A, B)
    lab.states.update({A: DRAINED, B: DRAINED | DEAD[TCP], C: DRAINED})
    assert lab.choose() is Reason.DRAINED


def test_a_group_is_looked_up_once_and_one_that_is_not_there_is_no_target() -> None:
    lab = Lab("first-alive")
    for _ in range(3):
        lab.choose()
    assert lab.asked == [GROUP + 3]
    with pytest.raises(LookupError, match="not among the registry's groups"):
        lab.chooser.choose(GROUP, TCP, bytes(4), {}, None)


def test_a_member_says_its_target() -> None:
    v4 = Member(20, bytes([10, 64, 0, 1]) + (8080).to_bytes(2, "big"), False)
    assert v4.target == Target(ipaddress.ip_address("10.64.0.1"), 8080)
    v6 = Member(20, ipaddress.ip_address("fd00::1").packed + (443).to_bytes(2, "big"), True)
    assert str(v6.target) == "[fd00::1]:443"


def test_the_table_is_the_papers() -> None:
    """Table 2: three backends, seven slots, and after B1 has gone."""
    offsets, skips = [3, 0, 3], [4, 2, 1]
    assert list(fill(offsets, skips, 7)) == [1, 0, 1, 0, 2, 2, 0]
    assert list(fill([3, 3], [4, 1], 7)) == [0, 0, 0, 0, 1, 1, 1]


def test_other_gateways_and_later_versions_have_the_same_table() -> None:
    names = tuple(bytes([10, 64, 0, n]) + (8080).to_bytes(2, "big") for n in (1, 2, 3))
    assert list(maglev(names, 13)) == [1, 2, 1, 0, 0, 0, 0, 2, 2, 0, 1, 1, 2]
    assert (table_size(3), table_size(10), table_size(11), table_size(100)) == (1021, 1021, 10007, 10007)
