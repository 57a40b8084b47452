r"""`minecraft`: the handshake that a Minecraft Java Edition client sends first (since 1.7; "Handshake" in the protocol
documentation at minecraft.wiki/w/Java_Edition_protocol).

Keys, text in latin-1 (a name that is not ASCII shows its UTF-8 bytes, one character each):
- `minecraft.host`: the host name that the player typed, in lower case and without one trailing dot, an IPv6 address in
  brackets; there is none where it is empty. What mod loaders and proxies add to the name behind a NUL is left out:
  `\0FML\0`, `\0FML2\0`, `\0FML3\0` (Forge), and the addresses, UUID and properties that BungeeCord forwards. Behind an
  SRV record this is the record's target: the client sends the name that it connects to;
- `minecraft.next`: what the client goes on with: `status` (the server list), `login` or `transfer`.

Malformed, hence NOT_MINE: fields that do not fill the packet's length exactly, another packet number than 0, a next
state besides the three.

Not covered: the legacy server list ping (first byte FE, since such servers read it first; hence NOT_MINE even where it
is the length of a handshake), packets longer than 8,192 bytes, the player's name (it comes in the next packet), the
Bedrock Edition (UDP).
"""

from __future__ import annotations

from steerd.model import Answer, Keys
from steerd.wire.cursor import Cursor, read, require
from steerd.wire.parser import Parser, always

BOUND = 8192
"""Room for the signed skin that BungeeCord forwards; a name alone has at most 255 characters."""

_LEGACY_PING = 0xFE
_HANDSHAKE = 0
_NEXT = {1: "status", 2: "login", 3: "transfer"}


def inspect(data: bytes) -> Keys | Answer:
    """Keys of the handshake that `data` begins with, or NEED_MORE, or NOT_MINE."""
    if data[:1] == bytes([_LEGACY_PING]):
        return Answer.NOT_MINE
    return read(_handshake, data, BOUND)


def _handshake(cursor: Cursor) -> Keys:
    length = cursor.varint(longest=3)
    require(length < BOUND)
    cursor.end_after(length)
    require(cursor.varint(longest=5) == _HANDSHAKE)
    cursor.varint(longest=5)  # protocol version
    host = _host(cursor.take(cursor.varint(longest=3)))
    cursor.take(2)  # port
    following = cursor.varint(longest=5)
    require(cursor.left == 0 and following in _NEXT)
    keys = {"minecraft.next": _NEXT[following]}
    if host:
        keys["minecraft.host"] = host
    return keys


def _host(address: bytes) -> str:
    """The name in the handshake's address field. `bytes.lower` changes ASCII letters only."""
    name = address.split(b"\0")[0].lower().removesuffix(b".").decode("latin-1")
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


PARSER = Parser(
    name="minecraft",
    keys=("minecraft.host", "minecraft.next"),
    bound=BOUND,
    make=always(inspect),
    summary="Minecraft Java Edition: host name and next state of the handshake",
)
