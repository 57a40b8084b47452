"""The `minecraft` parser: handshakes of mcstatus, what is added to host names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerd.model import Answer
from steerd.wire.minecraft import BOUND, inspect

VECTORS = Path(__file__).parent.parent / "vectors"


def varint(number: int) -> bytes:
    groups = b""
    while number >= 0x80:
        groups, number = groups + bytes([number & 0x7F | 0x80]), number >> 7
    return groups + bytes([number])


def handshake(host: bytes, following: int = 2, protocol: bytes = varint(767), behind: bytes = b"") -> bytes:
    body = b"\0" + protocol + varint(len(host)) + host + b"\x63\xdd" + varint(following) + behind
    return varint(len(body)) + body


@pytest.mark.parametrize("name", ["status", "ping"])
def test_mcstatus(name: str) -> None:
    data = (VECTORS / f"minecraft-mcstatus-14.2.0-{name}.bin").read_bytes()
    expected = {"minecraft.host": "play.example", "minecraft.next": "status"}
    length = 1 + data[0]
    assert inspect(data) == inspect(data[:length]) == expected
    assert all(inspect(data[:part]) is Answer.NEED_MORE for part in range(length))


@pytest.mark.parametrize(("following", "word"), [(1, "status"), (2, "login"), (3, "transfer")])
def test_next(following: int, word: str) -> None:
    assert inspect(handshake(b"a.example", following)) == {"minecraft.host": "a.example", "minecraft.next": word}


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (b"Mc.Example.COM", "mc.example.com"),
        (b"mc.example.", "mc.example"),
        (b"mc.example\0FML\0", "mc.example"),
        (b"MC.example.\0FML3\0", "mc.example"),
        (b"mc.example\x00198.51.100.7\x00069a79f444e94726a5befca90e38aaf5\x00[]", "mc.example"),
        (b"192.0.2.1", "192.0.2.1"),
        (b"2001:DB8::1", "[2001:db8::1]"),
        (b"[2001:db8::1]", "[2001:db8::1]"),
        (b"\xc3\x89.example", "\xc3\x89.example"),
        (b"", None),
        (b"\0FML\0", None),
        (b"x" * 300, "x" * 300),
    ],
)
def test_host(address: bytes, host: str | None) -> None:
    found = inspect(handshake(address))
    assert isinstance(found, dict)
    assert found.get("minecraft.host") == host


def test_a_protocol_version_of_minus_one() -> None:
    assert isinstance(inspect(handshake(b"a", protocol=b"\xff\xff\xff\xff\x0f")), dict)


@pytest.mark.parametrize(
    "beginning",
    [
        b"\xfe",
        b"\xfe\x01\xfa",
        handshake(b"x" * 246),
        b"\x00",
        b"\xff\xff\xff",
        b"\xff\xff\x01",
        b"\x10\x01",
        b"\x16\x03\x01",
        b"GET ",
        b"\x05\x00\x2f\x0c",
        b"\x10\x00\xff\xff\xff\xff\xff",
        handshake(b"a", 0),
        handshake(b"a", 4),
        handshake(b"a", behind=b"\0"),
    ],
    ids=repr,
)
def test_what_is_refused(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE
    assert inspect(beginning + bytes(300)) is Answer.NOT_MINE


def test_the_longest_packet() -> None:
    """A packet of exactly BOUND bytes would begin with FE, like the legacy ping."""
    room = BOUND - (len(handshake(b"x" * 4096)) - 4096)
    assert isinstance(inspect(handshake(b"x" * (room - 1))), dict)
    assert inspect(handshake(b"x" * (room - 1))[:-1]) is Answer.NEED_MORE
    assert inspect(handshake(b"x" * (room + 1))) is Answer.NOT_MINE
