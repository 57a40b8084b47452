"""steerd.client against a plain server: what the SYN carries, and that the connection is an ordinary one afterwards.

    client                          server (no steerd: Linux ignores options that it does not know)
    c0 10.9.0.1/24, fd00:9::1/64 -- s0 10.9.0.2/24, fd00:9::2/64   echo on port 4464

Everything that arrives at s0 is seen by an AF_PACKET socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from steerd import client
from steerd.client import Via
from steerd.model import Extension
from steerd.wire import packet, portext
from steerd.wire.packet import Packet
from steerd.wire.portext import Numbers
from tests.netns.lab import Host, link

ETH_P_ALL = 3
PORT = 4464
EXTENDED = 65536 + PORT
MEBIBYTE = 1 << 20

both_families = pytest.mark.parametrize("host", ["10.9.0.2", "fd00:9::2"])
both_ways = pytest.mark.parametrize("via", ["ip", "tcp"])


class Lab(NamedTuple):
    client: Host
    server: Host
    sniffer: socket.socket

    def arrived(self) -> list[Packet]:
        """TCP segments that have reached the server's interface from the client since the last call."""
        seen = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, source = self.sniffer.recvfrom(65535)
                read = packet.parse(data)
                if source[2] != socket.PACKET_OUTGOING and read is not None:
                    seen.append(read)
        return seen


def echo(listener: socket.socket) -> None:
    """Serve until the listener is closed."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                connection.sendall(data)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Lab]:
    near, far = new_host("client"), new_host("server")
    for host in (near, far):
        # Otherwise link-local addresses are tentative for a second or two, and neighbours are not found meanwhile.
        host.sh("sysctl -q -w net.ipv6.conf.default.accept_dad=0")
    link(near, "c0", far, "s0")
    for host, interface, number in ((near, "c0", 1), (far, "s0", 2)):
        host.sh(f"ip addr add 10.9.0.{number}/24 dev {interface}")
        host.sh(f"ip addr add fd00:9::{number}/64 dev {interface} nodad")
    with far.entered():
        listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    serving = threading.Thread(target=echo, args=(listener,), daemon=True)
    serving.start()
    with listener, sniffer:
        sniffer.bind(("s0", ETH_P_ALL))
        sniffer.setblocking(False)
        yield Lab(near, far, sniffer)
        listener.shutdown(socket.SHUT_RDWR)
        serving.join(timeout=10)


def exchange(connected: socket.socket, size: int) -> None:
    """Send `size` bytes to the echo server, both directions at once, and check what comes back; then an orderly end."""
    data = os.urandom(size)
    sending = threading.Thread(target=connected.sendall, args=(data,))
    sending.start()
    received = bytearray()
    while len(received) < size and (more := connected.recv(65536)):
        received += more
    sending.join()
    assert bytes(received) == data
    connected.shutdown(socket.SHUT_WR)
    assert connected.recv(1) == b""


@both_families
@both_ways
def test_the_syn_carries_the_extension_and_data_passes(lab: Lab, host: str, via: Via) -> None:
    with lab.client.entered():
        connected = client.connect((host, EXTENDED), source_extension=9, timeout=15, via=via)
    with connected:
        assert connected.getpeername()[:2] == (host, PORT)
        local_port = connected.getsockname()[1]
        syn, *others = lab.arrived()
        exchange(connected, MEBIBYTE)
    assert (syn.flags, syn.sport, syn.dport) == (packet.SYN, local_port, PORT)
    assert portext.find(syn, Numbers()) == Extension(1, 9)
    assert bool(syn.tcp_options.count(b"\xfd\x08ST")) == (via == "tcp")
    others += lab.arrived()
    assert others[0].flags == packet.ACK, "the handshake is complete without a reset"
    assert not any(segment.flags & (packet.SYN | packet.RST) for segment in others)
    carrying = [segment for segment in others if segment.payload]
    assert carrying != []
    assert not any(segment.ip_options or segment.dst_options for segment in carrying), "the option is taken off again"
    assert {portext.find(segment, Numbers()) for segment in carrying} == {None}


@both_ways
def test_other_option_numbers(lab: Lab, via: Via) -> None:
    numbers = Numbers(ipv4_option=0xDE, tcp_option=254, exid=0xABCD)
    with lab.client.entered():
        client.connect(("10.9.0.2", PORT), extension=77, timeout=15, via=via, numbers=numbers).close()
    syn = lab.arrived()[0]
    assert portext.find(syn, numbers) == Extension(77, 0)
    assert portext.find(syn, Numbers()) is None


@both_families
def test_without_an_extension_the_syn_is_an_ordinary_one(lab: Lab, host: str) -> None:
    with lab.client.entered(), client.connect((host, PORT), timeout=15, via="tcp") as connected:
        exchange(connected, 1000)
    syn = lab.arrived()[0]
    assert (syn.ip_options, syn.dst_options) == (b"", b"")
    assert portext.find(syn, Numbers()) is None


@both_families
@both_ways
def test_asyncio(lab: Lab, host: str, via: Via) -> None:
    async def converse() -> bytes:
        reader, writer = await client.open_connection(host, EXTENDED, timeout=15, via=via)
        writer.write(b"hello")
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    with lab.client.entered():
        assert asyncio.run(converse()) == b"hello"
    assert portext.find(lab.arrived()[0], Numbers()) == Extension(1, 0)


@both_families
@both_ways
def test_refused(lab: Lab, host: str, via: Via) -> None:
    with lab.client.entered(), pytest.raises(ConnectionRefusedError):
        client.connect((host, EXTENDED + 1), timeout=15, via=via)


@pytest.mark.parametrize(
    "sysctl",
    [
        "net.ipv4.tcp_window_scaling=0",
        "net.ipv4.tcp_sack=0",
        "net.ipv4.tcp_timestamps=0",
        "net.ipv4.tcp_window_scaling=0 net.ipv4.tcp_sack=0 net.ipv4.tcp_timestamps=0",
        "net.ipv4.tcp_syncookies=2",
    ],
)
@both_families
def test_by_hand_with_servers_that_agree_to_less(lab: Lab, host: str, sysctl: str) -> None:
    lab.server.sh(f"sysctl -q -w {sysctl}")
    with lab.client.entered(), client.connect((host, EXTENDED), timeout=15, via="tcp") as connected:
        exchange(connected, MEBIBYTE)
    assert not any(segment.flags & packet.RST for segment in lab.arrived())


def test_by_hand_where_the_server_speaks_first(lab: Lab) -> None:
    with lab.server.entered():
        listener = socket.create_server(("10.9.0.2", 2200))
    with listener, lab.client.entered(), client.connect(("10.9.0.2", 65536 + 2200), timeout=15, via="tcp") as connected:
        accepted, peer = listener.accept()
        with accepted:
            assert peer == connected.getsockname()
            accepted.sendall(b"220 ready\r\n")
            assert connected.recv(100) == b"220 ready\r\n"


def test_by_hand_a_lost_syn_is_sent_again(lab: Lab) -> None:
    lab.server.sh("nft 'add table inet t; add chain inet t c { type filter hook prerouting priority -300; }'")
    # The first one, and no other: the next drop is due in an hour.
    lab.server.sh("nft 'add rule inet t c tcp flags & syn == syn limit rate 1/hour burst 1 packets drop'")
    started = time.monotonic()
    with lab.client.entered(), client.connect(("10.9.0.2", EXTENDED), timeout=15, via="tcp") as connected:
        assert time.monotonic() - started > 0.9
        exchange(connected, 1000)
    syns = [segment for segment in lab.arrived() if segment.flags == packet.SYN]
    assert len(syns) >= 2
    assert len({syn.seq for syn in syns}) == 1
    assert {portext.find(syn, Numbers()) for syn in syns} == {Extension(1, 0)}


@both_families
def test_by_hand_nothing_is_left_behind_when_nobody_answers(lab: Lab, host: str) -> None:
    lab.server.sh("nft 'add table inet t; add chain inet t c { type filter hook prerouting priority -300; }'")
    lab.server.sh("nft 'add rule inet t c tcp dport 4464 drop'")
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with lab.client.entered(), pytest.raises(TimeoutError, match="did not answer the SYN"):
        client.connect((host, EXTENDED), timeout=0.4, via="tcp")
    assert [segment.flags for segment in lab.arrived()] == [packet.SYN], "it gives up before it would repeat itself"
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    assert lab.client.sh("ss -Htan; ss -Hanw").strip() == ""


@both_families
@pytest.mark.parametrize(
    ("via", "named"), [("auto", "needs CAP_NET_RAW, which"), ("tcp", "needs CAP_NET_RAW and CAP_NET_ADMIN, which")]
)
def test_without_the_capability_the_error_names_the_ways_out(lab: Lab, host: str, via: str, named: str) -> None:
    program = (
        "from steerd import client\n"
        f"client.connect(('{host}', {PORT}), timeout=15).close()\n"
        "try:\n"
        f"    client.connect(('{host}', {EXTENDED}), timeout=15, via='{via}')\n"
        "except PermissionError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parent.parent.parent
    said = lab.client.sh(
        f'cd {root}; setpriv --bounding-set=-net_raw,-net_admin {sys.executable} -W error -c "{program}"'
    )
    assert named in said
    assert "Ways out: " in said
    assert portext.find(lab.arrived()[0], Numbers()) is None


def test_numbers_out_of_range_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="already says extension 1; give either"):
        client.connect(("localhost", EXTENDED), extension=1)
    with pytest.raises(ValueError, match="source_extension must be between 0 and 65535, not 65536"):
        client.connect(("localhost", PORT), source_extension=65536)
    with pytest.raises(ValueError, match="extension must be between 0 and 65535, not -1"):
        client.connect(("localhost", PORT), extension=-1)
    with pytest.raises(ValueError, match="port 0 is never used"):
        client.connect(("localhost", 65536))
