"""`openvpn`: the reset that an OpenVPN client begins with, in a UDP datagram, or first on a TCP connection, where every
packet has its length (16 bits) before it.

Sources: draft-openvpn-wire-protocol; doc/tls-crypt-v2.txt and src/openvpn/ssl_pkt.c of OpenVPN 2.6.

    none          opcode and key id (1)  session id (8)  acknowledgements 0 (1)  packet id 0 (4): 14 bytes
    tls-auth      opcode, session id, HMAC (16 to 64), its packet id (4), time (4), acknowledgements, packet id
    tls-crypt     opcode, session id, packet id (4), time (4), HMAC (32), 5 encrypted bytes: 54 bytes
    tls-crypt-v2  the same and the client's wrapped key: tag (32), encrypted key and metadata (256 or more), its
                  own length (2)

Keys:
- `openvpn.opcode`: "7" (P_CONTROL_HARD_RESET_CLIENT_V2) or "10" (..._V3, which tls-crypt-v2 has);
- `openvpn.wrap`: "none", "tls-auth", "tls-crypt" or "tls-crypt-v2": how the client protects its control channel, found
  by lengths and by the zeros that are there in the clear without encryption;
- `openvpn.client-key`: with tls-crypt-v2, the tag of the wrapped key in hexadecimal (64 digits). The client sends its
  wrapped key as it is in its key file, in every connection the same; so a client, or all that share a file, can be told
  by it. `client_key` reads it out of such a file.

That is all that can be told apart. Session ids are random; the metadata in a wrapped key are encrypted with the
server's key, and the HMACs are made with keys that only the client and its server have. Name and certificate of the
client, and a server name if it sends one, come with TLS, after the server's answer.

With tls-crypt that is little to go by (54 bytes, the first one 0x38, three of the others 0): where a service has other
parsers, name this one behind them.

Not covered, hence NOT_MINE: other packets (whose flow is decided, or unknown), the resets of OpenVPN 1 (opcode 1), and
static keys without TLS, which are noise from the first byte on.
"""

from __future__ import annotations

import base64
import binascii
import re

from steerd.model import Answer, Keys
from steerd.wire.cursor import Cursor, MalformedError, read, require
from steerd.wire.parser import DatagramParser, Parser, always, always_first

_V2 = 7 << 3  # the low three bits are the key id, 0 in a reset
_V3 = 10 << 3
_BEFORE_WRAP = 1 + 8
_NOTHING_RECEIVED = bytes(5)  # no acknowledgements, and packet id 0
_REPLAY_PROTECTION = 8
# Packet ids count the resets of one attempt; with tls-crypt-v2, 2.6 begins at 0x0f000001 (early negotiation), not at 1.
_PACKET_ID = re.compile(rb"[\x00\x0f]\x00\x00[^\x00]", re.DOTALL)
_PLAIN_LENGTH = _BEFORE_WRAP + len(_NOTHING_RECEIVED)
_DIGEST_SIZES = (16, 20, 28, 32, 48, 64)  # MD5, SHA1, SHA224, SHA256, SHA384, SHA512 and others of these sizes
_TAG = 32
_CRYPT_LENGTH = _PLAIN_LENGTH + _REPLAY_PROTECTION + _TAG
_CLIENT_KEY = 256
_MIN_WRAPPED_KEY = _TAG + _CLIENT_KEY + 2
_MAX_WRAPPED_KEY = 1024  # TLS_CRYPT_V2_MAX_WKC_LEN
_MAX_LENGTH = _CRYPT_LENGTH + _MAX_WRAPPED_KEY

BOUND = 2 + _MAX_LENGTH
"""The longest reset and its length: 1,080 bytes."""

_KEY_FILE = re.compile(
    r"-----BEGIN OpenVPN tls-crypt-v2 client key-----([A-Za-z0-9+/=\s]*)"
    r"-----END OpenVPN tls-crypt-v2 client key-----"
)


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the reset that a TCP connection's first bytes are, or NEED_MORE, or NOT_MINE."""
    return read(_framed, data, BOUND)


def reset(packet: bytes) -> Keys | None:
    """Keys of the reset that a datagram is; None: it is none."""
    opcode = packet[:1]
    if opcode == bytes([_V2]):
        wrap = _wrap(packet)
        return None if wrap is None else {"openvpn.opcode": "7", "openvpn.wrap": wrap}
    wrapped_key = packet[_CRYPT_LENGTH:]
    if opcode != bytes([_V3]) or not _PACKET_ID.match(packet, _BEFORE_WRAP) or not _is_wrapped_key(wrapped_key):
        return None
    tag = wrapped_key[:_TAG].hex()
    return {"openvpn.opcode": "10", "openvpn.wrap": "tls-crypt-v2", "openvpn.client-key": tag}


def client_key(file: str) -> str:
    """`openvpn.client-key` of the client that has this file, which `openvpn --genkey tls-crypt-v2-client` made: the key
    and the wrapped key in base64, between two marks. Raises ValueError, with a sentence, for another file."""
    match = _KEY_FILE.search(file)
    try:
        content = base64.b64decode("".join(match[1].split()), validate=True) if match else b""
    except binascii.Error:
        content = b""
    wrapped_key = content[_CLIENT_KEY:]
    if not _is_wrapped_key(wrapped_key):
        raise ValueError('Is no "OpenVPN tls-crypt-v2 client key".')
    return wrapped_key[:_TAG].hex()


def _framed(stream: Cursor) -> Keys:
    length = stream.number(2)
    require(_PLAIN_LENGTH <= length <= _MAX_LENGTH)
    opcode = stream.number(1)
    require(opcode in (_V2, _V3))
    keys = reset(bytes([opcode]) + stream.take(length - 1))
    if keys is None:
        raise MalformedError
    return keys


def _wrap(packet: bytes) -> str | None:
    """How a reset of version 2 is protected; None: not in any way there is."""
    length = len(packet)
    if packet.endswith(_NOTHING_RECEIVED):
        if length == _PLAIN_LENGTH:
            return "none"
        digest_size = length - _PLAIN_LENGTH - _REPLAY_PROTECTION
        if digest_size in _DIGEST_SIZES and _PACKET_ID.match(packet, _BEFORE_WRAP + digest_size):
            return "tls-auth"
    # With SHA256, tls-auth has this length too, but shows its zeros.
    if length == _CRYPT_LENGTH and _PACKET_ID.match(packet, _BEFORE_WRAP):
        return "tls-crypt"
    return None


def _is_wrapped_key(data: bytes) -> bool:
    return _MIN_WRAPPED_KEY <= len(data) <= _MAX_WRAPPED_KEY and int.from_bytes(data[-2:]) == len(data)


PARSER = Parser(
    name="openvpn",
    keys=("openvpn.opcode", "openvpn.wrap", "openvpn.client-key"),
    bound=BOUND,
    make=always(inspect),
    summary="OpenVPN over TCP: how the client protects its control channel, and its tls-crypt-v2 key",
)
DATAGRAMS = DatagramParser(
    name="openvpn",
    keys=PARSER.keys,
    datagrams=1,
    make=always_first(reset),
    summary="OpenVPN over UDP: how the client protects its control channel, and its tls-crypt-v2 key",
)
