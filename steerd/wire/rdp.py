"""`rdp`: the X.224 Connection Request that a Remote Desktop client sends first ([MS-RDPBCGR] section 2.2.1.1, in a TPKT
packet, RFC 1006 section 6).

Keys, text in latin-1, at most one of the two:
- `rdp.cookie`: the user in `Cookie: mstshash=USER`, as sent. Clients may shorten it (mstsc: to 9 characters) or
  put the domain before it (`DOMAIN\\USER`);
- `rdp.token`: a routing token, given to clients by a connection broker: what follows `Cookie: msts=`, or the whole line
  if it has another form.

A client that sends neither is answered with no keys.

Malformed, hence NOT_MINE: lengths that contradict each other, another class than 0, and a cookie or token without the
CR LF that ends it.

Not covered: the negotiation request behind it (which asks for TLS or CredSSP), so no name of the server: RDP clients
send that only in the TLS that follows; RDP straight in TLS; RDP over UDP.
"""

from __future__ import annotations

from steerd.model import Answer, Keys
from steerd.wire.cursor import Cursor, read, require
from steerd.wire.parser import Parser, always

BOUND = 259
"""4 bytes TPKT, the length indicator, and at most 254 bytes that it counts (ISO 8073 section 13.2.1)."""

_TPKT_3 = b"\x03\x00"
_CONNECTION_REQUEST = b"\xe0"
_NEGOTIATION_REQUEST = b"\x01"
_COOKIE = b"Cookie: mstshash="
_TOKEN = b"Cookie: msts="


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the Connection Request that `data` begins with, or NEED_MORE, or NOT_MINE."""
    return read(_connection_request, data, BOUND)


def _connection_request(cursor: Cursor) -> Keys:
    cursor.expect(_TPKT_3)
    length = cursor.number(2)
    require(11 <= length <= BOUND)
    require(cursor.number(1) == length - 5)
    cursor.end_after(length - 5)
    cursor.expect(_CONNECTION_REQUEST)
    cursor.expect(b"\0\0")  # destination reference
    cursor.take(2)  # source reference
    cursor.expect(b"\0")  # class and options
    return _cookie_or_token(cursor.take(cursor.left))


def _cookie_or_token(variable: bytes) -> Keys:
    """Keys of the request's variable part: perhaps a cookie or a token, perhaps a negotiation request."""
    if not variable or variable.startswith(_NEGOTIATION_REQUEST):
        return {}
    line, ended, _ = variable.partition(b"\r\n")
    require(bool(ended))
    if line.startswith(_COOKIE):
        return {"rdp.cookie": line.removeprefix(_COOKIE).decode("latin-1")}
    return {"rdp.token": line.removeprefix(_TOKEN).decode("latin-1")}


PARSER = Parser(
    name="rdp",
    keys=("rdp.cookie", "rdp.token"),
    bound=BOUND,
    make=always(inspect),
    summary="Remote Desktop: the user's cookie or the routing token of the connection request",
)
