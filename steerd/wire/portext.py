"""The port extension: 16 more bits for each port, carried by one option of an IPv4, IPv6 or TCP header.

    IPv4 option   type 0x9E (copied, class 0, number 30: RFC 4727)   length 8   ExID  dst  src
    IPv6 option   type 0x1E in a destination options header (RFC 4727)  length 6   ExID  dst  src
    TCP option    kind 253 (RFC 4727, RFC 6994)                        length 8   ExID  dst  src

ExID (0x5354, "ST") and both extensions are 16 bits each, in network order; the IPv6 length counts only those six bytes,
the other two lengths count type and length as well. An extension of 0 means "not extended". A UDP datagram has no
options of its own and is extended by those of its IP header.

The rule. An option is *ours* if it has our type, its length has room for an ExID, and the ExID is there and is ours;
every other option is somebody else's and is stepped over. Ours is *well-formed* if its length is exactly the one above
and all of it is there. All carriers of a packet are read: no option of ours is no extension, exactly one that is
well-formed is the extension (unless both its fields are 0: no extension), anything else (a wrong length, cut short,
more than one) is MALFORMED, which is to be counted and then treated like no extension.

Reading a header's options ends at an end-of-list option (IPv4, TCP) and at an option, ours or not, whose length points
outside of the area: nothing behind it can be found with certainty. What was found before it stands.

Contract: `find` never raises, whatever the packet holds. Not covered: options in an IPv6 hop-by-hop header, in IPv4
headers quoted by ICMP (`find_in` reads an option area wherever it comes from), in SCTP or DCCP, and in the options that
RFC 9868 puts behind a UDP datagram's payload.
"""

from __future__ import annotations

import enum
from struct import Struct
from typing import NamedTuple

from steerd.model import Extension, Keys
from steerd.wire.packet import Packet

NAME = "port-extension"
"""In `inspect`, and wherever else a payload parser would have its name."""
DST, SRC, PORT = "portext.dst", "portext.src", "portext.port"
KEYS = (DST, SRC, PORT)

MAX_EXTENDED_PORT = 0xFFFF_FFFF

_NONE = (0, 0)
_NO_OPERATION = 1
_new = tuple.__new__
_OPTION = Struct("!BBHHH")
_FIELDS = Struct("!HH")


class Malformed(enum.Enum):
    """The one answer of `find` beside an extension and None."""

    MALFORMED = "malformed"


MALFORMED = Malformed.MALFORMED


class Numbers(NamedTuple):
    """The numbers that make an option ours; experimental ones, hence configurable."""

    ipv4_option: int = 0x9E
    ipv6_option: int = 0x1E
    tcp_option: int = 253
    exid: int = 0x5354


class Area(enum.Enum):
    """Where options stand: IPv4 and TCP write them alike, IPv6 has other paddings and counts lengths differently."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"
    TCP = "tcp"


def find(packet: Packet, numbers: Numbers) -> Extension | Malformed | None:
    """The packet's port extension by the rule above: the extension, None, or MALFORMED."""
    exid = numbers.exid.to_bytes(2, "big")
    alone = packet.ip_options
    if (
        len(alone) == 8
        and alone[0] == numbers.ipv4_option > _NO_OPERATION
        and alone[1] == 8
        and alone[2:4] == exid
        and exid not in packet.tcp_options
    ):
        # As nearly all that come: one option, ours, and whole. The walk below would find the same.
        only: Extension = _new(Extension, _FIELDS.unpack_from(alone, 4))
        return None if only == _NONE else only
    found: list[Extension | Malformed] = []
    # Nearly every SYN has TCP options and none of ours: one search for the ExID spares the walk over them.
    if packet.ip_options and exid in packet.ip_options:
        found += find_in(packet.ip_options, Area.IPV4, numbers)
    if packet.dst_options and exid in packet.dst_options:
        found += find_in(packet.dst_options, Area.IPV6, numbers)
    if exid in packet.tcp_options:
        found += find_in(packet.tcp_options, Area.TCP, numbers)
    if not found:
        return None
    if len(found) > 1:
        return MALFORMED
    extension = found[0]
    return None if extension == _NONE else extension


def find_in(area: bytes, kind: Area, numbers: Numbers) -> list[Extension | Malformed]:
    """Every option of ours in one option area, in order; extensions of zero are included."""
    exid = numbers.exid.to_bytes(2, "big")
    if kind is Area.IPV6:
        ours, uncounted = numbers.ipv6_option, 2  # the length does not count type and length
    else:
        ours, uncounted = numbers.ipv4_option if kind is Area.IPV4 else numbers.tcp_option, 0
    found: list[Extension | Malformed] = []
    at = 0
    while at < len(area):
        option = area[at]
        if option == 0 and kind is not Area.IPV6:  # end of option list
            break
        if option == 0 or (option == 1 and kind is not Area.IPV6):  # Pad1; no-operation
            at += 1
            continue
        if at + 1 >= len(area):
            break
        length = area[at + 1] + uncounted
        if option == ours and length >= 4 and area[at + 2 : at + 4] == exid:
            fields = area[at + 4 : at + 8]
            found.append(Extension(*_FIELDS.unpack(fields)) if length == 8 and len(fields) == 4 else MALFORMED)
        if length < 2:
            break
        at += length
    return found


def encode_ipv4(extension: Extension, numbers: Numbers) -> bytes:
    """The 8 bytes of the IPv4 option, as setsockopt(IP_OPTIONS) wants them. Raises ValueError outside 0 .. 65535."""
    return _encode(numbers.ipv4_option, 8, extension, numbers)


def encode_ipv6(extension: Extension, numbers: Numbers) -> bytes:
    """A whole IPv6 destination options header of 16 bytes, as setsockopt(IPV6_DSTOPTS) wants it: next header 0 (the
    kernel fills it in), length 1 (8 bytes more than the first 8), our option, PadN of 6. Raises ValueError outside
    0 .. 65535."""
    return b"\x00\x01" + _encode(numbers.ipv6_option, 6, extension, numbers) + b"\x01\x04\x00\x00\x00\x00"


def encode_tcp(extension: Extension, numbers: Numbers) -> bytes:
    """The 8 bytes of the TCP option. Raises ValueError outside 0 .. 65535."""
    return _encode(numbers.tcp_option, 8, extension, numbers)


def _encode(option: int, length: int, extension: Extension, numbers: Numbers) -> bytes:
    for name, value in (("destination", extension.dst), ("source", extension.src)):
        if not 0 <= value <= 0xFFFF:
            raise ValueError(f"The {name} extension must be between 0 and 65535, not {value}.")
    return _OPTION.pack(option, length, numbers.exid, extension.dst, extension.src)


def split(extended_port: int) -> tuple[int, int]:
    """An extended port (1 .. 4294967295) as (extension, port): 70000 is (1, 4464). Raises ValueError, with a sentence,
    outside that range and for the multiples of 65536, whose port would be 0."""
    if not 0 < extended_port <= MAX_EXTENDED_PORT:
        raise ValueError(f"An extended port must be between 1 and {MAX_EXTENDED_PORT}, not {extended_port}.")
    extension, port = divmod(extended_port, 65536)
    if port == 0:
        raise ValueError(
            f"The extended port {extended_port} is extension {extension} of port 0, and port 0 is never used;"
            f" the next one that can be used is {extended_port + 1}."
        )
    return extension, port


def keys(extension: Extension, dport: int) -> Keys:
    """The keys of an extension found in a packet to port `dport`, in decimal; what is 0 has no key."""
    result = {}
    if extension.dst:
        result["portext.dst"] = str(extension.dst)
    if extension.src:
        result["portext.src"] = str(extension.src)
    if extension.dst:
        result["portext.port"] = str(extension.dst * 65536 + dport)
    return result
