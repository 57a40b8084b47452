"""The `http` parser: curl's own requests, the forms of RFC 9112, and what is refused because it could be read twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerd.model import Answer, Keys
from steerd.wire.http import BOUND, inspect

VECTORS = Path(__file__).parent.parent / "vectors"


def keys(data: bytes) -> Keys:
    answer = inspect(data)
    assert isinstance(answer, dict), answer
    return answer


def request(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def curl(what: str) -> Keys:
    return keys((VECTORS / f"http-curl-7.88.1-{what}.bin").read_bytes())


def test_curl_get() -> None:
    assert curl("get") == {
        "http.method": "GET",
        "http.host": "shop.example",
        "http.path": "/cart?item=7",
        "http.header.host": "Shop.Example.:8080",
        "http.header.user-agent": "curl/7.88.1",
        "http.header.accept": "*/*",
        "http.header.cookie": "session=abc; theme=dark",
        "http.cookie.session": "abc",
        "http.cookie.theme": "dark",
    }


def test_curl_post_has_a_body_that_is_not_looked_at() -> None:
    found = curl("post")
    assert (found["http.method"], found["http.host"], found["http.path"]) == ("POST", "api.example", "/v1/things")
    assert found["http.header.content-type"] == "application/json"


def test_curl_to_a_proxy_sends_the_absolute_form() -> None:
    found = curl("proxy")
    assert (found["http.host"], found["http.path"]) == ("origin.example", "/page?q=1")


def test_curl_connect_has_a_host_and_no_path() -> None:
    found = curl("connect")
    assert (found["http.method"], found["http.host"]) == ("CONNECT", "origin.example")
    assert "http.path" not in found


def test_curl_ipv6_literal_stays_in_brackets() -> None:
    assert curl("ipv6-literal")["http.host"] == "[2001:db8::10]"


@pytest.mark.parametrize(
    ("target", "host", "path"),
    [
        ("http://Target.example/p?q", "target.example", "/p?q"),
        ("HTTPS://target.example:8443", "target.example", "/"),
        ("http://target.example?q=1", "target.example", "/?q=1"),
        ("http:///p", None, "/p"),
        ("/p", "field.example", "/p"),
        ("*", "field.example", "*"),
        ("urn:isbn:1", "field.example", "urn:isbn:1"),
    ],
)
def test_the_target_wins_over_the_host_field(target: str, host: str | None, path: str) -> None:
    found = keys(request(f"GET {target} HTTP/1.1", "Host: field.example"))
    assert found.get("http.host") == host
    assert found["http.path"] == path


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("a.example", "a.example"),
        ("A.Example:443", "a.example"),
        ("a.example.", "a.example"),
        ("a.example.:80", "a.example"),
        ("a.example:", "a.example"),
        ("my_host", "my_host"),
        ("192.0.2.1:8080", "192.0.2.1"),
        ("[2001:DB8::1]:8080", "[2001:db8::1]"),
        ("  a.example\t", "a.example"),
    ],
)
def test_host(value: str, host: str) -> None:
    assert keys(request("GET / HTTP/1.1", f"Host:{value}"))["http.host"] == host


@pytest.mark.parametrize("lines", [[], ["Host:"], ["Host: ."], ["Host: :80"]])
def test_without_a_host_there_is_no_such_key(lines: list[str]) -> None:
    assert "http.host" not in keys(request("GET / HTTP/1.0", *lines))


def test_the_first_field_and_the_first_cookie_of_a_name_count() -> None:
    found = keys(
        request("GET / HTTP/1.1", "X-Tag: 1", "x-tag: 2", "Cookie: a=1; A=2;b ; a=3; c=x=y; =z", 'Cookie: a=4; d="q"')
    )
    assert found["http.header.x-tag"] == "1"
    cookies = {key.removeprefix("http.cookie."): value for key, value in found.items() if "cookie." in key}
    assert cookies == {"a": "1", "A": "2", "c": "x=y", "d": '"q"'}


def test_a_bare_lf_ends_a_line_too() -> None:
    assert keys(b"GET / HTTP/1.1\nHost: a.example\n\n")["http.host"] == "a.example"
    assert keys(b"GET / HTTP/1.1\r\nHost: a.example\n\r\n")["http.host"] == "a.example"


def test_bytes_that_are_not_text_are_kept() -> None:
    found = keys(b"GET /\xc3\xa9 HTTP/1.1\r\nX: \xff\r\n\r\n")
    assert (found["http.path"], found["http.header.x"]) == ("/\xc3\xa9", "\xff")


def test_what_follows_the_head_makes_no_difference() -> None:
    head = request("GET / HTTP/1.1", "Host: a.example")
    assert inspect(head) == inspect(head + b"\x00\xff GET / HTTP/1.1\r\nHost: b.example\r\n\r\n")


@pytest.mark.parametrize(
    "fields",
    [
        ["Host: a.example", " folded"],
        ["Host: a.example", "\tfolded"],
        ["Host : a.example"],
        ["Host: a.example", "Host: a.example"],
        ["Host: a.example", "HOST: b.example"],
        ["Host: user@a.example"],
        ["Host: a.example/path"],
        ["Host: a.example, b.example b"],
        ["Host: a b"],
        ["Host: [::1"],
        ["Host: ::1"],
        ["Host: a.example:80x"],
        ["Host: \xe9.example"],
        ["no colon"],
        [": no name"],
        ["X: a\x00b"],
        ["X: a\rb"],
        ["X: a\r"],
    ],
    ids=repr,
)
def test_fields_that_could_be_read_twice_are_refused(fields: list[str]) -> None:
    data = request("GET / HTTP/1.1", *fields)
    assert inspect(data) is Answer.NOT_MINE
    assert inspect(data[:-2]) is Answer.NEED_MORE


@pytest.mark.parametrize("target", ["http://user@a.example/", "http://[::1/", "http://a b/"])
def test_targets_that_are_refused(target: str) -> None:
    assert inspect(request(f"GET {target} HTTP/1.1", "Host: a.example")) is Answer.NOT_MINE


def test_a_bad_host_field_is_refused_even_where_the_target_wins() -> None:
    assert inspect(request("GET http://a.example/ HTTP/1.1", "Host: b@c")) is Answer.NOT_MINE
    assert inspect(request("CONNECT a.example:443 HTTP/1.1", "Host: b@c")) is Answer.NOT_MINE


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x16\x03\x01",
        b"SSH-2.0-OpenSSH_9.2\r",
        b"EHLO client.example\r",
        b"PRI * HTTP/2",
        b"GET /\r",
        b"GET /\n",
        b"GET  ",
        b"GET / \n",
        b" ",
        b"\r",
        b"\n",
        b"G\x00",
        b"G:",
        b"GET /\x00",
        b"GET / h",
        b"GET / HTTP/1.x",
        b"GET / HTTP/1.1 ",
        b"GET / HTTP/1.10",
        b"GET / HTTP/1.1\rX",
        b"GET / HTTP/1\n",
        b"GET / HTTP/1.\n",
    ],
    ids=repr,
)
def test_not_mine_as_soon_as_it_cannot_be_a_request(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE
    assert inspect(beginning + b"GET / HTTP/1.1\r\n\r\n") is Answer.NOT_MINE


def test_need_more_until_the_empty_line() -> None:
    whole = request("GET /x HTTP/1.1", "Host: a.example")
    assert all(inspect(whole[:length]) is Answer.NEED_MORE for length in range(len(whole)))
    assert keys(whole)["http.path"] == "/x"


def test_bound() -> None:
    def head(length: int) -> bytes:
        start = b"GET / HTTP/1.1\r\nX: "
        return start + b"x" * (length - len(start) - 4) + b"\r\n\r\n"

    assert len(head(BOUND)) == BOUND
    assert keys(head(BOUND))["http.method"] == "GET"
    assert inspect(head(BOUND)[:-1]) is Answer.NEED_MORE
    assert inspect(head(BOUND + 1)) is Answer.NOT_MINE
    assert inspect(head(BOUND + 1)[:BOUND]) is Answer.NOT_MINE
