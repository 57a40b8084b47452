"""What listens, asked of the kernel: one namespace with sockets of every kind of binding in it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterator

import pytest

from steerd.kernel.listeners import Listener, all_listeners, which_listen, wildcard_ports
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
        for protocol in (TCP, UDP):
            assert which_listen(protocol, [Listener(bytes(4), 1, True), Listener(bytes(16), 1, True)]) == [False] * 2
            assert which_listen(protocol, []) == []


LISTENING: list[tuple[int, str, int, str]] = [
    # protocol, address, port -> by a socket of its own; by that or a wildcard one; by none
    (TCP, "127.0.0.2", 1001, "wildcard"),
    (TCP, "::1", 1001, "none"),
    (TCP, "127.0.0.2", 1002, "own"),
    (TCP, "127.0.0.3", 1002, "none"),
    (TCP, "127.0.0.2", 1003, "wildcard"),
    (TCP, "::1", 1003, "wildcard"),
    (TCP, "127.0.0.2", 1004, "none"),
    (TCP, "::1", 1004, "wildcard"),
    (TCP, "::1", 1005, "own"),
    (TCP, "127.0.0.2", 1006, "wildcard"),
    (TCP, "127.0.0.7", 1007, "own"),
    (TCP, "127.0.0.2", 1008, "none"),
    (UDP, "127.0.0.2", 1008, "wildcard"),
    (UDP, "::1", 1008, "none"),
    (UDP, "127.0.0.2", 1009, "wildcard"),
    (UDP, "::1", 1009, "wildcard"),
    (UDP, "127.0.0.2", 1010, "own"),
    (UDP, "127.0.0.3", 1010, "none"),
    (UDP, "127.0.0.2", 1002, "none"),
]


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_what_listens_on_one_address_and_port(protocol: int) -> None:
    asked = [(ipaddress.ip_address(address).packed, port, by) for p, address, port, by in LISTENING if p == protocol]
    many = asked * 30  # more than are asked for at once
    own = which_listen(protocol, [Listener(address, port, False) for address, port, _ in many])
    assert own == [by == "own" for *_, by in many]
    any_ = which_listen(protocol, [Listener(address, port, True) for address, port, _ in many])
    assert any_ == [by != "none" for *_, by in many]


def test_a_socket_that_is_gone_and_the_connections_that_it_took(sockets: list[socket.socket]) -> None:
    wanted = [Listener(bytes([127, 0, 0, 2]), 1002, False)]
    with socket.create_connection(("127.0.0.2", 1002), 5), sockets[1].accept()[0]:
        assert which_listen(TCP, wanted) == [True]
        sockets[1].close()
        assert which_listen(TCP, wanted) == [False]
    with bound(socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.3", 1011) as datagrams:
        wanted = [Listener(bytes([127, 0, 0, 3]), 1011, False)]
        assert which_listen(UDP, wanted) == [True]
        datagrams.connect(("127.0.0.2", 1010))
        assert which_listen(UDP, wanted) == [False], "it takes nothing from strangers"


def test_five_thousand_listeners(new_host: Callable[[str], Host]) -> None:
    """Many answers span many buffers: none may be lost, and none of them passes the filter for wildcards."""
    with new_host("many").entered(), contextlib.ExitStack() as stack:
        want = {(bytes([127, 1, number >> 8, number & 255]), 7000) for number in range(5000)}
        for address, port in want:
            stack.enter_context(bound(socket.AF_INET, socket.SOCK_STREAM, socket.inet_ntoa(address), port))
        assert all_listeners(TCP) == want
        assert wildcard_ports(TCP) == set()
