"""The router against a naive one, written straight from the rules at the top of core/router.py."""

from __future__ import annotations

import ipaddress
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from steerd.core.router import (
    DYNAMIC,
    Shape,
    compile_routes,
    conflicts,
    lookup,
    make_probes,
    rivals,
    route_at,
    shape_of,
    sight,
    table_key,
    values_of,
)
from steerd.model import Condition, IPNetwork, Keys, Match, Route

# Not in the order of the alphabet, so that the two orders cannot be taken for each other.
INSPECT = (("r.*",), ("p.a", "p.b"), ("q",))
PLACES = {"r.x": 0, "r.y": 0, "p.a": 1, "p.b": 2, "q": 3}
KEYS = tuple(PLACES)

SOURCES: tuple[IPNetwork | None, ...] = (
    None,
    *(ipaddress.ip_network(text) for text in ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/23", "10.1.2.3/32")),
    *(ipaddress.ip_network(text) for text in ("::/0", "2001:db8::/32", "2001:db8::1/128")),
)
CLIENTS = tuple(
    ipaddress.ip_address(text)
    for text in (
        "10.1.2.3",
        "10.1.3.9",
        "10.1.9.9",
        "10.9.9.9",
        "192.0.2.1",
        "2001:db8::1",
        "2001:db8::2",
        "2001:db9::",
    )
)


class Numbers(dict[Shape, int]):
    """Gives every shape that is asked for a number of its own."""

    def __missing__(self, shape: Shape) -> int:
        self[shape] = 1 + len(self)
        return self[shape]


texts = st.text("ab", max_size=3)
conditions = st.builds(
    Condition,
    st.sampled_from(KEYS),
    st.sampled_from(Match),
    texts,
)
condition_sets = st.lists(conditions, max_size=3, unique_by=lambda condition: condition.key).map(tuple)
routes_strategy = st.lists(st.tuples(condition_sets, st.sampled_from(SOURCES)), max_size=12).map(
    lambda drawn: [Route(f"routes[{i}]", held, source, ()) for i, (held, source) in enumerate(drawn)]
)
keys_strategy = st.dictionaries(st.sampled_from((*KEYS, "other")), st.text("ab", max_size=4))


def holds(condition: Condition, text: str | None) -> bool:
    if text is None:
        return False
    if condition.match is Match.EXACT:
        return text == condition.value
    if condition.match is Match.SUFFIX:
        return text.endswith(condition.value) and text != condition.value
    return text.startswith(condition.value)


def matches(route: Route, keys: Keys, client: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if route.source is not None and (client.version != route.source.version or client not in route.source):
        return False
    return all(holds(condition, keys.get(condition.key)) for condition in route.conditions)


def rules(route: Route) -> tuple[object, ...]:
    """The five rules; the smaller is the better."""
    patterns = [condition.value for condition in route.conditions if condition.match is not Match.EXACT]
    return (
        len(patterns) > 0,
        -len("".join(patterns)),
        -len(route.conditions) - (1 if route.source else 0),
        -route.source.prefixlen if route.source else 1,
        sorted(PLACES[condition.key] for condition in route.conditions),
    )


# Every text that two conditions of at most three characters could need to hold together: one before the other.
ALL_TEXTS = ["".join(letters) for length in range(7) for letters in itertools.product("ab", repeat=length)]


def could_both_match(one: Route, other: Route) -> bool:
    if one.source is not None and other.source is not None:
        if one.source.version != other.source.version:
            return False
        if not one.source.overlaps(other.source):
            return False
    theirs = {condition.key: condition for condition in other.conditions}
    return all(
        any(holds(condition, text) and holds(theirs[condition.key], text) for text in ALL_TEXTS)
        for condition in one.conditions
        if condition.key in theirs
    )


def same(one: Route, other: Route) -> bool:
    return set(one.conditions) == set(other.conditions) and one.source == other.source


def in_conflict(one: Route, other: Route) -> bool:
    return rules(one) == rules(other) and could_both_match(one, other)


@settings(max_examples=600, deadline=None)
@given(routes_strategy, st.lists(st.tuples(keys_strategy, st.sampled_from(CLIENTS)), min_size=1, max_size=8))
def test_lookup_finds_what_the_rules_say(
    drawn: list[Route], connections: list[tuple[Keys, ipaddress.IPv4Address | ipaddress.IPv6Address]]
) -> None:
    routes: list[Route] = []
    for route in drawn:
        if not any(in_conflict(route, other) for other in routes):
            routes.append(route)
    compiled = compile_routes(routes, INSPECT, Numbers().__getitem__)
    table = {key: str(index).encode() for key, index in compiled.entries}
    assert len(table) == len(routes)
    for keys, client in connections:
        expected = min((route for route in routes if matches(route, keys, client)), key=rules, default=None)
        found = lookup(compiled.probes, keys, client.packed, table.get)
        assert (None if found is None else routes[int(found)]) == expected


@settings(max_examples=600, deadline=None)
@given(routes_strategy)
def test_conflicts_are_those_that_comparing_all_pairs_finds(routes: list[Route]) -> None:
    found = conflicts(routes, INSPECT)
    expected = {}
    for index, route in enumerate(routes):
        if any(same(route, other) for other in routes[:index]):
            expected[index] = True
        elif any(in_conflict(route, other) for other in routes[:index]):
            expected[index] = False
    assert {conflict.route: conflict.duplicate for conflict in found} == expected
    assert [conflict.route for conflict in found] == sorted(expected)
    for conflict in found:
        assert conflict.other < conflict.route
        assert in_conflict(routes[conflict.route], routes[conflict.other])
        assert same(routes[conflict.route], routes[conflict.other]) == conflict.duplicate


# Few keys and short values: routes of equal precedence that agree, or just do not, become frequent.
close_routes = st.lists(
    st.lists(
        st.builds(
            Condition,
            st.sampled_from(("p.a", "p.b")),
            st.sampled_from(Match),
            st.text("ab", min_size=1, max_size=2),
        ),
        min_size=1,
        max_size=2,
        unique_by=lambda condition: condition.key,
    ).map(tuple),
    max_size=10,
).map(lambda drawn: [Route(f"routes[{i}]", held, None, ()) for i, held in enumerate(drawn)])


@settings(max_examples=600, deadline=None)
@given(close_routes)
def test_conflicts_among_routes_that_are_much_alike(routes: list[Route]) -> None:
    expected = {
        index for index, route in enumerate(routes) if any(in_conflict(route, other) for other in routes[:index])
    }
    assert {conflict.route for conflict in conflicts(routes, INSPECT)} == expected


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=300), st.text(max_size=300)), unique=True, max_size=6),
    st.text(max_size=300),
)
def test_any_text_is_looked_up_and_never_confused_with_another(pairs: list[tuple[str, str]], stray: str) -> None:
    routes = [
        Route(f"routes[{i}]", (Condition("q", Match.EXACT, q), Condition("p.a", Match.EXACT, a)), None, ())
        for i, (q, a) in enumerate(pairs)
    ]
    compiled = compile_routes(routes, INSPECT, Numbers().__getitem__)
    table = {key: str(index).encode() for key, index in compiled.entries}
    assert len(table) == len(routes)
    assert all(len(key) <= 511 for key in table)
    for index, (q, a) in enumerate(pairs):
        assert lookup(compiled.probes, {"q": q, "p.a": a}, b"\x00" * 4, table.get) == str(index).encode()
        if (stray, a) not in pairs:
            assert lookup(compiled.probes, {"q": stray, "p.a": a}, b"\x00" * 4, table.get) is None


@settings(max_examples=300, deadline=None)
@given(routes_strategy)
def test_a_route_at_a_time_the_same_conflicts_are_found(routes: list[Route]) -> None:
    """As the registry finds them: by the key of the table, and by what two shapes see of each other."""
    found = []
    for index, route in enumerate(routes):
        shape = shape_of(route)
        before = routes[:index]
        if any(shape_of(other) == shape and key_of(other) == key_of(route) for other in before) or any(
            shape_of(other) in rivals(shape, {shape_of(other) for other in before}, INSPECT)
            and other.source == route.source
            and (seen := sight(route, shape_of(other))) is not None
            and sight(other, shape) == seen
            for other in before
        ):
            found.append(index)
    assert found == [conflict.route for conflict in conflicts(routes, INSPECT)]


def key_of(route: Route) -> bytes:
    return table_key(1 | DYNAMIC, shape_of(route), route)


@given(routes_strategy)
def test_a_route_comes_back_out_of_its_key(routes: list[Route]) -> None:
    for route in routes:
        back = route_at(shape_of(route), key_of(route), values_of(route))
        assert (sorted(back.conditions), back.source) == (sorted(route.conditions), route.source)


@settings(deadline=None)
@given(routes_strategy, st.lists(st.booleans(), min_size=12, max_size=12), keys_strategy, st.sampled_from(CLIENTS))
def test_static_or_dynamic_the_best_route_is_the_same(
    routes: list[Route],
    dynamic: list[bool],
    keys: Keys,
    client: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    conflicting = {conflict.route for conflict in conflicts(routes, INSPECT)}
    numbers = Numbers()
    numbered, table = set(), {}
    for index, route in enumerate(routes):
        if index not in conflicting:
            shape = shape_of(route)
            number = numbers[shape] | (DYNAMIC if dynamic[index] else 0)
            numbered.add((shape, number))
            table[table_key(number, shape, route)] = str(index).encode()
    found = lookup(make_probes(numbered, INSPECT), keys, client.packed, table.get)
    matching = [i for i, route in enumerate(routes) if i not in conflicting and matches(route, keys, client)]
    best = min(matching, key=lambda index: rules(routes[index]), default=None)
    assert found == (None if best is None else str(best).encode())
