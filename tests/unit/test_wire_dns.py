"""The `dns` parser: queries of dig (also as scapy reads them) over both transports, names of every kind, suffix routes,
and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from scapy.layers.dns import DNS

from steerd.core.router import compile_routes, lookup
from steerd.model import Answer, Condition, Keys, Match, Route
from steerd.wire.dns import BOUND, DATAGRAMS, PARSER, TYPES, inspect, question, type_name
from steerd.wire.dns import name as spelled
from tests.flows import flow, only

VECTORS = Path(__file__).parent.parent / "vectors"
REAL = sorted(VECTORS.glob("dns-*.bin"))


def real(what: str) -> bytes:
    return (VECTORS / f"dns-dig-9.18.49-{what}.bin").read_bytes()


def name(*labels: bytes) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\x00"


def message(
    qname: bytes, qtype: int = 1, flags: int = 0x0120, counts: tuple[int, int, int, int] = (1, 0, 0, 0)
) -> bytes:
    return struct.pack("!HHHHHH", 0x1234, flags, *counts) + qname + struct.pack("!HH", qtype, 1)


def over_tcp(content: bytes) -> bytes:
    return struct.pack("!H", len(content)) + content


@pytest.mark.parametrize(
    ("what", "qname", "qtype"),
    [
        ("aaaa", "shop.example", "AAAA"),
        ("root", ".", "NS"),
        ("https-noedns", r"a\046b.example", "HTTPS"),
        ("ixfr", "zone.example", "IXFR"),
    ],
)
def test_dig(what: str, qname: str, qtype: str) -> None:
    data = real(what)
    expected = {"dns.qname": qname, "dns.qtype": qtype}
    assert inspect(data) == expected
    assert inspect(data + data) == expected
    assert question(data[2:]) == expected


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_need_more_until_the_question_is_whole(file: Path) -> None:
    data = file.read_bytes()
    end = data.index(b"\x00", 14) + 5
    assert all(inspect(data[:length]) is Answer.NEED_MORE for length in range(end))
    assert inspect(data[:end]) == inspect(data)


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_scapy_reads_the_same(file: Path) -> None:
    asked = DNS(file.read_bytes()[2:]).qd[0]
    found = inspect(file.read_bytes())
    assert isinstance(found, dict)
    # scapy shows a dot within a label as it is.
    assert found["dns.qname"].replace(r"\046", ".").rstrip(".") == asked.qname.decode().lower().rstrip(".")
    assert {name: number for number, name in TYPES.items()}[found["dns.qtype"]] == asked.qtype


@pytest.mark.parametrize(
    ("labels", "qname"),
    [
        ((), "."),
        ((b"EXAMPLE",), "example"),
        ((b"a.b", b"c"), r"a\046b.c"),
        ((b"a\\", b"c"), r"a\\.c"),
        ((b"*", b"example"), "*.example"),
        ((b"_dmarc", b"\xc0\xff"), "_dmarc.\xc0\xff"),
        ((b"x" * 63,) * 3 + (b"y" * 61,), ".".join(["x" * 63] * 3 + ["y" * 61])),
    ],
    ids=range(7),
)
def test_names(labels: tuple[bytes, ...], qname: str) -> None:
    found = question(message(name(*labels)))
    assert found == {"dns.qname": qname, "dns.qtype": "A"}
    assert inspect(over_tcp(message(name(*labels)))) == found


@pytest.mark.parametrize(
    ("number", "text"), [(1, "A"), (28, "AAAA"), (65, "HTTPS"), (255, "ANY"), (65280, "TYPE65280")]
)
def test_types(number: int, text: str) -> None:
    assert question(message(name(b"a"), number)) == {"dns.qname": "a", "dns.qtype": text}


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("A", "A"),
        ("aaaa", "AAAA"),
        ("TYPE28", "AAAA"),
        ("28", "AAAA"),
        ("type65", "HTTPS"),
        ("Type65280", "TYPE65280"),
        ("X", "X"),
    ],
)
def test_type_name(written: str, text: str) -> None:
    assert type_name(written) == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r"a\.b.example", r"a\046b.example"),
        (r"a\\.b.example", r"a\\.b.example"),
        (r"a\046b", r"a\046b"),
        ("a.b", "a.b"),
        ("a\\", "a\\"),
    ],
)
def test_spelling_of_names(written: str, text: str) -> None:
    assert spelled(written) == text


@pytest.mark.parametrize(
    "content",
    [
        message(name(b"a"), flags=0x8120),
        message(name(b"a"), flags=0x2000),
        message(name(b"a"), flags=0x2800),
        message(name(b"a"), counts=(0, 0, 0, 0)),
        message(name(b"a"), counts=(2, 0, 0, 0)),
        message(name(b"a"), counts=(257, 0, 0, 0)),
        message(name(b"a"), counts=(1, 1, 0, 0)),
        message(b"\xc0\x0c"),
        message(b"\x01a\xc0\x0c"),
        message(b"\x40" + b"a" * 64 + b"\x00"),
        message(b"\x80" + b"a" * 128 + b"\x00"),
        message(name(*(b"x" * 63,) * 3, b"y" * 62)),
        message(name(b"a"))[:-1],
        message(b"\x05a\x00"),
        message(b"")[:-1],
    ],
    ids=range(15),
)
def test_not_mine(content: bytes) -> None:
    assert question(content) is None
    assert inspect(over_tcp(content)) is Answer.NOT_MINE
    assert inspect(over_tcp(content) + real("aaaa")) is Answer.NOT_MINE


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x00\x10",
        b"GET /",
        b"\x16\x03\x01\x00\xf0",
        b"\x00\x20\x12\x34\x80",
        b"\x00\x20\x12\x34\x01\x00\x01",
        b"\x00\x20\x12\x34\x01\x00\x00\x01\x00\x01",
        b"\x00\x20\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0",
    ],
    ids=repr,
)
def test_not_mine_as_soon_as_it_cannot_be_a_query(beginning: bytes) -> None:
    data = beginning + bytes(300)
    first = next(length for length in range(len(data)) if inspect(data[:length]) is not Answer.NEED_MORE)
    assert first <= len(beginning)
    assert inspect(data[:first]) is Answer.NOT_MINE


def test_an_update_or_nothing_at_all_is_no_question() -> None:
    assert question(b"") is None
    assert question(bytes(12)) is None


def test_bound() -> None:
    longest: Keys | None = question(message(name(*(b"x" * 63,) * 3, b"y" * 61)))
    data = over_tcp(message(name(*(b"x" * 63,) * 3, b"y" * 61)))
    assert len(data) == BOUND
    assert inspect(data) == longest
    assert inspect(data[:-1]) is Answer.NEED_MORE


@pytest.mark.parametrize(
    ("what", "qname", "qtype"),
    [("aaaa", "shop.example", "AAAA"), ("root", ".", "NS"), ("https-noedns", r"a\046b.example", "HTTPS")],
)
def test_dig_over_udp(what: str, qname: str, qtype: str) -> None:
    assert DATAGRAMS.make(())(flow(f"dns-dig-9.18.49-{what}")) == {"dns.qname": qname, "dns.qtype": qtype}


def test_every_datagram_is_asked_alone() -> None:
    """A forwarder's flow: what was asked first has no say in what is asked next."""
    inspect_datagrams = DATAGRAMS.make(())
    for asked in (b"a", b"b"):
        assert inspect_datagrams([message(name(asked))]) == {"dns.qname": asked.decode(), "dns.qtype": "A"}


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        message(name(b"a"))[:-1],
        message(name(b"a"), flags=0x8120),
        message(name(b"a"), counts=(2, 0, 0, 0)),
        message(b"\xc0\x0c"),
        over_tcp(message(name(b"a"))),
    ],
    ids=["empty", "cut", "response", "two questions", "pointer", "with a length"],
)
def test_datagrams_that_are_no_query(datagram: bytes) -> None:
    assert DATAGRAMS.make(())([datagram]) is Answer.NOT_MINE


def test_routes_by_suffix() -> None:
    """`*.example` is for every name below example, and not for example itself, as with host names."""
    routes = [
        Route("wide", (Condition("dns.qname", Match.SUFFIX, ".example"),), None, ()),
        Route("narrow", (Condition("dns.qname", Match.SUFFIX, ".shop.example"),), None, ()),
        Route("exact", (Condition("dns.qname", Match.EXACT, "shop.example"),), None, ()),
    ]
    compiled = compile_routes(routes, [PARSER.keys], lambda shape: shape.parts[0].length)
    table = {key: routes[index].name.encode() for key, index in compiled.entries}

    def route(datagram: bytes) -> bytes | None:
        found = question(datagram)
        assert found is not None
        return lookup(compiled.probes, found, bytes(4), table.get)

    assert route(only("dns-dig-9.18.49-aaaa")) == b"exact"
    assert route(message(name(b"www", b"Shop", b"EXAMPLE"))) == b"narrow"
    assert route(message(name(b"www", b"example"))) == b"wide"
    assert route(message(name(b"example"))) is None
    assert route(message(name(b"notexample"))) is None
    # One label with a dot in it is no name below shop.example.
    assert route(message(name(b"a.shop", b"example"))) == b"wide"
    assert route(message(name(b"a.shop.example"))) is None
