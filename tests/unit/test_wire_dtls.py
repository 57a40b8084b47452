"""The `dtls` parser: hellos of OpenSSL, GnuTLS and Chromium, whole, with a cookie and in fragments of every kind."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerd.model import Answer, Keys
from steerd.wire import tls
from steerd.wire.dtls import DATAGRAM_BOUND, FRAGMENT_BOUND, HELLO_BOUND, inspect
from tests.flows import flow, flows, only

SHOP = {"dtls.sni": "shop.example", "dtls.alpn": "coap", "dtls.alpn.coap": "1", "dtls.version": "1.2"}
OPENSSL = only("dtls-openssl-3.0.19-sni-alpn")
BODY = OPENSSL[25:]


def fragment(data: bytes, offset: int = 0, length: int | None = None, message: int = 0, kind: int = 1) -> bytes:
    """A handshake message's part, with its header; `length` is that of the whole message."""
    length = len(data) if length is None else length
    header = struct.pack("!B", kind) + length.to_bytes(3) + message.to_bytes(2)
    return header + offset.to_bytes(3) + len(data).to_bytes(3) + data


def record(*fragments: bytes, kind: int = 22, version: int = 0xFEFD, epoch: int = 0) -> bytes:
    content = b"".join(fragments)
    return struct.pack("!BHH", kind, version, epoch) + bytes(6) + len(content).to_bytes(2) + content


def vector(data: bytes, length_size: int) -> bytes:
    return len(data).to_bytes(length_size) + data


def hello(*extensions: tuple[int, bytes], version: int = 0xFEFD, session: bytes = b"", cookie: bytes = b"") -> bytes:
    """A ClientHello's body; without extensions, it ends before them."""
    listed = b"".join(struct.pack("!H", kind) + vector(content, 2) for kind, content in extensions)
    start = version.to_bytes(2) + bytes(32) + vector(session, 1) + vector(cookie, 1) + b"\x00\x02\x13\x01\x01\x00"
    return start + (vector(listed, 2) if extensions else b"")


def sni(name: bytes) -> tuple[int, bytes]:
    return 0, vector(b"\x00" + vector(name, 2), 2)


def of(*datagrams: bytes) -> Keys | Answer:
    return inspect(datagrams)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openssl-3.0.19-sni-alpn", {**SHOP, "dtls.alpn.webrtc": "1"}),
        ("openssl-3.0.19-cookie", {**SHOP, "dtls.alpn.webrtc": "1"}),
        ("openssl-3.0.19-two-hellos", {**SHOP, "dtls.sni": "small.example", "dtls.alpn.webrtc": "1"}),
        ("openssl-3.0.19-no-sni", {"dtls.version": "1.2"}),
        ("openssl-3.0.19-old", {"dtls.sni": "old.example", "dtls.version": "1.0"}),
        ("gnutls-3.7.9-sni-alpn", SHOP),
        ("gnutls-3.7.9-fragments", SHOP),
        ("chromium-156.0.8078.79-webrtc", {"dtls.version": "1.3"}),
    ],
)
def test_real_clients(name: str, expected: Keys) -> None:
    assert inspect(flow(f"dtls-{name}")) == expected


def test_a_hello_of_four_datagrams_in_every_order() -> None:
    datagrams = flow("dtls-openssl-3.0.19-fragments")
    in_order = inspect(datagrams)
    assert isinstance(in_order, dict)
    assert in_order["dtls.sni"] == "long.example"
    assert len([key for key in in_order if key.startswith("dtls.alpn.")]) == 41
    shuffle = random.Random(9147)
    for _ in range(50):
        shuffled = shuffle.sample(datagrams, 4)
        assert inspect([shuffled[0], *shuffled]) == in_order
        assert inspect(shuffled[:3]) is Answer.NEED_MORE


def test_either_hello_suffices() -> None:
    """Two fragments of the first hello, two of the one with the cookie; whichever is complete first decides."""
    first, first_end, second, second_end = flow("dtls-openssl-3.0.19-two-hellos")
    expected = of(first, first_end)
    assert isinstance(expected, dict)
    assert of(second, second_end) == of(first, second, second_end) == of(second_end, first, second) == expected
    assert of(first, second) is of(first_end, second) is of(first_end, second_end) is Answer.NEED_MORE


def test_every_vector_is_known_by_this_file() -> None:
    assert len(flows("dtls")) == 9


@st.composite
def pieces(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Stretches of BODY that cover all of it, overlapping, some twice, in any order."""
    cuts = sorted({0, len(BODY), *draw(st.lists(st.integers(1, len(BODY) - 1), max_size=6))})
    covering = list(itertools.pairwise(cuts))
    longer = [(max(0, start - draw(st.integers(0, 30))), end) for start, end in covering]
    again = draw(st.lists(st.sampled_from(longer), max_size=3))
    return draw(st.permutations(longer + again))


@settings(max_examples=300, deadline=None)
@given(pieces())
def test_however_it_is_cut(stretches: list[tuple[int, int]]) -> None:
    whole = inspect([OPENSSL])
    parts = [fragment(BODY[start:end], start, len(BODY)) for start, end in stretches]
    assert inspect([record(part) for part in parts]) == whole
    bundles = [parts[at : at + FRAGMENT_BOUND] for at in range(0, len(parts), FRAGMENT_BOUND)]
    assert inspect([record(*bundle) for bundle in bundles]) == whole
    assert inspect([b"".join(map(record, bundle)) for bundle in bundles]) == whole


@pytest.mark.parametrize(
    ("legacy", "offered", "version"),
    [
        (0xFEFF, None, "1.0"),
        (0xFEFD, None, "1.2"),
        (0xFEFC, None, "1.2"),
        (0xFEFE, None, None),
        (0xFEFD, b"\xfe\xfc\xfe\xfd", "1.3"),
        (0xFEFD, b"\xfe\xfd\xfe\xff", "1.2"),
        (0xFEFD, b"\x1a\x1a\xfe\xfc", "1.3"),
        (0xFEFD, b"\xfe\xfb", None),
        (0xFEFD, b"\x03\x04", None),
    ],
)
def test_versions(legacy: int, offered: bytes | None, version: str | None) -> None:
    extensions = [] if offered is None else [(43, vector(offered, 1))]
    expected = {} if version is None else {"dtls.version": version}
    assert of(record(fragment(hello(*extensions, version=legacy)))) == expected


def test_the_name_does_not_depend_on_cookie_and_session() -> None:
    for session in (b"", bytes(32)):
        for cookie in (b"", bytes(20), bytes(255)):
            body = hello(sni(b"Shop.Example."), session=session, cookie=cookie)
            assert of(record(fragment(body, message=1))) == {"dtls.sni": "shop.example", "dtls.version": "1.2"}


def test_tls_reads_the_same_without_version_and_cookie() -> None:
    assert BODY[34:36] == b"\x00\x00"  # no session id, no cookie
    without_cookie = b"\x03\x03" + BODY[2:35] + BODY[36:]
    of_tls = tls.client_hello(without_cookie, len(without_cookie))
    assert isinstance(of_tls, dict)
    assert of(OPENSSL) == {f"d{key}": text for key, text in of_tls.items()}


GOOD = fragment(BODY)


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\x16\xfe\xfd",
        OPENSSL[:-1],
        b"\x16\x03" + OPENSSL[2:],
        record(GOOD, kind=23),
        record(GOOD, version=0x0100),
        record(GOOD, epoch=1),
        record(),
        record(fragment(BODY, kind=2)),
        record(fragment(BODY, message=2)),
        record(fragment(b"", 0, len(BODY))),
        record(fragment(BODY, 1, len(BODY))),
        record(fragment(BODY[:9], 0, HELLO_BOUND + 1)),
        record(GOOD[:-1]),
        record(GOOD, GOOD[:5]),
        record(*[fragment(BODY[:1], 0, len(BODY))] * (FRAGMENT_BOUND + 1)),
        record(fragment(BODY[:-1])),
        record(fragment(hello(sni(b"a"), sni(b"b")))),
        record(fragment(hello(version=0x0303))),
        record(fragment(hello(session=bytes(33)))),
        record(fragment(b"\xfe\xfd" + bytes(20))),
        record(fragment(BODY[:9], 0, 90), fragment(BODY[9:], 9, 91)),
        record(fragment(BODY[:9], 0, 90), fragment(b"other", 2, 90)),
    ],
    ids=["empty", "beginning", "cut", "TLS", "data", "AnyConnect", "epoch", "empty record", "ServerHello", "message 2",
         "empty fragment", "beyond the end", "too long", "fragment cut", "header cut", "too many", "hello cut",
         "two names", "version of TLS", "session id", "random cut", "two lengths", "disagreement"],
)  # fmt: skip
def test_not_mine(datagram: bytes) -> None:
    assert of(datagram) is Answer.NOT_MINE
    assert of(datagram, OPENSSL) is Answer.NOT_MINE


def test_what_is_not_of_a_hello_is_passed_over_later() -> None:
    start, end = record(fragment(BODY[:99], 0, len(BODY))), record(fragment(BODY[99:], 99, len(BODY)))
    whole = of(OPENSSL)
    for stray in (b"", bytes(20), b"\x00\x01\x00\x00\x21\x12\xa4\x42", record(GOOD, kind=23), end[:-1]):
        assert of(start, stray) is Answer.NEED_MORE
        assert of(start, stray, end) == whole
        assert of(stray, start, end) is Answer.NOT_MINE


def test_records_behind_the_hello_do_not_count() -> None:
    for behind in (record(b"x" * 30, kind=23, epoch=1), record(GOOD, epoch=1), b"\x2e" + bytes(40)):
        assert of(OPENSSL + behind) == of(OPENSSL)


def test_contradictions_between_datagrams() -> None:
    start = record(fragment(BODY[:99], 0, len(BODY)))
    assert of(start, record(fragment(b"other", 90, len(BODY)))) is Answer.NOT_MINE
    assert of(start, record(fragment(BODY[99:], 99, len(BODY) + 1))) is Answer.NOT_MINE
    # Of the other hello nothing is known.
    assert of(start, record(fragment(b"other", 90, len(BODY) + 1, message=1))) is Answer.NEED_MORE


def test_bound_of_datagrams() -> None:
    length = len(BODY)
    start, end = record(fragment(BODY[:99], 0, length)), record(fragment(BODY[99:], 99, length))
    assert inspect([start] * (DATAGRAM_BOUND - 1)) is Answer.NEED_MORE
    assert inspect([start] * DATAGRAM_BOUND) is Answer.NOT_MINE
    assert inspect([start] * (DATAGRAM_BOUND - 1) + [end]) == of(OPENSSL)
    assert inspect([start] * DATAGRAM_BOUND + [end]) is Answer.NOT_MINE


def test_the_longest_hello() -> None:
    body = hello(sni(b"a.example"), (21, bytes(HELLO_BOUND - len(hello(sni(b"a.example"), (21, b""))))))
    assert len(body) == HELLO_BOUND
    parts = [record(fragment(body[at : at + 1200], at, len(body))) for at in range(0, len(body), 1200)]
    assert len(parts) < DATAGRAM_BOUND
    assert inspect(parts) == {"dtls.sni": "a.example", "dtls.version": "1.2"}
