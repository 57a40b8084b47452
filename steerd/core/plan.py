"""What has to change so that the aliases a configuration wants are the aliases the kernel has.

Pure: `kernel.aliases` reads the state, hands it in, and carries out what comes back. Addresses are packed (4 or 16
bytes), devices are interface indices (or names, for devices that are still to be made).
"""

from __future__ import annotations

import ipaddress
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from steerd.core.pools import Pool
from steerd.model import IPNetwork

DEVICE_PREFIX = "steer"
CAPACITY: Mapping[int, int] = {4: 256, 6: 4096}
"""How many aliases of each family one device takes. The kernel keeps a device's IPv4 addresses in one list that every
addition walks, so few; IPv6 additions do not walk the device's list, and fewer devices are removed sooner."""


class Held(NamedTuple):
    """The addresses and devices found in the kernel."""

    devices: Mapping[int, str]
    """Our devices: index -> name."""
    ours: list[tuple[int, bytes]]
    """Our addresses: (index of the device, address)."""
    foreign: set[bytes]
    """Addresses somebody else put there, on whatever device."""
    occupied: set[int]
    """Those of our devices that carry a foreign address, and so must stay."""
    names: set[str]
    """The names of all interfaces, ours or not."""


class AddressPlan(NamedTuple):
    """Steps, in the order in which they are to be taken: a device is made before it is used, and nothing is removed
    before its replacement is there."""

    new_devices: list[str]
    add: list[tuple[str, list[bytes]]]
    """(device name, addresses of one family to add to it)."""
    remove: list[tuple[int, list[bytes]]]
    """(device index, addresses to take off it) where the device stays."""
    drop_devices: list[int]
    """Devices that go, with everything on them."""
    dropped: list[tuple[int, bytes]]
    """Our addresses on the devices that go."""

    @property
    def added(self) -> int:
        """How many addresses are added."""
        return sum(len(addresses) for _, addresses in self.add)

    @property
    def removed(self) -> int:
        """How many addresses are removed, those of dropped devices among them."""
        return sum(len(addresses) for _, addresses in self.remove) + len(self.dropped)


def wanted_addresses(pools: Iterable[Pool]) -> Iterator[bytes]:
    """Every alias of the pools in mode `addresses`, packed, in index order (an alias of two pools comes twice)."""
    for pool in pools:
        if pool.mode == "addresses":
            for version, width in ((4, 4), (6, 16)):
                for block in pool.blocks(version):
                    first = int(block.first)
                    for number in range(first, first + block.length):
                        yield number.to_bytes(width, "big")


def wanted_routes(pools: Iterable[Pool]) -> set[IPNetwork]:
    """The prefixes of the local routes that pools in mode `anyip` need: exactly their aliases, no address more."""
    routes: set[IPNetwork] = set()
    for pool in pools:
        if pool.mode == "anyip":
            for version in (4, 6):
                for block in pool.blocks(version):
                    routes.update(ipaddress.summarize_address_range(block.first, block.first + (block.length - 1)))
    return routes


def plan_addresses(wanted: Iterable[bytes], held: Held, capacity: Mapping[int, int] = CAPACITY) -> AddressPlan:
    """The steps from what is held to what is wanted.

    An address that somebody else holds, anywhere, counts as present and is not added a second time. Ours stay where
    they are; new ones fill the devices that exist, then new devices. A device on which nothing is left goes.
    """
    want = dict.fromkeys(wanted)
    present = set(held.foreign)
    mine: set[bytes] = set()
    kept: Counter[tuple[int, int]] = Counter()
    surplus: dict[int, list[bytes]] = {}
    for device, address in held.ours:
        if address in want and address not in mine:
            mine.add(address)
            kept[device, len(address)] += 1
        else:
            surplus.setdefault(device, []).append(address)
    present |= mine

    add: list[tuple[str, list[bytes]]] = []
    used = {device for device, _ in kept} | held.occupied
    fresh: list[str] = []
    names = (name for number in itertools.count() if (name := f"{DEVICE_PREFIX}{number}") not in held.names)
    for width, version in ((4, 4), (16, 6)):
        missing = [address for address in want if len(address) == width and address not in present]
        at = 0
        for device, name in held.devices.items():
            room = capacity[version] - kept[device, width]
            if room > 0 and at < len(missing):
                add.append((name, missing[at : at + room]))
                used.add(device)
                at += room
        for ordinal in itertools.count():
            if at >= len(missing):
                break
            if ordinal == len(fresh):
                fresh.append(next(names))
            add.append((fresh[ordinal], missing[at : at + capacity[version]]))
            at += capacity[version]

    return AddressPlan(
        new_devices=fresh,
        add=add,
        remove=[(device, addresses) for device, addresses in surplus.items() if device in used],
        drop_devices=[device for device in held.devices if device not in used],
        dropped=[(device, address) for device, addresses in surplus.items() if device not in used
                 for address in addresses],
    )  # fmt: skip
