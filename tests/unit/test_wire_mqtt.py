"""The `mqtt` parser: CONNECT of mosquitto_pub in all three versions, when it is answered, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerd.model import Answer, Keys
from steerd.wire.mqtt import BOUND, inspect

VECTORS = Path(__file__).parent.parent / "vectors"


def vector(name: str) -> bytes:
    return (VECTORS / f"mqtt-mosquitto_pub-2.0.11-{name}.bin").read_bytes()


def text(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content


def connect(flags: int, payload: bytes, name: bytes = b"MQTT", level: int = 4) -> bytes:
    body = text(name) + bytes([level, flags]) + b"\x00\x3c" + payload
    length, groups = len(body), b""
    while length >= 0x80:
        groups, length = groups + bytes([length & 0x7F | 0x80]), length >> 7
    return b"\x10" + groups + bytes([length]) + body


@pytest.mark.parametrize(("name", "version"), [("v31", "3.1"), ("v311", "3.1.1"), ("v5", "5")])
def test_mosquitto_pub(name: str, version: str) -> None:
    data = vector(name)
    expected = {"mqtt.version": version, "mqtt.client": "Meter-17", "mqtt.user": "plant/a"}
    without_password = data.removesuffix(text(b"geheim"))
    assert inspect(data) == inspect(without_password) == expected
    assert all(inspect(data[:length]) is Answer.NEED_MORE for length in range(len(without_password)))


def test_a_client_without_a_name() -> None:
    assert inspect(vector("nameless")) == {"mqtt.version": "3.1.1"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (connect(0x02, text(b"\xc3\xa9")), {"mqtt.version": "3.1.1", "mqtt.client": "\xc3\xa9"}),
        (connect(0x82, text(b"c") + text(b"")), {"mqtt.version": "3.1.1", "mqtt.client": "c", "mqtt.user": ""}),
        (connect(0x02, text(b"bridge"), level=0x84), {"mqtt.version": "3.1.1", "mqtt.client": "bridge"}),
        (connect(0x02, text(b"b"), b"MQIsdp", 0x83), {"mqtt.version": "3.1", "mqtt.client": "b"}),
        (connect(0x42, b"\0" + text(b"c") + text(b"p"), level=5), {"mqtt.version": "5", "mqtt.client": "c"}),
        (connect(0x02, text(b"c" * 300)), {"mqtt.version": "3.1.1", "mqtt.client": "c" * 300}),
    ],
    ids=repr,
)
def test_forms(data: bytes, expected: Keys) -> None:
    assert inspect(data) == expected


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x16",
        b"G",
        b"\x30",
        b"\x10\xff\xff\xff\xff",
        b"\x10\x05\x00\x04MQTT",
        b"\x10\x20\x01",
        b"\x10\x20\x00\x05",
        b"\x10\x20\x00\x04MQI",
        b"\x10\x20\x00\x04MQTT\x03",
        b"\x10\x20\x00\x04MQTT\x06",
        b"\x10\x20\x00\x06MQIsdp\x04",
        b"\x10\x20\x00\x04MQTT\x04\x03",
        b"\x10\x20\x00\x04MQTT\x04\x1e",
        b"\x10\x20\x00\x04MQTT\x04\x22",
        b"\x10\x20\x00\x04MQTT\x04\x42",
        connect(0x02, b"\x00\x02c"),
        connect(0x82, text(b"c")),
        connect(0x02, b"\x05" + text(b"c"), level=5),
    ],
    ids=repr,
)
def test_what_is_refused(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE
    assert inspect(beginning + bytes(100)) is Answer.NOT_MINE


def test_the_user_must_come_within_the_bound() -> None:
    def with_will(length: int) -> bytes:
        return connect(0x86, text(b"c") + text(b"w") + text(b"x" * length) + text(b"user") + b"more")

    room = BOUND - (len(with_will(BOUND)) - BOUND - len(b"more"))
    assert inspect(with_will(room)) == {"mqtt.version": "3.1.1", "mqtt.client": "c", "mqtt.user": "user"}
    assert inspect(with_will(room + 1)) is Answer.NOT_MINE
