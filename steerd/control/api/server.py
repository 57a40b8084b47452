"""Serves the operations of the table on a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import inspect
import os
import re
import socket
import traceback
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from steerd.control.api.context import Context
from steerd.control.api.operation import CODES, Answer, AnyOperation, Lines, Nothing, Problem, Request
from steerd.control.api.table import OPERATIONS
from steerd.control.client import socket_path
from steerd.control.sessions import RequestError
from steerd.errors import KernelError, RegistryError, SteerdError

GROUP = "steerd"

_MODE = 0o660
_MAX_BODY = 65536
_MAX_LINES = 16 << 20
_STREAM_SECONDS = 60.0
"""How long a reader of an export may take for some thousand lines: as long as it reads, no page is used again."""
_SHUTDOWN_SECONDS = 1.0
_THREADS = 4
"""Their own, so that the daemon has a thread whenever it needs one: a lease waits for the daemon to mend an alias."""
_HTTP_ERRORS = {
    404: ("not_found", "There is nothing at {path}."),
    405: ("not_allowed", "{method} is not possible at {path}."),
    413: ("too_large", f"The body is longer than {_MAX_BODY} bytes."),
}

T = TypeVar("T", bound=Struct)


class Api:
    """Serves from `start` to `stop`. `on_fault` is told what went wrong where nobody foresaw it."""

    def __init__(self, context: Context, run_dir: str, on_fault: Callable[[str], None]) -> None:
        self.path = socket_path(run_dir)
        self._context = context
        self._on_fault = on_fault
        self._threads = ThreadPoolExecutor(_THREADS, "api")
        app = web.Application(middlewares=[self._errors_as_json], client_max_size=_MAX_BODY)
        app.add_routes(
            web.RouteDef(operation.method, operation.path, self._handler(operation), {}) for operation in OPERATIONS
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)

    async def start(self) -> None:
        """Listen; raises SteerdError if the socket cannot be had."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            self.path.unlink(missing_ok=True)
            listener.bind(str(self.path))
            # Before it listens, so that nobody gets in who may not.
            self.path.chmod(_MODE)
            with contextlib.suppress(KeyError):  # no such group on this machine: root alone
                os.chown(self.path, -1, grp.getgrnam(GROUP).gr_gid)
        except OSError as error:
            listener.close()
            raise SteerdError(f"{self.path} cannot be listened on: {error.strerror or error}") from error
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()

    async def stop(self) -> None:
        """Let requests end that are being answered, and go."""
        await self._runner.cleanup()
        self.path.unlink(missing_ok=True)
        # Not in this thread: what still runs may wait for the event loop.
        await asyncio.to_thread(self._threads.shutdown)

    def _handler(self, operation: AnyOperation) -> Handler:
        async def handler(http: web.Request) -> web.StreamResponse:
            request = Request(
                _from_text(http.match_info, operation.parameters),
                _from_text(http.query, operation.query),
                await _body(http, operation.body),
            )
            answer = await self._carried_out(operation, request)
            if isinstance(answer.value, Struct):
                return _json(answer.status, answer.value)
            if answer.value is None:
                return web.Response(status=answer.status)
            return await self._streamed(http, answer.status, answer.value)

        return handler

    async def _carried_out(self, operation: AnyOperation, request: Request[Any, Any, Any]) -> Answer:
        if inspect.iscoroutinefunction(operation.handle):
            return await cast(Awaitable[Answer], operation.handle(self._context, request))
        return cast(Answer, await self._in_thread(operation.handle, self._context, request))

    async def _streamed(self, http: web.Request, status: int, pieces: Iterator[bytes]) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(http)
        try:
            while (piece := await self._in_thread(next, pieces, None)) is not None:
                async with asyncio.timeout(_STREAM_SECONDS):
                    await response.write(piece)
        finally:
            if isinstance(pieces, Generator):
                await self._in_thread(pieces.close)
        await response.write_eof()
        return response

    async def _in_thread(self, function: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    @web.middleware
    async def _errors_as_json(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            return _problem(error.code, error.field, error.message)
        except RegistryError as error:
            return _problem("registry", None, str(error))
        except KernelError as error:
            return _problem("kernel", None, str(error))
        except web.HTTPException as error:
            code, message = _HTTP_ERRORS.get(error.status, ("invalid", f"{error.reason}."))
            answer = _problem(code, None, message.format(method=request.method, path=request.path))
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except Exception:
            self._on_fault(traceback.format_exc())
            return _problem("fault", None, "This is a fault of steerd; its log says more.")


def _json(status: int, value: Struct) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _problem(code: str, field: str | None, message: str) -> web.Response:
    return _json(CODES[code], Problem(code, field, message))


async def _body(http: web.Request, kind: type[T] | type[Lines]) -> T | Lines | Nothing:
    """The request's body as an operation wants it; raises RequestError, naming the field."""
    if kind is Nothing:
        return Nothing()
    if kind is Lines:
        return await _lines(http)
    try:
        return cast(T, msgspec.json.decode(await http.read(), type=kind))
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except msgspec.DecodeError as error:
        raise RequestError("invalid", None, f"The body is not JSON: {error}.") from error


async def _lines(http: web.Request) -> Lines:
    text = bytearray()
    async for part in http.content.iter_any():
        text += part
        if len(text) > _MAX_LINES:
            raise RequestError("invalid", None, f"The lines have more than {_MAX_LINES} bytes; send them in parts.")
    return Lines(bytes(text))


def _from_text(parameters: Any, kind: type[T]) -> T:
    """Parameters as a struct; raises RequestError, naming the field."""
    try:
        return msgspec.convert(dict(parameters), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: msgspec.ValidationError) -> RequestError:
    what, _, where = str(error).partition(" - at `$.")
    named = re.search(r"field `(.*)`", what)
    field = where.removesuffix("`") if where else named[1] if named else None
    return RequestError("invalid", field, f"{what}.")
