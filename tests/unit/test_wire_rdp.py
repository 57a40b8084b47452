"""The `rdp` parser: rdesktop's connection request, cookies and tokens, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerd.model import Answer, Keys
from steerd.wire.rdp import BOUND, inspect

VECTORS = Path(__file__).parent.parent / "vectors"
NEGOTIATION = bytes.fromhex("0100080003000000")


def request(variable: bytes) -> bytes:
    counted = b"\xe0\0\0\0\0\0" + variable
    return b"\x03\0" + (5 + len(counted)).to_bytes(2, "big") + bytes([len(counted)]) + counted


def test_rdesktop() -> None:
    data = (VECTORS / "rdp-rdesktop-1.9.0-user.bin").read_bytes()
    assert inspect(data) == {"rdp.cookie": "Administrator"}
    assert all(inspect(data[:length]) is Answer.NEED_MORE for length in range(len(data)))


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (b"", {}),
        (NEGOTIATION, {}),
        (b"Cookie: mstshash=CORP\\bob\r\n", {"rdp.cookie": "CORP\\bob"}),
        (b"Cookie: mstshash=\xe9\r\n" + NEGOTIATION, {"rdp.cookie": "\xe9"}),
        (b"Cookie: mstshash=\r\n", {"rdp.cookie": ""}),
        # A broker's token that names an address and a port, and one of another form.
        (b"Cookie: msts=3640205228.15629.0000\r\n" + NEGOTIATION, {"rdp.token": "3640205228.15629.0000"}),
        (b"tsv://MS Terminal Services Plugin.1.Farm\r\n", {"rdp.token": "tsv://MS Terminal Services Plugin.1.Farm"}),
    ],
)
def test_cookie_and_token(variable: bytes, expected: Keys) -> None:
    assert inspect(request(variable)) == inspect(request(variable) + b"more") == expected


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x16",
        b"G",
        b"\x03\x01",
        b"\x03\x00\x00\x0a",
        (0x03000000 + BOUND + 1).to_bytes(4, "big"),
        b"\x03\x00\x00\x13\x0d",
        b"\x03\x00\x00\x13\x0e\xd0",
        b"\x03\x00\x00\x13\x0e\xe0\x00\x01",
        b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x10",
        request(b"Cookie: mstshash=bob"),
        request(b"Cookie: mstshash=bob\n"),
    ],
    ids=repr,
)
def test_not_mine_as_soon_as_it_cannot_be_a_request(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE
    assert inspect(beginning[:-1]) is Answer.NEED_MORE


def test_the_longest_request() -> None:
    data = request(b"x" * (BOUND - 13) + b"\r\n")
    assert len(data) == BOUND
    assert inspect(data) == {"rdp.token": "x" * (BOUND - 13)}
