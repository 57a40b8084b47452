"""Connection ids with a server id in them: the draft's test vectors, its worked example, and what is refused."""

from __future__ import annotations

import re

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given
from hypothesis import strategies as st

from steerd.wire.quic_lb import Config, decode, encode, server_id

KEY = "8f95f09245765f80256934e50c66207f"

# Appendix B of draft-ietf-quic-load-balancers-21: configuration, server id, nonce, key, connection id. Two of its rows
# are misprinted there: the nonce of the second has nine digits, and its connection id has a zero in front instead of in
# the nonce; the connection id of the last is of configuration 0, though the row says 3.
VECTORS = [
    (0, "c4605e", "4504cc4f", None, "07c4605e4504cc4f"),
    (1, "350d28b420", "3487d9700b", None, "2a350d28b4203487d9700b"),
    (0, "ed793a", "ee080dbf", KEY, "0720b1d07b359d3c"),
    (1, "ed793a51d49b8f5fab65", "ee080dbf48", KEY, "2fcc381bc74cb4fbad2823a3d1f8fed2"),
    (2, "ed793a51d49b8f5f", "ee080dbf48c0d1e5", KEY, "504dd2d05a7b0de9b2b9907afb5ecf8cc3"),
    (0, "ed793a51d49b8f5fab", "ee080dbf48c0d1e55d", KEY, "125779c9cc86beb3a3a4a3ca96fce4bfe0cdbc"),
    # Section 5.4.2.4, the example that the algorithm is explained by.
    (0, "31441a", "9c69c275", "fdf726a9893ec05c0632d3956680baf0", "0767947d29be054a"),
]

vectors = pytest.mark.parametrize(("number", "server", "nonce", "key", "cid"), VECTORS, ids=str)


def config_of(number: int, server: str, nonce: str, key: str | None) -> Config:
    return Config(number, len(server) // 2, len(nonce) // 2, None if key is None else bytes.fromhex(key))


@vectors
def test_vectors(number: int, server: str, nonce: str, key: str | None, cid: str) -> None:
    config = config_of(number, server, nonce, key)
    assert encode(config, bytes.fromhex(server), bytes.fromhex(nonce)).hex() == cid
    assert decode(config, bytes.fromhex(cid)) == bytes.fromhex(server)


@vectors
def test_what_surrounds_the_block_does_not_matter(
    number: int, server: str, nonce: str, key: str | None, cid: str
) -> None:
    """Not the five low bits of the first octet, nor the bytes behind the nonce."""
    config = config_of(number, server, nonce, key)
    one = encode(config, bytes.fromhex(server), bytes.fromhex(nonce), low_bits=21)
    assert one[0] == number << 5 | 21
    assert one[1:] == bytes.fromhex(cid)[1:]
    assert decode(config, one + b"more") == bytes.fromhex(server)
    assert decode(config, one[:-1]) is None


def test_the_configuration_is_chosen_by_its_number() -> None:
    configs = [Config(0, 3, 4), Config(2, 2, 14, bytes(16)), Config(5, 1, 5, bytes(16))]
    for config in configs:
        server = b"\xabcd"[: config.server_id_length]
        one = encode(config, server, bytes(config.nonce_length))
        assert server_id(configs, one) == server
        assert [decode(each, one) for each in configs if each is not config] == [None, None]
        assert server_id([each for each in configs if each is not config], one) is None


@pytest.mark.parametrize("one", [b"", b"\x00", b"\x00\x01\x02\x03\x04\x05\x06", b"\xe0" + bytes(19)], ids=len)
def test_connection_ids_without_a_server_id(one: bytes) -> None:
    assert server_id([Config(0, 3, 4)], one) is None


def test_a_configuration_survives_msgpack() -> None:
    config = Config(3, 4, 8, bytes(16))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config


REFUSED = {
    "A configuration has a number from 0 to 6, not 7.": (Config(7, 1, 4), b"a", bytes(4), None),
    "A server id has at least 1 byte and a nonce 4, not 0 and 4.": (Config(0, 0, 4), b"", bytes(4), None),
    "A server id has at least 1 byte and a nonce 4, not 1 and 3.": (Config(0, 1, 3), b"a", bytes(3), None),
    "Server id and nonce have at most 19 bytes together.": (Config(0, 2, 18), b"ab", bytes(18), None),
    "A key has 16 bytes, not 15.": (Config(0, 1, 4, bytes(15)), b"a", bytes(4), None),
    "Server id and nonce of configuration 0 have 1 and 4 bytes, not 2 and 4.": (
        Config(0, 1, 4), b"ab", bytes(4), None,
    ),
    "The low bits of the first octet are 0 to 31, not 32.": (Config(0, 1, 4), b"a", bytes(4), 32),
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_what_the_draft_does_not_allow(problem: str) -> None:
    config, server, nonce, low_bits = REFUSED[problem]
    with pytest.raises(ValueError, match=re.escape(problem)):
        encode(config, server, nonce, low_bits)


# The same, written a second time, step by step after section 5.4.2 and on digits instead of numbers: an odd length's
# halves are an odd number of hexadecimal digits.


def by_the_steps(key: bytes, server: bytes, nonce: bytes) -> str:
    digits = (server + nonce).hex()
    length = len(digits) // 2
    left, right = digits[:length], digits[length:]

    def mixed(half: str, by: str, number: int, *, by_left: bool) -> str:
        missing = "0" * (length % 2)
        padded = by + missing if by_left else missing + by
        block = bytes.fromhex(padded.ljust(28, "0") + f"{length:02x}{number:02x}")
        output = Cipher(AES(key), ECB()).encryptor().update(block).hex()
        start = length % 2 if by_left else 0
        return "".join(f"{int(a, 16) ^ int(b, 16):x}" for a, b in zip(half, output[start:], strict=False))

    for number in (1, 3):
        right = mixed(right, left, number, by_left=True)
        left = mixed(left, right, number + 1, by_left=False)
    return left + right


lengths = st.integers(1, 15).flatmap(lambda server: st.tuples(st.just(server), st.integers(4, 19 - server)))


@st.composite
def assignments(draw: st.DrawFn) -> tuple[Config, bytes, bytes]:
    server_length, nonce_length = draw(lengths)
    key = draw(st.none() | st.binary(min_size=16, max_size=16))
    config = Config(draw(st.integers(0, 6)), server_length, nonce_length, key)
    server = draw(st.binary(min_size=server_length, max_size=server_length))
    return config, server, draw(st.binary(min_size=nonce_length, max_size=nonce_length))


@given(assignments(), st.binary(max_size=4))
def test_what_is_encoded_is_decoded(assignment: tuple[Config, bytes, bytes], behind: bytes) -> None:
    config, server, nonce = assignment
    one = encode(config, server, nonce)
    assert len(one) == 1 + len(server) + len(nonce) <= 20
    assert one[0] & 0x1F == len(one) - 1
    assert decode(config, one + behind) == server_id([config], one + behind) == server
    if config.key is not None and len(server) + len(nonce) != 16:
        assert one[1:].hex() == by_the_steps(config.key, server, nonce)


@given(assignments(), st.binary(max_size=25))
def test_no_connection_id_raises(assignment: tuple[Config, bytes, bytes], one: bytes) -> None:
    config, _, _ = assignment
    found = server_id([config], one)
    assert found is None or len(found) == config.server_id_length
