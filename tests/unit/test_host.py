"""What host.py reads out of the tools' answers, and which bits and packets a rule is about."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from steerd.kernel.host import (
    ALL_BITS,
    Chain,
    Rule,
    Table,
    invalid_drops,
    iptables_rules,
    mark_bits,
    mark_users,
    parse_proc_address,
    rule_texts,
)

MARK = {"meta": {"key": "mark"}}
CT_MARK = {"ct": {"key": "mark"}}
STATE = {"ct": {"key": "state"}}
DROP: dict[str, Any] = {"drop": None}


def nft(*statements: object, handle: int = 1) -> Rule:
    return Rule(handle, "text", list(statements), None, "text")


def iptables(line: str, handle: int = 1) -> Rule:
    return Rule(handle, line, [{"xt": None}], shlex.split(line), "")


def match(left: object, right: object, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def assign(value: object, key: object = MARK) -> dict[str, Any]:
    return {"mangle": {"key": key, "value": value}}


@pytest.mark.parametrize(
    ("statement", "bits"),
    [
        (match({"payload": {"protocol": "tcp", "field": "dport"}}, 443), 0),
        (match(MARK, 1), ALL_BITS),
        (match({"&": [MARK, 0xFF]}, 1), 0xFF),
        (match({"&": [MARK, 0xFF]}, 0, "!="), 0xFF),
        (match({"concat": [MARK, {"meta": {"key": "iifname"}}]}, "@set"), ALL_BITS),
        (match({"&": [CT_MARK, 0xFF]}, 1), 0),
        ({"vmap": {"key": {"&": [MARK, 0xF00]}, "data": {"set": [[1, DROP]]}}}, 0xF00),
        (assign(1), ALL_BITS),
        (assign({"|": [MARK, 0x10]}), 0x10),
        (assign({"^": [MARK, 0x10]}), 0x10),
        (assign({"&": [MARK, 0xFFFFFF0F]}), 0xF0),
        (assign({"|": [{"&": [MARK, 0xFFFF00FF]}, 0x100]}), 0xFF00),
        (assign({"^": [{"&": [MARK, 0xFFFFFFF0]}, 0x100]}), 0x10F),
        (assign({"|": [{"&": [MARK, 0xFFFFFF00]}, {"&": [CT_MARK, 0xFF]}]}), 0xFF),
        (assign(CT_MARK), ALL_BITS),
        (assign({"&": [CT_MARK, 0xFF]}), ALL_BITS),
        (assign(MARK, CT_MARK), ALL_BITS),
        (assign({"&": [MARK, 0xFF]}, CT_MARK), 0xFF),
        (assign(5, CT_MARK), 0),
    ],
)
def test_mark_bits_of_an_nft_rule(statement: object, bits: int) -> None:
    assert mark_bits(nft({"counter": {}}, statement, DROP)) == bits


@pytest.mark.parametrize(
    ("line", "bits"),
    [
        ("-A X -p tcp -j ACCEPT", 0),
        ("-A X -m mark --mark 0x5 -j RETURN", ALL_BITS),
        ("-A X -m mark ! --mark 0x1/0xf -j RETURN", 0xF),
        ("-A X -j MARK --set-xmark 0x5/0xffffffff", ALL_BITS),
        ("-A X -j MARK --set-xmark 0x10/0x10", 0x10),
        ("-A X -j MARK --set-xmark 0x0/0xffffff00", 0xFFFFFF00),
        ("-A X -m mark --mark 0x100/0x100 -j MARK --set-xmark 0x1/0x0", 0x101),
        ("-A X -p tcp -j TPROXY --on-port 5 --on-ip 0.0.0.0 --tproxy-mark 0x1/0x1", 0x1),
        ("-A X -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", ALL_BITS),
        ("-A X -j CONNMARK --restore-mark --nfmask 0xf --ctmask 0xff", 0xFF),
        ("-A X -j CONNMARK --save-mark --nfmask 0xf --ctmask 0xff00", 0xF),
        ("-A X -j CONNMARK --set-xmark 0x5/0xffffffff", 0),
        ("-A X -m connmark --mark 0x5 -j ACCEPT", 0),
        ('-A X -m comment --comment "-m mark --mark 0x5" -j ACCEPT', 0),
    ],
)
def test_mark_bits_of_an_iptables_rule(line: str, bits: int) -> None:
    assert mark_bits(iptables(line)) == bits


def test_mark_users_are_those_that_share_a_bit() -> None:
    low, high = nft(match({"&": [MARK, 0xFF]}, 1), handle=1), nft(match({"&": [MARK, 0x100]}, 1), handle=2)
    table = Table("inet", "t", {"c": Chain("c", None, None, [low, high])})
    assert [finding.rule.handle for finding in mark_users([table], 0xFFFFFF00)] == [2]


def found(rules: list[Rule], hook: str = "prerouting", priority: int = -160, **others: list[Rule]) -> list[int]:
    chains = {"base": Chain("base", hook, priority, rules)}
    chains |= {name: Chain(name, None, None, more) for name, more in others.items()}
    return [finding.rule.handle for finding in invalid_drops([Table("inet", "t", chains)])]


@pytest.mark.parametrize(
    ("statements", "is_found"),
    [
        ([match(STATE, "invalid", "in"), DROP], True),
        ([match(STATE, ["invalid", "untracked"], "in"), {"counter": {}}, {"reject": {"type": "tcp reset"}}], True),
        ([match(STATE, {"set": ["invalid", "new"]}), DROP], True),
        ([match(STATE, {"set": ["established", "related"]}, "!="), DROP], True),
        ([match(STATE, ["established", "related"], "in"), DROP], False),
        ([match(STATE, "invalid", "!="), DROP], False),
        ([match(STATE, "invalid", "in"), {"accept": None}], False),
        ([{"vmap": {"key": STATE, "data": {"set": [["established", {"accept": None}], ["invalid", DROP]]}}}], True),
        ([{"vmap": {"key": STATE, "data": {"set": [["new", DROP], ["invalid", {"accept": None}]]}}}], False),
        ([{"vmap": {"key": STATE, "data": "@named"}}], False),
        ([DROP], False),
    ],
)
def test_a_rule_that_drops_invalid_packets(statements: list[object], is_found: bool) -> None:
    assert found([nft(*statements)]) == ([1] if is_found else [])


def test_jumps_are_followed_and_loops_end() -> None:
    invalid = match(STATE, "invalid", "in")
    jump, goto = {"jump": {"target": "a"}}, {"goto": {"target": "b"}}
    assert found([nft(jump)], a=[nft(goto)], b=[nft({"jump": {"target": "a"}}), nft(invalid, DROP, handle=9)]) == [9]
    assert found([nft(invalid, jump)], a=[nft(DROP, handle=9)]) == [9]
    assert found([nft(jump)], a=[nft(DROP, handle=9)]) == []
    vmap = {"vmap": {"key": STATE, "data": {"set": [["invalid", jump]]}}}
    assert found([nft(vmap)], a=[nft(DROP, handle=9)]) == [9]


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("-A X -m conntrack --ctstate INVALID -j DROP", True),
        ("-A X -m state --state INVALID,NEW -j REJECT --reject-with tcp-reset", True),
        ("-A X -m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP", True),
        ("-A X -m conntrack ! --ctstate INVALID -j DROP", False),
        ("-A X -m conntrack --ctstate NEW -j DROP", False),
        ("-A X -m conntrack --ctstate INVALID -j ACCEPT", False),
        ("-A X -m conntrack --ctstate INVALID -g other", True),
    ],
)
def test_an_iptables_rule_that_drops_invalid_packets(line: str, is_found: bool) -> None:
    assert bool(found([iptables(line)], other=[nft(DROP, handle=2)])) is is_found


@pytest.mark.parametrize(
    ("hook", "priority", "is_found"),
    [
        ("prerouting", -300, False),
        ("prerouting", -200, False),
        ("prerouting", -199, True),
        ("prerouting", -150, True),
        ("input", -11, True),
        ("input", -10, True),
        ("input", -9, False),
        ("input", 0, False),
        ("output", -300, False),
        ("output", 0, True),
        ("forward", 0, False),
    ],
)
def test_only_chains_on_the_way_count(hook: str, priority: int, is_found: bool) -> None:
    assert bool(found([nft(match(STATE, "invalid", "in"), DROP)], hook, priority)) is is_found


def test_rule_texts_by_handle() -> None:
    listing = (
        "table inet fw { # handle 1\n\tset s { # handle 4\n\t\ttype ipv4_addr\n\t}\n\n\tchain pre { # handle 2\n"
        "\t\ttype filter hook prerouting priority mangle - 10; policy accept;\n"
        '\t\tcomment "for # handle 8"\n'
        "\t\tct state invalid drop # handle 6\n"
        "\t\tct state vmap { invalid : drop,\n\t\t\t\testablished : accept } # handle 9\n\t}\n}\n"
    )
    assert rule_texts(listing) == {
        6: "ct state invalid drop",
        9: "ct state vmap { invalid : drop, established : accept }",
    }


def test_iptables_rules_by_table_and_chain() -> None:
    saved = (
        "# x\n*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j A\n-A A -j B\nCOMMIT\n*filter\n-A A -j C\nCOMMIT\n"
    )
    assert iptables_rules(saved) == {
        ("mangle", "PREROUTING"): ["-A PREROUTING -j A"],
        ("mangle", "A"): ["-A A -j B"],
        ("filter", "A"): ["-A A -j C"],
    }


def test_addresses_of_proc_net_tcp() -> None:
    # As a little-endian machine prints them; this is also what the test machines are.
    assert parse_proc_address("0100007F:0016") == (bytes([127, 0, 0, 1]), 22)
    assert parse_proc_address("B80D0120000000000000000010000000:01BB") == (
        bytes.fromhex("20010db8000000000000000000000010"),
        443,
    )
