"""Aliases added and removed: `reconcile` in seconds, and `ip -batch` onto one device for comparison.

    [ one namespace a measurement ]  lo, steer0 .. steerN   or   lo, one bridge

Left out, since each takes minutes: `ip -batch` with 65,536 addresses (the kernel walks the device's list for each), or
with 10,000 of IPv6 (each also walks the routing tree: 54 s to add and 70 s to remove, once measured), and 65,536 IPv6
aliases as addresses (the kernel walks all IPv6 addresses of the namespace for each, whatever the device; see
steerd/kernel/aliases.py). What a pool of that size takes in mode `anyip` is measured instead.
"""

from __future__ import annotations

import contextlib
import ipaddress
import tempfile
import time
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from steerd.core.pools import Mode, Pool
from steerd.kernel.aliases import reconcile, remove_all
from tests.bench.scenario import Result
from tests.netns.lab import Host

PREFIX = {4: "10.64.0.0/16", 6: "fd00:64::/112"}
AS_ADDRESSES = {4: (1000, 10000, 65536), 6: (1000, 10000)}
WITH_IP = {4: (1000, 10000), 6: (1000,)}


@contextlib.contextmanager
def namespace() -> Iterator[Host]:
    """A fresh one, entered."""
    host = Host("bench")
    try:
        with host.entered():
            yield host
    finally:
        host.close()


def with_reconcile(version: int, size: int, mode: Mode = "addresses") -> dict[str, float]:
    """Seconds to add the aliases from nothing, to find that nothing is to be done, and to remove them."""
    pools = [Pool("bench", (ipaddress.ip_network(PREFIX[version]),), mode, size)]
    with namespace():
        try:
            return {
                "add_s": reconcile(pools).seconds,
                "unchanged_s": reconcile(pools).seconds,
                "remove_s": remove_all().seconds,
            }
        finally:
            # A namespace that dies with thousands of IPv6 addresses in it keeps the kernel busy for minutes.
            remove_all()


def with_ip_batch(version: int, size: int) -> dict[str, float]:
    """Seconds that `ip -batch` takes to add as many addresses to one device, and to remove them one by one."""
    width = {4: 32, 6: 128}[version]
    first = ipaddress.ip_network(PREFIX[version])[0]
    options = {4: "", 6: " nodad"}[version]
    seconds = {}
    with namespace() as host, tempfile.NamedTemporaryFile("w") as file:
        host.sh("ip link add one type bridge && ip link set one up")
        for verb, tail in (("add", options), ("del", "")):
            file.seek(0)
            file.truncate()
            file.writelines(f"addr {verb} {first + number}/{width} dev one{tail}\n" for number in range(size))
            file.flush()
            began = time.monotonic()
            host.sh(f"ip -batch {file.name}")
            seconds["add_s" if verb == "add" else "remove_s"] = time.monotonic() - began
    return seconds


def run(console: Console) -> Result:
    """Measure everything once, show a table, and give the ratios of speed (addresses a second) to `ip -batch`."""
    figures: dict[str, dict[str, float]] = {}
    for version, sizes in AS_ADDRESSES.items():
        for size in sizes:
            figures[f"reconcile_v{version}_{size}"] = with_reconcile(version, size)
        figures[f"anyip_v{version}_65536"] = with_reconcile(version, 65536, "anyip")
        for size in WITH_IP[version]:
            figures[f"ip_batch_v{version}_{size}"] = with_ip_batch(version, size)
    table = Table("seconds", "add", "again, unchanged", "remove")
    for name, seconds in figures.items():
        table.add_row(
            name, *(f"{seconds[key]:.3f}" if key in seconds else "" for key in ("add_s", "unchanged_s", "remove_s"))
        )
    console.print(table)
    ratios = {
        f"reconcile/ip_batch_{verb}_v{version}_{size}": figures[f"ip_batch_v{version}_{size}"][f"{verb}_s"]
        / figures[f"reconcile_v{version}_{size}"][f"{verb}_s"]
        for version in AS_ADDRESSES
        for size in WITH_IP[version]
        for verb in ("add", "remove")
    }
    return Result("aliases", ratios, figures)
