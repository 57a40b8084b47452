"""Ending flows: connections, and flows of datagrams, that were steered.

A daemon on this machine is told first (SOCK_DESTROY): its socket fails with ECONNABORTED, and the kernel sends a
reset, which is translated like everything the daemon says, so the client is told as well. Then conntrack forgets the
entry, and no packet of the flow passes on as before.

To the reset of a daemon synproxy gives the sequence number that would refuse a connection (ipv4_synproxy_hook in
net/netfilter/nf_synproxy_core.c), so that a client of late steering takes it for an old one. It is sent another one,
which follows on what it was sent; if some of that is under way or lost, it is not told, and what it still sends is
dropped, since no handshake belongs to it, until it gives up.

Who is not told: a client of late steering whose daemon is on another host, or in another network namespace, and that
daemon. Other clients of such daemons hear of it with their next packet. A client of datagrams: its next one is decided
anew. The connection ids of a QUIC daemon are forgotten, or they would bring its client back.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable, Iterable

from steerd.kernel import ruleset, sockets
from steerd.kernel.conntrack import Conntrack, Entry
from steerd.kernel.nftables import Nftables
from steerd.model import TCP, UDP, Flow


def end(entries: Iterable[Entry], reset: Callable[[Flow, int], None]) -> int:
    """End these flows; how many of them were still there. `reset` sends a reset to the client of a connection, with a
    sequence number. Raises KernelError."""
    # Read to the end first: entries that go while conntrack is read make it skip others.
    found = list(entries)
    daemons = {entry.delivered.dst for entry in found if entry.protocol == UDP}
    if daemons:
        with contextlib.closing(Nftables()) as nftables:
            ruleset.forget_learned(nftables, [ipaddress.ip_address(address) for address in daemons])
    with contextlib.closing(Conntrack()) as conntrack:
        return sum(_end(entry, conntrack, reset) for entry in found)


def _end(entry: Entry, conntrack: Conntrack, reset: Callable[[Flow, int], None]) -> bool:
    promised = entry.promised if entry.protocol == TCP else None
    sent = None if promised is None else sockets.sent(entry.delivered)
    if entry.protocol == TCP:
        sockets.end(entry.delivered)
    was_there = conntrack.delete_entry(entry)
    if promised is not None and sent:
        reset(entry.flow, promised + 1 + sent)
    return was_there
