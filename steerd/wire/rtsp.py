"""`rtsp`: the head of a connection's first RTSP request (RFC 2326 for 1.0, RFC 7826 for 2.0).

Keys, text in latin-1:
- `rtsp.method`, as sent;
- `rtsp.host`: lower-case, without port and without one trailing dot, an IPv6 literal in its brackets; from the
  request's URL. `OPTIONS *` has none;
- `rtsp.path`: path and query of the URL as sent, not decoded, not normalised; `*` for `OPTIONS *`;
- `rtsp.session`: the session's id without what follows it (`;timeout=60`). A first request has one when a client comes
  back on a new connection;
- `rtsp.header.NAME`: the first field of that name (lower-case), without the white space around it.

The head's form, and what is refused because two readers could see two different requests: `wire.lines`. Refused as
well: more than one Session, a Session without an id, a URL with user information, and a target that is neither a URL
nor `*`.

Not covered: later requests of the connection, bodies, interleaved data (`$`) before a request, RTSP tunnelled in HTTP
(that is the http parser's), folded fields (allowed in 1.0).
"""

from __future__ import annotations

import re

from steerd.model import Answer, Keys
from steerd.wire.lines import BOUND, Head, Version, absolute_form, host_name, read_keys
from steerd.wire.parser import Parser, always

_VERSION = Version(re.compile(rb"RTSP/[12]\.[0-9]"), b"RTSP/1.0")


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the request whose head `data` begins with, or NEED_MORE, or NOT_MINE."""
    return read_keys(data, _VERSION, _keys)


def _keys(head: Head) -> Keys | None:
    """Keys of a head; None: malformed."""
    keys = {"rtsp.method": head.method, "rtsp.path": head.target}
    if head.target != "*":
        url = absolute_form(head.target)
        host = host_name(url[0]) if url else None
        if url is None or host is None:
            return None
        keys["rtsp.path"] = url[1]
        if host:
            keys["rtsp.host"] = host

    sessions = []
    for field, text in head.fields:
        keys.setdefault(f"rtsp.header.{field}", text)
        if field == "session":
            sessions.append(text.partition(";")[0].rstrip(" \t"))
    if len(sessions) > 1 or "" in sessions:
        return None
    if sessions:
        keys["rtsp.session"] = sessions[0]
    return keys


PARSER = Parser(
    name="rtsp",
    keys=("rtsp.host", "rtsp.path", "rtsp.method", "rtsp.session", "rtsp.header.*"),
    bound=BOUND,
    make=always(inspect),
    summary="RTSP 1.0 and 2.0: host, path, method, session id and headers of the first request",
)
