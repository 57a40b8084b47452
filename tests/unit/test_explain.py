"""`explain`: it says what the engine decides, whatever the packet, and why."""

from __future__ import annotations

import ipaddress
import json
import random
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scapy.utils import PcapNgWriter

from steerd import config, paths
from steerd.cli import ctl, main
from steerd.cli import explain as cli
from steerd.control import explain as asking
from steerd.control.registry import Registry
from steerd.control.route_records import origin_of
from steerd.core import explain
from steerd.core.choice import Chooser
from steerd.core.engine import Engine, no_state
from steerd.core.explain import Explainer, Explanation, Known
from steerd.core.marks import FIRST_TARGET_ID
from steerd.core.router import failing
from steerd.core.sentences import route_shown, shown
from steerd.model import DEAD, DRAINED, TCP, UDP, Answer, Extension, Outcome, Reason
from steerd.wire import packet as wire
from steerd.wire import portext, segment
from steerd.wire.packet import Packet
from tests.initials import client_hello, flight, other
from tests.property.test_engine import States, published, some_configuration, some_packet

VECTORS = Path(__file__).parents[1] / "vectors"
HELLO = (VECTORS / "tls-openssl-3.0.19-sni-alpn.bin").read_bytes()
TEXT = """
[gateway]
state_dir = "{directory}/state"
run_dir = "{directory}/run"
[pools.p]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.web]
endpoints = ["203.0.113.10:443/tcp", "203.0.113.10:443/udp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension", "prefix", "tls", "http", "quic"]
unmatched = "tls-alert"
extension_pool = {{ pool = "p", by = "extension", port = 8080 }}
routes = [
    {{ when = {{ tls.sni = "a.example" }}, target = "10.64.0.1:443" }},
    {{ when = {{ tls.sni = "*.example" }}, target = ["10.64.0.2:443", "[fd00:64::2]:443"] }},
    {{ when = {{ tls.sni = "a.example", tls.alpn = "h2" }}, target = "10.64.0.3:443" }},
    {{ when = {{ quic.sni = "a.example" }}, target = "10.64.0.4:same" }},
    {{ when = {{ quic.server-id = "0a01" }}, target = "10.64.0.5:443" }},
    {{ when = {{ http.host = "c.example" }}, source = "192.0.2.0/24", target = "10.64.0.6:80" }},
    {{ when = {{ prefix = "SSH-" }}, target = "10.64.0.7:22" }},
    {{ when = {{ portext.src = 9 }}, target = "10.64.0.8:443" }},
]
[services.web.quic]
connection_ids = [{{ config = 0, server_id_length = 2, nonce_length = 6 }}]
[services.tv]
endpoints = ["203.0.113.10:8080/tcp"]
inspect = ["proxy", "http"]
trusted_proxies = ["198.51.100.0/25"]
routes = [{{ when = {{ http.host = "c.example" }}, source = "192.0.2.0/24", target = "10.64.0.12:80" }}]
[services.tv.sessions]
key = "http.cookie.s"
on_new_source = "deny"
entries = [
    {{ id = "one", target = "10.64.0.10:80", source = "192.0.2.1" }},
    {{ id = "two", target = "10.64.0.11:80" }},
]
[services.names]
endpoints = ["203.0.113.10:53/udp", "203.0.113.10:53/tcp"]
inspect = ["dns"]
default = "10.64.0.20:53"
routes = [{{ when = {{ dns.qname = "*.a.example" }}, target = "10.64.0.21:53" }}]
[services.early]
endpoints = ["203.0.113.10:80/tcp"]
inspect = ["port-extension", "http"]
unextended = "pass"
routes = [{{ when = {{ http.host = "a.example" }}, target = "10.64.0.30:80" }}]
"""
ENDPOINT = ipaddress.ip_address("203.0.113.10").packed
QUERY = bytes.fromhex("123401000001000000000000017801610765 78616d706c650000010001")
GET = b"GET / HTTP/1.1\r\nHost: %b\r\nCookie: s=%b\r\n\r\n"
PAYLOADS = [
    HELLO,
    GET % (b"c.example", b"one"),
    GET % (b"c.example", b"two"),
    GET % (b"c.example", b"\xff"),
    b"PROXY TCP4 192.0.2.1 203.0.113.10 1 443\r\n" + GET % (b"c.example", b"one"),
    b"PROXY TCP4 192.0.2.9 203.0.113.10 1 443\r\n" + GET % (b"c.example", b"none"),
    b"SSH-2.0-x\r\n",
    b"PROXY nonsense",
    QUERY,
    len(QUERY).to_bytes(2, "big") + QUERY,
    *flight(client_hello(b"a.example", b"h3", size=1700)),
    other(2, 30),
    b"@" + bytes(40),
    b"",
]


@contextmanager
def explainer(text: str, states: States | None = None) -> Iterator[tuple[config.Config, Explainer, Engine]]:
    state = states.get if states is not None else no_state
    with published(text) as (made, plan, reader):
        known = Known(
            plan, reader.route, reader.session, reader.target, reader.routes_of, origin_of, lambda _: False, state,
            reader.group,
        )  # fmt: skip
        engine = Engine(plan, reader.route, reader.session, state=state, chooser=Chooser(reader.group, state))
        yield made, Explainer(known), engine


def held_together(told: Explanation, made: config.Config) -> None:
    """What an explanation says of routes is what the routes of the configuration say, and what was decided."""
    decision = told.decision
    if decision is None or not told.service or decision.outcome is Outcome.LATE:
        assert (told.matched, told.near) == ((), ())
        return
    (service,) = (service for service in made.services if service.name == told.service)
    if decision.reason in (Reason.SESSION, Reason.SESSION_REFUSED, Reason.UNTRUSTED_PROXY, Reason.NO_ENDPOINT):
        assert told.matched == ()
    else:
        keys = decision.keys
        source = ipaddress.ip_address(keys["proxy.source"]).packed if "proxy.source" in keys else told.packet.src
        expected = {route.name for route in service.routes if not failing(route, keys, source)}
        assert {route.name for route in told.matched} == expected
        assert (decision.reason is Reason.ROUTE) <= bool(expected)
        by_name = {route.name: route for route in service.routes}
        for route in told.matched:
            written = by_name[route.name]
            assert written._replace(targets=(), choice=None) == route._replace(
                targets=(), conditions=written.conditions
            )
            assert set(route.targets) == set(written.targets)
        for near in told.near:
            assert failing(near.route, keys, source) == [near.wrong]
    choices = [step.text for step in told.steps if step.about == "choice"]
    if choices and told.target is not None:
        # A client is never sent to one that is left out.
        assert f"{told.target}" in choices[0].split("Left out")[0]
    assert (decision.reason is Reason.DEAD) <= bool(choices)
    if decision.reason is Reason.ROUTE:
        assert told.target in told.matched[0].targets
    assert (told.target is not None) == (decision.outcome is Outcome.STEER)
    assert (told.mark is None) == (decision.outcome in (Outcome.DROP, Outcome.LATE))
    assert cli.as_text(asking.view(told)).isascii()
    assert json.loads(msgspec.json.encode(asking.view(told)))["reason"] == decision.reason.name.lower()


def parsers_gave(told: Explanation) -> dict[str, str]:
    return {key: value for said in told.parsers if isinstance(said.answer, dict) for key, value in said.answer.items()}


@pytest.mark.parametrize("seed", range(15))
def test_any_syn_and_first_payload_of_any_configuration(seed: int) -> None:
    rng = random.Random(seed)
    states = States(rng)
    with explainer(some_configuration(rng), states) as (made, explaining, engine):
        for _ in range(120):
            packet = some_packet(rng)
            states.change()
            told = explaining.syn(packet)
            assert told.decision == engine.decide_syn(packet)
            held_together(told, made)
            first = explaining.first(packet, packet.payload)
            decision = engine.decide_first(packet, packet.payload)
            assert first.decision == (None if decision is Answer.NEED_MORE else decision)
            held_together(first, made)


@pytest.mark.parametrize("seed", range(6))
def test_sessions_proxies_datagrams_and_keys(seed: int) -> None:
    """And by keys alone the same is decided as by the payload that they were found in."""
    rng = random.Random(seed)
    reasons = set()
    with explainer(TEXT.format(directory="/nowhere")) as (made, explaining, engine):
        for _ in range(1000):
            packet = some_packet(rng)._replace(
                version=4, dst=ENDPOINT, dport=rng.choice((443, 443, 8080, 8080, 53, 80, 81)), dst_options=b"",
                src=bytes([*rng.choice(((192, 0, 2), (198, 51, 100))), rng.choice((1, 2))]),
                protocol=rng.choice((TCP, TCP, UDP)),
            )  # fmt: skip
            payload = rng.choice(PAYLOADS)
            payload = payload[: rng.choice((len(payload), rng.randint(0, len(payload))))]
            if packet.protocol == UDP:
                payloads = [payload] if rng.random() < 0.5 else PAYLOADS[10:12][: rng.randint(1, 2)]
                told = explaining.datagrams(packet, payloads)
                decided = engine.decide_datagrams(packet, payloads)
            else:
                packet = packet._replace(payload=b"")
                told = explaining.first(packet, payload)
                decided = engine.decide_first(packet, payload)
            assert told.decision == (None if decided is Answer.NEED_MORE else decided)
            held_together(told, made)
            if told.decision is None or not told.service:
                continue
            reasons.add(told.decision.reason)
            is_malformed = told.decision.reason is Reason.UNTRUSTED_PROXY and not told.decision.keys
            if told.decision.reason is not Reason.NO_ENDPOINT and not is_malformed:
                keys = {key: text for key, text in told.decision.keys.items() if not key.startswith("portext.")}
                # Whoever gives keys has asked no parser.
                decision = told.decision._replace(parser="")
                carried = packet if packet.protocol == UDP else packet._replace(ip_options=b"", tcp_options=b"")
                assert engine.decide_keys(carried, keys)._replace(parser="") == decision
                assert parsers_gave(told).items() <= keys.items() | {("", "")}
    few = {Reason.SESSION_REFUSED, Reason.UNKNOWN_CONNECTION, Reason.NO_ENDPOINT}
    assert reasons >= few | {Reason.ROUTE, Reason.ARITHMETIC, Reason.DEFAULT, Reason.UNMATCHED, Reason.UNTRUSTED_PROXY}


SEVERAL = """
[pools.p]
prefixes = ["10.64.0.0/24"]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["http"]
default = ["10.64.0.8:80", "10.64.0.9:80"]
choose = "round-robin"
routes = [
    { when = { http.host = "f" }, target = ["10.64.0.1:80", "10.64.0.2:80", "10.64.0.3:80"], choose = "first-alive" },
    { when = { http.host = "h" }, target = ["10.64.0.1:80", "10.64.0.2:80"], choose = "hash", hash = "http.cookie.s" },
]
"""


def test_several_targets_who_is_left_out_and_why() -> None:
    def say(host: str, **more: str) -> tuple[str, str, Reason]:
        keys = {"http.host": host} | {name.replace("_", "."): value for name, value in more.items()}
        told = explaining.keys(SYN, keys)
        assert told.decision is not None
        (text,) = [step.text for step in told.steps if step.about == "choice"]
        return str(told.target), text, told.decision.reason

    states = {FIRST_TARGET_ID + number: 0 for number in range(10)}
    with published(SEVERAL) as (_, plan, reader):
        by_name = {str(reader.target(id_)): id_ for id_ in states}
        known = Known(
            plan, reader.route, reader.session, reader.target, reader.routes_of, lambda *_: "", lambda _: False,
            states.__getitem__, reader.group,
        )  # fmt: skip
        explaining = Explainer(known)
        first = "The first one that is alive is chosen, of "
        assert say("f") == ("10.64.0.1:80", f"{first}10.64.0.1:80, 10.64.0.2:80, 10.64.0.3:80.", Reason.ROUTE)
        states[by_name["10.64.0.1:80"]] = DEAD[TCP]
        states[by_name["10.64.0.2:80"]] = DRAINED | DEAD[TCP]
        left_out = "Left out: 10.64.0.1:80 (nothing listens there), 10.64.0.2:80 (drained, nothing listens there)."
        assert say("f") == ("10.64.0.3:80", f"{first}10.64.0.3:80. {left_out}", Reason.ROUTE)
        assert say("h") == ("None", f"There is nobody to choose. {left_out}", Reason.DEAD)
        states[by_name["10.64.0.1:80"]] = DRAINED
        assert say("h")[2] is Reason.DRAINED
        states[by_name["10.64.0.1:80"]] = 0
        assert "the hash of http.cookie.s says, of 10.64.0.1:80." in say("h", http_cookie_s="1")[1]
        assert "the hash of the client's address (there is no http.cookie.s)" in say("h")[1]
        assert "They take turns, in each worker by itself, so it may be any, of 10.64.0.8:80" in say("z")[1]


# ---- the commands ----

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "steerd.toml"
    file.write_text(TEXT.format(directory=tmp_path))
    return file


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(script: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = 0
        try:
            script()
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            status = end.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


def explained(run: Run, file: Path, *arguments: object) -> tuple[int, list[dict[str, Any]]]:
    status, out, err = run(main.main, "explain", file, *arguments, "--json")
    assert err == ""
    told = json.loads(out)
    assert "alone: routes, leases and sessions that were added" in told["note"]
    return status, told["explanations"]


def steps(told: dict[str, Any], about: str) -> list[str]:
    return [step["text"] for step in told["steps"] if step["about"] == about]


TO, TV = ("--to", "203.0.113.10:443"), ("--to", "203.0.113.10:8080")


@pytest.mark.parametrize(
    ("arguments", "status", "target", "reason", "matched", "near"),
    [
        ((*TO, "--sni", "A.example."), 0, "10.64.0.1:443", "route", [0, 1], [2]),
        ((*TO, "--sni", "a.example", "--key", "tls.alpn=h2"), 0, "10.64.0.3:443", "route", [2, 0, 1], []),
        ((*TO, "--sni", "a.exmple"), 1, None, "unmatched", [], [0]),
        (("--to", "[2001:db8::10]:443/tcp", "--sni", "a.example"), 1, None, "no_family", [0, 1], [2]),
        (("--to", "203.0.113.10:443/udp", "--sni", "a.example"), 0, "10.64.0.4:443", "route", [3], []),
        ((*TO, "--extension", 7), 0, "10.64.0.6:8080", "arithmetic", [], []),
        (("--to", f"203.0.113.10:{7 * 65536 + 443}"), 0, "10.64.0.6:8080", "arithmetic", [], []),
        ((*TO, "--key", "portext.src=9"), 0, "10.64.0.8:443", "route", [7], []),
        ((*TO, "--extension", 4000), 1, None, "unmatched", [], []),
        ((*TO, "--host", "c.example"), 1, None, "unmatched", [], [5]),
        ((*TO, "--host", "c.example", "--from", "192.0.2.7:5000"), 0, "10.64.0.6:80", "route", [5], []),
        ((*TV, "--key", "http.cookie.s=one", "--from", "192.0.2.1:1"), 0, "10.64.0.10:80", "session", [], []),
        ((*TV, "--key", "http.cookie.s=one"), 1, None, "session_refused", [], []),
        ((*TV, "--key", "proxy.source=192.0.2.1"), 1, None, "untrusted_proxy", [], []),
        (
            (*TV, "--key", "proxy.source=192.0.2.1", "--host", "c.example", "--from", "198.51.100.1:1"),
            *(0, "10.64.0.12:80", "route", [0], []),
        ),
        (TO, 1, None, "late", [], []),
        (("--to", "203.0.113.10:53/udp", "--key", "dns.qname=X.a.example"), 0, "10.64.0.21:53", "route", [0], []),
        (("--to", "203.0.113.10:80", "--host", "a.example"), 0, "10.64.0.30:80", "route", [0], []),
        (("--to", "203.0.113.10:80"), 1, None, "unextended_pass", [], []),
        (("--to", "203.0.113.10:444"), 1, None, "no_endpoint", [], []),
    ],
)
def test_by_keys(
    run: Run,
    file: Path,
    arguments: Sequence[object],
    status: int,
    target: str | None,
    reason: str,
    matched: list[int],
    near: list[int],
) -> None:
    found, (told,) = explained(run, file, *arguments)
    assert (found, told["target"], told["reason"]) == (status, target, reason)
    assert told["meaning"] == asking.meanings()[Reason[reason.upper()]]
    assert [place(route) for route in told["matched"]] == matched
    assert [place(each["route"]) for each in told["near"]] == near
    text = run(main.main, "explain", file, *arguments)
    assert (text[0], text[2]) == (status, "")
    assert target is None or f": steered to {target}\n" in text[1]


def place(route: str) -> int:
    return int(route.rpartition("[")[2].removesuffix("])"))


OFFLOADED = """
[pools.p]
prefixes = ["10.64.0.0/24"]
[services.s]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["port-extension"]
unextended = "pass"
extension_pool = { pool = "p", by = "extension", port = 8080 }
"""
SLEEPING = OFFLOADED.replace('/24"]', '/24"]\nwake = "unit:a@{alias}.service"')
BY_SOURCE = OFFLOADED + 'routes = [{ when = { portext.src = 9 }, target = "10.64.0.8:443" }]\n'


@pytest.mark.parametrize(("text", "extension", "told"), [
    (OFFLOADED, 7, True), (OFFLOADED, 300, False), (OFFLOADED, 0, False), (SLEEPING, 7, False), (BY_SOURCE, 7, False),
])  # fmt: skip
def test_what_the_kernel_steers_by_itself_is_said(text: str, extension: int, told: bool) -> None:
    with explainer(text) as (_, explain_, _):
        options = portext.encode_ipv4(Extension(extension, 0), portext.Numbers())
        packet = SYN._replace(dport=443, ip_options=options)
        (said,) = [[step.text for step in explain_.keys(packet, {}).steps if step.about == "kernel"]]
        assert bool(said) is told
        assert not told or "offload4, counter `offloaded`" in said[0]
        late = packet._replace(tcp_options=b"\x22\x02\1\1")
        assert not [step for step in explain_.syn(late).steps if step.about == "kernel"]


def test_every_reason_has_a_meaning() -> None:
    assert asking.meanings().keys() == set(Reason)
    assert asking.meanings()[Reason.ROUTE] == "A route matched."


def test_what_is_said_on_the_way(run: Run, file: Path) -> None:
    _, (told,) = explained(run, file, *TO, "--sni", "a.example", "--host", "b.example", "--key", "ssh.client=x")
    assert steps(told, "endpoint") == ["203.0.113.10:443/tcp is an endpoint of the service web."]
    assert steps(told, "when") == ["Late: the first payload of the connection decides."]
    assert steps(told, "ignored") == [
        "http.host: tls recognised its protocol, so http is not asked.",
        "ssh.client: no parser in the service's inspect gives that.",
    ]
    assert steps(told, "route")[1].endswith("it has exact conditions only, the other one has a pattern.")
    assert "synproxy checks the cookie" in " ".join(steps(told, "table"))
    assert f"mark {told['mark']:#010x} (id {told['target_id']})" in steps(told, "outcome")[0]
    _, (told,) = explained(run, file, *TO, "--extension", 7, "--host", "c.example")
    assert steps(told, "ignored") == ["The SYN alone decides, by its extension; http.host would count in the SYN only."]
    _, (told,) = explained(run, file, "--to", "203.0.113.10:444")
    assert "near it: 203.0.113.10:443/tcp, " in steps(told, "endpoint")[0]
    _, (told,) = explained(run, file, "--to", "10.64.0.3:444")
    assert "chain direct drops" in steps(told, "table")[0]


def test_the_search_for_near_routes_has_an_end(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = (*TO, "--sni", "a.exmple")
    unlooked = ["There are more routes than were looked through for those that nearly match."]
    for name, most, expected in (("MAX_LOOKED_AT", 8, []), ("MAX_LOOKED_AT", 7, unlooked)):
        monkeypatch.setattr(explain, name, most)
        _, (told,) = explained(run, file, *question)
        assert steps(told, "near")[len(told["near"]) :] == expected
    capture = pcap(
        file.parent / "c.pcap", 101, [ip_datagram(port, 443, flight(client_hello(b"x"))[0]) for port in (1, 2)]
    )
    monkeypatch.setattr(explain, "MAX_LOOKED_AT", 8)
    monkeypatch.setattr(explain, "MAX_LOOKED_AT_IN_ALL", 9)
    _, (first, second) = explained(run, file, capture)
    assert [unlooked[0] in steps(each, "near") for each in (first, second)] == [False, True]


def test_by_a_payload(run: Run, file: Path) -> None:
    status, (told,) = explained(run, file, *TO, "--hex", HELLO.hex(":"))
    assert status == 0
    assert [(said["parser"], said["answer"]) for said in told["parsers"]] == [("prefix", "not-mine"), ("tls", "keys")]
    assert steps(told, "parser")[-1] == "http: not asked, since tls recognised its protocol."
    status, (told,) = explained(run, file, *TO, "--hex", HELLO[:9].hex())
    assert (status, told["outcome"]) == (1, None)
    assert "tls: NEED_MORE: 9 bytes do not suffice; it wants at most 18432." in steps(told, "parser")
    assert steps(told, "undecided") == [
        "More is waited for, 10 s at most. Then it is refused with a TLS alert and a reset (too_slow)."
    ]
    hello = flight(client_hello(b"a.example", b"h3", size=1700))
    digits = [argument for datagram in hello for argument in ("--hex", datagram.hex())]
    to = ("--to", "203.0.113.10:443/udp")
    status, (told,) = explained(run, file, *to, *digits)
    assert (status, told["target"]) == (0, "10.64.0.4:443")
    status, (told,) = explained(run, file, *to, *digits[:2])
    assert "quic: NEED_MORE: 1 datagrams with 1200 bytes" in steps(told, "parser")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Exactly one of PCAP, --hex, --live and --to"),
        ((*TO, "--live", "1"), "not --live and --to"),
        (("--hex", "zz"), "--hex has two hexadecimal digits a byte"),
        (("--hex", "00"), "--hex is no IP packet"),
        (("--to", "203.0.113.10"), "--to must be ADDRESS:PORT"),
        (("--to", "2001:db8::10:443"), "--to must be ADDRESS:PORT"),
        (("--to", "203.0.113.10:443/sctp"), "neither tcp nor udp"),
        (("--to", "203.0.113.10:131072"), "port 0 is never used"),
        (("--to", "203.0.113.10:70000", "--extension", 7), "already says an extension"),
        ((*TO, "--from", "[::1]:1"), "two address families"),
        ((*TO, "--key", "x"), "is no key"),
        ((*TO, "--key", "portext.dst=70000"), "from 0 to 65535"),
        ((*TO, "--key", "portext.port=70000"), "follows from the port"),
        ((*TO, "--host", "a", "--key", "http.host=b"), "is there twice"),
        ((*TO, "--host", "a", "--hex", "00"), "give either"),
        (("--hex", "00", "--sni", "a"), "go with --to"),
        (("/nowhere.pcap",), "cannot be read"),
        ((__file__,), "neither pcap nor pcapng"),
    ],
)
def test_what_cannot_be_understood(
    run: Run, file: Path, arguments: Sequence[object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    status, out, err = run(main.main, "explain", file, *arguments)
    assert (status, out) == (2, "")
    assert said in err


def test_a_bad_configuration(run: Run, file: Path) -> None:
    file.write_text("[gateway]\nwrokers = 2\n")
    assert run(main.main, "explain", file, *TO)[0] == 2


# ---- captures ----

SYN = Packet(4, bytes([192, 0, 2, 7]), ENDPOINT, TCP, 5000, 443, wire.SYN, 100, 0, b"", b"", b"", b"")


def ip_syn(packet: Packet) -> bytes:
    return segment.bare_syn(packet)


def ip_data(packet: Packet, payload: bytes, size: int) -> list[bytes]:
    return segment.data(packet._replace(seq=packet.seq + 1, ack=1), payload, fin=False, size=size)


def ip_datagram(sport: int, dport: int, payload: bytes) -> bytes:
    udp = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, UDP, 0, SYN.src, ENDPOINT) + udp


def pcap(file: Path, link_type: int, frames: Sequence[bytes]) -> Path:
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, link_type)
    file.write_bytes(head + b"".join(struct.pack("<IIII", 0, 0, len(f), len(f)) + f for f in frames))
    return file


LINKS = {101: b"", 1: bytes(12) + b"\x08\x00", 113: bytes(16), 276: bytes(20), 108: bytes(4)}


@pytest.mark.parametrize("link_type", LINKS)
def test_a_capture(run: Run, file: Path, link_type: int) -> None:
    """One explanation for each connection and flow; segments in any order, repeated SYNs, answers in between."""
    later = SYN._replace(sport=5001, seq=0xFFFFFFF0)
    hello = ip_data(SYN, HELLO, 100)
    again, asks = SYN._replace(seq=5), SYN._replace(sport=5003, dport=53)
    extended = ip_syn(SYN._replace(sport=5002, tcp_options=portext.encode_tcp(Extension(7, 0), portext.Numbers())))
    packets = [
        ip_syn(SYN), ip_syn(SYN), hello[1], ip_syn(later), hello[0], *hello[2:],
        segment.acknowledgement(SYN, 1, 1, 0), extended, ip_syn(SYN._replace(dport=444)),
        *ip_data(later, GET % (b"c.example", b""), 20), ip_datagram(1, 53, QUERY), ip_datagram(1, 53, b"no query"),
        *(ip_datagram(2, 443, each) for each in flight(client_hello(b"a.example", b"h3", size=1700))),
        ip_syn(again), *ip_data(again, b"SSH-2.0-x\r\n", 20),
        ip_syn(asks), *ip_data(asks, len(QUERY).to_bytes(2, "big") + QUERY, 20),
    ]  # fmt: skip
    capture = pcap(file.parent / "c.pcap", link_type, [LINKS[link_type] + packet for packet in packets])
    status, told = explained(run, file, capture)
    assert status == 0
    assert [(each["client"], each["target"], each["reason"]) for each in told] == [
        ("192.0.2.7:5000", told[0]["target"], "route"),
        ("192.0.2.7:5001", "10.64.0.6:80", "route"),
        ("192.0.2.7:5002", "10.64.0.6:8080", "arithmetic"),
        ("192.0.2.7:1", "10.64.0.21:53", "route"),
        ("192.0.2.7:1", "10.64.0.20:53", "default"),
        ("192.0.2.7:2", "10.64.0.4:443", "route"),
        ("192.0.2.7:5000", "10.64.0.7:22", "route"),
        ("192.0.2.7:5003", "10.64.0.21:53", "route"),
    ]
    assert "segments with" in steps(told[1], "capture")[1]


def test_a_pcapng_with_vlan_tags_and_one_without_syn(run: Run, file: Path) -> None:
    capture = file.parent / "c.pcapng"
    vlan = bytes(12) + bytes.fromhex("88a800018100000208 00")
    with PcapNgWriter(str(capture)) as writer:
        for packet in ip_data(SYN, GET % (b"c.example", b""), 1000):
            writer.write(vlan + packet)
    status, (told,) = explained(run, file, capture)
    assert (status, told["target"]) == (0, "10.64.0.6:80")
    assert steps(told, "capture")[0].startswith("There is no SYN of it;")


def test_no_more_of_a_capture_is_kept_than_decides() -> None:
    data = SYN._replace(flags=wire.ACK, payload=b"x")
    others = [data._replace(sport=1), data._replace(protocol=UDP, flags=0)]
    packets = [SYN, data._replace(payload=b""), *[data] * 1000, SYN._replace(seq=9), data, *others]
    kept = [SYN, *[data] * (asking.MAX_PACKETS - 1), SYN._replace(seq=9), data, *others]
    assert list(asking.first_packets(packets)) == kept


def test_a_capture_of_something_else(run: Run, file: Path) -> None:
    capture = pcap(file.parent / "c.pcap", 101, [ip_syn(SYN._replace(dport=444))])
    status, (told,) = explained(run, file, capture)
    assert (status, told["service"], told["reason"]) == (1, None, "no_endpoint")
    empty = pcap(file.parent / "c.pcap", 101, [])
    assert run(main.main, "explain", file, empty) == (
        1,
        "",
        "steerd: Nothing here decides anything: there is no SYN, first payload or datagram to an endpoint.\n",
    )


def test_a_packet_in_hexadecimal_digits(run: Run, file: Path) -> None:
    status, (told,) = explained(run, file, "--hex", ip_syn(SYN._replace(dport=80)).hex())
    assert (status, told["outcome"], told["mark"]) == (1, "pass", 0x200)
    status, (told,) = explained(run, file, "--hex", ip_data(SYN._replace(dport=80), b"x", 1)[0].hex())
    assert (status, told["outcome"]) == (1, None)
    assert steps(told, "table")[0].startswith("Only SYNs are looked at here;")


# ---- steerctl: what was added while it runs ----


def test_by_the_registry(run: Run, file: Path) -> None:
    question = ("explain", *TO, "--sni", "new.test", "--config", file)
    status, out, _ = run(ctl.main, *question)
    assert status == 1
    assert out.startswith(f"By {file} alone (the registry in {file.parent}/state/registry cannot be read: ")
    registry = Registry(str(file.parent / "state"))
    registry.publish(config.load(file))
    registry.routes.put("web", {"tls.sni": "new.test"}, "10.64.0.40:443", None)
    registry.leases.add(
        "alice", "p", service="web", when={"tls.sni": "alice.test"}, source=None, port=443, ttl=None, now=1.0
    )
    registry.close()
    status, out, err = run(ctl.main, *question)
    assert (status, err) == (0, "")
    assert out.startswith(f"By the registry in {file.parent}/state: ")
    assert "tls.sni=new.test (dynamic) matches, to 10.64.0.40:443." in out
    assert (
        "tls.sni=alice.test (lease alice) matches"
        in run(ctl.main, "explain", *TO, "--sni", "alice.test", "--config", file)[1]
    )
    status, (told,) = explained(run, file, *TO, "--sni", "new.test")
    assert (status, told["reason"]) == (1, "unmatched")


def test_a_daemon_on_a_unix_socket(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "steerd.toml"
    file.write_text(
        f"""[gateway]
state_dir = "{tmp_path}/state"
run_dir = "{tmp_path}/run"
relay = {{ pool = "relays" }}
[pools.relays]
prefixes = ["10.65.0.0/24", "fd00:65::/120"]
[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["tls"]
routes = [{{ when = {{ tls.sni = "a.example" }}, target = "unix:/run/a.sock" }}]
"""
    )
    status, out, _ = run(main.main, "explain", str(file), "--to", "203.0.113.10:443", "--sni", "a.example")
    assert status == 0
    assert "tls.sni=a.example (services.web.routes[0]) matches, to unix:/run/a.sock." in out
    assert "10.65.0.0:21300." in out
    assert "There the relay takes the connection, for unix:/run/a.sock." in out


def test_what_clients_say_is_fit_for_a_terminal(run: Run, file: Path) -> None:
    assert shown("a\x1b[2J\xff\\") == r"a\x1b[2J\xff\\"
    assert len(shown("x" * 10_000)) < 300
    _, out, _ = run(main.main, "explain", file, *TO, "--host", "a\x1b[2J")
    assert "\x1b" not in out
    with explainer(TEXT.format(directory="/nowhere")) as (made, _, _):
        (service,) = (service for service in made.services if service.name == "web")
        assert route_shown(service.routes[5]) == "http.host=c.example from 192.0.2.0/24 (services.web.routes[5])"


def test_a_late_service_asked_without_a_payload_says_what_is_lacking(run: Run, file: Path) -> None:
    status, out, _ = run(main.main, "explain", str(file), "--to", "203.0.113.10:8080")
    assert status == 1
    assert "any client -> 203.0.113.10:8080/tcp: late" in out
    assert "Late: the first payload decides." in out
    assert "Say what the first payload would hold: --sni, --host, --path, --key or --hex." in out
    assert "extension" not in out
    assert "Say what" not in run(main.main, "explain", str(file), "--to", "203.0.113.10:443", "--sni", "a.example")[1]


def test_an_endpoint_where_a_capture_is_expected(run: Run, file: Path) -> None:
    for address in ("203.0.113.10:443", "[2001:db8::10]:443/tcp"):
        status, _, err = run(main.main, "explain", str(file), address)
        assert status == 2
        assert f"{address} is no capture; did you mean --to {address}?" in err


def test_steerctl_without_the_default_configuration_asks_for_the_daemons(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = file.parent / "none.toml"
    monkeypatch.setattr(paths, "CONFIG", none)
    assert run(ctl.main, "explain", "--config", str(none), "--hex", "45") == (
        2,
        "",
        f"steerctl: There is no {none}: name the daemon's file with --config.\n",
    )
