"""The hand-made handshake of steerd.client, where no kernel is needed: when its SYN is sent."""

from __future__ import annotations

import socket
from typing import cast

import pytest

from steerd import client


class Unanswered:
    """A raw socket on which nothing ever comes, and the time that passes meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sent: list[float] = []
        self._timeout = 0.0

    def send(self, _segment: bytes) -> None:
        self.sent.append(self.now)

    def settimeout(self, seconds: float) -> None:
        self._timeout = seconds

    def recv(self, _size: int) -> bytes:
        self.now += self._timeout
        raise TimeoutError


@pytest.mark.parametrize(
    ("timeout", "sent"), [(0.5, [0]), (client.GIVE_UP_AFTER, [0, 1, 3, 7]), (120, [0, 1, 3, 7, 15, 31, 63])]
)
def test_the_syn_is_sent_again_as_long_as_somebody_waits(
    monkeypatch: pytest.MonkeyPatch, timeout: float, sent: list[float]
) -> None:
    raw = Unanswered()
    monkeypatch.setattr("time.monotonic", lambda: raw.now)
    local, remote = ("198.51.100.1", 40000), ("203.0.113.10", 80)
    handshake = client._Handshake(socket.AF_INET, local, remote, 1500, cast(socket.socket, raw))
    with pytest.raises(TimeoutError, match=r"203\.0\.113\.10 port 80 did not answer the SYN"):
        handshake.run(b"", timeout)
    assert raw.sent == sent
    assert raw.now == timeout
