"""The registry: names and key families."""

from __future__ import annotations

from steerd.wire.registry import REGISTRY


def test_names() -> None:
    assert {"http", "prefix"} <= REGISTRY.keys()
    assert all(name == parser.name for name, parser in REGISTRY.items())


def test_every_key_belongs_to_one_parser() -> None:
    """HTTP/2 alone shares its keys, with HTTP/1.x: one route serves both."""
    assert REGISTRY["http2"].keys == REGISTRY["http"].keys
    keys = [key for name, parser in REGISTRY.items() if name != "http2" for key in parser.keys]
    assert len(keys) == len(set(keys))
    for key in keys:
        example = key.replace("*", "x")
        assert [parser.name for parser in REGISTRY.values() if parser.gives(example)] != []


def test_gives() -> None:
    http = REGISTRY["http"]
    assert http.gives("http.host")
    assert http.gives("http.header.accept")
    assert not http.gives("http.header.")
    assert not http.gives("http.header")
    assert not http.gives("http.hosts")
    assert not http.gives("prefix")
