"""The `ssh` parser: the identification string of a real client, and what cannot be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerd.model import Answer
from steerd.wire.ssh import BOUND, inspect

OPENSSH = (Path(__file__).parent.parent / "vectors" / "ssh-openssh-9.2p1-client.bin").read_bytes()


def test_openssh() -> None:
    expected = {"ssh.version": "2.0", "ssh.client": "OpenSSH_9.2p1", "ssh.comments": "Debian-2+deb12u6"}
    assert inspect(OPENSSH) == expected
    assert inspect(OPENSSH + b"\x00\x00\x05\xdc\x0a\x14\n") == expected
    assert all(inspect(OPENSSH[:length]) is Answer.NEED_MORE for length in range(len(OPENSSH)))


@pytest.mark.parametrize(
    ("line", "client", "comments"),
    [
        (b"SSH-2.0-Go\r\n", "Go", None),
        (b"SSH-2.0-JSCH-0.1.54\r\n", "JSCH-0.1.54", None),
        (b"SSH-2.0-old\n", "old", None),
        (b"SSH-2.0-a \r\n", "a", ""),
        (b"SSH-2.0-a b  c-d\r\n", "a", "b  c-d"),
        (b"SSH-2.0-\xff \xe9\r\n", "\xff", "\xe9"),
    ],
)
def test_software_and_comments(line: bytes, client: str, comments: str | None) -> None:
    found = inspect(line)
    assert isinstance(found, dict)
    assert (found["ssh.client"], found.get("ssh.comments")) == (client, comments)


def test_another_protocol_version_is_a_key_too() -> None:
    found = inspect(b"SSH-1.99-x\r\n")
    assert isinstance(found, dict)
    assert found["ssh.version"] == "1.99"


@pytest.mark.parametrize(
    "data",
    [
        b"GET",
        b"\n",
        b"SSh",
        b"SSH-2.0-a\x00",
        b"SSH-2.0-a\t",
        b"SSH-2.0-a\rb",
        b"SSH-2.0-a\r\r",
        b"SSH-\n",
        b"SSH-2.0\r\n",
        b"SSH-2.0-\r\n",
        b"SSH-2.0- a\r\n",
        b"SSH-2-a\r\n",
        b"SSH-two.0-a\r\n",
        b"SSH-2.0-a\r\r\n",
    ],
    ids=repr,
)
def test_not_mine(data: bytes) -> None:
    assert inspect(data) is Answer.NOT_MINE
    assert inspect(data + OPENSSH) is Answer.NOT_MINE


def test_bound() -> None:
    longest = b"SSH-2.0-" + b"x" * (BOUND - 10) + b"\r\n"
    assert len(longest) == BOUND
    assert isinstance(inspect(longest), dict)
    assert inspect(longest[:-1]) is Answer.NEED_MORE
    too_long = b"x".join([longest[:-2], b"\r\n"])
    assert inspect(too_long[: BOUND - 1]) is Answer.NEED_MORE
    assert inspect(too_long[:BOUND]) is Answer.NOT_MINE
    assert inspect(too_long) is Answer.NOT_MINE
