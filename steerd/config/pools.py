"""`[pools.NAME]`: prefixes and sizes."""

from __future__ import annotations

from steerd.config import schema
from steerd.config.reader import Reader, check_name, join
from steerd.config.texts import parse_pool_prefix
from steerd.config.wake import PLACEHOLDER, read_wake
from steerd.core.pools import Pool
from steerd.model import IPNetwork

MAX_REAL_ADDRESSES = {4: 1 << 20, 6: 1 << 14}
"""The most aliases of all pools in mode `addresses`, by address family. The kernel keeps an address and a route for
each, and reconciling reads them all. For each IPv6 address that is added it walks over all that are there
(addrconf_verify_rtnl in net/ipv6/addrconf.c): 16,384 take two seconds, 65,536 minutes."""


def read_prefixes(name: str, raw: schema.Pool, reader: Reader) -> dict[str, IPNetwork]:
    """A pool's prefixes by their dotted keys, without those that were reported."""
    check_name("pools", name, reader)
    path = join(join("pools", name), "prefixes")
    if not raw.prefixes and not reader.is_bad(path):
        reader.problem(path, 'Names no prefix; one would be "10.64.0.0/16".')
    found = {
        f"{path}[{i}]": reader.attempt(f"{path}[{i}]", parse_pool_prefix, text) for i, text in enumerate(raw.prefixes)
    }
    return {key: prefix for key, prefix in found.items() if prefix is not None}


def read_pool(name: str, raw: schema.Pool, prefixes: dict[str, IPNetwork], reader: Reader) -> Pool:
    """`prefixes`: what `read_prefixes` gave."""
    path = join("pools", name)
    wake = read_wake(raw, path, reader)
    if wake is not None and not any(PLACEHOLDER.search(text) for text in (wake.unit, *wake.command)):
        reader.problem(
            f"{path}.wake",
            "Is the same for all aliases of the pool; {lease}, {alias} or {index} in it tells them apart.",
        )
    pool = Pool(name, tuple(prefixes.values()), raw.mode, raw.size, raw.quarantine, wake)
    if reader.is_bad(path):
        return pool
    for version in (4, 6):
        held = sum(prefix.num_addresses for prefix in pool.prefixes if prefix.version == version)
        if raw.size is not None and 0 < held < raw.size:
            reader.problem(f"{path}.size", f"Is {raw.size}, but the IPv{version} prefixes hold {held} addresses.")
    return pool


def check_real_addresses(pools: dict[str, Pool], reader: Reader) -> None:
    """Whether the pools in mode `addresses` have more aliases together than the kernel can bear."""
    for version, most in MAX_REAL_ADDRESSES.items():
        aliases = 0
        for pool in pools.values():
            before, aliases = aliases, aliases + (pool.alias_count(version) if pool.mode == "addresses" else 0)
            if before <= most < aliases:
                reader.problem(
                    f"pools.{pool.name}.mode",
                    f'Is "addresses", which makes {aliases} IPv{version} aliases so far; at most {most} can be real'
                    ' addresses. Set size, or mode = "anyip".',
                )
