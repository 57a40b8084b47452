"""One connection to the API: aiohttp's, with the peer that is behind it, and bounds on what it may cost.

Bounds: a client that says nothing, or never ends its headers, is hung up on after _IDLE_SECONDS; one that does not take
its answer after _ANSWER_SECONDS. What is no HTTP is answered as every error is, in JSON, and nothing is logged of it.
"""

from __future__ import annotations

import asyncio
from typing import cast

import msgspec
from aiohttp import web

from steerd.control.api.operation import CODES, Problem
from steerd.control.api.peers import Door, Peer, peer_of
from steerd.control.api.seldom import Seldom

_IDLE_SECONDS = 30.0
_ANSWER_SECONDS = 30.0
_LINGERING_SECONDS = 2.0
"""How long what is left of a request is read whose answer is given already, so that its client sees the answer."""


class Connection(web.RequestHandler):
    """One connection. `peer` is known as soon as it is made."""

    __slots__ = ("_is_counted", "_say_fault", "door", "peer")

    def __init__(self, server: web.Server, door: Door, say_fault: Seldom) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=_IDLE_SECONDS,
            lingering_time=_LINGERING_SECONDS,
            tcp_keepalive=False,
            auto_decompress=False,
        )
        self.door = door
        self.peer = Peer(0, -1, frozenset())
        self._say_fault = say_fault
        self._is_counted = False

    @property
    def refusal(self) -> str | None:
        """Why this peer may do nothing here; None: it may."""
        return None if self.door.may_enter(self.peer) else self.door.refusal(self.peer)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.peer = peer_of(transport.get_extra_info("socket"))
        super().connection_made(transport)
        self._is_counted = self.door.enter(self.peer)
        if not self._is_counted:
            cast(asyncio.Transport, transport).abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._is_counted:
            self._is_counted = False
            self.door.leave(self.peer)
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            hang_up(request)
            return resp, True

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """What aiohttp itself has to say: that this is no HTTP, or none that it reads."""
        if isinstance(exc, ConnectionError) or request.writer.output_size:
            raise ConnectionError("the client is gone, or has the beginning of another answer") from exc
        if status >= 500:
            self._say_fault(repr(exc), repr(exc))
            return problem("fault", None, "This is a fault of steerd; its log says more.", closing=True)
        return problem("invalid", None, "This is no HTTP request that can be read.", closing=True)


def hang_up(request: web.BaseRequest) -> None:
    """End a connection now, whatever its client has not read yet."""
    if request.transport is not None:
        request.transport.abort()


def problem(code: str, field: str | None, message: str, *, closing: bool = False) -> web.Response:
    """An error as the API answers it; `closing`: the connection ends with it."""
    body = msgspec.json.encode(Problem(code, field, message))
    response = web.Response(status=CODES[code], body=body, content_type="application/json")
    if closing:
        response.force_close()
    return response
