r"""`prefix`: the first bytes as they are, for protocols that have no parser of their own ("SSH-2.0-", "\x16\x03").

The key `prefix` is the longest of the service's patterns that the data begins with. As long as a longer pattern could
still match, the answer is NEED_MORE; when none can match any more, NOT_MINE. A service with the patterns "A" and "ABC"
therefore waits for a third byte after "AB": a client that says "AB" and then waits for an answer is decided by the
service's own timeout, not here.

A route's `prefix = "ab*"` is compared with that key like every other: whenever a shorter pattern matches the data, it
also matches the longest one that does. A datagram is whole: no longer pattern could match it later. No RFC; bytes are
text in latin-1, one byte one character.
"""

from __future__ import annotations

from collections.abc import Collection

from steerd.model import Answer, Keys
from steerd.wire.parser import DatagramParser, Inspect, InspectDatagrams, Parser, first

BOUND = 1024
"""The longest pattern. What tells protocols apart begins earlier, and the first segment usually holds it whole."""


def prefix_parser(patterns: Collection[str]) -> Inspect:
    """An inspecting function for one service's patterns. Raises ValueError for a pattern that is longer than BOUND or
    has a character that is not one byte (above U+00FF)."""
    by_length = _longest_first(patterns)

    def inspect(data: bytes) -> Keys | Answer:
        for pattern in by_length:
            if data.startswith(pattern):
                return {"prefix": pattern.decode("latin-1")}
            if pattern.startswith(data):
                return Answer.NEED_MORE
        return Answer.NOT_MINE

    return inspect


def datagram_prefix_parser(patterns: Collection[str]) -> InspectDatagrams:
    """The same for the first datagram of a flow."""
    known = set(map(_as_bytes, patterns))
    # One look for each length, however many patterns there are.
    lengths = sorted(set(map(len, known)), reverse=True)

    def read(datagram: bytes) -> Keys | None:
        for length in lengths:
            if datagram[:length] in known:
                return {"prefix": datagram[:length].decode("latin-1")}
        return None

    return first(read)


def _longest_first(patterns: Collection[str]) -> list[bytes]:
    return sorted({_as_bytes(pattern) for pattern in patterns}, key=len, reverse=True)


def _as_bytes(pattern: str) -> bytes:
    if len(pattern) > BOUND:
        raise ValueError(f"A prefix has at most {BOUND} bytes; {pattern[:20]!r}... has {len(pattern)}.")
    try:
        return pattern.encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(
            f"A prefix is made of bytes, one character each (U+0000 to U+00FF); {pattern!r} has other characters."
            " Text in UTF-8 is written byte by byte: \\u00c3\\u00a9."
        ) from None


PARSER = Parser(
    name="prefix",
    keys=("prefix",),
    bound=BOUND,
    make=prefix_parser,
    summary="the first bytes of the payload, compared with the patterns of the service's routes",
    exclusive=False,
)
DATAGRAMS = DatagramParser(
    name="prefix",
    keys=PARSER.keys,
    datagrams=1,
    make=datagram_prefix_parser,
    summary="the first bytes of a flow's first datagram, compared with the patterns of the service's routes",
    exclusive=False,
)
