"""The router: each rule of precedence by itself, the form of the table's keys, and what counts as a tie."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest

from steerd.core import router
from steerd.core.router import (
    DYNAMIC,
    Compiled,
    Conflict,
    Probe,
    Shape,
    can_rank,
    compile_routes,
    conflicts,
    count_shapes,
    has_digest,
    key_rank,
    lookup,
    make_probes,
    route_at,
    shape_of,
    table_key,
    values_of,
)
from steerd.model import Condition, Keys, Match, Route

INSPECT = (
    ("portext.dst", "portext.src", "portext.port"),
    ("http.host", "http.path", "http.header.*"),
    ("prefix",),
)
CLIENT = ipaddress.ip_address("198.51.100.7").packed
CLIENT6 = ipaddress.ip_address("2001:db8::7").packed


def route(source: str | None = None, **conditions: str) -> Route:
    """Conditions by name, `__` for a dot; `*.x` and `x*` are patterns."""
    held = []
    for name, value in conditions.items():
        key = name.replace("__", ".")
        if value.startswith("*"):
            held.append(Condition(key, Match.SUFFIX, value[1:]))
        elif value.endswith("*"):
            held.append(Condition(key, Match.PREFIX, value[:-1]))
        else:
            held.append(Condition(key, Match.EXACT, value))
    return Route("r", tuple(held), None if source is None else ipaddress.ip_network(source), ())


class Numbers(dict[Shape, int]):
    """Gives every shape that is asked for a number of its own, from 1 on."""

    def __missing__(self, shape: Shape) -> int:
        self[shape] = 1 + len(self)
        return self[shape]


def compiled_alone(routes: list[Route]) -> Compiled:
    return compile_routes(routes, INSPECT, Numbers().__getitem__)


def find(routes: list[Route], keys: Keys, source: bytes = CLIENT) -> int | None:
    compiled = compiled_alone(routes)
    table = {key: bytes([index]) for key, index in compiled.entries}
    found = lookup(compiled.probes, keys, source, table.get)
    return None if found is None else found[0]


REQUEST = {
    "http.host": "www.a.example",
    "http.path": "/api/v1",
    "portext.dst": "7",
    "portext.src": "9",
    "prefix": "GET /",
}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        pytest.param(
            route(http__host="www.a.example"),
            route(http__host="*.a.example", http__path="/api*", portext__dst="7"),
            id="exact before patterns",
        ),
        pytest.param(route(http__host="*.a.example"), route(http__host="*.example"), id="longer patterns first"),
        pytest.param(
            route(http__host="*.a.example"), route(http__path="/api*", portext__dst="7"), id="longer, then more"
        ),
        pytest.param(
            route(http__host="*.example", http__path="/api*"), route(http__host="*.a.example"), id="sum of the lengths"
        ),
        pytest.param(
            route(http__host="www.a.example", http__path="/api/v1"),
            route(http__host="www.a.example"),
            id="more conditions first",
        ),
        pytest.param(
            route("198.51.100.0/24", http__host="www.a.example"),
            route(http__host="www.a.example"),
            id="a source is a condition",
        ),
        pytest.param(
            route("198.51.100.0/25", http__host="www.a.example"),
            route("198.51.100.0/24", portext__dst="7"),
            id="longer source prefixes first",
        ),
        pytest.param(
            route("0.0.0.0/0", http__host="www.a.example"),
            route(http__host="www.a.example", portext__dst="7"),
            id="any source prefix before none",
        ),
        pytest.param(route(portext__dst="7"), route(http__host="www.a.example"), id="the order of inspect"),
        pytest.param(
            route(portext__dst="7", prefix="GET /"),
            route(http__host="www.a.example", http__path="/api/v1"),
            id="the order of inspect, the first key first",
        ),
        pytest.param(
            route(http__host="www.a.example", portext__dst="7"),
            route(portext__src="9", prefix="GET /"),
            id="the order of inspect, not of names",
        ),
    ],
)
def test_precedence(better: Route, worse: Route) -> None:
    assert find([better, worse], REQUEST) == 0
    assert find([worse, better], REQUEST) == 1
    assert find([worse], REQUEST) == 0
    assert conflicts([better, worse], INSPECT) == []


def test_a_route_matches_when_all_of_it_does() -> None:
    both = [route("198.51.100.0/24", http__host="a.example", portext__dst="7")]
    keys = {"http.host": "a.example", "portext.dst": "7"}
    assert find(both, keys) == 0
    assert find(both, keys | {"portext.dst": "8"}) is None
    assert find(both, {"http.host": "a.example"}) is None
    assert find(both, keys, ipaddress.ip_address("198.51.101.7").packed) is None
    assert find(both, keys, CLIENT6) is None


def test_a_suffix_wants_something_before_it_and_a_prefix_nothing_behind_it() -> None:
    assert find([route(http__host="*.example")], {"http.host": ".example"}) is None
    assert find([route(http__host="*.example")], {"http.host": "a.example"}) == 0
    assert find([route(http__path="/api*")], {"http.path": "/api"}) == 0
    assert find([route(http__path="/api*")], {"http.path": "/ap"}) is None


def test_a_source_alone_is_a_route_of_its_family() -> None:
    routes = [route("0.0.0.0/0"), route("::/0"), route("2001:db8::/32")]
    assert find(routes, {}) == 0
    assert find(routes, {}, CLIENT6) == 2
    assert find(routes, {}, ipaddress.ip_address("2001:db9::1").packed) == 1


def test_the_cost_is_the_number_of_shapes() -> None:
    routes = [route(http__host=f"h{i}.example") for i in range(1000)] + [route(http__host="*.b.example")]
    assert count_shapes(routes) == 2
    compiled = compiled_alone(routes)
    assert len(compiled.probes) == 2
    asked: list[bytes] = []

    def get(key: bytes) -> bytes | None:
        asked.append(key)
        return None

    assert lookup(compiled.probes, {"http.host": "h.c.example"}, CLIENT, get) is None
    assert asked == [b"\x00\x00\x00\x0111:h.c.example", b"\x00\x00\x00\x0210:.c.example"]


def test_a_key_of_the_table() -> None:
    compiled = compiled_alone([route("198.51.100.0/22", http__path="/", http__host="b\u00e9")])
    assert compiled.entries == [(b"\x00\x00\x00\x01" + b"\x00\x31\x8c\xd9" + b"3:b\xc3\xa9" + b"1:/", 0)]


def test_long_values_become_a_digest_that_lmdb_can_hold() -> None:
    longest = "x" * 487
    for source in (None, "2001:db8::7/128"):
        for value, is_digest in ((longest, False), (longest + "x", True), ("y" * 20000, True)):
            routes = [route(source, http__path=value)]
            (key, _), *_ = compiled_alone(routes).entries
            assert len(key) <= router.MAX_KEY
            assert (b"#" in key) is is_digest
            assert find(routes, {"http.path": value}, CLIENT6) == 0
            assert find(routes, {"http.path": value + "z"}, CLIENT6) is None


def test_values_are_not_run_together() -> None:
    routes = [route(http__host="a", http__path="bc"), route(http__host="ab", http__path="c")]
    assert find(routes, {"http.host": "ab", "http.path": "c"}) == 1
    assert find(routes, {"http.host": "a", "http.path": "bc"}) == 0
    assert find(routes, {"http.host": "abc", "http.path": ""}) is None


def test_an_ipv6_source_is_not_taken_for_an_ipv4_prefix_and_a_value() -> None:
    # Cut like an IPv4 address to its first 8 bits, this source would read: 32.0.0.0/8, then the netstring's beginning.
    routes = [route("32.0.0.0/8", http__host="aaaaaaaaa1:x")]
    client = bytes([32]) + b"12:aaaaaaaaa" + b"\x00\x00\x00"
    assert find(routes, {"http.host": "x"}, client) is None
    assert find(routes, {"http.host": "aaaaaaaaa1:x"}, bytes([32, 1, 2, 3])) == 0


def test_a_shape_keeps_its_number_whatever_shapes_come_and_go() -> None:
    numbers = Numbers()
    alone = compile_routes([route(http__host="a")], INSPECT, numbers.__getitem__)
    more = compile_routes([route(portext__dst="7"), route(http__host="a")], INSPECT, numbers.__getitem__)
    assert alone.entries[0][0] == more.entries[1][0] == b"\x00\x00\x00\x01" + b"1:a"
    assert [probe.number for probe in more.probes] == [b"\x00\x00\x00\x02", b"\x00\x00\x00\x01"]


def test_static_and_dynamic_routes_follow_the_same_rules() -> None:
    routes = {
        "dynamic exact": route(http__host="a.example"),
        "static exact": route(http__host="b.example"),
        "dynamic suffix": route(http__host="*.example"),
        "static wide": route(http__host="*e"),
    }
    numbers = Numbers()
    numbered: dict[tuple[Shape, int], None] = {}
    table = {}
    for name, each in routes.items():
        shape = shape_of(each)
        number = numbers[shape] | (DYNAMIC if name.startswith("dynamic") else 0)
        numbered[shape, number] = None
        table[table_key(number, shape, each)] = name.encode()
    probes = make_probes(numbered, INSPECT)
    assert [probe.number[0] >> 7 for probe in probes] == [0, 1, 1, 0]
    found = [lookup(probes, {"http.host": f"{host}.example"}, CLIENT, table.get) for host in "abc"]
    assert found == [b"dynamic exact", b"static exact", b"dynamic suffix"]
    assert lookup(probes, {"http.host": "some"}, CLIENT, table.get) == b"static wide"


def test_of_equal_routes_the_static_one_counts() -> None:
    same = route(http__host="a.example")
    shape = shape_of(same)
    probes = make_probes([(shape, 5 | DYNAMIC), (shape, 5)], INSPECT)
    table = {table_key(5 | DYNAMIC, shape, same): b"dynamic", table_key(5, shape, same): b"static"}
    assert lookup(probes, {"http.host": "a.example"}, CLIENT, table.get) == b"static"


def test_a_route_comes_back_out_of_its_key() -> None:
    for each in (
        route(http__host="*.example", http__path="/a", portext__dst="7"),
        route("198.51.100.128/25", http__host="b\u00e9:1,2:"),
        route("2001:db8::/33"),
        route("0.0.0.0/0", prefix="\x00#*"),
    ):
        shape = shape_of(each)
        back = route_at(shape, table_key(9 | DYNAMIC, shape, each))
        assert (sorted(back.conditions), back.source) == (sorted(each.conditions), each.source)
    long = route("2001:db8::/32", http__path="y" * 2000)
    key = table_key(9, shape_of(long), long)
    assert has_digest(shape_of(long), key)
    assert route_at(shape_of(long), key, values_of(long)).conditions == long.conditions


def test_shapes_whose_keys_no_parser_gives_cannot_be_ranked() -> None:
    assert can_rank(shape_of(route(http__host="a", portext__dst="7")), INSPECT)
    assert not can_rank(shape_of(route(http__host="a", tls__sni="b")), INSPECT)


def test_text_that_is_not_unicode_does_not_fail() -> None:
    assert find([route(http__host="a")], {"http.host": "\udcff"}) is None


def test_probes_survive_being_sent_to_a_worker() -> None:
    routes = [route("2001:db8::/32", http__host="*.example"), route(portext__dst="7"), route("198.51.100.0/24")]
    probes = compiled_alone(routes).probes
    sent = msgspec.msgpack.encode(probes)
    assert msgspec.msgpack.decode(sent, type=tuple[Probe, ...]) == probes


def test_no_routes_match_nothing() -> None:
    assert compiled_alone([]) == ((), [])
    assert conflicts([], INSPECT) == []
    assert find([], REQUEST) is None


def test_a_key_that_no_parser_gives_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No parser of this service gives the key tls\.sni\."):
        compiled_alone([route(tls__sni="a")])


def test_more_shapes_than_can_be_tried_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "MAX_PROBES", 1)
    with pytest.raises(ValueError, match="Routes of 2 different shapes; at most 1"):
        compiled_alone([route(http__host="*.a"), route(http__host="*.ab")])


def test_the_rank_of_a_key() -> None:
    assert [key_rank(key, INSPECT) for key in ("portext.dst", "portext.src")] == [0, 1]
    assert key_rank("http.header.x", INSPECT) == 5
    assert key_rank("http.header.", INSPECT) is None
    assert key_rank("http.header", INSPECT) is None
    assert key_rank("http.hosts", INSPECT) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (route(http__header__a="1"), route(http__header__b="2")),
        (route(http__host="*.ab", http__path="/a*"), route(http__host="ab*", http__path="*/ab")),
        (route(http__host="*.ab", http__path="/*"), route(http__host="*b", http__path="/ab*")),
        (route("10.0.0.0/8", http__header__a="1"), route("10.0.0.0/8", http__header__b="2")),
        (route(http__host="x.ab", http__path="/a*"), route(http__host="*ab", http__path="/a")),
    ],
)
def test_ties(one: Route, other: Route) -> None:
    assert conflicts([one, other], INSPECT) == [Conflict(1, 0, duplicate=False)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (route(http__host="a"), route(http__host="b")),
        (route(http__host="a"), route(http__path="/")),
        (route(http__host="a", http__path="/"), route(http__host="b", http__header__x="/")),
        (route(http__host="*.ab", http__path="/*"), route(http__host="*c", http__path="/ab*")),
        (route("10.0.0.0/8", http__host="a"), route("11.0.0.0/8", http__path="/")),
        (route("10.0.0.0/8"), route("a00::/8")),
        (route(http__host=".ab", http__path="/a*"), route(http__host="*ab", http__path="/")),
        (route(http__host=".ab", http__path="/ab*"), route(http__host="*.ab", http__path="/a")),
        (route(http__host="a", http__path="xx*"), route(http__host="xx*", http__path="a")),
    ],
)
def test_no_ties(one: Route, other: Route) -> None:
    assert conflicts([one, other], INSPECT) == []
    assert conflicts([other, one], INSPECT) == []


def test_duplicates_are_told_from_ties() -> None:
    one = route("10.0.0.0/8", http__host="a", http__header__y="/")
    again = route("10.0.0.0/8", http__header__y="/", http__host="a")
    tie = route("10.0.0.0/8", http__host="a", http__header__x="1")
    assert conflicts([one, again, tie], INSPECT) == [
        Conflict(1, 0, duplicate=True),
        Conflict(2, 0, duplicate=False),
    ]


def test_thousands_of_shapes_that_share_an_exact_key_are_checked() -> None:
    routes = [route(http__host=f"h{i}", **{f"http__header__x{i}": "1"}) for i in range(5000)]
    assert conflicts(routes, INSPECT) == []
    assert conflicts([*routes, route(http__host="h7", http__header__y="/")], INSPECT) == [Conflict(5000, 7, False)]


def test_thousands_of_shapes_that_all_tie_are_checked() -> None:
    routes = [route(**{f"http__header__x{i}": "1"}) for i in range(5000)]
    assert conflicts(routes, INSPECT) == [Conflict(i, 0, False) for i in range(1, 5000)]
