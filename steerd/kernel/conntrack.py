"""Single conntrack entries: is there one for a connection, and away with it. Not for lists; those are the operator's.

Layout: include/uapi/linux/netfilter/nfnetlink_conntrack.h; states: nf_conntrack_common.h (enum ip_conntrack_status).
"""

from __future__ import annotations

import errno
import os

from steerd.errors import KernelError
from steerd.kernel.nfnetlink import ACK, GENERIC, NESTED, Nfnetlink, attribute, attributes
from steerd.model import TCP, Flow

_SUBSYS_CTNETLINK = 1
_GET, _DELETE = 1, 2
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS = 1, 2, 3
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC, _IP_DST = {4: 1, 6: 3}, {4: 2, 6: 4}
_PROTO_NUMBER, _PROTO_SPORT, _PROTO_DPORT = 1, 2, 3
_FAMILIES = {4: 2, 6: 10}
_SEEN_REPLY = 0x2


class Conntrack:
    """One netlink socket to ctnetlink. Not for several threads at once."""

    def __init__(self) -> None:
        self._netlink = Nfnetlink()

    def translated(self, flow: Flow) -> Flow | None:
        """This connection as its daemon sees it, with the daemon's own address and port; None if there is no entry."""
        asked = "conntrack does not look for an entry"
        reply = self._netlink.ask(_SUBSYS_CTNETLINK << 8 | _GET, 0, _FAMILIES[flow.version], _tuple(flow), asked)
        if reply.error:
            _not_there(reply.error, asked)
            return None
        parts = attributes(attributes(reply.body[GENERIC.size :])[_TUPLE_REPLY])
        addresses, ports = attributes(parts[_TUPLE_IP]), attributes(parts[_TUPLE_PROTO])
        daemon_port = int.from_bytes(ports[_PROTO_SPORT], "big")
        return Flow(flow.src, flow.sport, addresses[_IP_SRC[flow.version]], daemon_port)

    def is_answered(self, flow: Flow) -> bool:
        """Whether there is an entry for this connection, and both sides have spoken."""
        asked = "conntrack does not look for an entry"
        reply = self._netlink.ask(_SUBSYS_CTNETLINK << 8 | _GET, 0, _FAMILIES[flow.version], _tuple(flow), asked)
        if reply.error:
            return _not_there(reply.error, asked)
        status = attributes(reply.body[GENERIC.size :])[_STATUS]
        return bool(int.from_bytes(status, "big") & _SEEN_REPLY)

    def delete(self, flow: Flow) -> bool:
        """Delete the entry of this connection; False if there is none."""
        asked = "conntrack deletes no entry"
        kind = _SUBSYS_CTNETLINK << 8 | _DELETE
        reply = self._netlink.ask(kind, ACK, _FAMILIES[flow.version], _tuple(flow), asked)
        return _not_there(reply.error, asked) if reply.error else True

    def close(self) -> None:
        self._netlink.close()


def _not_there(error: int, asked: str) -> bool:
    """False, if that is what the error says."""
    if error != errno.ENOENT:
        raise KernelError(f"{asked}: {os.strerror(error)}")
    return False


def _tuple(flow: Flow) -> bytes:
    addresses = attribute(_IP_SRC[flow.version], flow.src) + attribute(_IP_DST[flow.version], flow.dst)
    protocol = (
        attribute(_PROTO_NUMBER, bytes([TCP]))
        + attribute(_PROTO_SPORT, flow.sport.to_bytes(2, "big"))
        + attribute(_PROTO_DPORT, flow.dport.to_bytes(2, "big"))
    )
    inner = attribute(_TUPLE_IP | NESTED, addresses) + attribute(_TUPLE_PROTO | NESTED, protocol)
    return attribute(_TUPLE_ORIG | NESTED, inner)
