r"""`regex`: regular expressions over the first bytes, for protocols that have no parser of their own and whose
beginnings `prefix` cannot tell apart.

The key `regex` is the first of the service's patterns that matches, in this order: longest text first, then by the
alphabet. A route's `regex = "..."` is compared with that key as it is written, so a client has one pattern, and routes
with another one are not for it, even if that would match as well.

What a pattern sees is the *window*: the first line with the LF that ends it, or the first 256 bytes if no LF is among
them. It must match from the first byte on, though not up to the last: begin with `.*` for "anywhere", end with `$` for
"nothing else in the window". `$` also matches before the window's LF; a CR is a byte like every other (`\r?$`). Text is
latin-1, one character one byte: `\x16\x03[\x00-\x04]`.

More bytes could change what matches, and a parser never changes its mind. So a pattern has matched, for good, as soon
as the bytes so far match it; one that looks at what comes next (`$`, `\z`, `\b`, `\B`) a byte later, or with the whole
window. A pattern is out as soon as its possible matches all sort before or behind the bytes so far (found for patterns
that begin with something definite, `SSH-2`, `[0-9]+ `), else with the whole window. The answer is given when the first
pattern that is not out has matched: NEED_MORE until then, NOT_MINE when all are out. A binary protocol with messages
shorter than the window is therefore decided in time if its patterns begin with something definite and do not look at
what comes next; where they do not, the service's own timeout decides. Of a flow over UDP, the first datagram is
looked at, and the window is whole with its end.

Patterns have the syntax of RE2 (github.com/google/re2/wiki/Syntax): no look-around and no back-references, and in
return no backtracking. The time for a window grows with the length of the pattern, not with what the client makes of
it: about 1 us each, and in the worst case, for patterns of the greatest size allowed, some milliseconds. Python's `re`
would let one client with 30 bytes stop a worker.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple, Protocol

import re2

from steerd.model import Answer, Keys
from steerd.wire.parser import DatagramParser, Inspect, InspectDatagrams, Parser, first

BOUND = 256
"""The longest window."""
MAX_SIZE = 1000
"""RE2's instructions for one pattern: what a byte may cost, at worst."""

_MEMORY = 1 << 20
"""Bytes that RE2 may use for one pattern. States that find no room are computed anew, so more is faster up to a point,
and dearer: hostile bytes fill it."""
_RANGE = 64
"""How many bytes of a pattern's first and last possible match are looked at."""
_ESCAPED = re.compile(r"\\[^bBz]", re.DOTALL)
_LOOKS_AHEAD = re.compile(r"\$|\\[bBz]")


class _Compiled(Protocol):
    """What is used of RE2's pattern objects."""

    @property
    def programsize(self) -> int: ...

    def match(self, text: bytes) -> object | None: ...

    def possiblematchrange(self, maxlen: int) -> tuple[bytes, bytes]: ...


class _Pattern(NamedTuple):
    """One pattern, ready to be matched."""

    text: str
    early: _Compiled
    """Matches a part of the window only if it also matches every continuation of that."""
    final: _Compiled
    """For the whole window."""
    lowest: bytes
    highest: bytes | None
    """Whatever matches sorts between the two; None: up to anything."""

    def is_out(self, part: bytes) -> bool:
        """Whether no match can begin with this part of the window, which `early` does not match."""
        return part < self.lowest[: len(part)] or (self.highest is not None and part > self.highest)


def regex_parser(patterns: Collection[str]) -> Inspect:
    """An inspecting function for one service's patterns. Raises ValueError for a pattern that RE2 does not take, is too
    large, or has a character that is not one byte (above U+00FF)."""
    in_order = _in_order(patterns)

    def inspect(data: bytes) -> Keys | Answer:
        window, whole = _window(data)
        for pattern in in_order:
            if (pattern.final if whole else pattern.early).match(window) is not None:
                return {"regex": pattern.text}
            if not (whole or pattern.is_out(window)):
                return Answer.NEED_MORE
        return Answer.NOT_MINE

    return inspect


def datagram_regex_parser(patterns: Collection[str]) -> InspectDatagrams:
    """The same for the first datagram of a flow."""
    in_order = _in_order(patterns)

    def read(datagram: bytes) -> Keys | None:
        window, _ = _window(datagram)
        for pattern in in_order:
            if pattern.final.match(window) is not None:
                return {"regex": pattern.text}
        return None

    return first(read)


def _in_order(patterns: Collection[str]) -> list[_Pattern]:
    return [_compile(text) for text in sorted(set(patterns), key=lambda text: (-len(text), text))]


def _window(data: bytes) -> tuple[bytes, bool]:
    """The window as far as it has come, and whether that is the whole of it."""
    line_end = data.find(b"\n", 0, BOUND)
    window = data[: line_end + 1] if line_end >= 0 else data[:BOUND]
    return window, line_end >= 0 or len(window) == BOUND


def _compile(text: str) -> _Pattern:
    try:
        source = text.encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(
            f"A regular expression is made of bytes, one character each (U+0000 to U+00FF); {text!r} has other"
            " characters."
        ) from None
    try:
        _re2(source)  # alone first: `a)(b` would be right in parentheses
        final = _re2(b"\\A(?m:" + source + b")")
        looks_ahead = _LOOKS_AHEAD.search(_ESCAPED.sub("", text)) is not None
        early = _re2(b"\\A(?m:" + source + b")(?s:.)") if looks_ahead else final
    except re2.error as error:
        raise ValueError(f"Is not a regular expression in the syntax of RE2: {_reason(error)}.") from None
    if final.programsize > MAX_SIZE:
        raise ValueError(
            f"Is too large a regular expression: RE2 makes {final.programsize} instructions of it, and at most"
            f" {MAX_SIZE} are allowed. Repetitions such as {{100}} are what makes them large."
        )
    return _Pattern(text, early, final, *_range(final))


def _re2(source: bytes) -> _Compiled:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.never_capture = True
    options.log_errors = False
    options.max_mem = _MEMORY
    compiled: _Compiled = re2.compile(source, options)
    return compiled


def _reason(error: Exception) -> str:
    """RE2's words quote the pattern, hence they are bytes."""
    words = error.args[0]
    return words.decode("latin-1") if isinstance(words, bytes) else str(words)


def _range(compiled: _Compiled) -> tuple[bytes, bytes | None]:
    """Bounds for what a pattern matches, in alphabetical order."""
    try:
        return compiled.possiblematchrange(_RANGE)
    except re2.error:
        return b"", None


PARSER = Parser(
    name="regex",
    keys=("regex",),
    bound=BOUND,
    make=regex_parser,
    summary="regular expressions (RE2) over the first line, or the first 256 bytes, of the payload",
    exclusive=False,
)
DATAGRAMS = DatagramParser(
    name="regex",
    keys=PARSER.keys,
    datagrams=1,
    make=datagram_regex_parser,
    summary="regular expressions (RE2) over the first line, or the first 256 bytes, of a flow's first datagram",
    exclusive=False,
)
