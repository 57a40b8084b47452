"""Reading binary fields one after the other, for parsers whose messages say their own length.

A parser's reading function takes fields off a Cursor and returns keys; `read` turns that into the contract of
`wire.parser`: a field that is not there yet is NEED_MORE, a field that cannot be right is NOT_MINE. The contract is
kept as long as such a function depends on nothing but the fields it has taken: then whatever ends it early, it ends
there again for every continuation.
"""

from __future__ import annotations

from collections.abc import Callable

from steerd.model import Answer, Keys


class TooShortError(Exception):
    """A field goes beyond the bytes that have come so far."""


class MalformedError(Exception):
    """A field has a value that the protocol does not allow, or goes beyond the end of its message."""


class Cursor:
    """A place in all bytes so far. Every `take` raises TooShortError or MalformedError if the bytes are not there."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._end: int | None = None

    def end_after(self, length: int) -> None:
        """The message ends `length` bytes from here; fields beyond that are malformed from now on."""
        self._end = self._at + length

    @property
    def left(self) -> int:
        """Bytes between here and the end of the message, come or not; `end_after` has said where that is."""
        assert self._end is not None
        return self._end - self._at

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        stop = self._at + length
        if self._end is not None and stop > self._end:
            raise MalformedError
        if stop > len(self._data):
            raise TooShortError
        taken = self._data[self._at : stop]
        self._at = stop
        return taken

    def number(self, length: int) -> int:
        """An unsigned number of `length` bytes in network order."""
        return int.from_bytes(self.take(length), "big")

    def varint(self, longest: int) -> int:
        """A number in groups of 7 bits, the lowest first, each but the last with its top bit set; at most `longest`
        bytes."""
        value = 0
        for group in range(longest):
            byte = self.number(1)
            value |= (byte & 0x7F) << 7 * group
            if byte < 0x80:
                return value
        raise MalformedError

    def expect(self, expected: bytes) -> None:
        """The next bytes, which can only be these. Looks at each as soon as it is there."""
        for byte in expected:
            if self.number(1) != byte:
                raise MalformedError


def require(condition: bool) -> None:
    """Raises MalformedError unless the condition holds."""
    if not condition:
        raise MalformedError


def read(function: Callable[[Cursor], Keys], data: bytes, bound: int) -> Keys | Answer:
    """What a reading function finds in the first `bound` of all bytes so far, NEED_MORE or NOT_MINE."""
    try:
        return function(Cursor(data[:bound]))
    except TooShortError:
        return Answer.NEED_MORE if len(data) < bound else Answer.NOT_MINE
    except MalformedError:
        return Answer.NOT_MINE
