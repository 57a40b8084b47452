"""Connection ids that tell which server they belong to (QUIC-LB, draft-ietf-quic-load-balancers-21).

A server puts its server id into every connection id that it gives to clients. Whoever knows the configuration reads it
out of any later packet, wherever that comes from, without remembering anything. Such a connection id is

    first octet    3 bits: number of the configuration, 0 to 6 (7: none); 5 bits: length of what follows, or random
    server id      1 to 15 bytes
    nonce          4 to 18 bytes, never the same twice for one server id; together at most 19 bytes
    more           whatever the server likes

Server id and nonce are as they are, or encrypted with a key of 16 bytes: as one AES block if they are 16 bytes, else by
four rounds of a Feistel network whose halves meet in the middle of a byte if their length is odd.

What a client made up for its first packets looks the same. Its server id is random, so a server id that is nobody's
says nothing, and server ids should be much longer than their number needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import msgspec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

UNROUTABLE = 7
"""The configuration number of connection ids in which nothing can be found."""
MAX_LENGTH = 19
"""Bytes of server id and nonce together: connection ids have at most 20."""
MIN_NONCE = 4
KEY_LENGTH = 16


class Config(msgspec.Struct, frozen=True, array_like=True):
    """How server ids are put into connection ids."""

    config: int
    """Its number, 0 to 6."""
    server_id_length: int
    """In bytes, 1 to 15."""
    nonce_length: int
    """In bytes, 4 to 18; together at most 19."""
    key: bytes | None = None
    """16 bytes; None: not encrypted."""


def server_id(configs: Iterable[Config], connection_id: bytes) -> bytes | None:
    """The server id in a connection id, by the configuration of its number. None: there is none of that number, or the
    connection id is too short. Of a short header, pass the 20 bytes behind its first (or what there is of them)."""
    if not connection_id:
        return None
    number = connection_id[0] >> 5
    for config in configs:
        if config.config == number:
            return decode(config, connection_id)
    return None


def decode(config: Config, connection_id: bytes) -> bytes | None:
    """The server id in a connection id of this configuration; None if its number is another, or it is too short. Bytes
    behind the nonce are not looked at."""
    length = config.server_id_length + config.nonce_length
    block = connection_id[1 : 1 + length]
    if len(block) < length or connection_id[0] >> 5 != config.config:
        return None
    if config.key is None:
        plain = block
    elif length == KEY_LENGTH:
        plain = _decryptor(config.key)(block)
    else:
        plain = _feistel(config.key, block, decrypt=True)
    return plain[: config.server_id_length]


def encode(config: Config, server: bytes, nonce: bytes, low_bits: int | None = None) -> bytes:
    """A connection id for a server id and a nonce, of the lengths that the configuration says.

    `low_bits`: the last five bits of the first octet, 0 to 31, which nothing is read from here; without them it says
    the length of what follows, as the draft offers. Raises ValueError for what the draft does not allow.
    """
    _check(config, server, nonce)
    plain = server + nonce
    low_bits = len(plain) if low_bits is None else low_bits
    if not 0 <= low_bits < 32:
        raise ValueError(f"The low bits of the first octet are 0 to 31, not {low_bits}.")
    if config.key is None:
        block = plain
    elif len(plain) == KEY_LENGTH:
        block = _encryptor(config.key)(plain)
    else:
        block = _feistel(config.key, plain, decrypt=False)
    return bytes([config.config << 5 | low_bits]) + block


def _check(config: Config, server: bytes, nonce: bytes) -> None:
    if not 0 <= config.config < UNROUTABLE:
        raise ValueError(f"A configuration has a number from 0 to 6, not {config.config}.")
    if config.server_id_length < 1 or config.nonce_length < MIN_NONCE:
        raise ValueError(
            f"A server id has at least 1 byte and a nonce {MIN_NONCE},"
            f" not {config.server_id_length} and {config.nonce_length}."
        )
    if config.server_id_length + config.nonce_length > MAX_LENGTH:
        raise ValueError(f"Server id and nonce have at most {MAX_LENGTH} bytes together.")
    if config.key is not None and len(config.key) != KEY_LENGTH:
        raise ValueError(f"A key has {KEY_LENGTH} bytes, not {len(config.key)}.")
    if len(server) != config.server_id_length or len(nonce) != config.nonce_length:
        raise ValueError(
            f"Server id and nonce of configuration {config.config} have {config.server_id_length} and"
            f" {config.nonce_length} bytes, not {len(server)} and {len(nonce)}."
        )


def _feistel(key: bytes, block: bytes, *, decrypt: bool) -> bytes:
    """The four passes of section 5.4.2, on numbers: an odd length's middle byte is split into its halves, and a half's
    missing four bits, the last of the left or the first of the right, stay zero."""
    encrypt = _encryptor(key)
    length = len(block)
    half = (length + 1) // 2
    rest = length - half
    odd = length % 2
    right_mask = (1 << 8 * half - 4 * odd) - 1
    left_mask = right_mask << 4 * odd
    left = int.from_bytes(block[:half]) & left_mask
    right = int.from_bytes(block[rest:]) & right_mask
    padding = bytes(14 - half)
    for number in (4, 3, 2, 1) if decrypt else (1, 2, 3, 4):
        # Odd passes change the right half by the left one, even passes the left by the right.
        source = left if number % 2 else right
        output = encrypt(source.to_bytes(half) + padding + bytes([length, number]))
        if number % 2:
            right = (right ^ int.from_bytes(output[:half])) & right_mask
        else:
            left = (left ^ int.from_bytes(output[:half])) & left_mask
    return (left << 8 * rest | right).to_bytes(length)


# ECB has no state between blocks, so one context serves all calls of a key; making it takes longer than using it.


@lru_cache(maxsize=64)
def _encryptor(key: bytes) -> Callable[[bytes], bytes]:
    return Cipher(AES(key), ECB()).encryptor().update


@lru_cache(maxsize=64)
def _decryptor(key: bytes) -> Callable[[bytes], bytes]:
    return Cipher(AES(key), ECB()).decryptor().update
