"""`tls`: the ClientHello that a TLS connection begins with (RFC 8446 and, before TLS 1.3, RFC 5246).

Keys, text in latin-1:
- `tls.sni`: the host name of the server_name extension (RFC 6066 section 3), lower-case (ASCII letters) and without one
  trailing dot. A client that sends no such extension gives no such key;
- `tls.alpn`: the protocol the client offered first, the one it likes best (RFC 7301);
- `tls.alpn.NAME`: "1" for every protocol offered (`tls.alpn.h2 = 1` matches whatever its place in the list). Names keep
  their case;
- `tls.version`: the highest version offered: "1.0", "1.1", "1.2" or "1.3"; none where only others are offered.

GREASE values (RFC 8701) are passed over. With Encrypted Client Hello (RFC 9849) the name seen is that of the outer
hello, the provider's public name: the true one is encrypted, and a gateway without the key cannot know it.

NEED_MORE until the hello is complete, however it was cut into records and segments, but NOT_MINE as soon as the bytes
cannot be handshake records that begin with a ClientHello. Malformed, hence NOT_MINE: lengths that contradict each
other, an extension that is there twice (RFC 8446 section 4.2), more than one host name, an empty one, one with white
space or control characters (a reader of C strings would see another name), and a hello that does not end within the
first 18,432 bytes. RFC 8446 would allow 16 MiB, and common servers take 16 KiB.

Where `tls.sni` is the only key that counts (`BRIEF`), the answer is there with the name, which stands in the first
segment of most hellos that need two; what follows is the daemon's to judge.

Not covered: the hello of SSL 2.0 (RFC 6101 appendix E), DTLS, hellos after a HelloRetryRequest (the connection is
decided by then), and TLS that begins after a plaintext exchange (STARTTLS).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import lru_cache

from steerd.model import Answer, Keys
from steerd.wire.parser import Brief, Parser, always

BOUND = 18432
"""A hello of 16 KiB (a post-quantum one has 2 KiB) and the headers of its records."""
MAX_RECORDS = 128
"""Records that a hello may be cut into."""

_RECORD_HEADER = 5
_MESSAGE_HEADER = 4
_MAX_FRAGMENT = 1 << 14  # RFC 8446 section 5.1
_HANDSHAKE = 22
_CLIENT_HELLO = 1
_MAJOR_VERSION = 3

_SERVER_NAME = 0
_ALPN = 16
_SUPPORTED_VERSIONS = 43
_HOST_NAME = 0

_HELLO_START = 2 + 32  # behind legacy_version and random
_EXTENSION_HEADER = struct.Struct("!HH").unpack_from
_LENGTH = struct.Struct("!H").unpack_from
_ONE_RECORD = struct.Struct("!BBxHI").unpack_from
_ONE_NAME = struct.Struct("!HBH").unpack_from

_VERSIONS = {b"\x03\x01": "1.0", b"\x03\x02": "1.1", b"\x03\x03": "1.2", b"\x03\x04": "1.3"}
_TLS_1_2 = b"\x03\x03"
_GREASE = frozenset(bytes([value, value]) for value in range(0x0A, 0x100, 0x10))
_NOT_IN_A_NAME = re.compile(rb"[\x00-\x20\x7f]")


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the ClientHello that `data` begins with, or NEED_MORE, or NOT_MINE."""
    return _inspect(data, client_hello)


def inspect_name(data: bytes) -> Keys | Answer:
    """The same, of `tls.sni` alone."""
    return _inspect(data, server_name)


def _inspect(data: bytes, read: Callable[[bytes, int], Keys | Answer]) -> Keys | Answer:
    message, broken = _handshake_bytes(data[:BOUND])
    if message and message[0] != _CLIENT_HELLO:
        return Answer.NOT_MINE
    answer: Keys | Answer = Answer.NEED_MORE
    if len(message) >= _MESSAGE_HEADER:
        end = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER])
        if end + _RECORD_HEADER > BOUND:
            return Answer.NOT_MINE
        answer = read(message[_MESSAGE_HEADER:end], end - _MESSAGE_HEADER)
    return Answer.NOT_MINE if answer is Answer.NEED_MORE and (broken or len(data) >= BOUND) else answer


def client_hello(body: bytes, size: int) -> Keys | Answer:
    """Keys of a ClientHello of `size` bytes, of which `body` is there: of the handshake message, without its 4-byte
    header (QUIC carries it without records, RFC 9001 section 4)."""
    if len(body) < size:
        return Answer.NEED_MORE
    try:
        return _read_hello(body)
    except (_MalformedError, IndexError, struct.error):
        return Answer.NOT_MINE


def server_name(body: bytes, size: int) -> Keys | Answer:
    """The same, of `tls.sni` alone: as soon as it is there, and nothing behind it is looked at."""
    try:
        return _read_name(body, size)
    except _MalformedError:
        return Answer.NOT_MINE
    except (IndexError, struct.error):  # the end of what is there, or of the hello
        return Answer.NEED_MORE if len(body) < size else Answer.NOT_MINE


def _handshake_bytes(data: bytes) -> tuple[bytes, bool]:
    """What the handshake records at the beginning carry, as far as it is there, up to the end of the first message; and
    whether something else, or too many of them, follows before that end."""
    # Nearly always there is but one, and it holds the whole message.
    if len(data) > _RECORD_HEADER + _MESSAGE_HEADER:
        kind, major, length, message_length = _ONE_RECORD(data)
        if kind == _HANDSHAKE and major == _MAJOR_VERSION and 0 < length <= _MAX_FRAGMENT:
            end = _MESSAGE_HEADER + (message_length & 0xFFFFFF)
            if end <= length and _RECORD_HEADER + end <= len(data):
                return data[_RECORD_HEADER : _RECORD_HEADER + length], False
    message = bytearray()
    start = records = 0
    while start < len(data):
        # All of them are read again with every segment that comes.
        records += 1
        if records > MAX_RECORDS:
            return bytes(message), True
        header = data[start : start + _RECORD_HEADER]
        if header[0] != _HANDSHAKE or header[1:2] not in (b"", bytes([_MAJOR_VERSION])):
            return bytes(message), True
        if len(header) < _RECORD_HEADER:
            break
        length = int.from_bytes(header[3:])
        if not 0 < length <= _MAX_FRAGMENT:
            return bytes(message), True
        start += _RECORD_HEADER
        message += data[start : start + length]
        start += length
        # What follows the first message is not looked at: it must not change the answer.
        if len(message) >= _MESSAGE_HEADER:
            end = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER])
            if len(message) >= end:
                break
    return bytes(message), False


class _MalformedError(Exception):
    """Lengths or values that no ClientHello has."""


def _only_vector(data: bytes, start: int, length_size: int) -> bytes:
    """The bytes that follow their own length (RFC 8446 section 3.4) at `start`, and fill `data` from there on."""
    first = start + length_size
    if first > len(data) or first + int.from_bytes(data[start:first]) != len(data):
        raise _MalformedError
    return data[first:]


def _behind_the_suites(body: bytes, size: int) -> int:
    """Where a hello's extensions begin, with their length; before TLS 1.3 there could be none at all, and the hello end
    here (RFC 8446 section 4.1.2, RFC 5246 section 7.4.1.2)."""
    session_id = body[_HELLO_START]
    cipher_suites: int = _LENGTH(body, _HELLO_START + 1 + session_id)[0]
    at = _HELLO_START + 3 + session_id
    at += cipher_suites
    compression_methods = body[at]
    at += 1 + compression_methods
    if (
        body[0] != _MAJOR_VERSION
        or session_id > 32
        or not cipher_suites
        or cipher_suites % 2
        or not compression_methods
        or at > size
    ):
        raise _MalformedError
    return at


def _read_name(body: bytes, size: int) -> Keys:
    start = _behind_the_suites(body, size)
    if start == size:
        return {}
    if start + 2 + _LENGTH(body, start)[0] != size:
        raise _MalformedError
    start += 2
    while start < size:
        kind, length = _EXTENSION_HEADER(body, start)
        start += 4
        end = start + length
        if end > size:
            raise _MalformedError
        if kind == _SERVER_NAME:
            if end > len(body):
                raise IndexError
            return {"tls.sni": _host_name(body[start:end])}
        start = end
    return {}


def _read_hello(body: bytes) -> Keys:
    at = _behind_the_suites(body, len(body))
    extensions = _extensions(body, at) if at < len(body) else {}

    keys: Keys = {}
    if _SERVER_NAME in extensions:
        keys["tls.sni"] = _host_name(_content(body, extensions[_SERVER_NAME]))
    if _ALPN in extensions:
        content = _content(body, extensions[_ALPN])
        keys.update(_known_protocols(content) if len(content) <= _SHORT else _protocols(content))
    if _SUPPORTED_VERSIONS in extensions:
        content = _content(body, extensions[_SUPPORTED_VERSIONS])
        keys.update(_known_versions(content) if len(content) <= _SHORT else _versions(content))
    else:
        keys.update(_highest([min(body[:2], _TLS_1_2)]))  # RFC 8446 section 4.2.1: 1.3 is never offered this way
    return keys


def _extensions(body: bytes, at: int) -> dict[int, int]:
    """Where each extension's content begins, by its type; the extensions fill the rest of the hello from `at` on."""
    found: dict[int, int] = {}
    start, size = at + 2, len(body)
    if start + _LENGTH(body, at)[0] != size:
        raise _MalformedError
    while start < size:
        kind, length = _EXTENSION_HEADER(body, start)
        start += 4
        if kind in found or start + length > size:
            raise _MalformedError
        found[kind] = start
        start += length
    return found


def _content(body: bytes, start: int) -> bytes:
    return body[start : start + _LENGTH(body, start - 2)[0]]


def _host_name(content: bytes) -> str:
    """The one host name of a ServerNameList; names of other types, which nobody ever defined, are refused."""
    size = len(content)
    if size < 5 or _ONE_NAME(content) != (size - 2, _HOST_NAME, size - 5):
        raise _MalformedError
    name = content[5:]
    if _NOT_IN_A_NAME.search(name):
        raise _MalformedError
    name = name.lower().removesuffix(b".")
    if not name:
        raise _MalformedError
    return name.decode("latin-1")


def _names(data: bytes) -> list[bytes]:
    """A ProtocolNameList: at least one name, and none is empty (RFC 7301 section 3.1)."""
    found = []
    start, size = 0, len(data)
    while start < size:
        end = start + 1 + data[start]
        found.append(data[start + 1 : end])
        start = end
    if start > size or not found or not all(found):
        raise _MalformedError
    return found


def _protocols(content: bytes) -> Keys:
    """Of the ALPN extension."""
    keys: Keys = {}
    offered = [name for name in _names(_only_vector(content, 0, 2)) if name not in _GREASE]
    if offered:
        keys["tls.alpn"] = offered[0].decode("latin-1")
    for name in offered:
        keys[f"tls.alpn.{name.decode('latin-1')}"] = "1"
    return keys


def _versions(content: bytes) -> Keys:
    """Of the supported_versions extension."""
    data = _only_vector(content, 0, 1)
    if not data or len(data) % 2:
        raise _MalformedError
    return _highest([data[start : start + 2] for start in range(0, len(data), 2)])


def _highest(versions: list[bytes]) -> Keys:
    known = [version for version in versions if version in _VERSIONS]
    return {"tls.version": _VERSIONS[max(known)]} if known else {}


# Clients say these in a few ways, over and over. A long one, which somebody may have made up, is not kept.
_SHORT = 64
_known_protocols = lru_cache(maxsize=1024)(_protocols)
_known_versions = lru_cache(maxsize=1024)(_versions)


BRIEF = Brief(("tls.sni",), inspect_name)
PARSER = Parser(
    name="tls",
    keys=("tls.sni", "tls.alpn", "tls.alpn.*", "tls.version"),
    bound=BOUND,
    make=always(inspect),
    summary="TLS: server name (SNI), application protocols (ALPN) and version of the ClientHello",
    brief=BRIEF,
)
