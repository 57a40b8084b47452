"""The registry: names, key families and transports."""

from __future__ import annotations

import contextlib

import pytest

from steerd.model import TCP, UDP
from steerd.wire.registry import DATAGRAMS, PARSER_NAMES, PATTERNED, REGISTRY, check_patterns, transports


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


@pytest.mark.parametrize("name", PARSER_NAMES)
def test_the_parsers_that_look_at_the_routes_values_are_named(name: str) -> None:
    """No value above U+00FF is right for any that look, and those that do not look take it."""
    wants_values = (
        pytest.raises(ValueError, match=r"U\+00FF|public key") if name in PATTERNED else contextlib.nullcontext()
    )
    with wants_values:
        check_patterns(name, ["\u0100"])
    if name in PATTERNED:
        assert all(name not in parsers or parsers[name].gives(PATTERNED[name]) for parsers in (REGISTRY, DATAGRAMS))


def test_gives() -> None:
    http = REGISTRY["http"]
    assert http.gives("http.host")
    assert http.gives("http.header.accept")
    assert not http.gives("http.header.")
    assert not http.gives("http.header")
    assert not http.gives("http.hosts")
    assert not http.gives("prefix")
