"""Clients of datagrams: many short flows, and some that stand, all of them checked against the daemon's name.

    python -m tests.netns.datagram_load VERSION FLOWS PAUSE ESTABLISHED

FLOWS flows are opened one after the other, PAUSE seconds apart, from the client's addresses in turn: a prefix, a QUIC
hello of two Initials, a DNS query, each for the daemons a and b in turn (aliases 1 and 2 of tests/netns/gateway.py's
pools). Who hears nothing says it again after a second, a resolver from another port (RFC 5452 section 9.2). Meanwhile
ESTABLISHED flows say something every 20 ms at most.

It prints "ready" when these stand, waits for a line, and prints one JSON object at the end; see `Result`.
"""

from __future__ import annotations

import itertools
import json
import selectors
import socket
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field

from tests.initials import client_hello, flight
from tests.netns.datagram_flood import HELLO_SIZE, PORTS, query
from tests.netns.gateway import CLIENT6, ENDPOINT4, ENDPOINT6

TRIES = 6
AGAIN_SECONDS = 1.0
EVERY_SECONDS = 0.02
LINGER_SECONDS = 1.0
ALIAS = {4: "10.64.0.{}", 6: "fd00:64::{}"}
KINDS = ("junk", "half", "query")


@dataclass
class Result:
    """What became of the flows."""

    good: int = 0
    wrong: int = 0
    failed: int = 0
    tries: dict[str, list[int]] = field(default_factory=lambda: {kind: [0] * TRIES for kind in KINDS})
    """How many were answered at the first try, at the second, ..."""
    median_ms: float = 0
    sent: int = 0
    """Datagrams of each established flow."""
    returned: list[int] = field(default_factory=list)
    """How many answers each of them had."""


@dataclass
class _Flow:
    kind: str
    source: str
    expected: bytes
    says: list[bytes]
    socket: socket.socket
    started: float
    tries: int = 0
    again: float = 0


class Load:
    """All flows of one run."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.result = Result()
        self.ports = itertools.count(20000)
        self.selector = selectors.DefaultSelector()
        self.open: dict[socket.socket, _Flow] = {}
        self.took: list[float] = []
        self.standing: list[socket.socket] = []
        self.sources = [f"198.51.100.{n}" for n in range(2, 10)] if version == 4 else [CLIENT6]

    def socket(self, kind: str, source: str) -> socket.socket:
        made = socket.socket(socket.AF_INET if self.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        # No port twice: what comes from there within half a minute belongs to the old flow.
        made.bind((source, next(self.ports)))
        made.connect((ENDPOINT4 if self.version == 4 else ENDPOINT6, PORTS[kind]))
        return made

    def establish(self, count: int) -> None:
        """Flows that were decided before the rest begins."""
        for number in range(count):
            standing = self.socket("junk", self.sources[number % len(self.sources)])
            standing.settimeout(15)
            standing.send(b"a")
            standing.recv(2048)
            standing.setblocking(False)
            self.standing.append(standing)
            self.result.returned.append(0)
            self.selector.register(standing, selectors.EVENT_READ, number)

    def start(self, number: int) -> None:
        """Flow `number`."""
        kind = KINDS[number % len(KINDS)]
        letter, alias = (("a", 1), ("b", 2))[number // len(KINDS) % 2]
        name = f"www{number}.{letter}.example"
        says = {
            "junk": lambda: [letter.encode()],
            "half": lambda: flight(
                client_hello(name.encode(), b"h3", size=HELLO_SIZE), dcid=b"flow" + number.to_bytes(4)
            ),
            "query": lambda: [query(name)],
        }[kind]()
        source = self.sources[number % len(self.sources)]
        expected = ALIAS[self.version].format(alias).encode()
        self.send(_Flow(kind, source, expected, says, self.socket(kind, source), time.monotonic()))

    def send(self, flow: _Flow) -> None:
        if flow.socket not in self.open:
            self.open[flow.socket] = flow
            self.selector.register(flow.socket, selectors.EVENT_READ, flow)
        flow.tries += 1
        flow.again = time.monotonic() + AGAIN_SECONDS
        for datagram in flow.says:
            flow.socket.send(datagram)

    def forget(self, flow: _Flow) -> None:
        del self.open[flow.socket]
        self.selector.unregister(flow.socket)
        flow.socket.close()

    def read(self, seconds: float) -> None:
        """Take in what comes within so many seconds."""
        for key, _ in self.selector.select(max(0.0, seconds)):
            assert isinstance(key.fileobj, socket.socket)
            name = key.fileobj.recv(2048).split(b" ", 1)[0]
            if isinstance(key.data, int):
                self.result.returned[key.data] += 1
                continue
            flow: _Flow = key.data
            if name == flow.expected:
                self.result.good += 1
                self.result.tries[flow.kind][flow.tries - 1] += 1
                self.took.append(time.monotonic() - flow.started)
            else:
                self.result.wrong += 1
            self.forget(flow)

    def repeat(self, now: float) -> None:
        """Say again what was not answered."""
        for flow in [flow for flow in self.open.values() if flow.again <= now]:
            if flow.tries == TRIES:
                self.result.failed += 1
                self.forget(flow)
                continue
            if flow.kind == "query":
                self.forget(flow)
                flow.socket = self.socket(flow.kind, flow.source)
            self.send(flow)

    def run(self, flows: int, pause: float) -> Result:
        """Everything, until the last flow is answered or has failed, and the established ones had their time."""
        begun = time.monotonic()
        started, spoken = 0, begun
        while started < flows or self.open:
            now = time.monotonic()
            if started < flows and begun + started * pause <= now:
                self.start(started)
                started += 1
            if spoken <= now:
                # Not `+=`: who was kept waiting must not catch up in one burst, which no buffer would hold.
                spoken = now + EVERY_SECONDS
                for standing in self.standing:
                    standing.send(b"b" * 200)
                self.result.sent += 1
            self.repeat(now)
            self.read(min(spoken, begun + started * pause if started < flows else spoken) - time.monotonic())
        end = time.monotonic() + LINGER_SECONDS
        while min(self.result.returned, default=0) < self.result.sent and time.monotonic() < end:
            self.read(0.1)
        self.result.median_ms = round(statistics.median(self.took) * 1000, 1) if self.took else 0
        return self.result


def main() -> None:
    load = Load(int(sys.argv[1]))
    load.establish(int(sys.argv[4]))
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(asdict(load.run(int(sys.argv[2]), float(sys.argv[3])))), flush=True)


if __name__ == "__main__":
    main()
