"""Ending flows: connections, and flows of datagrams, that were steered.

A daemon on this machine is told first (SOCK_DESTROY): its socket fails with ECONNABORTED, and the kernel sends a
reset, which is translated like everything the daemon says, so the client is told as well. Then conntrack forgets the
entry, and no packet of the flow passes on as before.

Who is not told: a client of late steering whose daemon is on another host, or in another network namespace, and that
daemon. Other clients of such daemons hear of it with their next packet. A client of datagrams: its next one is decided
anew. The connection ids of a QUIC daemon are forgotten, or they would bring its client back.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterable

from steerd.kernel import ruleset, sockets
from steerd.kernel.conntrack import Conntrack, Entry
from steerd.kernel.nftables import Nftables
from steerd.model import TCP, UDP


def end(entries: Iterable[Entry]) -> int:
    """End these flows; how many of them were still there. Raises KernelError."""
    # Read to the end first: entries that go while conntrack is read make it skip others.
    found = list(entries)
    daemons = {entry.delivered.dst for entry in found if entry.protocol == UDP}
    if daemons:
        with contextlib.closing(Nftables()) as nftables:
            ruleset.forget_learned(nftables, [ipaddress.ip_address(address) for address in daemons])
    with contextlib.closing(Conntrack()) as conntrack:
        return sum(_end(entry, conntrack) for entry in found)


def _end(entry: Entry, conntrack: Conntrack) -> bool:
    if entry.protocol == TCP:
        sockets.end(entry.delivered)
    return conntrack.delete_entry(entry)
