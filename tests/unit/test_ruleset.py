"""The table's text: one source, filled in alike by Python and by shell, and what the daemon puts into its sets."""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerd import config
from steerd.core.marks import MarkLayout
from steerd.core.pools import Pool
from steerd.errors import KernelError
from steerd.kernel import ruleset
from steerd.kernel.handshake import Handshake
from steerd.kernel.ruleset import Contents, IdleTimeouts, Settings
from steerd.main.table import contents_of, settings_of
from steerd.model import TCP, Endpoint, Target

TEMPLATE_PATH = ruleset.template_path()
TEMPLATE = TEMPLATE_PATH.read_text()
HEAD, _, BODY = TEMPLATE.partition("\ntable inet steerd {")
SERVICE = """
[pools.p]
prefixes = ["10.64.0.0/24"]
[services.s]
endpoints = ["203.0.113.10:443/tcp"]
default = "10.64.0.1:80"
"""


def settings_for(gateway: str = "") -> Settings:
    made = config.parse(f"[gateway]\nworkers = 1\n{gateway}\n{SERVICE}", "steerd.toml")
    return settings_of(made, Handshake(mss4=1460, mss6=1440, window_scale=7))


def printed(*arguments: str) -> str:
    """What `install.sh --print` says, which needs no root where it need not ask the kernel."""
    command = ["sh", str(TEMPLATE_PATH.parent / "install.sh"), "--print", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("way", ["native", "fallback"])
@pytest.mark.parametrize("queues", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", ["8-31", "0-31", "4-27", "12-31"])
def test_shell_and_python_fill_the_table_in_alike(way: str, queues: int, bits: str) -> None:
    settings = settings_for(f'mark_bits = "{bits}"\nfirst_queue = {40 + queues}')._replace(queues=queues)
    rendered = ruleset.render(TEMPLATE, settings, native=way == "native")
    options = ("--mark-bits", bits, "--queues", str(queues), "--first-queue", str(40 + queues))
    assert printed(f"--{way}", *options) == rendered


def test_shell_and_python_fill_the_numbers_in_alike() -> None:
    numbers = {name: 1000 + 7 * place for place, name in enumerate(sorted(numeric_defaults()))}
    fields: dict[str, Any] = {name.lower(): value for name, value in numbers.items()}
    rendered = ruleset.render(TEMPLATE, settings_for()._replace(**fields), native=True)
    options = [word for name, value in numbers.items() for word in ("--set", f"{name}={value}")]
    assert printed("--native", *options) == rendered
    for value in numbers.values():
        assert re.search(rf"\b{value}s?\b", rendered)


def test_the_last_set_wins() -> None:
    assert printed("--native", "--set", "SOURCE_RATE=5", "--set", "SOURCE_RATE=6") == ruleset.render(
        TEMPLATE, settings_for()._replace(source_rate=6), native=True
    )


# ---- the template ----


def numeric_defaults() -> dict[str, int]:
    """The numbers in the list on top, by name."""
    return {name: int(value) for name, value in re.findall(r"^#! __([A-Z0-9_]+)__ +([0-9]+) ", HEAD, re.MULTILINE)}


def test_defaults_are_those_of_the_configuration() -> None:
    settings = settings_for()
    assert {name.lower(): value for name, value in numeric_defaults().items()} == {
        name: value
        for name, value in settings._asdict().items()
        if name not in ("mark", "first_queue", "queues")
    }  # fmt: skip
    masks = dict(re.findall(r"^#! __([A-Z0-9_]+)__ +(0x[0-9a-f]+) ", HEAD, re.MULTILINE))
    assert settings.mark == MarkLayout(8, 31)
    assert masks == {"MASK": "0xffffff00", "CLEAR": "0x000000ff", "RESET": "0x00000100", "PASS": "0x00000200"} | {
        "OURS": "0x00000300",
        "ASK": "0x00000400",
        "KEEP": "0x00000500",
    }
    for name, value in masks.items():
        assert f"__{name}__" not in printed("--native").partition("\ntable inet steerd {")[2]
        assert value in printed("--native").partition("\ntable inet steerd {")[2]


def test_the_list_on_top_names_every_placeholder_once_and_no_other() -> None:
    listed = re.findall(r"^#! (__[A-Z0-9_]+__) ", HEAD, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(re.findall(r"__[A-Z0-9_]+__", BODY))


@pytest.mark.parametrize("native", [True, False])
def test_no_placeholder_is_left_in_what_is_loaded(native: bool) -> None:
    rendered = ruleset.render(TEMPLATE, settings_for(), native=native)
    assert rendered.startswith(HEAD)
    assert "__" not in rendered.removeprefix(HEAD)


def test_an_unknown_placeholder_is_refused() -> None:
    with pytest.raises(
        KernelError, match=r"^steerd\.nft has a placeholder __NEW_ONE__ that this version of steerd does not know$"
    ):
        ruleset.render(TEMPLATE.replace("__TOTAL_RATE__", "__NEW_ONE__"), settings_for(), native=True)


def chains() -> dict[str, str]:
    """Chains as they are declared (before they are filled), by name."""
    declarations = BODY.partition("\nflush chain")[0]
    return dict(re.findall(r"^\tchain (\w+) \{\n(.*?)^\t\}", declarations, re.MULTILINE | re.DOTALL))


def test_every_chain_has_a_comment() -> None:
    assert len(chains()) > 5
    for name, text in chains().items():
        assert re.search(r'^\t\tcomment "[^"]{10,}"$', text, re.MULTILINE), name


def test_the_picture_of_the_hooks_has_every_chain_with_its_priority() -> None:
    picture = TEMPLATE_PATH.with_name("README.md").read_text().split("```")[1]
    names = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0}
    hooked = re.findall(r"^\tchain (\w+) \{\n\t\ttype \w+ hook \w+ priority (.*?);", BODY, re.MULTILINE)
    assert len(hooked) > 10
    for chain, written in hooked:
        word, _, offset = written.partition(" ")
        priority = (names[word] if word in names else int(word)) + int(offset.replace(" ", "") or 0)
        assert re.search(rf"(?<!\S){priority} +{chain}\b", picture), (chain, priority)


def test_a_load_empties_and_fills_every_chain_but_the_operators() -> None:
    flushed = re.findall(r"^flush chain inet steerd (\w+)$", BODY, re.MULTILINE)
    assert sorted(flushed) == sorted(chains().keys() - {"admit", "zoned"})
    rules = BODY.rpartition("\nflush chain")[2]
    assert sorted(re.findall(r"^\tchain (\w+) \{$", rules, re.MULTILINE)) == sorted(flushed)
    assert not re.search(r"^(?:delete|destroy|reset|flush (?!chain))", BODY, re.MULTILINE)


def test_every_packet_of_a_connection_meets_the_same_worker() -> None:
    """The hash has a fixed seed and looks at the port: without the seed, each of several rules would have its own."""
    for native in (True, False):
        rendered = ruleset.render(TEMPLATE, settings_for()._replace(queues=3), native=native)
        hashes = re.findall(r"jhash (.*?) mod (\d+) seed (\w+)", rendered)
        assert set(hashes) == {("ip saddr . th sport", "3", "0x5354"), ("ip6 saddr . th sport", "3", "0x5354")}
        assert len(hashes) == 2


def test_without_nft_queue_there_is_a_chain_for_each_worker_and_what_it_does_not_take_is_dropped() -> None:
    rendered = ruleset.render(TEMPLATE, settings_for()._replace(queues=3), native=False)
    assert re.findall(r"^\tchain (worker\d+) \{ comment", rendered, re.MULTILINE) == ["worker0", "worker1", "worker2"]
    jumps = "0 : jump worker0, 1 : jump worker1, 2 : jump worker2"
    for version in (4, 6):
        (rules,) = re.findall(rf"^\tchain queue{version} \{{\n(\t\tjhash.*?)\n\t\}}", rendered, re.M | re.S)
        spread, last = rules.splitlines()
        assert spread.endswith(f" mod 3 seed 0x5354 vmap {{ {jumps} }}") and last == "\t\tdrop"
    assert "flush chain inet steerd worker" not in rendered


EVERYTHING = Contents(*[(None,)] * len(Contents._fields))  # type: ignore[arg-type]
OF_LATE = {"handshake_untracked", "open_window", "recall", "conceal", "reveal"}


@pytest.mark.parametrize(
    ("contents", "left_out"),
    [
        (EVERYTHING, set()),
        (EVERYTHING._replace(query=()), {"query"}),
        (EVERYTHING._replace(late=()), OF_LATE - {"handshake_untracked"}),
        (EVERYTHING._replace(late=(), query=()), OF_LATE | {"query"}),
    ],
)
def test_base_chains_that_the_configuration_has_no_use_for_are_left_out(contents: Contents, left_out: set[str]) -> None:
    def hooked(text: str) -> set[str]:
        return set(re.findall(r"^\tchain (\w+) \{\n\t\ttype ", text, re.MULTILINE))

    assert ruleset.needless(contents) == left_out
    whole = ruleset.render(TEMPLATE, settings_for(), native=True)
    rendered = ruleset.render(TEMPLATE, settings_for(), native=True, without=left_out)
    assert hooked(rendered) == hooked(whole) - left_out
    for name in left_out:
        assert not re.search(rf"\bchain (inet steerd )?{name}\b|(jump|goto) {name}\b", rendered.removeprefix(HEAD))
    assert rendered.count("{") == rendered.count("}")


# ---- the sets ----


def endpoint(text: str, first: int, last: int | None = None) -> Endpoint:
    return Endpoint(ipaddress.ip_address(text), first, last or first, TCP)


SETS = (
    "early",
    "every_syn",
    "late",
    "silent",
    "datagram",
    "query",
    "rebinding",
    "quic",
    "aliases",
    "wildcard",
)
NOTHING = Contents(*[()] * len(Contents._fields))


def commands(contents: Contents) -> list[str]:
    text = ruleset.fill(contents)
    assert text.endswith("\n")
    return text.splitlines()


def test_filling_with_nothing_empties_every_set() -> None:
    expected = []
    for version in (4, 6):
        expected += [f"flush set inet steerd {name}{version}" for name in SETS]
        expected.append(f"flush chain inet steerd idle{version}")
    assert commands(NOTHING) == expected


def test_filling_with_ranges_and_both_families() -> None:
    one, many = endpoint("203.0.113.10", 443), endpoint("203.0.113.10", 8000, 8999)
    six = endpoint("2001:db8::10", 1, 65535)
    pool = Pool("p", tuple(map(ipaddress.ip_network, ("10.64.0.0/16", "fd00:64::/112", "10.70.0.0/30"))))
    alias, six_alias = (Target(ipaddress.ip_address(text), 0) for text in ("10.64.0.9", "fd00:64::9"))
    contents = Contents(
        early=(one, six),
        every_syn=(many,),
        late=(one, six),
        silent=(six,),
        datagram=(many, six),
        query=(one,),
        rebinding=(many,),
        quic=(six,),
        idle=((one, IdleTimeouts(5, 10)), (many, IdleTimeouts(30, 120)), (six, IdleTimeouts(30, 120))),
        pools=(pool,),
        wildcard=((alias, 80), (six_alias, 0), (pool, 90), (pool, 90)),
    )
    added = [line.removeprefix("add element inet steerd ") for line in commands(contents) if "add element" in line]
    timeouts = [line for line in commands(contents) if line.startswith(("add ct", "add rule"))]
    policy = "policy = { unreplied : %d, replied : %d };"
    assert timeouts == [
        f"add ct timeout inet steerd udp4_5_10 {{ protocol udp; l3proto ip; {policy % (5, 10)} }}",
        f"add ct timeout inet steerd udp4_30_120 {{ protocol udp; l3proto ip; {policy % (30, 120)} }}",
        "add rule inet steerd idle4 ct state new ct status & confirmed == 0 ct timeout set ip daddr . udp dport map"
        ' { 203.0.113.10 . 443 : "udp4_5_10", 203.0.113.10 . 8000-8999 : "udp4_30_120" }',
        f"add ct timeout inet steerd udp6_30_120 {{ protocol udp; l3proto ip6; {policy % (30, 120)} }}",
        "add rule inet steerd idle6 ct state new ct status & confirmed == 0 ct timeout set ip6 daddr . udp dport map"
        ' { 2001:db8::10 . 1-65535 : "udp6_30_120" }',
    ]
    assert added == [
        "early4 { 203.0.113.10 . 443 }",
        "every_syn4 { 203.0.113.10 . 8000-8999 }",
        "late4 { 203.0.113.10 . 443 }",
        "datagram4 { 203.0.113.10 . 8000-8999 }",
        "query4 { 203.0.113.10 . 443 }",
        "rebinding4 { 203.0.113.10 . 8000-8999 }",
        "aliases4 { 10.64.0.0/16, 10.70.0.0/30 }",
        "wildcard4 { 10.64.0.0/16 . 90, 10.70.0.0/30 . 90, 10.64.0.9 . 80 }",
        "early6 { 2001:db8::10 . 1-65535 }",
        "late6 { 2001:db8::10 . 1-65535 }",
        "silent6 { 2001:db8::10 . 1-65535 }",
        "datagram6 { 2001:db8::10 . 1-65535 }",
        "quic6 { 2001:db8::10 . 1-65535 }",
        "aliases6 { fd00:64::/112 }",
        "wildcard6 { fd00:64::/112 . 90, fd00:64::9 . 0-89, fd00:64::9 . 91-65535 }",
    ]


A, B, OUTSIDE = (Target(ipaddress.ip_address(text), 0) for text in ("10.64.0.1", "10.64.0.2", "192.0.2.1"))
POOL = Pool("p", tuple(map(ipaddress.ip_network, ("10.64.0.0/29", "10.64.0.8/32"))))


@given(st.lists(st.tuples(st.sampled_from([POOL, A, B, OUTSIDE]), st.sampled_from([0, 1, 2, 80, 65535])), max_size=8))
def test_wildcard_elements_say_what_was_meant_and_never_overlap(wildcard: list[tuple[Pool | Target, int]]) -> None:
    """The kernel takes no overlapping elements, and the whole table with them."""
    found: Counter[tuple[str, int]] = Counter()
    ports = (0, 1, 2, 3, 79, 80, 81, 65534, 65535)
    for line in commands(NOTHING._replace(wildcard=tuple(wildcard))):
        for element in re.findall(r"[{,] (\S+ \. [0-9-]+)", line):
            prefix, _, text = element.partition(" . ")
            first, _, last = text.partition("-")
            hosts = map(str, ipaddress.ip_network(prefix))
            found.update((host, p) for host in hosts for p in ports if int(first) <= p <= int(last or first))
    meant = {
        (str(host), p)
        for target, port in wildcard
        for network in (target.prefixes if isinstance(target, Pool) else [ipaddress.ip_network(target.address)])
        for host in network
        for p in ports
        if port in (0, p)
    }
    assert found == Counter(meant)


def test_every_set_is_emptied_before_it_is_filled() -> None:
    pool = Pool("p", (ipaddress.ip_network("10.64.0.0/16"),))
    lines = commands(NOTHING._replace(early=(endpoint("203.0.113.10", 1),), pools=(pool,)))
    for line in lines:
        if line.startswith("add element"):
            name = line.split()[4]
            assert lines.index(f"flush set inet steerd {name}") < lines.index(line)


def test_a_difference_names_only_what_comes_and_goes() -> None:
    stays, goes, comes = endpoint("203.0.113.10", 443), endpoint("203.0.113.10", 80, 90), endpoint("2001:db8::10", 80)
    before = NOTHING._replace(late=(stays, goes), idle=((stays, IdleTimeouts(5, 10)),))
    after = before._replace(late=(stays, comes), pools=(POOL,))
    assert ruleset.difference(before, before) == ""
    assert ruleset.difference(before, after).splitlines() == [
        "delete element inet steerd late4 { 203.0.113.10 . 80-90 }",
        "add element inet steerd aliases4 { 10.64.0.0/29, 10.64.0.8/32 }",
        "add element inet steerd late6 { 2001:db8::10 . 80 }",
    ]
    other_times = after._replace(idle=((stays, IdleTimeouts(5, 20)),))
    changed = ruleset.difference(after, other_times).splitlines()
    assert changed == [line for line in commands(other_times) if "udp4" in line or line.endswith(" idle4")]
    assert len(changed) == 3


def test_what_the_daemon_fills_in_are_sets_of_the_template() -> None:
    made = config.parse(SERVICE, "steerd.toml")
    names = {line.split()[4] for line in commands(contents_of(made)) if line.split()[1] in ("set", "element")}
    emptied = {line.split()[4] for line in ruleset.flush_targets().splitlines()}
    declared = set(re.findall(r"^\t(?:set|map) (\w+) \{$", BODY, re.MULTILINE))
    assert names | emptied <= declared
    assert not names & emptied
    elements = [
        element.name
        for text in ("10.64.0.1", "fd00:64::1")
        for port in (0, 80)
        for element in ruleset.target_elements(0x1000, Target(ipaddress.ip_address(text), port))
    ]
    target = Target(ipaddress.ip_address("10.64.0.1"), 0)
    daemons, answering, zones = ruleset.datagram_elements(0x1000, 16, target, 53)
    assert (daemons.name, answering.name, zones.name) == ("daemons4", "answering4", "zones")
    assert daemons.key[:6] == answering.key[:6] == target.address.packed + b"\0\x35"
    of_datagrams = {"daemons4", "daemons6", "answering4", "answering6", "zones", "learned"}
    assert set(elements) | of_datagrams == emptied
    assert len(elements) == len(set(elements))


@pytest.mark.parametrize(
    ("gateway_service", "sets"),
    [
        ('inspect = ["port-extension"]\nunextended = "pass"', set()),
        ('inspect = ["port-extension"]\nunextended = "default"', {"every_syn"}),
        ('inspect = ["port-extension"]\nunextended = "unmatched"', {"every_syn"}),
        ("", {"every_syn"}),
        ('inspect = ["port-extension", "http"]\nunextended = "unmatched"', {"every_syn"}),
        ('inspect = ["port-extension", "http"]\nunextended = "pass"', set()),
        ('inspect = ["port-extension", "http"]', {"late"}),
        ('inspect = ["http"]', {"late"}),
        ('inspect = ["http"]\non_silence = "10.64.0.2:25"', {"late", "silent"}),
    ],
)
def test_what_becomes_of_a_plain_syn_is_said_by_the_set_its_endpoint_is_in(
    gateway_service: str, sets: set[str]
) -> None:
    contents = contents_of(config.parse(SERVICE + gateway_service, "steerd.toml"))
    assert contents.early == (endpoint("203.0.113.10", 443),)
    for name in ("every_syn", "late", "silent"):
        assert getattr(contents, name) == (contents.early if name in sets else ())
