"""Late steering by every other parser: two daemons told apart by its key, who answered, and whom it sees.

Topology: tests/netns/gateway.py; `left` and `right` are the servers 1 and 2 of tests/netns/programs.py, of each kind on
a port of its own, all of them behind one steerd. Clients and servers are real ones out of Debian's packages; where
there are none, the bytes are those that a real client once sent (tests/vectors), and the responder answers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.netns import parser_programs, programs
from tests.netns.conftest import hosts
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.parser_programs import BEHIND, STRANGER, V1, V2, V2_AUTHORITY, V2_STRANGER
from tests.netns.programs import CLIENT, answer
from tests.netns.test_late_programs import ENDPOINT, WITHIN, both_families, service

VECTORS = Path(__file__).parent.parent / "vectors"
LEFT, RIGHT = 1, 2
NAMES = {LEFT: "left", RIGHT: "right"}
DNS, GOPHER, MQTT, RDP, SIP, PROXIED, MINECRAFT = 53, 70, 1883, 3389, 5060, 8080, 25565


def two(name: str, port: int, *conditions: tuple[str, int]) -> str:
    """A service at `port` by the parser `name`; each condition leads to the server LEFT or RIGHT, on the same port."""
    routes = [(f"when = {{ {condition} }}", number, port) for condition, number in conditions]
    return service(name, port, f'"{name}"', routes)


SERVICES = [
    two("dns", DNS, ('"dns.qname" = "*.left.example"', LEFT), ('"dns.qname" = "right.example"', RIGHT)),
    two("regex", GOPHER, (r"regex = '(?i)l[aeiou]ft\r\n'", LEFT), (r"regex = '[0-9]{3}/right\r\n'", RIGHT)),
    two("mqtt", MQTT, ('"mqtt.client" = "left"', LEFT), ('"mqtt.user" = "right"', RIGHT)),
    two("rdp", RDP, ('"rdp.cookie" = "Administrator"', LEFT), ('"rdp.cookie" = "Ms-Right-Admin"', RIGHT)),
    two(
        "sip", SIP, ('"sip.host" = "left.example"', LEFT), ('"sip.host" = "right.example"', RIGHT),
        ('"sip.user" = "left"', LEFT), ('"sip.user" = "right"', RIGHT),
    ),
    two(
        "minecraft", MINECRAFT,
        ('"minecraft.host" = "play.example"', LEFT), ('"minecraft.host" = "*.right.example"', RIGHT),
    ),
]  # fmt: skip


def proxied() -> str:
    """HTTP behind the PROXY protocol: by the source and the authority that a trusted proxy tells, else by the host."""
    routes = [
        ('when = { "http.host" = "a.example" }', LEFT, PROXIED),
        *(
            (f'when = {{ "http.host" = "a.example" }}\nsource = "{source}/{bits}"', RIGHT, PROXIED)
            for source, bits in ((BEHIND[4], 32), (BEHIND[6], 128))
        ),
        ('when = { "proxy.authority" = "left" }', LEFT, PROXIED),
        ('when = { "proxy.authority" = "right" }', RIGHT, PROXIED),
    ]
    trusted = f'trusted_proxies = ["{CLIENT4}/32", "{CLIENT6}/128"]'
    return service("proxied", PROXIED, '"proxy", "http"', routes).replace("inspect", f"{trusted}\ninspect", 1)


class Lab(NamedTuple):
    """The gateway, and the logs of servers that cannot say whom they see."""

    gateway: Gateway
    mosquitto: dict[int, Path]
    dnsmasq: dict[int, Path]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with hosts() as new_host, gateway(new_host) as made:
        made.client.sh(f"ip -6 addr add {BEHIND[6]}/64 dev eth0 nodad preferred_lft 0")
        made.client.sh(f"ip -6 addr add {STRANGER[6]}/64 dev eth0 nodad preferred_lft 0")
        made.configure(programs.POOL + "".join(SERVICES) + proxied())
        made.start()
        made.respond(
            *((programs.alias(version, LEFT), 2, port) for version in (4, 6) for port in (GOPHER, RDP, MINECRAFT))
        )
        programs.certificate(made, *NAMES.values())
        parser_programs.haproxy(made, PROXIED, *NAMES.values())
        logs = Lab(made, {}, {})
        for number, name in NAMES.items():
            logs.mosquitto[number] = parser_programs.mosquitto(made, name, number, MQTT)
            logs.dnsmasq[number] = parser_programs.dnsmasq(made, name, number, DNS, "a.left.example", "right.example")
            parser_programs.kamailio(made, name, number, SIP)
            programs.nginx(
                made, name, number, PROXIED, how="proxy_protocol", client="$remote_addr $proxy_protocol_addr"
            )
        yield logs


def tell(lab: Lab, version: int, port: int, sent: bytes, *, echoed: bool = False) -> str:
    """The first line of what a server says to these bytes, and perhaps sends back behind it."""
    with lab.gateway.socket(None, version=version) as client:
        client.connect((ENDPOINT[version], port))
        client.sendall(sent)
        received = b""
        while b"\n" not in received or not received.endswith(sent if echoed else b""):
            data = client.recv(4096)
            assert data, f"closed after {received!r}"
            received += data
    return received.partition(b"\n")[0].decode().strip()


def await_last_seen(lab: Lab, log: Path, client: str) -> None:
    lab.gateway.wait(lambda: parser_programs.seen(log)[-1:] == [client], f"the last one in {log} is {client}")


def responder(number: int, version: int, port: int) -> str:
    """How the responder's line begins: its own address and port, and the client's address."""
    return answer("", version, number, port).lstrip() + " "


@both_families
@pytest.mark.parametrize(("options", "number"), [("-i left", LEFT), ("-i other -u right", RIGHT)])
def test_mqtt_by_client_and_user(lab: Lab, version: int, options: str, number: int) -> None:
    said = lab.gateway.client.sh(f"mosquitto_sub -h {ENDPOINT[version]} {options} -t who -C 1 -W {WITHIN}")
    assert said.strip() == NAMES[number]
    await_last_seen(lab, lab.mosquitto[number], CLIENT[version])


@both_families
@pytest.mark.parametrize(("name", "number"), [("A.Left.Example", LEFT), ("right.example", RIGHT)])
def test_dns_over_tcp_by_name(lab: Lab, version: int, name: str, number: int) -> None:
    said = lab.gateway.client.sh(f"dig +tcp +short +tries=1 +time={WITHIN} @{ENDPOINT[version]} {name} TXT")
    assert said.strip() == f'"{NAMES[number]}"'
    await_last_seen(lab, lab.dnsmasq[number], CLIENT[version])


@pytest.mark.parametrize(("user", "number"), [("left", LEFT), ("right", RIGHT)])
def test_sip_by_user(lab: Lab, user: str, number: int) -> None:
    """sipsak does not speak IPv6."""
    said = lab.gateway.client.sh(f"sipsak -E tcp -v -s sip:{user}@{ENDPOINT4}:{SIP}")
    assert ok(number, 4) in said.splitlines()


@both_families
@pytest.mark.parametrize(("host", "number"), [(b"Left.Example", LEFT), (b"right.example.", RIGHT)])
def test_sip_by_host(lab: Lab, version: int, host: bytes, number: int) -> None:
    captured = (VECTORS / "sip-sipsak-0.9.8.1-options.bin").read_bytes()
    assert tell(lab, version, SIP, captured.replace(b"Registrar.Example", host)) == ok(number, version)


def ok(number: int, version: int) -> str:
    """Kamailio's status line."""
    return f"SIP/2.0 200 {answer(NAMES[number], version, number, SIP)}"


def minecraft(host: bytes) -> bytes:
    """mcstatus's handshake and status request, for another host name."""
    captured = (VECTORS / "minecraft-mcstatus-14.2.0-status.bin").read_bytes()
    length = 1 + captured[0]
    handshake = captured[1:length].replace(b"\x0cPlay.Example", bytes([len(host)]) + host)
    assert handshake != captured[1:length] or host == b"Play.Example"
    return bytes([len(handshake)]) + handshake + captured[length:]


@both_families
@pytest.mark.parametrize(
    ("host", "number"),
    [(b"Play.Example", LEFT), (b"play.example.\0FML3\0", LEFT), (b"One.Right.Example\0FML\0", RIGHT)],
)
def test_minecraft_by_host_also_with_the_suffix_of_forge(lab: Lab, version: int, host: bytes, number: int) -> None:
    assert tell(lab, version, MINECRAFT, minecraft(host), echoed=True).startswith(responder(number, version, MINECRAFT))


@both_families
@pytest.mark.parametrize(("cookie", "number"), [(b"Administrator", LEFT), (b"Ms-Right-Admin", RIGHT)])
def test_rdp_by_cookie(lab: Lab, version: int, cookie: bytes, number: int) -> None:
    """With the connection request of rdesktop, whose lengths (TPKT's, and the header's) count the cookie."""
    captured = (VECTORS / "rdp-rdesktop-1.9.0-user.bin").read_bytes()
    more = len(cookie) - len(b"Administrator")
    request = captured[:3] + bytes([captured[3] + more, captured[4] + more])
    request += captured[5:].replace(b"Administrator", cookie)
    assert tell(lab, version, RDP, request, echoed=True).startswith(responder(number, version, RDP))


@both_families
@pytest.mark.parametrize(("selector", "number"), [("Left", LEFT), ("207/right", RIGHT)])
def test_regex_with_a_protocol_that_has_no_parser(lab: Lab, version: int, selector: str, number: int) -> None:
    """Gopher, spoken by curl."""
    host = ENDPOINT4 if version == 4 else f"[{ENDPOINT6}]"
    client = lab.gateway.spawn(lab.gateway.client, "curl", "-sSN", f"gopher://{host}/1{selector}")
    assert client.stdout is not None
    assert client.stdout.readline().startswith(responder(number, version, GOPHER))
    assert client.stdout.readline() == f"{selector}\n"


def curl(lab: Lab, version: int, url: str, *options: str) -> str:
    """What curl gets for a URL, whatever its host name, at the client's own proxy or (with --connect-to) elsewhere."""
    proxy = CLIENT[version] if version == 4 else f"[{CLIENT[version]}]"
    said = lab.gateway.client.sh(
        f"curl -sS --max-time {WITHIN} --cacert {lab.gateway.directory}/all.pem {' '.join(options)}"
        f" --connect-to ::{proxy}: {url} 2>&1 || echo status $?"
    )
    return said.strip()


def by_proxy(number: int, version: int, named: str) -> str:
    """What nginx says of a connection from the proxy: the proxy is its peer, and names a client."""
    return answer(NAMES[number], version, number, PROXIED, f"{CLIENT[version]} {named}")


@both_families
@pytest.mark.parametrize("proxy_port", [V1, V2])
def test_proxy_by_the_source_that_it_tells(lab: Lab, version: int, proxy_port: int) -> None:
    for source, number in ((CLIENT[version], LEFT), (BEHIND[version], RIGHT)):
        said = curl(lab, version, f"http://a.example:{proxy_port}/", f"--interface {source}")
        assert said == by_proxy(number, version, source)


@both_families
@pytest.mark.parametrize(("name", "number"), [("left", LEFT), ("right", RIGHT)])
def test_proxy_by_the_authority_that_it_tells(lab: Lab, version: int, name: str, number: int) -> None:
    said = curl(lab, version, f"https://{name}:{V2_AUTHORITY}/", f"--interface {BEHIND[version]}")
    assert said == by_proxy(number, version, BEHIND[version])


@both_families
def test_proxy_is_believed_of_trusted_ones_only(lab: Lab, version: int) -> None:
    """curl may say itself for whom it speaks."""
    endpoint = ENDPOINT4 if version == 4 else f"[{ENDPOINT6}]"
    claims = f"http://a.example:{PROXIED}/", "--haproxy-protocol", f"--connect-to ::{endpoint}:"
    assert curl(lab, version, *claims) == by_proxy(LEFT, version, CLIENT[version])
    before = refused(lab)
    # Reset before its request or behind it: curl writes the header first.
    assert re.search("status 5[56]$", curl(lab, version, *claims, f"--interface {BEHIND[version]}"))
    # HAProxy passes the reset on as the end of an empty answer.
    assert "status 52" in curl(lab, version, f"http://a.example:{V2_STRANGER}/", f"--interface {BEHIND[version]}")
    assert refused(lab) - before == 2


def refused(lab: Lab) -> int:
    """How often a proxy was not trusted."""
    status = lab.gateway.host.sh(f"cd {ROOT}; {sys.executable} -m steerd.cli.ctl status {lab.gateway.config}")
    counted = re.search(r"untrusted_proxy\D+(\d+)", status)
    return int(counted[1]) if counted else 0
