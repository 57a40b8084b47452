"""`postgres`: the first message of a PostgreSQL client (frontend/backend protocol 3.x; "Message Formats" in its
documentation, and ProcessStartupPacket in src/backend/tcop/backend_startup.c).

Keys, text in latin-1, none of them decoded or folded:
- of a StartupMessage `postgres.user`, `postgres.database` (the user's name unless the client names one, as the server
  has it) and, if the client gives it, `postgres.application` (application_name);
- of a request that comes instead of it `postgres.request`: `ssl` (SSLRequest), `gss` (GSSENCRequest) or `cancel`
  (CancelRequest). After ssl and gss the client waits for the server, so the user is not known when the connection is
  steered: such a request goes by a route on this key, or to the default. `sslmode=disable gssencmode=disable` makes a
  client send its StartupMessage at once.

Malformed, hence NOT_MINE: a length that the message does not have, more than 10,000 bytes (the server's own limit), no
or an empty user, and user, database or application_name twice.

Not covered: TLS without SSLRequest (`sslnegotiation=direct`; that is the tls parser's), protocol 2, the key of a
CancelRequest (only the server that gave it knows it), the parameter `options`.
"""

from __future__ import annotations

from steerd.model import Answer, Keys
from steerd.wire.cursor import Cursor, read, require
from steerd.wire.parser import Parser, always

BOUND = 10000
"""MAX_STARTUP_PACKET_LENGTH in src/include/libpq/pqcomm.h."""

_REQUESTS = {0x04D2162E: "cancel", 0x04D2162F: "ssl", 0x04D21630: "gss"}
_MAJOR_VERSION = 3
_PARAMETERS = {
    b"user": "postgres.user",
    b"database": "postgres.database",
    b"application_name": "postgres.application",
}


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the message that `data` begins with, or NEED_MORE, or NOT_MINE."""
    return read(_first_message, data, BOUND)


def _first_message(cursor: Cursor) -> Keys:
    # The length counts itself. Its upper half is 0: other protocols are known by their first byte.
    cursor.expect(b"\x00\x00")
    length = cursor.number(2)
    require(8 <= length <= BOUND)
    cursor.end_after(length - 4)
    code = cursor.number(2) << 16
    require(code >> 16 in (_MAJOR_VERSION, 0x04D2))
    code |= cursor.number(2)
    if code >> 16 == _MAJOR_VERSION:
        return _parameters(cursor.take(cursor.left))

    require(code in _REQUESTS)
    # A cancel key has 4 bytes up to protocol 3.0 and up to 256 from 3.2 on, after the number of a process.
    require(5 <= cursor.left <= 260 if _REQUESTS[code] == "cancel" else cursor.left == 0)
    return {"postgres.request": _REQUESTS[code]}


def _parameters(body: bytes) -> Keys:
    """Keys of a StartupMessage from what follows the version: names and values, each ended by NUL, and a NUL."""
    require(body.endswith(b"\0"))
    texts = body[:-1].split(b"\0")
    # Every text has its own NUL, so the last one split off is empty; and a parameter has a name.
    require(texts.pop() == b"" and len(texts) % 2 == 0 and all(texts[::2]))
    keys: Keys = {}
    for name, value in zip(texts[::2], texts[1::2], strict=True):
        if (key := _PARAMETERS.get(name)) is not None:
            require(key not in keys)
            keys[key] = value.decode("latin-1")
    require(keys.get("postgres.user", "") != "")
    if not keys.get("postgres.database"):
        keys["postgres.database"] = keys["postgres.user"]
    return keys


PARSER = Parser(
    name="postgres",
    keys=("postgres.database", "postgres.user", "postgres.application", "postgres.request"),
    bound=BOUND,
    make=always(inspect),
    summary="PostgreSQL: database, user and application of a client without TLS; requests for TLS, GSSAPI, cancelling",
)
