"""The `wireguard` parser: initiations of wireguard-go, public keys that fit and others, and what is refused.

Vectors were made for SERVER's key; its private half is of no use to anybody.
"""

from __future__ import annotations

import base64
import hashlib

import pytest

from steerd.model import Answer
from steerd.wire.wireguard import MAX_KEYS, wireguard_parser
from tests.flows import flow, flows, only

SERVER = "aGfFP/CshhRguvtn5UD4kh1DeIYBSOVotdR5YzEMADQ="
REAL = flows("wireguard")


def public_key(number: int) -> str:
    return base64.b64encode(number.to_bytes(32)).decode()


def initiation(key: str) -> bytes:
    """As section 5.4.4 says it, with nothing in the encrypted fields, which mac1 does not look into."""
    covered = b"\x01\x00\x00\x00" + bytes(range(112))
    mac1_key = hashlib.blake2s(b"mac1----" + base64.b64decode(key)).digest()
    return covered + hashlib.blake2s(covered, key=mac1_key, digest_size=16).digest() + bytes(16)


@pytest.mark.parametrize("name", REAL)
def test_wireguard_go(name: str) -> None:
    others = [public_key(number) for number in range(1, 50)]
    for keys in ([SERVER], [SERVER, *others], [*others, SERVER], [SERVER, SERVER]):
        assert wireguard_parser(keys)(flow(name)) == {"wireguard.public-key": SERVER}
    assert wireguard_parser(others)(flow(name)) is wireguard_parser(())(flow(name)) is Answer.NOT_MINE


def test_every_initiation_is_for_one_key() -> None:
    keys = [public_key(number) for number in range(1, 21)]
    inspect = wireguard_parser(keys)
    for key in keys:
        assert inspect([initiation(key)]) == {"wireguard.public-key": key}


def test_any_changed_byte_that_mac1_covers_is_noticed() -> None:
    inspect = wireguard_parser([SERVER])
    data = only(REAL[0])
    for at in range(4, 132):
        assert inspect([data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]]) is Answer.NOT_MINE
    # mac2 is empty unless the server asked for it; it is the server's to check.
    assert inspect([data[:132] + bytes([1] * 16)]) == {"wireguard.public-key": SERVER}


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\x01\x00\x00\x00",
        initiation(SERVER)[:-1],
        initiation(SERVER) + b"\x00",
        b"\x02" + initiation(SERVER)[1:],
        b"\x01\x00\x00\x01" + initiation(SERVER)[4:],
        b"\x02\x00\x00\x00" + bytes(88),
        b"\x03\x00\x00\x00" + bytes(60),
        b"\x04\x00\x00\x00" + bytes(28),
    ],
    ids=["empty", "short", "cut", "long", "type 2", "reserved", "response", "cookie reply", "data"],
)
def test_not_mine(datagram: bytes) -> None:
    assert wireguard_parser([SERVER])([datagram]) is Answer.NOT_MINE


@pytest.mark.parametrize(
    "text", ["", "abc", SERVER[:-1], SERVER + "=", SERVER[:-2] + "5=", SERVER[:-1] + "A", SERVER.replace("/", "_"), "é"]
)
def test_texts_that_are_no_public_key(text: str) -> None:
    with pytest.raises(ValueError, match="Must be a WireGuard public key, 32 bytes in base64"):
        wireguard_parser([text])


def test_bound() -> None:
    keys = [public_key(number) for number in range(MAX_KEYS + 1)]
    wireguard_parser(keys[:-1])
    with pytest.raises(ValueError, match=f"{MAX_KEYS + 1} public keys .* at most {MAX_KEYS} are allowed"):
        wireguard_parser(keys)
