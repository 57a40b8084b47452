"""Registries with many routes, for scenarios that have a million of them: the configuration, and what fills one.

Route n leads from `name(n)` to port PORT of the alias n modulo 65,536.
"""

from __future__ import annotations

import ipaddress
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator

from steerd import config
from steerd.control import transfer
from steerd.control.registry import Registry

ALIASES = 65_536
PREFIX = ipaddress.ip_network("10.64.0.0/16")
ENDPOINT = "203.0.113.10"
PORT = 8080
_BATCH = 10_000
_BODY = """\
[pools.tenants]
prefixes = ["{prefix}"]
mode = "{mode}"
[services.web]
endpoints = ["{endpoint}:80/tcp"]
inspect = ["http"]
"""


def body(mode: str = "anyip") -> str:
    """The pool and the service, in TOML."""
    return _BODY.format(prefix=PREFIX, mode=mode, endpoint=ENDPOINT)


def name(number: int) -> str:
    """What clients ask route `number` for."""
    return f"t{number:07}.example.net"


def alias(number: int) -> str:
    """Where route `number` leads."""
    return str(PREFIX[number % ALIASES])


def by_host(number: int) -> dict[str, object]:
    """Route `number` as an import has it."""
    return {"service": "web", "when": {"http.host": name(number)}, "target": [f"{alias(number)}:{PORT}"]}


Route = Callable[[int], dict[str, object]]


def fill(directory: str, size: int, text: str | None = None, route: Route = by_host) -> float:
    """Make a registry in a directory, with so many routes; how many seconds the import took. In a process of its own,
    whose memory is gone when it is done. `text`: the configuration; None: `body()`."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    importer = fork.Process(target=lambda: theirs.send(_import(directory, size, text or body(), route)))
    importer.start()
    theirs.close()  # so that its end is seen
    seconds: float = ours.recv()
    importer.join()
    return seconds


def _import(directory: str, size: int, text: str, route: Route) -> float:
    batches = list(_lines(size, route))
    registry = Registry(directory)
    registry.publish(config.parse(text, "bench"))
    began = time.perf_counter()
    for batch in batches:
        transfer.load(registry, batch)
    seconds = time.perf_counter() - began
    registry.close()
    return seconds


def _lines(size: int, route: Route) -> Iterator[bytes]:
    for first in range(0, size, _BATCH):
        numbers = range(first, min(first + _BATCH, size))
        yield "\n".join(json.dumps({"kind": "route", **route(number)}) for number in numbers).encode()
