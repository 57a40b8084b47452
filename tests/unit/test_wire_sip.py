"""The `sip` parser: requests of sipsak and of RFC 3261, forms of addresses, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from steerd.model import Answer, Keys
from steerd.wire.sip import DATAGRAMS, inspect, message
from tests.flows import flow, only

VECTORS = Path(__file__).parent.parent / "vectors"


def keys(data: bytes) -> Keys:
    answer = inspect(data)
    assert isinstance(answer, dict), answer
    return answer


def vector(name: str) -> Keys:
    return keys((VECTORS / f"sip-{name}.bin").read_bytes())


def request(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def test_sipsak_options() -> None:
    assert vector("sipsak-0.9.8.1-options") == {
        "sip.method": "OPTIONS",
        "sip.host": "registrar.example",
        "sip.user": "bob",
        "sip.to": "bob@registrar.example",
        "sip.from": "sipsak@127.0.0.1",
        "sip.call-id": "141780312@127.0.0.1",
    }


def test_sipsak_register_names_the_domain_and_no_user() -> None:
    found = vector("sipsak-0.9.8.1-register")
    assert (found["sip.method"], found["sip.host"]) == ("REGISTER", "registrar.example")
    assert found["sip.to"] == "alice@registrar.example"
    assert "sip.user" not in found


def test_invite_of_the_rfc() -> None:
    """RFC 3261 section 24.2, F1, and the compact names of section 7.3.3."""
    invite = (
        "INVITE sip:bob@biloxi.com SIP/2.0",
        "Via: SIP/2.0/TCP pc33.atlanta.com;branch=z9hG4bKnashds8",
        "To: Bob <sip:bob@biloxi.com>",
        "From: Alice <sip:alice@atlanta.com>;tag=1928301774",
        "Call-ID: a84b4c76e66710",
    )
    compact = [line.replace("To:", "t:").replace("From:", "f:").replace("Call-ID:", "i:") for line in invite]
    assert keys(request(*compact)) == keys(request(*invite)) == {
        "sip.method": "INVITE",
        "sip.host": "biloxi.com",
        "sip.user": "bob",
        "sip.to": "bob@biloxi.com",
        "sip.from": "alice@atlanta.com",
        "sip.call-id": "a84b4c76e66710",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "user", "host"),
    [
        ("sip:Example.COM.", None, "example.com"),
        ("SIPS:Bob@Example.com:5061", "Bob", "example.com"),
        ("sip:bob:secret@example.com;transport=tcp?subject=x", "bob", "example.com"),
        ("sip:+1-212;phone-context=a@example.com", "+1-212;phone-context=a", "example.com"),
        ("sip:bob@[2001:DB8::1]:5060", "bob", "[2001:db8::1]"),
        ("sip:@example.com", None, "example.com"),
        ("tel:+358-555-1234567", None, None),
    ],
)
def test_request_uri(uri: str, user: str | None, host: str | None) -> None:
    found = keys(request(f"INVITE {uri} SIP/2.0"))
    assert (found.get("sip.user"), found.get("sip.host")) == (user, host)


@pytest.mark.parametrize("uri", ["sip:", "sip:a@b@c", "sip:bob@", "sip:[::1", "sip:a@h:x"])
def test_uris_that_are_refused(uri: str) -> None:
    assert inspect(request(f"INVITE {uri} SIP/2.0")) is Answer.NOT_MINE
    assert inspect(request("INVITE sip:a@b SIP/2.0", f"To: <{uri}>")) is Answer.NOT_MINE


@pytest.mark.parametrize(
    ("to", "address"),
    [
        ("sip:bob@Biloxi.com", "bob@biloxi.com"),
        ("sip:bob@biloxi.com;tag=1", "bob@biloxi.com"),
        ('"Bob <the \\"one\\">" <sip:bob@biloxi.com;a=b>;tag=1', "bob@biloxi.com"),
        ("<sips:biloxi.com:5061>", "biloxi.com"),
        ("<tel:+358-555>", None),
        ("", None),
    ],
)
def test_address_of_record(to: str, address: str | None) -> None:
    assert keys(request("INVITE sip:b SIP/2.0", f"To: {to}")).get("sip.to") == address


@pytest.mark.parametrize(
    "fields", [["To: sip:a@b", "t: sip:a@b"], ["From: sip:a@b", "From: sip:c@d"], ["Call-ID: 1", "i: 1"]], ids=repr
)
def test_what_is_there_twice_is_refused(fields: list[str]) -> None:
    assert inspect(request("BYE sip:a@b SIP/2.0", *fields)) is Answer.NOT_MINE


@pytest.mark.parametrize(
    "beginning", [b"\x16\x03", b"SIP/2.0 200", b"GET / H", b"BYE sip:a SIP/3", b"\r\n", b"BYE sip:a\r"], ids=repr
)
def test_not_mine_as_soon_as_it_cannot_be_a_request(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE


def test_a_datagram_is_a_whole_request_or_none() -> None:
    whole = request("BYE sip:a@b SIP/2.0", "Call-ID: 1")
    assert message(whole) == keys(whole)
    assert message(whole[:-1]) is None
    assert message(b"\x00") is None
    assert all(inspect(whole[:length]) is Answer.NEED_MORE for length in range(len(whole)))


@pytest.mark.parametrize("field", ['"' * 15000, '"a" ' * 3500, "<" * 15000, "sip:" + ":@" * 7000, "\\" * 15000])
def test_long_addresses_take_no_time(field: str) -> None:
    started = time.process_time()
    assert inspect(request("BYE sip:a@b SIP/2.0", f"To: {field}")) is not Answer.NEED_MORE
    assert time.process_time() - started < 0.1


def test_sipsak_over_udp() -> None:
    inspect_datagrams = DATAGRAMS.make(())
    options = inspect_datagrams(flow("sip-sipsak-0.9.8.1-options"))
    assert isinstance(options, dict)
    assert (options["sip.method"], options["sip.host"], options["sip.user"]) == ("OPTIONS", "registrar.example", "bob")
    register = inspect_datagrams(flow("sip-sipsak-0.9.8.1-register"))
    assert isinstance(register, dict)
    assert (register["sip.method"], register["sip.to"]) == ("REGISTER", "alice@registrar.example")


def test_datagrams_without_a_whole_head() -> None:
    inspect_datagrams = DATAGRAMS.make(())
    for datagram in (b"", b"\r\n\r\n", b"\x00\x00\x00\x00", only("sip-sipsak-0.9.8.1-options")[:-3]):
        assert inspect_datagrams([datagram]) is Answer.NOT_MINE
