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
from steerd.wire.parser import Inspect, Parser

BOUND = 16384
"""More than the limits on a request's head that common servers have by default (8 KiB per line)."""

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
# RFC 9112 wants visible ASCII. Bytes above it are sent unencoded by some clients and taken by most servers.
_TARGET = re.compile(rb"[\x21-\x7e\x80-\xff]+")
_VERSION = re.compile(rb"HTTP/1\.[0-9]\r?")
_VERSION_EXAMPLE = b"HTTP/1.1\r"
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_ABSOLUTE_FORM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)(.*)", re.DOTALL)
# RFC 3986 section 3.2.2: a bracketed literal, or a registered name; an IPv4 address has the form of the latter.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.vV%_~-]+\]|[0-9A-Za-z._~%!$&'()*+,;=-]*)(?::[0-9]*)?")


def http_parser(_patterns: tuple[str, ...] = ()) -> Inspect:
    """The inspecting function; routes make no difference to it."""
    return inspect


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the request whose head `data` begins with, or NEED_MORE, or NOT_MINE."""
    head = data[:BOUND]
    if not _may_begin_a_request(head):
        return Answer.NOT_MINE
    end = _END_OF_HEAD.search(head)
    if end is None:
        return Answer.NEED_MORE if len(data) < BOUND else Answer.NOT_MINE
    keys = _read_head(head[: end.start()])
    return Answer.NOT_MINE if keys is None else keys


def _may_begin_a_request(head: bytes) -> bool:
    """Whether the bytes up to the first LF are a request line or, if there is no LF yet, the beginning of one."""
    line, complete, _ = head.partition(b"\n")
    method, space, rest = line.partition(b" ")
    if not space:
        return not complete and (not method or _TOKEN.fullmatch(method) is not None)
    if not _TOKEN.fullmatch(method):
        return False
    target, space, version = rest.partition(b" ")
    if not space:
        return not complete and (not target or _TARGET.fullmatch(target) is not None)
    if not _TARGET.fullmatch(target):
        return False
    if not complete:
        version += _VERSION_EXAMPLE[len(version) :]
    return _VERSION.fullmatch(version) is not None


def _read_head(head: bytes) -> Keys | None:
    """Keys of a head (a checked request line, then field lines; the last line end is not in it); None: malformed."""
    request_line, *lines = (line.removesuffix(b"\r") for line in head.split(b"\n"))
    method, target, _ = request_line.decode("latin-1").split(" ")
    keys = {"http.method": method}
    hosts = []
    for line in lines:
        name, colon, value = line.partition(b":")
        # A folded line begins with white space, which no token has: it is refused here as well.
        if not colon or not _TOKEN.fullmatch(name) or b"\r" in value or b"\x00" in value:
            return None
        field, text = name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")
        keys.setdefault(f"http.header.{field}", text)
        if field == "host":
            hosts.append(text)
        elif field == "cookie":
            for cookie, content in _cookies(text):
                keys.setdefault(f"http.cookie.{cookie}", content)
    if len(hosts) > 1:
        return None

    host = _host_name(hosts[0]) if hosts else ""
    if host is None:
        return None
    path: str | None = target
    if method == "CONNECT":
        host, path = _host_name(target), None
    elif absolute := _ABSOLUTE_FORM.fullmatch(target):
        host, path = _host_name(absolute[1]), absolute[2]
        if not path.startswith("/"):  # RFC 3986 section 6.2.3: an empty path is "/"
            path = f"/{path}"
    if host is None:
        return None
    if host:
        keys["http.host"] = host
    if path is not None:
        keys["http.path"] = path
    return keys


def _host_name(authority: str) -> str | None:
    """`Example.com.:80` is `example.com`. "" stays "" (allowed where a target has no authority); None: malformed."""
    match = _HOST.fullmatch(authority)
    return match[1].lower().removesuffix(".") if match else None


def _cookies(text: str) -> list[tuple[str, str]]:
    """The name-value pairs of a Cookie field; what has no `=` or no name is nobody's cookie."""
    pairs = (pair.partition("=") for pair in text.split(";"))
    return [(name.strip(" \t"), value.strip(" \t")) for name, equals, value in pairs if equals and name.strip(" \t")]


PARSER = Parser(
    name="http",
    keys=("http.host", "http.path", "http.method", "http.header.*", "http.cookie.*"),
    bound=BOUND,
    make=http_parser,
    summary="HTTP/1.x: host, path, method, headers and cookies of the first request",
)
