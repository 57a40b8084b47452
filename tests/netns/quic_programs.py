"""What tests of datagram steering with real programs share: HTTP/3 servers, endpoints, and counts."""

from __future__ import annotations

import subprocess
import sys

from steerd.model import Reason
from steerd.telemetry.counters import Counters, Extra
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, ROOT, Gateway
from tests.netns.programs import socket_name

VECTORS = ROOT / "tests" / "vectors" / "udp"
CHROMIUM = [(VECTORS / f"quic-chromium-156.0.8078.79-first-{n}.bin").read_bytes() for n in (1, 2)]
"""What Chromium sent for the name shop.example; both are needed."""


def endpoints(port: int, *protocols: str) -> str:
    """`endpoints` of a service, both families."""
    return "[" + ", ".join(f'"{ENDPOINT4}:{port}/{p}", "[{ENDPOINT6}]:{port}/{p}"' for p in protocols) + "]"


def quic_server(lab: Gateway, name: str, number: int, port: int, *more: str) -> subprocess.Popen[str]:
    """An HTTP/3 server, with NAME.pem; not ready yet."""
    return lab.spawn(
        lab.host, sys.executable, "-m", "tests.netns.quic_server", name, f"{lab.directory}/{name}.pem",
        socket_name(4, number, port), socket_name(6, number, port), *more,
    )  # fmt: skip


def await_ready(server: subprocess.Popen[str]) -> None:
    """Wait until an HTTP/3 server listens."""
    assert server.stdout is not None
    assert server.stdout.readline() == "listening\n"


class Counts:
    """How far counters of the table and of the workers rose since this was made, or since `look` was called."""

    def __init__(self, lab: Gateway) -> None:
        self._lab = lab
        self._workers = Counters.open(lab.directory / "run" / "counters")
        self._before: dict[str | Reason | Extra, int] = {}
        self.look()

    def look(self) -> dict[str | Reason | Extra, int]:
        """Those that rose, and how far."""
        now: dict[str | Reason | Extra, int] = {word: self._workers.total(word) for word in (*Reason, *Extra)}
        for name, count in self._lab.counters().items():
            now[name] = count
        risen = {word: count - self._before.get(word, 0) for word, count in now.items()}
        self._before = now
        return {word: count for word, count in risen.items() if count}
