"""What the machine already does that could get in steerd's way: its routes, ip rules, firewall, and processes.

Everything here looks and changes nothing. It sees the network namespace of the calling thread. steerd's own table is
left out.

nft shows what iptables-nft made of a rule it has no words for as an opaque "xt". Such a rule is read from
iptables-nft-save instead, which lists the same rules of a chain in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from steerd.core.marks import MARK_BITS
from steerd.errors import KernelError
from steerd.kernel import capabilities
from steerd.kernel.nftables import TABLE
from steerd.model import PROTOCOL_NAMES, TCP, UDP, IPAddress

ALL_BITS = (1 << MARK_BITS) - 1

_RTN_LOCAL = 2
_LISTENING = {TCP: "0A", UDP: "07"}
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_SAVE_TOOLS = {"ip": "iptables-nft-save", "ip6": "ip6tables-nft-save"}
_PACKAGES = {"nft": "nftables"}


def may_administer() -> bool:
    """Whether this process has CAP_NET_ADMIN, without which the kernel shows neither tables nor rules."""
    return capabilities.Capability.NET_ADMIN in capabilities.effective()


# --- Addresses and ip rules ------------------------------------------------------------------------------------------


def local_addresses(addresses: Iterable[IPAddress]) -> set[IPAddress]:
    """Those of the addresses that this machine takes for its own: real ones, and those of local (AnyIP) routes."""
    with IPRoute() as route:
        return {address for address in addresses if _is_local(route, address)}


def _is_local(route: Any, address: IPAddress) -> bool:
    try:
        found = list(route.route("get", family=_FAMILIES[address.version], dst=str(address)))
    except NetlinkError:
        # No route at all, or one that says unreachable or prohibit: the kernel answers these with an errno.
        return False
    return bool(found[0]["type"] == _RTN_LOCAL)


class MarkRule(NamedTuple):
    """An ip rule that looks at the packet mark."""

    version: int
    priority: int
    mark: int
    mask: int
    table: int

    def __str__(self) -> str:
        command = "ip" if self.version == 4 else "ip -6"
        return f"`{command} rule` {self.priority}: fwmark 0x{self.mark:x}/0x{self.mask:x} lookup {self.table}"


def mark_rules() -> list[MarkRule]:
    """Every ip rule, IPv4 and IPv6, that compares bits of the packet mark."""
    found = []
    with IPRoute() as route:
        for version, family in _FAMILIES.items():
            for rule in route.get_rules(family=family):
                # The kernel leaves out what is 0: net/core/fib_rules.c, fib_nl_fill_rule.
                mask = rule.get_attr("FRA_FWMASK") or 0
                if mask:
                    mark, priority = rule.get_attr("FRA_FWMARK") or 0, rule.get_attr("FRA_PRIORITY") or 0
                    found.append(MarkRule(version, priority, mark, mask, rule.get_attr("FRA_TABLE") or 0))
    return found


# --- Other people's nft tables and iptables-nft rules ----------------------------------------------------------------


class Rule(NamedTuple):
    """One rule of a chain."""

    handle: int
    text: str
    """As nft (or iptables-nft-save) writes it, on one line."""
    statements: list[Any]
    """nft's JSON (libnftables-json(5))."""
    options: list[str] | None
    """The words of iptables-nft-save, where nft has none of its own; else None."""
    in_nft: str
    """As nft writes it, on one line: what iptables-nft made of a rule, translated."""


class Chain(NamedTuple):
    """A chain; `hook` and `priority` are None unless it is a base chain."""

    name: str
    hook: str | None
    priority: int | None
    rules: list[Rule]
    policy: str | None = None
    """`accept` or `drop`, of a base chain."""


class Table(NamedTuple):
    """An nft table; those of iptables-nft are tables of the families ip and ip6."""

    family: str
    name: str
    chains: dict[str, Chain]


class Finding(NamedTuple):
    """A rule, and the base chain from which packets get to it."""

    table: Table
    chain: Chain
    rule: Rule
    base: Chain

    def __str__(self) -> str:
        where = f"table {self.table.family} {self.table.name}, chain {self.chain.name}"
        if self.base.hook is not None:
            through = "" if self.base is self.chain else f"reached from chain {self.base.name}, "
            where += f" ({through}hook {self.base.hook}, priority {self.base.priority})"
        return f"{where}: `{self.rule.text}` (handle {self.rule.handle})"


def firewall() -> list[Table]:
    """Every nft table but steerd's own, with the rules of iptables-nft in readable form.

    The elements of named sets are not read. Raises KernelError if a tool is missing or fails.
    """
    tables = []
    for listed in json.loads(_output(["nft", "-j", "-t", "list", "tables"]))["nftables"]:
        if "table" not in listed:
            continue
        family, name = listed["table"]["family"], listed["table"]["name"]
        if (family, name) != ("inet", TABLE):
            tables.append(_table(family, name))
    return tables


def _table(family: str, name: str) -> Table:
    # Terse: another tool's sets may hold as many elements as our own.
    listing = ["-t", "list", "table", family, name]
    objects = json.loads(_output(["nft", "-j", *listing]))["nftables"]
    texts = rule_texts(_output(["nft", "-a", *listing]))
    raws: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for raw in (o["rule"] for o in objects if "rule" in o):
        raws[raw["chain"]].append(raw)
    # Opaque rules of ebtables and arptables stay opaque: no packet to an endpoint is judged by them.
    tool = _SAVE_TOOLS.get(family) if any(map(_is_opaque, (raw for rules in raws.values() for raw in rules))) else None
    saved = iptables_rules(_output([tool])) if tool else {}
    chains = {}
    for chain in (o["chain"] for o in objects if "chain" in o):
        rules = [_rule(raw, texts) for raw in raws[chain["name"]]]
        if tool and any(map(_is_opaque, raws[chain["name"]])):
            lines = saved.get((name, chain["name"]), [])
            if len(lines) != len(rules):
                raise KernelError(
                    f"{tool} and nft show different rules in table {name}, chain {chain['name']}, so these cannot be"
                    " checked: try again, and if it stays so, take rules that nft put into that chain out of it."
                )
            rules = [
                rule._replace(text=line, options=shlex.split(line)) if _is_opaque(raw) else rule
                for rule, raw, line in zip(rules, raws[chain["name"]], lines, strict=True)
            ]
        chains[chain["name"]] = Chain(chain["name"], chain.get("hook"), chain.get("prio"), rules, chain.get("policy"))
    return Table(family, name, chains)


def _is_opaque(raw: dict[str, Any]) -> bool:
    return any("xt" in statement for statement in raw["expr"])


def _rule(raw: dict[str, Any], texts: dict[int, str]) -> Rule:
    text = texts.get(raw["handle"], json.dumps(raw["expr"]))
    return Rule(raw["handle"], text, raw["expr"], None, text)


def rule_texts(listing: str) -> dict[int, str]:
    """Rules by handle, each on one line, out of what `nft -a list table` prints."""
    texts = {}
    text = ""
    for line in listing.splitlines():
        # A rule begins behind two tabs; a set within it may go on over further lines, which are indented more.
        indent = len(line) - len(line.lstrip("\t"))
        text = "" if indent < 2 else line.strip() if indent == 2 else f"{text} {line.strip()}"
        found = re.fullmatch(r"(.*) # handle (\d+)", text)
        if found:
            texts[int(found[2])] = found[1]
    return texts


def iptables_rules(saved: str) -> dict[tuple[str, str], list[str]]:
    """`-A` lines by (table, chain), in order, out of what iptables-save prints."""
    rules: dict[tuple[str, str], list[str]] = defaultdict(list)
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith("-A "):
            rules[table, line.split()[1]].append(line)
    return rules


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, text=True, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        package = _PACKAGES.get(command[0], "iptables (this machine has rules made by iptables-nft)")
        raise KernelError(f"{command[0]} is not installed, and the check needs it: install {package}.") from None
    if done.returncode:
        raise KernelError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout


# --- Which mark bits a rule uses -------------------------------------------------------------------------------------


def mark_users(tables: Iterable[Table], mask: int) -> list[Finding]:
    """Rules that compare, copy or change packet mark bits of `mask`."""
    return [
        Finding(table, chain, rule, chain)
        for table in tables
        for chain in table.chains.values()
        for rule in chain.rules
        if mark_bits(rule) & mask
    ]


def mark_bits(rule: Rule) -> int:
    """The packet mark bits that a rule compares, copies or may change."""
    return _bits_looked_at(rule.statements) if rule.options is None else _iptables_bits(rule.options)


def _is_mark(expression: object) -> bool:
    return expression == {"meta": {"key": "mark"}}


def _bits_looked_at(expression: object) -> int:
    if _is_mark(expression):
        return ALL_BITS
    if isinstance(expression, list):
        return functools.reduce(lambda bits, part: bits | _bits_looked_at(part), expression, 0)
    if not isinstance(expression, dict):
        return 0
    if "mangle" in expression and _is_mark(expression["mangle"]["key"]):
        return ALL_BITS & ~_assigned(expression["mangle"]["value"]).kept
    bits = _bits_looked_at(list(expression.values()))
    if "&" in expression:
        for mask in expression["&"]:
            bits &= mask if isinstance(mask, int) else ALL_BITS
    return bits


class _Bits(NamedTuple):
    """What is known of each bit of a value that is assigned to the mark; a bit in none of the three may be anything."""

    kept: int
    """As it was in the mark before."""
    ones: int
    zeros: int


def _assigned(expression: object) -> _Bits:
    if _is_mark(expression):
        return _Bits(ALL_BITS, 0, 0)
    if isinstance(expression, int):
        return _Bits(0, expression, ALL_BITS & ~expression)
    if isinstance(expression, dict):
        for operator, combine in (("&", _and), ("|", _or), ("^", _xor)):
            if operator in expression:
                return functools.reduce(combine, map(_assigned, expression[operator]))
    return _Bits(0, 0, 0)


def _and(a: _Bits, b: _Bits) -> _Bits:
    return _Bits(a.kept & b.kept | a.kept & b.ones | a.ones & b.kept, a.ones & b.ones, a.zeros | b.zeros)


def _or(a: _Bits, b: _Bits) -> _Bits:
    return _Bits(a.kept & b.kept | a.kept & b.zeros | a.zeros & b.kept, a.ones | b.ones, a.zeros & b.zeros)


def _xor(a: _Bits, b: _Bits) -> _Bits:
    ones, zeros = a.ones & b.zeros | a.zeros & b.ones, a.ones & b.ones | a.zeros & b.zeros
    return _Bits(a.kept & b.zeros | a.zeros & b.kept, ones, zeros)


def _iptables_bits(options: list[str]) -> int:
    """The same for the words of iptables-nft-save; `--mark` of connmark is the connection's, not the packet's."""
    bits = 0
    for module, option, value in _iptables_options(options):
        packet_mark = (module, option) in {("mark", "--mark"), ("MARK", "--set-xmark"), ("TPROXY", "--tproxy-mark")}
        copied = module == "CONNMARK" and option == "--nfmask"
        written = module == "CONNMARK" and option == "--ctmask" and "--restore-mark" in options
        if packet_mark or copied or written:
            mark, _, mask = value.partition("/")
            bits |= int(mark, 16) | (int(mask, 16) if mask else ALL_BITS if packet_mark else 0)
    return bits


def _iptables_options(options: list[str]) -> Iterator[tuple[str, str, str]]:
    """(match or target that is being described, option, the word behind it)."""
    module = ""
    for option, value in itertools.pairwise(options):
        if option in ("-m", "-j", "-g"):
            module = value
        yield module, option, value


# --- Which rules drop what conntrack calls invalid -------------------------------------------------------------------

_CONNTRACK_PRIORITY = -200
_ARRIVE_PRIORITY = -10


def invalid_drops(tables: Iterable[Table]) -> list[Finding]:
    """Rules that drop or reject `ct state invalid` where packets of late steering still have to pass.

    - prerouting, behind conntrack. Not only before the queue: a packet that comes back from it goes on to the later
      chains, and is as invalid there as it was.
    - input, down to our own chain's priority: of two chains with the same, the kernel runs the one first that was
      loaded last (net/netfilter/core.c, nf_hook_entries_grow).
    - output, behind conntrack.
    """
    return [
        Finding(table, chain, rule, base)
        for table in tables
        if table.family in ("inet", "ip", "ip6")
        for base in table.chains.values()
        if _is_on_the_way(base)
        for chain, rule in _drops(table, base)
    ]


def _is_on_the_way(base: Chain) -> bool:
    if base.priority is None:
        return False
    if base.hook == "input":
        return base.priority <= _ARRIVE_PRIORITY
    return base.hook in ("prerouting", "output") and base.priority > _CONNTRACK_PRIORITY


class _Verdict(NamedTuple):
    """What a rule may do with an invalid packet: drop it, or hand it to another chain."""

    drops: bool
    chain: str | None
    only_invalid: bool
    """The rule, and not only its chain's name, says `ct state invalid`."""


def _drops(table: Table, base: Chain) -> Iterator[tuple[Chain, Rule]]:
    waiting = [(base.name, False)]
    seen = set(waiting)
    found: set[tuple[str, int]] = set()
    while waiting:
        name, only_invalid = waiting.pop(0)
        chain = table.chains.get(name)
        for rule in chain.rules if chain else ():
            for verdict in _verdicts(rule):
                invalid = only_invalid or verdict.only_invalid
                if verdict.drops and invalid and (name, rule.handle) not in found:
                    found.add((name, rule.handle))
                    yield table.chains[name], rule
                step = (verdict.chain, invalid)
                if verdict.chain is not None and step not in seen:
                    seen.add((verdict.chain, invalid))
                    waiting.append((verdict.chain, invalid))


def _verdicts(rule: Rule) -> Iterator[_Verdict]:
    yield from _nft_verdicts(rule.statements) if rule.options is None else _iptables_verdicts(rule.options)


def _nft_verdicts(statements: list[Any]) -> Iterator[_Verdict]:
    only_invalid = False
    for statement in statements:
        match = statement.get("match")
        if match is not None and _mentions_state(match["left"]):
            if ("invalid" in set(_texts(match["right"]))) == (match["op"] == "!="):
                return
            only_invalid = True
        vmap = statement.get("vmap")
        if vmap is not None and isinstance(vmap["data"], dict):
            by_state = _mentions_state(vmap["key"])
            for key, value in vmap["data"]["set"]:
                if not by_state or "invalid" in set(_texts(key)):
                    yield from _verdict(value, only_invalid or by_state)
        yield from _verdict(statement, only_invalid)


def _verdict(statement: dict[str, Any], only_invalid: bool) -> Iterator[_Verdict]:
    if "drop" in statement or "reject" in statement:
        yield _Verdict(True, None, only_invalid)
    for jump in ("jump", "goto"):
        if jump in statement:
            yield _Verdict(False, statement[jump]["target"], only_invalid)


def _mentions_state(expression: object) -> bool:
    if isinstance(expression, dict):
        return expression == {"ct": {"key": "state"}} or any(map(_mentions_state, expression.values()))
    return isinstance(expression, list) and any(map(_mentions_state, expression))


def _texts(expression: object) -> Iterator[str]:
    if isinstance(expression, str):
        yield expression
    elif isinstance(expression, dict | list):
        for part in expression.values() if isinstance(expression, dict) else expression:
            yield from _texts(part)


def _iptables_verdicts(options: list[str]) -> Iterator[_Verdict]:
    only_invalid = False
    before = ""
    for _module, option, value in _iptables_options(options):
        if option in ("--ctstate", "--state"):
            if ("INVALID" in value.split(",")) == (before == "!"):
                return
            only_invalid = True
        if option in ("-j", "-g"):
            drops = value in ("DROP", "REJECT")
            yield _Verdict(drops, None if drops else value, only_invalid)
        before = option


# --- Who listens -----------------------------------------------------------------------------------------------------


def processes_listening(wanted: set[tuple[bytes, int]], protocol: int = TCP) -> dict[tuple[bytes, int], str]:
    """Who holds the listening TCP, or the unconnected UDP, sockets of these (packed address, port): `sshd (process 8)`.

    One look through /proc for all of them. A socket without a process that can be seen is missing in the answer.
    """
    sockets = _inodes(wanted, protocol)
    found: dict[tuple[bytes, int], str] = {}
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        # Processes end while they are looked at, and take their files with them.
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    listener = sockets.get(str(descriptor.readlink()))
                    if listener is not None and listener not in found:
                        found[listener] = f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return found


def _inodes(wanted: set[tuple[bytes, int]], protocol: int) -> dict[str, tuple[bytes, int]]:
    """Listening sockets as /proc/PID/fd names them. Columns: Documentation/networking/proc_net_tcp.rst; UDP's are the
    same (net/ipv4/udp.c, udp4_format_sock)."""
    found = {}
    for name in (PROTOCOL_NAMES[protocol], f"{PROTOCOL_NAMES[protocol]}6"):
        path = Path("/proc/thread-self/net") / name
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] != _LISTENING[protocol]:
                continue
            listener = parse_proc_address(fields[1])
            if listener in wanted:
                found[f"socket:[{fields[9]}]"] = listener
    return found


def parse_proc_address(text: str) -> tuple[bytes, int]:
    """`0100007F:0016` as (packed address, port): 32-bit words in the machine's own byte order, the port as a number."""
    words, port = text.split(":")
    packed = b"".join(int(words[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(words), 8))
    return packed, int(port, 16)
