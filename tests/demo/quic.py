"""The demo's third act, QUIC: many HTTP/3 servers in one process, each on its own alias, and the client that asks them.

    python -m tests.demo.quic daemons CERTIFICATE FIRST-ALIAS COUNT PORT
    python -m tests.demo.quic client CERTIFICATE ADDRESS PORT NAME ...

CERTIFICATE is a PEM file that holds the key too. Once all daemons are there, "listening N" is printed. The body of
every answer is `ALIAS PORT CLIENT-ADDRESS NAME`: the address and port that this very daemon was bound to, the client as
seen from here, and the name that was asked for. The client makes one connection for each name, a few at a time, checks
the certificate, and prints one line for each answer, `NAME BODY`; who does not answer is named on standard error.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import sys
from collections.abc import Callable
from typing import Any

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent

_AT_A_TIME = 4
_FIRST_PORT = 20000
_PATIENCE = float(os.environ.get("STEERD_PATIENCE", "15"))
"""Seconds; machines that are emulated need more."""


class _Daemon(QuicConnectionProtocol):
    """One connection of a daemon; `bound` is set by who makes it."""

    bound: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self._http = H3Connection(self._quic)
        for received in self._http.handle_event(event) if self._http else []:
            if isinstance(received, HeadersReceived):
                name = dict(received.headers)[b":authority"].decode()
                client = self._quic._network_paths[0].addr[0]
                assert self._http is not None
                self._http.send_headers(received.stream_id, [(b":status", b"200")])
                self._http.send_data(received.stream_id, f"{self.bound} {client} {name}".encode(), end_stream=True)
                self.transmit()


class _Client(QuicConnectionProtocol):
    """One connection of the client's, for one request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._http = H3Connection(self._quic)
        self._body = b""
        self._answered = asyncio.get_running_loop().create_future()

    async def get(self, name: str) -> str:
        headers = {":method": "GET", ":scheme": "https", ":authority": name, ":path": "/"}
        pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
        self._http.send_headers(self._quic.get_next_available_stream_id(), pairs, end_stream=True)
        self.transmit()
        await asyncio.wait_for(self._answered, _PATIENCE)
        return self._body.decode()

    def quic_event_received(self, event: QuicEvent) -> None:
        for received in self._http.handle_event(event):
            if isinstance(received, DataReceived):
                self._body += received.data
                if received.stream_ended and not self._answered.done():
                    self._answered.set_result(None)


def _of(bound: str) -> Callable[..., QuicConnectionProtocol]:
    return type("Daemon", (_Daemon,), {"bound": bound})


async def daemons(certificate: str, first: str, count: str, port: str) -> None:
    """Serve for ever."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(certificate, certificate)
    for index in range(int(count)):
        alias = str(ipaddress.ip_address(first) + index)
        await serve(alias, int(port), configuration=configuration, create_protocol=_of(f"{alias} {port}"))
    print("listening", count, flush=True)
    await asyncio.Event().wait()


async def client(certificate: str, address: str, port: str, *names: str) -> None:
    """Ask every name once."""
    with open(certificate, "rb") as file:
        trusted = file.read().partition(b"-----BEGIN PRIVATE KEY-----")[0]
    # No port twice: to conntrack that would be the old flow, which has its daemon already.
    waiting = enumerate(names, _FIRST_PORT)

    async def ask_one_after_the_other() -> None:
        for local_port, name in waiting:
            configuration = QuicConfiguration(alpn_protocols=H3_ALPN, server_name=name, cadata=trusted)
            configuration.idle_timeout = _PATIENCE
            try:
                async with connect(
                    address, int(port), configuration=configuration, create_protocol=_Client, local_port=local_port
                ) as one:
                    assert isinstance(one, _Client)
                    print(name, await one.get(name), flush=True)
            except (ConnectionError, TimeoutError) as error:
                print(f"{name}: {error!r}", file=sys.stderr)

    await asyncio.gather(*(ask_one_after_the_other() for _ in range(_AT_A_TIME)))


if __name__ == "__main__":
    asyncio.run(daemons(*sys.argv[2:]) if sys.argv[1] == "daemons" else client(*sys.argv[2:]))
