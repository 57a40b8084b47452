"""What listens, asked of the kernel: one namespace with sockets of every kind of binding in it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

from steerd.kernel.listeners import all_listeners, wildcard_ports
from steerd.model import TCP, UDP
from tests.netns.lab import Host


def bound(family: int, kind: int, address: str, port: int, only6: bool = False) -> socket.socket:
    made = socket.socket(family, kind)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only6)
    made.bind((address, port))
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


@pytest.fixture
def sockets(new_host: Callable[[str], Host]) -> Iterator[list[socket.socket]]:
    host = new_host("listeners")
    with host.entered(), contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(bound(*what))
            for what in (
                (socket.AF_INET, socket.SOCK_STREAM, "0.0.0.0", 1001),
                (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.2", 1002),
                (socket.AF_INET6, socket.SOCK_STREAM, "::", 1003),
                (socket.AF_INET6, socket.SOCK_STREAM, "::", 1004, True),
                (socket.AF_INET6, socket.SOCK_STREAM, "::1", 1005),
                (socket.AF_INET6, socket.SOCK_STREAM, "::ffff:0.0.0.0", 1006),
                (socket.AF_INET6, socket.SOCK_STREAM, "::ffff:127.0.0.7", 1007),
                (socket.AF_INET, socket.SOCK_DGRAM, "0.0.0.0", 1008),
                (socket.AF_INET6, socket.SOCK_DGRAM, "::", 1009),
                (socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.2", 1010),
            )
        ]


@pytest.mark.usefixtures("sockets")
def test_wildcard_ports_are_told_from_others() -> None:
    assert wildcard_ports(TCP) == {(4, 1001), (6, 1003), (4, 1003), (6, 1004), (4, 1006)}
    assert wildcard_ports(UDP) == {(4, 1008), (4, 1009), (6, 1009)}


@pytest.mark.usefixtures("sockets")
def test_all_listeners() -> None:
    any4, any6, one6 = bytes(4), bytes(16), socket.inet_pton(socket.AF_INET6, "::1")
    assert all_listeners(TCP) == {
        (any4, 1001),
        (bytes([127, 0, 0, 2]), 1002),
        (any6, 1003),
        (any4, 1003),
        (any6, 1004),
        (one6, 1005),
        (any4, 1006),
        (bytes([127, 0, 0, 7]), 1007),
    }
    assert all_listeners(UDP) == {(any4, 1008), (any6, 1009), (any4, 1009), (bytes([127, 0, 0, 2]), 1010)}


def test_an_established_connection_is_no_listener(sockets: list[socket.socket]) -> None:
    """The accepted side has the listener's port and must not count once the listener is gone."""
    listener = sockets[1]
    with socket.create_connection(("127.0.0.2", 1002), 5), listener.accept()[0]:
        listener.close()
        assert (bytes([127, 0, 0, 2]), 1002) not in all_listeners(TCP)


def test_nothing_listens(new_host: Callable[[str], Host]) -> None:
    with new_host("quiet").entered():
        assert wildcard_ports(TCP) == wildcard_ports(UDP) == set()
        assert all_listeners(TCP) == all_listeners(UDP) == set()


def test_five_thousand_listeners(new_host: Callable[[str], Host]) -> None:
    """Many answers span many buffers: none may be lost, and none of them passes the filter for wildcards."""
    with new_host("many").entered(), contextlib.ExitStack() as stack:
        want = {(bytes([127, 1, number >> 8, number & 255]), 7000) for number in range(5000)}
        for address, port in want:
            stack.enter_context(bound(socket.AF_INET, socket.SOCK_STREAM, socket.inet_ntoa(address), port))
        assert all_listeners(TCP) == want
        assert wildcard_ports(TCP) == set()
