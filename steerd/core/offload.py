"""Which SYNs the kernel may steer by itself, and by what. Pure.

A SYN whose port extension alone decides needs no Python a second time. The worker that has decided it adds endpoint
and extension to a map of the table (`offload4`, `offload6` in nft/steerd.nft), with the target's mark; the next one has
that mark from the kernel, and takes the same way through the chains. What is not in the map goes to a worker.

Two things make the kernel's answer the worker's:

- *Nothing else decides.* The rules that look into the map match one layout only, byte for byte: the extension as
  steerd.wire.portext writes it and no other option in the IP header, the TCP options that Linux writes, no data. `key`
  finds the map's key of such a packet. And the packet's service decides such a packet by its endpoint and the
  destination extension alone: `decides_by_extension` says whether; where one of several targets is chosen,
  Engine.lasting_target says no.
- *Nothing is left that was decided before a change.* Whoever changes something that such a decision depends on (the
  configuration, routes with keys of the extension alone, drains) empties the maps after the change and before anybody
  is told that it is in force, and counts an epoch on, in the kernel and in shared memory. A worker reads the epoch,
  then decides, then adds its answer together with that epoch, in one transaction: the kernel refuses it if the epoch is
  another one by then.
"""

from __future__ import annotations

from steerd.core.router import Probe
from steerd.core.sessions import SessionsPlan
from steerd.wire import portext
from steerd.wire.packet import Packet

_MSS = b"\x02\x04"
_WITH_TIMESTAMPS, _WITHOUT = (b"\x04\x02\x08\x0a", b"\x01\x03\x03"), (b"\x01\x01\x04\x02", b"\x01\x03\x03")
_PADDING = b"\x01\x04"
_KINDS = (0, 1, 2, 3, 4, 8)
"""TCP options that stand in these layouts, or end or fill them: none of them may be ours."""


def decides_by_extension(probes: list[Probe], sessions: SessionsPlan | None) -> bool:
    """Whether a service decides a SYN that has an extension and no data by the extension alone: no route asks for its
    source, be it an address or a source extension, and it is no session id."""
    if sessions is not None and sessions.key in portext.KEYS:
        return False
    return not any(
        probe.source_width or any(part.key == portext.SRC for part in probe.parts)
        for probe in probes
        if all(part.key in portext.KEYS for part in probe.parts)
    )


def key(packet: Packet, numbers: portext.Numbers) -> bytes | None:
    """The key of a SYN in the map of its IP version, every field padded to 4 bytes: destination, port, and the packet's
    bytes from the option (IPv4), or from the destination options header (IPv6), up to the destination extension. None:
    it is not of the layout that the kernel's rules match."""
    tcp = packet.tcp_options
    if len(tcp) == 20:
        is_plain = tcp[:2] == _MSS and (tcp[4:8], tcp[16:19]) == _WITH_TIMESTAMPS
    else:
        is_plain = len(tcp) == 12 and tcp[:2] == _MSS and (tcp[4:8], tcp[8:11]) == _WITHOUT
    if not is_plain or packet.payload or numbers.tcp_option in _KINDS:
        return None
    exid = numbers.exid.to_bytes(2, "big")
    if packet.version == 4:
        found = packet.ip_options
        if len(found) != 8 or found[:4] != bytes((numbers.ipv4_option, 8)) + exid:
            return None
        beginning = found[:6] + b"\0\0"
    else:
        found = packet.dst_options
        if len(found) != 14 or found[:4] != bytes((numbers.ipv6_option, 6)) + exid or found[8:10] != _PADDING:
            return None
        beginning = b"\x06\x01" + found[:6]
    return packet.dst + packet.dport.to_bytes(2, "big") + b"\0\0" + beginning
