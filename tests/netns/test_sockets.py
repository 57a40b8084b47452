"""Ending a connection from outside of its process: that one, and never the listening socket that the kernel finds for
the same addresses once the connection is gone."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from steerd.kernel import sockets
from steerd.model import Flow
from tests.netns.lab import Host


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_connection_is_ended_and_its_listener_goes_on(new_host: Callable[[str], Host], address: str) -> None:
    host = new_host("host")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered(), socket.create_server((address, 80), family=family) as listener:
        first, second = (socket.create_connection((address, 80), timeout=5) for _ in range(2))
        with first, second:
            accepted = [listener.accept()[0] for _ in range(2)]
            name = first.getsockname()
            flow = Flow(packed(name[0]), name[1], packed(address), 80)
            assert sockets.end(flow)
            with pytest.raises(ConnectionAbortedError):
                accepted[0].recv(1)
            with pytest.raises(ConnectionResetError):
                first.recv(1)
            assert not sockets.end(flow), "there is none any more, but a listening socket"
            second.sendall(b"x")
            assert accepted[1].recv(1) == b"x"
            for connection in accepted:
                connection.close()
        with socket.create_connection((address, 80), timeout=5):
            listener.accept()[0].close()
