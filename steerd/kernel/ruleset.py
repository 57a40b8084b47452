"""The table `inet steerd`: filled in from nft/steerd.nft, loaded in one transaction, taken away whole.

Where the kernel has no `queue` statement (CONFIG_NFT_QUEUE), a chain for each worker holds the target that iptables has
for that (xt_NFQUEUE), which the daemon puts there itself, since nft cannot. Which of the two it is, is found out by
asking the kernel, and nobody need know.

Every hook costs every packet of the host something, so base chains that the configuration has no use for are left out.

`nft/install.sh` renders the same text from the same file in shell; tests/unit/test_ruleset.py holds the two together.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from steerd.core.marks import ASK_ID, FIRST_TARGET_ID, KEEP_ID, OURS_ID, PASS_ID, RESET_ID, MarkLayout
from steerd.core.pools import Pool
from steerd.errors import KernelError
from steerd.kernel.nftables import TABLE, Element, Nftables
from steerd.model import Endpoint, Flow, IPAddress, IPNetwork, Target

HOLD_TABLE = f"{TABLE}_hold"
# Without a seed every rule gets a random one of its own: no packet would be sure to match one of several rules, and a
# reload would send the rest of a connection's packets to another worker.
_SEED = "0x5354"
_WORKER_CHAIN = 'chain {} {{ comment "hands over to a worker; filled by the daemon"; }}'
_CHECKS = {
    "targets4": "translated4",
    "targets6": "translated6",
    "hosts4": "translated_hosts4",
    "hosts6": "translated_hosts6",
}
"""The maps that translate, and the set of each that knows what must have come of it."""
_TRANSLATIONS = tuple(_CHECKS)
_TARGET_MAPS = (*_TRANSLATIONS, "daemons4", "daemons6", "zones", "learned")
_ZONES = 65535
_OFFLOAD = ("offload4", "offload6", "offload_epoch")
_TARGET_SETS = (*_CHECKS.values(), "answering4", "answering6")


class Settings(NamedTuple):
    """What the placeholders of steerd.nft say. Rates in connections a second, times in seconds."""

    mark: MarkLayout
    first_queue: int
    queues: int
    tcp_option: int
    source_rate: int
    source_burst: int
    stranger_rate: int
    stranger_burst: int
    total_rate: int
    total_burst: int
    syn_sent: int
    syn_recv: int
    time_wait: int
    close: int
    over: int
    """Less than any timeout of a connection on which its client may still send."""
    mss4: int
    mss6: int
    wscale: int


class IdleTimeouts(NamedTuple):
    """Conntrack timeouts of a flow of datagrams, in seconds."""

    unreplied: int
    """While only the client has spoken."""
    replied: int


class Contents(NamedTuple):
    """What the daemon keeps in the table's sets."""

    early: tuple[Endpoint, ...]
    """Every TCP endpoint."""
    every_syn: tuple[Endpoint, ...]
    late: tuple[Endpoint, ...]
    silent: tuple[Endpoint, ...]
    datagram: tuple[Endpoint, ...]
    query: tuple[Endpoint, ...]
    rebinding: tuple[Endpoint, ...]
    quic: tuple[Endpoint, ...]
    idle: tuple[tuple[Endpoint, IdleTimeouts], ...]
    """Of every UDP endpoint."""
    pools: tuple[Pool, ...]
    wildcard: tuple[tuple[Pool | Target, int], ...]
    """Targets, or whole pools with a port (0: any), whose daemons may be bound to the wildcard address."""


_NOTHING = Contents(*[()] * len(Contents._fields))


def template_path() -> Path:
    """Where nft/steerd.nft is: beside the package in a checkout, under share/ where it was installed."""
    checkout = Path(__file__).resolve().parents[2] / "nft" / "steerd.nft"
    installed = Path(sys.prefix) / "share" / "steerd" / "nft" / "steerd.nft"
    for path in (checkout, installed):
        if path.is_file():
            return path
    raise KernelError(f"steerd.nft is neither at {checkout} nor at {installed}: the installation is incomplete")


def render(template: str, settings: Settings, *, native: bool, without: Collection[str] = ()) -> str:
    """Fill in the placeholders, and leave base chains out. `native`: with the `queue` statement, else with chains that
    `load` fills."""
    mark = settings.mark
    values = {
        "MASK": f"0x{mark.mask:08x}",
        "CLEAR": f"0x{~mark.mask & 0xFFFFFFFF:08x}",
        "RESET": f"0x{mark.field(RESET_ID):08x}",
        "PASS": f"0x{mark.field(PASS_ID):08x}",
        "OURS": f"0x{mark.field(OURS_ID):08x}",
        "ASK": f"0x{mark.field(ASK_ID):08x}",
        "KEEP": f"0x{mark.field(KEEP_ID):08x}",
        "MSS4": str(settings.mss4),
        "MSS6": str(settings.mss6),
        "WSCALE": str(settings.wscale),
        "TCP_OPTION": str(settings.tcp_option),
        "SOURCE_RATE": str(settings.source_rate),
        "SOURCE_BURST": str(settings.source_burst),
        "STRANGER_RATE": str(settings.stranger_rate),
        "STRANGER_BURST": str(settings.stranger_burst),
        "TOTAL_RATE": str(settings.total_rate),
        "TOTAL_BURST": str(settings.total_burst),
        "SYN_SENT": str(settings.syn_sent),
        "SYN_RECV": str(settings.syn_recv),
        "TIME_WAIT": str(settings.time_wait),
        "CLOSE": str(settings.close),
        "OVER": str(settings.over),
        "QUEUE4": _queue_rules("ip saddr . th sport", settings, native=native),
        "QUEUE6": _queue_rules("ip6 saddr . th sport", settings, native=native),
        "WORKERS": "\n\t".join(_WORKER_CHAIN.format(name) for name in _worker_chains(settings, native=native)),
    }
    head, rest = template.split("\ntable inet steerd {", 1)
    text = "table inet steerd {" + rest
    for name in without:
        chain = rf"^\tchain {name} {{\n(?:\t\t.*\n)*\t}}\n|^flush chain inet steerd {name}\n"
        text = re.sub(chain, "", text, flags=re.MULTILINE)
    for name, value in values.items():
        text = text.replace(f"__{name}__", value)
    left = re.search(r"__[A-Z0-9_]+__", text)
    if left:
        raise KernelError(f"steerd.nft has a placeholder {left[0]} that this version of steerd does not know")
    return head + "\n" + text


def _queue_rules(hashed: str, settings: Settings, *, native: bool) -> str:
    """Spread by address and port (a hash of addresses alone would give one client's load to one worker), so that all
    packets of one connection meet the same worker."""
    spread = f"jhash {hashed} mod {settings.queues} seed {_SEED}"
    if native:
        return f"queue to {spread} offset {settings.first_queue}"
    chains = enumerate(_worker_chains(settings, native=native))
    return f"{spread} vmap {{ {', '.join(f'{number} : jump {name}' for number, name in chains)} }}\n\t\tdrop"


def _worker_chains(settings: Settings, *, native: bool) -> list[str]:
    return [] if native else [f"worker{number}" for number in range(settings.queues)]


def needless(contents: Contents) -> set[str]:
    """The base chains that have nothing to do with these contents."""
    late = {"open_window", "recall", "conceal", "reveal"}
    query = {"query"}
    either = {"handshake_untracked"}
    return (
        (set() if contents.late else late)
        | (set() if contents.query else query)
        | (set() if contents.late or contents.query else either)
    )


def elements(contents: Contents, version: int) -> dict[str, list[str]]:
    """What each of the daemon's sets for an IP version holds, as nft writes it."""
    found = {}
    for name, endpoints in (
        ("early", contents.early),
        ("every_syn", contents.every_syn),
        ("late", contents.late),
        ("silent", contents.silent),
        ("datagram", contents.datagram),
        ("query", contents.query),
        ("rebinding", contents.rebinding),
        ("quic", contents.quic),
    ):
        found[f"{name}{version}"] = [f"{e.address} . {_ports(e)}" for e in endpoints if e.address.version == version]
    found[f"aliases{version}"] = [
        str(prefix) for pool in contents.pools for prefix in pool.prefixes if prefix.version == version
    ]
    found[f"wildcard{version}"] = list(_wildcards(contents, version))
    return found


def fill(contents: Contents) -> str:
    """nft commands that make the daemon's sets hold exactly these contents, whatever they held."""
    lines: list[str] = []
    for version in (4, 6):
        for name, listed in elements(contents, version).items():
            lines.append(f"flush set inet {TABLE} {name}")
            lines += _of_set("add", name, listed)
        lines += _idle_rules(contents, version)
    return "\n".join(lines) + "\n"


def hold(contents: Contents, tcp_option: int) -> str:
    """nft commands for a table that drops whatever comes to these endpoints for steerd to decide, so that it is sent
    again: for a boot, until `load` takes that table away. The rest is what chains undecided4/6 let through."""
    waiting = {*contents.every_syn, *contents.late}
    dropped = contents._replace(early=tuple(e for e in contents.early if e in waiting))
    passed = contents._replace(early=tuple(e for e in contents.early if e not in waiting))
    syn = "tcp flags & (fin | syn | rst | ack) == syn"
    carries = [f"{syn} tcp option {tcp_option} exists", f"{syn} @ih,0,8 >= 0"]
    carries4 = [f"{syn} ip hdrlength > 5", *carries]
    carries6 = [f"{syn} exthdr dst exists", *carries]
    rules = [
        f"iif != lo {condition} {family} daddr . {protocol} dport {{ {', '.join(listed)} }} drop"
        for version, family, carrying in ((4, "ip", carries4), (6, "ip6", carries6))
        for protocol, names, of, conditions in (
            ("tcp", ("early",), dropped, [""]),
            ("tcp", ("early",), passed, carrying),
            ("udp", ("datagram", "query"), contents, [""]),
        )
        if (listed := [element for name in names for element in elements(of, version)[f"{name}{version}"]])
        for condition in conditions
    ]
    lines = ["type filter hook prerouting priority raw", *rules]
    return f"{_without_table(HOLD_TABLE)}table inet {HOLD_TABLE} {{ chain hold {{\n" + "\n".join(lines) + "\n}\n}\n"


def difference(before: Contents, after: Contents) -> str:
    """nft commands that lead from one to the other; "" if both say the same.

    What stays is left alone. An element that is taken away and put back in one transaction is not found for a moment by
    kernels before 6.17, in sets of ranges (nft_pipapo_commit in net/netfilter/nft_set_pipapo.c comes after the change
    of generation): a connection that came then would not be steered.
    """
    lines: list[str] = []
    for version in (4, 6):
        had, has = elements(before, version), elements(after, version)
        for name, listed in has.items():
            lines += _of_set("delete", name, _without(had[name], listed))
            lines += _of_set("add", name, _without(listed, had[name]))
        rules = list(_idle_rules(after, version))
        if rules != list(_idle_rules(before, version)):
            lines += rules
    return "".join(f"{line}\n" for line in lines)


def _of_set(verb: str, name: str, listed: list[str]) -> list[str]:
    return [f"{verb} element inet {TABLE} {name} {{ {', '.join(listed)} }}"] if listed else []


def _without(listed: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [element for element in listed if element not in known]


def _idle_rules(contents: Contents, version: int) -> Iterable[str]:
    """One `ct timeout` for each pair of values in use, and the rule that finds an endpoint's. A timeout that is no
    longer in use stays: it can be taken away only when the last flow that has it is gone."""
    yield f"flush chain inet {TABLE} idle{version}"
    mine = [(endpoint, timeouts) for endpoint, timeouts in contents.idle if endpoint.address.version == version]
    names = {timeouts: f"udp{version}_{timeouts.unreplied}_{timeouts.replied}" for _, timeouts in mine}
    for timeouts, name in names.items():
        yield (
            f"add ct timeout inet {TABLE} {name} {{ protocol udp; l3proto {'ip' if version == 4 else 'ip6'};"
            f" policy = {{ unreplied : {timeouts.unreplied}, replied : {timeouts.replied} }}; }}"
        )
    if mine:
        listed = ", ".join(f'{e.address} . {_ports(e)} : "{names[timeouts]}"' for e, timeouts in mine)
        field = "ip daddr" if version == 4 else "ip6 daddr"
        yield (
            f"add rule inet {TABLE} idle{version} ct state new ct status & confirmed == 0"
            f" ct timeout set {field} . udp dport map {{ {listed} }}"
        )


def _zone_rule(mark: MarkLayout) -> str:
    """Not among those that a load replaces: see the comment on chains in steerd.nft."""
    rule = f"ct original zone set meta mark & 0x{mark.mask:08x} map @zones accept"
    return f"flush chain inet {TABLE} zoned\nadd rule inet {TABLE} zoned {rule}\n"


def _ports(endpoint: Endpoint) -> str:
    if endpoint.first_port == endpoint.last_port:
        return str(endpoint.first_port)
    return f"{endpoint.first_port}-{endpoint.last_port}"


def _wildcards(contents: Contents, version: int) -> Iterable[str]:
    """Elements for every port of every target, none of which overlaps another: the kernel refuses those that do."""
    pools: dict[IPNetwork, set[int]] = defaultdict(set)
    targets: dict[IPNetwork, set[int]] = defaultdict(set)
    for target, port in contents.wildcard:
        if isinstance(target, Pool):
            for prefix in target.prefixes:
                pools[prefix].add(port)
        else:
            targets[ipaddress.ip_network(target.address)].add(port)
    for prefix, ports in pools.items():
        if prefix.version == version:
            yield from (f"{prefix} . {free}" for free in _port_ranges(ports, set()))
    for host, ports in targets.items():
        if host.version == version:
            address = host.network_address
            taken = set().union(*(pools[pool] for pool in pools if pool.version == version and address in pool))
            yield from (f"{address} . {free}" for free in _port_ranges(ports, taken))


def _port_ranges(wanted: set[int], taken: set[int]) -> list[str]:
    """The wanted ports without those that are taken; 0 in either stands for all."""
    if 0 in taken:
        return []
    if 0 not in wanted:
        return [str(port) for port in sorted(wanted - taken)]
    edges = [-1, *sorted(taken), 65536]
    return [f"{before + 1}-{after - 1}" for before, after in pairwise(edges) if after - before > 1]


def flush_targets() -> str:
    """nft commands that empty what workers have put into the table. Only while no worker is bound."""
    return "".join(f"flush map inet {TABLE} {name}\n" for name in _TARGET_MAPS) + "".join(
        f"flush set inet {TABLE} {name}\n" for name in _TARGET_SETS
    )


def target_elements(mark_value: int, target: Target) -> list[Element]:
    """The elements that make the kernel translate packets of this mark to a target, and check that it did."""
    # A set's key is compared as the rule puts it into registers: the mark in the machine's own byte order.
    key = mark_value.to_bytes(4, sys.byteorder)
    name, data = _translation(target.address.packed, target.port)
    return [Element(name, key, data), Element(_CHECKS[name], key + data, None)]


def _translation(address: bytes, port: int) -> tuple[str, bytes]:
    """The map that has a target (its address packed), and its data there."""
    version = 4 if len(address) == 4 else 6
    if not port:
        return f"hosts{version}", address
    return f"targets{version}", address + port.to_bytes(2, "big") + b"\0\0"


def offload_elements(version: int, key: bytes, mark_value: int, epoch: int) -> list[Element]:
    """The elements that have the kernel steer SYNs of this key (core.offload) by itself; it takes them only while the
    epoch is this one."""
    number = mark_value.to_bytes(4, sys.byteorder)
    return [_epoch(epoch), Element(f"offload{version}", key, number)]


def _epoch(epoch: int) -> Element:
    return Element("offload_epoch", bytes(4), epoch.to_bytes(4, sys.byteorder))


def forget_offloaded(nftables: Nftables, epoch: int) -> None:
    """From now on workers are asked again, and what they have decided before is refused: the epoch is this one, which
    must be another one than before. Fine if there is no table. Raises KernelError."""
    nftables.replace(_OFFLOAD, [_epoch(epoch)])


def datagram_elements(mark_value: int, target_id: int, target: Target, dport: int) -> list[Element]:
    """The elements that a target of datagrams needs besides: how its answers are known, for clients that send to port
    `dport`, and its conntrack zone.

    There are 65,535 zones. Two targets in one zone that answer the same client's queries would be taken for one; the
    check after translation drops what would have gone wrong.
    """
    version = target.address.version
    key = mark_value.to_bytes(4, sys.byteorder)
    daemon = target.address.packed + (target.port or dport).to_bytes(2, "big") + b"\0\0"
    zone = (target_id - FIRST_TARGET_ID) % _ZONES + 1
    return [
        Element(f"daemons{version}", daemon, key),
        Element(f"answering{version}", daemon, None),
        Element("zones", key, zone.to_bytes(2, sys.byteorder)),
    ]


def targets_agree(nftables: Nftables, mark: MarkLayout, target: Callable[[int], tuple[bytes, int] | None]) -> bool:
    """Whether all target ids in the kernel's maps mean what `target` says, as packed address and port: not, if it knows
    nothing of them or began anew, or if other bits of the mark were ours."""
    others, shift = ~mark.mask, mark.shift
    for name in _TRANSLATIONS:
        for element in nftables.elements(name):
            value = int.from_bytes(element.key, sys.byteorder)
            meant = target(value >> shift)
            if meant is None or value & others or _translation(*meant) != (name, element.data):
                return False
    return True


def flow_key(flow: Flow) -> bytes:
    """The element of the sets of 4-tuples (`vanished4`, `genuine6`, ...) that stands for a connection."""
    sport, dport = flow.sport.to_bytes(2, "big"), flow.dport.to_bytes(2, "big")
    return flow.src + sport + b"\0\0" + flow.dst + dport + b"\0\0"


def has_native_queue() -> bool:
    """Whether this kernel has the nft `queue` statement. Asks by a check that changes nothing."""
    return not _run(["nft", "--check", "-f", "-"], "table inet steerd_probe { chain probe { queue num 0 ; } ; }").failed


class Loaded(NamedTuple):
    """What a load or a change has put into the table."""

    rules: str
    """As nft commands."""
    contents: Contents
    without: frozenset[str]
    """The base chains that are left out."""


def load(settings: Settings, contents: Contents, *, native: bool, empty_targets: bool) -> Loaded:
    """Load the table with these settings and contents in one transaction, whatever is there.

    What is there already is brought up to date: the operator's chain `admit` and counters stay. `empty_targets` is for
    a start, when no worker runs that believes its targets to be in the maps, and only if they do not agree any more
    (`targets_agree`): what was learnt of QUIC connections goes with them. `native`: see has_native_queue. Raises
    KernelError if the kernel refuses.
    """
    without = frozenset(needless(contents))
    rules = render(template_path().read_text(), settings, native=native, without=without)
    text = rules + fill(contents) + _without_table(HOLD_TABLE)
    # What a late connection's daemon resets must be concealed for as long as that connection lives.
    for name in sorted(without - {"conceal", "reveal"}):
        text += f"add chain inet {TABLE} {name}\nflush chain inet {TABLE} {name}\ndelete chain inet {TABLE} {name}\n"
    if empty_targets:
        text += flush_targets()
    with contextlib.closing(Nftables()) as nftables:
        if empty_targets or not any(rule.chain == "zoned" for rule in nftables.rules(1, TABLE)):
            text += _zone_rule(settings.mark)
        _nft(text)
        # Until they are filled, what comes to them is dropped.
        chains = _worker_chains(settings, native=native)
        nftables.queue({name: settings.first_queue + number for number, name in enumerate(chains)})
    return Loaded(rules, contents, without)


def change(loaded: Loaded, settings: Settings, contents: Contents, *, native: bool) -> Loaded:
    """Lead the table from what was loaded (and is there: `our_rules`, `our_elements`) to this, in one transaction that
    touches only what differs; none if nothing does. `mark`, `first_queue` and `queues` of the settings must be the
    same. Raises KernelError if the kernel refuses; then nothing has changed.

    A base chain that is needless now stays: with a hook, the kernel drops all packets in its queues
    (__nf_unregister_net_hook in net/netfilter/core.c)."""
    without = loaded.without & needless(contents)
    rules = render(template_path().read_text(), settings, native=native, without=without)
    text = (rules if rules != loaded.rules else "") + difference(loaded.contents, contents)
    if text:
        _nft(text)
    return Loaded(rules, contents, without)


def our_elements(nftables: Nftables) -> dict[str, bytes]:
    """What the kernel says of the elements of each of the daemon's sets: the same as long as nobody changes them."""
    return {name: nftables.listing(name) for version in (4, 6) for name in elements(_NOTHING, version)}


def our_rules(nftables: Nftables) -> set[tuple[str, int]]:
    """(chain, handle) of every rule that is ours, which those of the operator's `admit` are not. A rule that somebody
    deletes is missing here for ever: the kernel gives no handle twice."""
    return {(rule.chain, rule.handle) for rule in nftables.rules(1, TABLE) if rule.chain != "admit"}


def forget_learned(nftables: Nftables, addresses: Collection[IPAddress]) -> None:
    """Forget the connection ids of QUIC servers on these addresses: somebody else's daemon may come there."""
    hosts = {address.packed for address in addresses}
    marks = {
        element.data
        for version, size in ((4, 4), (6, 16))
        for element in nftables.elements(f"daemons{version}")
        if element.key[:size] in hosts
    }
    for element in nftables.elements("learned") if marks else ():
        if element.data in marks:
            # One by one: an element may end by itself meanwhile.
            with contextlib.suppress(KernelError):
                nftables.delete([element._replace(data=None)])


def set_wildcard_ports(ports: set[tuple[int, int]]) -> None:
    """Make the sets of ports with listeners on the wildcard address hold exactly these (IP version, port)."""
    lines = []
    for version in (4, 6):
        listed = ", ".join(str(port) for family, port in sorted(ports) if family == version)
        lines.append(f"flush set inet {TABLE} wildcard_ports{version}")
        if listed:
            lines.append(f"add element inet {TABLE} wildcard_ports{version} {{ {listed} }}")
    _nft("\n".join(lines) + "\n")


def remove() -> None:
    """Take the table away, and what held connections back before it. Fine if there are none."""
    _nft(_without_table(TABLE) + _without_table(HOLD_TABLE))


def let_go(nftables: Nftables) -> bool:
    """Take away what holds connections back (`hold`); returns whether there was such a thing. Raises KernelError."""
    if not nftables.rules(1, HOLD_TABLE):
        return False
    _nft(_without_table(HOLD_TABLE))
    return True


def _without_table(name: str) -> str:
    # `destroy` would say it in one word, but needs nft 1.0.7.
    return f"add table inet {name}\ndelete table inet {name}\n"


class _Done(NamedTuple):
    failed: bool
    output: str
    errors: str


def _run(command: list[str], text: str | None = None) -> _Done:
    try:
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"{command[0]} is not installed: install nftables") from None
    return _Done(done.returncode != 0, done.stdout, done.stderr.strip())


def _must(command: list[str], text: str | None = None) -> None:
    done = _run(command, text)
    if done.failed:
        raise KernelError(f"{' '.join(command)} failed: {done.errors}")


def _nft(text: str) -> None:
    _must(["nft", "-f", "-"], text)
