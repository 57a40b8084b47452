"""Datagram steering with real programs: HTTP/3 by server name, DNS by suffix, and what browsers and others really sent
(tests/vectors/udp), with and without offloads. Clients that move: test_quic_migration.py.

Topology: tests/netns/gateway.py; the servers: tests/netns/programs.py, quic_server.py.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from steerd.model import Reason
from steerd.telemetry.counters import Counters, Extra
from tests.netns.conftest import hosts
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, SLOWER, Gateway, gateway
from tests.netns.programs import POOL, alias, target

CLIENT = {4: CLIENT4, 6: CLIENT6}
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
VECTORS = ROOT / "tests" / "vectors" / "udp"
CHROMIUM = [(VECTORS / f"quic-chromium-156.0.8078.79-first-{n}.bin").read_bytes() for n in (1, 2)]
UDP_RESPONDER = 9000
SHORT = [b"\x40" + b"%d" % n * 40 for n in range(3)]
"""Datagrams with a short header, as they come behind a hello."""


def endpoints(port: int, *protocols: str) -> str:
    """`endpoints` of a service, both families."""
    return "[" + ", ".join(f'"{ENDPOINT4}:{port}/{p}", "[{ENDPOINT6}]:{port}/{p}"' for p in protocols) + "]"


CONFIG = (
    POOL
    + f"""
[services.captured]
endpoints = {endpoints(447, "udp")}
inspect = ["quic", "dtls", "stun", "wireguard", "openvpn", "sip", "prefix"]
default = {target(4, UDP_RESPONDER)}
routes = [
    {{ when.quic.sni = "shop.example", target = {target(1, UDP_RESPONDER)} }},
    {{ when.prefix = "RTP", target = {target(1, UDP_RESPONDER)} }},
]
"""
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Gateway]:
    """One gateway for all: nothing here is left behind for the next test but counts."""
    with hosts() as new_host, gateway(new_host) as made:
        made.configure(CONFIG)
        made.start()
        runs = [(alias(version, number), 1, UDP_RESPONDER) for version in (4, 6) for number in (1, 2, 4)]
        made.respond(*runs, program="udp_responder")
        yield made


class Counts:
    """How far counters of the table and of the workers rose since this was made, or `look` was called."""

    def __init__(self, lab: Gateway) -> None:
        self._lab = lab
        self._workers = Counters.open(lab.directory / "run" / "counters")
        self._before: dict[str | Reason | Extra, int] = {}
        self.look()

    def look(self) -> dict[str | Reason | Extra, int]:
        now: dict[str | Reason | Extra, int] = {**self._lab.counters()}
        now |= {word: self._workers.total(word) for word in (*Reason, *Extra)}
        risen = {word: count - self._before.get(word, 0) for word, count in now.items()}
        self._before = now
        return {word: count for word, count in risen.items() if count}


# ---- what the kernel handles as one packet ----


def udp(lab: Gateway, version: int, port: int) -> socket.socket:
    """A connected socket of the client's."""
    with lab.client.entered():
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    made.settimeout(5 * SLOWER)
    made.bind((CLIENT[version], 0))
    made.connect((ENDPOINT[version], port))
    return made


def send_together(client: socket.socket, datagrams: Sequence[bytes]) -> None:
    """As one packet, which is cut into datagrams as late as can be (UDP_SEGMENT, man 7 udp): all of one length but the
    last, which may be shorter."""
    client.sendmsg(datagrams, [(17, 103, struct.pack("=H", len(datagrams[0])))])


def echoes(client: socket.socket, count: int) -> tuple[set[str], list[bytes]]:
    """The addresses of the daemons that answered so many times, and what came back, in this order."""
    found = [client.recv(65536).split(b" ", 4) for _ in range(count)]
    return {each[0].decode() for each in found}, [each[4] for each in found]


OFFLOADS = {
    "whole": ("tx-udp-segmentation on", "gro off rx-udp-gro-forwarding off", True),
    "merged": ("tx-udp-segmentation off", "gro on rx-udp-gro-forwarding on", True),
    "none": ("tx-udp-segmentation off", "gro off rx-udp-gro-forwarding off", False),
}
"""What the client's end of the wire does, what the gateway's does, and whether the gateway's kernel then sees one
packet: the client's own, one that it put together itself, or none."""


@contextmanager
def offloads(lab: Gateway, name: str) -> Iterator[bool]:
    client, gateway, together = OFFLOADS[name]
    lab.client.sh(f"ethtool -K eth0 {client}")
    lab.host.sh(f"ethtool -K eth0 {gateway}")
    try:
        yield together
    finally:
        lab.client.sh("ethtool -K eth0 tx-udp-segmentation on")
        lab.host.sh("ethtool -K eth0 gro off rx-udp-gro-forwarding off")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize(
    "datagrams",
    [
        [b"RTP%d" % number for number in range(10)],
        CHROMIUM,
        CHROMIUM[::-1],
        [*CHROMIUM, SHORT[0].ljust(1250, b".")],
        [*CHROMIUM[::-1], *(each.ljust(1250, b".") for each in SHORT[:2]), SHORT[2]],
    ],
    ids=["one-decides", "two-decide", "swapped", "one-behind", "three-behind"],
)
def test_datagrams_in_one_packet_all_arrive_in_order(
    lab: Gateway, version: int, name: str, datagrams: list[bytes]
) -> None:
    """Whatever the kernel does with them: each arrives once, with its own boundaries, at the daemon that was decided,
    also those that say nothing by themselves, and would go to the default."""
    counts = Counts(lab)
    with offloads(lab, name) as together, udp(lab, version, 447) as client:
        send_together(client, datagrams)
        assert echoes(client, len(datagrams)) == ({alias(version, 1)}, datagrams)
        risen = counts.look()
        assert risen["diverted"] <= (1 if together else len(datagrams))
        assert risen[Reason.ROUTE] == 1 and Reason.DEFAULT not in risen
        client.send(b"more")
        assert echoes(client, 1) == ({alias(version, 1)}, [b"more"])
    assert counts.look() == {}
