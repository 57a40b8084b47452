"""Raw sockets: packets of a worker's own, and its copies of a client's, sent as they are.

A packet to the endpoint's address is routed to this machine itself and comes back through `lo`; one from it to a client
leaves like an answer of the kernel's (man 7 raw, IP_HDRINCL; IPV6_HDRINCL since Linux 4.5).
"""

from __future__ import annotations

import socket
import struct

_SO_MARK = 36
_IPV6_HDRINCL = 36
_MARK = struct.Struct("=I").pack


class Injector:
    """One raw socket for each family; every packet carries the mark `ours`, unless it is given another."""

    def __init__(self, ours: int) -> None:
        self._ipv4 = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
        self._ipv4.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        self._ipv6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
        self._ipv6.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
        # The packet has its source. For one to route by, the kernel would walk over all addresses of this machine.
        self._ipv6.bind(("::1", 0))
        for raw in (self._ipv4, self._ipv6):
            # IPPROTO_RAW receives nothing; without room nothing could pile up either.
            raw.setsockopt(socket.SOL_SOCKET, _SO_MARK, ours)

    def send(self, packet: bytes, mark: int | None = None) -> None:
        """Send one IP packet to the destination that its header names. Raises OSError where a firewall in output drops
        it (PermissionError), there is no route, or no memory."""
        if packet[0] >> 4 == 4:
            raw, address = self._ipv4, (socket.inet_ntop(socket.AF_INET, packet[16:20]), 0)
        else:
            raw, address = self._ipv6, (socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0)
        if mark is None:
            raw.sendto(packet, address)
        else:
            raw.sendmsg([packet], [(socket.SOL_SOCKET, _SO_MARK, _MARK(mark))], 0, address)

    def close(self) -> None:
        self._ipv4.close()
        self._ipv6.close()
