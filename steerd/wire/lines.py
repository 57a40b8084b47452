"""Heads made of lines, which HTTP/1.x, RTSP and SIP share: a request line, field lines, an empty line.

`read_head` keeps the contract of `wire.parser` for all of them. NEED_MORE until the empty line that ends the head, but
NOT_MINE as soon as the bytes cannot be a request line (method, space, target, space, version). A line ends with CR LF
or with a bare LF; a CR anywhere else makes the request malformed.

Malformed, hence NOT_MINE, since two readers could see two different requests: folded fields, white space before the
colon, a line without a colon, NUL, and a head longer than BOUND.

Sources: RFC 9112 sections 2.2, 3 and 5 (HTTP/1.1), RFC 2326 section 4 and RFC 7826 section 5 (RTSP), RFC 3261 section
7 (SIP). SIP and RTSP 1.0 allow folded fields and white space before the colon; they are refused there as well. Text is
latin-1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from steerd.model import Answer, Keys

BOUND = 16384
"""More than the limits on a request's head that common servers have by default (8 KiB per line)."""

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2; RFC 3261 and RFC 7826 have the same
# RFC 9112 wants visible ASCII. Bytes above it are sent unencoded by some clients and taken by most servers.
_TARGET = re.compile(rb"[\x21-\x7e\x80-\xff]+")
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_ABSOLUTE_FORM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)(.*)", re.DOTALL)
# RFC 3986 section 3.2.2: a bracketed literal, or a registered name; an IPv4 address has the form of the latter.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.vV%_~-]+\]|[0-9A-Za-z._~%!$&'()*+,;=-]*)(?::[0-9]*)?")


class Version(NamedTuple):
    """What ends a protocol's request line."""

    pattern: re.Pattern[bytes]
    """Of all versions that are accepted, each as long as `example`."""
    example: bytes


class Head(NamedTuple):
    """A request's head."""

    method: str
    target: str
    fields: list[tuple[str, str]]
    """(name in lower case, value without the white space around it), as they came."""


def read_head(data: bytes, version: Version) -> Head | Answer:
    """The head that `data` begins with, or NEED_MORE, or NOT_MINE."""
    beginning = data[:BOUND]
    if not _may_begin_a_request(beginning, version):
        return Answer.NOT_MINE
    end = _END_OF_HEAD.search(beginning)
    if end is None:
        return Answer.NEED_MORE if len(data) < BOUND else Answer.NOT_MINE
    head = _split(beginning[: end.start()])
    return Answer.NOT_MINE if head is None else head


def read_keys(data: bytes, version: Version, keys_of: Callable[[Head], Keys | None]) -> Keys | Answer:
    """What `keys_of` finds in the head that `data` begins with (None: malformed), or NEED_MORE, or NOT_MINE."""
    head = read_head(data, version)
    if isinstance(head, Answer):
        return head
    keys = keys_of(head)
    return Answer.NOT_MINE if keys is None else keys


def _may_begin_a_request(head: bytes, version: Version) -> bool:
    """Whether the bytes up to the first LF are a request line or, if there is no LF yet, the beginning of one."""
    line, complete, _ = head.partition(b"\n")
    method, space, rest = line.partition(b" ")
    if not space:
        return not complete and (not method or _TOKEN.fullmatch(method) is not None)
    if not _TOKEN.fullmatch(method):
        return False
    target, space, ending = rest.partition(b" ")
    if not space:
        return not complete and (not target or _TARGET.fullmatch(target) is not None)
    if not _TARGET.fullmatch(target):
        return False
    if not complete:
        # `\r` is one byte more that may come.
        ending += (version.example + b"\r")[len(ending) :]
    return version.pattern.fullmatch(ending.removesuffix(b"\r")) is not None


def _split(head: bytes) -> Head | None:
    """The parts of a head (a checked request line, field lines, without the last line end); None: malformed."""
    request_line, *lines = (line.removesuffix(b"\r") for line in head.split(b"\n"))
    method, target, _ = request_line.decode("latin-1").split(" ")
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        # A folded line begins with white space, which no token has: it is refused here as well.
        if not colon or not _TOKEN.fullmatch(name) or b"\r" in value or b"\x00" in value:
            return None
        fields.append((name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")))
    return Head(method, target, fields)


def absolute_form(target: str) -> tuple[str, str] | None:
    """(authority, path and query) of `scheme://authority/path?query`; None: the target has another form.

    RFC 3986 section 6.2.3: an empty path is "/"."""
    match = _ABSOLUTE_FORM.fullmatch(target)
    if match is None:
        return None
    return match[1], match[2] if match[2].startswith("/") else f"/{match[2]}"


def host_name(authority: str) -> str | None:
    """`Example.com.:80` is `example.com`. "" stays "" (allowed where a target has no authority); None: malformed."""
    match = _HOST.fullmatch(authority)
    return match[1].lower().removesuffix(".") if match else None
