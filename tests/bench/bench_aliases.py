"""Aliases added and removed: `reconcile` in seconds, and `ip -batch` for comparison.

    [ one namespace a measurement ]  lo, steer0 .. steerN   or   lo, one bridge   or   lo, a bridge for each 256

Sizes and ways take turns, round by round. *ip_batch* has all addresses on one device, as one would write it; *spread*
is `ip -batch` that knows what steerd knows, that the kernel walks a device's list of addresses for each new one.

Onto one device, 65,536 addresses take `ip -batch` five minutes to add; so it is stopped after IP_SECONDS, the seconds
for all are told as what they would be at least, had the rest gone as fast as the first, and only adding is measured.
Left out, since each takes minutes: `ip -batch` with 10,000 of IPv6 (each also walks the routing tree: 54 s to add and
70 s to remove, once measured), and 65,536 IPv6 aliases as addresses (the kernel walks all IPv6 addresses of the
namespace for each, whatever the device; see steerd/kernel/aliases.py). What a pool of that size takes in mode `anyip`
is measured instead.
"""

from __future__ import annotations

import contextlib
import ipaddress
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

from rich.console import Console
from rich.table import Table

from steerd.core.pools import Mode, Pool
from steerd.kernel.aliases import reconcile, remove_all
from tests.bench import report
from tests.bench.scenario import Bar, Chart, Goal, Result, Spread, is_quick, rounds_of, spread
from tests.netns.lab import Host

PREFIX = {4: "10.64.0.0/16", 6: "fd00:64::/112"}
AS_ADDRESSES = {4: (1000, 10000, 65536), 6: (1000, 10000)}
WITH_IP = {4: (1000, 10000), 6: (1000,)}
A_DEVICE = 256
ROUNDS = rounds_of(3)
IP_SECONDS = 5 if is_quick() else 30
ALLOWED_S = 1.0
CHARTED = {
    "reconcile_v4_65536": "steerd",
    "spread_v4_65536": "ip -batch, 256 devices",
    "ip_batch_v4_65536": "ip -batch, one device, at least",
}


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


def with_ip_batch(version: int, size: int, devices: int = 1) -> dict[str, float]:
    """Seconds that `ip -batch` takes to add as many addresses to so many devices (which are made first, in the same
    time), and to remove them one by one."""
    seconds = {}
    with namespace() as host, tempfile.NamedTemporaryFile("w") as file:
        for verb in ("add", "del"):
            file.seek(0)
            file.truncate()
            file.writelines(_batch(verb, version, size, devices))
            file.flush()
            began = time.monotonic()
            host.sh(f"ip -batch {file.name}")
            seconds["add_s" if verb == "add" else "remove_s"] = time.monotonic() - began
    return seconds


def at_least_with_ip_batch(version: int, size: int) -> dict[str, float]:
    """The same onto one device, for IP_SECONDS: what adding all of them would take if they went on like that."""
    with namespace() as host, tempfile.NamedTemporaryFile("w") as file:
        file.writelines(_batch("add", version, size, 1))
        file.flush()
        began = time.monotonic()
        host.sh(f"timeout {IP_SECONDS} ip -batch {file.name} || [ $? = 124 ]")
        seconds = time.monotonic() - began
        added = int(host.sh(f"ip -{version} -o addr show dev one0 | wc -l"))
    return {"add_s": seconds * size / added, "added_when_stopped": added}


def _batch(verb: str, version: int, size: int, devices: int) -> Iterator[str]:
    width, options = {4: (32, ""), 6: (128, " nodad")}[version]
    first = ipaddress.ip_network(PREFIX[version])[0]
    if verb == "add":
        for device in range(devices):
            yield f"link add one{device} type bridge\nlink set one{device} up\n"
    for number in range(size):
        device = number * devices // size
        yield f"addr {verb} {first + number}/{width} dev one{device}{options if verb == 'add' else ''}\n"


Seconds = dict[str, float]


def _ways() -> dict[str, Callable[[], Seconds]]:
    """What takes turns, by name."""
    ways: dict[str, Callable[[], Seconds]] = {}
    for version, sizes in AS_ADDRESSES.items():
        for size in sizes:
            ways[f"reconcile_v{version}_{size}"] = partial(with_reconcile, version, size)
        ways[f"anyip_v{version}_65536"] = partial(with_reconcile, version, 65536, "anyip")
        for size in WITH_IP[version]:
            ways[f"ip_batch_v{version}_{size}"] = partial(with_ip_batch, version, size)
    for size in AS_ADDRESSES[4]:
        ways[f"spread_v4_{size}"] = partial(with_ip_batch, 4, size, -(-size // A_DEVICE))
    return ways


def run(console: Console) -> Result:
    """All ways in turn, show a table, and give the ratios of speed (addresses a second) to `ip -batch`."""
    ways = _ways()
    rounds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, measure in ways.items():
            rounds[name].append(measure())
    rounds["ip_batch_v4_65536"] = [at_least_with_ip_batch(4, 65536)]
    figures = {name: {key: spread([each[key] for each in found]) for key in found[0]} for name, found in rounds.items()}
    table = Table("seconds", "add", "again, unchanged", "remove")
    for name, seconds in figures.items():
        table.add_row(name, *(_seconds(seconds.get(key)) for key in ("add_s", "unchanged_s", "remove_s")))
    console.print(table)
    ratios = _ratios(rounds)
    report.show_ratios(console, ratios)
    bars = [
        Bar(label, spread([each["add_s"] for each in rounds[name]]), ours=name.startswith("reconcile"))
        for name, label in CHARTED.items()
    ]
    return Result(
        "aliases",
        ratios,
        {name: {key: report.rounded(value, 3) for key, value in found.items()} for name, found in figures.items()},
        [Goal("reconcile_add_65536/allowed", 1, at_least=False)],
        [Chart("add", "Seconds to add 65,536 IPv4 addresses (less is better)", bars, reference=ALLOWED_S)],
    )


def _ratios(rounds: dict[str, list[Seconds]]) -> dict[str, Spread]:
    ratios = {}
    for version, sizes in WITH_IP.items():
        for size in sizes:
            for verb in ("add", "remove"):
                name = f"reconcile/ip_batch_{verb}_v{version}_{size}"
                ratios[name] = _faster(rounds, f"reconcile_v{version}_{size}", f"ip_batch_v{version}_{size}", verb)
    for size in AS_ADDRESSES[4]:
        for verb in ("add", "remove"):
            ratios[f"reconcile/spread_{verb}_{size}"] = _faster(
                rounds, f"reconcile_v4_{size}", f"spread_v4_{size}", verb
            )
    ours = rounds["reconcile_v4_65536"]
    at_least = rounds["ip_batch_v4_65536"][0]["add_s"]
    ratios["reconcile/ip_batch_add_v4_65536_at_least"] = spread([at_least / each["add_s"] for each in ours])
    ratios["reconcile_add_65536/allowed"] = spread([each["add_s"] / ALLOWED_S for each in ours])
    return ratios


def _faster(rounds: dict[str, list[Seconds]], ours: str, theirs: str, verb: str) -> Spread:
    return report.paired((s[f"{verb}_s"] for s in rounds[theirs]), (s[f"{verb}_s"] for s in rounds[ours]))


def _seconds(value: Spread | None) -> str:
    return "" if value is None else f"{value.median:.3f} ({value.lowest:.3f} - {value.highest:.3f})"
