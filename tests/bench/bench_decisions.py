"""What a decision costs in Python: for each parser, and with 1, 1,000 and 1,000,000 routes.

No kernel and no packets on a wire: a worker with stand-ins for queue, nf_tables and sockets (tests/bench/unplugged.py)
gets packets one after the other, each of a connection of its own, and all that it does for them until the verdicts are
written is counted, in CPU time. Each decision is checked by its reason. So this is Python's own time at its best, with
warm caches: in traffic the kernel's work between two batches cools them (tests/bench/bench_late.py has figures).

- *early*: a SYN with a port extension in an IP option. *sni*: curl's ClientHello, one segment. *http*: a request.
  *quic*: an Initial of 1,200 bytes; *quic_browser*: two of them for one hello. Each of these is decided by a route,
  drawn at random from those of the size: of `1,000,000` a quarter is for each key. They lead to 256 targets, which were
  used before: the first use of a target takes a system call, and is not counted.
- by parser: the first payload, or the first datagrams, of a real client (tests/vectors), at a service that has this
  parser alone, and a default.

The parts of a decision are measured as well, each in a loop of its own: LMDB's transaction, reading the packet, its
checksum, the engine (parser, routes, LMDB's lookup), counting, and the bytes of the verdict.

`flat`: the time with 1,000,000 routes over that with one, sizes in turn; 1.2 is allowed.
"""

from __future__ import annotations

import base64
import multiprocessing
import random
import socket
import struct
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from steerd.model import Extension, Reason
from steerd.wire import portext
from tests.bench import registries, report
from tests.bench.scenario import Bar, Chart, Goal, Result, Spread, rounds_of, spread
from tests.bench.unplugged import Unplugged
from tests.initials import client_hello, flight
from tests.netns.flood import packet as tcp_packet

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
SIZES = (1, 1_000, 1_000_000)
DECISIONS = 2_000
ROUNDS = rounds_of(15)
TARGETS = 256
PARSER_ROUNDS = rounds_of(9)
ALLOWED_US = {"early": 8, "sni": 15, "quic": 80}
_SYN, _ACK_PSH = 0x02, 0x18
_HELLO_SIZE = 1800
_TIMESTAMPS = bytes.fromhex("0101080a0000000100000002")
_CAPTURED = b"shop.example"
_ENDPOINT = socket.inet_aton(registries.ENDPOINT)
_fork = multiprocessing.get_context("fork")

# What real clients say first: by transport and parser, the files of one flow.
SPOKEN = {
    ("tcp", "tls"): ["tls-curl-7.88.1-get"],
    ("tcp", "http"): ["http-curl-7.88.1-get"],
    ("tcp", "http2"): ["http2-curl-7.88.1-get"],
    ("tcp", "ssh"): ["ssh-openssh-9.2p1-client"],
    ("tcp", "dns"): ["dns-dig-9.18.49-aaaa"],
    ("tcp", "stun"): ["stun-coturn-4.6.1-allocate"],
    ("tcp", "openvpn"): ["openvpn-openvpn-2.6.14-tls-auth"],
    ("tcp", "rtsp"): ["rtsp-curl-7.88.1-options"],
    ("tcp", "sip"): ["sip-sipsak-0.9.8.1-options"],
    ("tcp", "postgres"): ["postgres-psql-15.18-disable"],
    ("tcp", "mqtt"): ["mqtt-mosquitto_pub-2.0.11-v5"],
    ("tcp", "minecraft"): ["minecraft-mcstatus-14.2.0-status"],
    ("tcp", "rdp"): ["rdp-rdesktop-1.9.0-user"],
    ("tcp", "proxy"): ["proxy-haproxy-2.6.12-v2-ipv4"],
    ("udp", "quic"): ["udp/quic-gtlsclient-0.12.1-get"],
    ("udp", "dtls"): ["udp/dtls-openssl-3.0.19-sni-alpn"],
    ("udp", "dns"): ["udp/dns-dig-9.18.49-aaaa"],
    ("udp", "stun"): ["udp/stun-chromium-156.0.8078.79-ice"],
    ("udp", "openvpn"): ["udp/openvpn-openvpn-2.6.14-tls-crypt"],
    ("udp", "sip"): ["udp/sip-sipsak-0.9.8.1-options"],
    ("udp", "wireguard"): ["udp/wireguard-wireguard-go-0.0.20220316-first"],
    ("tcp", "prefix"): ["ssh-openssh-9.2p1-client"],
    ("tcp", "regex"): ["ssh-openssh-9.2p1-client"],
}
# What they compare with; none of it is what these clients say.
_COMPARED = {
    "wireguard": ("wireguard.public-key", base64.b64encode(bytes(range(32))).decode()),
    "prefix": ("prefix", "GET "),
    "regex": ("regex", "^[A-Z]+ /"),
}
FIRST_PORT = 1000
_PARTS_OF = "parts of "


class Kind(NamedTuple):
    """One of the things that are decided by routes."""

    name: str
    when: Callable[[int], dict[str, object]]
    """Of route n."""
    service: str
    packets: Callable[[int, int], list[bytes]]
    """Of a flow, by its number, to route n."""


def _address(flow: int) -> bytes:
    """Every client has an address of its own: what a worker remembers of the last one is of no use for the next."""
    return struct.pack("!I", 0x0A000000 + flow)


def _tcp(flow: int, port: int, flags: int, payload: bytes = b"", ip_options: bytes = b"") -> bytes:
    header = struct.pack("!HHIIBBHHH", 40000, port, flow, 1 if payload else 0, 0x80, flags, 64240, 0, 0)
    return tcp_packet(_address(flow), _ENDPOINT, header + _TIMESTAMPS, payload, ip_options)


def _udp(flow: int, port: int, payload: bytes) -> bytes:
    size = 28 + len(payload)
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, size, 0, 0, 64, 17, 0, _address(flow), _ENDPOINT)
    return header + struct.pack("!HHHH", 40000, port, size - 20, 0) + payload


def _extension(number: int) -> Extension:
    return Extension(number % 60_000 + 1, number // 60_000 + 1)


def _name(number: int) -> str:
    return f"t{number:07}.example.net"


def _early(flow: int, number: int) -> list[bytes]:
    return [_tcp(flow, 442, _SYN, ip_options=portext.encode_ipv4(_extension(number), portext.Numbers()))]


def _sni(flow: int, number: int) -> list[bytes]:
    return [_tcp(flow, 443, _ACK_PSH, _curl_hello(_name(number).encode()))]


def _curl_hello(name: bytes) -> bytes:
    """curl's, with another name in it, and all lengths that have it in them."""
    hello = (VECTORS / "tls-curl-7.88.1-get.bin").read_bytes()
    at, more = hello.index(_CAPTURED), len(name) - len(_CAPTURED)
    changed = bytearray(hello[:at] + name + hello[at + len(_CAPTURED) :])
    extensions = 44 + hello[43]
    extensions += 2 + int.from_bytes(hello[extensions : extensions + 2])
    extensions += 1 + hello[extensions]
    for where in (3, 7, extensions, at - 2, at - 5, at - 7):
        value = int.from_bytes(changed[where : where + 2]) + more
        changed[where : where + 2] = value.to_bytes(2)
    return bytes(changed)


def _http(flow: int, number: int) -> list[bytes]:
    request = f"GET / HTTP/1.1\r\nHost: {_name(number)}\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\r\n"
    return [_tcp(flow, 80, _ACK_PSH, request.encode())]


def _quic(flow: int, number: int, size: int = 0) -> list[bytes]:
    datagrams = flight(client_hello(_name(number).encode(), b"h3", size=size), dcid=(flow + 1).to_bytes(8))
    return [_udp(flow, 443, datagram) for datagram in datagrams]


def _by_name(key: str) -> Callable[[int], dict[str, object]]:
    return lambda number: {key: _name(number)}


def _by_extension(number: int) -> dict[str, object]:
    dst, src = _extension(number)[:2]
    return {"portext.dst": dst, "portext.src": src}


KINDS = (
    Kind("early", _by_extension, "early", _early),
    Kind("sni", _by_name("tls.sni"), "sni", _sni),
    Kind("http", _by_name("http.host"), "http", _http),
    Kind("quic", _by_name("quic.sni"), "quic", _quic),
    Kind("quic_browser", _by_name("quic.sni"), "quic", lambda flow, number: _quic(flow, number, _HELLO_SIZE)),
)
WITH_ROUTES = KINDS[:4]
BY_ROUTES = f"""
[pools.tenants]
prefixes = ["{registries.PREFIX}"]
mode = "anyip"
[services.early]
endpoints = ["{registries.ENDPOINT}:442/tcp"]
inspect = ["port-extension"]
[services.sni]
endpoints = ["{registries.ENDPOINT}:443/tcp"]
inspect = ["tls"]
[services.http]
endpoints = ["{registries.ENDPOINT}:80/tcp"]
inspect = ["http"]
[services.quic]
endpoints = ["{registries.ENDPOINT}:443/udp"]
inspect = ["quic"]
"""


def _by_parser() -> str:
    """A service for each."""
    text = f'[pools.tenants]\nprefixes = ["{registries.PREFIX}"]\nmode = "anyip"\n'
    for place, (transport, parser) in enumerate(SPOKEN):
        text += (
            f'[services.{transport}-{parser}]\nendpoints = ["{registries.ENDPOINT}:{FIRST_PORT + place}/{transport}"]\n'
            f'inspect = ["{parser}"]\ndefault = "{registries.alias(place)}:{registries.PORT}"\n'
        )
        if parser in _COMPARED:
            key, value = _COMPARED[parser]
            text += f'routes = [{{ when = {{ "{key}" = "{value}" }}, target = "{registries.alias(0)}:1" }}]\n'
        if parser == "proxy":
            text += 'trusted_proxies = ["10.0.0.0/8"]\n'
    return text


def _route(number: int) -> dict[str, object]:
    """Of all routes together: the kinds take turns."""
    kind = WITH_ROUTES[number % len(WITH_ROUTES)]
    number //= len(WITH_ROUTES)
    return {
        "service": kind.service,
        "when": kind.when(number),
        "target": [f"{registries.alias(number % TARGETS)}:{registries.PORT}"],
    }


class Server:
    """A process with a worker, which measures what it is told to."""

    def __init__(self, stack: ExitStack, text: str, routes: int) -> None:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="steerd-bench-"))
        registries.fill(directory, routes, text, _route)
        self._start(stack, directory, max(1, routes // len(WITH_ROUTES)))

    def _start(self, stack: ExitStack, directory: str, each: int) -> None:
        self._directory, self._each = directory, each
        self._pipe, theirs = _fork.Pipe()
        process = _fork.Process(target=_serve, args=(directory, each, theirs))
        process.start()
        theirs.close()  # so that its end is seen
        stack.callback(process.join)
        stack.callback(process.kill)

    def another(self, stack: ExitStack) -> Server:
        """One more process, with the same registry."""
        more = Server.__new__(Server)
        more._start(stack, self._directory, self._each)
        return more

    def ask(self, name: str) -> float:
        """Microseconds a decision, of a kind or of `tcp-PARSER`."""
        self.order(name)
        return self.answer()

    def order(self, name: str) -> None:
        """Have it begin."""
        self._pipe.send(name)

    def answer(self) -> float:
        """What came of it."""
        found: float = self._answer()
        return found

    def parts(self, name: str) -> dict[str, float]:
        """Microseconds of what a decision of a kind consists of (Unplugged.parts)."""
        self._pipe.send(f"{_PARTS_OF}{name}")
        found: dict[str, float] = self._answer()
        return found

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError as error:
            raise SystemExit("bench: a process that was to measure decisions has ended") from error


def _serve(directory: str, each: int, orders: Connection) -> None:
    """`each`: routes of each kind."""
    unplugged, rng, flow = Unplugged(directory), random.Random(each), 0
    kinds = {kind.name: kind for kind in KINDS}
    places = {f"{transport}-{parser}": place for place, (transport, parser) in enumerate(SPOKEN)}
    while True:
        name = orders.recv()
        flows = range(flow, flow + DECISIONS)
        flow += DECISIONS
        if name.startswith(_PARTS_OF):
            packets_of = kinds[name.removeprefix(_PARTS_OF)].packets
            orders.send(unplugged.parts([packets_of(n, rng.randrange(each)) for n in flows]))
        elif name in kinds:
            packets = [packet for n in flows for packet in kinds[name].packets(n, rng.randrange(each))]
            orders.send(unplugged.microseconds(packets, Reason.ROUTE, DECISIONS))
        else:
            packets = [packet for n in flows for packet in _spoken(name, places[name], n)]
            orders.send(unplugged.microseconds(packets, Reason.DEFAULT, DECISIONS))


def _spoken(name: str, place: int, flow: int) -> list[bytes]:
    transport, _, parser = name.partition("-")
    payloads = [(VECTORS / f"{file}.bin").read_bytes() for file in SPOKEN[transport, parser]]
    if transport == "udp":
        return [_udp(flow, FIRST_PORT + place, payload) for payload in payloads]
    return [_tcp(flow, FIRST_PORT + place, _ACK_PSH, payload) for payload in payloads]


def run(console: Console) -> Result:
    """Sizes and parsers in turn; two minutes, half of which the import of the routes takes."""
    with ExitStack() as stack:
        console.print(f"importing up to {SIZES[-1]:,} routes ...")
        servers = {size: Server(stack, BY_ROUTES, max(size, len(WITH_ROUTES))) for size in SIZES}
        by_routes: dict[str, dict[int, list[float]]] = {kind.name: {size: [] for size in SIZES} for kind in KINDS}
        for _ in range(ROUNDS + 1):
            for name, found in by_routes.items():
                for size, server in servers.items():
                    found[size].append(server.ask(name))
        # The first round has used all targets.
        by_routes = {name: {size: us[1:] for size, us in found.items()} for name, found in by_routes.items()}
        parts = {name: servers[SIZES[-1]].parts(name) for name in by_routes}
        parsers = Server(stack, _by_parser(), 0)
        names = [f"{transport}-{parser}" for transport, parser in SPOKEN]
        by_parser: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(PARSER_ROUNDS):
            for name in names:
                by_parser[name].append(parsers.ask(name))
    return _result(console, by_routes, by_parser, parts)


def _result(
    console: Console,
    by_routes: dict[str, dict[int, list[float]]],
    by_parser: dict[str, list[float]],
    parts: dict[str, dict[str, float]],
) -> Result:
    flat = {name: report.paired(found[SIZES[-1]], found[SIZES[0]]) for name, found in by_routes.items()}
    ratios = {f"flat_{name}": value for name, value in flat.items()}
    for name, allowed in ALLOWED_US.items():
        ratios[f"{name}/allowed"] = spread([us / allowed for us in by_routes[name][SIZES[-1]]])
    routes = report.table("us of CPU a decision, by routes", "", *(f"{size:,}" for size in SIZES), "flat")
    for name, found in by_routes.items():
        routes.add_row(name, *(_us(spread(found[size])) for size in SIZES), f"{flat[name].median:.3f}")
    console.print(routes)
    consists = report.table("... and its parts by themselves, with 1,000,000 routes", "", *parts["early"], "rest")
    rest = {name: spread(by_routes[name][SIZES[-1]]).median - sum(found.values()) for name, found in parts.items()}
    for name, us_of in parts.items():
        consists.add_row(name, *(f"{us:.1f}" for us in us_of.values()), f"{rest[name]:.1f}")
    console.print(consists)
    parsers = report.table("us of CPU a decision, by parser", "", "median (lowest - highest)")
    for name, values in by_parser.items():
        parsers.add_row(name, _us(spread(values)))
    console.print(parsers)
    report.show_ratios(console, ratios)
    figures = {
        "by_routes_us": {
            name: {f"{size}": report.rounded(spread(values), 2) for size, values in found.items()}
            for name, found in by_routes.items()
        },
        "by_parser_us": {name: report.rounded(spread(values), 2) for name, values in by_parser.items()},
        "parts_us": {
            name: {part: round(us, 2) for part, us in (*found.items(), ("rest", rest[name]))}
            for name, found in parts.items()
        },
        "conditions": {"decisions_a_round": DECISIONS, "rounds": ROUNDS, "rounds_of_parsers": PARSER_ROUNDS},
    }
    goals = [Goal(f"flat_{name}", 1.2, at_least=False) for name in by_routes]
    goals += [Goal(f"{name}/allowed", 1, at_least=False) for name in ALLOWED_US]
    bars = [Bar(f"{name.partition('-')[2]} ({name.partition('-')[0]})", spread(values), ours=True)
            for name, values in sorted(by_parser.items(), key=lambda item: spread(item[1]).median)]  # fmt: skip
    chart = Chart("parsers", "Python's own time for a decision by parser, in us of CPU (less is better)", bars)
    return Result("decisions", ratios, figures, goals, [chart])


def _us(value: Spread) -> str:
    return f"{value.median:.1f} ({value.lowest:.1f} - {value.highest:.1f})"
