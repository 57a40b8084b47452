"""`wireguard`: the handshake initiation that a WireGuard tunnel begins with.

Sources: WireGuard: Next Generation Kernel Network Tunnel (wireguard.com/papers/wireguard.pdf), sections 5.4.2 and
5.4.4; Linux, drivers/net/wireguard/messages.h and cookie.c.

    type 1 (1)  reserved 0 (3)  sender index (4)  ephemeral (32)  encrypted static (48)  encrypted timestamp (28)
    mac1 (16)  mac2 (16): 148 bytes

Key:
- `wireguard.public-key`: the static public key of the peer that the initiation is for, in base64, as `wg` shows it.

The message does not name that peer, but mac1 is a MAC with a key that is made of its public key alone:

    mac1 = MAC(HASH("mac1----" || public key), all bytes before mac1)

with BLAKE2s as both. So a known public key can be tested, and the ones that are tested are those that the service's
routes compare the key with. What is for none of them is NOT_MINE: without the MAC, a length and four bytes say too
little.

What it costs: one BLAKE2s block for each key until one fits, 0.6 us; the keys' own hashes are made once. That is why a
service may have no more than MAX_KEYS of them. mac1 is no proof of anything: who knows a public key can make it.

The client repeats an initiation every 5 seconds until it is answered, and makes a new one every 2 minutes while it has
something to send, from the same port; conntrack has the flow by then.

Not covered, hence NOT_MINE: responses, cookie replies and data (types 2 to 4), which name nothing but an index that the
receiver made up (`core` knows their flow by its addresses, or not at all); variants that use the reserved bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Collection

from steerd.model import Keys
from steerd.wire.parser import DatagramParser, InspectDatagrams, first

MAX_KEYS = 1000
"""Public keys of one service. An initiation for none of them, which anybody can send, takes 0.6 ms of a worker with so
many."""

_TYPE_AND_RESERVED = b"\x01\x00\x00\x00"
_LENGTH = 148
_MAC1 = 116
_MAC_SIZE = 16
_KEY_SIZE = 32
_LABEL_MAC1 = b"mac1----"


def wireguard_parser(public_keys: Collection[str]) -> InspectDatagrams:
    """An inspecting function that knows these public keys, in base64. Raises ValueError for a text that is none, and
    for more than MAX_KEYS of them."""
    if len(set(public_keys)) > MAX_KEYS:
        raise ValueError(
            f"{len(set(public_keys))} public keys of WireGuard peers, each of which may have to be tried for every"
            f" first datagram; at most {MAX_KEYS} are allowed in one service."
        )
    macs = [(text, _mac(text)) for text in sorted(set(public_keys))]

    def read(datagram: bytes) -> Keys | None:
        if len(datagram) != _LENGTH or not datagram.startswith(_TYPE_AND_RESERVED):
            return None
        covered = datagram[:_MAC1]
        mac1 = datagram[_MAC1 : _MAC1 + _MAC_SIZE]
        for text, prepared in macs:
            mac = prepared.copy()
            mac.update(covered)
            if mac.digest() == mac1:
                return {"wireguard.public-key": text}
        return None

    return first(read)


def _mac(text: str) -> hashlib.blake2s:
    """The MAC of a peer's mac1, before any byte of a message."""
    mac1_key = hashlib.blake2s(_LABEL_MAC1 + _decoded(text)).digest()
    return hashlib.blake2s(key=mac1_key, digest_size=_MAC_SIZE)


def _decoded(text: str) -> bytes:
    """The 32 bytes of a public key. Only the one spelling that `wg` gives is taken: routes compare text."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY_SIZE or base64.b64encode(key).decode() != text:
        raise ValueError(
            f"Must be a WireGuard public key, 32 bytes in base64 as `wg pubkey` gives it (44 characters), not {text!r}."
        )
    return key


DATAGRAMS = DatagramParser(
    name="wireguard",
    keys=("wireguard.public-key",),
    datagrams=1,
    make=wireguard_parser,
    summary="WireGuard: which of the routes' public keys a handshake initiation is for",
)
