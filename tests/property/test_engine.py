"""The engine: arithmetic agrees with pools, and whatever a packet holds, there is a decision.

Plans go through the registry, so that what is tested is what workers read.
"""

from __future__ import annotations

import ipaddress
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerd import config
from steerd.config import Config
from steerd.control.registry import Reader, Registry
from steerd.core.choice import Chooser
from steerd.core.engine import NO_TARGET, Decision, Engine, Plan
from steerd.core.pools import Pool
from steerd.model import DEAD, DRAINED, TCP, UDP, Extension, Outcome, Reason
from steerd.wire import packet, portext

NUMBERS = portext.Numbers()
PACKETS_PER_PLAN = 400


@contextmanager
def published(text: str) -> Iterator[tuple[Config, Plan, Reader]]:
    with tempfile.TemporaryDirectory(prefix="steerd-test-") as directory:
        made = config.parse(text, "steerd.toml")
        registry = Registry(directory)
        registry.publish(made)
        registry.close()  # LMDB lets a process open an environment once
        reader = Reader(directory)
        try:
            yield made, reader.refresh(), reader
        finally:
            reader.close()


# Blocks of addresses far enough apart that no two prefixes overlap: number -> a prefix of its own /16 or /32.
prefix_lists = st.lists(
    st.tuples(st.sampled_from([4, 6]), st.integers(0, 9)), min_size=1, max_size=6
).map(
    lambda drawn: [
        f"10.{64 + number}.0.0/{32 - bits}" if version == 4 else f"fd00:{number}::/{128 - bits}"
        for number, (version, bits) in enumerate(drawn)
    ]
)  # fmt: skip


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    prefixes = tuple(ipaddress.ip_network(text) for text in draw(prefix_lists))
    whole = Pool("p", prefixes)
    counts = [count for version in (4, 6) if (count := whole.alias_count(version))]
    return whole._replace(size=draw(st.none() | st.integers(1, min(counts))))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_arithmetic_and_the_registry_give_the_address_that_the_pool_says(data: st.DataObject) -> None:
    pool = data.draw(pools())
    by_extended_port = data.draw(st.booleans())
    if by_extended_port:
        first = data.draw(st.integers(65537, 0xFFFFFFFF).filter(lambda number: number % 65536))
        port = data.draw(st.integers(1, 65535))
    else:
        first = data.draw(st.integers(1, 65535))
        port = data.draw(st.integers(0, 65535))
    by = "extended-port" if by_extended_port else "extension"
    written_port = port or '"same"'
    size = f"size = {pool.size}" if pool.size else ""
    text = f"""
    [pools.p]
    prefixes = {[str(prefix) for prefix in pool.prefixes]}
    {size}
    [services.s]
    endpoints = ["203.0.113.10:1-65535/tcp", "[2001:db8::10]:1-65535/tcp"]
    inspect = ["port-extension"]
    unextended = "unmatched"
    extension_pool = {{ pool = "p", by = "{by}", first = {first}, port = {written_port} }}
    """
    with published(text) as (_, plan, reader):
        mapping = plan.services[0].mapping
        assert mapping is not None
        for version in (4, 6):
            count = pool.alias_count(version)
            near = st.integers(-2, count + 2) | st.sampled_from([0, count - 1, count, -1])
            for index in data.draw(st.lists(near, min_size=1, max_size=30)):
                number = first + index
                dport = number % 65536 if by_extended_port else data.draw(st.integers(1, 65535))
                extension = number >> 16 if by_extended_port else number
                if not 0 <= extension <= 65535:
                    continue
                target_id = mapping.target_id(Extension(extension, 0), dport, version)
                if 0 <= index < count and extension:
                    assert reader.target(target_id) == (pool.address(version, index), port)
                else:
                    assert target_id == NO_TARGET


# ---- any packet, any plan ----

CHOICES = {
    "inspect": ['"port-extension"', '"http"', '"prefix"', '"port-extension", "http", "prefix"', '"prefix", "http"', ""],
    "default": ["", '"10.64.0.3:80"', '"[fd00:64::3]:same"', '["10.64.0.3:same", "[fd00:64::3]:80"]'],
    "target": ["10.64.0.1:81", "[fd00:64::1]:same"],
    "several": ['"10.64.0.1:81", "10.64.0.2:81"', '"[fd00:64::1]:81", "[fd00:64::2]:82", "[fd00:64::3]:81"'],
    "choose": ['"first-alive"', '"round-robin"', '"hash"', '"hash"\nhash = "http.host"'],
    "source": ["", 'source = "198.51.100.0/25"', 'source = "2001:db8:1::/64"'],
}
WHEN = {
    "port-extension": ['"portext.dst" = 2', '"portext.src" = 2', '"portext.port" = 131073'],
    "http": ['"http.host" = "a.example"', '"http.host" = "*.example"', '"http.path" = "/x*"'],
    "prefix": ['"prefix" = "GET "', '"prefix" = "G"'],
}
ENDPOINTS = ["203.0.113.10:{}/tcp", "[2001:db8::10]:{}/tcp"]
PAYLOADS = [
    b"",
    b"G",
    b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: b.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHo",
    b"SSH-2.0-x\r\n",
]


def some_configuration(rng: random.Random) -> str:
    """A right configuration of one to three services."""
    text = '[pools.p]\nprefixes = ["10.64.0.0/29", "fd00:64::/125"]\n'
    for number in range(rng.randint(1, 3)):
        inspect = rng.choice(CHOICES["inspect"])
        routes, arithmetic, unextended = "", "", None
        for when in (condition for word, some in WHEN.items() if word in inspect for condition in some):
            if rng.random() < 0.5:
                target = rng.choice(CHOICES["target"])
                source = rng.choice(CHOICES["source"][:2] if target[0] == "1" else CHOICES["source"][::2])
                routes += f"[[services.s{number}.routes]]\nwhen = {{ {when} }}\n{source}\n"
                if rng.random() < 0.3:
                    choose = rng.choice(CHOICES["choose"] if "http" in inspect else CHOICES["choose"][:3])
                    several = CHOICES["several"][target[0] != "1"]
                    routes += f"target = [{several}]\nchoose = {choose}\n"
                else:
                    routes += f'target = "{target}"\n'
        if "port-extension" in inspect:
            unextended = rng.choice(
                ["pass", "default", "unmatched", "inspect"][: 4 if "http" in inspect or "prefix" in inspect else 3]
            )
            if rng.random() < 0.7:
                by = rng.choice(['by = "extension"', f'by = "extended-port", first = {rng.choice([65537, 131070])}'])
                arithmetic = f'extension_pool = {{ pool = "p", {by}, port = 8080 }}\n'
        default = rng.choice(CHOICES["default"])
        if unextended == "default" or not (routes or arithmetic):
            default = default or CHOICES["default"][-1]
        ports = ["1-1000", "2000", "3000-65535"][number]
        endpoints = [endpoint.format(ports) for endpoint in ENDPOINTS]
        text += f"[services.s{number}]\nendpoints = {endpoints}\ninspect = [{inspect}]\n"
        text += f'unmatched = "{rng.choice(["reset", "drop"])}"\n{arithmetic}'
        text += f'unextended = "{unextended}"\n' if unextended else ""
        text += f"default = {default}\n" if default else ""
        text += routes
    return text


class States:
    """States of targets that change at random; most are fine."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._states: dict[int, int] = {}

    def get(self, target_id: int) -> int:
        if target_id not in self._states:
            self._states[target_id] = self._rng.choice((0, 0, 0, 0, 0, DRAINED, DEAD[TCP], DEAD[TCP], DEAD[UDP]))
        return self._states[target_id]

    def change(self) -> None:
        if self._rng.random() < 0.3:
            self._states.clear()


def some_packet(rng: random.Random) -> packet.Packet:
    """A packet near the endpoints, with options and payload from right to rubbish."""
    version = rng.choice((4, 6))
    extension = Extension(rng.choice((0, 1, 2, 3, 65535)), rng.choice((0, 2, 65535)))
    carriers = [
        portext.encode_ipv4(extension, NUMBERS),
        portext.encode_ipv6(extension, NUMBERS)[2:],
        portext.encode_tcp(extension, NUMBERS),
    ]

    def area(carrier: bytes) -> bytes:
        mutable = bytearray(rng.choice((b"", b"\x01", carrier, carrier, carrier + carrier)))
        if mutable and rng.random() < 0.3:
            mutable[rng.randrange(len(mutable))] = rng.randrange(256)
        return bytes(mutable[: rng.randint(0, 40)] if rng.random() < 0.2 else mutable)

    payload = rng.choice(PAYLOADS)
    if rng.random() < 0.2:
        payload = payload[: rng.randint(0, len(payload))] + rng.randbytes(rng.randint(0, 8))
    prefixes = (
        (b"\xc6\x33\x64", b"\xcb\x00\x71") if version == 4 else (b"\x20\x01\x0d\xb8\x00\x01", b"\x20\x01\x0d\xb8")
    )
    size = 4 if version == 4 else 16
    hosts = (rng.choice((10, 200)), rng.choice((10, 16)) if rng.random() < 0.1 else 10 if version == 4 else 16)
    src, dst = (
        prefix + bytes(size - 1 - len(prefix)) + bytes([host]) for prefix, host in zip(prefixes, hosts, strict=True)
    )
    return packet.Packet(
        version, src, dst, 17 if rng.random() < 0.05 else 6, rng.randrange(65536),
        rng.choice((0, 1, 1, 2, 2, 1000, 1001, 2000, 3000, 65534, 65535)), packet.SYN, rng.getrandbits(32), 0,
        area(carriers[0]) if version == 4 else b"", area(carriers[1]) if version == 6 else b"",
        area(carriers[2]), payload,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_packet_there_is_a_decision_that_keeps_the_plans_word(seed: int) -> None:
    rng = random.Random(seed)
    with published(some_configuration(rng)) as (made, plan, reader):
        states = States(rng)
        engine = Engine(plan, reader.route, state=states.get, chooser=Chooser(reader.group, states.get))
        services = {service.name: service for service in made.services}
        for _ in range(PACKETS_PER_PLAN):
            syn = some_packet(rng)
            states.change()
            decision = engine.decide_syn(syn)
            if decision.reason is Reason.NO_ENDPOINT:
                assert decision == Decision(Outcome.DROP, Reason.NO_ENDPOINT)
                continue
            service = services[decision.service]
            assert any(
                e.address.packed == syn.dst and e.protocol == syn.protocol and e.first_port <= syn.dport <= e.last_port
                for e in service.endpoints
            )
            if decision.outcome is not Outcome.STEER:
                assert decision.target_id == NO_TARGET
                named = {Reason.UNEXTENDED_PASS: Outcome.PASS, Reason.LATE: Outcome.LATE}
                assert decision.outcome is named.get(decision.reason, service.unmatched)
                assert decision.outcome is not Outcome.LATE or service.is_late
                continue
            target = reader.target(decision.target_id)
            assert target is not None
            assert target.address.version == syn.version
            assert not states.get(decision.target_id) & DRAINED
            if decision.reason is Reason.ARITHMETIC:
                assert target.address in made.pools["p"]
            elif decision.reason is Reason.ROUTE:
                several = any(route.choice for route in service.routes if target in route.targets)
                assert target.port == 81 or not several or not states.get(decision.target_id) & DEAD[syn.protocol]
                assert target in {target for route in service.routes for target in route.targets}
            else:
                assert decision.reason in (Reason.DEFAULT, Reason.UNEXTENDED_DEFAULT)
                assert target in service.default
