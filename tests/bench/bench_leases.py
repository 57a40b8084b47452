"""Leases: what one costs with 100 and with 65,000 others, on the disk and in a real kernel.

    [ one namespace ]  lo, steer0 .. steer255 with 65,536 aliases; the registry on the disk

Each operation is what the API does without HTTP: an alias is chosen, the kernel is asked whether it has it, flows of a
former holder are looked for in conntrack, and lease, route and ids are written in one transaction that is on the disk
before the operation ends (`sync_us` is what such a transaction costs by itself, with one entry in it).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from steerd import config
from steerd.control import transfer
from steerd.control.registry import Registry
from steerd.kernel import aliases
from steerd.kernel.conntrack import Conntrack
from steerd.model import IPAddress
from tests.bench.bench_aliases import namespace
from tests.bench.scenario import Result, rounds_of

TEXT = """
[pools.tenants]
prefixes = ["10.64.0.0/16"]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["tls"]
"""
SIZES = (100, 65_000)
BATCH = 10_000
NOW = 1_800_000_000.0


class Kernel:
    """As the main process has it."""

    def make_ready(self, addresses: Sequence[IPAddress]) -> None:
        assert aliases.are_local(addresses)

    def end_flows(self, addresses: Sequence[IPAddress]) -> int:
        with contextlib.closing(Conntrack()) as conntrack:
            return conntrack.end_flows_to([address.packed for address in addresses])


def add(registry: Registry, number: int) -> None:
    name = f"t{number:05}"
    registry.leases.add(
        name, "tenants", service="web", when={"tls.sni": f"{name}.example"}, source=None, port=8443, ttl=None, now=NOW
    )


def fill(registry: Registry, numbers: range) -> None:
    """As `steerctl import` does."""
    for first in range(numbers.start, numbers.stop, BATCH):
        text = "\n".join(
            json.dumps(
                {
                    "kind": "lease",
                    "name": f"t{number:05}",
                    "pool": "tenants",
                    "addresses": [f"10.64.{number >> 8}.{number & 255}"],
                    "service": "web",
                    "when": {"tls.sni": f"t{number:05}.example"},
                    "port": 8443,
                }
            )
            for number in range(first, min(first + BATCH, numbers.stop))
        )
        transfer.load(registry, text.encode())


def timed(work: Callable[[int], object], numbers: range) -> float:
    """Microseconds of each, the median."""
    found = []
    for number in numbers:
        began = time.perf_counter()
        work(number)
        found.append((time.perf_counter() - began) * 1e6)
    return statistics.median(found)


def measure(registry: Registry, beside: int) -> dict[str, float]:
    """With so many leases beside those that are measured."""
    numbers = range(beside, beside + rounds_of(20) * 10)

    def sync(number: int) -> None:
        with registry.routes.changing() as txn:
            registry.ids(txn)
            txn.put(b"bench", number.to_bytes(4, "big"), db=registry.routes.leased)

    return {
        "add_us": timed(lambda number: add(registry, number), numbers),
        "renew_us": timed(lambda number: registry.leases.renew(f"t{number:05}", 60, NOW), numbers),
        "release_us": timed(lambda number: registry.leases.release(f"t{number:05}", NOW), numbers),
        "again_us": timed(lambda number: add(registry, number), numbers),
        "sync_us": timed(sync, numbers),
    }


def run(console: Console) -> Result:
    """Fill the pool step by step, measure at each size, show a table, and give the ratios."""
    figures: dict[str, dict[str, float]] = {}
    with namespace(), tempfile.TemporaryDirectory(prefix="steerd-bench-") as directory:
        made = config.parse(TEXT, "bench")
        aliases.reconcile(list(made.pools.values()))
        registry = Registry(directory, Kernel())
        try:
            registry.publish(made)
            filled = 0
            for size in SIZES:
                began = time.perf_counter()
                fill(registry, range(filled, size))
                seconds = time.perf_counter() - began
                figures[f"leases_{size}"] = {"import_per_s": (size - filled) / seconds, **measure(registry, size)}
                filled = size + len(range(rounds_of(20) * 10))
        finally:
            registry.close()
            aliases.remove_all()
    table = Table("leases", *next(iter(figures.values())))
    for name, found in figures.items():
        table.add_row(name.removeprefix("leases_"), *(f"{value:,.0f}" for value in found.values()))
    console.print(table)
    few, many = (figures[f"leases_{size}"] for size in SIZES)
    ratios = {
        f"{name}_65000/100": many[f"{name}_us"] / few[f"{name}_us"] for name in ("add", "renew", "release", "again")
    }
    return Result("leases", ratios, figures)
