"""An HTTP/3 server for tests (aioquic), on one or more addresses.

    python -m tests.netns.quic_server NAME CERTIFICATE [--retry] [--server-id CONFIG SERVER-ID [KEY]] SOCKET ...

CERTIFICATE holds a key, too; SOCKET is `address:port`, or `[address]:port`. With --server-id, connection ids are
QUIC-LB's (steerd.wire.quic_lb): configuration CONFIG, the server id in hexadecimal, a nonce of 4 bytes, and perhaps a
key in hexadecimal. 0-RTT is taken with the server's own session tickets.

    GET /           NAME ADDRESS PORT CLIENT-ADDRESS CLIENT-PORT
    GET /bytes/N    N bytes (`content`)
    POST /digest    the SHA-256 of what was sent, in hexadecimal
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aioquic.quic.connection
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent
from aioquic.tls import SessionTicket

from steerd.wire import quic_lb

NONCE_LENGTH = 4


def content(size: int) -> bytes:
    """What `GET /bytes/SIZE` returns."""
    return hashlib.shake_128(b"steerd").digest(size)


class _Request:
    def __init__(self, method: str, path: str) -> None:
        self.method = method
        self.path = path
        self.digest = hashlib.sha256()


class _Http3(QuicConnectionProtocol):
    """One connection. `name`, `address`, `port` are set by who makes it."""

    name: str
    address: str
    port: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._http: H3Connection | None = None
        self._requests: dict[int, _Request] = {}

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self._http = H3Connection(self._quic)
        for received in self._http.handle_event(event) if self._http else []:
            if isinstance(received, HeadersReceived):
                headers = dict(received.headers)
                request = _Request(headers[b":method"].decode(), headers[b":path"].decode())
                self._requests[received.stream_id] = request
            elif isinstance(received, DataReceived):
                self._requests[received.stream_id].digest.update(received.data)
            else:
                continue
            if received.stream_ended:
                self._answer(received.stream_id, self._requests.pop(received.stream_id))

    def _answer(self, stream: int, request: _Request) -> None:
        assert self._http is not None
        if request.path.startswith("/bytes/"):
            body = content(int(request.path[len("/bytes/") :]))
        elif request.method == "POST":
            body = request.digest.hexdigest().encode()
        else:
            # Where the client is now: the network path in use, which migration changes.
            client = self._quic._network_paths[0].addr
            body = f"{self.name} {self.address} {self.port} {client[0]} {client[1]}".encode()
        self._http.send_headers(stream, [(b":status", b"200"), (b"content-length", b"%d" % len(body))])
        self._http.send_data(stream, body, end_stream=True)
        self.transmit()


def _put_server_id(config: quic_lb.Config, server_id: bytes) -> None:
    """aioquic makes its connection ids with os.urandom; no other thing that it makes so has this length."""
    length = 1 + config.server_id_length + config.nonce_length

    def urandom(size: int) -> bytes:
        if size != length:
            return os.urandom(size)
        return quic_lb.encode(config, server_id, os.urandom(config.nonce_length))

    # A module's own name, which is not exported.
    vars(aioquic.quic.connection)["os"] = SimpleNamespace(urandom=urandom)


def _protocol(name: str, address: str, port: int) -> Callable[..., QuicConnectionProtocol]:
    return type("Http3", (_Http3,), {"name": name, "address": address, "port": port})


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("certificate")
    parser.add_argument("sockets", nargs="+")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--server-id", nargs="+", default=[])
    arguments = parser.parse_args()
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(arguments.certificate, arguments.certificate)
    if arguments.server_id:
        number, hexadecimal, *key = arguments.server_id
        server_id = bytes.fromhex(hexadecimal)
        lengths = len(server_id), NONCE_LENGTH
        _put_server_id(quic_lb.Config(int(number), *lengths, bytes.fromhex(key[0]) if key else None), server_id)
        configuration.connection_id_length = 1 + sum(lengths)
    tickets: dict[bytes, SessionTicket] = {}
    for socket in arguments.sockets:
        address, _, port = socket.rpartition(":")
        address = address.strip("[]")
        await serve(
            address,
            int(port),
            configuration=configuration,
            create_protocol=_protocol(arguments.name, address, int(port)),
            session_ticket_fetcher=tickets.get,
            session_ticket_handler=lambda ticket: tickets.update({ticket.ticket: ticket}),
            retry=arguments.retry,
        )
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
