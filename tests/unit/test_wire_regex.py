"""The `regex` parser: the window, the order of patterns, when it answers, what it refuses, and hostile clients."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steerd.model import Answer, Keys
from steerd.wire.regex import BOUND, MAX_SIZE, datagram_regex_parser, regex_parser


def test_the_longest_pattern_that_matches_wins() -> None:
    inspect = regex_parser(["USER .*", "USER (alice|bob)", "[A-Z]+ "])
    assert inspect(b"USER bob\r\n") == {"regex": "USER (alice|bob)"}
    assert inspect(b"USER carol\r\n") == {"regex": "USER .*"}
    assert inspect(b"QUIT now\r\n") == {"regex": "[A-Z]+ "}
    assert inspect(b"quit\r\n") is Answer.NOT_MINE


def test_the_window_is_the_first_line_with_its_end() -> None:
    inspect = regex_parser(["A$", "AB\r\n", "ABC\r?$", "(?s).*second"])
    assert inspect(b"A\n") == {"regex": "A$"}
    assert inspect(b"AB\r\nsecond") == {"regex": "AB\r\n"}
    assert inspect(b"ABC\r\n") == {"regex": "ABC\r?$"}
    assert inspect(b"ABCD\r\nsecond") is Answer.NOT_MINE
    assert inspect(b"the second\n") == {"regex": "(?s).*second"}


def test_the_window_is_256_bytes_where_no_line_ends() -> None:
    inspect = regex_parser([".*x$"])
    assert inspect(b"a" * (BOUND - 1)) is Answer.NEED_MORE
    assert inspect(b"a" * (BOUND - 1) + b"x" + b"behind") == {"regex": ".*x$"}
    assert inspect(b"a" * BOUND + b"x\n") is Answer.NOT_MINE


def test_it_is_bytes_that_are_compared() -> None:
    inspect = regex_parser([r"\x16\x03[\x00-\x04]", "\xff.\\xfe"])
    assert inspect(b"\x16\x03\x01") == {"regex": r"\x16\x03[\x00-\x04]"}
    assert inspect(b"\xff\x80\xfe") == {"regex": "\xff.\\xfe"}
    assert inspect(b"\x16\x03\x05") is Answer.NOT_MINE


@pytest.mark.parametrize(
    ("patterns", "data", "answer"),
    [
        # A short binary message is decided with its last byte, and refused with its first.
        (["\\x01\\x02(a|b)"], b"\x01\x02a", {"regex": "\\x01\\x02(a|b)"}),
        (["\\x01\\x02(a|b)"], b"\x01\x02", Answer.NEED_MORE),
        (["\\x01\\x02(a|b)"], b"\x02", Answer.NOT_MINE),
        (["\\x01\\x02(a|b)"], b"\x01\x01", Answer.NOT_MINE),
        # A longer pattern that can still match is waited for; one that cannot is not.
        (["GET", "GET /api"], b"GET", Answer.NEED_MORE),
        (["GET", "GET /api"], b"GET /b", {"regex": "GET"}),
        (["GET", "PUT /api"], b"GET", {"regex": "GET"}),
        # What looks ahead is known a byte later, or with the end of the window.
        (["ab\\b"], b"ab", Answer.NEED_MORE),
        (["ab\\b"], b"ab ", {"regex": "ab\\b"}),
        (["ab\\b"], b"abc", Answer.NOT_MINE),
        (["ab$"], b"ab", Answer.NEED_MORE),
        (["ab$"], b"abc", Answer.NOT_MINE),
        (["ab\\$"], b"ab$", {"regex": "ab\\$"}),
        # Nothing definite at the beginning: only the whole window tells.
        ([".*b"], b"aaa", Answer.NEED_MORE),
        ([".*b"], b"aaab", {"regex": ".*b"}),
        ([".*b"], b"aaa\n", Answer.NOT_MINE),
        (["", "a"], b"b", {"regex": ""}),
    ],
)
def test_when_it_answers(patterns: list[str], data: bytes, answer: Keys | Answer) -> None:
    assert regex_parser(patterns)(data) == answer


atoms = st.sampled_from(["a", "b", "ab", ".", "[ab]", "[^a]", r"\x0a", r"\b", r"\B", "^", "$", r"\$", r"\r?", "(?i:A)"])
expressions = st.recursive(
    atoms,
    lambda inner: (
        st.builds("{}{}".format, inner, inner)
        | st.builds("(?:{}|{})".format, inner, inner)
        | st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"]))
    ),
    max_leaves=6,
)


def by_definition(patterns: list[str], window: bytes) -> Keys | Answer:
    """What the docstring says about a whole window, with Python's regular expressions."""
    for text in sorted(patterns, key=lambda text: (-len(text), text)):
        if re.match(b"(?m:" + text.encode("latin-1") + b")", window):
            return {"regex": text}
    return Answer.NOT_MINE


@settings(max_examples=1500, deadline=None)
@given(st.lists(expressions, min_size=1, max_size=4), st.text("abA $\r", max_size=12))
@example(["ab\\b", "a"], "ab ")
@example([r"(?:a|)\B"], "ba")
def test_the_first_answer_is_the_one_of_the_whole_window(patterns: list[str], line: str) -> None:
    window = line.encode() + b"\n"
    inspect = regex_parser(patterns)
    expected = by_definition(patterns, window)
    answers = [inspect(window[:length]) for length in range(len(window) + 1)]
    decided = next(length for length, answer in enumerate(answers) if answer is not Answer.NEED_MORE)
    assert all(answer == expected for answer in answers[decided:]), (answers, expected)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a", r"Is not a regular expression in the syntax of RE2: missing \): \(a\."),
        ("a)(b", "syntax of RE2: unexpected"),
        ("a**", "bad repetition operator"),
        ("(?=a)", "invalid perl operator"),
        (r"(a)\1", "invalid escape sequence"),
        ("x{1001}", "invalid repetition size"),
        ("(ab|cd|ef){300}", f"at most {MAX_SIZE} are allowed"),
        (r"(?i)(\pL{99}|\pN{99}){9}", "Is (too large|not) a regular expression"),
        ("\u20ac", "made of bytes"),
    ],
)
def test_patterns_that_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        regex_parser([pattern])


def test_without_patterns_nothing_is_mine() -> None:
    assert regex_parser([])(b"") is Answer.NOT_MINE


HUNGRY = ["(a+)+$", "(a|aa)+$", "(.*a){20}z", "([ab]*a){30}c", ".*a.{60}b.{60}c$", "(x?){400}y", "(.{0,60}[ab]){4}z"]
"""Patterns that take a backtracking engine for ever, and some near MAX_SIZE that fill a table of states."""


def seconds(inspect: object, data: bytes) -> float:
    assert callable(inspect)
    started = time.process_time()
    inspect(data)
    return time.process_time() - started


@pytest.mark.parametrize("pattern", HUNGRY)
def test_no_client_can_hold_a_worker_up(pattern: str) -> None:
    """The dearest of many hostile windows, with a fresh engine, costs milliseconds."""
    inspect = regex_parser([pattern])
    chance = random.Random(1)
    windows = [b"a" * (BOUND - 1) + b"!", b"a" * BOUND, b"x" * BOUND, b"ab" * (BOUND // 2)]
    windows += [bytes(chance.choices(b"ab", k=BOUND)) for _ in range(100)]
    windows += [chance.randbytes(BOUND) for _ in range(100)]
    assert max(seconds(inspect, window) for window in windows) < 0.05


def test_a_backtracking_engine_would_be_held_up() -> None:
    """Why it is RE2: Python's own takes longer for 24 bytes than RE2 for ten times as many."""
    hostile = b"a" * 23 + b"!"
    python = re.compile(rb"(a+)+$")
    assert seconds(python.match, hostile) > 10 * seconds(regex_parser(["(a+)+$"]), hostile * 10)


def test_a_datagram_is_whole() -> None:
    inspect = datagram_regex_parser(["A$", "AB.*", "x" * 10])
    assert inspect([b"A"]) == inspect([b"A\n"]) == inspect([b"A\nB", b"ABC"]) == {"regex": "A$"}
    assert inspect([b"ABC"]) == {"regex": "AB.*"}
    assert inspect([b"x" * 9]) is inspect([b""]) is Answer.NOT_MINE
