"""The `prefix` parser: the longest pattern that the data begins with, once nothing longer can match."""

from __future__ import annotations

import pytest

from steerd.model import Answer
from steerd.wire.prefix import BOUND, datagram_prefix_parser, prefix_parser


def test_the_longest_pattern_wins() -> None:
    inspect = prefix_parser(["A", "ABC", "B"])
    assert inspect(b"") is Answer.NEED_MORE
    assert inspect(b"A") is Answer.NEED_MORE
    assert inspect(b"AB") is Answer.NEED_MORE
    assert inspect(b"ABC") == inspect(b"ABCD") == {"prefix": "ABC"}
    assert inspect(b"ABD") == inspect(b"AX") == {"prefix": "A"}
    assert inspect(b"B") == inspect(b"BC") == {"prefix": "B"}
    assert inspect(b"C") is Answer.NOT_MINE


def test_bytes_that_are_not_text() -> None:
    inspect = prefix_parser(["\x16\x03\xff"])
    assert inspect(b"\x16\x03\xff\x00") == {"prefix": "\x16\x03\xff"}
    assert inspect(b"\x16\x03\xfe") is Answer.NOT_MINE


def test_without_patterns_nothing_is_mine() -> None:
    assert prefix_parser([])(b"") is Answer.NOT_MINE


def test_the_empty_pattern_matches_everything_else() -> None:
    inspect = prefix_parser(["", "GET "])
    assert inspect(b"GE") is Answer.NEED_MORE
    assert inspect(b"GO") == {"prefix": ""}


def test_patterns_that_can_never_match_are_refused() -> None:
    with pytest.raises(ValueError, match="made of bytes"):
        prefix_parser(["\u20ac"])
    with pytest.raises(ValueError, match="at most 1024 bytes"):
        prefix_parser(["x" * (BOUND + 1)])


def test_a_datagram_is_whole() -> None:
    inspect = datagram_prefix_parser(["A", "ABC", "\xff"])
    assert inspect([b"AB"]) == inspect([b"AB", b"ABC"]) == {"prefix": "A"}
    assert inspect([b"ABCD"]) == {"prefix": "ABC"}
    assert inspect([b"\xff\x00"]) == {"prefix": "\xff"}
    assert inspect([b""]) is inspect([b"B", b"A"]) is Answer.NOT_MINE
