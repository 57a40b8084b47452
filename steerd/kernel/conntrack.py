"""Conntrack entries: is there one for a connection, and away with it.

Layout: include/uapi/linux/netfilter/nfnetlink_conntrack.h; states: nf_conntrack_common.h (enum ip_conntrack_status).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import sys
from collections.abc import Collection, Iterator

from steerd.errors import KernelError
from steerd.kernel.nfnetlink import ACK, GENERIC, NESTED, Nfnetlink, attribute, attributes
from steerd.model import TCP, UDP, Endpoint, Flow, IPNetwork

_SUBSYS_CTNETLINK = 1
_GET, _DELETE = 1, 2
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS = 1, 2, 3
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC, _IP_DST = {4: 1, 6: 3}, {4: 2, 6: 4}
_PROTO_NUMBER, _PROTO_SPORT, _PROTO_DPORT = 1, 2, 3
_FAMILIES = {4: 2, 6: 10}
_SEEN_REPLY, _DST_NAT = 0x2, 0x20
_ID, _ZONE, _FILTER = 12, 18, 25
_IDENTITY = (_TUPLE_ORIG, _ID, _ZONE)
"""What names one entry and no other, not even one of the same addresses and ports that comes after it."""
_FILTER_REPLY_FLAGS, _FILTER_BY_SOURCE = 2, 1
_WIDTHS = {4: 4, 6: 16}


class Conntrack:
    """One netlink socket to ctnetlink. Not for several threads at once."""

    def __init__(self) -> None:
        self._netlink = Nfnetlink()

    def translated(self, flow: Flow) -> Flow | None:
        """This connection as its daemon sees it, with the daemon's own address and port; None if there is no entry."""
        entry = self._entry(flow)
        if entry is None:
            return None
        parts = attributes(entry[_TUPLE_REPLY])
        addresses, ports = attributes(parts[_TUPLE_IP]), attributes(parts[_TUPLE_PROTO])
        daemon_port = int.from_bytes(ports[_PROTO_SPORT], "big")
        return Flow(flow.src, flow.sport, addresses[_IP_SRC[flow.version]], daemon_port)

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

    def forget_unsteered(self, endpoints: Collection[Endpoint], pools: Collection[IPNetwork]) -> int:
        """Delete the entries of flows of datagrams to these endpoints, or from aliases of these pools, that have no
        translation and no answer; how many there were. One from an alias is an answer for which there was no
        translation: it would take the place of its flow, whose client would then be given another port."""
        found = [flow for flow in self._unsteered() if _is_at(flow, endpoints) or _is_from(flow, pools)]
        return sum(self.delete(flow, UDP) for flow in found)

    def end_flows_to(self, addresses: Collection[bytes]) -> int:
        """Delete the entries of all connections and flows whose daemon has one of these addresses (packed), of whatever
        protocol; how many there were."""
        asked = "conntrack does not list its entries"
        kind = _SUBSYS_CTNETLINK << 8
        ended = 0
        for version, family in _FAMILIES.items():
            wanted = {address for address in addresses if len(address) == _WIDTHS[version]}
            if not wanted:
                continue
            # Of one IPv4 address the kernel (since 5.8) sorts out the entries by itself. Of IPv6 addresses it sorts out
            # the others (seen on 6.18): ctnetlink_filter_match_tuple has the comparison the wrong way round.
            only = next(iter(wanted)) if len(wanted) == 1 else b""
            about = _answered_by(only, version) if only and version == 4 else b""
            found = []
            for body in self._netlink.dump(kind | _GET, family, about, asked):
                if only not in body:  # at a glance
                    continue
                fields = attributes(body)
                if attributes(attributes(fields[_TUPLE_REPLY])[_TUPLE_IP])[_IP_SRC[version]] in wanted:
                    found.append(b"".join(attribute(name, fields[name]) for name in _IDENTITY if name in fields))
            for identity in found:
                reply = self._netlink.ask(kind | _DELETE, ACK, family, identity, "conntrack deletes no entry")
                ended += _not_there(reply.error, "conntrack deletes no entry") if reply.error else True
        return ended

    def _unsteered(self) -> Iterator[Flow]:
        asked = "conntrack does not list its entries"
        for body in self._netlink.dump(_SUBSYS_CTNETLINK << 8 | _GET, 0, b"", asked):
            fields = attributes(body)
            if _status(fields) & (_SEEN_REPLY | _DST_NAT) == 0 and (flow := _udp_flow(fields[_TUPLE_ORIG])) is not None:
                yield flow

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


def _udp_flow(original: bytes) -> Flow | None:
    """The 4-tuple in an attribute CTA_TUPLE_ORIG; None unless it is UDP."""
    parts = attributes(original)
    addresses, protocol = attributes(parts[_TUPLE_IP]), attributes(parts[_TUPLE_PROTO])
    if protocol.get(_PROTO_NUMBER) != bytes([UDP]):
        return None
    version = 4 if _IP_SRC[4] in addresses else 6
    sport, dport = (int.from_bytes(protocol[port], "big") for port in (_PROTO_SPORT, _PROTO_DPORT))
    return Flow(addresses[_IP_SRC[version]], sport, addresses[_IP_DST[version]], dport)


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
