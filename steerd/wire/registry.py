"""Every payload parser by its name: REGISTRY for streams (TCP), DATAGRAMS for UDP; some protocols are in both. A new
one is a file that keeps the contract of `wire.parser`, and two lines here: its import and its place in a tuple. Tests
sweep both, so that a new parser is held to the contract as well.

`port-extension`, the other word that `inspect` knows, is not here: it reads headers (`wire.portext`), not payload.
"""

from __future__ import annotations

from collections.abc import Collection

from steerd.model import TCP, UDP
from steerd.wire import (
    dns,
    dtls,
    http,
    http2,
    minecraft,
    mqtt,
    openvpn,
    postgres,
    prefix,
    proxy,
    quic,
    rdp,
    regex,
    rtsp,
    sip,
    ssh,
    stun,
    tls,
    wireguard,
)
from steerd.wire.parser import DatagramParser, Inspect, InspectDatagrams, Parser

__all__ = [
    "DATAGRAMS",
    "PARSER_NAMES",
    "PATTERNED",
    "REGISTRY",
    "DatagramParser",
    "Inspect",
    "InspectDatagrams",
    "Parser",
    "check_patterns",
    "transports",
]

REGISTRY: dict[str, Parser] = {
    parser.name: parser
    for parser in (
        http.PARSER,
        http2.PARSER,
        rtsp.PARSER,
        sip.PARSER,
        postgres.PARSER,
        mqtt.PARSER,
        minecraft.PARSER,
        rdp.PARSER,
        tls.PARSER,
        ssh.PARSER,
        dns.PARSER,
        stun.PARSER,
        openvpn.PARSER,
        proxy.PARSER,
        prefix.PARSER,
        regex.PARSER,
    )
}

DATAGRAMS: dict[str, DatagramParser] = {
    parser.name: parser
    for parser in (
        dns.DATAGRAMS,
        sip.DATAGRAMS,
        stun.DATAGRAMS,
        wireguard.DATAGRAMS,
        openvpn.DATAGRAMS,
        dtls.DATAGRAMS,
        quic.DATAGRAMS,
        prefix.DATAGRAMS,
        regex.DATAGRAMS,
    )
}


PARSER_NAMES = tuple(dict.fromkeys((*REGISTRY, *DATAGRAMS)))
"""Of all parsers, each once."""

PATTERNED = {"prefix": "prefix", "regex": "regex", "wireguard": "wireguard.public-key"}
"""Parsers whose `make` must be told the values that a service's routes compare a key with, and that key."""


def transports(name: str) -> tuple[int, ...]:
    """What a parser of this name can read: model.TCP, model.UDP, both, or nothing where there is no such parser."""
    return tuple(protocol for protocol, parsers in ((TCP, REGISTRY), (UDP, DATAGRAMS)) if name in parsers)


def check_patterns(name: str, patterns: Collection[str]) -> None:
    """Whether a parser can work with all these values of a service's routes together. Raises ValueError, with a
    sentence."""
    for parsers in (REGISTRY, DATAGRAMS):
        if name in parsers:
            parsers[name].make(tuple(patterns))
