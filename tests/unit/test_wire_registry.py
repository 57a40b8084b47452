"""The registry: names, key families and transports."""

from __future__ import annotations

from steerd.model import TCP, UDP
from steerd.wire.registry import DATAGRAMS, REGISTRY, transports


def test_names() -> None:
    assert {"http", "prefix"} <= REGISTRY.keys()
    assert all(name == parser.name for name, parser in REGISTRY.items())
    assert all(name == parser.name for name, parser in DATAGRAMS.items())


def test_every_key_belongs_to_one_parser() -> None:
    """HTTP/2 alone shares its keys, with HTTP/1.x: one route serves both."""
    assert REGISTRY["http2"].keys == REGISTRY["http"].keys
    keys = [key for name, parser in REGISTRY.items() if name != "http2" for key in parser.keys]
    assert len(keys) == len(set(keys))
    for key in keys:
        example = key.replace("*", "x")
        assert [parser.name for parser in REGISTRY.values() if parser.gives(example)] != []


def test_keys_do_not_depend_on_the_transport() -> None:
    both = REGISTRY.keys() & DATAGRAMS.keys()
    assert {"dns", "sip", "prefix", "regex"} <= both
    for name in both:
        assert DATAGRAMS[name].keys == REGISTRY[name].keys
        assert DATAGRAMS[name].exclusive == REGISTRY[name].exclusive
    datagrams_only = [key for name in DATAGRAMS.keys() - both for key in DATAGRAMS[name].keys]
    assert not any(parser.gives(key.replace("*", "x")) for key in datagrams_only for parser in REGISTRY.values())


def test_transports() -> None:
    assert transports("http") == (TCP,)
    assert transports("dns") == (TCP, UDP)
    assert transports("port-extension") == ()


def test_gives() -> None:
    http = REGISTRY["http"]
    assert http.gives("http.host")
    assert http.gives("http.header.accept")
    assert not http.gives("http.header.")
    assert not http.gives("http.header")
    assert not http.gives("http.hosts")
    assert not http.gives("prefix")
