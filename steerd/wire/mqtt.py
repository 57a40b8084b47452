"""`mqtt`: the CONNECT packet that an MQTT client sends first (versions 3.1, 3.1.1 and 5: section 3.1 of each standard).

Keys, text in latin-1 (a name that is not ASCII shows its UTF-8 bytes, one character each):
- `mqtt.version`: `3.1`, `3.1.1` or `5`;
- `mqtt.client`: the client identifier; there is none where it is empty and the server makes one up;
- `mqtt.user`: the user name, if there is one.

An answer is given as soon as the user name is there; the password is neither waited for nor looked at. mosquitto's
bridges set the top bit of the version, which is ignored here.

Malformed, hence NOT_MINE: fields that do not fit the packet's length, flags that the version does not allow (reserved
ones, a will's flags without a will, in 3.1.1 a password without a user). A CONNECT whose user name does not come within
the first 16,384 bytes (a long will before it) is NOT_MINE.

Not covered: properties of version 5, MQTT in WebSocket, MQTT-SN.
"""

from __future__ import annotations

from steerd.model import Answer, Keys
from steerd.wire.cursor import Cursor, MalformedError, read, require
from steerd.wire.parser import Parser, always

BOUND = 16384

_CONNECT = b"\x10"
_USER, _PASSWORD, _WILL_RETAIN, _WILL_QOS, _WILL, _RESERVED = 0x80, 0x40, 0x20, 0x18, 0x04, 0x01
_FROM_A_BRIDGE = 0x80
_VERSIONS = {(b"MQIsdp", 3): "3.1", (b"MQTT", 4): "3.1.1", (b"MQTT", 5): "5"}


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the CONNECT packet that `data` begins with, or NEED_MORE, or NOT_MINE."""
    return read(_connect, data, BOUND)


def _connect(cursor: Cursor) -> Keys:
    cursor.expect(_CONNECT)
    cursor.end_after(cursor.varint(longest=4))
    version = _version(cursor)
    flags = cursor.number(1)
    _check_flags(flags, version)
    cursor.take(2)  # keep alive
    _skip_properties(cursor, version)
    keys = {"mqtt.version": version}
    if client := _text(cursor):
        keys["mqtt.client"] = client
    if flags & _WILL:
        _skip_properties(cursor, version)
        _text(cursor)  # topic
        _text(cursor)  # payload
    if flags & _USER:
        keys["mqtt.user"] = _text(cursor)
    return keys


def _version(cursor: Cursor) -> str:
    """The version from the protocol's name and level, whose lengths tell other protocols apart early."""
    cursor.expect(b"\0")
    length = cursor.number(1)
    name = next((name for name, _ in _VERSIONS if len(name) == length), None)
    if name is None:
        raise MalformedError
    cursor.expect(name)
    version = _VERSIONS.get((name, cursor.number(1) & ~_FROM_A_BRIDGE))
    if version is None:
        raise MalformedError
    return version


def _check_flags(flags: int, version: str) -> None:
    if version == "3.1":  # It says nothing about the bits that it does not use.
        return
    require(not flags & _RESERVED and flags & _WILL_QOS != _WILL_QOS)
    require(bool(flags & _WILL) or not flags & (_WILL_RETAIN | _WILL_QOS))
    require(version == "5" or bool(flags & _USER) or not flags & _PASSWORD)


def _skip_properties(cursor: Cursor, version: str) -> None:
    if version == "5":
        cursor.take(cursor.varint(longest=4))


def _text(cursor: Cursor) -> str:
    return cursor.take(cursor.number(2)).decode("latin-1")


PARSER = Parser(
    name="mqtt",
    keys=("mqtt.client", "mqtt.user", "mqtt.version"),
    bound=BOUND,
    make=always(inspect),
    summary="MQTT 3.1, 3.1.1 and 5: client identifier, user name and version of CONNECT",
)
