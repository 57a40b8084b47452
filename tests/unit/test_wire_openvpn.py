"""The `openvpn` parser: resets of OpenVPN 2.6 with every protection of its control channel, and what is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from steerd.model import Answer, Keys
from steerd.wire import dns
from steerd.wire.openvpn import BOUND, DATAGRAMS, client_key, inspect, reset
from tests.flows import flow, flows, only

VECTORS = Path(__file__).parent.parent / "vectors"
TAG = "a1d64613509b7962d25c54c711ec56422a407c6383086942c56a074566d110d4"
TLS_CRYPT_V2 = only("openvpn-openvpn-2.6.14-tls-crypt-v2")
WRAPPED_KEY = TLS_CRYPT_V2[54:]


def key_file(content: bytes) -> str:
    """As `openvpn --genkey tls-crypt-v2-client` writes it, with text before and after as in a whole profile."""
    mark = "OpenVPN tls-crypt-v2 client key"
    text = base64.encodebytes(content).decode()
    return f"client\n<tls-crypt-v2>\n-----BEGIN {mark}-----\n{text}-----END {mark}-----\n</tls-crypt-v2>\n"


def expected(wrap: str) -> Keys:
    if wrap == "tls-crypt-v2":
        return {"openvpn.opcode": "10", "openvpn.wrap": wrap, "openvpn.client-key": TAG}
    return {"openvpn.opcode": "7", "openvpn.wrap": wrap}


@pytest.mark.parametrize(
    ("what", "wrap"),
    [
        ("none", "none"),
        ("tls-auth-sha1", "tls-auth"),
        ("tls-auth-sha256", "tls-auth"),
        ("tls-auth-sha512", "tls-auth"),
        ("tls-crypt", "tls-crypt"),
        ("tls-crypt-v2", "tls-crypt-v2"),
    ],
)
def test_over_udp(what: str, wrap: str) -> None:
    assert DATAGRAMS.make(())(flow(f"openvpn-openvpn-2.6.14-{what}")) == expected(wrap)


@pytest.mark.parametrize("wrap", ["none", "tls-auth", "tls-crypt-v2"])
def test_over_tcp(wrap: str) -> None:
    data = (VECTORS / f"openvpn-openvpn-2.6.14-{wrap}.bin").read_bytes()
    assert inspect(data) == inspect(data + b"more") == expected(wrap)
    assert all(inspect(data[:length]) is Answer.NEED_MORE for length in range(len(data)))


@pytest.mark.parametrize(
    ("what", "at", "wrap"),
    [("tls-auth-sha1", 29, "tls-auth"), ("tls-crypt", 9, "tls-crypt"), ("tls-crypt-v2", 9, "tls-crypt-v2")],
)
def test_repetitions(what: str, at: int, wrap: str) -> None:
    """The client repeats its reset after 2, 4 and 8 seconds, each with the next packet id."""
    first = only(f"openvpn-openvpn-2.6.14-{what}")
    assert first[at + 3] == 1
    for number in (2, 4, 255):
        assert reset(first[: at + 3] + bytes([number]) + first[at + 4 :]) == expected(wrap)
    for packet_id in (bytes(4), b"\x00\x01\x00\x01", b"\x01\x00\x00\x01", b"\x00\x00\x01\x01"):
        assert reset(first[:at] + packet_id + first[at + 4 :]) is None


def test_a_dns_query_that_looks_like_a_reset() -> None:
    """54 bytes, an id that begins with 0x38, and EDNS."""
    query = bytes.fromhex("3812 0120 0001 0000 0000 0001") + b"\x04shop\x07example\x00" + bytes.fromhex("001c 0001")
    query += bytes.fromhex("000029 04d0 00000000 000d 000a 0009") + bytes(9)
    assert len(query) == 54
    assert dns.question(query) == {"dns.qname": "shop.example", "dns.qtype": "AAAA"}
    assert reset(query) is None


def test_every_vector_is_known_by_this_file() -> None:
    assert len(flows("openvpn")) == 6
    assert len(list(VECTORS.glob("openvpn-*.bin"))) == 3


def test_the_client_key_of_a_file_is_what_the_client_sends() -> None:
    """Both transports' vectors were made with one file: other session ids and times, the same wrapped key."""
    assert client_key(key_file(bytes(256) + WRAPPED_KEY)) == TAG
    assert (VECTORS / "openvpn-openvpn-2.6.14-tls-crypt-v2.bin").read_bytes()[56:] == WRAPPED_KEY


@pytest.mark.parametrize(
    "file",
    [
        "",
        key_file(b""),
        key_file(bytes(256) + WRAPPED_KEY[:-1]),
        key_file(bytes(255) + WRAPPED_KEY),
        key_file(bytes(256) + WRAPPED_KEY).replace("client key", "server key"),
        key_file(bytes(256) + WRAPPED_KEY).replace("AAAA", "AAA", 1),
    ],
    ids=["empty", "no key", "cut", "shifted", "server key", "no base64"],
)
def test_files_that_are_no_client_key(file: str) -> None:
    with pytest.raises(ValueError, match='Is no "OpenVPN tls-crypt-v2 client key"'):
        client_key(file)


PLAIN = only("openvpn-openvpn-2.6.14-none")
TLS_CRYPT = only("openvpn-openvpn-2.6.14-tls-crypt")


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x38",
        PLAIN[:-1],
        PLAIN + b"\x00",
        PLAIN[:-1] + b"\x01",
        b"\x39" + PLAIN[1:],
        b"\x08" + PLAIN[1:],
        b"\x40" + PLAIN[1:],
        b"\x20" + PLAIN[1:],
        TLS_CRYPT[:-1],
        TLS_CRYPT + b"\x01",
        b"\x50" + PLAIN[1:],
        b"\x50" + TLS_CRYPT[1:],
        b"\x38" + TLS_CRYPT_V2[1:],
        TLS_CRYPT_V2[:-1],
        TLS_CRYPT_V2[:-1] + b"\x00",
        TLS_CRYPT_V2[:54] + bytes(1024) + b"\x04\x02",
        TLS_CRYPT_V2[:54] + bytes(32) + b"\x00\x22",
    ],
    ids=["empty", "opcode alone", "cut", "too long", "packet id 1", "key id 1", "version 1", "server's", "control",
         "crypt cut", "crypt too long", "v3 plain", "v3 without key", "v2 with key", "key cut", "key's length",
         "key too long", "key too short"],
)  # fmt: skip
def test_not_mine(packet: bytes) -> None:
    assert reset(packet) is None
    assert inspect(len(packet).to_bytes(2) + packet) is Answer.NOT_MINE


@pytest.mark.parametrize("beginning", [b"GE", b"\x16\x03", b"\x00\x0d", b"\x00\x0e\x28", b"\x00\x0e\x16"], ids=repr)
def test_not_mine_as_soon_as_it_cannot_be_a_reset(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE


def test_bound() -> None:
    packet = TLS_CRYPT_V2[:54] + bytes(1022) + (1024).to_bytes(2)
    data = len(packet).to_bytes(2) + packet
    assert len(data) == BOUND
    assert inspect(data) == {"openvpn.opcode": "10", "openvpn.wrap": "tls-crypt-v2", "openvpn.client-key": "00" * 32}
    assert inspect(data[:-1]) is Answer.NEED_MORE
