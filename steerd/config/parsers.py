"""What `inspect` may name beside payload parsers, and what parsers give."""

from __future__ import annotations

from steerd.wire import portext
from steerd.wire.registry import DATAGRAMS, REGISTRY

PORT_EXTENSION = portext.NAME
"""The word in `inspect` that stands for the port extension; it reads headers, hence it is no payload parser."""
QUIC = "quic"
"""The parser that reads connection ids as well."""
PROXY = "proxy"
"""The parser whose header is believed of `trusted_proxies` only."""


def keys_of(parser: str) -> tuple[str, ...]:
    """The keys that a word of `inspect` can give."""
    if parser == PORT_EXTENSION:
        return portext.KEYS
    return REGISTRY[parser].keys if parser in REGISTRY else DATAGRAMS[parser].keys


def is_every(word: str) -> bool:
    """Whether it decides every datagram by itself."""
    return word in DATAGRAMS and DATAGRAMS[word].every
