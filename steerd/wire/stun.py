"""`stun`: a STUN request (RFC 8489), which is how ICE (RFC 8445, WebRTC) and TURN (RFC 8656) begin, in a UDP datagram
or first on a TCP connection.

Keys, text in latin-1:
- `stun.method`: "binding", "allocate", "refresh", "create-permission", "channel-bind", "connect", "connection-bind", or
  the number of another one as "0x080";
- `stun.username`: USERNAME as sent;
- `stun.ufrag`: what is before the colon of a USERNAME that has one. In ICE that is the fragment that the *receiver* of
  the request made up and gave to its peer in SDP (RFC 8445 section 7.2.2): a daemon that begins its fragments with a
  name of its own, or registers each one, is found by it;
- `stun.realm`, `stun.software`: REALM and SOFTWARE as sent.

The magic cookie is required. Only what is before MESSAGE-INTEGRITY counts (RFC 8489 section 14.5). NOT_MINE are
indications and responses, a length that is no multiple of four or does not fit its attributes (a datagram is one whole
message), one of these attributes twice (RFC 8489 lets receivers take either), and a message longer than BOUND.

What a first request does not say: a TURN client's first Allocate has no username and no realm, since the server's
answer is what asks for them (RFC 8489 section 9.2.3.1); such flows can be told apart by `stun.method` alone and all go
to one server, or go by a key that is there: the source. Over UDP the second Allocate comes from the same port, where
conntrack already has the flow. Where the flow begins anew (a client that authenticates at once, a gateway that was
restarted), the username is there.

Not covered: checks of FINGERPRINT and MESSAGE-INTEGRITY (who knows a fragment may use it; the daemon checks), USERHASH
(section 14.4, a digest in the place of the username), STUN without the cookie (RFC 3489), and ICE over TCP, which puts
a length before every message (RFC 4571).
"""

from __future__ import annotations

from steerd.model import Answer, Keys
from steerd.wire.cursor import Cursor, read, require
from steerd.wire.parser import DatagramParser, Parser, always, always_first

BOUND = 4096
"""More than the texts above may have together (USERNAME 508 bytes, the others 763: RFC 8489 section 14)."""

_HEADER = 20
_COOKIE = b"\x21\x12\xa4\x42"
_TRANSACTION_ID = 12
_NO_REQUEST_HIGH = 0xC1  # the two bits that STUN leaves to others, and the class: section 5
_NO_REQUEST_LOW = 0x10

_METHODS = {
    0x001: "binding",
    0x003: "allocate",
    0x004: "refresh",
    0x008: "create-permission",
    0x009: "channel-bind",
    0x00A: "connect",
    0x00B: "connection-bind",
}
"""IANA's registry "STUN Methods", without those that have indications only."""
_TEXTS = {0x0006: "stun.username", 0x0014: "stun.realm", 0x8022: "stun.software"}
_MESSAGE_INTEGRITY = (0x0008, 0x001C)


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the request that `data` begins with, or NEED_MORE, or NOT_MINE."""
    return read(_request, data, BOUND)


def request(datagram: bytes) -> Keys | None:
    """Keys of the request that a datagram holds; None: it holds none, or not just one."""
    if len(datagram) != _HEADER + int.from_bytes(datagram[2:4]):
        return None
    answer = inspect(datagram)
    return None if isinstance(answer, Answer) else answer


def _request(message: Cursor) -> Keys:
    high = message.number(1)
    require(not high & _NO_REQUEST_HIGH)
    low = message.number(1)
    require(not low & _NO_REQUEST_LOW)
    length = message.number(2)
    require(length % 4 == 0 and _HEADER + length <= BOUND)
    message.expect(_COOKIE)
    message.take(_TRANSACTION_ID)
    message.end_after(length)

    method = (high & 0x3E) << 6 | (low & 0xE0) >> 1 | low & 0x0F
    keys = {"stun.method": _METHODS.get(method, f"0x{method:03x}")}
    counts = True
    while message.left:
        kind = message.number(2)
        size = message.number(2)
        value = message.take(size)
        message.take(-size % 4)
        counts = counts and kind not in _MESSAGE_INTEGRITY
        if counts and kind in _TEXTS:
            require(_TEXTS[kind] not in keys)
            keys[_TEXTS[kind]] = value.decode("latin-1")
    ufrag, colon, _ = keys.get("stun.username", "").partition(":")
    if colon and ufrag:
        keys["stun.ufrag"] = ufrag
    return keys


PARSER = Parser(
    name="stun",
    keys=("stun.username", "stun.ufrag", "stun.realm", "stun.software", "stun.method"),
    bound=BOUND,
    make=always(inspect),
    summary="STUN and TURN over TCP: username, ICE fragment, realm, software and method of the first request",
)
DATAGRAMS = DatagramParser(
    name="stun",
    keys=PARSER.keys,
    datagrams=1,
    make=always_first(request),
    summary="STUN, TURN and ICE over UDP: username, ICE fragment, realm, software and method of a request",
)
