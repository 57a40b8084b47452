"""The `http2` parser: requests of curl and nghttp (both nghttp2), frames in every arrangement, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hpack import Encoder

from steerd.model import Answer, Keys
from steerd.wire.http2 import BOUND, MAX_FIELD_LIST, MAX_FRAMES, inspect

VECTORS = Path(__file__).parent.parent / "vectors"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, PADDED, WITH_PRIORITY = 0x01, 0x04, 0x08, 0x20

Fields = list[tuple[str, str]]
GET: Fields = [(":method", "GET"), (":scheme", "http"), (":authority", "a.example"), (":path", "/")]
CONNECT: Fields = [(":method", "CONNECT"), (":authority", "a.example:443")]


def real(what: str) -> bytes:
    return (VECTORS / f"http2-{what}.bin").read_bytes()


def keys(data: bytes) -> Keys:
    answer = inspect(data)
    assert isinstance(answer, dict), answer
    return answer


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def encoded(fields: Fields, huffman: bool = True) -> bytes:
    return bytes(Encoder().encode(fields, huffman=huffman))


def opening(*frames: bytes) -> bytes:
    return PREFACE + frame(SETTINGS, b"\x00\x04\x00\x01\x00\x00") + b"".join(frames)


def request(fields: Fields) -> bytes:
    return opening(frame(HEADERS, encoded(fields), END_STREAM | END_HEADERS, 1))


def with_fields(*fields: tuple[str, str]) -> Fields:
    return [*GET, *fields]


def changed(name: str, value: str | None) -> Fields:
    """GET with one pseudo field changed, or left out."""
    return ([] if value is None else [(name, value)]) + [field for field in GET if field[0] != name]


def test_curl_get() -> None:
    assert keys(real("curl-7.88.1-get")) == {
        "http.method": "GET",
        "http.host": "shop.example",
        "http.path": "/cart?item=7",
        "http.header.user-agent": "curl/7.88.1",
        "http.header.accept": "*/*",
        "http.header.cookie": "session=abc; theme=dark",
        "http.cookie.session": "abc",
        "http.cookie.theme": "dark",
    }


def test_curl_post() -> None:
    found = keys(real("curl-7.88.1-post"))
    assert (found["http.method"], found["http.host"], found["http.path"]) == ("POST", "api.example", "/v1/things")
    assert found["http.header.content-type"] == "application/json"


def test_nghttp_sends_priorities_before_its_request() -> None:
    found = keys(real("nghttp-1.52.0-get"))
    assert (found["http.host"], found["http.path"], found["http.header.x-tag"]) == ("shop.example", "/cart?item=7", "7")


@pytest.mark.parametrize("what", ["curl-7.88.1-get", "nghttp-1.52.0-get"])
def test_need_more_until_the_headers_are_whole(what: str) -> None:
    data = real(what)
    assert all(inspect(data[:length]) is Answer.NEED_MORE for length in range(len(data)))
    assert inspect(data + b"\xffjunk") == inspect(data)


def test_frames_that_may_come_before_a_request() -> None:
    frames = [frame(SETTINGS), frame(WINDOW_UPDATE, bytes(4)), frame(PRIORITY, bytes(5), 0, 3), frame(PING, bytes(8))]
    unknown = frame(0x0B, b"grease", 0xFF, 0x7FFFFFFF)
    headers = frame(HEADERS, encoded(GET), END_HEADERS, 1)
    assert keys(opening(*frames, unknown, headers)) == keys(request(GET))


@pytest.mark.parametrize("kind", [DATA, RST_STREAM, 5, GOAWAY, CONTINUATION])
def test_frames_that_may_not(kind: int) -> None:
    assert inspect(opening(frame(kind, bytes(8), END_HEADERS, 1))) is Answer.NOT_MINE


@pytest.mark.parametrize("size", [1, 2, 7])
def test_continuation_frames(size: int) -> None:
    block = encoded(with_fields(("x-tag", "7")))
    pieces = [block[start : start + size] for start in range(0, len(block), size)]
    frames = [frame(HEADERS, pieces[0], END_STREAM, 1)]
    frames += [frame(CONTINUATION, piece, 0, 1) for piece in pieces[1:-1]]
    data = opening(*frames, frame(CONTINUATION, pieces[-1], END_HEADERS, 1))
    assert keys(data)["http.header.x-tag"] == "7"
    assert inspect(data[:-1]) is Answer.NEED_MORE
    assert inspect(opening(*frames, frame(CONTINUATION, pieces[-1], END_HEADERS, 3))) is Answer.NOT_MINE
    assert inspect(opening(*frames, frame(WINDOW_UPDATE, bytes(4)))) is Answer.NOT_MINE


def test_padding_and_priority() -> None:
    block = encoded(GET)
    both = b"\x03" + bytes(5) + block + bytes(3)
    expected = keys(request(GET))
    assert keys(opening(frame(HEADERS, both, END_HEADERS | PADDED | WITH_PRIORITY, 1))) == expected
    assert keys(opening(frame(HEADERS, both[:1] + both[6:], END_HEADERS | PADDED, 1))) == expected
    assert keys(opening(frame(HEADERS, both[1:-3], END_HEADERS | WITH_PRIORITY, 1))) == expected


@pytest.mark.parametrize(
    ("payload", "flags"),
    [(b"", PADDED), (b"\x01", PADDED), (b"\x05" + bytes(4), PADDED), (bytes(4), WITH_PRIORITY)],
)
def test_padding_that_does_not_fit(payload: bytes, flags: int) -> None:
    assert inspect(opening(frame(HEADERS, payload, flags | END_HEADERS, 1))) is Answer.NOT_MINE


@pytest.mark.parametrize(
    ("authority", "host"),
    [("A.Example:8080", "a.example"), ("a.example.", "a.example"), ("[2001:DB8::1]:80", "[2001:db8::1]"), ("", None)],
)
def test_authority(authority: str, host: str | None) -> None:
    assert keys(request(changed(":authority", authority))).get("http.host") == host


def test_host_stands_in_for_an_authority() -> None:
    without = changed(":authority", None)
    assert keys(request([*without, ("host", "B.Example:80")]))["http.host"] == "b.example"
    assert "http.host" not in keys(request(without))
    assert keys(request(with_fields(("host", "A.example:80"))))["http.host"] == "a.example"


def test_connect_has_no_path() -> None:
    assert keys(request(CONNECT)) == {"http.method": "CONNECT", "http.host": "a.example"}


def test_options_for_the_whole_server() -> None:
    fields: Fields = [(":method", "OPTIONS"), (":scheme", "http"), (":authority", "a.example"), (":path", "*")]
    assert keys(request(fields))["http.path"] == "*"


def test_cookies_come_in_pieces_and_of_other_fields_the_first_counts() -> None:
    found = keys(request(with_fields(("cookie", "a=1"), ("x", "1"), ("cookie", "b=2; a=3"), ("x", "2"))))
    assert found["http.header.cookie"] == "a=1; b=2; a=3"
    assert (found["http.cookie.a"], found["http.cookie.b"], found["http.header.x"]) == ("1", "2", "1")


def test_bytes_that_are_not_text_are_kept() -> None:
    block = encoded(GET, huffman=False) + b"\x00\x01x\x02\xff\xe9"
    assert keys(opening(frame(HEADERS, block, END_HEADERS, 1)))["http.header.x"] == "\xff\xe9"


@pytest.mark.parametrize(
    "fields",
    [
        [],
        changed(":method", None),
        changed(":method", ""),
        changed(":method", "G T"),
        changed(":scheme", None),
        changed(":path", None),
        changed(":path", ""),
        changed(":path", "x"),
        changed(":path", "/a b"),
        changed(":authority", "user@a.example"),
        changed(":authority", "a.example/x"),
        changed(":authority", "[::1"),
        with_fields((":path", "/x")),
        with_fields((":protocol", "websocket")),
        with_fields(("x", "1"), (":path", "/x")),
        [("x", "1"), *GET],
        with_fields(("X", "1")),
        with_fields(("", "1")),
        with_fields(("a b", "1")),
        with_fields(("x", "a\r\nhost: b")),
        with_fields(("x", "a\x00")),
        with_fields(("host", "b.example")),
        with_fields(("host", "a.example"), ("host", "a.example")),
        with_fields(("host", "b@c")),
        [*CONNECT, (":path", "/")],
        [(":method", "CONNECT")],
    ],
    ids=range(26),
)
def test_requests_that_are_malformed(fields: Fields) -> None:
    data = request(fields)
    assert inspect(data) is Answer.NOT_MINE
    assert inspect(data + b"more") is Answer.NOT_MINE


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\xbe",
        b"\x41",
        b"\x41\x05abc",
        b"\x41\x82\xff\xff",
        b"\x3f\xe2\x1f",
        b"\x82\x3f\xe1\x1f",
        b"\x20\x3f\xe1\x1f\x20" + encoded(GET),
    ],
    ids=repr,
)
def test_header_blocks_that_hpack_refuses(block: bytes) -> None:
    assert inspect(opening(frame(HEADERS, block, END_HEADERS, 1))) is Answer.NOT_MINE


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x16\x03\x01",
        b"GET / HTTP/1.1\r\n",
        b"PRI * HTTP/2.1",
        PREFACE[:-1] + b"\r",
        PREFACE + frame(HEADERS, encoded(GET), END_HEADERS, 1),
        PREFACE + frame(SETTINGS, bytes(5)),
        PREFACE + frame(SETTINGS, b"", 0, 1),
        PREFACE + (16385).to_bytes(3) + bytes([SETTINGS]) + bytes(5),
        opening(frame(HEADERS, encoded(GET), END_HEADERS, 0)),
        opening(frame(HEADERS, encoded(GET), END_HEADERS, 2)),
        opening((16385).to_bytes(3) + bytes([HEADERS, END_HEADERS]) + b"\x00\x00\x00\x01"),
    ],
    ids=range(11),
)
def test_not_mine_as_soon_as_it_cannot_be_http2(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE
    assert inspect(beginning + real("curl-7.88.1-get")) is Answer.NOT_MINE


def test_two_table_sizes_are_allowed() -> None:
    block = b"\x20\x3f\xe1\x1f" + encoded(GET)
    assert keys(opening(frame(HEADERS, block, END_HEADERS, 1))) == keys(request(GET))


def test_the_field_list_is_bounded() -> None:
    """Each field counts 32 bytes more than its name and value."""
    counted = sum(len(name) + len(value) + 32 for name, value in GET)
    room = MAX_FIELD_LIST - counted - len("x") - 32
    assert keys(request(with_fields(("x", "0" * room))))["http.header.x"] == "0" * room
    assert inspect(request(with_fields(("x", "0" * (room + 1))))) is Answer.NOT_MINE


def test_a_bomb_of_references_is_refused_quickly() -> None:
    """One field of 4 KB in the table of hpack, then 12,000 references to it of one byte each: 48 MB."""
    block = encoded(GET) + b"\x40\x01x\x7f\xa1\x1e" + b"y" * 4000 + b"\xbe" * 12000
    assert MAX_FIELD_LIST < 12000 * 4000
    started = time.process_time()
    assert inspect(opening(frame(HEADERS, block, END_HEADERS, 1))) is Answer.NOT_MINE
    assert time.process_time() - started < 0.5
    few = encoded(GET) + b"\x40\x01x\x7f\xa1\x1e" + b"y" * 4000 + b"\xbe" * 3
    assert keys(opening(frame(HEADERS, few, END_HEADERS, 1)))["http.header.x"] == "y" * 4000


def test_bound() -> None:
    def data(length: int) -> bytes:
        """A request that takes so many bytes in all, in a HEADERS and a CONTINUATION frame."""
        start = encoded(GET, huffman=False) + b"\x00\x01x\x7f"
        value = length - len(opening()) - 2 * 9 - len(start) - 2
        rest = value - 127
        block = start + bytes([0x80 | rest % 128, rest // 128]) + b"y" * value
        assert 128 <= rest < 1 << 14
        return opening(frame(HEADERS, block[:9000], 0, 1), frame(CONTINUATION, block[9000:], END_HEADERS, 1))

    longest = data(16000)
    assert len(longest) == 16000
    assert keys(longest)["http.host"] == "a.example"
    filler = opening(frame(0x20, bytes(BOUND - len(longest) - 9)))
    fits = filler + longest[len(opening()) :]
    assert len(fits) == BOUND
    assert keys(fits)["http.host"] == "a.example"
    assert inspect(fits[:-1]) is Answer.NEED_MORE
    too_long = filler + frame(WINDOW_UPDATE, bytes(4)) + longest[len(opening()) :]
    assert inspect(too_long[: BOUND - 1]) is Answer.NEED_MORE
    assert inspect(too_long[:BOUND]) is Answer.NOT_MINE
    assert inspect(too_long) is Answer.NOT_MINE


def test_bound_on_frames() -> None:
    """All frames are read again with every segment that comes."""
    request = frame(HEADERS, encoded(GET), END_HEADERS, 1)
    filler = [frame(WINDOW_UPDATE, bytes(4))] * (MAX_FRAMES - 2)  # besides them: SETTINGS, HEADERS
    assert keys(opening(*filler, request))["http.host"] == "a.example"
    assert inspect(opening(filler[0], *filler, request)) is Answer.NOT_MINE
    assert inspect(opening(*filler, filler[0], filler[0])) is Answer.NOT_MINE


def test_bound_on_continuation_frames() -> None:
    block = encoded(GET)
    start, end = frame(HEADERS, block[:1], 0, 1), frame(CONTINUATION, block[1:], END_HEADERS, 1)
    empty = [frame(CONTINUATION, b"", 0, 1)] * (MAX_FRAMES - 3)  # besides them: SETTINGS, HEADERS, the last one
    assert keys(opening(start, *empty, end))["http.host"] == "a.example"
    assert inspect(opening(start, empty[0], *empty, end)) is Answer.NOT_MINE
    assert inspect(opening(start, *empty, *empty)) is Answer.NOT_MINE
