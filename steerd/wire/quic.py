"""`quic`: the ClientHello in the Initial packets that a QUIC connection begins with (RFC 9000; for how version 1 and
version 2 protect them, RFC 9001 and RFC 9369).

Initials are encrypted, but with keys that anybody can derive from the connection id in their header: the one that the
client made up for its first Initial. So a gateway can read the hello without the server's keys, and cannot be sure that
nobody else wrote it.

Datagrams come in any order and may come twice. An `Assembly` is the state of one flow that is not decided yet: CRYPTO
bytes by their offset, and the keys of their connection. `feed` answers

- keys, text as `wire.tls` gives it: `quic.sni`, `quic.alpn` (the first offered), `quic.alpn.NAME` ("1" for every one),
  `quic.version` ("1" or "2") and `quic.dcid` (the first Initial's destination connection id in hexadecimal);
- NEED_MORE: part of a hello, or 0-RTT that came before it; hold the datagram and feed the next one;
- NOT_MINE: not QUIC, or a hello that no server takes;
- a LongHeader or ShortHeader: QUIC, but nothing to read a hello in (see there). Decide by the connection id in it, if
  that is known, or by default. DATAGRAMS, the parser as `wire.parser` wants it, turns it into keys: `quic.packet` and
  `quic.cid`, the connection id in hexadecimal.

An answer other than NEED_MORE is final. Whatever the order of a connection's datagrams and however its hello is cut
into CRYPTO frames, the answer is the same. Once a flow has begun, datagrams that belong to no hello are passed over. A
brief Assembly gives no `quic.alpn`, and answers when the name is there: in the first datagram of most hellos that need
two.

A flow may carry more than one connection: the client gave up and tries again from the same port, or it answers a Retry,
each with a connection id of its own. They are kept apart, and the first hello that is complete decides.

Bounds, for any bytes whatever: a hello has at most 16 KiB (a post-quantum one has 2, common servers take 16) in at most
64 pieces; a flow keeps at most four of them, the newest; after 32 datagrams the answer is NOT_MINE. Of a datagram at
most four coalesced packets are looked at. A datagram of less than 1,200 bytes is never decrypted: servers must ignore
an Initial in it. So a datagram costs two or three times what an honest one does, whatever is in it.

Not covered: versions before 1 (drafts, Google's own), and what is not visible at all, the inner hello of Encrypted
Client Hello.
"""

from __future__ import annotations

import enum
import hmac
import re
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from steerd.model import Answer, Keys
from steerd.wire.cursor import MalformedError, require
from steerd.wire.parser import Brief, DatagramParser, History
from steerd.wire.tls import client_hello, server_name

HELLO_BOUND = 16384
"""Bytes of one hello, its 4-byte header included."""
DATAGRAM_BOUND = 32
"""Datagrams of one flow: a hello of HELLO_BOUND takes 15, so this leaves room for 0-RTT and repetitions."""
CONNECTION_BOUND = 4
"""Hellos of one flow that are put together at the same time."""
PACKET_BOUND = 4
"""Coalesced packets of one datagram that are looked at; clients begin with one Initial, and 0-RTT behind it."""
PIECE_BOUND = 64
"""CRYPTO frames of one packet, and stretches of one hello with gaps between them. Chromium, which shuffles its frames,
makes a dozen."""

MIN_INITIAL_DATAGRAM = 1200  # RFC 9000 section 14.1
MIN_SHORT_DATAGRAM = 21  # RFC 9000 section 10.3: nothing shorter can be a packet of version 1
MAX_CONNECTION_ID = 20  # RFC 9000 section 17.2, of versions 1 and 2

_VERSION_1 = 0x00000001
_VERSION_2 = 0x6B3343CF
_VERSION_NAMES = {_VERSION_1: "1", _VERSION_2: "2"}


class Kind(enum.Enum):
    """What a packet with a long header is."""

    INITIAL = "initial"
    ZERO_RTT = "0-rtt"
    HANDSHAKE = "handshake"
    RETRY = "retry"
    NEGOTIATION = "version-negotiation"
    """Version 0. Only servers send it."""
    UNKNOWN = "unknown-version"


class LongHeader(NamedTuple):
    """What the long header of a datagram's first packet says, of any version (RFC 8999 section 5.1).

    As an answer of `feed` it means, by its kind:
    - UNKNOWN, NEGOTIATION: a version that cannot be read. The server may offer another one, so: by default.
    - HANDSHAKE, RETRY: not how a flow begins. The gateway has forgotten the flow, or the client's address changed
      during the handshake; the server chose `dcid`.
    - INITIAL: `dcid` does not open it. Either the server chose it, as in HANDSHAKE, or the bytes are damaged.
    """

    kind: Kind
    version: int
    dcid: bytes
    scid: bytes


class ShortHeader(NamedTuple):
    """A datagram with a short header: a connection whose handshake is over, seen from a new address or port, or after
    its flow was forgotten (RFC 8999 section 5.2)."""

    beginning: bytes
    """The 20 bytes behind the first: a connection id that the server chose, of a length only the server knows, and
    what follows it."""
    fixed: bool
    """Whether the bit is set that tells QUIC from other protocols (RFC 9443). Peers who agreed to it clear it at random
    (RFC 9287), so a known connection id counts more; without either, `feed` says NOT_MINE."""


Found = Keys | Answer | LongHeader | ShortHeader

_KINDS = {
    _VERSION_1: (Kind.INITIAL, Kind.ZERO_RTT, Kind.HANDSHAKE, Kind.RETRY),  # RFC 9000 section 17.2
    _VERSION_2: (Kind.RETRY, Kind.INITIAL, Kind.ZERO_RTT, Kind.HANDSHAKE),  # RFC 9369 section 3.2
}


def header(datagram: bytes) -> LongHeader | ShortHeader | None:
    """The header of the first packet in a UDP payload; None if it cannot be QUIC of any version."""
    if not datagram:
        return None
    if datagram[0] & 0x80:
        read = _long_header(datagram, 0)
        return None if read is None else read[0]
    if len(datagram) < MIN_SHORT_DATAGRAM:
        return None
    return ShortHeader(datagram[1 : 1 + MAX_CONNECTION_ID], bool(datagram[0] & 0x40))


class Assembly:
    """The first datagrams of one flow (UDP payloads), until they make a whole hello, or enough of it."""

    def __init__(self, brief: bool = False) -> None:
        self._brief = brief
        self._answer: Found | None = None
        self._datagrams = 0
        self._hellos: dict[tuple[int, bytes], _Hello] = {}

    def feed(self, datagram: bytes) -> Found:
        """The answer of all datagrams so far, this one included. Never raises."""
        if self._answer is None or self._answer is Answer.NEED_MORE:
            begun = self._answer is not None
            self._datagrams += 1
            try:
                answer = self._read(datagram)
            except MalformedError:
                answer = Answer.NOT_MINE
            else:
                if begun and not isinstance(answer, dict):
                    answer = Answer.NEED_MORE  # a stray datagram does not undo what has begun
            if answer is Answer.NEED_MORE and self._datagrams >= DATAGRAM_BOUND:
                answer = Answer.NOT_MINE
            self._answer = answer
        return self._answer

    def _read(self, datagram: bytes) -> Found:
        """What this datagram adds. Raises MalformedError for a hello that no server takes."""
        first = header(datagram)
        if first is None:
            return Answer.NOT_MINE
        if isinstance(first, ShortHeader):
            return first if first.fixed else Answer.NOT_MINE
        if first.kind is Kind.UNKNOWN:
            # RFC 9000 section 5.2.2: servers ignore shorter ones. Other protocols' datagrams often look like this.
            return first if len(datagram) >= MIN_INITIAL_DATAGRAM else Answer.NOT_MINE
        if first.kind not in (Kind.INITIAL, Kind.ZERO_RTT):
            return first
        hello = None
        if len(datagram) >= MIN_INITIAL_DATAGRAM:
            hello = self._add(datagram, first)
        if hello is not None:
            return hello.keys(self._brief)
        if first.kind is Kind.ZERO_RTT:
            return Answer.NEED_MORE
        return first if len(datagram) >= MIN_INITIAL_DATAGRAM else Answer.NOT_MINE

    def _add(self, datagram: bytes, first: LongHeader) -> _Hello | None:
        """The hello that the datagram's Initials are part of; None if there are none that can be opened."""
        name = (first.version, first.dcid)
        hello = self._hellos.get(name)
        opened = False
        for packet in _initials(datagram, first):
            hello = hello or _Hello(first)
            payload = hello.open(datagram, packet)
            if payload is not None:
                hello.add(_crypto_frames(payload))
                opened = True
        if hello is None or not opened:
            return None
        if name not in self._hellos:
            if len(self._hellos) == CONNECTION_BOUND:
                del self._hellos[next(iter(self._hellos))]
            self._hellos[name] = hello
        return hello


def inspect(datagrams: Sequence[bytes], brief: bool = False) -> Found:
    """What an Assembly says of these datagrams, fed in this order; NEED_MORE of none."""
    assembly = Assembly(brief)
    answer: Found = Answer.NEED_MORE
    for datagram in datagrams:
        answer = assembly.feed(datagram)
    return answer


class _Packet(NamedTuple):
    """Where an Initial is in its datagram."""

    start: int
    number: int
    """Where its packet number begins, the first thing that is protected."""
    end: int


class _Hello:
    """One connection's hello as far as it has come, and the keys it is protected with."""

    def __init__(self, first: LongHeader) -> None:
        self._version = first.version
        self._dcid = first.dcid
        self._runs: list[tuple[int, bytearray]] = []
        salt, key_label, iv_label, hp_label = _PROTECTION[first.version]
        initial = hmac.digest(salt, first.dcid, "sha256")
        client = hmac.digest(initial, _CLIENT_LABEL, "sha256")
        self._aead = AESGCM(hmac.digest(client, key_label, "sha256")[:16])
        self._iv = int.from_bytes(hmac.digest(client, iv_label, "sha256")[:12])
        self._hp = hmac.digest(client, hp_label, "sha256")[:16]

    def open(self, datagram: bytes, packet: _Packet) -> bytes | None:
        """The frames of an Initial, its header protection (RFC 9001 section 5.4) and packet protection (section 5.3)
        removed; None if these are not the right keys."""
        start, number_at, end = packet
        # Block by block, ECB is what the RFC asks for: one block, of a key that protects nothing else.
        mask = Cipher(AES(self._hp), ECB()).encryptor().update(datagram[number_at + 4 : number_at + 20])
        first = datagram[start] ^ mask[0] & 0x0F
        number_end = number_at + 1 + (first & 0x03)
        size = number_end - number_at
        number = int.from_bytes(datagram[number_at:number_end]) ^ int.from_bytes(mask[1 : 1 + size])
        nonce = (self._iv ^ number).to_bytes(12)
        associated = b"%c%b%b" % (first, datagram[start + 1 : number_at], number.to_bytes(size))
        try:
            return self._aead.decrypt(nonce, datagram[number_end:end], associated)
        except InvalidTag:
            return None

    def add(self, frames: list[tuple[int, bytes]]) -> None:
        """Takes CRYPTO frames: offset and bytes. Raises MalformedError where they go beyond the bounds, or contradict
        what is there, since a server might see another hello than the one read here."""
        if not frames:
            return
        pieces: list[tuple[int, bytes | bytearray]] = [*self._runs, *frames]
        pieces.sort(key=_offset)
        runs: list[tuple[int, bytearray]] = []
        end = -1
        for start, data in pieces:
            if start > end:
                runs.append((start, bytearray(data)))
            else:
                run_start, run = runs[-1]
                overlap = min(end - start, len(data))
                require(run[start - run_start : start - run_start + overlap] == data[:overlap])
                run += data[overlap:]
            end = runs[-1][0] + len(runs[-1][1])
        require(end <= HELLO_BOUND and len(runs) <= PIECE_BOUND)
        self._runs = runs

    def keys(self, brief: bool) -> Keys | Answer:
        """Keys of the hello, or NEED_MORE. Raises MalformedError if it is not a ClientHello."""
        if not self._runs or self._runs[0][0] != 0:
            return Answer.NEED_MORE
        message = self._runs[0][1]
        require(message[0] == _CLIENT_HELLO)
        if len(message) < _MESSAGE_HEADER:
            return Answer.NEED_MORE
        end = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER])
        require(end <= HELLO_BOUND)
        read = server_name if brief else client_hello
        of_tls = read(bytes(message[_MESSAGE_HEADER:end]), end - _MESSAGE_HEADER)
        if of_tls is Answer.NEED_MORE:
            return Answer.NEED_MORE
        if of_tls is Answer.NOT_MINE:
            raise MalformedError
        keys = {f"quic.{name[4:]}": value for name, value in of_tls.items() if name != "tls.version"}
        keys["quic.version"] = _VERSION_NAMES[self._version]
        keys[FIRST_ID] = self._dcid.hex()
        return keys


_CLIENT_HELLO = 1  # RFC 8446 section 4
_MESSAGE_HEADER = 4


def _offset(piece: tuple[int, bytes | bytearray]) -> int:
    return piece[0]


# Headers

_VERSION_AND_LENGTH = struct.Struct("!xIB").unpack_from


def _long_header(datagram: bytes, start: int) -> tuple[LongHeader, int] | None:
    """The version-independent part of the long header at `start`, and where it ends. None: cut short, or not allowed in
    a version that is known."""
    if len(datagram) < start + 7:
        return None
    version, length = _VERSION_AND_LENGTH(datagram, start)
    dcid_end = start + 6 + length
    if len(datagram) <= dcid_end:
        return None
    dcid = datagram[start + 6 : dcid_end]
    end = dcid_end + 1 + datagram[dcid_end]
    if len(datagram) < end:
        return None
    scid = datagram[dcid_end + 1 : end]
    kinds = _KINDS.get(version)
    if kinds is not None:
        if length > MAX_CONNECTION_ID or len(scid) > MAX_CONNECTION_ID:
            return None
        kind = kinds[datagram[start] >> 4 & 0x03]
    elif version:
        kind = Kind.UNKNOWN
    else:
        offered = len(datagram) - end  # RFC 8999 section 6: at least one version of 4 bytes
        if not offered or offered % 4:
            return None
        kind = Kind.NEGOTIATION
    return LongHeader(kind, version, dcid, scid), end


def _initials(datagram: bytes, first: LongHeader) -> Iterator[_Packet]:
    """The Initials among the coalesced packets of a datagram. What is not of the first packet's connection is passed
    over, as RFC 9000 section 12.2 tells receivers; what cannot be read ends the datagram."""
    start = 0
    for _ in range(PACKET_BOUND):
        if start >= len(datagram) or not datagram[start] & 0x80:
            return
        read = _long_header(datagram, start)
        if read is None:
            return
        packet, at = read
        if packet.version != first.version or packet.kind is Kind.RETRY:
            return
        try:
            if packet.kind is Kind.INITIAL:
                token_length, at = _varint(datagram, at)
                at += token_length
            length, at = _varint(datagram, at)
        except IndexError:
            return
        end = at + length
        if end > len(datagram):
            return
        # 20 bytes: a packet number of 4 and a sample of 16, which tells how many of the 4 it really has.
        if packet.kind is Kind.INITIAL and packet.dcid == first.dcid and length >= 20:
            yield _Packet(start, at, end)
        start = end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer (RFC 9000 section 16) and where it ends. Raises IndexError if it is not all there."""
    first = data[at]
    if first < 0x40:
        return first, at + 1
    size = 1 << (first >> 6)
    end = at + size
    if end > len(data):
        raise IndexError
    return int.from_bytes(data[at:end]) & (1 << 8 * size - 2) - 1, end


# Frames (RFC 9000 section 19); these alone are allowed in an Initial (section 12.4)

_PADDING = 0x00
_PING = 0x01
_ACK = 0x02
_ACK_ECN = 0x03
_CRYPTO = 0x06
_CONNECTION_CLOSE = 0x1C

_NEITHER_PADDING_NOR_PING = re.compile(rb"[^\x00\x01]")


def _crypto_frames(payload: bytes) -> list[tuple[int, bytes]]:
    """Offset and bytes of the CRYPTO frames of an Initial. Raises MalformedError for frames that may not be there,
    are cut short, or are too many."""
    frames: list[tuple[int, bytes]] = []
    at = 0
    try:
        while at < len(payload):
            kind = payload[at]
            at += 1
            if kind == _CRYPTO:
                offset, at = _varint(payload, at)
                length, at = _varint(payload, at)
                require(at + length <= len(payload) and len(frames) < PIECE_BOUND)
                if length:
                    frames.append((offset, payload[at : at + length]))
                at += length
            elif kind in (_PADDING, _PING):
                # Frames of one byte: clients fill their datagrams with a thousand of them, some with both in turns.
                following = _NEITHER_PADDING_NOR_PING.search(payload, at)
                at = following.start() if following else len(payload)
            elif kind in (_ACK, _ACK_ECN):
                at = _behind_ack(payload, at, kind)
            elif kind == _CONNECTION_CLOSE:
                for _ in range(2):  # error code, frame type
                    _, at = _varint(payload, at)
                length, at = _varint(payload, at)
                at += length
                require(at <= len(payload))
            else:
                raise MalformedError
    except IndexError:
        raise MalformedError from None
    return frames


def _behind_ack(payload: bytes, at: int, kind: int) -> int:
    """Where an ACK frame ends whose fields begin at `at`: largest, delay, count of ranges, first range, then a gap and
    a length for each range, and three counts with ECN."""
    for _ in range(2):
        _, at = _varint(payload, at)
    ranges, at = _varint(payload, at)
    for _ in range(1 + 2 * ranges + (3 if kind == _ACK_ECN else 0)):
        _, at = _varint(payload, at)
    return at


# Keys: HKDF-Expand-Label (RFC 8446 section 7.1) for at most 32 bytes is one HMAC over one constant. By hand since hkdf
# in `cryptography` takes several times as long.


def _label(text: bytes, length: int) -> bytes:
    label = b"tls13 " + text
    return struct.pack("!HB", length, len(label)) + label + b"\x00\x01"


_CLIENT_LABEL = _label(b"client in", 32)
_PROTECTION = {
    _VERSION_1: (  # RFC 9001 sections 5.1 and 5.2
        bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"),
        *(_label(b"quic " + use, length) for use, length in ((b"key", 16), (b"iv", 12), (b"hp", 16))),
    ),
    _VERSION_2: (  # RFC 9369 section 3.3
        bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"),
        *(_label(b"quicv2 " + use, length) for use, length in ((b"key", 16), (b"iv", 12), (b"hp", 16))),
    ),
}
"""By version: salt, and the labels of key, initialisation vector and header protection key."""


# In `inspect`

FIRST_ID = "quic.dcid"
PACKET = "quic.packet"
CONNECTION_ID = "quic.cid"
SERVER_ID = "quic.server-id"
"""Read out of the connection id by who knows how daemons make them (wire.quic_lb), not here."""
SHORT = "short"
MID_CONNECTION = frozenset({SHORT, *(kind.value for kind in (Kind.INITIAL, Kind.HANDSHAKE, Kind.RETRY))})
"""Values of PACKET that say: no beginning of a connection. Only its connection id can tell where it belongs."""


def _inspect(datagrams: Sequence[bytes], brief: bool = False) -> Keys | Answer:
    """What `inspect` says, with a header that holds no hello turned into keys."""
    match _resume(datagrams, brief) if isinstance(datagrams, History) else inspect(datagrams, brief):
        case ShortHeader(beginning=beginning):
            return {PACKET: SHORT, CONNECTION_ID: beginning.hex()}
        case LongHeader(kind=kind, dcid=dcid):
            return {PACKET: kind.value, CONNECTION_ID: dcid.hex()}
        case found:
            return found


def _resume(history: History, brief: bool) -> Found:
    """`inspect` of a flow whose earlier datagrams were read before: to decrypt all of them with every new one would let
    a client that sends many halves of hellos cost many times what others do."""
    memory = history.memory.get(place := f"{PACKET} {brief}")
    assembly, seen = memory if isinstance(memory, tuple) else (Assembly(brief), 0)
    answer: Found = Answer.NEED_MORE
    for datagram in history[seen:]:
        answer = assembly.feed(datagram)
    history.memory[place] = (assembly, len(history))
    return answer


DATAGRAMS = DatagramParser(
    name="quic",
    keys=("quic.sni", "quic.alpn", "quic.alpn.*", "quic.version", FIRST_ID, PACKET, CONNECTION_ID, SERVER_ID),
    datagrams=DATAGRAM_BOUND,
    make=lambda _patterns: _inspect,
    summary="QUIC: the server name and protocols of its TLS hello, or the server id in a connection id",
    brief=Brief(
        ("quic.sni", "quic.version", FIRST_ID, PACKET, CONNECTION_ID, SERVER_ID), partial(_inspect, brief=True)
    ),
)
