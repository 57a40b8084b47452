"""Serves the operations of the table on two unix sockets: api.sock, and for monitors api-ro.sock.

The read-only socket is there if the configuration names a group for it. What can be asked for there is each GET but
those that tell what may let somebody in: session ids, and the cookies and headers in routes (Operation.private).
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import inspect
import os
import re
import socket
import traceback
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from steerd.control.api.connection import Connection, hang_up, problem
from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Lines, Nothing, Request
from steerd.control.api.peers import MAX_CONNECTIONS, Door
from steerd.control.api.seldom import Seldom
from steerd.control.api.table import OPERATIONS
from steerd.control.client import read_only_socket_path, socket_path
from steerd.errors import KernelError, RegistryError, RequestError, SteerdError

GROUP = "steerd"

_MODE = 0o660
_MODE_FOR_ALL = 0o666
_MAX_BODY = 65536
_MAX_LINES = 16 << 20
_BODY_SECONDS = 30.0
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

_READING = ("GET", "HEAD")

T = TypeVar("T", bound=Struct)


class Api:
    """Serves from `start` to `stop`. `on_fault` is told what went wrong where nobody foresaw it, `on_refused` who was
    not let in."""

    def __init__(
        self,
        context: Context,
        run_dir: str,
        on_fault: Callable[[str], None],
        on_refused: Callable[[str], None],
        read_only_group: str | None = None,
    ) -> None:
        """`read_only_group`: whose members may use the read-only socket; None: there is no such socket."""
        self.path = socket_path(run_dir)
        self.read_only_path = read_only_socket_path(run_dir)
        self._context = context
        self._on_fault = on_fault
        self._say_fault = Seldom(on_fault)
        self._on_refused = on_refused
        self._read_only_group = read_only_group
        self._threads = ThreadPoolExecutor(_THREADS, "api")
        app = web.Application(middlewares=[self._errors_as_json, self._doors], client_max_size=_MAX_BODY)
        app.add_routes(
            web.RouteDef(operation.method, operation.path, self._handler(operation), {}) for operation in OPERATIONS
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
        self._listening: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen; raises SteerdError if the socket cannot be had. Trouble with the read-only one is told to
        `on_fault`, and it is not there."""
        await self._runner.setup()
        group = _number_of(GROUP)
        await self._listen(self._door(self.path, GROUP, group, read_only=False), group)
        self.read_only_path.unlink(missing_ok=True)
        if self._read_only_group is None:
            return
        readers = _number_of(self._read_only_group)
        if readers is None:
            self._on_fault(
                f"gateway.api.read_only_group: there is no group {self._read_only_group} on this machine, and hence no"
                " read-only socket"
            )
            return
        try:
            await self._listen(self._door(self.read_only_path, self._read_only_group, readers, read_only=True), readers)
        except SteerdError as error:
            self._on_fault(str(error))

    def _door(self, path: Path, name: str, group: int | None, *, read_only: bool) -> Door:
        groups = () if group is None else (group,)
        return Door(str(path), groups, f"root and the group {name}", read_only=read_only, on_refused=self._on_refused)

    async def stop(self) -> None:
        """Let requests end that are being answered, and go."""
        for server in self._listening:
            server.close()
        await self._runner.cleanup()
        self.path.unlink(missing_ok=True)
        self.read_only_path.unlink(missing_ok=True)
        # Not in this thread: what still runs may wait for the event loop.
        await asyncio.to_thread(self._threads.shutdown)

    async def _listen(self, door: Door, group: int | None) -> None:
        path = self.read_only_path if door.read_only else self.path
        listener = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            # Before it listens, so that nobody gets in who may not.
            _give_to(path, group)
        except OSError as error:
            listener.close()
            raise SteerdError(f"{path} cannot be listened on: {error.strerror or error}") from error
        server = self._runner.server
        assert server is not None, "the runner was set up"
        self._listening.append(
            await asyncio.get_running_loop().create_unix_server(
                lambda: Connection(server, door, self._say_fault), sock=listener
            )
        )

    def _handler(self, operation: AnyOperation) -> Handler:
        turn = asyncio.Semaphore(operation.at_once or MAX_CONNECTIONS)

        async def handler(http: web.Request) -> web.StreamResponse:
            if operation.private and _door(http).read_only:
                return problem("forbidden", "path", f"{http.path} is not for the read-only socket.")
            parameters = _from_text(http.match_info, operation.parameters)
            query = _from_text(http.query, operation.query)
            # Lines are many: their turn comes first.
            body = None if operation.body is Lines else await _body(http, operation.body)
            async with turn:
                body = body or await _body(http, operation.body)
                answer = await self._carried_out(operation, Request(parameters, query, body))
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

    async def _streamed(
        self, http: web.Request, status: int, pieces: Generator[bytes, None, None]
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": "application/x-ndjson"})
        try:
            # Before the answer begins: what goes wrong at once can be an answer of its own.
            piece = await self._in_thread(next, pieces, None)
            await response.prepare(http)
            # aiohttp leaves the body of an answer to HEAD away, but not what is written piece by piece.
            while piece is not None and http.method != "HEAD":
                async with asyncio.timeout(_STREAM_SECONDS):
                    await response.write(piece)
                piece = await self._in_thread(next, pieces, None)
        except TimeoutError:
            hang_up(http)
            raise ConnectionResetError("the client did not read on") from None
        finally:
            with contextlib.suppress(ValueError):  # cancelled: a thread is in it, and what it has ends with it
                await self._in_thread(pieces.close)
        await response.write_eof()
        return response

    async def _in_thread(self, function: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    @web.middleware
    async def _doors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = _connection(request).refusal
        if refusal is not None:
            return problem("forbidden", None, refusal, closing=True)
        if _door(request).read_only and request.method not in _READING:
            return problem("forbidden", "method", f"{request.method} is not for the read-only socket, only GET.")
        return await handler(request)

    @web.middleware
    async def _errors_as_json(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            return problem(error.code, error.field, error.message)
        except RegistryError as error:
            return problem("registry", None, str(error))
        except KernelError as error:
            return problem("kernel", None, str(error))
        except web.HTTPException as error:
            code, message = _HTTP_ERRORS.get(error.status, ("invalid", f"{error.reason}."))
            answer = problem(code, None, message.format(method=request.method, path=request.path))
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except _TooSlowError:
            return problem("too_slow", None, f"The body took longer than {_BODY_SECONDS:g} s.", closing=True)
        except ConnectionError:
            raise  # the client is gone: nobody is there to be told
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._say_fault((where.filename, where.lineno), traceback.format_exc())
            return problem("fault", None, "This is a fault of steerd; its log says more.")


class _TooSlowError(Exception):
    """A body that does not come."""


def _number_of(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _give_to(path: Path, group: int | None) -> None:
    """Let the members of a group connect."""
    path.chmod(_MODE)
    if group is None:  # no such group on this machine: root alone
        return
    try:
        os.chown(path, -1, group)
    except PermissionError:
        # We are not in that group, and without CAP_CHOWN. Then the door alone keeps others out.
        path.chmod(_MODE_FOR_ALL)


def _connection(request: web.Request) -> Connection:
    return cast(Connection, request.protocol)


def _door(request: web.Request) -> Door:
    return _connection(request).door


def _json(status: int, value: Struct) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


async def _body(http: web.Request, kind: type[Struct | Lines]) -> Struct | Lines:
    """The request's body as an operation wants it; raises RequestError, naming the field, and _TooSlowError."""
    if kind is Nothing:
        return Nothing()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            if kind is Lines:
                return await _lines(http)
            text = await http.read()
    except TimeoutError:
        raise _TooSlowError from None
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError as error:
        raise RequestError("invalid", None, "The body is nested too deeply.") from error
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
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
