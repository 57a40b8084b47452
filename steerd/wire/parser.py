"""What a payload parser is: the contract that every file of a protocol in `wire` keeps, and every caller relies on.

A parser is asked with all bytes a client has sent so far, from the first one on, and answers

- keys: what it found (perhaps none: an empty dict means "mine, and it says nothing");
- NEED_MORE: a proper beginning; more bytes could change the answer;
- NOT_MINE: another protocol, or malformed.

It never raises, keeps no state between calls, and never changes its mind: keys or NOT_MINE once given for some bytes
are given for every continuation of them. So the result cannot depend on how the bytes were cut into segments. Once it
has seen `bound` bytes it no longer says NEED_MORE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from steerd.model import Answer, Keys

Inspect = Callable[[bytes], Keys | Answer]


class Parser(NamedTuple):
    """One protocol that a service may name in `inspect`."""

    name: str
    keys: tuple[str, ...]
    """The keys it may give; `http.header.*` stands for a family of them."""
    bound: int
    """Bytes after which it has made up its mind."""
    make: Callable[[tuple[str, ...]], Inspect]
    """From the values (without `*`) that a service's routes compare this parser's keys with, to the function that
    inspects. Only `prefix` and `regex` look at them. Raises ValueError, with a sentence, for a value that can never
    match."""
    summary: str
    """One line for `steerd --help` and the documentation."""
    exclusive: bool = True
    """Whether recognising its protocol rules out all others, so that no further parser need be asked."""

    def gives(self, key: str) -> bool:
        """Whether a key is one of this parser's: `http.header.accept` is one of `http.header.*`."""
        return any(covers(known, key) for known in self.keys)


def covers(known: str, key: str) -> bool:
    """Whether `known`, a key or a family such as `http.header.*`, is or contains a key."""
    return key == known or (known.endswith(".*") and len(key) >= len(known) and key.startswith(known[:-1]))


def always(inspect: Inspect) -> Callable[[tuple[str, ...]], Inspect]:
    """For `Parser.make`: the same function, whatever a service's routes look for."""
    return lambda _patterns: inspect
