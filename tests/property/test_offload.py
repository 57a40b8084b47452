"""What the kernel steers by itself goes where the engine would steer it: for random plans and packets, a model of the
rules in nft/steerd.nft (`limit4`, `limit6`, `offload4`, `offload6`) finds what workers put there, or nothing.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from steerd.core.choice import Chooser
from steerd.core.engine import NO_TARGET, Engine
from steerd.core.offload import decides_by_extension, key
from steerd.core.router import Part, Probe
from steerd.core.sessions import SessionsPlan
from steerd.model import Extension, Match, Outcome
from steerd.wire import packet as wire
from steerd.wire import portext
from tests.property.test_engine import NUMBERS, PAYLOADS, States, published, some_configuration

PACKETS_PER_PLAN = 500
TIMESTAMPS = b"\x02\x04\x05\xb4\x04\x02\x08\x0a\x00\x53\x54\x01\x00\x00\x00\x00\x01\x03\x03\x07"
NO_TIMESTAMPS = b"\x02\x04\x05\xb4\x01\x01\x04\x02\x01\x03\x03\x07"


def kernel_key(raw: bytes) -> bytes | None:
    """What the rules make of a packet: the key that they look up; None if no rule gets so far."""
    if raw[0] >> 4 == 4:  # ip hdrlength 7
        start, key, length = 28, raw[16:20] + raw[30:32] + b"\0\0" + raw[20:26] + b"\0\0", raw[2:4]
        matches = raw[0] & 15 == 7 and raw[9] == 6
    else:  # ip6 nexthdr 60 @nh,400,16 0x0104; the keys in the map all say that TCP comes next, and where
        start, key, length = 56, raw[24:40] + raw[58:60] + b"\0\0" + raw[40:48], raw[4:6]
        matches = raw[6] == 60 and raw[50:52] == b"\x01\x04" and raw[40:42] == b"\x06\x01"
    if not matches or len(raw) < start + 20:
        return None
    tcp = raw[start:]
    for doff, options in ((10, {20: b"\x02\x04", 24: b"\x04\x02\x08\x0a", 36: b"\x01\x03\x03"}),
                          (8, {20: b"\x02\x04", 24: b"\x01\x01\x04\x02", 28: b"\x01\x03\x03"})):  # fmt: skip
        whole = doff * 4 + (start if start == 28 else 16)
        if (
            int.from_bytes(length, "big") == whole
            and tcp[12] >> 4 == doff
            and tcp[13] & 0x17 == wire.SYN
            and all(tcp[at : at + len(bytes_)] == bytes_ for at, bytes_ in options.items())
        ):
            return key
    return None


def changed(rng: random.Random, data: bytes) -> bytes:
    """The same bytes, or others of the same length."""
    if not data or rng.random() < 0.85:
        return data
    mutable = bytearray(data)
    mutable[rng.randrange(len(mutable))] = rng.choice(
        (0, 1, 2, 4, 6, 8, 0x1E, 0x9E, 0x53, 0x54, 253, rng.randrange(256))
    )
    return bytes(mutable)


def some_syn(rng: random.Random) -> bytes:
    """An IP packet near to what the kernel's rules match, with right lengths and wrong checksums."""
    extension = Extension(rng.choice((0, 1, 1, 2, 2, 3, 65535)), rng.choice((0, 0, 2, 65535)))
    ours = portext.encode_tcp(extension, NUMBERS)
    tcp_options = changed(rng, rng.choice((
        TIMESTAMPS, TIMESTAMPS, TIMESTAMPS, NO_TIMESTAMPS, ours + NO_TIMESTAMPS, NO_TIMESTAMPS + ours, b"",
        TIMESTAMPS, TIMESTAMPS, TIMESTAMPS, TIMESTAMPS[:8] + ours + TIMESTAMPS[16:],
        NO_TIMESTAMPS[:8] + b"\xfd\x10\x53\x54", TIMESTAMPS[:16] + b"\xfd\x05\x53\x54",
    )))  # fmt: skip
    payload = rng.choice(PAYLOADS) if rng.random() < 0.1 else b""
    ports = rng.randrange(65536).to_bytes(2, "big") + rng.choice((1, 1, 1, 1, 1, 2, 2000, 65535)).to_bytes(2, "big")
    tcp = ports + rng.randbytes(8) + bytes([(20 + len(tcp_options)) << 2, wire.SYN | rng.choice((0, 0xC0))])
    tcp += rng.randbytes(6) + tcp_options + payload
    host = rng.choice((10, 10, 10, 10, 200))
    if rng.random() < 0.5:
        one = portext.encode_ipv4(extension, NUMBERS)
        option = changed(
            rng,
            rng.choice((one, one, one, one, one, one, b"\1\1\1\1" + one, one + one, one + b"\0\0\0\0", b"\1" * 8, b"")),
        )
        head = bytes((0x45 + len(option) // 4, 0)) + (20 + len(option) + len(tcp)).to_bytes(2, "big")
        addresses = b"\xc6\x33\x64" + bytes([host]) + b"\xcb\x00\x71\x0a"
        return head + b"\0\0\0\0\x40\x06\0\0" + addresses + option + tcp
    one = b"\x06" + portext.encode_ipv6(extension, NUMBERS)[1:]
    inner = one[2:10]
    area = changed(rng, rng.choice((
        one, one, one, b"\x06\x01" + bytes(6) + inner, b"\x06\x01\x01\x04\0\0\0\0" + inner, b"\x3c" + one[1:] + one,
        b"\x06\x01\0\0\0\0" + inner + b"\0\0", b"\x06\x02" + inner + one[10:] + inner,
    )))  # fmt: skip
    head = b"\x60\0\0\0" + (len(area) + len(tcp)).to_bytes(2, "big") + bytes((rng.choice((60, 60, 60, 0, 43)), 64))
    addresses = (
        bytes.fromhex("20010db80001") + bytes(9) + bytes([host]) + bytes.fromhex("20010db8") + bytes(11) + b"\x10"
    )
    return head + addresses + area + tcp


class Told(NamedTuple):
    """What became of the packets of one plan."""

    put: int
    answered: int


def configuration_with_answers(rng: random.Random) -> str:
    """One whose first service has an extension_pool, and whose routes ask for no source."""
    while True:
        text = some_configuration(rng)
        first = text.partition("[services.s1]")[0]
        if "extension_pool" in first and "source =" not in first and "portext.src" not in first:
            return text


def told_and_answered(rng: random.Random) -> Told:
    """Every packet of a plan, each decided by the engine, and by what the kernel holds by then."""
    put = answered = 0
    with published(configuration_with_answers(rng) if rng.random() < 0.7 else some_configuration(rng)) as (
        _,
        plan,
        reader,
    ):
        states = States(rng)
        engine = Engine(plan, reader.route, state=states.get, chooser=Chooser(reader.group, states.get))
        maps: dict[bytes, int] = {}
        for _ in range(PACKETS_PER_PLAN):
            if rng.random() < 0.02:
                states.change()
                maps.clear()
            raw = some_syn(rng)
            packet = wire.parse(raw)
            looked_up = kernel_key(raw)
            by_kernel = None if looked_up is None else maps.get(looked_up)
            if by_kernel is not None:
                assert packet is not None
                decision = engine.decide_syn(packet)
                assert (decision.outcome, decision.target_id) == (Outcome.STEER, by_kernel), raw.hex()
                answered += 1
                continue
            if packet is None:
                continue
            steered = engine.decide_syn(packet).outcome is Outcome.STEER
            target_id, mine = engine.lasting_target(packet), key(packet, plan.numbers)
            if steered and mine is not None and target_id != NO_TARGET:
                maps[mine] = target_id
                put += 1
    return Told(put, answered)


def test_the_kernel_steers_as_the_engine_or_not_at_all() -> None:
    rng = random.Random(7)
    told = [told_and_answered(rng) for _ in range(30)]
    assert sum(one.put > 0 for one in told) > 15
    assert sum(one.answered for one in told) > 150


def test_the_kernel_recognises_what_was_put_for_it() -> None:
    for version, header in ((4, bytes.fromhex("4700")), (6, bytes.fromhex("6000"))):
        rng = random.Random(version)
        found = [
            (raw, packet) for _ in range(3000) if (packet := wire.parse(raw := some_syn(rng))) and raw[0] == header[0]
        ]
        keys = [(kernel_key(raw), key(packet, NUMBERS)) for raw, packet in found]
        assert all(theirs in (None, ours) for theirs, ours in keys if ours is not None)
        assert sum(ours is not None and theirs == ours for theirs, ours in keys) > 100


def probe(*keys: str, source_width: int = 0) -> Probe:
    return Probe(b"\0\0\0\1", tuple(Part(name, Match.EXACT, 0) for name in sorted(keys)), source_width, 0)


@pytest.mark.parametrize(
    ("probes", "expected"),
    [
        ([], True),
        ([probe("portext.dst"), probe("portext.port")], True),
        ([probe("http.host")], True),
        ([probe("http.host", source_width=4)], True),
        ([probe("http.host", "portext.src")], True),
        ([probe("portext.src")], False),
        ([probe("portext.dst", "portext.src")], False),
        ([probe("portext.dst"), probe("portext.dst", source_width=4)], False),
        ([probe(source_width=16)], False),
    ],
)
def test_routes_that_ask_for_the_source_leave_it_to_workers(probes: list[Probe], expected: bool) -> None:
    assert decides_by_extension(probes, None) is expected


def test_a_session_id_that_is_an_extension_leaves_it_to_workers() -> None:
    assert not decides_by_extension([], SessionsPlan("portext.src", "allow"))
    assert decides_by_extension([], SessionsPlan("http.cookie.id", "allow"))


@pytest.mark.parametrize("option", [1, 2, 4, 8])
def test_a_tcp_option_of_ours_among_the_usual_ones_leaves_it_to_workers(option: int) -> None:
    rng = random.Random(1)
    packets = [packet for _ in range(500) if (packet := wire.parse(some_syn(rng)))]
    assert any(key(packet, NUMBERS) for packet in packets)
    assert not any(key(packet, NUMBERS._replace(tcp_option=option)) for packet in packets)
