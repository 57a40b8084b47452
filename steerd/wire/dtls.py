"""`dtls`: the ClientHello that a DTLS association begins with (RFC 6347, RFC 9147).

Keys, text as `wire.tls` gives it:
- `dtls.sni`: the host name of the server_name extension; WebRTC, whose DTLS is behind ICE, sends none;
- `dtls.alpn`: the protocol the client offered first; `dtls.alpn.NAME`: "1" for every one;
- `dtls.version`: the highest version offered: "1.0", "1.2" or "1.3"; none where only others are.

A hello that does not fit into one datagram comes in fragments (a post-quantum one takes two); they may come in any
order, twice, and cut in two ways. A server may answer the first hello with a cookie, and the client then sends the
hello again with that (message_seq 1): both are put together, each by itself, and the first that is complete decides.
Usually that is the first one, and the second follows it by conntrack; after a restart of the gateway it may be the only
one that is seen.

NEED_MORE while a hello is not complete. A flow whose first datagram holds no fragment of a hello is NOT_MINE; in later
ones what is not of a hello is passed over, as servers do, so that a stray datagram does not end it. Malformed, hence
NOT_MINE: two fragments that disagree about a byte or about the hello's length, and what `wire.tls` refuses. A datagram
is passed over as a whole if its records or fragments do not fit into it.

Bounds, for any bytes whatever: a hello has at most HELLO_BOUND bytes, a flow at most DATAGRAM_BOUND datagrams before
the hello is complete, and a datagram at most FRAGMENT_BOUND fragments.

Not covered: hellos in encrypted records, so those of a renegotiation, and the draft version that Cisco's AnyConnect
has (0x0100).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from steerd.model import Answer, Keys
from steerd.wire import tls
from steerd.wire.cursor import Cursor, MalformedError, TooShortError, require
from steerd.wire.parser import DatagramParser

HELLO_BOUND = 8192
"""Bytes of one hello; a post-quantum one has less than 2 KiB."""
DATAGRAM_BOUND = 16
"""A hello of HELLO_BOUND takes 7 datagrams of 1,200 bytes; this leaves room for repetitions and small MTUs. All are
read again with each that comes, so this bounds what one more may cost: 0.2 ms."""
FRAGMENT_BOUND = 4
"""Clients put one fragment into a datagram."""

_HANDSHAKE = 22
_MAJOR_VERSION = 0xFE
_CLEARTEXT = b"\x00\x00"  # the epoch before any keys
_SEQUENCE_NUMBER = 6
_CLIENT_HELLO = 1
_LAST_MESSAGE = 1  # the first hello is message 0, the one with a cookie 1

_VERSION_AND_RANDOM = 2 + 32
_TLS_1_2 = b"\x03\x03"
_DTLS_1_2 = b"\xfe\xfd"
_SUPPORTED_VERSIONS = 43
# The later the version, the smaller the number.
_VERSIONS = {b"\xfe\xff": "1.0", b"\xfe\xfd": "1.2", b"\xfe\xfc": "1.3"}


class _Fragment(NamedTuple):
    """A part of a ClientHello."""

    message: int
    length: int
    """Bytes of the whole hello."""
    offset: int
    data: bytes


class _Hello:
    """A ClientHello that is not complete."""

    def __init__(self, length: int) -> None:
        self._body = bytearray(length)
        self._here = bytearray(length)
        """0xff for every byte that has come."""

    def add(self, fragment: _Fragment) -> bytes | None:
        """The whole hello, if this was the last part of it. Raises MalformedError if it contradicts another part."""
        place = slice(fragment.offset, fragment.offset + len(fragment.data))
        require(fragment.length == len(self._body))
        differences = int.from_bytes(self._body[place]) ^ int.from_bytes(fragment.data)
        require(not differences & int.from_bytes(self._here[place]))
        self._body[place] = fragment.data
        self._here[place] = b"\xff" * len(fragment.data)
        return None if 0 in self._here else bytes(self._body)


def inspect(datagrams: Sequence[bytes]) -> Keys | Answer:
    """Keys of the first ClientHello that a flow's datagrams make complete, or NEED_MORE, or NOT_MINE."""
    hellos: dict[int, _Hello] = {}
    try:
        for datagram in datagrams[:DATAGRAM_BOUND]:
            for fragment in _fragments(datagram):
                if fragment.message not in hellos:
                    hellos[fragment.message] = _Hello(fragment.length)
                body = hellos[fragment.message].add(fragment)
                if body is not None:
                    return client_hello(body)
            require(bool(hellos))
    except (MalformedError, TooShortError):
        return Answer.NOT_MINE
    return Answer.NEED_MORE if len(datagrams) < DATAGRAM_BOUND else Answer.NOT_MINE


def client_hello(body: bytes) -> Keys:
    """Keys of a whole ClientHello, the body of the handshake message. Raises MalformedError or TooShortError.

    It differs from TLS's in its version numbers and in the cookie behind the session id (RFC 6347 section 4.2.1).
    """
    hello = Cursor(body)
    hello.end_after(len(body))
    legacy_version = hello.take(2)
    require(legacy_version[0] == _MAJOR_VERSION)
    hello.take(_VERSION_AND_RANDOM - 2)
    hello.take(hello.number(1))
    without_cookie = _TLS_1_2 + body[2 : len(body) - hello.left]
    hello.take(hello.number(1))
    without_cookie += body[len(body) - hello.left :]
    of_tls = tls.client_hello(without_cookie, len(without_cookie))
    if isinstance(of_tls, Answer):
        raise MalformedError
    keys = {f"d{name}": text for name, text in of_tls.items() if name != "tls.version"}
    known = [version for version in _offered(hello, legacy_version) if version in _VERSIONS]
    if known:
        keys["dtls.version"] = _VERSIONS[min(known)]
    return keys


def _offered(hello: Cursor, legacy_version: bytes) -> list[bytes]:
    """The versions that a hello, read up to its cookie, offers (RFC 9147 section 5.3)."""
    hello.take(hello.number(2))
    hello.take(hello.number(1))
    if hello.left:
        hello.take(2)
    while hello.left:
        kind = hello.number(2)
        content = hello.take(hello.number(2))
        if kind == _SUPPORTED_VERSIONS:
            return [content[start : start + 2] for start in range(1, len(content), 2)]
    return [max(legacy_version, _DTLS_1_2)]


def _fragments(datagram: bytes) -> list[_Fragment]:
    """The parts of hellos that a datagram begins with; none if anything of them is not as it must be."""
    try:
        return list(_read_fragments(datagram))
    except (MalformedError, TooShortError):
        return []


def _read_fragments(datagram: bytes) -> Iterator[_Fragment]:
    records = Cursor(datagram)
    records.end_after(len(datagram))
    count = 0
    while records.left and records.number(1) == _HANDSHAKE:
        require(records.number(1) == _MAJOR_VERSION)
        records.take(1)
        if records.take(2) != _CLEARTEXT:
            return
        records.take(_SEQUENCE_NUMBER)
        content = records.take(records.number(2))
        messages = Cursor(content)
        messages.end_after(len(content))
        require(bool(content))
        while messages.left:
            count += 1
            require(count <= FRAGMENT_BOUND)
            yield _read_fragment(messages)


def _read_fragment(messages: Cursor) -> _Fragment:
    """RFC 6347 section 4.2.2."""
    require(messages.number(1) == _CLIENT_HELLO)
    length = messages.number(3)
    message = messages.number(2)
    offset = messages.number(3)
    data = messages.take(messages.number(3))
    require(length <= HELLO_BOUND and message <= _LAST_MESSAGE)
    require(bool(data) and offset + len(data) <= length)
    return _Fragment(message, length, offset, data)


DATAGRAMS = DatagramParser(
    name="dtls",
    keys=("dtls.sni", "dtls.alpn", "dtls.alpn.*", "dtls.version"),
    datagrams=DATAGRAM_BOUND,
    make=lambda _patterns: inspect,
    summary="DTLS: server name (SNI), application protocols (ALPN) and version of the ClientHello",
)
