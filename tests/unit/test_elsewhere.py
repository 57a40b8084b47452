"""Endpoints at addresses that this machine does not have are said, once each, and stop nothing."""

from __future__ import annotations

from collections.abc import Collection

from steerd import config
from steerd.control import elsewhere
from steerd.model import IPAddress

TEXT = """
[pools.p]
prefixes = ["10.64.0.0/30"]
[services.s]
endpoints = ["203.0.113.11:443/tcp", "203.0.113.10:443/tcp", "203.0.113.11:80/tcp", "[2001:db8::11]:80/tcp"]
default = ["10.64.0.1:80"]
"""


def test_one_sentence_for_each_address() -> None:
    asked: list[IPAddress] = []

    def missing(addresses: Collection[IPAddress]) -> set[IPAddress]:
        asked.extend(addresses)
        return {address for address in addresses if str(address).endswith("11")}

    said = elsewhere.sentences(config.parse(TEXT, "steerd.toml"), missing)
    assert said == [
        f"{address} is not an address of this machine now; no connection to it is steered until it is"
        for address in ("203.0.113.11", "2001:db8::11")
    ]
    assert list(map(str, asked)) == ["203.0.113.11", "203.0.113.10", "2001:db8::11"]
