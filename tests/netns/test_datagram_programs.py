"""Datagram steering with real programs: HTTP/3 by server name, DNS by suffix, and what browsers and others really sent
(tests/vectors/udp), with and without offloads. Clients that move: test_quic_migration.py.

Topology: tests/netns/gateway.py; the servers: tests/netns/programs.py, quic_server.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from aioquic.quic.configuration import QuicConfiguration

from steerd.model import Reason
from steerd.telemetry.counters import Extra
from tests.netns.conftest import hosts
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, SLOWER, Gateway, gateway
from tests.netns.programs import POOL, alias, answer, certificate, nginx, target
from tests.netns.quic_client import Flight, connect
from tests.netns.quic_programs import CHROMIUM, Counts, await_ready, endpoints, quic_server
from tests.netns.quic_server import content

CLIENT = {4: CLIENT4, 6: CLIENT6}
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
NAMES = {"a.example": 1, "b.example": 2}
UDP_RESPONDER = 9000
OS_RELEASE = Path("/etc/os-release").read_text().splitlines()
SHORT = [b"\x40" + b"%d" % n * 40 for n in range(3)]
"""Datagrams with a short header, as they come behind a hello."""


CONFIG = (
    POOL
    + f"""
[services.web]
endpoints = {endpoints(443, "udp")}
inspect = ["quic"]
routes = [
    {{ when.quic.sni = "a.example", target = {target(1, 8443)} }},
    {{ when.quic.sni = "b.example", target = {target(2, 8443)} }},
]
[services.default]
endpoints = {endpoints(444, "udp")}
inspect = ["quic"]
default = {target(2, 8443)}
routes = [{{ when.quic.sni = "a.example", target = {target(1, 8443)} }}]
[services.retry]
endpoints = {endpoints(445, "udp")}
inspect = ["quic"]
routes = [
    {{ when.quic.sni = "a.example", target = {target(1, 8445)} }},
    {{ when.quic.sni = "b.example", target = {target(2, 8445)} }},
]
[services.both]
endpoints = {endpoints(446, "tcp", "udp")}
inspect = ["tls", "quic"]
routes = [
    {{ when.tls.sni = "a.example", target = {target(1, 8446)} }},
    {{ when.quic.sni = "a.example", target = {target(1, 8443)} }},
    {{ when.tls.sni = "b.example", target = {target(2, 8446)} }},
    {{ when.quic.sni = "b.example", target = {target(2, 8443)} }},
]
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


FIREWALL = """
table inet firewall {
    chain input { type filter hook input priority 0; ct state established accept; }
}
"""
"""Without any rule that asks conntrack, it would rest while our table is gone."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Gateway]:
    """One gateway for all: nothing here is left behind for the next test but counts."""
    with hosts() as new_host, gateway(new_host) as made:
        made.allow_unasked = True  # While the table is gone, answers come from aliases.
        certificate(made, "a.example", "b.example")
        made.configure(CONFIG)
        made.start()
        servers = [
            quic_server(made, name, number, port, *more)
            for name, number in NAMES.items()
            for port, more in ((8443, ()), (8445, ("--retry",)))
        ]
        for name, number in NAMES.items():
            nginx(made, name, number, 8446, how="ssl")
        for server in servers:
            await_ready(server)
        yield made


@pytest.fixture(scope="module", autouse=True)
def responder(lab: Gateway) -> subprocess.Popen[str]:
    """The daemons of all that is not QUIC."""
    runs = [(alias(version, number), 1, UDP_RESPONDER) for version in (4, 6) for number in (1, 2, 4)]
    return lab.respond(*runs, program="udp_responder")


# ---- HTTP/3 ----


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flight", [Flight.IN_ORDER, Flight.REVERSED])
@pytest.mark.parametrize(("padding", "datagrams"), [(0, 1), (15, 2), (45, 5)])
def test_http3_by_server_name(lab: Gateway, version: int, padding: int, datagrams: int, flight: Flight) -> None:
    """The first datagram of a hello (a few hundred bytes, 2 KB, 5 KB) has the name. If it comes first, one upcall does,
    and others for those that came before its verdict; if it comes last, all of them are held. None afterwards."""

    async def both() -> None:
        for name, number in NAMES.items():
            counts = Counts(lab)
            async with connect(lab, version, name, padding=padding, flight=flight) as client:
                for _ in range(3):
                    said = (await client.get()).decode()
                    assert said == f"{name} {alias(version, number)} 8443 {client.address}"
            risen = counts.look()
            assert risen[Reason.ROUTE] == 1
            held = datagrams - 1 if flight is Flight.REVERSED else 0
            assert risen.get(Extra.HELD_DATAGRAMS, 0) == held
            assert 1 + held <= risen["diverted"] <= datagrams
            assert risen["diverted"] == 1 + held + risen.get(Extra.FORWARDED, 0)

    asyncio.run(both())


@pytest.mark.skipif("ID=ubuntu" in OS_RELEASE, reason="Ubuntu has Chromium as a snap only: not in a namespace")
@pytest.mark.parametrize("version", [4, 6])
def test_chromium_by_server_name(lab: Gateway, version: int) -> None:
    """Post-quantum: its hellos take two datagrams, of shuffled frames, the name in either."""
    host = ENDPOINT[version] if version == 4 else f"[{ENDPOINT[version]}]"
    digest = "openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64"
    for name, number in NAMES.items():
        key = lab.client.sh(f"openssl x509 -in {lab.directory}/{name}.pem -pubkey -noout | {digest}").strip()
        counts = Counts(lab)
        page = lab.client.sh(
            f"HOME={lab.directory} timeout {60 * SLOWER} chromium --headless --no-sandbox --disable-gpu --dump-dom"
            f" --user-data-dir={lab.directory}/chromium --origin-to-force-quic-on={name}:443"
            f" --host-resolver-rules='MAP {name} {host}' --ignore-certificate-errors-spki-list={key}"
            f" https://{name}/ 2>/dev/null"
        )
        assert f">{name} {alias(version, number)} 8443 {CLIENT[version]} " in page
        risen = counts.look()
        # It may try more than one connection, and goes back to none.
        assert risen[Reason.ROUTE] >= 1 and risen[Extra.HELD_DATAGRAMS] == risen[Reason.ROUTE]


@pytest.mark.parametrize("version", [4, 6])
def test_nothing_of_a_transfer_is_seen_by_a_worker(lab: Gateway, version: int) -> None:
    size = 5_000_000
    body = random.Random(version).randbytes(size)

    async def transfers() -> None:
        counts = Counts(lab)
        async with connect(lab, version, "b.example") as client:
            assert await client.get(f"/bytes/{size}", 60) == content(size)
            assert await client.post("/digest", body, 60) == hashlib.sha256(body).hexdigest().encode()
        assert counts.look()["diverted"] == 1

    asyncio.run(transfers())


@pytest.mark.parametrize("version", [4, 6])
def test_tls_and_quic_in_one_service(lab: Gateway, version: int) -> None:
    host = ENDPOINT[version] if version == 4 else f"[{ENDPOINT[version]}]"

    async def over_quic(name: str, number: int) -> None:
        async with connect(lab, version, name, 446) as client:
            said = (await client.get()).decode()
            assert said == f"{name} {alias(version, number)} 8443 {client.address}"

    for name, number in NAMES.items():
        asyncio.run(over_quic(name, number))
        said = lab.client.sh(
            f"curl -sS -m 20 --cacert {lab.directory}/all.pem --connect-to {name}:446:{host}:446 https://{name}:446/"
        )
        assert said.strip() == answer(name, version, number, 8446)


@pytest.mark.parametrize("version", [4, 6])
def test_an_unknown_version_goes_to_the_default_which_offers_others(lab: Gateway, version: int) -> None:
    """The client's second try is decided by itself, and leads to the daemon that it names."""

    def unknown_first(configuration: QuicConfiguration) -> None:
        configuration.supported_versions = [0x1A2A3A4A, *configuration.supported_versions]
        configuration.original_version = 0x1A2A3A4A
        configuration.verify_mode = ssl.CERT_NONE

    async def negotiate() -> None:
        counts = Counts(lab)
        async with connect(lab, version, "a.example", 444, configure=unknown_first) as client:
            said = (await client.get()).decode()
            assert said == f"a.example {alias(version, 1)} 8443 {client.address}"
        risen = counts.look()
        assert risen[Reason.DEFAULT] == 1 and risen[Reason.ROUTE] >= 1

    asyncio.run(negotiate())


@pytest.mark.parametrize("version", [4, 6])
def test_a_retry_does_not_confuse_it(lab: Gateway, version: int) -> None:
    async def retried() -> None:
        for name, number in NAMES.items():
            for padding, datagrams in ((0, 1), (15, 2)):
                counts = Counts(lab)
                async with connect(lab, version, name, 445, padding=padding) as client:
                    said = (await client.get()).decode()
                    assert said == f"{name} {alias(version, number)} 8445 {client.address}"
                assert counts.look()["diverted"] == datagrams

    asyncio.run(retried())


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flight", Flight)
def test_early_data_goes_with_its_hello(lab: Gateway, version: int, flight: Flight) -> None:
    """0-RTT, in front of the Initial or behind it, more of it than one datagram holds."""
    body = random.Random(version).randbytes(6000)

    async def twice() -> None:
        async with connect(lab, version, "b.example") as client:
            await client.get()
            await asyncio.wait_for(client.given_ticket.wait(), 10 * SLOWER)
        async with connect(lab, version, "b.example", flight=flight, ticket=client.tickets[0], wait=False) as resumed:
            counts = Counts(lab)
            assert await resumed.post("/digest", body) == hashlib.sha256(body).hexdigest().encode()
            assert resumed.quic.tls.early_data_accepted
            risen = counts.look()
            assert risen[Reason.ROUTE] == 1
            assert risen["diverted"] <= len(body) // 1000
            assert Reason.TOO_SLOW not in risen

    asyncio.run(twice())


@pytest.mark.parametrize("version", [4, 6])
def test_the_middle_of_an_unknown_connection_goes_nowhere(lab: Gateway, version: int) -> None:
    """Not to the default either, which would not know it."""
    counts = Counts(lab)
    with udp(lab, version, 444) as client:
        client.send(SHORT[0])
        client.settimeout(0.3 * SLOWER)
        with pytest.raises(TimeoutError):
            client.recv(65536)
    assert counts.look() == {"diverted": 1, Reason.UNKNOWN_CONNECTION: 1}


@pytest.mark.parametrize("version", [4, 6])
def test_an_answer_while_there_was_no_table_does_not_cost_the_client_its_port(
    lab: Gateway, responder: subprocess.Popen[str], version: int
) -> None:
    """Conntrack takes it for the beginning of a flow. The client's next datagram would be the answer's answer, and to
    tell them apart, the kernel would give it another port."""
    lab.host.sh(f"nft -f - <<'RULES'\n{FIREWALL}\nRULES")
    with udp(lab, version, 447) as client:
        me = client.getsockname()
        client.send(b"RTP")
        assert echoes(client, 1) == ({alias(version, 1)}, [b"RTP"])
        client.send(b"held")
        assert responder.stdout is not None and responder.stdout.readline() == "held\n"
        lab.kill()
        lab.host.sh("nft delete table inet steerd; conntrack -F 2>&1")
        family = "ipv4" if version == 4 else "ipv6"
        answers = f"conntrack -L -f {family} -p udp --src {alias(version, 1)} --sport {UDP_RESPONDER} 2>/dev/null"
        responder.send_signal(signal.SIGUSR1)
        lab.wait(lambda: f"dport={me[1]} " in lab.host.sh(answers), "the answer")
        lab.start()
        client.send(b"RTP again")
        address, _, host, port, _ = client.recv(65536).decode().split(" ", 4)
        assert (address, host, int(port)) == (alias(version, 1), me[0], me[1])
    lab.host.sh("nft delete table inet firewall")


# ---- what the kernel handles as one packet ----


def udp(lab: Gateway, version: int, port: int) -> socket.socket:
    """A connected socket of the client's."""
    with lab.client.entered():
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    made.settimeout(15 * SLOWER)
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
