"""A gateway that boots: until steerd is there again, what its clients send reaches nobody, and is not refused either.

A boot takes all from the kernel that steerd has put there, and leaves the files; and some daemon listens on the
wildcard address from the first moment on. Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import contextlib
import ipaddress
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator

import pytest

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.flood import packet, raw_socket
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, NUMBERS, ROOT, Gateway, gateway
from tests.netns.lab import Host

CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/28", "fd00:64::/124"]

[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp", "203.0.113.10:8000-8100/tcp"]
inspect = ["http"]
default = ["10.64.0.1:8080", "[fd00:64::1]:8080"]
[services.datagrams]
endpoints = ["203.0.113.10:443/udp", "[2001:db8::10]:443/udp"]
inspect = ["quic"]
default = ["10.64.0.1:443", "[fd00:64::1]:443"]
[services.names]
endpoints = ["203.0.113.10:53/udp"]
inspect = ["dns"]
default = "10.64.0.1:53"
"""
PASSING = """
[pools.tenants]
prefixes = ["10.64.0.0/28", "fd00:64::/124"]

[services.shared]
endpoints = ["203.0.113.10:22/tcp", "[2001:db8::10]:22/tcp"]
inspect = ["port-extension"]
unextended = "pass"
extension_pool = { pool = "tenants", by = "extension", port = 22 }
"""
STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
STEERED = [
    (ENDPOINT4, 80, STREAM), (ENDPOINT6, 80, STREAM), (ENDPOINT4, 8050, STREAM),
    (ENDPOINT4, 443, DATAGRAM), (ENDPOINT6, 443, DATAGRAM), (ENDPOINT4, 53, DATAGRAM),
]  # fmt: skip
OTHERS = [(ENDPOINT4, 8101, STREAM), (ENDPOINT6, 443, STREAM), (ENDPOINT4, 80, DATAGRAM)]


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def wildcards(lab: Gateway) -> Iterator[list[socket.socket]]:
    """Sockets on the wildcard address of the gateway, for every port that is used here."""
    with contextlib.ExitStack() as opened:
        made = []
        for address, port, kind in STEERED + OTHERS:
            with lab.host.entered():
                made.append(opened.enter_context(socket.socket(family(address), kind)))
            if made[-1].family == socket.AF_INET6:
                made[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made[-1].bind(("", port))
            if kind == STREAM:
                made[-1].listen()
        yield made


@contextlib.contextmanager
def clients(lab: Gateway) -> Iterator[list[socket.socket]]:
    """One to each of STEERED and OTHERS, which has sent its first packet."""
    with contextlib.ExitStack() as opened:
        made = []
        for address, port, kind in STEERED + OTHERS:
            with lab.client.entered():
                made.append(opened.enter_context(socket.socket(family(address), kind)))
            made[-1].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                made[-1].connect((address, port))
            if kind == DATAGRAM:
                made[-1].send(b"hello")
        yield made


@pytest.fixture
def booted(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    """A gateway that has served, and has lost what a boot takes."""
    with gateway(new_host) as lab:
        lab.configure(CONFIG)
        lab.start()
        lab.stop()
        lab.host.sh(
            "nft flush ruleset; for device in $(ip -br link | grep -o '^steer[0-9]*'); do ip link del $device; done"
        )
        yield lab


def test_until_it_is_there_again_nobody_gets_what_is_for_steerd(booted: Gateway) -> None:
    booted.host.sh(f"nft -f {booted.directory}/state/hold.nft")
    with wildcards(booted) as listening, clients(booted) as asking:
        for others in zip(listening, asking, strict=True):
            if others[0] in listening[len(STEERED) :]:
                assert select.select([others[0]], [], [], 30)[0], "what is not for steerd is let through"
        # All that was sent before those has been seen, too.
        assert select.select(listening[: len(STEERED)], asking[: len(STEERED)], [], 0)[0] == []
        assert [client for client in asking[:3] if select.select([], [client], [], 0)[1]] == [], "nobody is refused"
        booted.start()
        booted.respond(("10.64.0.1", 1, 8080), ("fd00:64::1", 1, 8080))
        assert "hold" not in booted.host.sh("nft list tables")
        for client in asking[:3]:  # their SYNs are sent again
            assert select.select([], [client], [], 30)[1]
            client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            assert select.select([client], [], [], 30)[0]
            assert b" 8080 " in client.recv(100)
        assert select.select(listening[: len(STEERED)], [], [], 0)[0] == []


@pytest.mark.parametrize("version", [4, 6])
def test_what_would_reach_the_gateways_own_socket_does_so_during_a_boot_too(
    new_host: Callable[[str], Host], version: int
) -> None:
    with gateway(new_host) as lab:
        lab.configure(PASSING)
        lab.start()
        lab.stop()
        endpoint = ENDPOINT4 if version == 4 else ENDPOINT6
        lab.respond((endpoint, 1, 22))
        lab.host.sh(f"nft flush ruleset; nft -f {lab.directory}/state/hold.nft")

        lab.host.sh(
            "nft 'table inet seen { chain arriving {"
            " type filter hook input priority 0; tcp dport 22 tcp flags syn tcp sport 2000-2009 counter; }; }'"
        )
        client = CLIENT4 if version == 4 else CLIENT6
        with lab.client.entered():
            raw, to = raw_socket(version)
        with raw, lab.socket(Extension(5, 0), version=version, source=(client, 2000)) as extended:
            extended.setblocking(False)
            with pytest.raises(BlockingIOError):
                extended.connect((endpoint, 22))
            for sport, option, data in (
                (2001, portext.encode_tcp(Extension(5, 0), NUMBERS), b""),
                (2002, b"", b"data"),
            ):
                tcp = struct.pack("!HHIIBBHHH", sport, 22, 1, 0, (5 + len(option) // 4) << 4, 2, 64240, 0, 0) + option
                source, destination = (ipaddress.ip_address(address).packed for address in (client, endpoint))
                raw.sendto(packet(source, destination, tcp, data), to)
            assert lab.ask(None, 22, version=version).startswith(f"{endpoint} 22 ")
        assert "packets 0 " in lab.host.sh("nft list chain inet seen arriving")
        lab.host.sh("nft delete table inet steerd_hold")
        with lab.socket(None, version=version, source=(client, 2003)) as plain:
            plain.connect((endpoint, 22))
        assert "packets 0 " not in lab.host.sh("nft list chain inet seen arriving"), "or nothing was looked at"


def test_there_is_no_alias_without_the_table_that_guards_it(booted: Gateway) -> None:
    booted.start_without_a_table()
    assert "steer" not in booted.host.sh("nft list tables; ip -br link")


def test_it_is_about_the_endpoints_in_force_and_goes_with_the_table(booted: Gateway) -> None:
    hold = booted.directory / "state" / "hold.nft"
    before = hold.read_text()
    booted.start()
    booted.configure(CONFIG.replace("8000-8100", "8000-8200"))
    assert booted.daemon is not None
    booted.daemon.send_signal(signal.SIGHUP)
    booted.wait(lambda: hold.read_text() == before.replace("8000-8100", "8000-8200"), "the file is of the endpoints")
    booted.stop()
    booted.host.sh(f"nft -f {hold}; nft list table inet steerd_hold")
    booted.host.sh(f"cd {ROOT}; {sys.executable} -m steerd down {booted.config}")
    assert "steerd" not in booted.host.sh("nft list tables")
    assert not hold.exists()


def test_loaded_while_it_runs_it_goes_at_once_and_that_is_said(booted: Gateway) -> None:
    booted.start()
    booted.respond(("10.64.0.1", 1, 8080), ("fd00:64::1", 1, 8080))
    hold = f"nft -f {booted.directory}/state/hold.nft"
    warning = "the table that holds clients back during a boot was loaded by somebody; it is removed"
    booted.expected_warnings = [warning]
    with contextlib.ExitStack() as opened:
        made = [opened.enter_context(booted.socket(None, version=version)) for version in (4, 6)]
        for client, address in zip(made, (ENDPOINT4, ENDPOINT6), strict=True):
            client.connect((address, 80))
            client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            assert b" 8080 " in client.recv(100)
        booted.host.sh(hold)
        booted.wait(lambda: "hold" not in booted.host.sh("nft list tables"), "it is gone")
        booted.wait(lambda: booted.count_events(warning) == 1, "that is said")
        for client in made:
            client.send(b"still there")
            data = b""
            while not data.endswith(b"still there"):
                data = client.recv(4096)
                assert data
