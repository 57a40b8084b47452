"""The `stun` parser: requests of Chromium, aioice and coturn, usernames of every kind, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from steerd.model import Answer, Keys
from steerd.wire.stun import BOUND, DATAGRAMS, inspect, request
from tests.flows import flow, flows

VECTORS = Path(__file__).parent.parent / "vectors"
COOKIE = b"\x21\x12\xa4\x42"
USERNAME, INTEGRITY, INTEGRITY_SHA256, REALM, SOFTWARE = 0x0006, 0x0008, 0x001C, 0x0014, 0x8022


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4)


def message(*attributes: bytes, kind: int = 0x0001, cookie: bytes = COOKIE) -> bytes:
    body = b"".join(attributes)
    return struct.pack("!HH", kind, len(body)) + cookie + bytes(range(12)) + body


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chromium-156.0.8078.79-ice",
            {"stun.method": "binding", "stun.username": "d17x:aya0", "stun.ufrag": "d17x"},
        ),
        ("aioice-0.13.0-ice", {"stun.method": "binding", "stun.username": "qFlO:Wp6X", "stun.ufrag": "qFlO"}),
        ("coturn-4.6.1-binding", {"stun.method": "binding"}),
        ("coturn-4.6.1-allocate", {"stun.method": "allocate"}),
        (
            "coturn-4.6.1-allocate-again",
            {"stun.method": "allocate", "stun.username": "alice", "stun.realm": "turn.example"},
        ),
    ],
)
def test_real_clients(name: str, expected: Keys) -> None:
    assert DATAGRAMS.make(())(flow(f"stun-{name}")) == expected


def test_over_tcp() -> None:
    first = (VECTORS / "stun-coturn-4.6.1-allocate.bin").read_bytes()
    again = (VECTORS / "stun-coturn-4.6.1-allocate-again.bin").read_bytes()
    assert inspect(first) == inspect(first + again) == {"stun.method": "allocate"}
    assert inspect(again) == {"stun.method": "allocate", "stun.username": "alice", "stun.realm": "turn.example"}
    assert all(inspect(again[:length]) is Answer.NEED_MORE for length in range(len(again)))


def test_every_vector_is_known_by_this_file() -> None:
    assert len(flows("stun")) == 5


@pytest.mark.parametrize(
    ("username", "ufrag"),
    [
        (b"remote:local", "remote"),
        (b"a:b:c", "a"),
        (b"1700000000:alice", "1700000000"),  # TURN's REST API: a time, which steers nobody
        (b":local", None),
        (b"alice", None),
        (b"", None),
        (b"J\xc3\xbcrg:x", "J\xc3\xbcrg"),
    ],
)
def test_usernames(username: bytes, ufrag: str | None) -> None:
    found = request(message(attribute(USERNAME, username)))
    expected = {"stun.method": "binding", "stun.username": username.decode("latin-1")}
    assert found == (expected if ufrag is None else {**expected, "stun.ufrag": ufrag})


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (0x0001, "binding"),
        (0x0003, "allocate"),
        (0x0004, "refresh"),
        (0x0008, "create-permission"),
        (0x0009, "channel-bind"),
        (0x000B, "connection-bind"),
        (0x0200, "0x080"),
        (0x3EEF, "0xfff"),
        (0x0026, "0x016"),
    ],
)
def test_methods(kind: int, method: str) -> None:
    assert request(message(kind=kind)) == {"stun.method": method}


def test_only_what_is_before_the_integrity_counts() -> None:
    for integrity in (attribute(INTEGRITY, bytes(20)), attribute(INTEGRITY_SHA256, bytes(32))):
        behind = attribute(USERNAME, b"mallory")
        assert request(message(integrity, behind)) == {"stun.method": "binding"}
        found = request(message(attribute(USERNAME, b"alice"), integrity, behind))
        assert found == {"stun.method": "binding", "stun.username": "alice"}


def test_texts_with_padding_and_others_between() -> None:
    data = message(attribute(0x8029, bytes(8)), attribute(SOFTWARE, b"x" * 5), attribute(REALM, b"r"))
    assert request(data) == {"stun.method": "binding", "stun.software": "xxxxx", "stun.realm": "r"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        message(kind=0x0011),
        message(kind=0x0101),
        message(kind=0x0111),
        message(kind=0x4001),
        message(kind=0x8001),
        message(cookie=b"\x21\x12\xa4\x43"),
        bytes.fromhex("0001000801b2e930d80b9d52bcd5db4217dcf4510003000400000000"),
        message(attribute(USERNAME, b"a"), attribute(USERNAME, b"a")),
        message(attribute(REALM, b"a"), attribute(REALM, b"b")),
        message(struct.pack("!HH", USERNAME, 5) + b"abcd"),
        message(struct.pack("!HH", USERNAME, 1)),
        message(b"\x00\x06\x00"),
        message(attribute(USERNAME, b"x" * BOUND)),
    ],
    ids=["empty", "indication", "success", "error", "bit 15", "bit 16", "cookie", "stun client 0.97 (RFC 3489)",
         "two usernames", "two realms", "attribute too long", "attribute cut", "length", "bound"],
)  # fmt: skip
def test_not_mine(data: bytes) -> None:
    assert request(data) is None
    assert inspect(data + b"\x00" * BOUND) is Answer.NOT_MINE


def test_a_datagram_is_one_whole_message() -> None:
    data = message(attribute(USERNAME, b"alice"))
    assert request(data) is not None
    assert request(data[:-4]) is None
    assert request(data + bytes(4)) is None


@pytest.mark.parametrize(
    "beginning",
    [b"\x40", b"\x16\x03\x01\x00\xf0", b"GET", b"\x00\x11", b"\x00\x01\x00\x02", b"\x00\x01\x00\x00\x21\x13"],
)
def test_not_mine_as_soon_as_it_cannot_be_a_request(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE


def test_bound() -> None:
    data = message(attribute(0x8029, bytes(BOUND - 24)))
    assert len(data) == BOUND
    assert inspect(data) == {"stun.method": "binding"}
    assert inspect(data[:-1]) is Answer.NEED_MORE
