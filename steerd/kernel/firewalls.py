"""Which chains of others drop connections that steerd has steered. Looks, changes nothing.

A firewall that is not told of steerd's decision sees nothing but a new connection to the alias and its port. Chains are
followed as the kernel does, as far as that can be said of any such connection: it is new, its address was translated,
and in the hook input it is for a local address. A rule with any other condition is taken not to match, but for those
that only lead on (jump, goto) by interface or protocol. So a rule against single ports or addresses is not found.

nft/install.sh --status does the same in awk, for those who have no Python there; tests/netns/test_firewalls.py holds
one to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from steerd.kernel.host import Chain, Table

_FAMILIES = ("ip", "ip6", "inet")
_MOST_JUMPS = 16
_CLUTTER = re.compile(
    r' comment "[^"]*"$|counter packets \d+ bytes \d+ ?|counter name "[^"]*" ?'
    r'|log( prefix "[^"]*")?( level [a-z]+)?( flags [a-z ]+)? '
)
_VERDICT = re.compile(r"(accept|drop|reject.*|return|(?:jump|goto) (\S+))$")
_LETS_STEERED_IN = re.compile(r"ct status [a-z,{} ]*dnat.* accept$")
_HOLDS = re.compile(r"$|ct state new$|ct status (== )?dnat$|ct (state|status) [a-z, {}]*new")
_ANY_LO = re.compile(r'iif(name)? "?lo"?( |$)')
_ONLY_LO = re.compile(r'iif(name)? (!= )?"?lo"?$')
_ONE_INTERFACE = re.compile(r'iif(name)? "?[^"{!]*"?( |$)')
_LEADS_ON = re.compile(r"iif|meta (iif|l4proto|nfproto)|ip6? protocol|tcp flags")

_Verdict = Literal["accept", "drop", ""]


class Dropping(NamedTuple):
    """A base chain that drops what is steered."""

    table: Table
    chain: Chain
    late: bool
    """It drops what late steering opens, too: that comes from lo."""

    @property
    def remedy(self) -> str:
        """What to add, in the words of who keeps that firewall."""
        family, name, chain = self.table.family, self.table.name, self.chain.name
        six = "6" if family == "ip6" else ""
        if any(re.fullmatch("ufw6?-before-input", each) for each in self.table.chains):
            way = "forward" if chain == "FORWARD" else "input"
            rule = f"-A ufw{six}-before-{way} -m conntrack --ctstate DNAT -j ACCEPT"
            return f"`{rule}` to /etc/ufw/before{six}.rules, before COMMIT, and then `ufw reload`"
        if name == "filter" and family != "inet" and chain in ("INPUT", "FORWARD"):
            return f"`ip{six}tables -I {chain} -m conntrack --ctstate DNAT -j ACCEPT`"
        return f"`nft insert rule {family} {name} {chain} ct status dnat accept`"


def drops(tables: Iterable[Table], hook: Literal["input", "forward"]) -> list[Dropping]:
    """The base chains of a hook that drop a new connection whose address was translated."""
    return [
        Dropping(table, chain, late=_fate(table, chain, from_lo=True) == "drop")
        for table in tables
        if table.family in _FAMILIES
        for chain in table.chains.values()
        if chain.hook == hook and _fate(table, chain, from_lo=False) == "drop"
    ]


def _fate(table: Table, base: Chain, *, from_lo: bool) -> _Verdict:
    return _judge(table, base, base.hook, from_lo, 0) or ("drop" if base.policy == "drop" else "")


def _judge(table: Table, chain: Chain | None, hook: str | None, from_lo: bool, jumps: int) -> _Verdict:
    if chain is None or jumps > _MOST_JUMPS:
        return ""
    for rule in chain.rules:
        text = _CLUTTER.sub("", rule.in_nft)
        if _LETS_STEERED_IN.search(text) and "!=" not in text:
            return "accept"
        found = _VERDICT.search(text)
        if found is None:
            continue
        conditions, verdict, target = text[: found.start()].rstrip(), found[1], found[2]
        known = _holds(conditions, hook, from_lo)
        if target is not None:
            if known or (known is None and _LEADS_ON.match(conditions)):
                there = _judge(table, table.chains.get(target), hook, from_lo, jumps + 1)
                if there == "drop" or (there == "accept" and known):
                    return there
                if known and verdict.startswith("goto"):
                    return ""
        elif known:
            return "accept" if verdict == "accept" else "" if verdict == "return" else "drop"
    return ""


def _holds(conditions: str, hook: str | None, from_lo: bool) -> bool | None:
    """Whether all conditions of a rule hold; None: who knows."""
    if _HOLDS.match(conditions):
        return True
    if conditions == "fib daddr type local":
        return hook == "input"
    if conditions.startswith("ct state"):
        return False
    if _ONLY_LO.match(conditions):
        return ("!=" in conditions) != from_lo
    if not from_lo and _ANY_LO.match(conditions):
        return False
    if from_lo and _ONE_INTERFACE.match(conditions) and not _ANY_LO.match(conditions):
        return False
    return None
