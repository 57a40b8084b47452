"""The `postgres` parser: what psql sends first, with and without a wish for TLS, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerd.model import Answer, Keys
from steerd.wire.postgres import BOUND, inspect

VECTORS = Path(__file__).parent.parent / "vectors"


def vector(name: str) -> Keys | Answer:
    return inspect((VECTORS / f"postgres-psql-15.18-{name}.bin").read_bytes())


def message(code: int, body: bytes) -> bytes:
    return (8 + len(body)).to_bytes(4, "big") + code.to_bytes(4, "big") + body


def startup(body: bytes, version: int = 3 << 16) -> bytes:
    return message(version, body)


def test_psql_without_tls() -> None:
    assert vector("disable") == {
        "postgres.user": "carol",
        "postgres.database": "shop",
        "postgres.application": "till",
    }


def test_the_database_is_the_users_unless_named() -> None:
    found = vector("no-database")
    assert isinstance(found, dict)
    assert (found["postgres.user"], found["postgres.database"]) == ("carol", "carol")
    alone = {"postgres.user": "u", "postgres.database": "u"}
    assert inspect(startup(b"user\0u\0\0")) == inspect(startup(b"database\0\0user\0u\0\0")) == alone


def test_psql_that_prefers_tls_asks_for_it_first() -> None:
    assert vector("prefer") == {"postgres.request": "ssl"}


@pytest.mark.parametrize(
    ("data", "request_name"),
    [
        (message(0x04D2162F, b""), "ssl"),
        (message(0x04D21630, b""), "gss"),
        (message(0x04D2162E, bytes(8)), "cancel"),
        (message(0x04D2162E, bytes(260)), "cancel"),
    ],
)
def test_requests(data: bytes, request_name: str) -> None:
    assert inspect(data[:8]) == inspect(data) == {"postgres.request": request_name}
    assert all(inspect(data[:length]) is Answer.NEED_MORE for length in range(8))


def test_minor_versions_parameters_nobody_knows_and_bytes_that_are_not_text() -> None:
    body = b"_pq_.x\0\0user\0\xc3\xa9\0database\0D\0options\0-c a=b\0\0"
    found = inspect(startup(body, (3 << 16) + 2))
    assert found == {"postgres.user": "\xc3\xa9", "postgres.database": "D"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"\0\0",
        b"user\0u",
        b"user\0u\0",
        b"user\0u\0x\0",
        b"user\0u\0x\0\0",
        b"user\0u\0\0x\0\0",
        b"user\0\0\0",
        b"database\0d\0\0",
        b"user\0a\0user\0b\0\0",
        b"user\0a\0database\0b\0database\0c\0\0",
    ],
    ids=repr,
)
def test_parameters_that_are_refused(body: bytes) -> None:
    data = startup(body)
    assert inspect(data) is Answer.NOT_MINE
    assert inspect(data[:-1]) is Answer.NEED_MORE


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x16",
        b"G",
        b"\x00\x01",
        b"\x00\x00\x00\x07",
        (BOUND + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x10\x00\x02",
        b"\x00\x00\x00\x08\x04\xd2\x16\x31",
        b"\x00\x00\x00\x09\x04\xd2\x16\x2f",
        b"\x00\x00\x00\x0c\x04\xd2\x16\x2e",
        b"\x00\x00\x01\x11\x04\xd2\x16\x2e",
    ],
    ids=repr,
)
def test_not_mine_as_soon_as_it_cannot_be_a_message(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE
    assert inspect(beginning[:-1]) is Answer.NEED_MORE


def test_the_longest_message() -> None:
    body = b"user\0u\0x\0" + b"x" * (BOUND - 8 - 11) + b"\0\0"
    data = startup(body)
    assert len(data) == BOUND
    assert inspect(data) == {"postgres.user": "u", "postgres.database": "u"}
    assert inspect(data[:-1]) is Answer.NEED_MORE
