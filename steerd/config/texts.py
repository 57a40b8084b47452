"""From text to values: addresses, endpoints, targets, prefixes, unix sockets. Each function raises ValueError with a
sentence that says what is wrong, and what would be right.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from typing import Literal

from steerd.config.reader import shown
from steerd.config.values import MAX_PORT, Listen
from steerd.core.marks import MARK_BITS, MarkLayout
from steerd.model import PROTOCOL_NUMBERS, Endpoint, IPAddress, IPNetwork, Target, UnixDaemon

MIN_MARK_BITS = 20
"""The fewest mark bits to live on: the flag, and ids for half a million targets."""
MAX_EXTENDED_PORT = (1 << 32) - 1
_MAX_SOCKET_PATH = 107  # sun_path, with a zero behind it, or before an abstract name (unix(7))
_IPV4 = re.compile(r"[0-9.]+")
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")  # what useradd(8) allows, and upper case
UNIX_PREFIXES = ("unix:", "unix-fd:")
_KINDS: dict[str, Literal["unix", "unix-fd"]] = {"unix": "unix", "unix-fd": "unix-fd"}


def parse_endpoint(text: str) -> Endpoint:
    """`203.0.113.10:443/tcp`, `[2001:db8::10]:8000-8999/tcp`."""
    usage = (
        'An endpoint is written "203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp" or with a range of ports, "8000-8999"'
    )
    rest, slash, protocol = text.partition("/")
    host, ports = _split(rest, usage)
    if not slash:
        raise ValueError(f"{usage}; {shown(text)} does not end in /tcp or /udp.")
    if protocol not in PROTOCOL_NUMBERS:
        raise ValueError(f"{usage}; {shown(protocol)} is not a protocol that is steered, only tcp and udp are.")
    address = parse_address(host)
    if (kind := why_unusable(ipaddress.ip_network(address))) is not None:
        raise ValueError(f"{address} is {kind}; an endpoint has an address that clients connect to.")
    first, dash, last = ports.partition("-")
    first_port = _parse_port(first)
    last_port = _parse_port(last) if dash else first_port
    if last_port < first_port:
        raise ValueError(f"The port range {ports} ends before it begins; {last}-{first} would be right.")
    return Endpoint(address, first_port, last_port, PROTOCOL_NUMBERS[protocol])


def parse_target(text: str) -> Target:
    """`10.64.0.5:8080`, `[fd00:64::5]:same`."""
    host, port = _split(text, 'A target is written "10.64.0.1:8080", "[fd00:64::1]:8080", or with the port "same"')
    return Target(parse_address(host), 0 if port == "same" else _parse_port(port))


def parse_listen(text: str) -> Listen | None:
    """`127.0.0.1:9464`, `[::1]:9464`, `unix:/run/steerd/metrics.sock`; "": nowhere."""
    if not text:
        return None
    kind, _, path = text.partition(":")
    if kind == "unix":
        if len(parse_directory(path).encode()) > _MAX_SOCKET_PATH:
            raise ValueError(f"The path of a unix socket has at most {_MAX_SOCKET_PATH} bytes.")
        return Listen("", 0, path)
    usage = 'Where to listen is written "127.0.0.1:9464", "[::1]:9464" or "unix:/run/steerd/metrics.sock"'
    host, port = _split(text, usage)
    return Listen(str(parse_address(host)), _parse_port(port), "")


def parse_unix(text: str, proxy_protocol: str | None = None) -> UnixDaemon:
    """`unix:/run/app.sock`, `unix:@name` (an abstract socket), `unix-fd:/run/app.sock`."""
    kind, _, path = text.partition(":")
    if kind not in _KINDS:
        raise ValueError(f'A daemon on a unix socket is written "unix:/path" or "unix-fd:/path", not {shown(text)}.')
    if not path.startswith(("/", "@")) or path == "@" or not path.isprintable():
        raise ValueError(f'Must have an absolute path, or "@name" for an abstract socket, not {shown(path)}.')
    if len(path.encode()) > _MAX_SOCKET_PATH:
        raise ValueError(f"Has a path of {len(path.encode())} bytes; at most {_MAX_SOCKET_PATH} are possible.")
    if proxy_protocol is not None and kind == "unix-fd":
        raise ValueError("Gets the connection itself, and with it who the client is; proxy_protocol is for unix:/path.")
    return UnixDaemon(_KINDS[kind], path, proxy_protocol is not None)


def unix_daemons(target: object) -> list[UnixDaemon]:
    """The daemons on unix sockets that a target, or list of them, names; mistakes are left for those who check it."""
    found = []
    for each in target if isinstance(target, list) else [target]:
        text, option = (each.get("address"), each.get("proxy_protocol")) if isinstance(each, dict) else (each, None)
        if isinstance(text, str) and text.startswith(UNIX_PREFIXES):
            with contextlib.suppress(ValueError):
                found.append(parse_unix(text, option))
    return found


def _split(text: str, usage: str) -> tuple[str, str]:
    match = re.fullmatch(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<ipv4>[^\[\]:]*)):(?P<port>[^:\[\]]*)", text)
    if match is None:
        raise ValueError(f"{usage}; {shown(text)} is neither.")
    host = match["ipv4"] if match["ipv6"] is None else match["ipv6"]
    if (":" in host) != (match["ipv6"] is not None):
        raise ValueError(f"{usage}; only an IPv6 address stands in brackets.")
    return host, match["port"]


def parse_address(text: str) -> IPAddress:
    """`10.64.0.5`, `fd00:64::5`; no name, and no zone (%eth0) behind it."""
    if _IPV4.fullmatch(text):
        with contextlib.suppress(OSError):  # several times as fast as ipaddress, and as strict
            return ipaddress.IPv4Address(int.from_bytes(socket.inet_pton(socket.AF_INET, text), "big"))
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not an IP address; names are not looked up.") from None
    if "%" in text:
        raise ValueError(f"{shown(text)} names an interface; write the address alone.")
    return address


def _parse_port(text: str) -> int:
    if not is_decimal(text) or not 1 <= int(text) <= MAX_PORT:
        raise ValueError(f"{shown(text)} is not a port; ports are 1 to {MAX_PORT}.")
    return int(text)


def is_decimal(text: str) -> bool:
    """Whether a text is a whole number of up to ten digits."""
    return re.fullmatch(r"[0-9]{1,10}", text) is not None


def parse_network(text: str) -> IPNetwork:
    """`198.51.100.0/24`, and no bit set behind the prefix length."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'{shown(text)} is not a prefix such as "198.51.100.0/24".') from None
    if "%" in text:
        raise ValueError(f"{shown(text)} names an interface; write the prefix alone.")
    if ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
        raise ValueError(f'{shown(text)} has bits set behind the prefix length; "{network}" would be right.')
    return network


def parse_pool_prefix(text: str) -> IPNetwork:
    """A prefix whose addresses can be aliases."""
    network = parse_network(text)
    if (kind := why_unusable(network)) is not None:
        raise ValueError(f"{network} is or holds {kind}; no alias can be there.")
    return network


_UNUSABLE: tuple[tuple[IPNetwork, str], ...] = (
    (ipaddress.ip_network("0.0.0.0/8"), "an unspecified address"),
    (ipaddress.ip_network("127.0.0.0/8"), "a loopback address"),
    (ipaddress.ip_network("169.254.0.0/16"), "a link-local address"),
    (ipaddress.ip_network("224.0.0.0/4"), "a multicast address"),
    (ipaddress.ip_network("255.255.255.255/32"), "the broadcast address"),
    (ipaddress.ip_network("::/128"), "the unspecified address"),
    (ipaddress.ip_network("::1/128"), "the loopback address"),
    (ipaddress.ip_network("::ffff:0:0/96"), "an IPv4-mapped address"),
    (ipaddress.ip_network("fe80::/10"), "a link-local address"),
    (ipaddress.ip_network("ff00::/8"), "a multicast address"),
)


def why_unusable(network: IPNetwork) -> str | None:
    """Why connections from outside can never be steered to (or from) these addresses; None: they can."""
    for special, kind in _UNUSABLE:
        if special.version == network.version and network.overlaps(special):
            return kind
    return None


def parse_source(text: str) -> IPAddress:
    """An address that clients can come from."""
    address = parse_address(text)
    if (kind := why_unusable(ipaddress.ip_network(address))) is not None:
        raise ValueError(f"{address} is {kind}; no client comes from there.")
    return address


def parse_mark_bits(text: str) -> MarkLayout:
    """`8-31`."""
    match = re.fullmatch(r"([0-9]{1,2})-([0-9]{1,2})", text)
    if match is None or not int(match[1]) < int(match[2]) < MARK_BITS:
        raise ValueError(f'Must be a range of bits of the packet mark such as "8-31", not {shown(text)}.')
    mark = MarkLayout(int(match[1]), int(match[2]))
    if mark.width < MIN_MARK_BITS:
        raise ValueError(f"Has {mark.width} bits; steerd needs at least {MIN_MARK_BITS}.")
    return mark


def parse_directory(text: str) -> str:
    """An absolute path, or the path of a socket."""
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"Must be an absolute path, not {shown(text)}.")
    return text


def parse_group(text: str) -> str:
    """The name of a group."""
    if not _GROUP.fullmatch(text):
        raise ValueError(f"Must be the name of a group, not {shown(text)}.")
    return text
