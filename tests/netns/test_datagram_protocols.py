"""Datagram steering of other protocols than HTTP/3: DNS, WireGuard and DTLS with real programs, one-way streams, and
what real programs of all protocols sent (tests/vectors/udp), each to one of two daemons.

Topology: tests/netns/gateway.py; the servers: tests/netns/programs.py.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerd.model import Reason
from steerd.telemetry.counters import Extra
from tests.netns.conftest import hosts
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, SLOWER, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.parser_programs import dnsmasq, seen
from tests.netns.programs import POOL, alias, await_listening, certificate, target
from tests.netns.quic_programs import VECTORS, Counts, endpoints

CLIENT = {4: CLIENT4, 6: CLIENT6}
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
RESPONDER, SINK, DTLS, WIREGUARD = 9000, 5004, 4433, 51821
FORWARDER, QUERY_PORT = 5353, 10053
PUBLIC_KEY = "aGfFP/CshhRguvtn5UD4kh1DeIYBSOVotdR5YzEMADQ="
"""Of the peer that the captured handshakes of WireGuard are for."""

CAPTURED = {
    "quic-chromium-156.0.8078.79-first": ("quic.sni", "shop.example", 1),
    "quic-chromium-156.0.8078.79-repeat": ("quic.sni", "shop.example", 1),
    "quic-firefox-153.7.0esr-first": ("quic.sni", "shop.example", 1),
    "quic-gtlsclient-0.12.1-get": ("quic.sni", "localhost", 2),
    "quic-kdig-3.2.6-aaaa": ("quic.alpn", "doq", 2),
    "quic-rfc9369-a2": ("quic.version", "2", 1),
    "dtls-gnutls-3.7.9-fragments": ("dtls.sni", "shop.example", 1),
    "dtls-openssl-3.0.19-fragments": ("dtls.sni", "long.example", 2),
    "dtls-openssl-3.0.19-cookie": ("dtls.sni", "shop.example", 1),
    "dtls-openssl-3.0.19-old": ("dtls.sni", "old.example", 2),
    "dtls-openssl-3.0.19-no-sni": ("", "", 4),
    "stun-chromium-156.0.8078.79-ice": ("stun.ufrag", "d17x", 1),
    "stun-aioice-0.13.0-ice": ("stun.ufrag", "qFlO", 2),
    "stun-coturn-4.6.1-allocate-again": ("stun.username", "alice", 2),
    "stun-coturn-4.6.1-binding": ("", "", 4),
    "wireguard-wireguard-go-0.0.20220316-first": ("wireguard.public-key", PUBLIC_KEY, 1),
    "openvpn-openvpn-2.6.14-tls-auth-sha256": ("openvpn.wrap", "tls-auth", 1),
    "openvpn-openvpn-2.6.14-tls-crypt-v2": ("openvpn.wrap", "tls-crypt-v2", 2),
    "openvpn-openvpn-2.6.14-none": ("", "", 4),
    "sip-sipsak-0.9.8.1-options": ("sip.method", "OPTIONS", 1),
    "sip-sipsak-0.9.8.1-register": ("sip.method", "REGISTER", 2),
}
"""What was captured, the key and value that decide for it, and the daemon; without a key, the default."""


def captured(name: str) -> list[bytes]:
    """The datagrams of one flow."""
    return [path.read_bytes() for path in sorted(VECTORS.glob(f"{name}.bin")) or sorted(VECTORS.glob(f"{name}-?.bin"))]


def routes(wanted: dict[tuple[str, str], str]) -> str:
    return "\n".join(f'    {{ when."{key}" = "{value}", target = {where} }},' for (key, value), where in wanted.items())


BY_VALUE = {(key, value): target(number, RESPONDER) for key, value, number in CAPTURED.values() if key}
BY_VALUE["prefix", "one-way"] = target(3, SINK)


# QUIC comes behind those that it could be taken for: SIP's first bytes, and some of OpenVPN's, are a short header's.
def config(keys: dict[int, str]) -> str:
    """`keys`: public keys of the two WireGuard peers."""
    peers = "\n".join(
        f'    {{ when.wireguard.public-key = "{key}", target = ['
        f'{{ address = "{alias(4, n)}:{WIREGUARD + n}", wildcard = true }},'
        f' {{ address = "[{alias(6, n)}]:{WIREGUARD + n}", wildcard = true }}] }},'
        for n, key in keys.items()
    )
    names = {("dns.qname", f"*.{letter}.example"): target(n, 53) for n, letter in ((1, "a"), (2, "b"))}
    sni = {("dtls.sni", f"{letter}.example"): target(n, DTLS) for n, letter in ((1, "a"), (2, "b"))}
    return f"""{POOL}
[services.captured]
endpoints = {endpoints(447, "udp")}
inspect = ["dtls", "stun", "wireguard", "openvpn", "sip", "quic", "prefix"]
default = {target(4, RESPONDER)}
routes = [
{routes(BY_VALUE)}
]
[services.names]
endpoints = {endpoints(53, "udp", "tcp")}
inspect = ["dns"]
routes = [
{routes(names)}
]
[services.dtls]
endpoints = {endpoints(DTLS, "udp")}
inspect = ["dtls"]
routes = [
{routes(sni)}
]
[services.tunnels]
endpoints = {endpoints(51820, "udp")}
inspect = ["wireguard"]
routes = [
{peers}
]
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Gateway]:
    """One gateway for all."""
    with hosts() as new_host, gateway(new_host) as made:
        private = {n: made.host.sh("wg genkey").strip() for n in (1, 2)}
        (made.directory / "keys").write_text("".join(f"{n} {key}\n" for n, key in private.items()))
        made.configure(config({n: made.host.sh(f"echo {key} | wg pubkey").strip() for n, key in private.items()}))
        made.start()
        runs = [(alias(version, number), 1, RESPONDER) for version in (4, 6) for number in (1, 2, 4)]
        made.respond(*runs, program="udp_responder")
        yield made


# ---- what was captured ----


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("name", CAPTURED)
def test_what_was_captured_goes_to_its_daemon(lab: Gateway, version: int, name: str) -> None:
    """In every order of its datagrams: all of them arrive, as they were sent."""
    datagrams = captured(name)
    _, _, number = CAPTURED[name]
    for order in itertools.islice(itertools.permutations(datagrams), 6):
        counts = Counts(lab)
        with udp(lab, version, 447) as client:
            me = " ".join(map(str, client.getsockname()[:2]))
            for datagram in order:
                client.send(datagram)
            said = [client.recv(65536) for _ in order]
            assert said == [f"{alias(version, number)} {RESPONDER} {me} ".encode() + datagram for datagram in order]
        risen = counts.look()
        assert risen.get(Reason.ROUTE, 0) + risen.get(Reason.DEFAULT, 0) == 1
        assert risen[Reason.DEFAULT if number == 4 else Reason.ROUTE] == 1


def udp(lab: Gateway, version: int, port: int) -> socket.socket:
    """A connected socket of the client's."""
    with lab.client.entered():
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    made.settimeout(15 * SLOWER)
    made.bind((CLIENT[version], 0))
    made.connect((ENDPOINT[version], port))
    return made


# ---- one-way streams ----


@pytest.mark.parametrize("version", [4, 6])
def test_a_stream_that_nobody_answers_stays_where_it_is(lab: Gateway, version: int) -> None:
    """As RTP is: once decided, no worker sees it, though conntrack never sees an answer; and it is in order."""
    with lab.host.entered():
        sink = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    sink.settimeout(15 * SLOWER)
    counts = Counts(lab)
    with sink, udp(lab, version, 447) as client:
        sink.bind((alias(version, 3), SINK))
        client.send(b"one-way")
        first, source = sink.recvfrom(2048)
        assert (first, source[:2]) == (b"one-way", client.getsockname()[:2])
        for number in range(500):
            client.send(b"%d" % number)
            assert sink.recvfrom(2048) == (b"%d" % number, source)
    risen = counts.look()
    assert risen == {"diverted": 1, Reason.ROUTE: 1} | ({Extra.LOADED: 1} if Extra.LOADED in risen else {})


# ---- DNS ----

LONG = ",".join("x" * 250 for _ in range(6))


@pytest.fixture(scope="module")
def names(lab: Gateway) -> dict[str, Path]:
    """Two DNS servers, each of which knows its own names only, and their logs."""
    return {
        letter: dnsmasq(
            lab, letter, number, 53, *(f"www{n}.{letter}.example" for n in range(5)), f"long.{letter}.example,{LONG}"
        )
        for letter, number in (("a", 1), ("b", 2))
    }


def asked(names: dict[str, Path], letter: str) -> str:
    """Who asked a server last."""
    return seen(names[letter])[-1]


@pytest.mark.parametrize("version", [4, 6])
def test_dig_by_suffix(lab: Gateway, names: dict[str, Path], version: int) -> None:
    for letter in names:
        for number in range(5):
            name = f"www{number}.{letter}.example"
            said = lab.client.sh(f"dig +short +tries=1 +time=60 @{ENDPOINT[version]} {name} TXT")
            assert said.strip() == f'"{letter}"'
            assert asked(names, letter) == CLIENT[version]


@pytest.mark.parametrize("version", [4, 6])
def test_a_truncated_answer_is_asked_for_again_over_tcp(lab: Gateway, names: dict[str, Path], version: int) -> None:
    for letter in names:
        counts = Counts(lab)
        said = lab.client.sh(f"dig +bufsize=512 +tries=1 +time=60 @{ENDPOINT[version]} long.{letter}.example TXT")
        assert "Truncated, retrying in TCP mode" in said
        assert said.count("x" * 250) == 6 and f'"{letter}"' in said
        assert asked(names, letter) == CLIENT[version]
        assert counts.look()[Reason.ROUTE] == 2


@pytest.mark.parametrize("version", [4, 6])
def test_a_forwarder_asks_for_both_from_one_socket(lab: Gateway, names: dict[str, Path], version: int) -> None:
    port = FORWARDER + version
    forwarder = lab.spawn(
        lab.client, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=",
        "--no-resolv", "--no-hosts", "--bind-interfaces", "--listen-address=127.0.0.1", f"--port={port}",
        "--cache-size=0", f"--server={ENDPOINT[version]}", f"--query-port={QUERY_PORT + version}",
    )  # fmt: skip
    await_listening(lab, forwarder, f"127.0.0.1:{port}", host=lab.client)
    for number in range(5):
        for letter in names:
            name = f"www{number}.{letter}.example"
            said = lab.client.sh(f"dig +short +tries=1 +time=60 -p {port} @127.0.0.1 {name} TXT")
            assert said.strip() == f'"{letter}"'
            assert asked(names, letter) == CLIENT[version]
    family = "ipv4" if version == 4 else "ipv6"
    flows = lab.host.sh(f"conntrack -L -f {family} -p udp --sport {QUERY_PORT + version} 2>/dev/null").splitlines()
    assert len(flows) == 2


# ---- DTLS ----


def await_bound(lab: Gateway, socket_name: str) -> None:
    """Wait until a UDP socket on the gateway has this name, as ss writes it."""
    lab.wait(lambda: f" {socket_name} " in lab.host.sh("ss -Huln"), f"{socket_name} is bound")


@pytest.mark.parametrize("version", [4, 6])
def test_dtls_by_server_name(lab: Gateway, version: int) -> None:
    certificate(
        lab, *(f"{letter}.example" for letter in "ab" if not (lab.directory / f"{letter}.example.pem").exists())
    )
    for letter, number in (("a", 1), ("b", 2)):
        name = f"{letter}.example"
        address = alias(version, number) if version == 4 else f"[{alias(version, number)}]"
        server = lab.spawn(
            lab.host, "openssl", "s_server", "-dtls", "-accept", f"{address}:{DTLS}",
            "-cert", f"{lab.directory}/{name}.pem", "-quiet",
        )  # fmt: skip
        await_bound(lab, f"{address}:{DTLS}")
        host = ENDPOINT[version] if version == 4 else f"[{ENDPOINT[version]}]"
        said = lab.client.sh(
            f"sleep 0.5 | timeout 20 openssl s_client -dtls -connect {host}:{DTLS} -servername {name} -brief"
            f" -CAfile {lab.directory}/all.pem -verify_return_error -verify_hostname {name} 2>&1"
        )
        assert "Verification: OK" in said and f"Verified peername: {name}" in said
        server.kill()


# ---- WireGuard ----


def wireguard(lab: Gateway, host: Host, interface: str, *commands: str) -> None:
    """A wireguard-go with its interface; `wg` commands. Its control socket is in a /run of its own."""
    lab.spawn(
        host, "sh", "-ec",
        f"mount -t tmpfs tmpfs /run; wireguard-go -f {interface} >/dev/null 2>&1 & "
        f"until wg show {interface} >/dev/null 2>&1; do sleep 0.05; done; "
        + "".join(f"{command}; " for command in commands) + f"ip link set {interface} up; wait",
    )  # fmt: skip
    lab.wait(lambda: "LOWER_UP" in host.sh(f"ip link show {interface}", check=False), f"{interface} is up")


def test_wireguard_by_public_key(lab: Gateway) -> None:
    """Two peers behind one address and port, over IPv4 and IPv6. A flow stays where its handshake went."""
    directory = lab.directory
    private = dict(line.split() for line in (directory / "keys").read_text().splitlines())
    mine = lab.client.sh("wg genkey").strip()
    for file, key in {"mine": mine, **{f"key{n}": key for n, key in private.items()}}.items():
        (directory / file).write_text(key + "\n")
    public = {n: lab.client.sh(f"wg pubkey < {directory}/key{n}").strip() for n in private}
    my_public = lab.client.sh(f"wg pubkey < {directory}/mine").strip()
    for n in private:
        wireguard(
            lab, lab.host, f"tun{n}",
            f"wg set tun{n} private-key {directory}/key{n} listen-port {WIREGUARD + int(n)}"
            f" peer {my_public} allowed-ips 192.168.{n}.1/32",
            f"ip addr add 192.168.{n}.2/24 dev tun{n}",
        )  # fmt: skip
    for version in (4, 6):
        endpoint = ENDPOINT[version] if version == 4 else f"[{ENDPOINT[version]}]"
        for n in private:
            interface = f"wg{version}{n}"
            counts = Counts(lab)
            wireguard(
                lab, lab.client, interface,
                f"wg set {interface} private-key {directory}/mine"
                f" peer {public[n]} allowed-ips 192.168.{n}.2/32 endpoint {endpoint}:51820",
                f"ip addr add 192.168.{n}.1/24 dev {interface}",
            )  # fmt: skip
            said = lab.client.sh(f"ping -c 20 -i 0.02 -W 5 -I {interface} 192.168.{n}.2")
            assert "20 received" in said
            assert counts.look()[Reason.ROUTE] == 1
            lab.client.sh(f"ip link del {interface}")
