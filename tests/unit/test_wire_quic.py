"""QUIC Initials: the RFCs' samples, real clients' first flights, and every way a hello can be cut up and packed."""

from __future__ import annotations

import datetime
import ssl
from itertools import permutations
from pathlib import Path

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import encode_quic_retry, encode_quic_version_negotiation
from aioquic.tls import SessionTicket
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from scapy.layers.quic import QUIC

from steerd.model import Answer, Keys
from steerd.wire.quic import (
    CONNECTION_BOUND,
    DATAGRAM_BOUND,
    DATAGRAMS,
    HELLO_BOUND,
    PACKET_BOUND,
    PIECE_BOUND,
    Assembly,
    Found,
    Kind,
    LongHeader,
    ShortHeader,
    header,
    inspect,
)
from tests import initials
from tests.flows import flow, flows, only
from tests.initials import DCID, SCID, VERSION_1, VERSION_2, client_hello, crypto, datagram, flight

VERSIONS = pytest.mark.parametrize("version", [VERSION_1, VERSION_2], ids=["1", "2"])

SHOP = client_hello(b"shop.example", b"h3")
OTHER = client_hello(b"other.example", b"h3")


def keys(*datagrams: bytes) -> Keys:
    answer = inspect(datagrams)
    assert isinstance(answer, dict), answer
    return answer


def name(*datagrams: bytes) -> str:
    return keys(*datagrams)["quic.sni"]


def answers(*datagrams: bytes) -> list[Found]:
    assembly = Assembly()
    return [assembly.feed(datagram) for datagram in datagrams]


# Samples and real clients

FROM_CLIENTS = {
    "quic-chromium-156.0.8078.79-first": {"quic.sni": "shop.example", "quic.alpn": "h3"},
    "quic-chromium-156.0.8078.79-repeat": {"quic.sni": "shop.example", "quic.alpn": "h3"},
    "quic-firefox-153.7.0esr-first": {"quic.sni": "shop.example", "quic.alpn": "h3"},
    "quic-gtlsclient-0.12.1-get": {"quic.sni": "localhost", "quic.alpn": "h3"},
    "quic-kdig-3.2.6-aaaa": {"quic.sni": "dns.example", "quic.alpn": "doq", "quic.alpn.doq-i03": "1"},
    "quic-rfc9001-a2": {"quic.sni": "example.com", "quic.alpn": "alpn", "quic.dcid": "8394c8f03e515708"},
    "quic-rfc9369-a2": {"quic.sni": "example.com", "quic.alpn": "alpn", "quic.dcid": "8394c8f03e515708"},
}


def test_every_recorded_flow_is_known_here() -> None:
    assert set(flows("quic")) == FROM_CLIENTS.keys()


@pytest.mark.parametrize("client", FROM_CLIENTS)
def test_hellos_of_real_clients(client: str) -> None:
    found = keys(*flow(client))
    assert found.items() >= FROM_CLIENTS[client].items()
    assert found["quic.version"] == ("2" if "rfc9369" in client else "1")
    assert found[f"quic.alpn.{found['quic.alpn']}"] == "1"
    assert {"quic.sni", "quic.alpn", "quic.version", "quic.dcid"} <= found.keys()
    assert all(map(DATAGRAMS.gives, found))


@pytest.mark.parametrize("client", [client for client in FROM_CLIENTS if len(flow(client)) > 1])
def test_a_post_quantum_hello_takes_two_datagrams_in_either_order(client: str) -> None:
    first, second = flow(client)
    assert answers(first, second) == [Answer.NEED_MORE, keys(second, first)]
    assert answers(second, second, first)[:2] == [Answer.NEED_MORE] * 2


def test_datagrams_of_different_cuts_of_the_same_hello_fit_together() -> None:
    """Chromium cuts its hello anew when it repeats it."""
    first, second = flow("quic-chromium-156.0.8078.79-first")
    first_again, second_again = flow("quic-chromium-156.0.8078.79-repeat")
    assert name(second, first_again, second_again, first) == "shop.example"


@pytest.mark.parametrize(("sample", "version"), [("rfc9001-a2", VERSION_1), ("rfc9369-a2", VERSION_2)])
def test_the_encoder_of_these_tests_makes_the_sample_of_the_rfc(sample: str, version: int) -> None:
    """The head and the end as they are printed in the RFC; the end is the packet's authentication tag."""
    head, tag = {
        VERSION_1: ("c000000001088394c8f03e5157080000449e7b9aec34", "e221af44860018ab0856972e194cd934"),
        VERSION_2: ("d76b3343cf088394c8f03e5157080000449ea0c95e82", "a18b2faa745b6fe189cf772a9f84cbfc"),
    }[version]
    hello = bytes.fromhex(
        "010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e86804fe3a47f06a2b69484c00000413011302010000c000000010000e"
        "00000b6578616d706c652e636f6dff01000100000a00080006001d0017001800100007000504616c706e00050005010000000000330026"
        "0024001d00209370b2c9caa47fbabaf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b0003020304000d0010000e04030503"
        "06030203080408050806002d00020101001c00024001003900320408ffffffffffffffff05048000ffff07048000ffff08011001048000"
        "75300901100f088394c8f03e51570806048000ffff"
    )
    made = initials.initial(
        crypto(0, hello), version=version, scid=b"", number=2, number_size=4, pad_to=initials.DATAGRAM
    )
    assert made == only(f"quic-{sample}")
    assert made.hex().startswith(head)
    assert made.hex().endswith(tag)


@pytest.mark.parametrize("client", FROM_CLIENTS)
def test_headers_as_scapy_reads_them(client: str) -> None:
    for one in flow(client):
        read = header(one)
        dissected = QUIC(one)
        assert isinstance(read, LongHeader)
        assert (read.version, read.dcid, read.scid) == (dissected.Version, dissected.DstConnID, dissected.SrcConnID)


# aioquic as client


def client(**settings: object) -> QuicConnection:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name="shop.example")
    configuration.verify_mode = ssl.CERT_NONE
    for setting, value in settings.items():
        setattr(configuration, setting, value)
    return QuicConnection(configuration=configuration)


def sent(connection: QuicConnection, now: float) -> list[bytes]:
    return [data for data, _ in connection.datagrams_to_send(now)]


def first_flight(connection: QuicConnection) -> list[bytes]:
    connection.connect(("192.0.2.1", 443), now=0.0)
    return sent(connection, 0.0)


@VERSIONS
def test_aioquic(version: int) -> None:
    flight = first_flight(client(original_version=version, supported_versions=[version]))
    assert keys(*flight) | {"quic.dcid": ""} == {
        "quic.sni": "shop.example",
        "quic.alpn": "h3",
        "quic.alpn.h3": "1",
        "quic.version": {VERSION_1: "1", VERSION_2: "2"}[version],
        "quic.dcid": "",
    }


@pytest.mark.parametrize("protocols", [20, 60, 120])
def test_aioquic_with_a_long_hello(protocols: int) -> None:
    """1 to 8 KB, over up to seven datagrams, in every order of the first few."""
    offered = [f"protocol-{number:050d}" for number in range(protocols)]
    flight = first_flight(client(alpn_protocols=offered))
    assert len(flight) == {20: 2, 60: 4, 120: 7}[protocols]
    for start in list(permutations(flight[:4]))[:: 1 + protocols // 40]:
        found = answers(*start, *flight[4:])
        assert found[:-1] == [Answer.NEED_MORE] * (len(flight) - 1)
        assert isinstance(found[-1], dict)
        assert found[-1]["quic.sni"] == "shop.example"
        assert {key for key in found[-1] if key.startswith("quic.alpn.")} == {f"quic.alpn.{one}" for one in offered}


class Pair:
    """aioquic's client and server, talking to each other without a network."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._known: dict[bytes, SessionTicket] = {}
        self._certificate, self._key = certificate, key
        self.now = 0.0

    def connect(self, client: QuicConnection, first: list[bytes]) -> QuicConnection:
        """A server that has had the client's first flight and finished the handshake."""
        configuration = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
        configuration.load_cert_chain(self._certificate, self._key)
        read = header(first[0])
        assert isinstance(read, LongHeader)
        server = QuicConnection(
            configuration=configuration,
            original_destination_connection_id=read.dcid,
            session_ticket_fetcher=self._known.get,
            session_ticket_handler=self._remember,
        )
        for one in first:
            server.receive_datagram(one, ("192.0.2.7", 40000), self.now)
        self.talk(client, server)
        return server

    def _remember(self, ticket: SessionTicket) -> None:
        self._known[ticket.ticket] = ticket

    def talk(self, client: QuicConnection, server: QuicConnection) -> list[bytes]:
        """Lets them exchange datagrams until both are silent; the client's."""
        said: list[bytes] = []
        for _ in range(10):
            self.now += 0.01
            for one in sent(server, self.now):
                client.receive_datagram(one, ("192.0.2.1", 443), self.now)
            said += (ours := sent(client, self.now))
            for one in ours:
                server.receive_datagram(one, ("192.0.2.7", 40000), self.now)
        return said


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "shop.example")])
    begin = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=36500))
        .sign(key, hashes.SHA256())
    )
    where = tmp_path_factory.mktemp("tls")
    (where / "cert.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    (where / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return where / "cert.pem", where / "key.pem"


def test_0_rtt_of_aioquic_may_come_before_its_initial(certificate: tuple[Path, Path]) -> None:
    pair = Pair(*certificate)
    tickets: list[SessionTicket] = []
    before = client()
    before._session_ticket_handler = tickets.append
    pair.connect(before, first_flight(before))
    assert tickets

    again = client(session_ticket=tickets[0])
    again.connect(("192.0.2.1", 443), now=1.0)
    again.send_stream_data(0, b"early" * 1000)
    flight = sent(again, 1.0)
    kinds = [read.kind for read in map(header, flight) if isinstance(read, LongHeader)]
    assert kinds[0] is Kind.INITIAL
    assert kinds[1:] == [Kind.ZERO_RTT] * (len(flight) - 1)
    assert len(flight) > 2
    assert answers(*flight[1:], flight[0]) == [Answer.NEED_MORE] * (len(flight) - 1) + [keys(flight[0])]


def test_a_first_flight_after_retry_stands_for_itself() -> None:
    """It has the token and a connection id of the server's choice, and its keys come from that one."""
    connection = client()
    (before,) = first_flight(connection)
    read = header(before)
    assert isinstance(read, LongHeader)
    retry = encode_quic_retry(VERSION_1, b"\xaa" * 5, read.scid, read.dcid, b"token" * 20)
    connection.receive_datagram(retry, ("192.0.2.1", 443), now=0.1)
    (after,) = sent(connection, 0.1)
    assert keys(after) == keys(before) | {"quic.dcid": "aaaaaaaaaa"}


def test_what_aioquic_sends_later_is_told_by_its_connection_id(certificate: tuple[Path, Path]) -> None:
    pair = Pair(*certificate)
    moving = client()
    first = first_flight(moving)
    server = pair.connect(moving, first)

    moving.change_connection_id()
    moving.send_ping(1)
    pair.now += 1
    (after,) = sent(moving, pair.now)
    answer = inspect([after])
    assert isinstance(answer, ShortHeader)
    assert answer.fixed
    assert any(answer.beginning.startswith(one.cid) for one in server._host_cids)


def test_the_clients_side_of_a_handshake_is_told_by_its_connection_id(certificate: tuple[Path, Path]) -> None:
    """As after a gateway's restart: the client goes on with an id of the server's, which opens no Initial."""
    pair = Pair(*certificate)
    connection = client()
    first = first_flight(connection)
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
    configuration.load_cert_chain(*certificate)
    read = header(first[0])
    assert isinstance(read, LongHeader)
    server = QuicConnection(configuration=configuration, original_destination_connection_id=read.dcid)
    server.receive_datagram(first[0], ("192.0.2.7", 40000), 0.0)
    said = pair.talk(connection, server)
    answer = inspect([said[0]])
    assert isinstance(answer, LongHeader)
    assert answer.kind is Kind.INITIAL
    assert answer.dcid == server.host_cid


# Packing


@VERSIONS
@pytest.mark.parametrize("number_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dcid", [b"", b"\x01", DCID, bytes(range(20))], ids=len)
def test_packet_numbers_connection_ids_tokens(version: int, number_size: int, dcid: bytes) -> None:
    one = initials.initial(
        crypto(0, SHOP),
        version=version,
        dcid=dcid,
        number=(1 << 8 * number_size) - 2,
        number_size=number_size,
        token=bytes(70),
        pad_to=1200,
    )
    assert keys(one) == {
        "quic.sni": "shop.example",
        "quic.alpn": "h3",
        "quic.alpn.h3": "1",
        "quic.version": {VERSION_1: "1", VERSION_2: "2"}[version],
        "quic.dcid": dcid.hex(),
    }


def test_the_fixed_bit_may_be_greased() -> None:
    assert name(initials.initial(crypto(0, SHOP), fixed=False, pad_to=1200)) == "shop.example"


def test_coalesced_initials() -> None:
    both = initials.initial(crypto(50, SHOP[50:])) + initials.initial(crypto(0, SHOP[:50]), number=1, pad_to=1150)
    assert name(both) == "shop.example"


@VERSIONS
def test_0_rtt_around_an_initial(version: int) -> None:
    initial = initials.initial(crypto(0, SHOP), version=version, pad_to=800)
    early = initials.other(initials.ZERO_RTT, 600, version=version)
    assert name(initial + early) == "shop.example"
    assert name(early + initial) == "shop.example"
    assert inspect([early]) is Answer.NEED_MORE


def test_zeros_and_rubbish_behind_an_initial() -> None:
    initial = initials.initial(crypto(0, SHOP), pad_to=600)
    assert name(initial + bytes(600)) == "shop.example"
    assert name(initial + b"\xff" * 600) == "shop.example"
    assert name(initial + initials.other(initials.HANDSHAKE, 2000)[:600]) == "shop.example"


def test_coalesced_packets_of_another_connection_are_passed_over() -> None:
    """RFC 9000 section 12.2."""
    half = initials.initial(crypto(0, SHOP[:50]), pad_to=600)
    other = initials.initial(crypto(0, OTHER), dcid=b"\x01" * 8, pad_to=600)
    assert inspect([half + other]) is Answer.NEED_MORE
    assert name(initials.initial(crypto(0, SHOP), pad_to=600) + other) == "shop.example"
    with_our_keys = initials.initial(crypto(50, SHOP[50:]), dcid=b"\x01" * 8, keys_of=DCID, pad_to=600)
    assert inspect([half + with_our_keys]) is Answer.NEED_MORE


def test_packets_beyond_the_bound_of_a_datagram_are_not_looked_at() -> None:
    nothing = [initials.initial(initials.PING, number=number, pad_to=400) for number in range(PACKET_BOUND)]
    whole = initials.initial(crypto(0, SHOP), number=PACKET_BOUND)
    assert name(b"".join(nothing[:-1]) + whole) == "shop.example"
    assert inspect([b"".join(nothing) + whole]) is Answer.NEED_MORE


@pytest.mark.parametrize("size", [1200, 1252, 1472, 8972])
def test_sizes_of_datagrams(size: int) -> None:
    assert name(initials.initial(crypto(0, SHOP), pad_to=size)) == "shop.example"


def test_an_initial_in_a_small_datagram_is_no_beginning() -> None:
    """RFC 9000 section 14.1: servers discard it."""
    small = initials.initial(crypto(0, SHOP), pad_to=1199)
    assert inspect([small]) is Answer.NOT_MINE
    begun = datagram(crypto(0, SHOP[:20]))
    assert inspect([begun, small]) is Answer.NEED_MORE


# Frames

FRAMES = {
    "padding": initials.PADDING * 3,
    "ping": initials.PING,
    "padding and pings": (initials.PADDING + initials.PING) * 100,
    "ack": initials.ack(7, (0, 0), (3, 70)),
    "ack-ecn": initials.ack(70000, (1, 2), ecn=(1, 2, 70)),
    "close": initials.close(0x10A, b"no"),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_frames_around_the_hello(frame: bytes) -> None:
    frames = frame + crypto(0, SHOP[:30]) + frame + crypto(30, SHOP[30:]) + frame
    assert name(datagram(frames)) == "shop.example"
    assert inspect([datagram(frame)]) is Answer.NEED_MORE


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_numbers_of_every_length(size: int) -> None:
    assert name(*(datagram(crypto(at, SHOP[at : at + 60], size)) for at in range(0, len(SHOP), 60))) == "shop.example"


def test_an_empty_crypto_frame() -> None:
    assert name(datagram(crypto(9000, b"") + crypto(0, SHOP))) == "shop.example"


FORBIDDEN = {
    "stream": b"\x08\x00data",
    "close of the application": b"\x1d\x00\x00",
    "unknown": b"\x40\x52",
    "cut crypto": initials.PADDING * 1200 + b"\x06\x00\x40\x64" + SHOP[:5],
    "cut number": initials.PADDING * 1200 + b"\x06\x80",
    "cut ack": initials.PADDING * 1200 + b"\x02\x05\x00\x04",
    "ack of ever so many ranges": b"\x02\x05\x00\xbf\xff\xff\xff",
    "cut number in an ack": initials.PADDING * 1200 + b"\x02\x05\x00\x00\x40",
    "cut close": initials.PADDING * 1200 + b"\x1c\x00\x00\x0a",
    "crypto beyond the bound": crypto(HELLO_BOUND - 1, b"ab"),
    "crypto far away": crypto((1 << 62) - 1, b"a"),
}


@pytest.mark.parametrize("frame", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_frames_that_no_initial_has(frame: bytes) -> None:
    """Those that are cut short have their padding before them, so that nothing follows."""
    one = initials.initial(frame, pad_to=1200)
    assert inspect([one]) is Answer.NOT_MINE
    assert answers(datagram(crypto(0, SHOP[:20])), one)[1] is Answer.NOT_MINE


# Putting together


@VERSIONS
def test_any_order_of_frames(version: int) -> None:
    pieces = [(at, SHOP[at : at + 30]) for at in range(0, len(SHOP), 30)]
    for order in permutations(pieces):
        frames = [crypto(*piece) for piece in order]
        assert name(datagram(b"".join(frames), version=version)) == "shop.example"
    found = answers(*(datagram(frame, version=version) for frame in frames))
    assert found[:-1] == [Answer.NEED_MORE] * (len(pieces) - 1)
    assert isinstance(found[-1], dict)


def test_overlapping_frames_that_agree() -> None:
    frames = [crypto(20, SHOP[20:60]), crypto(10, SHOP[10:90]), crypto(0, SHOP[:15]), crypto(30, SHOP[30:])]
    assert name(datagram(b"".join(frames))) == "shop.example"
    assert name(*map(datagram, frames)) == "shop.example"


@pytest.mark.parametrize("order", [1, -1])
def test_overlapping_frames_that_do_not_agree(order: int) -> None:
    frames = [crypto(0, SHOP[:60]), crypto(40, OTHER[40:70])][::order]
    assert SHOP[40:60] != OTHER[40:60]
    assert inspect([datagram(b"".join(frames))]) is Answer.NOT_MINE
    assert answers(*map(datagram, frames)) == [Answer.NEED_MORE, Answer.NOT_MINE]


def test_what_follows_the_hello_is_not_looked_at() -> None:
    assert name(datagram(crypto(0, SHOP + b"\x0b\x00\x00"))) == "shop.example"


@pytest.mark.parametrize("size", [1000, 2000, 4000, 8000, HELLO_BOUND])
def test_long_hellos(size: int) -> None:
    hello = client_hello(b"shop.example", b"h3", size=size)
    assert len(hello) == size
    assert name(*flight(hello)) == "shop.example"
    assert name(*flight(hello)[::-1]) == "shop.example"


NOT_A_HELLO = {
    "server hello": b"\x02" + SHOP[1:],
    "too long": b"\x01" + (HELLO_BOUND - 3).to_bytes(3),
    "malformed": SHOP[:4] + b"\x02" + SHOP[5:],
    "no compression": client_hello(b"a b", b"h3"),
}


@pytest.mark.parametrize("message", NOT_A_HELLO.values(), ids=NOT_A_HELLO.keys())
def test_not_a_hello(message: bytes) -> None:
    assert inspect([datagram(crypto(0, message))]) is Answer.NOT_MINE


def test_an_answer_is_final() -> None:
    assert answers(datagram(crypto(0, SHOP)), datagram(crypto(0, OTHER)))[1] == keys(datagram(crypto(0, SHOP)))
    bad = datagram(b"\x08")
    assert answers(bad, datagram(crypto(0, SHOP))) == [Answer.NOT_MINE] * 2


def test_nothing_fed_is_a_beginning() -> None:
    assert inspect([]) is Answer.NEED_MORE


# More than one connection in a flow


def test_connections_of_one_port_are_kept_apart() -> None:
    ours = [datagram(crypto(at, SHOP[at : at + 60])) for at in range(0, len(SHOP), 60)]
    others = [datagram(crypto(at, OTHER[at : at + 80]), dcid=b"\x02" * 8) for at in range(0, len(OTHER), 80)]
    assert name(ours[0], *others, *ours[1:]) == "other.example"
    assert name(others[0], *ours, *others[1:]) == "shop.example"


def test_the_newest_connections_are_kept() -> None:
    def part(number: int, start: int, end: int) -> bytes:
        return datagram(crypto(start, SHOP[start:end]), dcid=bytes([number]) * 8)

    starts = [part(number, 0, 50) for number in range(CONNECTION_BOUND + 1)]
    assert inspect([*starts, part(0, 50, 500)]) is Answer.NEED_MORE
    assert keys(*starts, part(1, 50, 500))["quic.dcid"] == "01" * 8


# As a parser among the others


def test_the_registry_s_form_of_the_parser() -> None:
    read = DATAGRAMS.make(())
    assert read(flow("quic-chromium-156.0.8078.79-first")) == keys(*flow("quic-chromium-156.0.8078.79-first"))
    assert read([datagram(crypto(0, SHOP[:20]))]) is Answer.NEED_MORE
    assert read([bytes([0x43]) + bytes(40)]) == {"quic.packet": "short", "quic.cid": "00" * 20}
    assert read([long_of(0xFF00001D, 1200)]) == {"quic.packet": "unknown-version", "quic.cid": DCID.hex()}
    assert read([b"GET / HTTP/1.1"]) is Answer.NOT_MINE


# Bounds


def test_after_its_bound_of_datagrams_a_flow_is_given_up() -> None:
    found = answers(*[datagram(crypto(0, SHOP[:20]))] * DATAGRAM_BOUND)
    assert found == [Answer.NEED_MORE] * (DATAGRAM_BOUND - 1) + [Answer.NOT_MINE]


def test_a_hello_in_too_many_pieces_is_given_up() -> None:
    """Whether they come in one packet or in many; those that join are one."""
    hello = client_hello(b"shop.example", b"h3", size=4 * PIECE_BOUND)
    apart = [crypto(at, hello[at : at + 1]) for at in range(0, 2 * PIECE_BOUND + 2, 2)]
    assert inspect([datagram(b"".join(apart[:-1]))]) is Answer.NEED_MORE
    assert inspect([datagram(b"".join(apart))]) is Answer.NOT_MINE
    assert answers(datagram(b"".join(apart[:-1])), datagram(apart[-1])) == [Answer.NEED_MORE, Answer.NOT_MINE]
    between = [crypto(at, hello[at : at + 1]) for at in range(1, 2 * PIECE_BOUND, 2)]
    rest = crypto(2 * PIECE_BOUND, hello[2 * PIECE_BOUND :])
    assert name(*(datagram(b"".join(some)) for some in (apart[:-1], between, [rest]))) == "shop.example"


# What is no first flight


def test_an_unknown_version() -> None:
    assert inspect([long_of(0xFF00001D, 1200)]) == LongHeader(Kind.UNKNOWN, 0xFF00001D, DCID, SCID)
    assert inspect([long_of(0x1A2A3A4A, 1200, bytes(200))]) == LongHeader(Kind.UNKNOWN, 0x1A2A3A4A, bytes(200), SCID)
    assert inspect([long_of(0xFF00001D, 1199)]) is Answer.NOT_MINE


def long_of(version: int, size: int, dcid: bytes = DCID) -> bytes:
    return initials.long_header(initials.INITIAL, version, dcid).ljust(size, b"\x00")


def test_version_negotiation() -> None:
    one = encode_quic_version_negotiation(SCID, DCID, [VERSION_1, VERSION_2])
    assert inspect([one]) == LongHeader(Kind.NEGOTIATION, 0, DCID, SCID)
    assert header(one[:-1]) is None
    assert header(one[:-8]) is None


@VERSIONS
@pytest.mark.parametrize("kind", [Kind.HANDSHAKE, Kind.RETRY])
def test_other_packets_with_a_long_header(version: int, kind: Kind) -> None:
    number = {Kind.HANDSHAKE: initials.HANDSHAKE, Kind.RETRY: initials.RETRY}[kind]
    one = initials.other(number, 100, version=version)
    assert inspect([one]) == LongHeader(kind, version, DCID, SCID)
    assert answers(datagram(crypto(0, SHOP[:20])), one)[1] is Answer.NEED_MORE


def test_an_initial_that_its_connection_id_does_not_open() -> None:
    later = initials.initial(crypto(0, SHOP), dcid=b"\x05" * 8, keys_of=DCID, pad_to=1200)
    read = LongHeader(Kind.INITIAL, VERSION_1, b"\x05" * 8, SCID)
    assert inspect([later]) == read
    damaged = bytearray(datagram(crypto(0, SHOP)))
    damaged[-1] ^= 1
    assert inspect([bytes(damaged)]) == read._replace(dcid=DCID)
    begun = datagram(crypto(0, SHOP[:20]))
    assert answers(begun, later, bytes(damaged), datagram(crypto(20, SHOP[20:])))[3] == keys(datagram(crypto(0, SHOP)))


@pytest.mark.parametrize("length", [0, 1, 4, 19, 20])
def test_an_initial_too_short_to_be_protected(length: int) -> None:
    """There are 16 bytes to look at behind a packet number of 4, or nothing can be told (RFC 9001 section 5.4.2)."""
    start = initials.long_header(initials.INITIAL) + b"\x00" + initials.varint(length, 2)
    one = initials.initial(initials.PING, pad_to=1200) + start + bytes(length)
    assert inspect([one]) is Answer.NEED_MORE
    token = initials.varint(1200) + bytes(1200)
    alone = initials.long_header(initials.INITIAL) + token + initials.varint(length, 2) + bytes(length)
    assert isinstance(inspect([alone]), LongHeader)


def test_an_initial_that_is_cut_short() -> None:
    assert inspect([initials.initial(crypto(0, SHOP), pad_to=1300)[:1250]]) == LongHeader(
        Kind.INITIAL, VERSION_1, DCID, SCID
    )


def test_a_short_header() -> None:
    one = bytes([0x43]) + bytes(range(40))
    assert inspect([one]) == header(one) == ShortHeader(bytes(range(20)), True)
    greased = bytes([0x03]) + bytes(range(40))
    assert header(greased) == ShortHeader(bytes(range(20)), False)
    assert inspect([greased]) is Answer.NOT_MINE
    assert header(one[:20]) is None
    assert header(one[:21]) == ShortHeader(bytes(range(20)), True)


NOT_QUIC = {
    "nothing": b"",
    "dns": bytes.fromhex("12340120000100000000000104686f7374076578616d706c6500001c0001"),
    "dns, large id": bytes.fromhex("f2340120000100000000000104686f7374076578616d706c6500001c0001"),
    "stun": bytes.fromhex("000100002112a442") + bytes(12),
    "wireguard": b"\x01\x00\x00\x00" + bytes(144),
    "dtls": bytes.fromhex("16fefd0000000000000000") + bytes(100),
    "rtp": bytes.fromhex("8060000112345678") + bytes(160),
}


@pytest.mark.parametrize("one", NOT_QUIC.values(), ids=NOT_QUIC.keys())
def test_other_protocols(one: bytes) -> None:
    assert inspect([one]) is Answer.NOT_MINE


def test_a_header_that_is_cut_short() -> None:
    one = initials.long_header(initials.INITIAL)
    assert [header(one[:end]) for end in range(len(one))] == [None] * len(one)


@VERSIONS
def test_connection_ids_that_are_too_long(version: int) -> None:
    assert header(initials.long_header(initials.INITIAL, version, dcid=bytes(21))) is None
    assert header(initials.long_header(initials.INITIAL, version, scid=bytes(21))) is None
