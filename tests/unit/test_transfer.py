"""Export and import: the same text both ways, in one order, and a batch of lines as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerd import config
from steerd.control import transfer
from steerd.control.registry import Registry
from steerd.errors import RequestError

NOW = 1_800_000_000.0
TEXT = """
[pools.tenants]
prefixes = ["10.64.0.0/16", "fd00:64::/112"]
mode = "anyip"
[pools.small]
prefixes = ["10.66.0.0/30"]
mode = "anyip"
[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["http", "prefix", "regex"]
routes = [{ when = { "http.host" = "static.example" }, target = "10.64.255.1:80" }]
[services.dns]
endpoints = ["203.0.113.10:53/tcp"]
inspect = ["port-extension", "dns"]
default = "10.64.255.2:53"
"""


def opened(directory: Path) -> Registry:
    registry = Registry(str(directory))
    registry.publish(config.parse(TEXT, "/etc/steerd.toml"))
    return registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = opened(tmp_path / "one")
    yield made
    made.close()


def text_of(registry: Registry) -> bytes:
    return b"".join(transfer.export(registry))


OUTSIDE = {"address": "192.0.2.1:1", "external": True}
ROUTES: list[tuple[Any, ...]] = [
    ("web", {"http.host": "b.example"}, "10.64.0.1:80", None),
    ("web", {"http.host": "a.example", "http.path": "/x/*"}, ["10.64.0.2:80", "[fd00:64::2]:same"], None),
    ("web", {"http.host": "*.example"}, "10.64.0.3:80", "198.51.100.0/24"),
    ("web", {"http.path": "/" + "long" * 300}, {"address": "192.0.2.1:1", "external": True}, None),
    ("web", {"prefix": "hex:00ff3a"}, "10.64.0.4:80", None),
    ("web", {"prefix": "SSH-"}, "10.64.0.4:80", None),
    ("web", {"regex": '^a\u00e9.*"$'}, "10.64.0.4:80", None),
    ("dns", {"portext.dst": 7}, "10.64.0.5:53", None),
    ("dns", {"dns.qname": "x.example"}, "10.64.0.5:53", None),
    ("web", {"http.host": "h.example"}, ["10.64.0.6:80", "10.64.0.5:80"], None, "hash", "http.cookie.sid"),
    ("web", {"http.host": "r.example"}, ["10.64.0.6:80", "10.64.0.5:80", OUTSIDE], None, "round-robin"),
]


def fill(registry: Registry, *, backwards: bool = False) -> None:
    for route in reversed(ROUTES) if backwards else ROUTES:
        registry.routes.put(*route)


def lease(registry: Registry, name: str, pool: str = "small", ttl: int | None = None, host: str | None = None) -> None:
    when = {} if host is None else {"http.host": host}
    service = None if host is None else "web"
    registry.leases.add(name, pool, service=service, when=when, source=None, port=8080, ttl=ttl, now=NOW)


def test_what_was_exported_and_imported_is_exported_again_as_the_same_text(registry: Registry, tmp_path: Path) -> None:
    fill(registry)
    lease(registry, "b", ttl=60, host="b.lease.example")
    lease(registry, "a", "tenants", host="a.lease.example")
    lease(registry, "c")
    lease(registry, "d")
    registry.leases.release("c", NOW)
    text = text_of(registry)
    kinds = [json.loads(line)["kind"] for line in text.splitlines()]
    assert kinds == ["registry"] + ["route"] * 11 + ["lease"] * 3 + ["released"]
    other = opened(tmp_path / "two")
    assert transfer.load(other, text) == transfer.Loaded(added=15)
    assert text_of(other) == text
    assert transfer.load(other, text) == transfer.Loaded(unchanged=15)
    # And means the same: who had an alias gets it back, others wait.
    for each in (registry, other):
        lease(each, "e")
        assert each.leases.get("e").addresses == ["10.66.0.3"]
        with pytest.raises(RequestError, match="full"):
            lease(each, "f")
        lease(each, "c")
        assert each.leases.get("c").addresses == ["10.66.0.1"]
        assert [view.name for view in each.leases.expire(NOW + 60)] == ["b"]
    assert text_of(other) == text_of(registry)
    other.close()


def test_the_order_does_not_depend_on_history(registry: Registry, tmp_path: Path) -> None:
    fill(registry)
    other = opened(tmp_path / "two")
    other.routes.put("web", {"http.method": "GET"}, "10.64.0.9:80", None)
    fill(other, backwards=True)
    other.routes.remove("web", {"http.method": "GET"}, None)
    assert text_of(other) == text_of(registry)
    other.close()


def test_an_import_changes_what_has_another_target(registry: Registry) -> None:
    fill(registry)
    line = b'{"kind":"route","service":"web","when":{"http.host":"b.example"},"target":["10.64.0.9:80"]}\n'
    assert transfer.load(registry, line) == transfer.Loaded(changed=1)
    assert line in text_of(registry)


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        ("{", "invalid", "Line 42 cannot be read: Input data was truncated."),
        ('{"kind":"other"}', "invalid", "Line 42 cannot be read: Invalid value 'other' - at `$.kind`."),
        ('{"kind":"registry","format":2}', "invalid", "Line 42 cannot be carried out (format): This is format 2, and"),
        (
            '{"kind":"route","service":"web","when":{"tls.sni":"a"},"target":["10.64.0.1:80"]}',
            "invalid",
            'Line 42 cannot be carried out (when.tls.sni): Is a key of the parser "tls", which inspect does not name.',
        ),
        (
            '{"kind":"route","service":"web","when":{"http.host":"static.example"},"target":["10.64.0.1:80"]}',
            "conflict",
            "Line 42 cannot be carried out (when): The same route is in /etc/steerd.toml: services.web.routes[0];",
        ),
        (
            '{"kind":"lease","name":"n","pool":"tenants","addresses":["10.66.0.1"]}',
            "conflict",
            "Line 42 cannot be carried out (addresses): Not all of them are aliases of a pool tenants.",
        ),
        (
            '{"kind":"lease","name":"n","pool":"tenants","addresses":["10.64.0.40"]}',
            "conflict",
            "Line 42 cannot be carried out (addresses): Somebody else has one of them.",
        ),
        *(
            (f'{{"kind":"lease","name":"n","pool":"tenants","addresses":["10.64.0.9"],{wrong}}}', "invalid", said)
            for wrong, said in (
                ('"port":"no"', "Line 42 cannot be read: Invalid enum value 'no' - at `$.port`."),
                ('"port":-5', "Line 42 cannot be read: Expected `int` >= 1 - at `$.port`."),
                ('"port":65536', "Line 42 cannot be read: Expected `int` <= 65535 - at `$.port`."),
                ('"ttl":-1', "Line 42 cannot be read: Expected `int` >= 1 - at `$.ttl`."),
                ('"expires":1e300', "Line 42 cannot be read: Expected `float` <= 253402300799.0 - at `$.expires`."),
            )
        ),
        (
            '{"kind":"released","name":"\\u00e9","pool":"tenants","addresses":["10.64.0.9"],"until":1}',
            "invalid",
            "Line 42 cannot be carried out (name): Is not the name of a lease.",
        ),
        (
            '{"kind":"released","name":"n","pool":"tenants","addresses":["10.64.0.9"],"until":-1}',
            "invalid",
            "Line 42 cannot be read: Expected `float` >= 0.0 - at `$.until`.",
        ),
    ],
)
def test_a_batch_with_a_line_that_cannot_be_changes_nothing(
    registry: Registry, line: str, code: str, sentence: str
) -> None:
    good = '{"kind":"route","service":"web","when":{"http.host":"x.example"},"target":["10.64.0.40:80"]}'
    before = text_of(registry)
    with pytest.raises(RequestError) as caught:
        transfer.load(registry, f"{good}\n{line}\n{good}\n".encode(), 41)
    assert (caught.value.code, caught.value.field) == (code, "line 42")
    assert caught.value.message.startswith(sentence)
    assert text_of(registry) == before
    assert transfer.load(registry, good.encode()) == transfer.Loaded(added=1)


def test_many_lines_are_exported_in_parts(registry: Registry) -> None:
    lines = [
        json.dumps({"kind": "route", "service": "web", "when": {"http.host": f"h{n:04}"}, "target": ["10.64.0.1:80"]})
        for n in range(2500)
    ]
    assert transfer.load(registry, "\n".join(lines).encode()).added == 2500
    parts = list(transfer.export(registry))
    assert len(parts) == 3
    assert sum(part.count(b"\n") for part in parts) == 2501
