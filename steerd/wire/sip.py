"""`sip`: the head of a SIP request in a UDP datagram, or of a TCP connection's first one (RFC 3261).

Keys, text in latin-1:
- `sip.method`, as sent;
- `sip.host`: host of the Request-URI, lower-case, without port and without one trailing dot, an IPv6 literal in its
  brackets;
- `sip.user`: user of the Request-URI as sent, without password; REGISTER has none;
- `sip.to`, `sip.from`: the address of record in To and From as `user@host`, or `host`, in the same spelling;
- `sip.call-id`: Call-ID as sent.

To, From and Call-ID may have their compact names (t, f, i: section 7.3.3). A To or From without an address of the
schemes sip or sips (`tel:`) gives no key, and neither does such a Request-URI.

The head's form, and what is refused because two readers could see two different requests: `wire.lines`. Refused as
well: more than one To, From or Call-ID, and a URI of the schemes sip or sips without a readable host.

A datagram (section 18.1.1) holds a whole request: one whose head does not end in it is NOT_MINE, and so are the empty
lines that keep a NAT's mapping alive (RFC 5626 section 3.5.1).

Not covered: responses, later requests of the connection, bodies, Via and Route, folded fields and white space before
the colon (both allowed by section 7.3.1), empty lines before the request (section 7.5).
"""

from __future__ import annotations

import re

from steerd.model import Answer, Keys
from steerd.wire.lines import BOUND, Head, Version, host_name, read_keys
from steerd.wire.parser import DatagramParser, Parser, always, always_first

_VERSION = Version(re.compile(rb"SIP/2\.0"), b"SIP/2.0")
_ONCE = {"to": "to", "t": "to", "from": "from", "f": "from", "call-id": "call-id", "i": "call-id"}
# Section 19.1.1: sip:user:password@host:port;uri-parameters?headers
_URI = re.compile(r"(?i:sips?):(?:([^@:]*)(?::[^@]*)?@)?([^@;?]*)(?:[;?].*)?", re.DOTALL)
# Section 20.10: a display name, quoted or not, then the URI in angle brackets.
_NAME_ADDR = re.compile(r'(?:"(?:[^"\\]|\\.)*")?[^"<>]*<([^<>]*)>.*', re.DOTALL)


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the request whose head `data` begins with, or NEED_MORE, or NOT_MINE."""
    return read_keys(data, _VERSION, _keys)


def message(data: bytes) -> Keys | None:
    """Keys of the request that a datagram holds; None: it holds none, or not the whole head."""
    answer = inspect(data)
    return None if isinstance(answer, Answer) else answer


def _keys(head: Head) -> Keys | None:
    """Keys of a head; None: malformed."""
    keys = {"sip.method": head.method}
    fields: dict[str, str] = {}
    for field, text in head.fields:
        name = _ONCE.get(field)
        if name in fields:
            return None
        if name is not None:
            fields[name] = text

    address = _address(head.target)
    if address is None:
        return None
    user, host = address
    if host:
        keys["sip.host"] = host
    if user:
        keys["sip.user"] = user
    for name in ("to", "from"):
        address = _address(_uri(fields.get(name, "")))
        if address is None:
            return None
        user, host = address
        if host:
            keys[f"sip.{name}"] = f"{user}@{host}" if user else host
    if "call-id" in fields:
        keys["sip.call-id"] = fields["call-id"]
    return keys


def _uri(text: str) -> str:
    """The URI in a To or From. Without brackets, what follows a semicolon belongs to the field (section 20)."""
    match = _NAME_ADDR.fullmatch(text)
    return match[1] if match else text.partition(";")[0].rstrip(" \t")


def _address(uri: str) -> tuple[str, str] | None:
    """(user or "", host) of a URI; both "" for one of another scheme; None: malformed."""
    if not uri.lower().startswith(("sip:", "sips:")):
        return "", ""
    match = _URI.fullmatch(uri)
    host = host_name(match[2]) if match else None
    return (match[1] or "", host) if match and host else None


PARSER = Parser(
    name="sip",
    keys=("sip.host", "sip.user", "sip.method", "sip.to", "sip.from", "sip.call-id"),
    bound=BOUND,
    make=always(inspect),
    summary="SIP over TCP: host and user called, method, To, From and Call-ID of the first request",
)
DATAGRAMS = DatagramParser(
    name="sip",
    keys=PARSER.keys,
    datagrams=1,
    make=always_first(message),
    summary="SIP over UDP: host and user called, method, To, From and Call-ID of a request",
)
