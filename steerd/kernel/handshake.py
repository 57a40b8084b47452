"""What the kernel will say in handshakes on this machine: measured, since synproxy must say the same in its place.

synproxy answers a client before any daemon is chosen. A window scale other than the daemon's own would have every
window misread from then on, and a segment size beyond the path's would be lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from typing import NamedTuple

from steerd.core.plan import DEVICE_PREFIX
from steerd.errors import KernelError

_IPV4_HEADERS, _IPV6_HEADERS = 40, 60
_ETHERNET_MTU = 1500
_LEAST_MTU = {4: 576, 6: 1280}
_SIOCGIFFLAGS, _SIOCGIFMTU = 0x8913, 0x8921
_FLAGS, _MTU = struct.Struct("=H"), struct.Struct("=i")
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
# struct tcp_info, include/uapi/linux/tcp.h: the seventh byte holds tcpi_snd_wscale (low bits) and tcpi_rcv_wscale.
_WINDOW_SCALES = 6


class Handshake(NamedTuple):
    """What a SYN-ACK of this machine says."""

    mss4: int
    """Bytes of a segment, IPv4."""
    mss6: int
    window_scale: int
    """0 .. 14 (RFC 7323 section 2.3)."""


def measure() -> Handshake:
    """Measure in this network namespace; raises KernelError if it cannot connect to itself."""
    mtu = _smallest_mtu()
    return Handshake(max(mtu, _LEAST_MTU[4]) - _IPV4_HEADERS, max(mtu, _LEAST_MTU[6]) - _IPV6_HEADERS, _window_scale())


def _window_scale() -> int:
    """What a daemon with default buffers announces: it depends on tcp_rmem, rmem_max and tcp_window_scaling."""
    try:
        with (
            contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener,
            socket.create_connection(listener.getsockname(), timeout=2),
        ):
            accepted, _ = listener.accept()
            with accepted:
                return accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[_WINDOW_SCALES] >> 4
    except OSError as error:
        raise KernelError(
            f"the window scale cannot be measured by a connection on 127.0.0.1: {error.strerror or error} (is lo up?)"
        ) from error


def _smallest_mtu() -> int:
    """Of all interfaces that lead out of this machine: clients may come through any of them."""
    mtus = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it went away meanwhile
                flags = _ask(asked, _SIOCGIFFLAGS, name, _FLAGS)
                if flags & _IFF_UP and not flags & _IFF_LOOPBACK and not name.startswith(DEVICE_PREFIX):
                    mtus.append(_ask(asked, _SIOCGIFMTU, name, _MTU))
    return min(mtus, default=_ETHERNET_MTU)


def _ask(asked: socket.socket, request: int, name: str, field: struct.Struct) -> int:
    """One number of an interface: struct ifreq, include/uapi/linux/if.h."""
    answer = fcntl.ioctl(asked, request, struct.pack("16s24x", name.encode()))
    number: int = field.unpack_from(answer, 16)[0]
    return number
