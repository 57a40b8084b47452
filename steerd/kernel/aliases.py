"""Local IP aliases by the ten thousand: what the pools want, put into the kernel and taken out again.

Contract. `reconcile` makes the kernel hold the aliases of the pools, and touches nothing that somebody else put
there. What is ours is marked in the kernel itself, so nothing needs to be remembered:

- devices: named `steerN` and in link group 0x5354; they carry addresses and no packets;
- addresses (pools in mode `addresses`): address protocol (IFA_PROTO, Linux 5.18) 0x53, on such a device;
- routes (pools in mode `anyip`): `local PREFIX dev lo`, route protocol 0x53 (83), table local.

Costs, which decide the shape of all this (Linux 6.18):

- IPv4: adding to a device walks the device's list, so 256 addresses a device; 10 us an address.
- IPv6: every addition walks *all* IPv6 addresses of the namespace (addrconf_verify_rtnl, net/ipv6/addrconf.c),
  whatever the device: the total is quadratic, and no arrangement of devices or messages changes that. Some thousand
  addresses are fine; beyond, a pool in mode `anyip` does in a millisecond what real addresses need minutes for.
- IPv6 removal: every address taken off walks the whole IPv6 routing tree (rt_genid_bump_ipv6), so a device with many
  addresses would keep the kernel in one uninterruptible call for minutes. The host routes go first, in batches: with
  the tree empty the rest is quick.
- An IPv6 address is routed a moment after it was added (the kernel does it in a work queue): `reconcile` waits.
- Deleting a group of devices in one message shares the waiting for grace periods. `bridge` still waits once a device
  (20 ms), `dummy` and `ifb` do not.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import ipaddress
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steerd.core.plan import DEVICE_PREFIX, AddressPlan, Held, plan_addresses, wanted_addresses, wanted_routes
from steerd.core.pools import Pool
from steerd.errors import KernelError
from steerd.kernel.nfnetlink import attribute
from steerd.kernel.rtnetlink import (
    ATTRIBUTE,
    BATCH,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Rtnetlink,
    attributes,
    encode,
    errno_text,
    request,
)
from steerd.model import IPAddress, IPNetwork

PROTOCOL = 0x53
"""Marks our addresses (IFA_PROTO) and our routes (rtm_protocol)."""
GROUP = 0x5354
"""Link group of our devices."""
_GROUP_LEAVING = 0x5355
"""Link group of those of our devices that are being deleted, so that one message deletes them all."""
KINDS = ("dummy", "ifb", "bridge")
"""Kinds of device that can carry addresses, the best first; the first one that the kernel knows is taken."""

Progress = Callable[[int, int], None]
"""Called with (changes done, changes in all)."""

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_IFLA_IFNAME, _IFLA_GROUP, _IFLA_EXT_MASK = 3, 27, 29
_IFA_ADDRESS, _IFA_LOCAL, _IFA_PROTO = 1, 2, 11
_RTA_DST = 1
_IFF_UP = 1
_IFA_F_NODAD, _IFA_F_NOPREFIXROUTE = 0x02, 0x200
_IFAPROT_KERNEL = range(1, 4)
"""IFAPROT_KERNEL_LO, _RA, _LL (linux/if_addr.h): addresses that the kernel gave a device by itself."""
_RT_TABLE_LOCAL, _RTN_LOCAL, _RT_SCOPE_HOST, _RTPROT_KERNEL = 255, 2, 254, 2
_IFINFOMSG, _IFADDRMSG = 16, 8
"""How long struct ifinfomsg and struct ifaddrmsg are; a request that is all zeros asks for every one of its kind."""
_RTMSG = struct.Struct("=BB2xBB6x")
"""struct rtmsg: family, length of the destination's prefix, table, protocol; the rest is 0."""
_AT_ROUTE_TYPE = 7
"""Where struct rtmsg has the type of a route."""
_RTEXT_FILTER_SKIP_STATS = 8
_IN6_ADDR_GEN_MODE_NONE = 1
_IFNAMSIZ = 16
_AT_IFINDEX = 16 + 4
"""Where the interface index stands in a message that carries struct ifinfomsg or struct ifaddrmsg."""
_NUMBER = struct.Struct("=I")
_SO_ATTACH_FILTER = 26
_RTMGRP_LINK, _RTMGRP_ADDRESSES, _RTMGRP_ROUTES = 0x1, 0x10 | 0x100, 0x40 | 0x400
_SETTLE_SECONDS = 60.0
_OUR_NAME = re.compile(rf"{DEVICE_PREFIX}[0-9]+")


class Changes(NamedTuple):
    """What a reconcile did, and how long it took. An address that had come into being meanwhile is not counted."""

    added: int
    removed: int
    routes_added: int
    routes_removed: int
    seconds: float

    def __bool__(self) -> bool:
        """Whether anything was changed."""
        return any(self[:4])


class _Link(NamedTuple):
    ifindex: int
    name: str
    group: int
    up: bool

    @property
    def ours(self) -> bool:
        return self.group in (GROUP, _GROUP_LEAVING) and _OUR_NAME.fullmatch(self.name) is not None


def reconcile(pools: Sequence[Pool], progress: Progress | None = None, kinds: Sequence[str] = KINDS) -> Changes:
    """Make the kernel hold exactly the aliases of `pools`, in the network namespace of the calling thread.

    Nothing is removed before its replacement is there, so a pool may change its mode under load. `progress` is called
    at the start, then after every batch of up to 256 changes, and once for all devices that go. Raises KernelError at
    the first refusal; what was done until then stays, and a later reconcile does the rest.
    """
    began = time.monotonic()
    with Rtnetlink() as netlink:
        links = _links(netlink)
        _take_back(netlink, links)
        plan = plan_addresses(wanted_addresses(pools), _held(netlink, links))
        routes = wanted_routes(pools)
        present = _our_routes(netlink)
        tally = _Tally(progress, plan.added + plan.removed)

        routes_added = sum(_add_route(netlink, route) for route in sorted(routes - present, key=str))
        _make_devices(netlink, plan.new_devices, kinds)
        added = _add_addresses(netlink, plan, tally)
        removed = _remove_addresses(netlink, plan, tally)
        _drop_devices(netlink, plan, links, tally)
        routes_removed = sum(_remove_route(netlink, route) for route in sorted(present - routes, key=str))
    seconds = time.monotonic() - began
    return Changes(added, removed + len(plan.dropped), routes_added, routes_removed, seconds)


def remove_all(progress: Progress | None = None) -> Changes:
    """Remove every address, route and device of ours. A device on which somebody put an address stays, with it."""
    return reconcile((), progress)


def missing(pools: Sequence[Pool]) -> int:
    """How many aliases (and local routes) `reconcile` would add. Reads everything: 0.2 s for 65,536 aliases."""
    with Rtnetlink() as netlink:
        plan = plan_addresses(wanted_addresses(pools), _held(netlink, _links(netlink)))
        return plan.added + len(wanted_routes(pools) - _our_routes(netlink))


def are_local(addresses: Iterable[IPAddress]) -> bool:
    """Whether the kernel takes all of these for addresses of this machine. One message each."""
    return not elsewhere(addresses)


def elsewhere(addresses: Iterable[IPAddress]) -> set[IPAddress]:
    """Those that the kernel does not take for addresses of this machine. One message each."""
    missing = set()
    with Rtnetlink() as netlink:
        for address in addresses:
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            about = _RTMSG.pack(family, address.max_prefixlen, 0, 0) + attribute(_RTA_DST, address.packed)
            found = netlink.answer(request(_RTM_GETROUTE, about))
            if found is None or found[_AT_ROUTE_TYPE] != _RTN_LOCAL:
                missing.add(address)
    return missing


class Watcher:
    """Tells when somebody else removes an address, a device or a route of ours: a file descriptor for an event loop.

    A filter in the kernel lets only such notifications through, so the socket stays silent while 65,536 aliases are
    being added. Our own removals of single addresses and routes do fire it; the reconcile that follows finds nothing
    to do. Use it in the network namespace of the thread that makes it, and close it.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        program = _watch_filter()
        code = ctypes.create_string_buffer(program, len(program))
        self._socket.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
        )
        self._socket.bind((0, _RTMGRP_LINK | _RTMGRP_ADDRESSES | _RTMGRP_ROUTES))

    def fileno(self) -> int:
        """The descriptor; readable when there may be something to repair."""
        return self._socket.fileno()

    def read(self) -> bool:
        """Whether something of ours was removed since the last call. Lost notifications (ENOBUFS) count as yes."""
        removed = False
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return removed
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            removed = True

    def close(self) -> None:
        self._socket.close()


def _watch_filter() -> bytes:
    """A classic BPF program that lets through the removal of what is marked as ours.

    It sees the netlink message from its header on, reads numbers in network byte order (so ours are swapped), and
    finds an attribute through the extension SKF_AD_NLATTR (linux/filter.h).
    """
    load_half, load_byte, load_word = 0x28, 0x30, 0x20
    load_byte_at_x, load_word_at_x = 0x50, 0x40
    load_number, load_x, to_x, jump_equal, give = 0x00, 0x01, 0x07, 0x15, 0x06
    find_attribute = 0xFFFFF000 + 12

    steps = [
        (load_half, 0, 0, 4),  # nlmsg_type
        (jump_equal, 3, 0, socket.htons(_RTM_DELADDR)),
        (jump_equal, 9, 0, socket.htons(_RTM_DELLINK)),
        (jump_equal, 15, 0, socket.htons(_RTM_DELROUTE)),
        (give, 0, 0, 0),
        (load_x, 0, 0, _IFA_PROTO),
        (load_number, 0, 0, 16 + 8),  # behind struct ifaddrmsg
        (load_word, 0, 0, find_attribute),
        (jump_equal, 13, 0, 0),
        (to_x, 0, 0, 0),
        (load_byte_at_x, 0, 0, 4),
        (jump_equal, 9, 10, PROTOCOL),
        (load_x, 0, 0, _IFLA_GROUP),
        (load_number, 0, 0, 16 + 16),  # behind struct ifinfomsg
        (load_word, 0, 0, find_attribute),
        (jump_equal, 6, 0, 0),
        (to_x, 0, 0, 0),
        (load_word_at_x, 0, 0, 4),
        (jump_equal, 2, 3, socket.htonl(GROUP)),
        (load_byte, 0, 0, 16 + 5),  # rtm_protocol
        (jump_equal, 0, 1, PROTOCOL),
        (give, 0, 0, 0xFFFF),
        (give, 0, 0, 0),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


class _Tally:
    """Counts changes and passes them on."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self.count(0)

    def count(self, changes: int) -> None:
        self._done += changes
        if self._progress is not None:
            self._progress(self._done, self._total)


# pyroute2's messages, without which there is no change (why they are imported here: steerd.kernel.rtnetlink).


def _ifinfmsg() -> Any:
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    return ifinfmsg()


def _ifaddrmsg() -> Any:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    return ifaddrmsg()


def _rtmsg() -> Any:
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    return rtmsg()


# What is there.


def _links(netlink: Rtnetlink) -> list[_Link]:
    about = bytes(_IFINFOMSG) + attribute(_IFLA_EXT_MASK, _NUMBER.pack(_RTEXT_FILTER_SKIP_STATS))
    found = []
    for data, at, end in netlink.dump(request(_RTM_GETLINK, about)):
        index, flags = struct.unpack_from("=iI", data, at + 4)
        told = dict(attributes(data, at + 16, end))
        name = told[_IFLA_IFNAME].rstrip(b"\0").decode(errors="surrogateescape")
        found.append(_Link(index, name, _NUMBER.unpack(told[_IFLA_GROUP])[0], bool(flags & _IFF_UP)))
    return found


def _addresses(netlink: Rtnetlink) -> Iterator[tuple[int, bytes, int]]:
    """Every address of the namespace: (index of its device, address, protocol)."""
    for data, at, end in netlink.dump(request(_RTM_GETADDR, bytes(_IFADDRMSG))):
        (index,) = _NUMBER.unpack_from(data, at + 4)
        address = b""
        protocol = 0
        at += 8
        # The loop of `attributes`, written out: a generator would double the time that 65,536 addresses take.
        while at < end:
            length, kind = ATTRIBUTE.unpack_from(data, at)
            if kind == _IFA_LOCAL or (kind == _IFA_ADDRESS and not address):
                address = data[at + 4 : at + length]
            elif kind == _IFA_PROTO:
                protocol = data[at + 4]
            at += (length + 3) & ~3
        yield index, address, protocol


def _held(netlink: Rtnetlink, links: Iterable[_Link]) -> Held:
    devices = {link.ifindex: link.name for link in links if link.ours}
    ours: dict[tuple[int, bytes], None] = {}
    foreign: set[bytes] = set()
    occupied: set[int] = set()
    for index, address, protocol in _addresses(netlink):
        if protocol == PROTOCOL and index in devices:
            # A dump may tell of an address twice; a second mention must not be taken for a second copy.
            ours[index, address] = None
            continue
        foreign.add(address)
        if index in devices and protocol not in _IFAPROT_KERNEL:
            occupied.add(index)
    return Held(devices, list(ours), foreign, occupied, {link.name for link in links})


def _local_routes(netlink: Rtnetlink, family: int, protocol: int) -> Iterator[tuple[bytes, int]]:
    """(prefix, length) of the routes of one protocol in the local table; the kernel does the choosing."""
    about = _RTMSG.pack(family, 0, _RT_TABLE_LOCAL, protocol)
    for data, at, end in netlink.dump(request(_RTM_GETROUTE, about)):
        # The answer to a filter that an old kernel does not know is the whole table.
        if data[at + 5] == protocol and data[at + 4] == _RT_TABLE_LOCAL and data[at + 7] == _RTN_LOCAL:
            width = 4 if family == socket.AF_INET else 16
            yield dict(attributes(data, at + 12, end)).get(_RTA_DST, bytes(width)), data[at + 1]


def _our_routes(netlink: Rtnetlink) -> set[IPNetwork]:
    families = [socket.AF_INET, *([socket.AF_INET6] if _has_ipv6() else [])]
    return {
        ipaddress.ip_network((prefix, length))
        for family in families
        for prefix, length in _local_routes(netlink, family, PROTOCOL)
    }


def _has_ipv6() -> bool:
    return Path("/proc/sys/net/ipv6").is_dir()


# Devices.


def _each_device(netlink: Rtnetlink, template: bytes, indices: Sequence[int]) -> dict[int, int]:
    """Send a link message to each device; returns {index: errno} of the refusals."""
    refused = {}
    for start in range(0, len(indices), BATCH):
        part = indices[start : start + BATCH]
        answers = netlink.batch(template, {_AT_IFINDEX: [_NUMBER.pack(index) for index in part]})
        refused.update({part[row]: number for row, number in answers.items()})
    return refused


def _group_template(group: int) -> bytes:
    message = _ifinfmsg()
    message["attrs"] = [("IFLA_GROUP", group)]
    return encode(message, _RTM_NEWLINK)


def _bring_up(netlink: Rtnetlink, indices: Sequence[int]) -> None:
    """Switch devices up, without the link-local address that the kernel would give each."""
    if not indices:
        return
    if _has_ipv6():
        quiet = _ifinfmsg()
        mode = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _IN6_ADDR_GEN_MODE_NONE)]}
        quiet["attrs"] = [("IFLA_AF_SPEC", {"attrs": [("AF_INET6", mode)]})]
        _each_device(netlink, encode(quiet, _RTM_NEWLINK), indices)
    up = _ifinfmsg()
    up["flags"] = up["change"] = _IFF_UP
    for index, number in _each_device(netlink, encode(up, _RTM_NEWLINK), indices).items():
        raise KernelError(f"The kernel refused to switch the alias device with index {index} up: {errno_text(number)}.")


def _take_back(netlink: Rtnetlink, links: Iterable[_Link]) -> None:
    """Devices that an interrupted removal left behind, or that somebody switched down, are devices like the others."""
    leaving = [link.ifindex for link in links if link.ours and link.group == _GROUP_LEAVING]
    if leaving:
        _each_device(netlink, _group_template(GROUP), leaving)
    _bring_up(netlink, [link.ifindex for link in links if link.ours and not link.up])


def _make_devices(netlink: Rtnetlink, names: Sequence[str], kinds: Sequence[str]) -> None:
    if not names:
        return
    for kind in kinds:
        refused = _create(netlink, names, kind)
        if errno.EOPNOTSUPP not in refused.values():
            for row, number in refused.items():
                raise KernelError(f"The kernel refused to make the alias device {names[row]}: {errno_text(number)}.")
            made = set(names)
            _bring_up(netlink, [link.ifindex for link in _links(netlink) if link.name in made and link.ours])
            return
    raise KernelError(f"This kernel has none of the kinds of device that can carry aliases: {', '.join(kinds)}.")


def _create(netlink: Rtnetlink, names: Sequence[str], kind: str) -> dict[int, int]:
    message = _ifinfmsg()
    placeholder = "x" * (_IFNAMSIZ - 1)
    message["attrs"] = [
        ("IFLA_IFNAME", placeholder),
        ("IFLA_GROUP", GROUP),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind)]}),
    ]
    template = encode(message, _RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL)
    offset = template.index(placeholder.encode())
    refused: dict[int, int] = {}
    for start in range(0, len(names), BATCH):
        cells = [name.encode().ljust(_IFNAMSIZ, b"\0") for name in names[start : start + BATCH]]
        refused.update({start + row: number for row, number in netlink.batch(template, {offset: cells}).items()})
    return refused


def _drop_devices(netlink: Rtnetlink, plan: AddressPlan, links: Iterable[_Link], tally: _Tally) -> None:
    if not plan.drop_devices:
        return
    _remove_host_routes(netlink, [(index, address) for index, address in plan.dropped if len(address) == 16])
    if any(link.group == _GROUP_LEAVING and not link.ours for link in links):
        # Somebody else uses the same group number: deleting by group would take his devices too.
        _each_device(netlink, encode(_ifinfmsg(), _RTM_DELLINK), plan.drop_devices)
    else:
        _each_device(netlink, _group_template(_GROUP_LEAVING), plan.drop_devices)
        message = _ifinfmsg()
        message["attrs"] = [("IFLA_GROUP", _GROUP_LEAVING)]
        number = netlink.request(encode(message, _RTM_DELLINK))
        if number not in (0, errno.ENODEV):
            raise KernelError(f"The kernel refused to delete the alias devices: {errno_text(number)}.")
    tally.count(len(plan.dropped))


# Addresses.


@functools.cache
def _address_template(width: int, kind: int, flags: int) -> tuple[bytes, tuple[int, ...]]:
    """A message for /32 or /128 addresses of device 0, and the offsets at which the address stands."""
    message = _ifaddrmsg()
    message["family"] = socket.AF_INET if width == 4 else socket.AF_INET6
    message["prefixlen"] = width * 8
    marker = b"\xfe" * width
    text = socket.inet_ntop(message["family"], marker)
    names = ("IFA_LOCAL", "IFA_ADDRESS") if width == 4 else ("IFA_ADDRESS",)
    message["attrs"] = [
        *((name, text) for name in names),
        ("IFA_FLAGS", _IFA_F_NOPREFIXROUTE | (_IFA_F_NODAD if width == 16 else 0)),
        ("IFA_PROTO", PROTOCOL),
    ]
    template = encode(message, kind, flags)
    first = template.index(marker)
    return template, tuple(first + position * (width + 4) for position in range(len(names)))


def _change_addresses(
    netlink: Rtnetlink, ifindex: int, addresses: Sequence[bytes], kind: int, flags: int
) -> Iterator[tuple[Sequence[bytes], dict[int, int]]]:
    """Send one message for each address (all of one family); yields every batch with its refusals."""
    template, offsets = _address_template(len(addresses[0]), kind, flags)
    of_device = template[:_AT_IFINDEX] + _NUMBER.pack(ifindex) + template[_AT_IFINDEX + 4 :]
    for start in range(0, len(addresses), BATCH):
        part = addresses[start : start + BATCH]
        yield part, netlink.batch(of_device, dict.fromkeys(offsets, part))


def _add_addresses(netlink: Rtnetlink, plan: AddressPlan, tally: _Tally) -> int:
    if not plan.add:
        return 0
    indices = {link.name: link.ifindex for link in _links(netlink)}
    added = 0
    added6: set[bytes] = set()
    for name, addresses in plan.add:
        if name not in indices:
            raise KernelError(f"The alias device {name} was removed by somebody else while aliases were added to it.")
        for part, refused in _change_addresses(
            netlink, indices[name], addresses, _RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL
        ):
            for row, number in refused.items():
                if number != errno.EEXIST:
                    raise KernelError(
                        f"The kernel refused to add the alias {ipaddress.ip_address(part[row])} to {name}: "
                        f"{errno_text(number)}."
                    )
            added += len(part) - len(refused)
            if len(part[0]) == 16:
                added6.update(address for row, address in enumerate(part) if row not in refused)
            tally.count(len(part))
    _await_host_routes(netlink, added6)
    return added


def _await_host_routes(netlink: Rtnetlink, addresses: set[bytes]) -> None:
    """Wait until the kernel's work queue has made IPv6 addresses reachable; raises KernelError if it never does."""
    left = addresses
    deadline = time.monotonic() + _SETTLE_SECONDS
    while left:
        before = len(left)
        left = left - {prefix for prefix, _ in _local_routes(netlink, socket.AF_INET6, _RTPROT_KERNEL)}
        if len(left) < before:
            deadline = time.monotonic() + _SETTLE_SECONDS
        elif time.monotonic() > deadline:
            raise KernelError(
                f"{len(left)} IPv6 aliases were added but got no route within {_SETTLE_SECONDS:.0f} s, "
                f"{ipaddress.ip_address(min(left))} among them: was their device removed or switched down?"
            )
        if left:
            time.sleep(0.02)


def _remove_addresses(netlink: Rtnetlink, plan: AddressPlan, tally: _Tally) -> int:
    removed = 0
    for index, addresses in plan.remove:
        _remove_host_routes(netlink, [(index, address) for address in addresses if len(address) == 16])
        for width in (4, 16):
            family = [address for address in addresses if len(address) == width]
            if not family:
                continue
            for part, refused in _change_addresses(netlink, index, family, _RTM_DELADDR, 0):
                for row, number in refused.items():
                    if number not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                        raise KernelError(
                            f"The kernel refused to remove the alias {ipaddress.ip_address(part[row])}: "
                            f"{errno_text(number)}."
                        )
                removed += len(part) - len(refused)
                tally.count(len(part))
    return removed


def _remove_host_routes(netlink: Rtnetlink, addresses: Sequence[tuple[int, bytes]]) -> None:
    """Take the kernel's own routes to IPv6 addresses away, before the addresses go (see the top of this file)."""
    if not addresses:
        return
    message = _rtmsg()
    marker = b"\xfe" * 16
    message["family"] = socket.AF_INET6
    message["dst_len"] = 128
    message["table"] = _RT_TABLE_LOCAL
    message["type"] = _RTN_LOCAL
    message["attrs"] = [("RTA_DST", socket.inet_ntop(socket.AF_INET6, marker)), ("RTA_OIF", 0x7E7E7E7E)]
    template = encode(message, _RTM_DELROUTE)
    at_address, at_index = template.index(marker), template.index(b"\x7e" * 4)
    for start in range(0, len(addresses), BATCH):
        part = addresses[start : start + BATCH]
        refused = netlink.batch(
            template,
            {at_address: [address for _, address in part], at_index: [_NUMBER.pack(index) for index, _ in part]},
        )
        for row, number in refused.items():
            if number != errno.ESRCH:
                raise KernelError(
                    f"The kernel refused to remove the route to the alias {ipaddress.ip_address(part[row][1])}: "
                    f"{errno_text(number)}."
                )


# Routes.


def _route_message(route: IPNetwork) -> Any:
    message = _rtmsg()
    message["family"] = socket.AF_INET if route.version == 4 else socket.AF_INET6
    message["dst_len"] = route.prefixlen
    message["table"] = _RT_TABLE_LOCAL
    message["proto"] = PROTOCOL
    message["type"] = _RTN_LOCAL
    message["scope"] = _RT_SCOPE_HOST if route.version == 4 else 0
    message["attrs"] = [("RTA_DST", str(route.network_address)), ("RTA_OIF", socket.if_nametoindex("lo"))]
    return message


def _add_route(netlink: Rtnetlink, route: IPNetwork) -> bool:
    # Appending puts ours beside an equal one (the kernel's own to an alias of the pool's former mode, for one).
    number = netlink.request(encode(_route_message(route), _RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND))
    if number not in (0, errno.EEXIST):
        raise KernelError(f"The kernel refused the local route to {route}: {errno_text(number)}.")
    return number == 0


def _remove_route(netlink: Rtnetlink, route: IPNetwork) -> bool:
    number = netlink.request(encode(_route_message(route), _RTM_DELROUTE))
    if number not in (0, errno.ESRCH):
        raise KernelError(f"The kernel refused to remove the local route to {route}: {errno_text(number)}.")
    return number == 0
