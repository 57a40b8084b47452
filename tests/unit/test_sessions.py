"""Sessions, the pure part: what becomes of a first payload that carries a session id."""

from __future__ import annotations

import ipaddress

import pytest

from steerd.core.sessions import Claim, OnNewSource, Ruling, Session, SessionsPlan, judge
from steerd.model import Keys

OWN4 = ipaddress.ip_address("198.51.100.7").packed
OTHER4 = ipaddress.ip_address("198.51.100.8").packed
OWN6 = ipaddress.ip_address("2001:db8:1::7").packed
KEY = "http.cookie.sid"
IPV4, IPV6 = 16, 17
REFUSED = Ruling(refused=True)
STEERED = Ruling(False, IPV4)


def session(source: bytes = b"", *, usable: bool = True, ipv4: int = IPV4, ipv6: int = IPV6) -> Session:
    return Session(serial=5, ipv4=ipv4, ipv6=ipv6, source=source, usable=usable)


def ruling(
    rule: OnNewSource,
    known: Session | None,
    source: bytes = OWN4,
    keys: Keys | None = None,
    version: int | None = None,
) -> tuple[Ruling | None, list[tuple[str, str]]]:
    """The ruling, and what was looked up for it. `version` is the source's unless a proxy stands between."""
    asked = []

    def find(service: str, session_id: str) -> Session | None:
        asked.append((service, session_id))
        return known

    plan = SessionsPlan(KEY, rule)
    found = {KEY: "d1", "http.host": "a"} if keys is None else keys
    return judge(plan, "tv", found, source, version or (4 if len(source) == 4 else 6), find), asked


def claim(source: bytes, *, exclusive: bool) -> Claim:
    return Claim("tv", "d1", 5, source, exclusive)


@pytest.mark.parametrize(
    ("rule", "of_session", "expected"),
    [
        ("allow", OWN4, STEERED),
        ("allow", b"", STEERED),
        ("allow", OTHER4, STEERED),
        ("move", OWN4, STEERED),
        ("move", b"", Ruling(False, IPV4, claim(OWN4, exclusive=False))),
        ("move", OTHER4, Ruling(False, IPV4, claim(OWN4, exclusive=False))),
        ("deny", OWN4, STEERED),
        ("deny", b"", Ruling(False, IPV4, claim(OWN4, exclusive=True))),
        ("deny", OTHER4, REFUSED),
    ],
)
def test_what_becomes_of_a_client(rule: OnNewSource, of_session: bytes, expected: Ruling) -> None:
    assert ruling(rule, session(of_session)) == (expected, [("tv", "d1")])


@pytest.mark.parametrize("rule", ["allow", "move", "deny"])
def test_each_family_has_its_target(rule: OnNewSource) -> None:
    assert ruling(rule, session(OWN6), OWN6)[0] == Ruling(False, IPV6)
    assert ruling(rule, session(OWN4), OWN4)[0] == Ruling(False, IPV4)


@pytest.mark.parametrize("rule", ["move", "deny"])
def test_behind_a_proxy_the_target_is_of_the_packets_family_and_the_source_the_clients(rule: OnNewSource) -> None:
    for version, target, source in ((4, IPV4, OWN6), (6, IPV6, OWN4)):
        assert ruling(rule, session(source), source, version=version)[0] == Ruling(False, target)
        claimed = Ruling(False, target, claim(source, exclusive=rule == "deny"))
        assert ruling(rule, session(), source, version=version)[0] == claimed


@pytest.mark.parametrize("rule", ["allow", "move", "deny"])
def test_without_a_target_of_its_family_a_client_claims_nothing(rule: OnNewSource) -> None:
    for known in (session(ipv6=0), session(OWN6, ipv6=0)):
        assert ruling(rule, known, OWN6)[0] == Ruling(False, 0)


@pytest.mark.parametrize("rule", ["move", "deny"])
def test_the_same_client_on_the_other_family_is_another_source(rule: OnNewSource) -> None:
    found, _ = ruling(rule, session(OWN4), OWN6)
    assert found == (REFUSED if rule == "deny" else Ruling(False, IPV6, claim(OWN6, exclusive=False)))


@pytest.mark.parametrize("rule", ["allow", "move", "deny"])
def test_a_session_that_cannot_be_used_is_refused_and_not_left_to_the_routes(rule: OnNewSource) -> None:
    for source in (b"", OWN4, OTHER4):
        assert ruling(rule, session(source, usable=False))[0] == REFUSED


@pytest.mark.parametrize("rule", ["allow", "move", "deny"])
def test_what_is_no_known_session_is_left_to_the_routes(rule: OnNewSource) -> None:
    assert ruling(rule, None) == (None, [("tv", "d1")])
    assert ruling(rule, session(), keys={"http.host": "d1"}) == (None, [])
