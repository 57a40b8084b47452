"""What every parser promises (`wire/parser.py`), swept over the registry, and what option reading promises.

A parser that is added to the registry is tested here without a change; files in tests/vectors (for datagrams: in
tests/vectors/udp) that begin with its name are mutated for it.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerd.model import TCP, UDP, Answer, Extension, Keys
from steerd.wire import packet, portext
from steerd.wire.portext import MALFORMED, Numbers
from steerd.wire.registry import DATAGRAMS, REGISTRY, DatagramParser, Inspect, InspectDatagrams, Parser
from tests.flows import flow, flows

VECTORS = Path(__file__).parent.parent / "vectors"
PATTERNS = ("", "G", "GET /", "GET /api", "SSH-2.0-", "\x16\x03\x01", "\xff")
PUBLIC_KEY = "aGfFP/CshhRguvtn5UD4kh1DeIYBSOVotdR5YzEMADQ="
PATTERN_SETS: tuple[tuple[str, ...], ...] = ((), PATTERNS[1:], PATTERNS)
"""What services' routes may compare a parser's keys with: nothing, or something."""
PATTERN_SETS_OF: dict[str, tuple[tuple[str, ...], ...]] = {
    "wireguard": ((), (PUBLIC_KEY,), ("A" * 43 + "=", PUBLIC_KEY)),
}
"""The same for parsers to which not every text is a value."""
FUZZED_PACKETS = 150_000

parsers = pytest.mark.parametrize("parser", REGISTRY.values(), ids=REGISTRY.keys())


def examples(parser: Parser) -> list[bytes]:
    """Real beginnings of the parser's protocol, for mutation."""
    files = sorted(VECTORS.glob(f"{parser.name}-*.bin"))
    return [file.read_bytes() for file in files] or [pattern.encode("latin-1") + b"more" for pattern in PATTERNS]


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A real example with some stretches replaced, removed or doubled, and something behind it."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 8)))
        data[start:end] = draw(st.binary(max_size=4) | st.sampled_from([b"\r", b"\n", b"\r\n", b" ", b":", b"\x00"]))
    return bytes(data) + draw(st.binary(max_size=20))


def inputs(parser: Parser) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=200) | mutated(examples(parser))


def inspectors(parser: Parser) -> list[Inspect]:
    """The parser as services make it: without routes of its own, and with some; and its brief reading."""
    brief = [parser.brief.inspect] if parser.brief else []
    return [parser.make(patterns) for patterns in PATTERN_SETS] + brief


def check_form(parser: Parser | DatagramParser, answer: Keys | Answer) -> None:
    """An answer is one of the two words, or keys that the parser has announced, with text of single bytes."""
    if isinstance(answer, Answer):
        return
    assert all(parser.gives(key) for key in answer)
    assert all(text.isascii() or max(text) <= "\xff" for text in answer.values())


@parsers
def test_the_answer_does_not_depend_on_how_the_bytes_were_cut(parser: Parser) -> None:
    """The first answer other than NEED_MORE is the answer for every longer input, byte by byte."""

    @settings(max_examples=200, deadline=None)
    @given(inputs(parser))
    def check(data: bytes) -> None:
        for inspect in inspectors(parser):
            final: Keys | Answer = Answer.NEED_MORE
            for length in range(len(data) + 1):
                answer = inspect(data[:length])
                check_form(parser, answer)
                assert final is Answer.NEED_MORE or answer == final, (length, final, answer)
                final = answer

    check()


def check_brief(keys: tuple[str, ...], brief: Keys | Answer, long: Keys | Answer) -> None:
    """What a brief reading may say where the long one says this."""
    if isinstance(long, dict):
        assert brief == {key: text for key, text in long.items() if key in keys}
        return
    assert brief is not Answer.NEED_MORE or long is Answer.NEED_MORE
    assert isinstance(brief, Answer) or brief.keys() <= set(keys)


@pytest.mark.parametrize("parser", [p for p in REGISTRY.values() if p.brief], ids=lambda parser: parser.name)
def test_a_brief_reading_gives_the_same_keys(parser: Parser) -> None:
    assert parser.brief is not None
    keys, inspect_briefly = parser.brief
    assert all(parser.gives(key) for key in keys)

    @settings(max_examples=500, deadline=None)
    @given(inputs(parser))
    def check(data: bytes) -> None:
        check_brief(keys, inspect_briefly(data), parser.make(())(data))

    check()


@parsers
def test_real_beginnings_are_understood(parser: Parser) -> None:
    inspect = parser.make(PATTERNS)
    assert all(isinstance(inspect(data), dict) for data in examples(parser))


@parsers
def test_the_bound_is_kept(parser: Parser) -> None:
    """With `bound` bytes there is an answer, and no byte behind them changes it."""

    @settings(max_examples=100, deadline=None)
    @given(inputs(parser), st.binary(min_size=1, max_size=8), st.binary(max_size=40))
    def check(data: bytes, filler: bytes, behind: bytes) -> None:
        at_bound = (data + filler * parser.bound)[: parser.bound]
        for inspect in inspectors(parser):
            answer = inspect(at_bound)
            assert answer is not Answer.NEED_MORE
            assert inspect(at_bound + behind) == answer

    check()


# Datagrams

datagram_parsers = pytest.mark.parametrize("parser", DATAGRAMS.values(), ids=DATAGRAMS.keys())


def example_flows(parser: DatagramParser) -> list[list[bytes]]:
    """Real beginnings of flows."""
    read = [flow(name) for name in flows(parser.name)]
    return read or [[pattern.encode("latin-1") + b"more"] for pattern in PATTERNS]


def flows_of(parser: DatagramParser) -> st.SearchStrategy[list[bytes]]:
    """Datagrams of real flows, some of them mutated or cut short, in any order and any number, others among them."""
    originals = [datagram for datagrams in example_flows(parser) for datagram in datagrams]
    datagram = st.binary(max_size=100) | st.sampled_from(originals) | mutated(originals) | cut(originals)
    return st.lists(datagram, min_size=1, max_size=6) | st.permutations([*originals[:8], b""])


@st.composite
def cut(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    data = draw(st.sampled_from(originals))
    return data[: draw(st.integers(0, len(data)))]


def datagram_inspectors(parser: DatagramParser) -> list[InspectDatagrams]:
    brief = [parser.brief.inspect] if parser.brief else []
    return [parser.make(patterns) for patterns in PATTERN_SETS_OF.get(parser.name, PATTERN_SETS)] + brief


@pytest.mark.parametrize("parser", [p for p in DATAGRAMS.values() if p.brief], ids=lambda parser: parser.name)
def test_a_brief_reading_of_datagrams_gives_the_same_keys(parser: DatagramParser) -> None:
    assert parser.brief is not None
    keys, inspect_briefly = parser.brief
    assert all(parser.gives(key) for key in keys)

    @settings(max_examples=200, deadline=None)
    @given(flows_of(parser))
    def check(datagrams: list[bytes]) -> None:
        check_brief(keys, inspect_briefly(datagrams), parser.make(())(datagrams))

    check()


@datagram_parsers
def test_an_answer_holds_for_every_continuation_of_the_flow(parser: DatagramParser) -> None:
    @settings(max_examples=200, deadline=None)
    @given(flows_of(parser))
    def check(datagrams: list[bytes]) -> None:
        for inspect in datagram_inspectors(parser):
            final: Keys | Answer = Answer.NEED_MORE
            for count in range(1, len(datagrams) + 1):
                answer = inspect(datagrams[:count])
                check_form(parser, answer)
                assert final is Answer.NEED_MORE or answer == final, (count, final, answer)
                final = answer

    check()


@datagram_parsers
def test_the_bound_of_datagrams_is_kept(parser: DatagramParser) -> None:
    """With `datagrams` of them there is an answer, whatever they are and however often one is there."""

    @settings(max_examples=100, deadline=None)
    @given(flows_of(parser))
    def check(datagrams: list[bytes]) -> None:
        at_bound = (datagrams * parser.datagrams)[: parser.datagrams]
        for inspect in datagram_inspectors(parser):
            answer = inspect(at_bound)
            assert answer is not Answer.NEED_MORE
            assert inspect(at_bound + datagrams) == answer

    check()


@datagram_parsers
def test_real_flows_are_understood(parser: DatagramParser) -> None:
    inspect = datagram_inspectors(parser)[-1]
    assert all(isinstance(inspect(datagrams), dict) for datagrams in example_flows(parser))


# Option reading

u16 = st.integers(0, 0xFFFF)
extensions = st.builds(Extension, u16, u16)
option_types = st.integers(2, 255)
numbers = st.builds(Numbers, option_types, option_types, option_types, u16)


def tcp(options: bytes) -> bytes:
    """A SYN's TCP header; options in whole 32-bit words."""
    return struct.pack("!HHIIBBHHH", 40000, 443, 1, 0, (20 + len(options)) // 4 << 4, packet.SYN, 65535, 0, 0) + options


def udp(payload: bytes) -> bytes:
    """A datagram."""
    return struct.pack("!HHHH", 40000, 443, 8 + len(payload), 0) + payload


def ipv4(options: bytes, body: bytes, protocol: int = TCP) -> bytes:
    header = 20 + len(options)
    start = struct.pack("!BBHHHBBH", 0x40 | header // 4, 0, header + len(body), 0, 0, 64, protocol, 0)
    return start + bytes([198, 51, 100, 7, 203, 0, 113, 10]) + options + body


def ipv6(extension_headers: list[tuple[int, bytes]], body: bytes, protocol: int = TCP) -> bytes:
    """Extension headers as (their own type, their bytes); the first byte of each is set to what follows it."""
    types = [number for number, _ in extension_headers] + [protocol]
    headers = (header for _, header in extension_headers)
    chain = b"".join(bytes([following]) + header[1:] for following, header in zip(types[1:], headers, strict=True))
    return struct.pack("!IHBB", 6 << 28, len(chain) + len(body), types[0], 64) + bytes(32) + chain + body


def found_in(data: bytes, known: Numbers) -> object:
    read = packet.parse(data)
    assert read is not None
    return portext.find(read, known)


@settings(max_examples=300, deadline=None)
@given(extensions, numbers)
def test_what_is_encoded_is_found(extension: Extension, known: Numbers) -> None:
    expected = None if extension == (0, 0) else extension
    by_ipv4, by_tcp = portext.encode_ipv4(extension, known), portext.encode_tcp(extension, known)
    header = portext.encode_ipv6(extension, known)
    assert found_in(ipv4(by_ipv4, tcp(b"")), known) == expected
    assert found_in(ipv4(b"", tcp(by_tcp)), known) == expected
    assert found_in(ipv6([(packet.DESTINATION_OPTIONS, header)], tcp(b"")), known) == expected
    assert found_in(ipv6([], tcp(by_tcp)), known) == expected
    assert found_in(ipv4(by_ipv4, tcp(by_tcp)), known) is MALFORMED
    assert found_in(ipv6([(packet.DESTINATION_OPTIONS, header)] * 2, tcp(b"")), known) is MALFORMED


@settings(max_examples=300, deadline=None)
@given(extensions, numbers, st.binary(max_size=40))
def test_what_is_encoded_is_found_in_datagrams(extension: Extension, known: Numbers, payload: bytes) -> None:
    expected = None if extension == (0, 0) else extension
    option, header = portext.encode_ipv4(extension, known), portext.encode_ipv6(extension, known)
    for data in (ipv4(option, udp(payload), UDP), ipv6([(packet.DESTINATION_OPTIONS, header)], udp(payload), UDP)):
        read = packet.parse(data)
        assert read is not None
        assert read.payload == payload
        assert portext.find(read, known) == expected
    assert found_in(ipv4(option + option, udp(payload), UDP), known) is MALFORMED
    assert found_in(ipv6([(packet.DESTINATION_OPTIONS, header)] * 2, udp(payload), UDP), known) is MALFORMED
    # What a payload holds is no option.
    assert found_in(ipv4(b"", udp(option + payload), UDP), known) is None
    assert found_in(ipv6([], udp(header + payload), UDP), known) is None


@settings(max_examples=300, deadline=None)
@given(u16, st.integers(1, 0xFFFF))
def test_split_is_the_inverse_of_the_extended_port(extension: int, port: int) -> None:
    assert portext.split(extension * 65536 + port) == (extension, port)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from([b"", b"\x45", b"\x4f", b"\x60"]), st.binary(max_size=120))
def test_arbitrary_bytes_never_raise(beginning: bytes, rest: bytes) -> None:
    data = beginning + rest
    read = packet.parse(data)
    if read is not None:
        assert read.payload in data
        assert portext.find(read, Numbers()) is not Extension(0, 0)


def fuzzed(count: int) -> Iterator[bytes]:
    """`count` packets: extended SYNs of both families and all carriers with bytes changed, removed or inserted, in the
    option areas more often than elsewhere. The same ones in every run."""
    chance = random.Random(4727)
    known = Numbers()
    ours = Extension(7, 9)
    destination = portext.encode_ipv6(ours, known)
    usual = bytes.fromhex("020405b4 0402 080a0000000100000000 01 030307")
    seeds = [
        ipv4(portext.encode_ipv4(ours, known), tcp(usual)),
        ipv4(b"\x94\x04\x00\x00" + portext.encode_ipv4(ours, known) * 2, tcp(b"")),
        ipv4(b"", tcp(usual + portext.encode_tcp(ours, known))),
        ipv4(b"", tcp(portext.encode_tcp(ours, known) * 2)),
        ipv6([], tcp(usual + portext.encode_tcp(ours, known))),
        ipv6([(60, destination)], tcp(usual)),
        ipv6([(0, bytes(8)), (60, destination), (43, bytes(8)), (44, bytes(8)), (60, destination)], tcp(usual)),
        ipv6([(60, destination)] * 9, tcp(b"")),
        ipv4(portext.encode_ipv4(ours, known), udp(b"hello"), UDP),
        ipv6([(60, destination)], udp(b"hello"), UDP),
    ]
    interesting = (0, 1, 2, 3, 4, 6, 8, 0x1E, 0x3C, 0x53, 0x54, 0x9E, 0xFD, 0xFF)
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(20 if chance.random() < 0.8 else 0, len(data))
            way = chance.random()
            if way < 0.6:
                data[at] = chance.choice(interesting)
            elif way < 0.8:
                del data[at : at + chance.randrange(1, 9)]
            else:
                data[at:at] = bytes(chance.randrange(1, 5))
            if len(data) <= 20:
                break
        yield bytes(data)


def test_fuzzed_options_never_raise_and_never_read_outside() -> None:
    known = Numbers()
    outcomes = {"unreadable": 0, "none": 0, "malformed": 0, "extension": 0}
    for data in fuzzed(FUZZED_PACKETS):
        read = packet.parse(data)
        if read is None:
            outcomes["unreadable"] += 1
            continue
        assert len(read.ip_options) <= 40
        assert len(read.tcp_options) <= 40
        assert read.payload in data
        found = portext.find(read, known)
        if isinstance(found, Extension):
            outcomes["extension"] += 1
            carried = struct.pack("!HHH", known.exid, *found)
            assert carried in read.ip_options or carried in read.dst_options or carried in read.tcp_options
        else:
            outcomes["none" if found is None else "malformed"] += 1
    assert sum(outcomes.values()) == FUZZED_PACKETS
    assert min(outcomes.values()) > FUZZED_PACKETS // 100, f"the packets are too much alike: {outcomes}"
