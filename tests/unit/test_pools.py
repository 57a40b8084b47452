"""Pools number their aliases in the order of their prefixes, each family by itself."""

from __future__ import annotations

import ipaddress

import pytest

from steerd.core.pools import Block, Pool, PoolMap

A = ipaddress.ip_network("10.64.0.0/30")
B = ipaddress.ip_network("10.70.0.8/31")
C = ipaddress.ip_network("fd00::/126")
BOTH = Pool("p", (A, C, B))


def test_every_address_of_a_prefix_is_an_alias() -> None:
    assert BOTH.alias_count(4) == 6
    assert [str(BOTH.address(4, i)) for i in range(6)] == [
        "10.64.0.0",
        "10.64.0.1",
        "10.64.0.2",
        "10.64.0.3",
        "10.70.0.8",
        "10.70.0.9",
    ]
    assert BOTH.alias_count(6) == 4
    assert str(BOTH.address(6, 3)) == "fd00::3"


@pytest.mark.parametrize(("version", "index"), [(4, 6), (4, -1), (6, 4), (6, -4)])
def test_there_is_no_alias_outside(version: int, index: int) -> None:
    with pytest.raises(IndexError, match=f"^pool p has no such IPv{version} alias$"):
        BOTH.address(version, index)


def test_blocks_are_runs_of_addresses() -> None:
    first = Block(A.network_address, 4)
    assert BOTH.blocks(4) == [first, Block(B.network_address, 2)]
    assert BOTH.blocks(6) == [Block(C.network_address, 4)]
    assert Pool("p", (A,)).blocks(6) == []


@pytest.mark.parametrize(
    ("size", "lengths4", "lengths6"),
    [(1, [1], [1]), (4, [4], [4]), (5, [4, 1], [4]), (6, [4, 2], [4]), (9, [4, 2], [4])],
)
def test_size_keeps_the_first_of_each_family(size: int, lengths4: list[int], lengths6: list[int]) -> None:
    pool = Pool("p", (A, C, B), size=size)
    assert [block.length for block in pool.blocks(4)] == lengths4
    assert [block.length for block in pool.blocks(6)] == lengths6
    assert pool.alias_count(4) == sum(lengths4)


def test_membership_is_that_of_the_aliases() -> None:
    pool = Pool("p", (A, C, B), size=5)
    members = {pool.address(4, i) for i in range(5)} | {pool.address(6, i) for i in range(4)}
    around = [network[0] + step for network in (A, B, C) for step in range(-2, 6)]
    assert {address for address in around if address in pool} == members
    assert "10.64.0.1" not in pool
    assert "p" not in pool
    assert 1 not in pool


def test_a_pool_may_be_as_large_as_ipv6_allows() -> None:
    pool = Pool("p", (ipaddress.ip_network("fd00::/8"),), "anyip")
    assert pool.alias_count(6) == 1 << 120
    assert pool.address(6, (1 << 120) - 1) == ipaddress.ip_address("fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")


def test_a_map_of_pools_knows_every_alias_and_nothing_beside() -> None:
    other = Pool("q", (ipaddress.ip_network("10.64.0.4/30"), ipaddress.ip_network("fd00::8/125")), size=3)
    aliases = PoolMap([other, BOTH])
    for pool in (BOTH, other):
        for version in (4, 6):
            for index in range(pool.alias_count(version)):
                assert aliases.find(pool.address(version, index)) == (pool, index)
    for text in ("10.63.255.255", "10.64.0.7", "10.70.0.7", "10.70.0.10", "fcff::", "fd00::4", "fd00::b", "::"):
        assert aliases.find(ipaddress.ip_address(text)) is None
    first, last = (int(ipaddress.ip_address(text)) for text in ("10.70.0.8", "10.70.0.9"))
    assert aliases.runs(4)[-1] == (first, last)
