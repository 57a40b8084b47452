"""What `wire.quic` promises of any datagrams: no bytes make it raise, its bounds hold, and neither the order of the
datagrams nor the way a hello is cut into CRYPTO frames changes the answer."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from steerd.model import Answer, Keys
from steerd.wire.parser import History
from steerd.wire.quic import DATAGRAM_BOUND, DATAGRAMS, Assembly, Found, LongHeader, ShortHeader, header, inspect
from tests import initials
from tests.flows import flow, flows
from tests.initials import VERSION_1, VERSION_2, client_hello, crypto, datagram

REAL = [one for name in flows("quic") for one in flow(name)]
HELLOS = [client_hello(name, b"h3", size=size) for name in (b"a.example", b"b.example") for size in (0, 300, 1900)]

versions = st.sampled_from([VERSION_1, VERSION_2])
connection_ids = st.binary(max_size=20)
noise = st.sampled_from(
    [b"", initials.PADDING * 5, initials.PING, initials.ack(3, (1, 1)), initials.close(0, b"bye"), crypto(77, b"")]
)


@st.composite
def pieces(draw: st.DrawFn, hello: bytes) -> list[tuple[int, bytes]]:
    """A hello cut anywhere into CRYPTO frames, some of them overlapping and some twice, in any order."""
    cuts = sorted(draw(st.sets(st.integers(1, len(hello) - 1), max_size=12)))
    bounds = list(zip([0, *cuts], [*cuts, len(hello)], strict=True))
    more = draw(st.lists(st.tuples(st.integers(0, len(hello)), st.integers(0, len(hello))), max_size=4))
    bounds += [(min(pair), max(pair)) for pair in more]
    # Of the size that a datagram holds.
    short = [(at, min(at + 900, end)) for start, end in bounds for at in range(start, end, 900)]
    return [(start, hello[start:end]) for start, end in draw(st.permutations(short))]


@st.composite
def first_flights(draw: st.DrawFn, hello: bytes) -> list[bytes]:
    """Datagrams that carry all of a hello, one or more frames each, and 0-RTT among them."""
    version, dcid = draw(versions), draw(connection_ids)
    made: list[bytes] = []
    frames = b""
    for number, piece in enumerate(draw(pieces(hello))):
        frames += draw(noise) + crypto(*piece)
        if len(frames) > 600 or draw(st.booleans()):
            made.append(datagram(frames, version=version, dcid=dcid, number=number))
            frames = b""
    made.append(datagram(frames + draw(noise), version=version, dcid=dcid, number=100))
    early = initials.other(initials.ZERO_RTT, 200, version=version, dcid=dcid)
    return draw(st.permutations([*made, *[early] * draw(st.integers(0, 2))]))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HELLOS), st.data())
def test_any_order_and_any_cut_give_the_same_answer(hello: bytes, data: st.DataObject) -> None:
    datagrams = data.draw(first_flights(hello))
    assembly = Assembly()
    answers = [assembly.feed(one) for one in datagrams]
    decided = [answer for answer in answers if answer is not Answer.NEED_MORE]
    assert answers == [Answer.NEED_MORE] * (len(answers) - len(decided)) + decided
    assert decided
    assert all(answer == decided[0] for answer in decided)
    expected = inspect(initials.flight(hello, cut=800))
    assert isinstance(expected, dict)
    assert isinstance(decided[0], dict)
    assert without_header(decided[0]) == without_header(expected)


def without_header(keys: Keys) -> Keys:
    return {name: value for name, value in keys.items() if name not in ("quic.dcid", "quic.version")}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(HELLOS), st.data())
def test_a_hello_with_a_byte_changed_is_never_read_as_the_other(hello: bytes, data: st.DataObject) -> None:
    """All of the hello is there twice, once with one other byte: whatever the cut and the order, the two contradict
    each other, or one is complete before a byte of the other has come."""
    at = data.draw(st.integers(0, len(hello) - 1))
    changed = hello[:at] + bytes([hello[at] ^ 1 << data.draw(st.integers(0, 7))]) + hello[at + 1 :]
    both = data.draw(st.permutations(data.draw(pieces(hello)) + data.draw(pieces(changed))))
    made = [datagram(crypto(*piece), number=number) for number, piece in enumerate(both)]
    answer = inspect(made)
    honest = [inspect(initials.flight(one)) for one in (hello, changed)]
    assert answer is Answer.NOT_MINE or answer in honest


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A real datagram with some stretches replaced, removed or doubled, in its header more often than elsewhere."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, min(30, len(data))) | st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 8)))
        data[start:end] = draw(st.binary(max_size=8))
    return bytes(data)


FRAMES = [crypto(0, hello[:900]) for hello in HELLOS] + [crypto(900, hello[900:1900]) for hello in HELLOS[2::3]]


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """What may be in an Initial that is protected rightly: anything."""
    return b"".join(draw(st.lists(st.binary(max_size=60) | mutated(FRAMES) | noise, max_size=4)))[:1200]


@st.composite
def protected(draw: st.DrawFn) -> bytes:
    """Coalesced Initials of one connection or two, and what may follow them."""
    packets = [
        initials.initial(
            draw(frames()),
            version=draw(versions),
            dcid=draw(st.sampled_from([b"", b"same", initials.DCID])),
            number_size=draw(st.integers(1, 4)),
            token=draw(st.sampled_from([b"", b"token"])),
            pad_to=draw(st.sampled_from([0, 600, 1200])),
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    return b"".join(packets) + draw(st.sampled_from([b"", bytes(1200)]) | st.binary(max_size=60))


padded = st.binary(max_size=20).map(lambda beginning: beginning + bytes(1200))
anything = st.binary(max_size=60) | padded | mutated(REAL) | protected()


def check_form(found: Found) -> None:
    if isinstance(found, LongHeader):
        assert len(found.dcid) <= 255
        assert len(found.scid) <= 255
    elif isinstance(found, ShortHeader):
        assert found.fixed
        assert len(found.beginning) == 20
    elif isinstance(found, dict):
        assert all(map(DATAGRAMS.gives, found))
        assert found["quic.version"] in ("1", "2")
        assert len(found["quic.dcid"]) <= 40


@settings(max_examples=600, deadline=None)
@given(st.lists(anything, max_size=8))
def test_nothing_raises_and_no_answer_is_taken_back(datagrams: list[bytes]) -> None:
    assembly = Assembly()
    final: Found = Answer.NEED_MORE
    for one in datagrams:
        header(one)
        found = assembly.feed(one)
        check_form(found)
        assert final is Answer.NEED_MORE or found == final
        final = found
    assert inspect(datagrams) == final


@settings(max_examples=100, deadline=None)
@given(st.lists(anything, min_size=1, max_size=3))
def test_the_bound_of_datagrams_is_kept(datagrams: list[bytes]) -> None:
    assert inspect((datagrams * DATAGRAM_BOUND)[:DATAGRAM_BOUND]) is not Answer.NEED_MORE


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(HELLOS), st.data())
def test_reading_on_is_as_good_as_reading_all(hello: bytes, data: st.DataObject) -> None:
    """What was read of a flow's earlier datagrams is remembered with them."""
    history = History()
    inspect_datagrams = DATAGRAMS.make(())
    for each in [*data.draw(first_flights(hello)), b"\x40" + bytes(30)]:
        history.append(each)
        assert inspect_datagrams(history) == inspect_datagrams(list(history))
