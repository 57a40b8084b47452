"""Conntrack entries: is there one for a connection, which are there, and away with them.

`entries` is the one way to read them all. It takes about 6 us for each (pyroute2: 200 us), and no lock that would hold
up packets; a table of hundreds of thousands is for a thread. While it reads, entries come and go: one that is there all
the time is seen, unless the kernel enlarges its table meanwhile.

Layout: include/uapi/linux/netfilter/nfnetlink_conntrack.h; states: nf_conntrack_common.h (enum ip_conntrack_status),
nf_conntrack_tcp.h (enum tcp_conntrack).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import struct
import sys
from collections.abc import Collection, Generator
from typing import NamedTuple

from steerd.errors import KernelError
from steerd.kernel.nfnetlink import ACK, GENERIC, NESTED, Nfnetlink, attribute, attributes
from steerd.model import TCP, UDP, Endpoint, Flow, IPNetwork

_SUBSYS_CTNETLINK = 1
_GET, _DELETE = 1, 2
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT = 1, 2, 3, 4, 7
_ID, _ZONE, _TIMESTAMP, _FILTER, _STATUS_MASK = 12, 18, 20, 25, 26
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC, _IP_DST = {4: 1, 6: 3}, {4: 2, 6: 4}
_PROTO_NUMBER, _PROTO_SPORT, _PROTO_DPORT = 1, 2, 3
_PROTOINFO_TCP, _TCP_STATE = 1, 1
_TIMESTAMP_START = 1
_FAMILIES = {4: 2, 6: 10}
_ANY_FAMILY = 0
_SEEN_REPLY, _DST_NAT = 0x2, 0x20
_IDENTITY = (_TUPLE_ORIG, _ID, _ZONE)
"""What names one entry and no other, not even one of the same addresses and ports that comes after it."""
_FILTER_REPLY_FLAGS, _FILTER_BY_SOURCE = 2, 1
_WIDTHS = {4: 4, 6: 16}
_TCP_STATES = (
    "none", "syn_sent", "syn_recv", "established", "fin_wait", "close_wait", "last_ack", "time_wait", "close",
    "syn_sent2",
)  # fmt: skip
_OVER = ("time_wait", "close")
_HEADER = struct.Struct("=HH")


class _Layout(NamedTuple):
    """How ctnetlink_dump_tuples writes a tuple with ports: all heads are known, and so is where the values stand."""

    head: bytes
    """What such a tuple begins with (its kind apart): the lengths in it leave no other content."""
    length: int
    both: struct.Struct
    """Of both tuples, one behind the other: source, destination, protocol, source port, destination port of each."""


def _layout(version: int) -> _Layout:
    width = _WIDTHS[version]
    addresses, ports = 2 * (_HEADER.size + width), 3 * 8
    length = 3 * _HEADER.size + addresses + ports
    head = _HEADER.pack(_HEADER.size + addresses, _TUPLE_IP | NESTED) + _HEADER.pack(
        _HEADER.size + width, _IP_SRC[version]
    )
    one = f"12x{width}s4x{width}s8xB3x4xH2x4xH2x"
    return _Layout(head, length, struct.Struct(f"!{one}{one}"))


_LAYOUTS = {version: _layout(version) for version in _FAMILIES}
_FIRST = {
    _HEADER.pack(layout.length, _TUPLE_ORIG | NESTED) + layout.head: (version, layout)
    for version, layout in _LAYOUTS.items()
}
_FIRST_LENGTH = 12


class Entry(NamedTuple):
    """One connection, or flow of datagrams, that conntrack knows."""

    protocol: int
    """model.TCP, model.UDP, or another one with ports."""
    flow: Flow
    """As its client sends it."""
    delivered: Flow
    """As its daemon gets it: the same unless something translates it."""
    body: bytes
    """All that the kernel says of it: attributes. What is read less often is read from here."""

    @property
    def is_translated(self) -> bool:
        """Whether it goes elsewhere than where its client sends it."""
        return self.flow.dst != self.delivered.dst or self.flow.dport != self.delivered.dport

    @property
    def is_answered(self) -> bool:
        """Whether both sides have spoken."""
        return _status(attributes(self.body)) & _SEEN_REPLY != 0

    @property
    def tcp_state(self) -> str | None:
        """`established`, `time_wait` and so on; None for what is not TCP."""
        if self.protocol != TCP:
            return None
        state = attributes(attributes(attributes(self.body).get(_PROTOINFO, b"")).get(_PROTOINFO_TCP, b""))
        return _TCP_STATES[state[_TCP_STATE][0]] if _TCP_STATE in state else None

    @property
    def is_over(self) -> bool:
        """TCP: closed by both sides, or reset; the kernel keeps it for a while."""
        return self.tcp_state in _OVER

    @property
    def seconds_left(self) -> int:
        """The kernel forgets it when nothing is sent for so long."""
        return int.from_bytes(attributes(self.body).get(_TIMEOUT, b""), "big")

    @property
    def started(self) -> float | None:
        """Seconds since the epoch; None unless the kernel notes it (sysctl net.netfilter.nf_conntrack_timestamp)."""
        start = attributes(attributes(self.body).get(_TIMESTAMP, b"")).get(_TIMESTAMP_START)
        return None if start is None else int.from_bytes(start, "big") / 1e9

    @property
    def identity(self) -> bytes:
        """The attributes that name this entry and no other."""
        fields = attributes(self.body)
        return b"".join(attribute(name, fields[name]) for name in _IDENTITY if name in fields)


def entries(
    *, translated: bool = False, unsteered: bool = False, answered_by: bytes = b""
) -> Generator[Entry, None, None]:
    """Every entry of a protocol with ports; only those that are `translated`; only those that are `unsteered`, neither
    translated nor answered; only those that an address (packed) answers. Whoever stops half-way closes the iterator.
    Raises KernelError."""
    family = next((_FAMILIES[version] for version, width in _WIDTHS.items() if len(answered_by) == width), _ANY_FAMILY)
    about = b""
    if translated:
        status = _DST_NAT.to_bytes(4, "big")
        about += attribute(_STATUS, status) + attribute(_STATUS_MASK, status)
    if unsteered:
        mask = (_SEEN_REPLY | _DST_NAT).to_bytes(4, "big")
        about += attribute(_STATUS, bytes(4)) + attribute(_STATUS_MASK, mask)
    # Of one IPv4 address the kernel (since 5.8) sorts out the entries by itself. Of IPv6 addresses it sorts out the
    # others (seen on 6.18): ctnetlink_filter_match_tuple has the comparison the wrong way round.
    if len(answered_by) == _WIDTHS[4]:
        about += _answered_by(answered_by, 4)
    asked = "conntrack does not list its entries"
    with contextlib.closing(Nfnetlink()) as netlink:
        for body in netlink.dump(_SUBSYS_CTNETLINK << 8 | _GET, family, about, asked):
            if answered_by not in body:  # at a glance
                continue
            entry = _entry(body)
            if entry is None or (answered_by and entry.delivered.dst != answered_by):
                continue
            # An older kernel takes no notice of the status that was asked for.
            if translated and not entry.is_translated:
                continue
            if unsteered and (entry.is_translated or entry.is_answered):
                continue
            yield entry


def _entry(body: bytes) -> Entry | None:
    """An entry of a protocol with ports, from its attributes; None for another one (ICMP, say)."""
    known = _FIRST.get(body[:_FIRST_LENGTH])
    if known is not None and body.startswith(known[1].head, known[1].length + _HEADER.size):
        src, dst, protocol, sport, dport, daemon, client, _, daemon_port, client_port = known[1].both.unpack_from(body)
        return Entry(protocol, Flow(src, sport, dst, dport), Flow(client, client_port, daemon, daemon_port), body)
    fields = attributes(body)
    there, back = _ends(fields[_TUPLE_ORIG]), _ends(fields[_TUPLE_REPLY])
    if there is None or back is None:
        return None
    (protocol, flow), (_, answers) = there, back
    return Entry(protocol, flow, Flow(answers.dst, answers.dport, answers.src, answers.sport), body)


def _ends(tuple_: bytes) -> tuple[int, Flow] | None:
    """The protocol, and who sends to whom, in an attribute CTA_TUPLE_ORIG or CTA_TUPLE_REPLY; None without ports."""
    parts = attributes(tuple_)
    addresses, protocol = attributes(parts[_TUPLE_IP]), attributes(parts[_TUPLE_PROTO])
    if _PROTO_SPORT not in protocol or _PROTO_DPORT not in protocol:
        return None
    version = 4 if _IP_SRC[4] in addresses else 6
    sport, dport = (int.from_bytes(protocol[port], "big") for port in (_PROTO_SPORT, _PROTO_DPORT))
    return protocol[_PROTO_NUMBER][0], Flow(addresses[_IP_SRC[version]], sport, addresses[_IP_DST[version]], dport)


class Conntrack:
    """One netlink socket to ctnetlink. Not for several threads at once."""

    def __init__(self) -> None:
        self._netlink = Nfnetlink()

    def translated(self, flow: Flow) -> Flow | None:
        """This connection as its daemon sees it, with the daemon's own address and port; None if there is no entry."""
        found = self._entry(flow)
        if found is None:
            return None
        answers = _ends(found[_TUPLE_REPLY])
        assert answers is not None  # the kernel found it by its ports
        return Flow(flow.src, flow.sport, answers[1].src, answers[1].sport)

    def is_answered(self, flow: Flow) -> bool:
        """Whether there is an entry for this connection, and both sides have spoken."""
        entry = self._entry(flow)
        return entry is not None and _status(entry) & _SEEN_REPLY != 0

    def is_opening(self, flow: Flow) -> bool:
        """Whether there is an entry for this connection, and its daemon has not spoken yet."""
        entry = self._entry(flow)
        return entry is not None and _status(entry) & _SEEN_REPLY == 0

    def _entry(self, flow: Flow) -> dict[int, bytes] | None:
        """The attributes of this connection's entry, if there is one."""
        asked = "conntrack does not look for an entry"
        reply = self._netlink.ask(_SUBSYS_CTNETLINK << 8 | _GET, 0, _FAMILIES[flow.version], _tuple(flow), asked)
        if reply.error:
            _not_there(reply.error, asked)
            return None
        return attributes(reply.body[GENERIC.size :])

    def delete(self, flow: Flow, protocol: int = TCP) -> bool:
        """Delete the entry of this connection; False if there is none."""
        asked = "conntrack deletes no entry"
        kind = _SUBSYS_CTNETLINK << 8 | _DELETE
        reply = self._netlink.ask(kind, ACK, _FAMILIES[flow.version], _tuple(flow, protocol), asked)
        return _not_there(reply.error, asked) if reply.error else True

    def delete_entry(self, entry: Entry) -> bool:
        """Delete this very entry; False if it is gone already."""
        asked = "conntrack deletes no entry"
        family = _FAMILIES[entry.flow.version]
        reply = self._netlink.ask(_SUBSYS_CTNETLINK << 8 | _DELETE, ACK, family, entry.identity, asked)
        return _not_there(reply.error, asked) if reply.error else True

    def forget_unsteered(self, endpoints: Collection[Endpoint], pools: Collection[IPNetwork]) -> int:
        """Delete the entries of flows of datagrams to these endpoints, or from aliases of these pools, that have no
        translation and no answer; how many there were. One from an alias is an answer for which there was no
        translation: it would take the place of its flow, whose client would then be given another port."""
        found = [
            entry
            for entry in entries(unsteered=True)
            if entry.protocol == UDP and (_is_at(entry.flow, endpoints) or _is_from(entry.flow, pools))
        ]
        return sum(self.delete_entry(entry) for entry in found)

    def end_flows_to(self, addresses: Collection[bytes]) -> int:
        """Delete the entries of all connections and flows whose daemon has one of these addresses (packed); how many
        there were."""
        found: list[Entry] = []
        many = set()
        for width in _WIDTHS.values():
            wanted = {address for address in addresses if len(address) == width}
            if len(wanted) == 1:
                found += entries(answered_by=wanted.pop())
            many |= wanted
        if many:
            found += (entry for entry in entries() if entry.delivered.dst in many)
        return sum(self.delete_entry(entry) for entry in found)

    def close(self) -> None:
        self._netlink.close()


def _answered_by(address: bytes, version: int) -> bytes:
    """What a dump is asked for that is to hold entries with this source of answers only."""
    addresses = attribute(_TUPLE_IP | NESTED, attribute(_IP_SRC[version], address))
    flags = attribute(_FILTER_REPLY_FLAGS, _FILTER_BY_SOURCE.to_bytes(4, sys.byteorder))
    return attribute(_TUPLE_REPLY | NESTED, addresses) + attribute(_FILTER | NESTED, flags)


def _status(entry: dict[int, bytes]) -> int:
    return int.from_bytes(entry.get(_STATUS, b""), "big")


def _not_there(error: int, asked: str) -> bool:
    """False, if that is what the error says."""
    if error != errno.ENOENT:
        raise KernelError(f"{asked}: {os.strerror(error)}")
    return False


def _is_at(flow: Flow, endpoints: Collection[Endpoint]) -> bool:
    return any(e.address.packed == flow.dst and e.first_port <= flow.dport <= e.last_port for e in endpoints)


def _is_from(flow: Flow, pools: Collection[IPNetwork]) -> bool:
    source = ipaddress.ip_address(flow.src)
    return any(source in prefix for prefix in pools if prefix.version == source.version)


def _tuple(flow: Flow, protocol_number: int = TCP) -> bytes:
    addresses = attribute(_IP_SRC[flow.version], flow.src) + attribute(_IP_DST[flow.version], flow.dst)
    protocol = (
        attribute(_PROTO_NUMBER, bytes([protocol_number]))
        + attribute(_PROTO_SPORT, flow.sport.to_bytes(2, "big"))
        + attribute(_PROTO_DPORT, flow.dport.to_bytes(2, "big"))
    )
    inner = attribute(_TUPLE_IP | NESTED, addresses) + attribute(_TUPLE_PROTO | NESTED, protocol)
    return attribute(_TUPLE_ORIG | NESTED, inner)
