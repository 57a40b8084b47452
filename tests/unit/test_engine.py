"""This SYN, where does it go? Plans come from configurations, by way of the registry, as workers get theirs."""

from __future__ import annotations

import ipaddress
import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from scapy.layers.dns import DNS, DNSQR

from steerd import config
from steerd.control.registry import Reader, Registry
from steerd.core.choice import Chooser
from steerd.core.engine import Decision, Engine
from steerd.core.sessions import Claim
from steerd.model import DEAD, DRAINED, TCP, UDP, Answer, Extension, Outcome, Reason
from steerd.wire import portext, quic_lb
from steerd.wire.packet import ACK, SYN, Packet
from tests import initials
from tests.flows import flows, only

NUMBERS = portext.Numbers()
CLIENT = {4: "198.51.100.1", 6: "2001:db8:1::1"}

CONFIG = """
[pools.tenants]                                # indices IPv4 0..3, 4..5; IPv6 0..3
prefixes = ["10.64.0.0/30", "fd00:64::/126", "10.70.0.8/31"]
[pools.few]                                    # the first 3 of 256
prefixes = ["10.80.0.0/24"]
size = 3

[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension", "http", "prefix"]
unextended = "default"
default = ["10.64.0.3:80", "[fd00:64::3]:80"]
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
routes = [
    { when = { "portext.dst" = 2 }, target = ["10.64.0.0:1002", "[fd00:64::]:1002"] },
    { when = { "portext.dst" = 3 }, target = "10.64.0.0:1003" },
    { when = { "portext.src" = 9 }, target = ["10.64.0.0:1009", "[fd00:64::]:1009"] },
    { when = { "portext.dst" = 2, "portext.src" = 9 }, target = "10.64.0.0:1029" },
    { when = { "portext.dst" = 4 }, source = "192.0.2.0/24", target = "10.64.0.0:1004" },
    { when = { "portext.port" = 327_680_443 }, target = "10.64.0.0:1005" },
    { when = { "http.host" = "a.example" }, target = ["10.64.0.1:same", "[fd00:64::1]:same"] },
    { when = { "prefix" = "SSH-2.0-" }, target = "10.64.0.0:22" },
    { when = { "prefix" = "GET " }, target = "10.64.0.0:81" },
]

[services.strict]                              # nothing but what is written; silence otherwise
endpoints = ["203.0.113.10:1000-1999/tcp", "[2001:db8::10]:1000-1999/tcp"]
inspect = ["port-extension", "http"]
unextended = "unmatched"
unmatched = "drop"
extension_pool = { pool = "few", by = "extension", first = 100 }

[services.shared]                              # the gateway's own daemon, and aliases beside it
endpoints = ["203.0.113.10:22/tcp"]
inspect = ["port-extension"]
unextended = "pass"
extension_pool = { pool = "tenants", by = "extension", port = 22 }

[services.whole]                               # extended ports 131070 .. 131075, across port 0 of extension 2
endpoints = ["203.0.113.11:1-65535/tcp", "[2001:db8::11]:1-65535/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "tenants", by = "extended-port", first = 131070, port = 9000 }

[services.half]                                # a default of one family only
endpoints = ["203.0.113.12:443/tcp", "[2001:db8::12]:443/tcp"]
inspect = ["port-extension"]
unextended = "default"
default = "10.64.0.3:80"
routes = [{ when = { "portext.dst" = 1 }, target = "10.64.0.2:80" }]

[services.prefix-first]                        # late: as those below that name a parser and not "port-extension"
endpoints = ["203.0.113.13:80/tcp"]
inspect = ["prefix", "http"]
routes = [
    { when = { "prefix" = "GET " }, target = "10.64.0.0:81" },
    { when = { "http.host" = "a.example" }, target = "10.64.0.1:82" },
]

[services.by-source]
endpoints = ["203.0.113.14:25/tcp"]
default = "10.64.0.3:25"
routes = [
    { source = "198.51.100.0/24", target = "10.64.0.1:25" },
    { source = "198.51.100.1/32", target = "10.64.0.2:25" },
]

[services.late]
endpoints = ["203.0.113.16:443/tcp", "[2001:db8::16]:443/tcp"]
inspect = ["port-extension", "http", "prefix"]
default = "10.64.0.3:80"
first_payload_timeout = 2.5
on_silence = "10.64.0.3:25"
routes = [
    { when = { "portext.dst" = 1 }, target = "10.64.0.1:1001" },
    { when = { "http.host" = "a.example" }, target = "10.64.0.1:82" },
    { when = { "prefix" = "GET " }, target = "10.64.0.1:83" },
    { when = { "prefix" = "SSH-2.0-" }, target = "10.64.0.1:22" },
    { source = "192.0.2.0/24", target = "10.64.0.2:99" },
]

[services.senders]
endpoints = ["203.0.113.17:443/tcp"]
inspect = ["port-extension", "http"]
unmatched = "tls-alert"
routes = [
    { when = { "portext.src" = 5 }, target = "10.64.0.1:1005" },
    { when = { "http.host" = "a.example" }, target = "10.64.0.1:82" },
]

[services.sessions]
endpoints = ["203.0.113.18:554/tcp", "[2001:db8::18]:554/tcp"]
inspect = ["rtsp"]
routes = [{ when = { "rtsp.host" = "a.example" }, target = "10.64.0.1:554" }]
[services.sessions.sessions]
key = "rtsp.session"
on_new_source = "deny"
entries = [
    { id = "own", target = ["10.64.0.2:554", "[fd00:64::2]:554"], source = "198.51.100.1" },
    { id = "own6", target = "[fd00:64::2]:554", source = "2001:db8:1::1" },
    { id = "another", target = "10.64.0.2:554", source = "198.51.100.2" },
    { id = "nobody", target = "10.64.0.2:554" },
]

[services.proxied]
endpoints = ["203.0.113.18:443/tcp", "[2001:db8::18]:443/tcp"]
inspect = ["proxy", "http"]
trusted_proxies = ["198.51.100.0/28", "2001:db8:1::1/128"]
routes = [
    { when = { "http.host" = "a.example" }, target = ["10.64.0.1:82", "[fd00:64::1]:82"] },
    { when = { "http.host" = "a.example" }, source = "192.0.2.0/24", target = ["10.64.0.2:82", "[fd00:64::2]:82"] },
    { when = { "proxy.authority" = "B.example" }, target = "10.64.0.3:82" },
]

[services.proxied-sessions]
endpoints = ["203.0.113.19:554/tcp", "[2001:db8::19]:554/tcp"]
inspect = ["proxy", "rtsp"]
trusted_proxies = ["198.51.100.1/32", "2001:db8:1::1/128"]
default = ["10.64.0.3:554", "[fd00:64::3]:554"]
[services.proxied-sessions.sessions]
key = "rtsp.session"
on_new_source = "deny"
entries = [
    { id = "own", target = ["10.64.0.2:554", "[fd00:64::2]:554"], source = "192.0.2.9" },
    { id = "the-proxy's", target = ["10.64.0.2:554", "[fd00:64::2]:554"], source = "198.51.100.1" },
    { id = "nobody", target = ["10.64.0.2:554", "[fd00:64::2]:554"] },
]

[services.no-default]
endpoints = ["203.0.113.15:80/tcp"]
inspect = ["http"]
routes = [{ when = { "http.host" = "a.example" }, target = "10.64.0.1:80" }]
"""

REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
OTHER_REQUEST = b"GET / HTTP/1.1\r\nHost: b.example\r\n\r\n"
UNFINISHED = REQUEST[:-2]


def play(session: str) -> bytes:
    """An RTSP request that a route matches, and perhaps a session."""
    return f"PLAY rtsp://a.example/1 RTSP/1.0\r\nSession: {session}\r\n\r\n".encode()


SSH = b"SSH-2.0-OpenSSH_9.2\r\n"
MALFORMED_IPV4 = bytes.fromhex("9e0a5354000700000000")  # ours, of a length that is not ours


def syn(
    endpoint: str,
    extension: tuple[int, int] | None = None,
    *,
    via: str = "ip",
    payload: bytes = b"",
    source: str | None = None,
    protocol: int = TCP,
    ip_options: bytes = b"",
) -> Packet:
    """A SYN to `address:port`, perhaps with an extension in the IP or the TCP header."""
    host, _, port = endpoint.rpartition(":")
    dst = ipaddress.ip_address(host.strip("[]"))
    src = ipaddress.ip_address(source or CLIENT[dst.version])
    dst_options = tcp_options = b""
    if extension is not None and via == "tcp":
        tcp_options = portext.encode_tcp(Extension(*extension), NUMBERS)
    elif extension is not None and dst.version == 4:
        ip_options += portext.encode_ipv4(Extension(*extension), NUMBERS)
    elif extension is not None:
        dst_options = portext.encode_ipv6(Extension(*extension), NUMBERS)[2:]
    return Packet(
        dst.version, src.packed, dst.packed, protocol, 40000, int(port), SYN, 1, 0,
        ip_options, dst_options, tcp_options, payload,
    )  # fmt: skip


class Decider:
    """An engine and the registry it reads."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.states: defaultdict[int, int] = defaultdict(int)
        state = self.states.__getitem__
        chooser = Chooser(reader.group, state)
        self.engine = Engine(reader.refresh(), reader.route, reader.session, state=state, chooser=chooser)

    def decide(self, packet: Packet) -> Decision:
        return self.engine.decide_syn(packet)

    def first(self, endpoint: str, data: bytes, source: str | None = None) -> Decision | None:
        """The decision for a first payload; None: not yet."""
        decision = self.engine.decide_first(syn(endpoint, source=source)._replace(flags=ACK), data)
        return None if decision is Answer.NEED_MORE else decision

    def target(self, decision: Decision) -> str | None:
        """Where the decision leads to, as the registry knows it."""
        target = self._reader.target(decision.target_id)
        return str(target) if target else None


@contextmanager
def decider(directory: Path, text: str) -> Iterator[Decider]:
    registry = Registry(str(directory))
    registry.publish(config.parse(text, "steerd.toml"))
    registry.close()  # LMDB lets a process open an environment once
    reader = Reader(str(directory))
    try:
        yield Decider(reader)
    finally:
        reader.close()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decider]:
    with decider(tmp_path_factory.mktemp("state"), CONFIG) as made:
        yield made


WEB4, WEB6 = "203.0.113.10:443", "[2001:db8::10]:443"

# SYN -> service, reason, target. What is not steered has the outcome in the target's place.
STEERED: list[tuple[Packet, str, Reason, str | Outcome]] = [
    # a route; and one of several conditions before one of fewer
    (syn(WEB4, (2, 0)), "web", Reason.ROUTE, "10.64.0.0:1002"),
    (syn(WEB6, (2, 0)), "web", Reason.ROUTE, "[fd00:64::]:1002"),
    (syn(WEB4, (2, 0), via="tcp"), "web", Reason.ROUTE, "10.64.0.0:1002"),
    (syn(WEB6, (2, 0), via="tcp"), "web", Reason.ROUTE, "[fd00:64::]:1002"),
    (syn(WEB4, (2, 9)), "web", Reason.ROUTE, "10.64.0.0:1029"),
    (syn(WEB4, (0, 9)), "web", Reason.ROUTE, "10.64.0.0:1009"),
    (syn(WEB6, (0, 9)), "web", Reason.ROUTE, "[fd00:64::]:1009"),
    (syn(WEB4, (5000, 0)), "web", Reason.ROUTE, "10.64.0.0:1005"),
    (syn(WEB4, (4, 0), source="192.0.2.255"), "web", Reason.ROUTE, "10.64.0.0:1004"),
    # what matched has no target of this family: that is said, and no worse match is taken
    (syn(WEB6, (3, 0)), "web", Reason.NO_FAMILY, Outcome.RESET),
    (syn(WEB6, (2, 9)), "web", Reason.NO_FAMILY, Outcome.RESET),
    (syn("[2001:db8::12]:443", (1, 0)), "half", Reason.NO_FAMILY, Outcome.RESET),
    (syn("[2001:db8::12]:443", (5, 0)), "half", Reason.NO_FAMILY, Outcome.RESET),
    (syn("[2001:db8::12]:443"), "half", Reason.NO_FAMILY, Outcome.RESET),
    # arithmetic: the first, over the border of two prefixes, the last; IPv6 counts by itself
    (syn(WEB4, (1, 0)), "web", Reason.ARITHMETIC, "10.64.0.0:8080"),
    (syn(WEB4, (4, 0)), "web", Reason.ARITHMETIC, "10.64.0.3:8080"),
    (syn(WEB4, (5, 0)), "web", Reason.ARITHMETIC, "10.70.0.8:8080"),
    (syn(WEB4, (6, 0)), "web", Reason.ARITHMETIC, "10.70.0.9:8080"),
    (syn(WEB6, (4, 0)), "web", Reason.ARITHMETIC, "[fd00:64::3]:8080"),
    (syn(WEB4, (1, 1234)), "web", Reason.ARITHMETIC, "10.64.0.0:8080"),
    (syn("203.0.113.10:1500", (100, 0)), "strict", Reason.ARITHMETIC, "10.80.0.0:same"),
    (syn("203.0.113.10:1500", (102, 0)), "strict", Reason.ARITHMETIC, "10.80.0.2:same"),
    # ... by extended port: 1:65534 is 131070; 2:0 would be 131072 and its alias is nobody's
    (syn("203.0.113.11:65534", (1, 0)), "whole", Reason.ARITHMETIC, "10.64.0.0:9000"),
    (syn("203.0.113.11:65535", (1, 0)), "whole", Reason.ARITHMETIC, "10.64.0.1:9000"),
    (syn("203.0.113.11:1", (2, 0)), "whole", Reason.ARITHMETIC, "10.64.0.3:9000"),
    (syn("203.0.113.11:3", (2, 0)), "whole", Reason.ARITHMETIC, "10.70.0.9:9000"),
    (syn("[2001:db8::11]:1", (2, 0)), "whole", Reason.ARITHMETIC, "[fd00:64::3]:9000"),
    # ... and outside of it
    (syn("203.0.113.11:65533", (1, 0)), "whole", Reason.UNMATCHED, Outcome.RESET),
    (syn("203.0.113.11:4", (2, 0)), "whole", Reason.UNMATCHED, Outcome.RESET),
    (syn("[2001:db8::11]:2", (2, 0)), "whole", Reason.UNMATCHED, Outcome.RESET),
    (syn("203.0.113.11:65535", (65535, 0)), "whole", Reason.UNMATCHED, Outcome.RESET),
    (syn("203.0.113.10:1500", (99, 0)), "strict", Reason.UNMATCHED, Outcome.DROP),
    (syn("203.0.113.10:1500", (103, 0)), "strict", Reason.UNMATCHED, Outcome.DROP),
    (syn("203.0.113.10:1500", (65535, 0)), "strict", Reason.UNMATCHED, Outcome.DROP),
    (syn("[2001:db8::10]:1500", (100, 0)), "strict", Reason.UNMATCHED, Outcome.DROP),  # a pool of IPv4 only
    # an extension that nothing knows
    (syn(WEB4, (7, 0)), "web", Reason.DEFAULT, "10.64.0.3:80"),
    (syn(WEB6, (5, 0)), "web", Reason.DEFAULT, "[fd00:64::3]:80"),
    (syn("203.0.113.10:22", (7, 0)), "shared", Reason.UNMATCHED, Outcome.RESET),
    # no extension
    (syn(WEB4), "web", Reason.UNEXTENDED_DEFAULT, "10.64.0.3:80"),
    (syn(WEB6), "web", Reason.UNEXTENDED_DEFAULT, "[fd00:64::3]:80"),
    (syn(WEB4, (0, 0)), "web", Reason.UNEXTENDED_DEFAULT, "10.64.0.3:80"),
    (syn("203.0.113.10:1000"), "strict", Reason.UNEXTENDED_UNMATCHED, Outcome.DROP),
    (syn("203.0.113.11:80"), "whole", Reason.UNEXTENDED_UNMATCHED, Outcome.RESET),
    (syn("203.0.113.10:22"), "shared", Reason.UNEXTENDED_PASS, Outcome.PASS),
    # a source extension picks no alias: by itself it is for routes only
    (syn(WEB4, (0, 1)), "web", Reason.UNEXTENDED_DEFAULT, "10.64.0.3:80"),
    (syn("203.0.113.10:22", (0, 1)), "shared", Reason.UNEXTENDED_PASS, Outcome.PASS),
    # Fast Open: payload that is complete, that nothing matches, that is nobody's, that is cut short
    (syn(WEB4, payload=REQUEST), "web", Reason.ROUTE, "10.64.0.1:same"),
    (syn(WEB6, payload=REQUEST), "web", Reason.ROUTE, "[fd00:64::1]:same"),
    (syn(WEB4, payload=SSH), "web", Reason.ROUTE, "10.64.0.0:22"),
    (syn("203.0.113.10:1000", payload=OTHER_REQUEST), "strict", Reason.UNMATCHED, Outcome.DROP),
    (syn("203.0.113.10:1000", payload=SSH), "strict", Reason.UNEXTENDED_UNMATCHED, Outcome.DROP),
    (syn("203.0.113.10:1000", payload=UNFINISHED), "strict", Reason.UNEXTENDED_UNMATCHED, Outcome.DROP),
    (syn(WEB4, payload=UNFINISHED), "web", Reason.UNEXTENDED_DEFAULT, "10.64.0.3:80"),
    (syn(WEB4, payload=SSH[:5]), "web", Reason.UNEXTENDED_DEFAULT, "10.64.0.3:80"),
    (syn(WEB4, (5, 0), payload=UNFINISHED), "web", Reason.ARITHMETIC, "10.70.0.8:8080"),
    # a route by payload before arithmetic by extension; of equal routes, the key that inspect names first
    (syn(WEB4, (5, 0), payload=REQUEST), "web", Reason.ROUTE, "10.64.0.1:same"),
    (syn(WEB4, (2, 0), payload=REQUEST), "web", Reason.ROUTE, "10.64.0.0:1002"),
    # a late service: what does not suffice is left to the first payload
    (syn("203.0.113.13:80", payload=UNFINISHED), "prefix-first", Reason.LATE, Outcome.LATE),
    (syn("203.0.113.13:80", payload=OTHER_REQUEST), "prefix-first", Reason.ROUTE, "10.64.0.0:81"),
    (syn("203.0.113.13:80", payload=REQUEST), "prefix-first", Reason.ROUTE, "10.64.0.1:82"),
    (syn("203.0.113.13:80", payload=b"GE"), "prefix-first", Reason.LATE, Outcome.LATE),
    (syn("203.0.113.13:80", payload=SSH), "prefix-first", Reason.UNMATCHED, Outcome.RESET),
    # ... one that does not inspect the extension does not see it; one that does is steered by it at once
    (syn("203.0.113.13:80", (1, 1)), "prefix-first", Reason.LATE, Outcome.LATE),
    (syn("203.0.113.16:443", (1, 0)), "late", Reason.ROUTE, "10.64.0.1:1001"),
    (syn("203.0.113.16:443", (7, 0)), "late", Reason.DEFAULT, "10.64.0.3:80"),
    (syn("203.0.113.16:443"), "late", Reason.LATE, Outcome.LATE),
    (syn("203.0.113.16:443", source="192.0.2.1"), "late", Reason.LATE, Outcome.LATE),
    (syn("[2001:db8::16]:443", ip_options=b""), "late", Reason.LATE, Outcome.LATE),
    # ... a source extension alone counts only where a route asks for one
    (syn("203.0.113.16:443", (0, 5)), "late", Reason.LATE, Outcome.LATE),
    (syn("203.0.113.17:443", (0, 5)), "senders", Reason.ROUTE, "10.64.0.1:1005"),
    (syn("203.0.113.17:443", (0, 6)), "senders", Reason.UNMATCHED, Outcome.ALERT),
    # a known session before any route: its own source, another one, a family that it has no target for
    (syn("203.0.113.18:554", payload=play("own")), "sessions", Reason.SESSION, "10.64.0.2:554"),
    (syn("[2001:db8::18]:554", payload=play("own6")), "sessions", Reason.SESSION, "[fd00:64::2]:554"),
    (syn("203.0.113.18:554", payload=play("nobody")), "sessions", Reason.SESSION, "10.64.0.2:554"),
    (syn("[2001:db8::18]:554", payload=play("own")), "sessions", Reason.SESSION_REFUSED, Outcome.RESET),
    (syn("203.0.113.18:554", payload=play("another")), "sessions", Reason.SESSION_REFUSED, Outcome.RESET),
    (syn("[2001:db8::18]:554", payload=play("nobody")), "sessions", Reason.NO_FAMILY, Outcome.RESET),
    (syn("203.0.113.18:554", payload=play("unknown")), "sessions", Reason.ROUTE, "10.64.0.1:554"),
    # the source alone, the longer prefix first
    (syn("203.0.113.14:25"), "by-source", Reason.ROUTE, "10.64.0.2:25"),
    (syn("203.0.113.14:25", source="198.51.100.2"), "by-source", Reason.ROUTE, "10.64.0.1:25"),
    (syn("203.0.113.14:25", source="198.51.101.1"), "by-source", Reason.UNEXTENDED_DEFAULT, "10.64.0.3:25"),
    (syn("203.0.113.15:80"), "no-default", Reason.LATE, Outcome.LATE),
    # the edges of port ranges
    (syn("203.0.113.10:1000", (100, 0)), "strict", Reason.ARITHMETIC, "10.80.0.0:same"),
    (syn("203.0.113.10:1999", (100, 0)), "strict", Reason.ARITHMETIC, "10.80.0.0:same"),
    (syn("203.0.113.11:1"), "whole", Reason.UNEXTENDED_UNMATCHED, Outcome.RESET),
    (syn("203.0.113.11:65535"), "whole", Reason.UNEXTENDED_UNMATCHED, Outcome.RESET),
    # no endpoint: beside the ranges, another address, another protocol
    (syn("203.0.113.10:999", (100, 0)), "", Reason.NO_ENDPOINT, Outcome.DROP),
    (syn("203.0.113.10:2000", (100, 0)), "", Reason.NO_ENDPOINT, Outcome.DROP),
    (syn("203.0.113.10:21"), "", Reason.NO_ENDPOINT, Outcome.DROP),
    (syn("203.0.113.10:442", (1, 0)), "", Reason.NO_ENDPOINT, Outcome.DROP),
    (syn("203.0.113.10:444", (1, 0)), "", Reason.NO_ENDPOINT, Outcome.DROP),
    (syn("203.0.113.11:0", (2, 0)), "", Reason.NO_ENDPOINT, Outcome.DROP),
    (syn("203.0.113.99:443", (1, 0)), "", Reason.NO_ENDPOINT, Outcome.DROP),
    (syn("[2001:db8::99]:443", (1, 0)), "", Reason.NO_ENDPOINT, Outcome.DROP),
    (syn(WEB4, (1, 0), protocol=UDP), "", Reason.NO_ENDPOINT, Outcome.DROP),
]  # fmt: skip


def described(row: tuple[Packet, str, Reason, str | Outcome]) -> str:
    packet, service, reason, _ = row
    return f"{service or 'nobody'}-{packet.version}-{packet.dport}-{reason.name.lower()}"


@pytest.mark.parametrize(("packet", "service", "reason", "expected"), STEERED, ids=map(described, STEERED))
def test_where_a_syn_goes(plan: Decider, packet: Packet, service: str, reason: Reason, expected: str | Outcome) -> None:
    decision = plan.decide(packet)
    found = plan.target(decision) if decision.outcome is Outcome.STEER else decision.outcome
    assert (decision.service, decision.reason, found) == (service, reason, expected)
    assert (decision.target_id != 0) == (decision.outcome is Outcome.STEER)
    assert not decision.malformed


@pytest.mark.parametrize("packet", [packet for packet, *_, to in STEERED if not isinstance(to, Outcome)])
def test_a_drained_target_takes_nobody_new(plan: Decider, packet: Packet) -> None:
    before = plan.decide(packet)
    plan.states[before.target_id] = DRAINED | DEAD[TCP]
    drained = plan.decide(packet)
    refused = Outcome.DROP if before.service in ("strict",) else Outcome.ALERT if before.service == "senders" else None
    assert drained[:3] == (refused or Outcome.RESET, Reason.DRAINED, 0)
    assert (drained.service, drained.keys, drained.claim) == (before.service, before.keys, None)
    plan.states[before.target_id] = DEAD[TCP]
    # What is dead is steered to: the kernel refuses at once.
    assert plan.decide(packet) == before
    del plan.states[before.target_id]


def test_who_is_silent_is_not_steered_to_a_drained_target(plan: Decider) -> None:
    silent = syn("203.0.113.16:443")
    before = plan.engine.decide_silence(silent)
    assert before.reason is Reason.SILENCE
    plan.states[before.target_id] = DRAINED
    assert plan.engine.decide_silence(silent)[:3] == (Outcome.RESET, Reason.DRAINED, 0)
    del plan.states[before.target_id]


def test_the_table_above_reaches_every_reason_of_the_engine_and_every_outcome() -> None:
    not_the_engines = {Reason.NOT_READABLE, Reason.NOT_LOADED, Reason.FAULT}
    not_the_engines |= {Reason.SILENCE, Reason.TOO_LONG, Reason.TOO_SLOW, Reason.CONFLICT, Reason.ENDED}
    not_the_engines |= {Reason.UNANSWERED, Reason.UNTRUSTED_PROXY, Reason.UNKNOWN_CONNECTION}
    not_the_engines |= {Reason.DRAINED, Reason.DEAD, Reason.ASLEEP, Reason.NOT_WOKEN}
    assert {reason for _, _, reason, _ in STEERED} == set(Reason) - not_the_engines
    assert {expected if isinstance(expected, Outcome) else Outcome.STEER for *_, expected in STEERED} == set(
        Outcome
    ) - {Outcome.WAIT}


def test_a_session_without_a_source_is_claimed_by_who_comes(plan: Decider) -> None:
    """At the first payload as at a SYN; whoever has it, or may not have it, claims nothing."""
    endpoint, source = "203.0.113.18:554", ipaddress.ip_address(CLIENT[4]).packed
    claims = {}
    for name in ("nobody", "own", "another", "unknown"):
        found = plan.first(endpoint, play(name))
        assert found is not None
        assert found.claim == plan.decide(syn(endpoint, payload=play(name))).claim
        claims[name] = found.claim
    claim = claims.pop("nobody")
    assert claim is not None
    assert claim == Claim("sessions", "nobody", claim.serial, source, exclusive=True)
    assert set(claims.values()) == {None}
    over_ipv6 = plan.first("[2001:db8::18]:554", play("nobody"))
    assert over_ipv6 is not None and over_ipv6.claim is None


@pytest.mark.parametrize("version", [4, 6])
def test_behind_a_trusted_proxy_a_session_belongs_to_the_client_that_the_header_names(
    plan: Decider, version: int
) -> None:
    """Also where client and proxy are of different families: the source is the client's, the target's the proxy's."""
    endpoint = "203.0.113.19:554" if version == 4 else "[2001:db8::19]:554"

    def decide(session: str, client: str) -> Decision:
        family = 6 if ":" in client else 4
        decision = plan.first(endpoint, f"PROXY TCP{family} {client} {client} 5555 554\r\n".encode() + play(session))
        assert decision is not None
        return decision

    target = "10.64.0.2:554" if version == 4 else "[fd00:64::2]:554"
    steered = decide("own", "192.0.2.9")
    assert (steered.reason, plan.target(steered), steered.claim) == (Reason.SESSION, target, None)
    assert decide("own", "192.0.2.10").reason is decide("the-proxy's", "192.0.2.9").reason is Reason.SESSION_REFUSED
    for client in ("192.0.2.9", "2001:db8:2::9"):
        first = decide("nobody", client)
        assert (first.reason, plan.target(first)) == (Reason.SESSION, target)
        assert first.claim is not None and first.claim.source == ipaddress.ip_address(client).packed


@pytest.mark.parametrize(
    ("packet", "keys"),
    [
        (syn(WEB4), {}),
        (syn(WEB4, (7, 0)), {"portext.dst": "7", "portext.port": str(7 * 65536 + 443)}),
        (syn(WEB4, (0, 3)), {"portext.src": "3"}),
        (syn(WEB6, (7, 3)), {"portext.dst": "7", "portext.src": "3", "portext.port": str(7 * 65536 + 443)}),
        (syn(WEB4, (0, 3), payload=SSH), {"portext.src": "3", "prefix": "SSH-2.0-"}),
        (syn(WEB4, payload=UNFINISHED), {}),
        (
            syn(WEB4, payload=REQUEST),
            {
                "http.method": "GET",
                "http.path": "/",
                "http.host": "a.example",
                "http.header.host": "a.example",
            },
        ),
        (syn("203.0.113.99:443", (1, 0)), {}),
    ],
)
def test_the_keys_of_a_decision(plan: Decider, packet: Packet, keys: dict[str, str]) -> None:
    assert plan.decide(packet).keys == keys


PROXY_HEADER = b"PROXY TCP4 192.0.2.9 203.0.113.18 1 443\r\n"


@pytest.mark.parametrize(
    ("endpoint", "data", "source", "parser"),
    [
        ("203.0.113.16:443", REQUEST, None, "http"),
        ("203.0.113.16:443", SSH, None, "prefix"),
        ("203.0.113.16:443", b"\0" * 20, None, ""),
        ("203.0.113.13:80", REQUEST, None, "http"),  # behind `prefix`, which gave its keys
        ("203.0.113.18:443", PROXY_HEADER + REQUEST, "198.51.100.2", "http"),
        ("203.0.113.18:443", PROXY_HEADER + b"\0" * 20, "198.51.100.2", "proxy"),
        ("203.0.113.18:443", PROXY_HEADER + REQUEST, "198.51.100.99", "proxy"),
        ("203.0.113.18:554", play("own"), None, "rtsp"),
    ],
)
def test_a_decision_says_which_parser_gave_its_keys(
    plan: Decider, endpoint: str, data: bytes, source: str | None, parser: str
) -> None:
    decision = plan.first(endpoint, data, source)
    assert decision is not None
    assert decision.parser == parser


@pytest.mark.parametrize(
    ("packet", "parser"),
    [
        (syn(WEB4), ""),
        (syn(WEB4, (2, 0)), "port-extension"),
        (syn(WEB6, (7, 0)), "port-extension"),
        (syn(WEB4, (1, 0), payload=REQUEST), "http"),  # which found a route
        (syn(WEB4, (1, 0), payload=OTHER_REQUEST), "port-extension"),  # http found none, and arithmetic decided
        (syn("203.0.113.99:1"), ""),
    ],
)
def test_a_decision_on_a_syn_says_the_same(plan: Decider, packet: Packet, parser: str) -> None:
    assert plan.decide(packet).parser == parser


@pytest.mark.parametrize("endpoint", [WEB4, "203.0.113.10:1000", "203.0.113.10:22"])
def test_a_malformed_extension_is_none_and_says_so(plan: Decider, endpoint: str) -> None:
    without = plan.decide(syn(endpoint))
    assert plan.decide(syn(endpoint, ip_options=MALFORMED_IPV4)) == without._replace(malformed=True)
    # Two extensions are as good as none: nothing says which one is meant.
    twice = portext.encode_ipv4(Extension(1, 0), NUMBERS)
    assert plan.decide(syn(endpoint, (1, 0), ip_options=twice)) == without._replace(malformed=True)


def test_a_malformed_extension_leaves_the_payload_to_go_by(plan: Decider) -> None:
    decision = plan.decide(syn(WEB4, ip_options=MALFORMED_IPV4, payload=REQUEST))
    assert (decision.reason, plan.target(decision), decision.malformed) == (Reason.ROUTE, "10.64.0.1:same", True)


def test_a_service_that_does_not_inspect_extensions_does_not_count_malformed_ones(plan: Decider) -> None:
    assert not plan.decide(syn("203.0.113.13:80", ip_options=MALFORMED_IPV4)).malformed


@pytest.mark.parametrize("length", range(len(REQUEST)))
@pytest.mark.parametrize("extension", [None, (1, 0), (2, 0), (7, 0)])
def test_payload_that_is_cut_short_changes_nothing(
    plan: Decider, extension: tuple[int, int] | None, length: int
) -> None:
    assert plan.decide(syn(WEB4, extension, payload=REQUEST[:length])) == plan.decide(syn(WEB4, extension))


# ---- first payloads ----

LATE4, LATE6 = "203.0.113.16:443", "[2001:db8::16]:443"
FIRST: list[tuple[str, bytes, Reason, str | Outcome]] = [
    (LATE4, REQUEST, Reason.ROUTE, "10.64.0.1:82"),
    (LATE4, SSH, Reason.ROUTE, "10.64.0.1:22"),
    (LATE4, OTHER_REQUEST, Reason.DEFAULT, "10.64.0.3:80"),
    (LATE4, b"\x16\x03\x01", Reason.DEFAULT, "10.64.0.3:80"),
    (LATE6, OTHER_REQUEST, Reason.NO_FAMILY, Outcome.RESET),
    ("203.0.113.13:80", OTHER_REQUEST, Reason.ROUTE, "10.64.0.0:81"),
    ("203.0.113.17:443", OTHER_REQUEST, Reason.UNMATCHED, Outcome.ALERT),
    # early services have no business with first payloads: a reload came in between
    (WEB4, REQUEST, Reason.NO_ENDPOINT, Outcome.DROP),
    ("203.0.113.99:80", REQUEST, Reason.NO_ENDPOINT, Outcome.DROP),
]


@pytest.mark.parametrize(("endpoint", "payload", "reason", "expected"), FIRST)
def test_where_a_first_payload_goes_however_it_is_cut(
    plan: Decider, endpoint: str, payload: bytes, reason: Reason, expected: str | Outcome
) -> None:
    """Nothing is decided on fewer bytes that would not be decided alike on all."""
    decided = [
        found for size in range(1, len(payload) + 1) if (found := plan.first(endpoint, payload[:size])) is not None
    ]
    assert len({(d.reason, plan.target(d) or d.outcome) for d in decided}) == 1
    assert (decided[-1].reason, plan.target(decided[-1]) or decided[-1].outcome) == (reason, expected)


def test_a_parser_that_waits_holds_back_those_behind_it_and_one_that_recognises_ends_the_inspection(
    plan: Decider,
) -> None:
    assert plan.first(LATE4, UNFINISHED) is None
    whole = plan.first(LATE4, REQUEST)
    assert whole is not None
    assert "prefix" not in whole.keys
    first = plan.first("203.0.113.13:80", REQUEST)
    assert first is not None
    assert (first.keys["prefix"], first.keys["http.host"]) == ("GET ", "a.example")


def test_the_source_counts_for_first_payloads_as_well(plan: Decider) -> None:
    decision = plan.first(LATE4, b"\x16\x03\x01", source="192.0.2.7")
    assert decision is not None
    assert (decision.reason, plan.target(decision)) == (Reason.ROUTE, "10.64.0.2:99")


PROXIED = b"PROXY TCP4 192.0.2.9 203.0.113.18 5555 443\r\n"


@pytest.mark.parametrize(
    ("endpoint", "source", "payload", "reason", "target"),
    [
        ("203.0.113.18:443", "198.51.100.1", PROXIED + REQUEST, Reason.ROUTE, "10.64.0.2:82"),
        ("203.0.113.18:443", "198.51.100.1", REQUEST, Reason.ROUTE, "10.64.0.1:82"),
        ("203.0.113.18:443", "198.51.100.16", REQUEST, Reason.ROUTE, "10.64.0.1:82"),
        ("203.0.113.18:443", "198.51.100.16", PROXIED + REQUEST, Reason.UNTRUSTED_PROXY, None),
        ("203.0.113.18:443", "198.51.100.1", PROXIED + SSH, Reason.UNMATCHED, None),
        ("[2001:db8::18]:443", "2001:db8:1::1", PROXIED + REQUEST, Reason.ROUTE, "[fd00:64::2]:82"),
        ("[2001:db8::18]:443", "2001:db8:1::2", PROXIED + REQUEST, Reason.UNTRUSTED_PROXY, None),
    ],
)
def test_a_proxy_header_is_believed_of_trusted_proxies_only(
    plan: Decider, endpoint: str, source: str, payload: bytes, reason: Reason, target: str | None
) -> None:
    decided = [
        found for size in range(len(payload) + 1) if (found := plan.first(endpoint, payload[:size], source)) is not None
    ]
    assert {(d.reason, plan.target(d)) for d in decided} == {(reason, target)}
    assert (decided[-1].keys.get("proxy.source") == "192.0.2.9") == (PROXIED in payload)


def test_silence_patience_and_giving_up(plan: Decider) -> None:
    engine = plan.engine
    assert engine.patience(syn(LATE4)) == (2.5, True)
    assert engine.patience(syn("203.0.113.13:80")) == (10.0, False)
    assert engine.patience(syn("203.0.113.99:80")) == (0.0, False)
    silent = engine.decide_silence(syn(LATE4))
    assert (silent.reason, plan.target(silent)) == (Reason.SILENCE, "10.64.0.3:25")
    assert engine.decide_silence(syn(LATE6))[:2] == (Outcome.RESET, Reason.NO_FAMILY)
    assert engine.decide_silence(syn("203.0.113.13:80"))[:2] == (Outcome.DROP, Reason.NO_ENDPOINT)
    assert engine.give_up(syn("203.0.113.17:443"), Reason.TOO_LONG)[:2] == (Outcome.ALERT, Reason.TOO_LONG)
    assert engine.give_up(syn("203.0.113.99:80"), Reason.TOO_LONG)[:2] == (Outcome.DROP, Reason.NO_ENDPOINT)


def test_a_service_that_has_a_default_and_nothing_else_steers_there(tmp_path: Path) -> None:
    text = """
    [pools.p]
    prefixes = ["10.64.0.0/30"]
    [services.only]
    endpoints = ["203.0.113.10:80/tcp"]
    default = "10.64.0.1:80"
    """
    with decider(tmp_path, text) as plan:
        decision = plan.decide(syn("203.0.113.10:80"))
        assert (decision.outcome, plan.target(decision)) == (Outcome.STEER, "10.64.0.1:80")


def test_the_numbers_of_the_extension_are_the_configured_ones(tmp_path: Path) -> None:
    text = """
    [gateway.port_extension]
    ipv4_option = 0x9F
    exid = 0x1234
    [pools.p]
    prefixes = ["10.64.0.0/30"]
    [services.s]
    endpoints = ["203.0.113.10:80/tcp"]
    inspect = ["port-extension"]
    extension_pool = { pool = "p", by = "extension" }
    """
    numbers = NUMBERS._replace(ipv4_option=0x9F, exid=0x1234)
    with decider(tmp_path, text) as plan:
        ours = plan.decide(syn("203.0.113.10:80", ip_options=portext.encode_ipv4(Extension(2, 0), numbers)))
        assert (ours.reason, plan.target(ours)) == (Reason.ARITHMETIC, "10.64.0.1:same")
        assert plan.decide(syn("203.0.113.10:80", (2, 0))).reason is Reason.UNEXTENDED_UNMATCHED


def test_ranges_of_one_address_that_touch_are_told_apart(tmp_path: Path) -> None:
    services = "".join(
        f'[services.{name}]\nendpoints = ["203.0.113.10:{ports}/tcp"]\ndefault = "10.64.0.{index}:80"\n'
        'inspect = ["port-extension"]\nunextended = "default"\n'
        for index, (name, ports) in enumerate({"high": "101-200", "low": "1-99", "middle": "100"}.items())
    )
    with decider(tmp_path, f'[pools.p]\nprefixes = ["10.64.0.0/30"]\n{services}') as plan:
        found = {port: plan.decide(syn(f"203.0.113.10:{port}")).service for port in (1, 99, 100, 101, 200, 201)}
    assert found == {1: "low", 99: "low", 100: "middle", 101: "high", 200: "high", 201: ""}


# ---- datagrams ----

DATAGRAM_CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.prefixes]
endpoints = ["203.0.113.20:500/udp", "[2001:db8::20]:500/udp", "203.0.113.20:500/tcp"]
inspect = ["port-extension", "prefix"]
unmatched = "tls-alert"
extension_pool = { pool = "tenants", by = "extension", port = 9000 }
routes = [
    { when.prefix = "a", target = ["10.64.0.1:9000", "[fd00:64::1]:9000"] },
    { when.prefix = "ab", target = "10.64.0.2:9000" },
    { when.prefix = "a", source = "192.0.2.0/24", target = "10.64.0.3:9000" },
    { source = "192.0.2.128/25", target = "10.64.0.4:9000" },
]
[services.names]
endpoints = ["203.0.113.20:53/udp"]
inspect = ["dns"]
routes = [
    { when.dns.qname = "*.a.example", target = "10.64.0.1:53" },
    { when = { dns.qname = "*.a.example", dns.qtype = "AAAA" }, target = "10.64.0.2:53" },
]
[services.tunnels]
endpoints = ["203.0.113.20:51820/udp"]
inspect = ["wireguard"]
routes = [{ when.wireguard.public-key = "aGfFP/CshhRguvtn5UD4kh1DeIYBSOVotdR5YzEMADQ=", target = "10.64.0.1:51820" }]
[services.passing]
endpoints = ["203.0.113.20:22/udp"]
inspect = ["port-extension"]
unextended = "pass"
extension_pool = { pool = "tenants", by = "extension", port = 22 }
[services.quic]
endpoints = ["203.0.113.20:443/udp", "[2001:db8::20]:443/udp"]
inspect = ["quic"]
default = ["10.64.0.99:443", "[fd00:64::99]:443"]
routes = [
    { when.quic.sni = "a.example", target = ["10.64.0.1:443", "[fd00:64::1]:443"] },
    { when = { quic.sni = "a.example", quic.alpn = "hq" }, target = "10.64.0.2:443" },
    { when.quic.server-id = "0a0b", target = ["10.64.0.3:443", "[fd00:64::3]:443"] },
]
[services.quic.quic]
connection_ids = [
    { config = 0, server_id_length = 2, nonce_length = 4 },
    { config = 1, server_id_length = 2, nonce_length = 8, key = "00112233445566778899aabbccddeeff" },
]
"""
QUIC4, QUIC6 = "203.0.113.20:443", "[2001:db8::20]:443"
PREFIX4, PREFIX6 = "203.0.113.20:500", "[2001:db8::20]:500"
PLAIN, ENCRYPTED = quic_lb.Config(0, 2, 4), quic_lb.Config(1, 2, 8, bytes.fromhex("00112233445566778899aabbccddeeff"))


@pytest.fixture(scope="module")
def datagrams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decider]:
    with decider(tmp_path_factory.mktemp("state"), DATAGRAM_CONFIG) as made:
        yield made


def decided(
    plan: Decider, endpoint: str, *payloads: bytes, extension: tuple[int, int] | None = None, source: str | None = None
) -> tuple[Outcome, Reason, str | None] | Answer:
    """What becomes of a flow with these first datagrams, why, and where it goes."""
    last = syn(endpoint, extension, payload=payloads[-1], source=source, protocol=UDP)._replace(flags=0, seq=0)
    decision = plan.engine.decide_datagrams(last, payloads)
    if isinstance(decision, Answer):
        return decision
    return decision.outcome, decision.reason, plan.target(decision)


def steered(target: str, reason: Reason = Reason.ROUTE) -> tuple[Outcome, Reason, str | None]:
    return Outcome.STEER, reason, target


def dropped(reason: Reason = Reason.UNMATCHED) -> tuple[Outcome, Reason, str | None]:
    return Outcome.DROP, reason, None


def test_datagrams_by_their_first_bytes_source_and_extension(datagrams: Decider) -> None:
    decide = partial(decided, datagrams)
    assert decide(PREFIX4, b"a1") == steered("10.64.0.1:9000")
    assert decide(PREFIX6, b"a1") == steered("[fd00:64::1]:9000")
    assert decide(PREFIX4, b"abc") == steered("10.64.0.2:9000")
    assert decide(PREFIX6, b"abc") == dropped(Reason.NO_FAMILY)
    assert decide(PREFIX4, b"a1", source="192.0.2.1") == steered("10.64.0.3:9000")
    assert decide(PREFIX4, b"x", source="192.0.2.129") == steered("10.64.0.4:9000")
    assert decide(PREFIX4, b"x", extension=(5, 0)) == steered("10.64.0.4:9000", Reason.ARITHMETIC)
    assert decide(PREFIX6, b"x", extension=(5, 0)) == steered("[fd00:64::4]:9000", Reason.ARITHMETIC)
    assert decide(PREFIX4, b"a1", extension=(5, 0)) == steered("10.64.0.1:9000")
    assert decide("203.0.113.20:22", b"x", extension=(5, 0)) == steered("10.64.0.4:22", Reason.ARITHMETIC)
    assert decide("203.0.113.20:22", b"x") == (Outcome.PASS, Reason.UNEXTENDED_PASS, None)
    assert decide("203.0.113.20:501", b"a") == dropped(Reason.NO_ENDPOINT)


@pytest.mark.parametrize("unmatched", ["reset", "drop", "tls-alert"])
def test_a_datagram_is_refused_by_silence(tmp_path: Path, unmatched: str) -> None:
    with decider(tmp_path, DATAGRAM_CONFIG.replace("tls-alert", unmatched)) as plan:
        assert decided(plan, PREFIX4, b"x") == dropped()
        assert decided(plan, PREFIX6, b"abc") == dropped(Reason.NO_FAMILY)
        assert decided(plan, PREFIX4, b"") == dropped()


def test_a_decision_on_datagrams_says_which_parser_gave_its_keys(datagrams: Decider) -> None:
    query = bytes(DNS(rd=1, qd=DNSQR(qname="www.a.example", qtype="A")))
    for payload, parser in ((query, "dns"), (b"not a query", "")):
        packet = syn("203.0.113.20:53", payload=payload, protocol=UDP)
        decision = datagrams.engine.decide_datagrams(packet, [payload])
        assert isinstance(decision, Decision)
        assert decision.parser == parser


def test_each_query_by_its_name_and_type(datagrams: Decider) -> None:
    def ask(name: str, qtype: str = "A") -> object:
        return decided(datagrams, "203.0.113.20:53", bytes(DNS(rd=1, qd=DNSQR(qname=name, qtype=qtype))))

    assert ask("www.A.example") == ask("x.y.a.example") == steered("10.64.0.1:53")
    assert ask("www.a.example", "AAAA") == steered("10.64.0.2:53")
    assert ask("www.b.example") == ask("a.example") == dropped()
    assert decided(datagrams, "203.0.113.20:53", b"not a query") == dropped()
    assert datagrams.engine.decides_every_datagram(syn("203.0.113.20:53", protocol=UDP))
    assert not datagrams.engine.decides_every_datagram(syn(QUIC4, protocol=UDP))


def test_a_tunnel_by_the_public_key_that_its_handshake_is_for(datagrams: Decider) -> None:
    initiation = only(flows("wireguard")[0])
    assert decided(datagrams, "203.0.113.20:51820", initiation) == steered("10.64.0.1:51820")
    assert decided(datagrams, "203.0.113.20:51820", initiation[:-40] + bytes(40)) == dropped()


@pytest.mark.parametrize(("endpoint", "target"), [(QUIC4, "10.64.0.1:443"), (QUIC6, "[fd00:64::1]:443")])
def test_quic_by_the_name_in_a_hello_of_several_datagrams_in_any_order(
    datagrams: Decider, endpoint: str, target: str
) -> None:
    hello = initials.flight(initials.client_hello(b"a.example", b"h3", size=2700))
    assert len(hello) == 3
    for order in itertools.permutations(hello):
        assert decided(datagrams, endpoint, *order[:1]) is decided(datagrams, endpoint, *order[:2]) is Answer.NEED_MORE
        assert decided(datagrams, endpoint, *order) == steered(target)


def test_quic_by_other_keys_and_by_default(datagrams: Decider) -> None:
    default = steered("10.64.0.99:443", Reason.DEFAULT)

    def hello(name: bytes, protocol: bytes, version: int = initials.VERSION_1) -> object:
        flight = initials.flight(initials.client_hello(name, protocol), version=version)
        return decided(datagrams, QUIC4, *flight)

    assert hello(b"A.example", b"h3") == steered("10.64.0.1:443")
    assert hello(b"a.example", b"h3", initials.VERSION_2) == steered("10.64.0.1:443")
    assert hello(b"a.example", b"hq") == steered("10.64.0.2:443")
    assert hello(b"b.example", b"h3") == default
    assert decided(datagrams, QUIC4, initials.other(initials.INITIAL, 1100, version=0x1A2A3A4A)) == default
    assert decided(datagrams, QUIC4, b"not QUIC") == default


def short(connection_id: bytes) -> bytes:
    return b"\x40" + connection_id + bytes(30)


@pytest.mark.parametrize("config", [PLAIN, ENCRYPTED], ids=["plain", "encrypted"])
@pytest.mark.parametrize(("endpoint", "target"), [(QUIC4, "10.64.0.3:443"), (QUIC6, "[fd00:64::3]:443")])
def test_a_connection_from_nowhere_goes_where_its_server_id_says(
    datagrams: Decider, config: quic_lb.Config, endpoint: str, target: str
) -> None:
    def connection_id(server: bytes) -> bytes:
        return quic_lb.encode(config, server, bytes(range(7, 7 + config.nonce_length)))

    known, unknown = connection_id(b"\x0a\x0b"), connection_id(b"\x0a\x0c")
    assert decided(datagrams, endpoint, short(known)) == steered(target)
    assert decided(datagrams, endpoint, initials.other(initials.HANDSHAKE, 1100, dcid=known)) == steered(target)
    assert decided(datagrams, endpoint, short(unknown)) == dropped(Reason.UNKNOWN_CONNECTION)


@pytest.mark.parametrize(
    "datagram",
    [
        short(bytes.fromhex("e0" + "0a0b" * 6)),  # of no configuration
        short(bytes.fromhex("400a0b01020304")),
        initials.other(initials.HANDSHAKE, 1100),
        initials.other(initials.RETRY, 1100),
        initials.initial(initials.PING, keys_of=b"another", pad_to=1200),
    ],
    ids=["short", "short of a configuration that is not ours", "handshake", "retry", "initial"],
)
def test_an_unknown_connection_never_goes_to_the_default(datagrams: Decider, datagram: bytes) -> None:
    """That daemon would not know it either, and might end it."""
    assert decided(datagrams, QUIC4, datagram) == dropped(Reason.UNKNOWN_CONNECTION)


def test_an_unknown_connection_may_be_routed_by_its_source(tmp_path: Path) -> None:
    text = DATAGRAM_CONFIG.replace(
        '{ when.quic.sni = "a.example", target',
        '{ source = "192.0.2.0/24", target = "10.64.0.7:443" },\n    { when.quic.sni = "a.example", target',
    )
    with decider(tmp_path, text) as plan:
        unknown = short(bytes.fromhex("e0" + "0a0b" * 6))
        assert decided(plan, QUIC4, unknown, source="192.0.2.1") == steered("10.64.0.7:443")
        assert decided(plan, QUIC4, unknown) == dropped(Reason.UNKNOWN_CONNECTION)


def test_the_source_that_a_proxy_names_may_be_of_another_family_than_the_route_s_target(tmp_path: Path) -> None:
    text = """
[pools.p]
prefixes = ["10.64.0.0/24"]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["proxy", "http"]
trusted_proxies = ["198.51.100.0/24"]
routes = [{ when = { "http.host" = "a.example" }, source = "2001:db8:7::/48", target = "10.64.0.1:443" }]
"""
    with decider(tmp_path, text) as plan:
        for client, reason in (("2001:db8:7::1", Reason.ROUTE), ("2001:db8:8::1", Reason.UNMATCHED)):
            found = plan.first(WEB4, f"PROXY TCP6 {client} {client} 5555 443\r\n".encode() + REQUEST)
            assert found is not None
            assert found.reason is reason


NAMES_CONFIG = """
[pools.sites]
prefixes = ["10.64.0.0/24"]
[services.name]
endpoints = ["203.0.113.10:443/tcp", "203.0.113.10:443/udp"]
inspect = ["tls", "quic"]
routes = [
    { when = { tls.sni = "a.example" }, target = "10.64.0.1:443" },
    { when = { quic.sni = "a.example" }, target = "10.64.0.2:443" },
]
[services.protocol]
endpoints = ["203.0.113.11:443/tcp"]
inspect = ["tls"]
routes = [
    { when = { tls.sni = "a.example" }, target = "10.64.0.1:443" },
    { when = { tls.sni = "a.example", tls.alpn = "h2" }, target = "10.64.0.2:443" },
]
[services.group]
endpoints = ["203.0.113.12:443/tcp"]
inspect = ["tls"]
routes = [
    { when = { tls.sni = "a.example" }, choose = "hash", hash = "tls.alpn", target = ["10.64.0.1:1", "10.64.0.2:1"] },
    { when = { tls.sni = "b.example" }, choose = "hash", target = ["10.64.0.1:443", "10.64.0.2:443"] },
    { when = { tls.sni = "c.example" }, target = "10.64.0.3:443" },
]
"""


def long_hello(name: bytes) -> tuple[bytes, int]:
    """A TLS hello with a long extension behind its name, and where the name ends. It offers h2."""
    message = initials.client_hello(name, b"h2", size=2000, padding_first=False)
    data = b"\x16\x03\x01" + len(message).to_bytes(2) + message
    return data, data.index(name) + len(name)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decider]:
    with decider(tmp_path_factory.mktemp("state"), NAMES_CONFIG) as made:
        yield made


def test_where_only_the_name_counts_the_beginning_of_a_hello_suffices(names: Decider) -> None:
    data, end = long_hello(b"a.example")
    assert names.first("203.0.113.10:443", data[: end - 1]) is None
    early, whole = names.first("203.0.113.10:443", data[:end]), names.first("203.0.113.10:443", data)
    assert early is not None
    assert early == whole
    assert (names.target(early), early.keys) == ("10.64.0.1:443", {"tls.sni": "a.example"})


def test_of_quic_the_first_datagram_suffices(names: Decider) -> None:
    hello = initials.flight(initials.client_hello(b"a.example", b"h3", size=1700, padding_first=False))
    first, second = hello
    assert decided(names, "203.0.113.10:443", first) == steered("10.64.0.2:443")
    assert decided(names, "203.0.113.10:443", second) is Answer.NEED_MORE
    assert decided(names, "203.0.113.10:443", second, first) == steered("10.64.0.2:443")


def test_where_a_route_looks_at_more_the_hello_is_read_to_its_end(names: Decider) -> None:
    data, _ = long_hello(b"a.example")
    assert names.first("203.0.113.11:443", data[:-1]) is None
    found = names.first("203.0.113.11:443", data)
    assert found is not None
    assert names.target(found) == "10.64.0.2:443"


def test_a_group_that_chooses_by_another_key_has_the_hello_read_to_its_end(names: Decider) -> None:
    """No route says so: it is found when the group is met, and from then on."""
    for name in (b"b.example", b"c.example"):
        data, end = long_hello(name)
        assert names.first("203.0.113.12:443", data[:end]) is not None
    data, end = long_hello(b"a.example")
    assert names.first("203.0.113.12:443", data[:end]) is None
    found = names.first("203.0.113.12:443", data)
    assert found is not None
    assert found.keys["tls.alpn"] == "h2"
    assert found.outcome is Outcome.STEER
    data, end = long_hello(b"c.example")
    assert names.first("203.0.113.12:443", data[:end]) is None
