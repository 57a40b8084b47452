"""The router: from keys and a source address to the best matching route, in a few hash lookups.

A route matches when all its conditions hold and the source address is in its source prefix (if it has one). Of all
routes of a service that match, the best one is chosen by these rules; a later rule is asked only where the earlier
ones leave two routes equal:

1. a route with only exact conditions before one with a pattern (`*.example`, `/api/*`);
2. longer patterns before shorter: the sum of the lengths of a route's patterns, without their `*`, in characters;
3. more conditions before fewer; a source prefix counts as one condition;
4. a longer source prefix before a shorter, and any before none;
5. the order of `inspect`, and within one parser the order in which it names its keys (`http.host` before `http.path`,
   `portext.dst` before `portext.src`): each condition's key has a place (0, 1, ...) there, a family such as
   `http.header.*` one for all its members; the route whose places, sorted, are smaller when compared like words comes
   first.

Two routes that are equal by all five rules and could both match one connection are a tie: nothing says which one is
meant, so it is a mistake in the configuration. Two routes "could both match" when their sources overlap and, for every
key that both name, some text satisfies both conditions. A tie between routes with the same conditions and the same
source is called a duplicate.

How it is done. Every rule looks only at a route's *shape* (which keys, matched how, patterns how long, a source prefix
of which family and how long), never at its values. All routes of one shape make one *probe*: cut the keys and the
source address to that shape, and ask one flat table (bytes to bytes; it lives in LMDB) for the result. Routes of one
shape cannot both match unless they are duplicates, so the first probe in the order above that finds something has
found the best route. The cost of a lookup is the number of shapes, whatever the number of routes.

Two kinds of route stand side by side: *static* ones, of the configuration, which change all at once with it, and
*dynamic* ones, which come and go one by one. The rules above do not tell them apart: a dynamic route that equals any
other, or ties with one, is refused (`rivals` and `sight` say how that is found out without comparing it with a million
others). Only a new configuration can bring a static route that a dynamic one equals or ties with; then the static one
of two equal ones counts, and of two that tie, the one whose shape comes first in the order of their parts.

The number of a shape is given once for each service and shape (control.store keeps it) and never gets a second meaning,
so that dynamic routes stay where they are in the table whatever shapes come and go. A probe looks in one half of the
table: static and dynamic routes of one shape make two probes, one behind the other.

A key of the table:

    number of the shape u32, for dynamic routes + DYNAMIC | source prefix, cut to its length, 4 or 16 bytes (or none) |
    values

in network order. Values are netstrings (`3:abc`, length in bytes of UTF-8) in the order of their keys' names. Where
they do not fit into what LMDB allows, `#` and a 16-byte BLAKE2b of them stand in their place; no netstring begins
with `#`.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from steerd.model import Condition, IPNetwork, Keys, Match, Route
from steerd.wire.parser import covers

MAX_KEY = 511
"""The longest key that LMDB takes (`mdb_env_get_maxkeysize`, as built by default)."""
MAX_PROBES = 4096
"""The most shapes that a service's routes may have: every lookup may have to try them all."""
DYNAMIC = 1 << 31
"""Set in the number of a shape where dynamic routes are meant; numbers of shapes are smaller."""

_MAX_VALUES = MAX_KEY - 4 - 16
_NO_SOURCE = -1
"""The "length" of a source prefix that is not there: shorter than /0."""

InspectKeys = Sequence[Sequence[str]]
"""The keys of each parser, in the order of `inspect`; `http.header.*` stands for a family of keys."""


class Part(NamedTuple):
    """What a probe does with one key. `length` is that of the pattern in characters, 0 for an exact match."""

    key: str
    match: Match
    length: int


class Probe(msgspec.Struct, frozen=True, array_like=True):
    """One shape of routes, ready to be looked up (and to be sent to workers: msgspec encodes it)."""

    number: bytes
    """Four bytes, network order: the number of the shape, with DYNAMIC or without."""
    parts: tuple[Part, ...]
    """Sorted by key; no key twice."""
    source_width: int
    """Bytes of a source address: 4, 16, or 0 for a shape without a source prefix."""
    source_shift: int
    """How many low bits of the source address are not part of the prefix."""


class Compiled(NamedTuple):
    """One service's routes: probes in the order they are tried, and what to put into the table."""

    probes: tuple[Probe, ...]
    entries: list[tuple[bytes, int]]
    """(key in the table, index of the route)."""


class Conflict(NamedTuple):
    """A route that is as good as an earlier one for some connection (indices into the sequence of routes)."""

    route: int
    other: int
    duplicate: bool
    """True: same conditions and source. False: a tie between different ones."""


class Shape(NamedTuple):
    """All that the rules of precedence look at."""

    parts: tuple[Part, ...]
    """Sorted by key; no key twice."""
    version: int
    """Of the source prefix; 0 without one."""
    source_length: int
    """Of the source prefix in bits; -1 without one."""

    @property
    def source_width(self) -> int:
        """Bytes of a source address; 0 without a source prefix."""
        return {0: 0, 4: 4, 6: 16}[self.version]

    @property
    def source_shift(self) -> int:
        """How many low bits of a source address are not part of the prefix."""
        return self.source_width * 8 - self.source_length if self.version else 0


def lookup(
    probes: Iterable[Probe],
    keys: Keys,
    source: bytes,
    get: Callable[[bytes], bytes | None],
) -> bytes | None:
    """What the table holds for the best matching route, or None where no route matches.

    `probes` as made for this service, `source` the packed client address (4 or 16 bytes), `get` the
    table: both halves of it, told apart by the key, as they are at one moment.
    """
    width = len(source)
    for probe in probes:
        if probe.source_width and probe.source_width != width:
            continue
        values = b""
        for key, match, length in probe.parts:
            text = keys.get(key)
            if text is not None and match is not Match.EXACT:
                text = _cut(text, match, length)
            if text is None:
                break
            values += _netstring(text)
        else:
            prefix = _source_prefix(source, probe.source_shift) if probe.source_width else b""
            found = get(_table_key(probe.number, prefix, values))
            if found is not None:
                return found
    return None


def matches(
    probes: Iterable[Probe], keys: Keys, source: bytes, get: Callable[[bytes], bytes | None]
) -> Iterator[tuple[Probe, bytes, bytes]]:
    """All routes that match, the best first, each as its probe, its key in the table and what the table holds for it:
    `lookup` gives the first. For explanations."""

    def get_with_key(key: bytes) -> bytes | None:
        found = get(key)
        return None if found is None else len(key).to_bytes(2, "big") + key + found

    for probe in probes:
        found = lookup([probe], keys, source, get_with_key)
        if found is not None:
            end = 2 + int.from_bytes(found[:2], "big")
            yield probe, found[2:end], found[end:]


def seen_by(probe: Probe, keys: Keys, source: bytes) -> Route:
    """The route (without name and targets) of this probe that these keys and this source match."""
    conditions = []
    for key, match, length in probe.parts:
        text = keys[key] if match is Match.EXACT else _cut(keys[key], match, length)
        assert text is not None, "a probe that does not match has no such route"
        conditions.append(Condition(key, match, text))
    shape = shape_of_probe(probe)
    network = ipaddress.ip_network((source, shape.source_length), strict=False) if probe.source_width else None
    return Route("", tuple(conditions), network, ())


def shape_of_probe(probe: Probe) -> Shape:
    """The shape that a probe looks for."""
    if not probe.source_width:
        return Shape(probe.parts, 0, _NO_SOURCE)
    return Shape(probe.parts, 4 if probe.source_width == 4 else 6, probe.source_width * 8 - probe.source_shift)


def failing(route: Route, keys: Keys, source: bytes) -> list[Condition | IPNetwork]:
    """What of a route keeps it from matching; nothing if it matches. For explanations."""
    wrong: list[Condition | IPNetwork] = [
        condition for condition in route.conditions if not _holds(condition, keys.get(condition.key))
    ]
    if route.source is not None and ipaddress.ip_address(source) not in route.source:
        wrong.append(route.source)
    return wrong


def _holds(condition: Condition, text: str | None) -> bool:
    if text is not None and condition.match is not Match.EXACT:
        text = _cut(text, condition.match, len(condition.value))
    return text == condition.value


def deciding_rule(better: Shape, worse: Shape) -> int:
    """Which of the five rules puts one shape before another: 1 to 5; 0 where they are the same shape, a static one and
    a dynamic one. For explanations."""
    if better == worse:
        return 0
    pairs = zip(_first_rules(better), _first_rules(worse), strict=True)
    return next((number for number, (one, other) in enumerate(pairs, 1) if one != other), 5)


def compile_routes(routes: Sequence[Route], inspect_keys: InspectKeys, number_of: Callable[[Shape], int]) -> Compiled:
    """Probes and table entries for the static routes of one service, which are without conflicts; no route names a key
    twice. `number_of` gives shapes their numbers. Raises ValueError for a key that no parser gives, and for more than
    MAX_PROBES shapes."""
    shapes = [shape_of(route) for route in routes]
    numbers = {shape: number_of(shape) for shape in dict.fromkeys(shapes)}
    probes = make_probes(numbers.items(), inspect_keys)
    entries = [
        (table_key(numbers[shape], shape, route), index)
        for index, (shape, route) in enumerate(zip(shapes, routes, strict=True))
    ]
    return Compiled(probes, entries)


def make_probes(numbered: Iterable[tuple[Shape, int]], inspect_keys: InspectKeys) -> tuple[Probe, ...]:
    """The probes of one service in the order in which they are tried, from shapes and their numbers (those of dynamic
    routes with DYNAMIC). Raises ValueError for a key that no parser gives, and for more than MAX_PROBES."""
    precedence = _by_precedence(inspect_keys)
    # After the five rules only shapes are left equal that never match together, or that a new configuration made tie:
    # any order will do, but always the same one; and static before dynamic.
    ordered = sorted(
        numbered,
        key=lambda pair: (precedence(pair[0]), canonical(pair[0]), pair[1]),
    )
    if len(ordered) > MAX_PROBES:
        raise ValueError(f"Routes of {len(ordered)} different shapes; at most {MAX_PROBES} can be looked up.")
    return tuple(
        Probe(number.to_bytes(4, "big"), shape.parts, shape.source_width, shape.source_shift)
        for shape, number in ordered
    )


def can_rank(shape: Shape, inspect_keys: InspectKeys) -> bool:
    """Whether every key of a shape is one that these parsers give."""
    return all(key_rank(part.key, inspect_keys) is not None for part in shape.parts)


def canonical(shape: Shape) -> tuple[object, ...]:
    """A sort key for the shapes of one service that depends on nothing but the shapes."""
    return [_order(part) for part in shape.parts], shape.version, shape.source_length


def count_shapes(routes: Iterable[Route]) -> int:
    """How many probes a lookup among these routes may need."""
    return len({shape_of(route) for route in routes})


def rivals(shape: Shape, others: Iterable[Shape], inspect_keys: InspectKeys) -> list[Shape]:
    """Those of other shapes whose routes might tie with a route of this one. All shapes must be `can_rank`."""
    precedence = _by_precedence(inspect_keys)
    mine = precedence(shape)
    return [other for other in others if other != shape and other[1:] == shape[1:] and precedence(other) == mine]


def key_rank(key: str, inspect_keys: InspectKeys) -> int | None:
    """The place of a key among all keys of all parsers, in order, counted from 0; None where no parser gives it."""
    for rank, name in enumerate(name for names in inspect_keys for name in names):
        if covers(name, key):
            return rank
    return None


def conflicts(routes: Sequence[Route], inspect_keys: InspectKeys) -> list[Conflict]:
    """Every route that is a duplicate of an earlier one or ties with an earlier one, each once, in their order.

    Near-linear in the number of routes as long as the shapes of equal precedence are few or have an exact key in
    common: routes are compared only with those of other shapes, and by hashing what the two shapes can see of each
    other's values. Raises ValueError for a key that no parser gives.
    """
    precedence = _by_precedence(inspect_keys)
    first_with: dict[tuple[frozenset[object], IPNetwork | None], int] = {}
    classes: dict[object, list[int]] = defaultdict(list)
    shapes = [shape_of(route) for route in routes]
    found = []
    for index, route in enumerate(routes):
        first = first_with.setdefault((frozenset(route.conditions), route.source), index)
        if first != index:
            found.append(Conflict(index, first, duplicate=True))
        else:
            classes[precedence(shapes[index])].append(index)
    for equals in classes.values():
        for group in _split_by_common_keys(equals, routes):
            found.extend(_ties(group, routes, shapes))
    return sorted(found)


def _split_by_common_keys(indices: list[int], routes: Sequence[Route]) -> Iterable[list[int]]:
    """Groups of routes, of one precedence, such that routes of different groups cannot both match: they differ in the
    source (all have one of the same length, or none has) or in a key that all of them match exactly."""
    common = set.intersection(*(_exact_keys(routes[index]) for index in indices))
    groups: dict[object, list[int]] = defaultdict(list)
    for index in indices:
        route = routes[index]
        values = frozenset(condition for condition in route.conditions if condition.key in common)
        groups[values, route.source].append(index)
    return groups.values()


def _exact_keys(route: Route) -> set[str]:
    return {condition.key for condition in route.conditions if condition.match is Match.EXACT}


def _ties(indices: list[int], routes: Sequence[Route], shapes: Sequence[Shape]) -> Iterable[Conflict]:
    """Ties among routes of one precedence and one source, without duplicates."""
    # A route is asked about one by one against the shapes before it, and no further once one has it, so that a
    # thousand shapes which all tie with each other do not take a million comparisons.
    seen: dict[Shape, _Seen] = {}
    for index in indices:
        route, shape = routes[index], shapes[index]
        others = (seen[other].tied_with(route, shape) for other in seen if other != shape)
        other = next((other for other in others if other is not None), None)
        if other is not None:
            yield Conflict(index, other, duplicate=False)
        seen.setdefault(shape, _Seen(shape)).add(index, route)


class _Seen:
    """Routes of one shape, to be asked whether one of them could match together with a route of another shape."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._routes: list[tuple[int, Route]] = []
        self._views: dict[Shape, dict[tuple[str, ...], int]] = {}

    def add(self, index: int, route: Route) -> None:
        self._routes.append((index, route))
        for other, view in self._views.items():
            self._put(view, index, route, other)

    def tied_with(self, route: Route, shape: Shape) -> int | None:
        """The first route of this shape that could match together with one of another shape."""
        view = self._views.get(shape)
        if view is None:
            view = self._views[shape] = {}
            for index, mine in self._routes:
                self._put(view, index, mine, shape)
        seen = sight(route, self._shape)
        return None if seen is None else view.get(seen)

    @staticmethod
    def _put(view: dict[tuple[str, ...], int], index: int, route: Route, other: Shape) -> None:
        seen = sight(route, other)
        if seen is not None:
            view.setdefault(seen, index)


def sight(route: Route, other: Shape) -> tuple[str, ...] | None:
    """What routes of another shape can see of a route's values: two routes of two shapes, with the same source or none,
    could both match exactly if each sees the same of the other. None: no route of that shape could match together with
    this one."""
    parts = {part.key: part for part in other.parts}
    seen = []
    for condition in sorted(route.conditions):
        part = parts.get(condition.key)
        if part is None:
            continue
        value: str | None = condition.value
        if condition.match is Match.EXACT and part.match is not Match.EXACT:
            value = _cut(condition.value, part.match, part.length)
        elif condition.match is part.match:
            # Two suffixes (or two prefixes) agree if the longer one ends (begins) with the shorter.
            if condition.match is not Match.EXACT and len(condition.value) > part.length:
                value = _cut(condition.value, part.match, part.length)
        elif part.match is not Match.EXACT:
            # A prefix and a suffix never exclude each other: put one before the other.
            value = ""
        if value is None:
            return None
        seen.append(value)
    return tuple(seen)


def _by_precedence(inspect_keys: InspectKeys) -> Callable[[Shape], tuple[object, ...]]:
    """A sort key for shapes: the five rules, smaller is better."""

    @functools.cache
    def rank(key: str) -> int:
        found = key_rank(key, inspect_keys)
        if found is None:
            raise ValueError(f"No parser of this service gives the key {key}.")
        return found

    @functools.cache
    def precedence(shape: Shape) -> tuple[object, ...]:
        return *_first_rules(shape), sorted_ranks(shape)

    def sorted_ranks(shape: Shape) -> tuple[int, ...]:
        return tuple(sorted(rank(part.key) for part in shape.parts))

    return precedence


def _first_rules(shape: Shape) -> tuple[object, ...]:
    """The rules but the last one, smaller is better."""
    return (
        any(part.match is not Match.EXACT for part in shape.parts),
        -sum(part.length for part in shape.parts),
        -(len(shape.parts) + (shape.source_length != _NO_SOURCE)),
        -shape.source_length,
    )


def shape_of(route: Route) -> Shape:
    """The shape of a route."""
    parts = [Part(key, match, 0 if match is Match.EXACT else len(value)) for key, match, value in route.conditions]
    parts.sort(key=_order)
    if route.source is None:
        return Shape(tuple(parts), 0, _NO_SOURCE)
    return Shape(tuple(parts), route.source.version, route.source.prefixlen)


def _order(part: Part) -> tuple[str, str, int]:
    return part.key, part.match.value, part.length


def table_key(number: int, shape: Shape, route: Route) -> bytes:
    """Where a route of a shape with this number stands in the table."""
    source = route.source
    prefix = b"" if source is None else _source_prefix(source.network_address.packed, shape.source_shift)
    return _table_key(number.to_bytes(4, "big"), prefix, values_of(route))


def values_of(route: Route) -> bytes:
    """A route's values as a table key has them where they are short enough."""
    return b"".join(_netstring(condition.value) for condition in sorted(route.conditions))


def has_digest(shape: Shape, key: bytes) -> bool:
    """Whether a table key has a digest in the place of the route's values."""
    return key[4 + shape.source_width :].startswith(b"#")


def route_at(shape: Shape, key: bytes, values: bytes = b"") -> Route:
    """The route (without name and targets) that stands at a key of the table; `values` if the key has a digest."""
    end = 4 + shape.source_width
    texts = _texts(values or key[end:])
    conditions = tuple(Condition(part.key, part.match, text) for part, text in zip(shape.parts, texts, strict=True))
    if not shape.version:
        return Route("", conditions, None, ())
    number = int.from_bytes(key[4:end], "big") << shape.source_shift
    address = ipaddress.ip_address(number.to_bytes(shape.source_width, "big"))
    return Route("", conditions, ipaddress.ip_network((address, shape.source_length)), ())


def _table_key(number: bytes, prefix: bytes, values: bytes) -> bytes:
    if len(values) > _MAX_VALUES:
        values = b"#" + hashlib.blake2b(values, digest_size=16).digest()
    return number + prefix + values


def _source_prefix(source: bytes, shift: int) -> bytes:
    return (int.from_bytes(source, "big") >> shift).to_bytes(len(source), "big")


def _texts(netstrings: bytes) -> Iterator[str]:
    at = 0
    while at < len(netstrings):
        colon = netstrings.index(b":", at)
        at = colon + 1 + int(netstrings[at:colon])
        yield netstrings[colon + 1 : at].decode("utf-8", "surrogatepass")


def _netstring(text: str) -> bytes:
    # "surrogatepass": whatever characters a parser yields, a lookup must not fail.
    value = text.encode("utf-8", "surrogatepass")
    return b"%d:%b" % (len(value), value)


def _cut(text: str, match: Match, length: int) -> str | None:
    """The end (SUFFIX) or beginning (PREFIX) of a text that a pattern of this length is compared with; None if the
    text is too short to match such a pattern at all. A suffix wants something before it."""
    if match is Match.SUFFIX:
        return text[len(text) - length :] if len(text) > length else None
    return text[:length] if len(text) >= length else None
