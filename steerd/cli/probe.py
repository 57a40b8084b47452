"""`steerctl probe`: how far a SYN with a port extension gets, hop by hop, in words.

SYNs with a hop limit of 1, 2, 3 ... are sent from fresh ports, one at a time; the router at which one expires says so
and quotes what it got, so that an option that was lost on the way shows. If the end is silent, the same SYN without the
option tells whether the option makes the difference.

Nothing stays open: a SYN-ACK belongs to no socket here, and the kernel answers it with a reset by itself.

Contract: needs CAP_NET_RAW; sends at most `max_hops` + 2 packets; writes only through `out`.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, NamedTuple

from steerd import client
from steerd.client import NotPermittedError
from steerd.model import TCP, Extension
from steerd.wire import packet, portext
from steerd.wire.packet import ACK, RST, SYN
from steerd.wire.portext import Area, Numbers

SILENT_HOPS = 5
"""So many silent hops in a row, and the rest is skipped: many routers never say that a packet expired."""
FAR = 64
"""The hop limit of a packet that is meant to arrive."""

Kind = Literal["open", "closed", "expired", "refused", "silent"]


class Reply(NamedTuple):
    """What came back: `refused` is an ICMP error other than an expired hop limit."""

    kind: Kind
    source: str = ""
    words: str = ""
    quote: bytes = b""
    """The beginning of our own packet, from its IP header on, as the sender of an ICMP error got it."""


SILENCE = Reply("silent")


def probe(
    host: str,
    port: int,
    *,
    extension: int | None = None,
    source_extension: int = 0,
    via: Literal["ip", "tcp"] = "ip",
    max_hops: int = 30,
    timeout: float = 1.0,
    out: Callable[[str], None] = print,
    numbers: Numbers = client.NUMBERS,
) -> int:
    """Probe the way to (host, port), which may be an extended port, and say line by line through `out` what came back.
    `timeout` (seconds) is per packet.

    Returns 0 if the SYN with the extension was answered by a SYN-ACK, else 1. Raises ValueError for numbers out of
    range or without any extension, NotPermittedError without CAP_NET_RAW, socket.gaierror for an unknown host, OSError
    where there is no route.
    """
    host, port, carried = client.destination((host, port), extension, source_extension)
    if carried == (0, 0):
        raise ValueError("A probe needs an extension: give an extended port (70000), or an extension of 1 to 65535.")
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    carrier = f"{'IPv4' if family == socket.AF_INET else 'IPv6 destination'} option" if via == "ip" else "TCP option"
    out(f"SYN to {address[0]} port {port} with extension {carried.dst}, source extension {carried.src} ({carrier})")

    with _Prober(family, address, timeout, numbers, via) as prober:
        reply, last_heard = _walk(prober, carried, max_hops, timeout, out)
        if reply.kind == "silent":
            reply = prober.send(FAR, carried)
            out(f"hop limit {FAR}: {_in_words(reply, prober, carried, timeout)}")
        if reply.kind != "silent":
            return 0 if reply.kind == "open" else 1
        without = prober.send(FAR, None)
        if without.kind in ("open", "closed"):
            out(
                f"Without the {carrier} the same SYN is answered ({_in_words(without, prober, None, timeout)})."
                f" Either the path drops the option, behind {last_heard}, or the gateway's firewall drops what it leads"
                " to (on the gateway: nft/install.sh --status)."
            )
        else:
            out(
                f"Without the {carrier}: {_in_words(without, prober, None, timeout)}."
                f" It is not the option: nobody answers there, or a firewall drops every SYN to port {port}."
            )
        return 1


def _walk(
    prober: _Prober, carried: Extension, max_hops: int, timeout: float, out: Callable[[str], None]
) -> tuple[Reply, str]:
    """Hop after hop until somebody ends it: (the last reply, who was heard of last, in words)."""
    reply, last_heard, silent = SILENCE, "this machine", 0
    for hop in range(1, max_hops + 1):
        reply = prober.send(hop, carried)
        out(f"hop {hop}: {_in_words(reply, prober, carried, timeout)}")
        if reply.kind not in ("expired", "silent"):
            return reply, last_heard
        silent = silent + 1 if reply.kind == "silent" else 0
        if reply.kind == "expired":
            last_heard = f"hop {hop} ({reply.source})"
        if silent == SILENT_HOPS:
            break
    return SILENCE, last_heard


def _in_words(reply: Reply, prober: _Prober, carried: Extension | None, timeout: float) -> str:
    match reply.kind:
        case "silent":
            return f"nothing within {timeout:g} s"
        case "open":
            return f"SYN-ACK from {reply.source}: the port is open"
        case "closed":
            return f"reset from {reply.source}: the port is closed, or a firewall says so"
        case _:
            quoted = f"; {prober.fate(reply.quote, carried)}" if carried else ""
            return f"{reply.words} from {reply.source}{quoted}"


class _Prober:
    """Sends single SYNs to one address and waits for what comes back. A context manager: it owns three raw sockets."""

    def __init__(
        self, family: int, address: client.Address, timeout: float, numbers: Numbers, via: Literal["ip", "tcp"]
    ) -> None:
        self.ipv4 = family == socket.AF_INET
        self.family = family
        self.address = address
        self.timeout = timeout
        self.numbers = numbers
        self.via = via
        self.source, _ = client.route(family, address)
        self._opened = ExitStack()
        try:
            self._out, self._tcp, self._icmp = (
                self._opened.enter_context(socket.socket(family, socket.SOCK_RAW, protocol))
                for protocol in (
                    socket.IPPROTO_RAW,
                    socket.IPPROTO_TCP,
                    socket.IPPROTO_ICMP if self.ipv4 else socket.IPPROTO_ICMPV6,
                )
            )
        except PermissionError:
            self._opened.close()
            raise NotPermittedError(
                "A probe needs CAP_NET_RAW, which this process does not have; run it as root."
            ) from None

    def __enter__(self) -> _Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def send(self, hop_limit: int, extension: Extension | None) -> Reply:
        """One SYN, with the extension or without; what came back within the timeout."""
        # Bound, so that no other program is given the port meanwhile; not connected, so that a SYN-ACK is reset.
        with socket.socket(self.family, socket.SOCK_STREAM) as reserved:
            reserved.bind(self.source)
            port = reserved.getsockname()[1]
            self._out.sendto(self._syn(hop_limit, port, extension), client.without_port(self.address))
            deadline = time.monotonic() + self.timeout
            while (left := deadline - time.monotonic()) > 0:
                for sock in select.select([self._tcp, self._icmp], [], [], left)[0]:
                    data, sender = sock.recvfrom(65535)
                    reply = (self._tcp_reply if sock is self._tcp else self._icmp_reply)(data, sender[0], port)
                    if reply is not None:
                        return reply
            return SILENCE

    def _syn(self, hop_limit: int, port: int, extension: Extension | None) -> bytes:
        # Slow to import, and nobody but this command needs it.
        from scapy.layers.inet import IP, IPOption
        from scapy.layers.inet import TCP as SCAPY_TCP
        from scapy.layers.inet6 import HBHOptUnknown, IPv6, IPv6ExtHdrDestOpt

        tcp = SCAPY_TCP(sport=port, dport=self.address[1], flags="S", seq=port << 8, options=[("MSS", 1220)])
        if extension and self.via == "tcp":
            tcp.options.append((self.numbers.tcp_option, portext.encode_tcp(extension, self.numbers)[2:]))
        ends = {"src": self.source[0].partition("%")[0], "dst": self.address[0].partition("%")[0]}
        if self.ipv4:
            header = IP(**ends, ttl=hop_limit)
            if extension and self.via == "ip":
                header.options = [IPOption(portext.encode_ipv4(extension, self.numbers))]
        else:
            header = IPv6(**ends, hlim=hop_limit)
            if extension and self.via == "ip":
                value = portext.encode_ipv6(extension, self.numbers)[4:10]
                header /= IPv6ExtHdrDestOpt(options=[HBHOptUnknown(otype=self.numbers.ipv6_option, optdata=value)])
        return bytes(header / tcp)

    def _tcp_reply(self, data: bytes, source: str, port: int) -> Reply | None:
        """A segment for us, else None. IPv4 raw sockets give the IP header as well, IPv6 ones do not."""
        segment = data[(data[0] & 15) * 4 :] if self.ipv4 else data
        if len(segment) < 20 or source != self.address[0]:
            return None
        sport, dport, flags = struct.unpack_from("!HH9xB", segment)
        if (sport, dport) != (self.address[1], port):
            return None
        if flags & RST:
            return Reply("closed", source)
        return Reply("open", source) if flags & (SYN | ACK) == SYN | ACK else None

    def _icmp_reply(self, data: bytes, source: str, port: int) -> Reply | None:
        """An ICMP error about the SYN from our port, else None (RFC 792, RFC 4443)."""
        message = data[(data[0] & 15) * 4 :] if self.ipv4 else data
        if len(message) < 8 or self._quoted_port(message[8:]) != port:
            return None
        number, code = message[0], message[1]
        quote = message[8:]
        if number == (11 if self.ipv4 else 3) and code == 0:
            return Reply("expired", source, "time exceeded", quote)
        if number == (12 if self.ipv4 else 4):
            at = message[4] if self.ipv4 else int.from_bytes(message[4:8], "big")
            return Reply("refused", source, f"parameter problem at byte {at} of the packet", quote)
        if number == (3 if self.ipv4 else 1):
            if code in ((9, 10, 13) if self.ipv4 else (1,)):
                return Reply("refused", source, "administratively prohibited", quote)
            names = (
                {0: "network unreachable", 1: "host unreachable", 2: "protocol unreachable", 3: "port unreachable"}
                if self.ipv4
                else {0: "no route", 3: "address unreachable", 4: "port unreachable"}
            )
            return Reply("refused", source, names.get(code, f"destination unreachable (code {code})"), quote)
        return None

    def _quoted_port(self, quote: bytes) -> int | None:
        """The source port of the TCP packet to our address that an ICMP error quotes, even if only 8 bytes of its TCP
        header are there (RFC 792); None if it quotes something else."""
        target = socket.inet_pton(self.family, self.address[0].partition("%")[0])
        if not self.ipv4:
            read = packet.parse(quote)
            return read.sport if read and read.dst == target and read.dport == self.address[1] else None
        start = (quote[0] & 15) * 4 if quote else 0
        if len(quote) < start + 4 or start < 20 or quote[9] != TCP or quote[16:20] != target:
            return None
        sport, dport = struct.unpack_from("!HH", quote, start)
        return int(sport) if dport == self.address[1] else None

    def fate(self, quote: bytes, carried: Extension) -> str:
        """Whether the quoted packet still held the extension, in words."""
        if self.ipv4 and self.via == "ip":
            found = portext.find_in(quote[20 : (quote[0] & 15) * 4], Area.IPV4, self.numbers)
        else:
            read = packet.parse(quote)
            if read is None:
                return "its quote is too short to show the option"
            area, kind = (read.tcp_options, Area.TCP) if self.via == "tcp" else (read.dst_options, Area.IPV6)
            found = portext.find_in(area, kind, self.numbers)
        if found == [carried]:
            return "the option had come that far"
        return "the option was changed before it" if found else "the option was removed before it"
