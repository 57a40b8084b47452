"""What a payload parser is: the contract that every file of a protocol in `wire` keeps, and every caller relies on.

A parser is asked with all bytes a client has sent so far, from the first one on, and answers

- keys: what it found (perhaps none: an empty dict means "mine, and it says nothing");
- NEED_MORE: a proper beginning; more bytes could change the answer;
- NOT_MINE: another protocol, or malformed.

It never raises, keeps no state between calls, and never changes its mind: keys or NOT_MINE once given for some bytes
are given for every continuation of them. So the result cannot depend on how the bytes were cut into segments. Once it
has seen `bound` bytes it no longer says NEED_MORE.

That is a `Parser`, for a stream (TCP). A `DatagramParser` (UDP) is asked with all datagrams of a flow so far, at least
one, each whole and in the order in which they came, and promises the same with "datagrams" in the place of "bytes".
Most protocols say everything in the first one (`first`), and one that ends too early is malformed; where a hello may be
spread over several (DTLS, QUIC), NEED_MORE asks for the next one. A file has a PARSER, or DATAGRAMS, or both, which
says what a protocol can be inspected over (`registry.transports`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from steerd.model import Answer, Keys

Inspect = Callable[[bytes], Keys | Answer]
InspectDatagrams = Callable[[Sequence[bytes]], Keys | Answer]
_Inspect = TypeVar("_Inspect", Inspect, InspectDatagrams)


class Brief(NamedTuple, Generic[_Inspect]):
    """A parser's shorter reading, for services that look at none of its other keys. It keeps the same contract, and
    whenever the long one gives keys, it gives those of them that are here; but it may know them sooner, and does not
    care whether what follows is malformed."""

    keys: tuple[str, ...]
    inspect: _Inspect


class History(list[bytes]):
    """The datagrams of a flow so far, with room for what parsers remember of those that they have read. A parser that
    finds nothing there reads all of them: the answer is the same."""

    def __init__(self, datagrams: Iterable[bytes] = ()) -> None:
        super().__init__(datagrams)
        self.memory: dict[str, object] = {}


class Parser(NamedTuple):
    """One protocol over TCP that a service may name in `inspect`."""

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
    """What the manual, steerd.toml(5), says of it (steerd.cli.man)."""
    exclusive: bool = True
    """Whether recognising its protocol rules out all others, so that no further parser need be asked."""
    brief: Brief[Inspect] | None = None

    def gives(self, key: str) -> bool:
        """Whether a key is one of this parser's: `http.header.accept` is one of `http.header.*`."""
        return any(covers(known, key) for known in self.keys)


class DatagramParser(NamedTuple):
    """One protocol over UDP that a service may name in `inspect`. Fields as those of Parser; the protocol's form over
    TCP, if there is one, has the same name and the same keys."""

    name: str
    keys: tuple[str, ...]
    datagrams: int
    """Datagrams of a flow after which it has made up its mind; with 1 it never says NEED_MORE."""
    make: Callable[[tuple[str, ...]], InspectDatagrams]
    summary: str
    exclusive: bool = True
    every: bool = False
    """Each datagram says where it wants to go itself, and nothing about others of its flow."""
    brief: Brief[InspectDatagrams] | None = None

    def gives(self, key: str) -> bool:
        """Whether a key is one of this parser's."""
        return any(covers(known, key) for known in self.keys)


def reads_briefly(parser: Parser | DatagramParser, keys: Iterable[str]) -> bool:
    """Whether the parser has a shorter reading, and that tells all of these keys that are the parser's."""
    brief = parser.brief
    return brief is not None and all(key in brief.keys for key in keys if parser.gives(key))


def covers(known: str, key: str) -> bool:
    """Whether `known`, a key or a family such as `http.header.*`, is or contains a key."""
    return key == known or (known.endswith(".*") and len(key) >= len(known) and key.startswith(known[:-1]))


def always(inspect: Inspect) -> Callable[[tuple[str, ...]], Inspect]:
    """For `Parser.make`: the same function, whatever a service's routes look for."""
    return lambda _patterns: inspect


def first(read: Callable[[bytes], Keys | None]) -> InspectDatagrams:
    """The inspecting function of a protocol whose first datagram says everything: `read` gives the keys of one whole
    datagram (perhaps an empty one), None for what is not of the protocol."""

    def inspect(datagrams: Sequence[bytes]) -> Keys | Answer:
        keys = read(datagrams[0])
        return Answer.NOT_MINE if keys is None else keys

    return inspect


def always_first(read: Callable[[bytes], Keys | None]) -> Callable[[tuple[str, ...]], InspectDatagrams]:
    """For `DatagramParser.make`: `first(read)`, whatever a service's routes look for."""
    return lambda _patterns: first(read)
