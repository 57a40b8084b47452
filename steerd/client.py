"""For programs that connect to an extended port: `connect(("gateway.example", 70000))` gives an ordinary socket.

    extended port = extension * 65536 + port;  70000 is extension 1, port 4464

The extension travels in the SYN, in one of two ways (`via`):

- "ip": an IPv4 option, or an IPv6 destination options header, set on the socket before it connects. Needs CAP_NET_RAW.
  It is taken off again once the connection is up: the kernel would repeat it on every packet, which costs room for data
  and the fast path of routers, and nobody reads it after the SYN. Many Internet paths drop packets with IP options: use
  this way in a LAN, a VPN, or a cloud that is known to pass them.
- "tcp": a TCP option, which Internet paths pass far more often. No socket option adds one, so the handshake is made by
  hand and its result is handed to the kernel (TCP_REPAIR). Needs CAP_NET_RAW and CAP_NET_ADMIN; Linux only.

"auto" is "ip". Without any extension nothing of this happens and no capability is needed.

Programs that may have neither capability can still be told apart by what they send first (TLS server name, HTTP host).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from steerd.errors import ForbiddenError
from steerd.model import TCP, Extension
from steerd.wire import packet, portext
from steerd.wire.packet import ACK, RST, SYN, Packet
from steerd.wire.portext import Numbers

Via = Literal["auto", "ip", "tcp"]
Address = tuple[Any, ...]
"""What `socket` takes and gives: (host, port), for IPv6 (host, port, flow label, scope)."""

NUMBERS = Numbers()


class NotPermittedError(ForbiddenError, PermissionError):
    """This process may not put an extension into a SYN; the message names the ways out."""


def connect(
    address: tuple[str, int],
    *,
    extension: int | None = None,
    source_extension: int = 0,
    timeout: float | None = None,
    via: Via = "auto",
    numbers: Numbers = NUMBERS,
) -> socket.socket:
    """Connect to (host, extended port) and return the connected socket.

    The port may be 1 .. 4294967295; or it is an ordinary one and `extension` (0 .. 65535) is given beside it.
    `source_extension` (0 .. 65535) tells senders behind one address apart. Every address of the host is tried in turn,
    `timeout` seconds each; the timeout then stays set on the socket, as with socket.create_connection. With None the
    kernel's own limit holds (via "tcp": GIVE_UP_AFTER).

    Raises ValueError for numbers out of range, NotPermittedError without the capabilities, else the OSError of the
    last address (ConnectionRefusedError, TimeoutError, socket.gaierror ...).
    """
    host, port, carried = destination(address, extension, source_extension)
    failure: OSError | None = None
    for family, _, _, _, resolved in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            if carried == (0, 0):
                return _connect_plain(family, resolved, timeout)
            if via == "tcp":
                return _connect_by_hand(family, resolved, portext.encode_tcp(carried, numbers), timeout)
            return _connect_with_ip_option(family, resolved, carried, timeout, numbers)
        except NotPermittedError:
            raise
        except OSError as error:
            failure = error
    assert failure is not None  # getaddrinfo raises rather than give no address
    raise failure


async def open_connection(
    host: str,
    port: int,
    *,
    extension: int | None = None,
    source_extension: int = 0,
    timeout: float | None = None,
    via: Via = "auto",
    numbers: Numbers = NUMBERS,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """`connect` for asyncio: streams to an extended port, as asyncio.open_connection gives them to an ordinary one.
    `timeout` (seconds an address) covers the connecting only."""
    connecting = asyncio.get_running_loop().run_in_executor(
        None,
        partial(
            connect, (host, port), extension=extension, source_extension=source_extension, timeout=timeout, via=via,
            numbers=numbers,
        ),
    )  # fmt: skip
    try:
        connected = await asyncio.shield(connecting)
    except asyncio.CancelledError:
        # The thread cannot be stopped; the socket it may still come back with must not stay open.
        connecting.add_done_callback(_close_result)
        raise
    connected.setblocking(False)
    return await asyncio.open_connection(sock=connected)


def _close_result(connecting: asyncio.Future[socket.socket]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


def destination(address: tuple[str, int], extension: int | None, source: int) -> tuple[str, int, Extension]:
    """(host, port of 16 bits, what the SYN is to carry). Raises ValueError for numbers out of range."""
    host, port = address
    from_port, port = portext.split(port)
    if extension is not None:
        if from_port:
            raise ValueError(
                f"The port {address[1]} already says extension {from_port}; give either an extended port or extension=."
            )
        from_port = extension
    for name, value in (("extension", from_port), ("source_extension", source)):
        if not 0 <= value <= 0xFFFF:
            raise ValueError(f"{name} must be between 0 and 65535, not {value}.")
    return host, port, Extension(from_port, source)


@contextlib.contextmanager
def _closed_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _connect_plain(family: int, resolved: Address, timeout: float | None) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    with _closed_on_failure(sock):
        sock.settimeout(timeout)
        sock.connect(resolved)
    return sock


# Via "ip"


def _connect_with_ip_option(
    family: int, resolved: Address, extension: Extension, timeout: float | None, numbers: Numbers
) -> socket.socket:
    if family == socket.AF_INET:
        level, name, value = socket.IPPROTO_IP, socket.IP_OPTIONS, portext.encode_ipv4(extension, numbers)
    else:
        level, name, value = socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, portext.encode_ipv6(extension, numbers)
    sock = socket.socket(family, socket.SOCK_STREAM)
    with _closed_on_failure(sock):
        sock.settimeout(timeout)
        try:
            sock.setsockopt(level, name, value)
        except OSError as error:
            # Without the capability IPv6 says EPERM and IPv4 EINVAL, as for any option it does not know
            # (ip_options_compile in net/ipv4/ip_options.c).
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            raise NotPermittedError(
                "Putting a port extension into the IP header needs CAP_NET_RAW, which this process does not have."
                " Ways out: run it as root or with that capability (AmbientCapabilities=CAP_NET_RAW in its systemd"
                " unit, or setcap cap_net_raw+ep on its binary); or use a service that is steered by what is sent first"
                " (TLS server name, HTTP host), which needs no capability."
            ) from None
        sock.connect(resolved)
        sock.setsockopt(level, name, b"")
    return sock


# Via "tcp": a handshake by hand. The kernel's names and numbers are those of include/uapi/linux/tcp.h.

TCP_REPAIR = 19
TCP_REPAIR_QUEUE = 20
TCP_QUEUE_SEQ = 21
TCP_REPAIR_OPTIONS = 22
TCP_TIMESTAMP = 24
TCP_REPAIR_WINDOW = 29
REPAIR_ON = 1
REPAIR_OFF_NO_WINDOW_PROBE = -1
RECV_QUEUE = 1
SEND_QUEUE = 2

SO_ATTACH_FILTER = 26
IP_MTU = 14
IPV6_MTU = 24

MSS_OPTION, WINDOW_SCALE_OPTION, SACK_OPTION, TIMESTAMP_OPTION = 2, 3, 4, 8

WINDOW = 64240
WINDOW_SCALE = 10
"""A window of up to 64 MiB, more than the kernel's default limit on receive buffers (net.ipv4.tcp_rmem)."""
GIVE_UP_AFTER = 15.0
"""Seconds without an answer, if the caller set no timeout: when the fifth SYN would be due."""
_SHORTEST_WAIT = 0.001
"""Seconds. 0 would mean not to wait at all, and another error."""


def _connect_by_hand(family: int, resolved: Address, option: bytes, timeout: float | None) -> socket.socket:
    """A connected socket whose SYN carried `option` (TCP option bytes, a multiple of 4).

    A placeholder socket, "established" in repair mode without a packet, owns the connection's addresses and ports
    meanwhile: without it the kernel would answer the SYN-ACK, which belongs to no socket, with a reset. A filter that
    takes nothing keeps it from answering anything itself.
    """
    with contextlib.ExitStack() as opened:
        source, mtu = route(family, resolved)
        try:
            placeholder = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            placeholder.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)
            raw = opened.enter_context(socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP))
        except PermissionError:
            raise NotPermittedError(
                "Putting a port extension into the TCP header needs CAP_NET_RAW and CAP_NET_ADMIN, which this process"
                " does not have. Ways out: run it as root or with both capabilities; use via='ip', which needs only"
                " CAP_NET_RAW; or use a service that is steered by what is sent first (TLS server name, HTTP host)."
            ) from None
        _attach_filter(placeholder, [_bpf(0x06, 0)])
        placeholder.bind(source)
        # Only from here on: set before bind, the kernel might have picked a port that others share.
        placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        local: Address = placeholder.getsockname()
        placeholder.connect(resolved)

        remote: Address = placeholder.getpeername()
        _attach_filter(raw, _only_these_ports(family, remote[1], local[1]))
        raw.bind(without_port(local))
        raw.connect(without_port(remote))
        handshake = _Handshake(family, local, remote, mtu, raw)
        answer = handshake.run(option, GIVE_UP_AFTER if timeout is None else timeout)
        try:
            sock = _adopt(family, handshake, answer, placeholder)
        except BaseException:
            raw.send(handshake.segment(handshake.isn + 1, 0, RST))
            raise
        with _closed_on_failure(sock):
            # By hand, since it must return the server's timestamp, which a repaired socket does not know: a SYN cookie
            # keeps window scale and SACK in it.
            raw.send(handshake.acknowledgement(answer))
            sock.settimeout(timeout)
        return sock


class _Handshake:
    """One SYN, sent until it is answered, and how to write the segments of its connection."""

    def __init__(self, family: int, local: Address, remote: Address, mtu: int, raw: socket.socket) -> None:
        self.family = family
        self.local = local
        self.remote = remote
        self.raw = raw
        self.mss = mtu - (40 if family == socket.AF_INET else 60)
        self.isn = int.from_bytes(os.urandom(4), "big")
        self.first_tsval = int.from_bytes(os.urandom(4), "big")
        self.started = time.monotonic()
        self.peer_window = 0
        """The window of the latest segment that `run` has read; a SYN-ACK's is never scaled."""
        self._source = socket.inet_pton(family, local[0].partition("%")[0])
        self._destination = socket.inet_pton(family, remote[0].partition("%")[0])

    def tsval(self) -> int:
        """Our timestamp now: milliseconds (RFC 7323) from a random start."""
        return self.first_tsval + int((time.monotonic() - self.started) * 1000) & 0xFFFFFFFF

    def run(self, option: bytes, timeout: float) -> Packet:
        """Send the SYN with `option`, again after 1 s, and after twice as long each time (RFC 6298 section 5.5), until
        its SYN-ACK comes, which is returned."""
        due, pause = 0.0, 1.0
        while True:
            elapsed = time.monotonic() - self.started
            if due and elapsed >= timeout:
                raise TimeoutError(errno.ETIMEDOUT, f"{self.remote[0]} port {self.remote[1]} did not answer the SYN")
            if elapsed >= due:
                due, pause = due + pause, 2 * pause
                offered = struct.pack("!BBHBBBBIIBBBB", 2, 4, self.mss, 4, 2, 8, 10, self.tsval(), 0, 1, 3, 3,
                                      WINDOW_SCALE)  # fmt: skip
                self.raw.send(self.segment(self.isn, 0, SYN, offered + option))
            self.raw.settimeout(max(min(timeout, due) - elapsed, _SHORTEST_WAIT))
            with contextlib.suppress(TimeoutError):
                answer = self._read(self.raw.recv(65535))
                if answer is None or answer.ack != (self.isn + 1) & 0xFFFFFFFF:
                    continue
                if answer.flags & RST:
                    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
                if answer.flags & SYN:
                    return answer

    def _read(self, data: bytes) -> Packet | None:
        """A segment with an acknowledgement from the peer's port to ours, else None. `data` is what a raw socket gives:
        with the IP header for IPv4, without it for IPv6."""
        if self.family == socket.AF_INET6:
            addresses = self._destination + self._source
            data = struct.pack("!IHBB", 6 << 28, len(data), TCP, 64) + addresses + data
        read = packet.parse(data)
        if read is None or (read.sport, read.dport) != (self.remote[1], self.local[1]) or not read.flags & ACK:
            return None
        start = (data[0] & 15) * 4 if read.version == 4 else 40
        (self.peer_window,) = struct.unpack_from("!H", data, start + 14)
        return read

    def acknowledgement(self, answer: Packet) -> bytes:
        """The segment that answers a SYN-ACK, with timestamps and a scaled window if the server agreed to them."""
        theirs = _tcp_options(answer.tcp_options)
        echoed = theirs.get(TIMESTAMP_OPTION, b"")
        options = b"\x01\x01\x08\x0a" + struct.pack("!I", self.tsval()) + echoed[:4] if len(echoed) == 8 else b""
        window = WINDOW >> WINDOW_SCALE if WINDOW_SCALE_OPTION in theirs else WINDOW
        return self.segment(self.isn + 1, answer.seq + 1, ACK, options, window)

    def segment(self, seq: int, ack: int, flags: int, options: bytes = b"", window: int = WINDOW) -> bytes:
        """A TCP segment without payload, its checksum included (RFC 9293 section 3.1); sequence numbers wrap."""
        header = struct.pack(
            "!HHIIBBHHH", self.local[1], self.remote[1], seq & 0xFFFFFFFF, ack & 0xFFFFFFFF,
            (20 + len(options)) // 4 << 4, flags, window, 0, 0,
        ) + options  # fmt: skip
        # The pseudo-header's sum is the same for both families: zeroes and the order of its fields do not matter.
        summed = self._source + self._destination + struct.pack("!HH", TCP, len(header)) + header
        total = sum(struct.unpack(f"!{len(summed) // 2}H", summed))
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        return header[:16] + struct.pack("!H", ~total & 0xFFFF) + header[18:]


def _adopt(family: int, handshake: _Handshake, answer: Packet, placeholder: socket.socket) -> socket.socket:
    """A kernel socket in the state that the handshake has reached on the other side. Closes the placeholder."""
    theirs = _tcp_options(answer.tcp_options)
    scale = theirs.get(WINDOW_SCALE_OPTION)
    peer_mss = int.from_bytes(theirs.get(MSS_OPTION, b"\x02\x18"), "big")  # 536 if unsaid: RFC 9293 section 3.7.1
    # Without this option the kernel would scale its window by a number of its own: no scaling is said as 0 and 0.
    scales = min(scale[0], 14) | WINDOW_SCALE << 16 if scale else 0
    agreed = [(MSS_OPTION, min(peer_mss, handshake.mss)), (WINDOW_SCALE_OPTION, scales)]
    if SACK_OPTION in theirs:
        agreed.append((SACK_OPTION, 0))
    if TIMESTAMP_OPTION in theirs:
        agreed.append((TIMESTAMP_OPTION, 0))
    next_expected = answer.seq + 1 & 0xFFFFFFFF

    sock = socket.socket(family, socket.SOCK_STREAM)
    with _closed_on_failure(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)
        sock.bind(handshake.local)
        for queue, sequence in ((SEND_QUEUE, handshake.isn + 1 & 0xFFFFFFFF), (RECV_QUEUE, next_expected)):
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
            sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack("=I", sequence))
        # Two sockets cannot own one connection. Both calls are silent, and nothing is due from the server in between.
        placeholder.close()
        sock.connect(handshake.remote)
        options = b"".join(struct.pack("=II", *option) for option in agreed)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, options)
        state = struct.pack("=IIIII", answer.seq, handshake.peer_window, handshake.peer_window, WINDOW, next_expected)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, state)
        # Since Linux 6.7 the lowest bit asks for microseconds; 2 more keeps it from running backwards.
        sock.setsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, struct.pack("=I", (handshake.tsval() + 2) & 0xFFFFFFFE))
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WINDOW_PROBE)
    return sock


def route(family: int, resolved: Address) -> tuple[Address, int]:
    """(our address with port 0, MTU) for packets to an address, by the kernel's own choice; sends nothing."""
    level, name = (socket.IPPROTO_IP, IP_MTU) if family == socket.AF_INET else (socket.IPPROTO_IPV6, IPV6_MTU)
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.connect(resolved)
        return without_port(asking.getsockname()), asking.getsockopt(level, name)


def without_port(address: Address) -> Address:
    return (address[0], 0, *address[2:])


def _tcp_options(area: bytes) -> dict[int, bytes]:
    """The options of a TCP header by kind, without kind and length; reading ends at one that points outside."""
    options = {}
    at = 0
    while at < len(area) and area[at] != 0:
        if area[at] == 1:
            at += 1
            continue
        if at + 1 >= len(area) or area[at + 1] < 2 or at + area[at + 1] > len(area):
            break
        options[area[at]] = area[at + 2 : at + area[at + 1]]
        at += area[at + 1]
    return options


# Classic BPF (Documentation/networking/filter.rst)


def _bpf(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction: struct sock_filter of include/uapi/linux/filter.h."""
    return struct.pack("=HBBI", code, if_true, if_false, k)


def _only_these_ports(family: int, sport: int, dport: int) -> list[bytes]:
    """Takes what a raw socket sees of one pair of ports. IPv4 raw sockets see the IP header, IPv6 ones do not."""
    ipv4 = family == socket.AF_INET
    return [
        _bpf(0xB1, 0) if ipv4 else _bpf(0x01, 0),  # x = length of the IP header
        _bpf(0x48, 0),  # a = 16 bits at x
        _bpf(0x15, sport, 0, 3),
        _bpf(0x48, 2),
        _bpf(0x15, dport, 0, 1),
        _bpf(0x06, 0xFFFF),
        _bpf(0x06, 0),
    ]


def _attach_filter(sock: socket.socket, program: list[bytes]) -> None:
    instructions = ctypes.create_string_buffer(b"".join(program))
    # struct sock_fprog: a length of 16 bits, padding, a pointer
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(instructions))
    )
