"""An HTTP/3 client for tests (aioquic), in this process, with its sockets in the client's namespace.

    async with connect(lab, 4, "a.example") as client:
        print(await client.get("/"))

It can do what browsers do and a test wants to see: change its address or port in mid-connection (`move`), send the
datagrams of its first flight in another order or in one piece (`Flight`), and fill its hello (`padding`).
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, H3Event
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import QuicEvent
from aioquic.tls import SessionTicket

from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, SLOWER, Gateway

CLIENT = {4: CLIENT4, 6: CLIENT6}
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
_SOL_UDP, _UDP_SEGMENT = 17, 103
_ALPN_LENGTH = 100


class Flight(enum.Enum):
    """How the client sends the datagrams that it has at one time."""

    IN_ORDER = "in order"
    REVERSED = "reversed"
    ONE_PIECE = "one piece"
    """One system call, one packet for the kernel, which cuts it as late as it can (UDP_SEGMENT, man 7 udp)."""


def bound(lab: Gateway, version: int, address: str | None = None) -> socket.socket:
    """A UDP socket of the client's, from one of its addresses."""
    with lab.client.entered():
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    made.bind((address or CLIENT[version], 0))
    made.setblocking(False)
    return made


class _Wire:
    """The transport that the protocol sends by: collects what it sends at one time."""

    def __init__(self, transport: asyncio.DatagramTransport, udp: socket.socket, flight: Flight) -> None:
        self._transport = transport
        self._udp = udp
        self._flight = flight
        self._waiting: list[tuple[bytes, Any]] = []

    def sendto(self, data: bytes, address: Any) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append((data, address))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._transport.is_closing():
            return
        if self._flight is Flight.REVERSED:
            waiting.reverse()
        while self._flight is Flight.ONE_PIECE and waiting:
            # All but the last have one length.
            size, address = len(waiting[0][0]), waiting[0][1]
            count = next((n for n, (data, _) in enumerate(waiting) if len(data) != size), len(waiting))
            if count < len(waiting) and len(waiting[count][0]) < size:
                count += 1
            segment = [(_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", size))]
            self._udp.sendmsg([data for data, _ in waiting[:count]], segment, 0, address)
            del waiting[:count]
        for data, address in waiting:
            self._transport.sendto(data, address)


class Client(QuicConnectionProtocol):
    """One connection."""

    tickets: list[SessionTicket]
    """What the server gave, for another connection with 0-RTT."""
    given_ticket: asyncio.Event

    def __init__(self, lab: Gateway, configuration: QuicConfiguration, flight: Flight) -> None:
        super().__init__(QuicConnection(configuration=configuration, session_ticket_handler=self._on_ticket))
        self._lab = lab
        self._flight = flight
        self.tickets = []
        self.given_ticket = asyncio.Event()
        self._http = H3Connection(self._quic)
        self._bodies: dict[int, bytearray] = {}
        self._ended: dict[int, asyncio.Future[bytes]] = {}
        self._underlying: asyncio.DatagramTransport | None = None

    @property
    def quic(self) -> QuicConnection:
        return self._quic

    def _on_ticket(self, ticket: SessionTicket) -> None:
        self.tickets.append(ticket)
        self.given_ticket.set()

    async def bind(self, udp: socket.socket) -> None:
        """Send and receive by this socket from now on."""
        before = self._underlying
        loop = asyncio.get_running_loop()
        self._underlying, _ = await loop.create_datagram_endpoint(lambda: self, sock=udp)
        self._transport = _Wire(self._underlying, udp, self._flight)  # type: ignore[assignment]
        if before is not None:
            before.close()

    async def move(self, version: int, address: str | None = None, *, new_id: bool = False) -> None:
        """Go on from another port, or from another address as well. `new_id`: with another connection id, as a client
        does that moves on purpose; without, as if a NAT on the way had changed its mind."""
        if new_id:
            # First of all: an acknowledgement may be waiting, and would go with the old one.
            self._quic.change_connection_id()
        await self.bind(bound(self._lab, version, address))
        self.transmit()

    def leave(self) -> None:
        """Close the socket, without a word to the server."""
        if self._timer is not None:
            self._timer.cancel()
        if self._underlying is not None:
            self._underlying.close()

    @property
    def address(self) -> str:
        """This client, as a server says it: address and port."""
        assert self._underlying is not None
        name = self._underlying.get_extra_info("sockname")
        return f"{name[0]} {name[1]}"

    async def get(self, path: str = "/", seconds: float = 20) -> bytes:
        return await self._request("GET", path, b"", seconds)

    async def post(self, path: str, body: bytes, seconds: float = 20) -> bytes:
        return await self._request("POST", path, body, seconds)

    async def _request(self, method: str, path: str, body: bytes, seconds: float) -> bytes:
        stream = self._quic.get_next_available_stream_id()
        self._bodies[stream] = bytearray()
        self._ended[stream] = asyncio.get_running_loop().create_future()
        name = self._quic.configuration.server_name or "none"
        headers = {":method": method, ":scheme": "https", ":authority": name, ":path": path}
        self._http.send_headers(stream, [(k.encode(), v.encode()) for k, v in headers.items()], not body)
        if body:
            self._http.send_data(stream, body, end_stream=True)
        self.transmit()
        return await asyncio.wait_for(self._ended[stream], seconds * SLOWER)

    def quic_event_received(self, event: QuicEvent) -> None:
        for received in self._http.handle_event(event):
            self._received(received)

    def _received(self, event: H3Event) -> None:
        if isinstance(event, DataReceived):
            self._bodies[event.stream_id] += event.data
        if getattr(event, "stream_ended", False):
            stream: int = event.stream_id  # type: ignore[attr-defined]
            self._ended[stream].set_result(bytes(self._bodies.pop(stream)))


@asynccontextmanager
async def connect(
    lab: Gateway,
    version: int,
    server_name: str | None,
    port: int = 443,
    *,
    padding: int = 0,
    flight: Flight = Flight.IN_ORDER,
    ticket: SessionTicket | None = None,
    wait: bool = True,
    configure: Callable[[QuicConfiguration], None] = lambda _configuration: None,
) -> AsyncIterator[Client]:
    """A client that is connected to the endpoint; `padding` more protocol names of 100 bytes are in its hello.

    With a `ticket` and without `wait` its first requests are 0-RTT. Certificates are checked by `all.pem`.
    """
    configuration = QuicConfiguration(
        is_client=True,
        alpn_protocols=[*H3_ALPN, *(f"{n:03}".ljust(_ALPN_LENGTH, ".") for n in range(padding))],
        server_name=server_name,
        session_ticket=ticket,
        max_data=8 << 20,
        max_stream_data=8 << 20,
    )
    configuration.load_verify_locations(str(lab.directory / "all.pem"))
    configure(configuration)
    client = Client(lab, configuration, flight)
    await client.bind(bound(lab, version))
    try:
        # As the socket says where an answer came from: aioquic compares them.
        client.connect((ENDPOINT[version], port, 0, 0)[: 2 if version == 4 else 4], transmit=wait)
        if wait:
            await asyncio.wait_for(client.wait_connected(), 15 * SLOWER)
        yield client
        client.close()
        await asyncio.sleep(0)  # what that sends is on its way now; an answer is not waited for
    finally:
        client.leave()
