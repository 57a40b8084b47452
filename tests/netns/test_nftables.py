"""nf_tables over raw netlink, against the kernel.

gateway: the steerd table (empty sets), nothing else
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from steerd import config
from steerd.core.marks import MarkLayout
from steerd.errors import KernelError
from steerd.kernel import ruleset
from steerd.kernel.handshake import Handshake
from steerd.kernel.nftables import Element, Nftables
from steerd.kernel.ruleset import target_elements
from steerd.main.table import contents_of, settings_of
from steerd.model import Target
from tests.netns.lab import Host

MEASURED = Handshake(mss4=1460, mss6=1440, window_scale=7)
"""The defaults of the template, whatever this machine would say."""
CONFIG = config.parse(
    """
    [pools.p]
    prefixes = ["10.64.0.0/24", "fd00:64::/120"]
    [services.s]
    endpoints = ["203.0.113.10:443/tcp"]
    default = "10.64.0.1:80"
    """,
    "steerd.toml",
)
MARK = MarkLayout(8, 31)
MISSING = Element("no_such_set", b"\1\2\3\4", None)


ROOT = Path(__file__).resolve().parents[2]
UNPRIVILEGED = """
import os
from steerd.errors import KernelError
from steerd.kernel.nftables import Element, Nftables
os.setuid(65534)
nftables = Nftables()
for ask in (lambda: nftables.insert([Element("targets4", bytes(4), bytes(8))]),):
    try:
        ask()
    except KernelError as error:
        print(error)
"""


class Lab:
    """A host with the table, and a socket to nf_tables in it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        with host.entered():
            ruleset.load(
                settings_of(CONFIG, MEASURED),
                contents_of(CONFIG),
                native=ruleset.has_native_queue(),
                empty_targets=True,
            )
            self.nftables = Nftables()

    def elements(self, name: str) -> list[str]:
        """A set's or map's elements as `nft` reads them, without their order."""
        kind = "map" if name.startswith(("targets", "hosts")) else "set"
        (listed,) = json.loads(self.host.sh(f"nft -j list {kind} inet steerd {name}"))["nftables"][1:]
        return sorted(json.dumps(element) for element in listed[kind].get("elem", []))


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Lab]:
    made = Lab(new_host("gateway"))
    with contextlib.closing(made.nftables):
        yield made


def target(text: str, port: int) -> Target:
    return Target(ipaddress.ip_address(text), port)


def concatenated(*parts: object) -> str:
    return json.dumps({"concat": list(parts)})


MARK_OF = {id_: MARK.field(id_) for id_ in range(16, 32)}


@pytest.mark.parametrize("address", ["10.64.0.7", "fd00:64::7"])
def test_elements_arrive_as_they_were_meant(lab: Lab, address: str) -> None:
    version = ipaddress.ip_address(address).version
    lab.nftables.insert(target_elements(MARK_OF[16], target(address, 8080)))
    lab.nftables.insert(target_elements(MARK_OF[17], target(address, 0)))
    assert lab.elements(f"targets{version}") == [json.dumps([MARK_OF[16], {"concat": [address, 8080]}])]
    assert lab.elements(f"translated{version}") == [concatenated(MARK_OF[16], address, 8080)]
    assert lab.elements(f"hosts{version}") == [json.dumps([MARK_OF[17], address])]
    assert lab.elements(f"translated_hosts{version}") == [concatenated(MARK_OF[17], address)]


def test_every_element_is_read(lab: Lab) -> None:
    loaded = {id_: target(f"10.64.{id_ >> 8}.{id_ & 255}", 80) for id_ in range(16, 2016)}
    loaded |= {3000: target("10.64.0.1", 0), 3001: target("fd00:64::1", 80), 3002: target("fd00:64::1", 0)}
    for id_, each in loaded.items():
        lab.nftables.insert(target_elements(MARK.field(id_), each))
    read = [element for name in ("targets4", "targets6", "hosts4", "hosts6") for element in lab.nftables.elements(name)]
    assert sorted(read) == sorted(target_elements(MARK.field(id_), each)[0] for id_, each in loaded.items())
    [checked] = lab.nftables.elements("translated6")
    assert checked == target_elements(MARK.field(3001), loaded[3001])[1]
    assert lab.nftables.elements("no_such_set") == []


def test_whether_targets_agree_with_what_is_known(lab: Lab) -> None:
    known = {16: target("10.64.0.1", 80), 17: target("10.64.0.1", 0), 18: target("fd00:64::1", 80)}
    known |= {19: target("fd00:64::1", 0), 20: target("10.64.0.2", 80), 21: target("10.64.0.3", 80)}

    def agrees(known: Mapping[int, Target | None], mark: MarkLayout = MARK) -> bool:
        packed = {id_: (each.address.packed, each.port) for id_, each in known.items() if each is not None}
        return ruleset.targets_agree(lab.nftables, mark, packed.get)

    assert agrees({})
    for id_, each in known.items():
        lab.nftables.insert(target_elements(MARK.field(id_), each))
    assert agrees(known)
    assert not agrees(known, MarkLayout(9, 31))
    for id_ in known:
        for other in (target("10.64.0.4", 80), target("10.64.0.1", 81), target("fd00:64::1", 81), None):
            assert not agrees({**known, id_: other})
    own, _ = target_elements(MARK.field(21), known[21])
    changed, _ = target_elements(MARK.field(21), target("10.64.0.3", 81))
    lab.nftables.delete([own._replace(data=None)])
    assert agrees(known)
    lab.nftables.insert([changed])
    assert not agrees(known)


def test_what_is_there_already_is_fine(lab: Lab) -> None:
    first, second = (target_elements(MARK_OF[id_], target("10.64.0.1", 8000 + id_)) for id_ in (16, 17))
    for _ in range(3):
        lab.nftables.insert(first)
    lab.nftables.insert([*first, *second])
    assert len(lab.elements("targets4")) == len(lab.elements("translated4")) == 2


def test_another_meaning_for_a_mark_is_refused_and_nothing_changes(lab: Lab) -> None:
    lab.nftables.insert(target_elements(MARK_OF[16], target("10.64.0.1", 80)))
    before = lab.elements("targets4"), lab.elements("translated4")
    expected = r"^nf_tables took no element for targets4, translated4 of table inet steerd: File exists$"
    for other in (target("10.64.0.2", 80), target("10.64.0.1", 81)):
        with pytest.raises(KernelError, match=expected):
            lab.nftables.insert(target_elements(MARK_OF[16], other))
        assert (lab.elements("targets4"), lab.elements("translated4")) == before
    lab.nftables.insert(target_elements(MARK_OF[17], target("10.64.0.2", 80)))
    assert len(lab.elements("targets4")) == 2


def test_a_batch_is_all_or_nothing(lab: Lab) -> None:
    good = target_elements(MARK_OF[16], target("10.64.0.1", 80))
    for batch in ([*good, MISSING], [MISSING, *good], [MISSING, *good, MISSING]):
        with pytest.raises(KernelError, match=r"of table inet steerd: No such file or directory$"):
            lab.nftables.insert(batch)
        assert lab.elements("targets4") == lab.elements("translated4") == []
    lab.nftables.insert(good)


@pytest.mark.parametrize("refused", range(1, 5))
def test_after_a_refusal_the_next_request_gets_its_own_answer(lab: Lab, refused: int) -> None:
    """The kernel answers every element of a batch; what is left of one batch's answers is not the next one's."""
    good = target_elements(MARK_OF[16], target("10.64.0.1", 80))
    for _ in range(3):
        with pytest.raises(KernelError):
            lab.nftables.insert([MISSING] * refused)
        lab.nftables.insert(good)
        with pytest.raises(KernelError):
            lab.nftables.insert([MISSING] * refused)
        assert ruleset.our_rules(lab.nftables)
        with pytest.raises(KernelError):
            lab.nftables.insert([*good, *[MISSING] * refused])
        assert lab.nftables.counters()["diverted"] == 0


def test_without_the_table_there_is_a_sentence_and_the_socket_stays_good(lab: Lab) -> None:
    elements = target_elements(MARK_OF[16], target("10.64.0.1", 80))
    assert ruleset.our_rules(lab.nftables)
    lab.host.sh("nft delete table inet steerd")
    assert not ruleset.our_rules(lab.nftables)
    assert lab.nftables.counters() == {}
    expected = r"^nf_tables took no element for targets4, translated4 of table inet steerd: No such file or directory$"
    for _ in range(3):
        with pytest.raises(KernelError, match=expected):
            lab.nftables.insert(elements)
    with lab.host.entered():
        ruleset.load(
            settings_of(CONFIG, MEASURED), contents_of(CONFIG), native=ruleset.has_native_queue(), empty_targets=False
        )
    assert ruleset.our_rules(lab.nftables)
    lab.nftables.insert(elements)
    assert len(lab.elements("targets4")) == 1


def test_another_familys_table_of_that_name_is_not_ours(lab: Lab) -> None:
    lab.host.sh("nft delete table inet steerd; nft add table ip steerd")
    assert not ruleset.our_rules(lab.nftables)


def test_without_the_right_to_it_the_kernels_refusal_is_told_at_once(lab: Lab) -> None:
    """The answer to a batch as a whole bears the number of its first message, not of an element."""
    said = lab.host.sh(f"cd {ROOT}; timeout 200 {sys.executable} - <<'END'\n{UNPRIVILEGED}END")
    assert said.splitlines() == [
        "nf_tables took no element for targets4 of table inet steerd: Operation not permitted",
    ]


def test_counters_are_those_that_nft_lists(lab: Lab) -> None:
    listed = json.loads(lab.host.sh("nft -j list counters table inet steerd"))["nftables"]
    expected = {entry["counter"]["name"]: entry["counter"]["packets"] for entry in listed if "counter" in entry}
    assert lab.nftables.counters() == expected
    assert "diverted" in expected


def test_a_thousand_targets_are_a_moments_work(lab: Lab) -> None:
    """Of both families, one batch each, as workers insert them; `nft` sees all of them."""
    for number in range(1000):
        address = f"10.64.{number // 256}.{number % 256}" if number % 2 else f"fd00:64::{number:x}"
        lab.nftables.insert(target_elements(MARK.field(16 + number), target(address, 8080)))
    assert sum(len(lab.elements(f"targets{version}")) for version in (4, 6)) == 1000
    assert sum(len(lab.elements(f"translated{version}")) for version in (4, 6)) == 1000
