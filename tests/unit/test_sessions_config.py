"""Sessions in the configuration: what they become, and the sentence for every mistake."""

from __future__ import annotations

import ipaddress

import pytest

from steerd import config
from steerd.config.texts import parse_target
from steerd.core.sessions import SessionEntry, Sessions
from steerd.errors import ConfigError

TEXT = """
[pools.p]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.tv]
endpoints = ["203.0.113.10:554/tcp", "[2001:db8::10]:554/tcp"]
inspect = ["rtsp", "http"]
[services.tv.sessions]
key = "rtsp.session"
on_new_source = "move"
entries = [
    { id = "d1-4711", target = "10.64.0.1:554", source = "198.51.100.7" },
    { id = "d2 x", target = ["[fd00:64::1]:same", { address = "192.0.2.7:554", external = true }] },
    { id = "d3", target = { address = "10.64.0.2:554", wildcard = true }, source = "2001:db8:1::7" },
]
"""


def sessions(text: str) -> Sessions | None:
    (service,) = config.parse(text, "steerd.toml").services
    return service.sessions


def test_sessions_become_values() -> None:
    one, two, three = "10.64.0.1:554", "[fd00:64::1]:same", "10.64.0.2:554"
    assert sessions(TEXT) == Sessions(
        "rtsp.session",
        "move",
        (
            SessionEntry("d1-4711", (parse_target(one),), ipaddress.ip_address("198.51.100.7")),
            SessionEntry("d2 x", (parse_target(two), parse_target("192.0.2.7:554")), None),
            SessionEntry("d3", (parse_target(three),), ipaddress.ip_address("2001:db8:1::7")),
        ),
    )
    assert config.parse(TEXT, "steerd.toml").wildcard == (parse_target(three),)


def test_a_table_without_sessions_is_for_the_api() -> None:
    assert sessions(TEXT[: TEXT.index("entries")]) == Sessions("rtsp.session", "move", ())
    without = TEXT[: TEXT.index("[services.tv.sessions]")]
    assert sessions(without.replace("inspect", 'default = "10.64.0.1:554"\ninspect')) is None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("http.cookie.SID", "http.cookie.SID"),  # names of cookies keep their case
        ("http.header.X-Session", "http.header.x-session"),
        ("HTTP.Header.X-Session", "http.header.x-session"),
    ],
)
def test_keys_are_spelled_as_the_parsers_give_them(written: str, read: str) -> None:
    found = sessions(TEXT.replace("rtsp.session", written))
    assert found is not None and found.key == read


def test_http2_gives_the_keys_of_http() -> None:
    found = sessions(TEXT.replace('"http"]', '"http2"]').replace("rtsp.session", "http.cookie.sid"))
    assert found is not None and found.key == "http.cookie.sid"


def test_a_semicolon_may_stand_in_a_header() -> None:
    text = TEXT.replace("rtsp.session", "http.header.x").replace("d1-4711", "d1;v=2")
    found = sessions(text)
    assert found is not None and found.entries[0].id == "d1;v=2"


BASE = "services.tv.sessions"
FIRST = f"{BASE}.entries[0]"
KEYS = '"rtsp.session", "http.cookie.NAME" or "http.header.NAME", the key of an id,'
LENGTH = "Must be 1 to 256 printable ASCII characters, without a space at either end."


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("rtsp.session", "rtsp.host", f'{BASE}.key: Must be {KEYS} not "rtsp.host".'),
        ("rtsp.session", "http.cookie.", f'{BASE}.key: Must be {KEYS} not "http.cookie.".'),
        (
            '["rtsp", "http"]',
            '["http"]',
            f'{BASE}.key: Is a key of the parser "rtsp", which inspect does not name.',
        ),
        ('key = "rtsp.session"\n', "", f"{BASE}.key: Is missing; it must be text in quotes."),
        (
            '"move"',
            '"maybe"',
            f'{BASE}.on_new_source: Must be "allow" or "move" or "deny", not "maybe".',
        ),
        (
            'on_new_source = "move"\n',
            "",
            f'{BASE}.on_new_source: Is missing; it must be "allow" or "move" or "deny".',
        ),
        ("d1-4711", "", f"{FIRST}.id: {LENGTH}"),
        ("d1-4711", "é", f"{FIRST}.id: {LENGTH}"),
        ("d1-4711", "x" * 257, f"{FIRST}.id: {LENGTH}"),
        ("d1-4711", "..", f"{FIRST}.id: Must not be . or .., which cannot stand in a URL."),
        (
            "d1-4711",
            "a;b",
            f"{FIRST}.id: Has a ;, where the value of rtsp.session ends: no client can ever say it.",
        ),
        (
            "d3",
            "d1-4711",
            f'{BASE}.entries[2].id: "d1-4711" is there twice; a session has one target and one source.',
        ),
        ('id = "d1-4711", ', "", f"{FIRST}.id: Is missing; it must be text in quotes."),
        (
            'target = "10.64.0.1:554", ',
            "",
            f'{FIRST}.target: Is missing; it must be a target such as "10.64.0.1:8080".',
        ),
        (
            "10.64.0.1:554",
            "10.65.0.1:554",
            f"{FIRST}.target: 10.65.0.1 is in no pool (p: 10.64.0.0/24, fd00:64::/120); use an alias, or write"
            ' { address = "10.65.0.1:554", external = true }.',
        ),
        (
            "198.51.100.7",
            "198.51.100.0/24",
            f'{FIRST}.source: "198.51.100.0/24" is not an IP address; names are not looked up.',
        ),
        ("198.51.100.7", "224.0.0.1", f"{FIRST}.source: 224.0.0.1 is a multicast address; no client comes from there."),
        (', source = "198', ', sauce = "198', f'{FIRST}.sauce: Is not a known key; did you mean "source"?'),
    ],
)
def test_a_mistake_is_one_line(old: str, new: str, mistake: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        config.parse(TEXT.replace(old, new, 1), "steerd.toml")
    assert str(caught.value) == f"steerd.toml: {mistake}"


def test_the_targets_of_sessions_need_room_in_the_mark() -> None:
    text = TEXT.replace("[pools.p]", '[gateway]\nmark_bits = "0-19"\n[pools.p]')
    text = text.replace('"10.64.0.0/24"', '"10.64.0.0/13"').replace("prefixes", 'mode = "anyip"\nprefixes')
    text += """
    [services.ext]
    endpoints = ["203.0.113.11:1/tcp"]
    inspect = ["port-extension"]
    unextended = "unmatched"
    extension_pool = { pool = "p", by = "extension", port = 1 }
    """
    with pytest.raises(ConfigError, match=r"Have room for 524272 targets, but there are 524548; use more bits\."):
        config.parse(text, "steerd.toml")
