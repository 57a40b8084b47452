"""`http`: the head of a connection's first HTTP/1.x request (RFC 9112 for the form, RFC 9110 for the fields).

Keys, text in latin-1:
- `http.method`, as sent;
- `http.host`: lower-case, without port and without one trailing dot, an IPv6 literal in its brackets. From the target
  if that is in absolute form or if the method is CONNECT (RFC 9112 section 3.3: the target wins), else from Host.
  Without either (HTTP/1.0, or an empty Host) there is no such key;
- `http.path`: path and query as sent, not decoded, not normalised; `*` for `OPTIONS *`. CONNECT has none;
- `http.header.NAME`: the first field of that name (lower-case), without the white space around it;
- `http.cookie.NAME`: the first cookie of that name (RFC 6265 section 5.4; names keep their case, values their quotes).

NEED_MORE until the empty line that ends the head, but NOT_MINE as soon as the bytes cannot be a request line (method,
space, target, space, `HTTP/1.` and a digit). A line ends with CR LF or with a bare LF (RFC 9112 section 2.2 allows
that); a CR anywhere else makes the request malformed. An empty line before the request line, which section 2.2 lets
servers ignore, is not accepted: it occurs between requests, and this is the first.

Malformed, hence NOT_MINE, since two readers could see two different requests: folded fields, white space before the
colon, a line without a colon, NUL, more than one Host, a Host or authority that is not a host with an optional port
(with user information, too), and a head longer than 16,384 bytes.

Not covered: later requests of the connection, bodies, HTTP/2 (its preface is NOT_MINE here), WebSocket beyond its
opening request.
"""

from __future__ import annotations

import re

from steerd.model import Answer, Keys
from steerd.wire.lines import BOUND, Head, Version, absolute_form, host_name, read_keys
from steerd.wire.parser import Parser, always

__all__ = ["BOUND", "PARSER", "inspect"]

_VERSION = Version(re.compile(rb"HTTP/1\.[0-9]"), b"HTTP/1.1")


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the request whose head `data` begins with, or NEED_MORE, or NOT_MINE."""
    return read_keys(data, _VERSION, _keys)


def _keys(head: Head) -> Keys | None:
    """Keys of a head; None: malformed."""
    keys = {"http.method": head.method}
    hosts = []
    for field, text in head.fields:
        keys.setdefault(f"http.header.{field}", text)
        if field == "host":
            hosts.append(text)
        elif field == "cookie":
            for cookie, content in cookies(text):
                keys.setdefault(f"http.cookie.{cookie}", content)
    if len(hosts) > 1:
        return None

    host = host_name(hosts[0]) if hosts else ""
    if host is None:
        return None
    path: str | None = head.target
    if head.method == "CONNECT":
        host, path = host_name(head.target), None
    elif absolute := absolute_form(head.target):
        host, path = host_name(absolute[0]), absolute[1]
    if host is None:
        return None
    if host:
        keys["http.host"] = host
    if path is not None:
        keys["http.path"] = path
    return keys


def cookies(text: str) -> list[tuple[str, str]]:
    """The name-value pairs of a Cookie field; what has no `=` or no name is nobody's cookie."""
    pairs = (pair.partition("=") for pair in text.split(";"))
    return [(name.strip(" \t"), value.strip(" \t")) for name, equals, value in pairs if equals and name.strip(" \t")]


PARSER = Parser(
    name="http",
    keys=("http.host", "http.path", "http.method", "http.header.*", "http.cookie.*"),
    bound=BOUND,
    make=always(inspect),
    summary="HTTP/1.x: host, path, method, headers and cookies of the first request",
)
