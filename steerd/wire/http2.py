"""`http2`: the first request of an HTTP/2 connection with prior knowledge (RFC 9113), its fields decoded by `hpack`.

The keys are those of the `http` parser, so that one route serves both versions; text in latin-1:
- `http.method`: `:method`, as sent;
- `http.host`: from `:authority`, else from the Host field; lower-case, without port and without one trailing dot;
- `http.path`: `:path`, path and query as sent; `*` for `OPTIONS *`. CONNECT has none;
- `http.header.NAME`: the first field of that name. Of `cookie`, which may be sent in pieces, all of them, joined with
  "; " (section 8.2.3). `:authority` is not among them;
- `http.cookie.NAME`: the first cookie of that name.

NEED_MORE until the first HEADERS frame and its CONTINUATION frames are complete, but NOT_MINE as soon as the bytes
cannot be the connection preface, a SETTINGS frame, and then frames that a client may send before its first request:
SETTINGS, WINDOW_UPDATE, PRIORITY, PING, and frames of unknown types (section 5.5).

Malformed, hence NOT_MINE: a header block that hpack refuses, or with more than two table sizes; upper-case or otherwise
impossible field names; pseudo fields that are unknown, missing, there twice or behind other fields (sections 8.2.1 and
8.3); more than one Host, or one that names another host than `:authority`; an authority that is not a host with an
optional port; a frame of more than 16,384 bytes, which a client may not send before the server allowed it; a field list
of more than 20,480 bytes (each field counted with 32 bytes more, section 6.5.2: that bounds what a few bytes of hpack
can be blown up to, and the time it takes); and a request that does not end within the first 18,432 bytes.

Not covered: later requests of the connection, `Upgrade: h2c` (an HTTP/1.1 request, which `http` reads), HTTP/2 in TLS
(the `tls` parser sees its ALPN), and clients that wait for the server's SETTINGS before they send a request, as
gRPC's Go client does: they are silent behind their preface, and the service's timeout decides for them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hpack import Decoder, HPACKError

from steerd.model import Answer, Keys
from steerd.wire.http import PARSER as HTTP
from steerd.wire.http import cookies
from steerd.wire.lines import host_name
from steerd.wire.parser import Parser, always

BOUND = 18432
"""A HEADERS frame of the largest size that a client may use, and 2 KiB for what comes before it."""
MAX_FRAMES = 32
"""Frames up to the end of the first request's header block."""
MAX_FIELD_LIST = 20480
"""Decoded bytes of one request's fields: 16 KiB, as `http` takes, and 32 bytes more for each of 128 fields."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER = 9
_MAX_FRAME = 16384  # the initial value of SETTINGS_MAX_FRAME_SIZE, section 6.5.2

_HEADERS, _PRIORITY, _SETTINGS, _PING, _WINDOW_UPDATE, _CONTINUATION = 1, 2, 4, 6, 8, 9
_BEFORE_A_REQUEST = frozenset({_PRIORITY, _SETTINGS, _PING, _WINDOW_UPDATE}) | frozenset(range(_CONTINUATION + 1, 256))
_END_HEADERS, _PADDED, _WITH_PRIORITY = 0x04, 0x08, 0x20

_PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path"})
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")  # section 8.2: lower-case tokens
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH = re.compile(rb"\*|/[\x21-\x7e\x80-\xff]*")
# RFC 7541 section 4.2 allows two of them; hpack would work through thousands.
_THREE_TABLE_SIZES = re.compile(rb"(?:[\x20-\x3e]|\x3f[\x80-\xff]*[\x00-\x7f]){3}")
_NOT_IN_A_VALUE = re.compile(rb"[\x00\r\n]")


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the first request that `data` holds, or NEED_MORE, or NOT_MINE."""
    block = _header_block(data[:BOUND])
    if block is Answer.NEED_MORE:
        return block if len(data) < BOUND else Answer.NOT_MINE
    if isinstance(block, Answer):
        return block
    keys = _read_block(block)
    return Answer.NOT_MINE if keys is None else keys


class _Frame(NamedTuple):
    """A frame (section 4.1) that is complete."""

    kind: int
    flags: int
    stream: int
    payload: bytes
    end: int
    """Where the next one begins."""


def _header_block(data: bytes) -> bytes | Answer:
    """The header block of the first request, put together."""
    if not data.startswith(_PREFACE):
        return Answer.NEED_MORE if _PREFACE.startswith(data) else Answer.NOT_MINE
    allowed = frozenset({_SETTINGS})
    position = len(_PREFACE)
    frames = 0
    while True:
        # All of them are read again with every segment that comes.
        frames += 1
        if frames > MAX_FRAMES:
            return Answer.NOT_MINE
        frame = _frame_at(data, position, allowed)
        if isinstance(frame, Answer):
            return frame
        if frame.kind == _HEADERS:
            break
        position = frame.end
        allowed = _BEFORE_A_REQUEST | {_HEADERS}

    fragment = _header_fragment(frame)
    if fragment is None or not frame.stream % 2:
        return Answer.NOT_MINE
    block, stream = fragment, frame.stream
    while not frame.flags & _END_HEADERS:
        frames += 1
        if frames > MAX_FRAMES:
            return Answer.NOT_MINE
        frame = _frame_at(data, frame.end, frozenset({_CONTINUATION}))
        if isinstance(frame, Answer):
            return frame
        if frame.stream != stream:
            return Answer.NOT_MINE
        block += frame.payload
    return block


def _frame_at(data: bytes, start: int, allowed: frozenset[int]) -> _Frame | Answer:
    """The frame at `start`; NOT_MINE if it is of a type that is not allowed there, or too long."""
    header = data[start : start + _FRAME_HEADER]
    if len(header) < _FRAME_HEADER:
        return Answer.NEED_MORE
    length, kind, flags = int.from_bytes(header[:3]), header[3], header[4]
    stream = int.from_bytes(header[5:]) & 0x7FFFFFFF
    if kind not in allowed or length > _MAX_FRAME:
        return Answer.NOT_MINE
    if kind == _SETTINGS and (stream or length % 6):
        return Answer.NOT_MINE
    start += _FRAME_HEADER
    end = start + length
    if end > len(data):
        return Answer.NEED_MORE
    return _Frame(kind, flags, stream, data[start:end], end)


def _header_fragment(frame: _Frame) -> bytes | None:
    """What a HEADERS frame carries without padding and priority (section 6.2); None: they do not fit into it."""
    content = frame.payload
    padding = 0
    if frame.flags & _PADDED:
        if not content:
            return None
        padding, content = content[0], content[1:]
    if frame.flags & _WITH_PRIORITY:
        padding += 5
        content = content[5:] + content[:5]
    return content[: len(content) - padding] if padding <= len(content) else None


def _read_block(block: bytes) -> Keys | None:
    """Keys of a header block; None: malformed."""
    if _THREE_TABLE_SIZES.match(block):
        return None
    try:
        fields = [(bytes(name), bytes(value)) for name, value in Decoder(MAX_FIELD_LIST).decode(block, raw=True)]
    except HPACKError:
        return None
    pseudo: dict[bytes, bytes] = {}
    headers: dict[str, list[str]] = {}
    for name, value in fields:
        if _NOT_IN_A_VALUE.search(value):
            return None
        if name.startswith(b":"):
            if name not in _PSEUDO or name in pseudo or headers:
                return None
            pseudo[name] = value
        elif _NAME.fullmatch(name):
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1").strip(" \t"))
        else:
            return None

    keys = _request_keys(pseudo, headers.get("host", []))
    if keys is None:
        return None
    for field, values in headers.items():
        keys[f"http.header.{field}"] = "; ".join(values) if field == "cookie" else values[0]
    for cookie, content in cookies(keys.get("http.header.cookie", "")):
        keys.setdefault(f"http.cookie.{cookie}", content)
    return keys


def _request_keys(pseudo: dict[bytes, bytes], hosts: list[str]) -> Keys | None:
    """Method, path and host (sections 8.3.1 and 8.5); None: malformed."""
    method = pseudo.get(b":method", b"")
    if not _METHOD.fullmatch(method) or len(hosts) > 1:
        return None
    keys = {"http.method": method.decode("latin-1")}
    if method == b"CONNECT":
        if pseudo.keys() != {b":method", b":authority"}:
            return None
    else:
        path = pseudo.get(b":path", b"")
        if b":scheme" not in pseudo or not _PATH.fullmatch(path):
            return None
        keys["http.path"] = path.decode("latin-1")

    named = [host_name(text) for text in (*hosts, pseudo.get(b":authority", b"").decode("latin-1")) if text]
    if None in named or len(set(named)) > 1:
        return None
    if named and named[0]:
        keys["http.host"] = named[0]
    return keys


PARSER = Parser(
    name="http2",
    keys=HTTP.keys,
    bound=BOUND,
    make=always(inspect),
    summary="HTTP/2 with prior knowledge: host, path, method, headers and cookies of the first request",
)
