"""The API of the main process: HTTP and JSON on a unix socket, RUN_DIR/api.sock (mode 0660, group `steerd` if there is
one), under /v1. `curl --unix-socket /run/steerd/api.sock http://steerd/v1/services/tv/sessions`.

    GET     /v1/services/NAME/sessions?after=ID&limit=N   {"sessions": [SESSION, ...], "next": ID or null}
    GET     /v1/services/NAME/sessions/ID                 SESSION
    PUT     /v1/services/NAME/sessions/ID                 SESSION; 201 if the id is new, else 200
    DELETE  /v1/services/NAME/sessions/ID                 204

    GET     /v1/services/NAME/routes?after=NEXT&limit=N   {"routes": [ROUTE, ...], "next": TEXT or null}
    PUT     /v1/services/NAME/routes                      ROUTE; 201 if it is new, else 200
    DELETE  /v1/services/NAME/routes?when=JSON&source=P   204

    GET     /v1/leases?after=NAME&limit=N                 {"leases": [LEASE, ...], "next": NAME or null}
    GET     /v1/leases/NAME                               LEASE
    PUT     /v1/leases/NAME                               LEASE; 201
    POST    /v1/leases/NAME/renew                         LEASE
    DELETE  /v1/leases/NAME                               what became of it (control.leases.ReleasedView)

    GET     /v1/export                                    lines of JSON (control.transfer)
    POST    /v1/import?line=N                             {"added", "changed", "unchanged"}, of at most 16 MiB of lines

SESSION is control.sessions.SessionView. PUT takes {"target": TARGET, "source": ADDRESS or null}; TARGET as a route's:
"10.64.0.1:554", {"address": "192.0.2.7:554", "external": true}, or a list of them, one for each address family. It
defines the session anew: without `source`, the next client is the first. An answer to PUT or DELETE is given when the
change is on the disk.

ROUTE is control.routes.RouteView, LEASE is control.leases.LeaseView. A PUT of a route takes {"when", "target",
"source"} as in the configuration; one of the same conditions and source gets the new target. A PUT of a lease takes
{"pool", "service", "when", "source", "port": number or "same", "ttl": seconds}, all but pool optional; `renew` takes
{"ttl"}, without it as long again as at first. An import is one transaction; its `line` is the number of the first line,
for messages.

Everything but success is {"code", "field", "message"}: a word for programs, what of the request is wrong (or null), and
a sentence. Codes: `not_found` 404, `conflict` 409, `invalid` 400, `not_allowed` 405, `too_large` 413, `registry` 503
(the registry cannot be written, or is full), `kernel` 503 (the kernel refused what is needed), `fault` 500 (our own; it
is in the log).

A resource is a class with `routes`; `Api` puts them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Meta, Struct

from steerd.control import transfer
from steerd.control.client import socket_path
from steerd.control.leases import MAX_TTL, LeaseTable, LeaseView
from steerd.control.registry import Registry
from steerd.control.routes import RouteTable, RouteView
from steerd.control.sessions import RequestError, SessionTable, SessionView
from steerd.errors import KernelError, RegistryError, SteerdError

GROUP = "steerd"
MAX_PAGE = 1000

_MODE = 0o660
_MAX_BODY = 65536
_MAX_IMPORT = 16 << 20
_EXPORT_SECONDS = 60.0
"""How long a reader of an export may take for some thousand lines: as long as it reads, no page is used again."""
_SHUTDOWN_SECONDS = 1.0
_STATUS = {"not_found": 404, "conflict": 409, "invalid": 400}
_HTTP_ERRORS = {
    404: ("not_found", "There is nothing at {path}."),
    405: ("not_allowed", "{method} is not possible at {path}."),
    413: ("too_large", f"The body is longer than {_MAX_BODY} bytes."),
}

T = TypeVar("T")


class Problem(Struct, frozen=True):
    """What everything but success looks like."""

    code: str
    field: str | None
    message: str


class SessionBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What PUT takes."""

    target: Any
    source: str | None = None


class ListQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """What a list can be asked for."""

    after: str = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE


class SessionPage(Struct, frozen=True):
    """A part of the list; `next` is the `after` of the next part."""

    sessions: list[SessionView]
    next: str | None


class RouteBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What PUT takes."""

    when: dict[str, str | int]
    target: Any
    source: str | None = None


class RouteQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which route DELETE means; `when` as JSON."""

    when: str = "{}"
    source: str | None = None


class RoutePage(Struct, frozen=True):
    """A part of the list; `next` is the `after` of the next part."""

    routes: list[RouteView]
    next: str | None


class LeaseBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What PUT takes."""

    pool: str
    service: str | None = None
    when: dict[str, str | int] = {}
    source: str | None = None
    port: Annotated[int, Meta(ge=1, le=65535)] | Literal["same"] = "same"
    ttl: Annotated[int, Meta(ge=1, le=MAX_TTL)] | None = None


class RenewBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What `renew` takes."""

    ttl: Annotated[int, Meta(ge=1, le=MAX_TTL)] | None = None


class LeasePage(Struct, frozen=True):
    """A part of the list; `next` is the `after` of the next part."""

    leases: list[LeaseView]
    next: str | None


class ImportQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """What an import can be told."""

    line: Annotated[int, Meta(ge=1)] = 1


class Api:
    """Serves from `start` to `stop`. `on_fault` is told what went wrong where nobody foresaw it."""

    def __init__(self, registry: Registry, run_dir: str, on_fault: Callable[[str], None]) -> None:
        self.path = socket_path(run_dir)
        self._on_fault = on_fault
        app = web.Application(middlewares=[self._errors_as_json], client_max_size=_MAX_BODY)
        app.add_routes(SessionResource(registry.sessions).routes())
        app.add_routes(RouteResource(registry.routes).routes())
        app.add_routes(LeaseResource(registry.leases).routes())
        app.add_routes(TransferResource(registry).routes())
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

    @web.middleware
    async def _errors_as_json(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            return _json(_STATUS[error.code], Problem(error.code, error.field, error.message))
        except RegistryError as error:
            return _json(503, Problem("registry", None, str(error)))
        except KernelError as error:
            return _json(503, Problem("kernel", None, str(error)))
        except web.HTTPException as error:
            code, message = _HTTP_ERRORS.get(error.status, ("invalid", f"{error.reason}."))
            answer = _json(error.status, Problem(code, None, message.format(method=request.method, path=request.path)))
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except Exception:
            self._on_fault(traceback.format_exc())
            return _json(500, Problem("fault", None, "This is a fault of steerd; its log says more."))


class SessionResource:
    """Sessions of a service."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table

    def routes(self) -> Iterable[web.RouteDef]:
        all_of_them, one = "/v1/services/{service}/sessions", "/v1/services/{service}/sessions/{id}"
        return (
            web.get(all_of_them, self._list),
            web.get(one, self._get),
            web.put(one, self._put),
            web.delete(one, self._delete),
        )

    # The registry's calls wait for the disk or walk over many entries; they are made in threads.

    async def _list(self, request: web.Request) -> web.Response:
        query = _from_query(request, ListQuery)
        service = request.match_info["service"]
        found = await asyncio.to_thread(self._table.page, service, query.after, query.limit + 1)
        more = len(found) > query.limit
        page = found[: query.limit]
        return _json(200, SessionPage(page, page[-1].id if more else None))

    async def _get(self, request: web.Request) -> web.Response:
        return _json(200, await asyncio.to_thread(self._table.get, *_service_and_id(request)))

    async def _put(self, request: web.Request) -> web.Response:
        body = await _from_body(request, SessionBody)
        view, is_new = await asyncio.to_thread(
            self._table.put, *_service_and_id(request), target=body.target, source=body.source
        )
        return _json(201 if is_new else 200, view)

    async def _delete(self, request: web.Request) -> web.Response:
        await asyncio.to_thread(self._table.remove, *_service_and_id(request))
        return web.Response(status=204)


class RouteResource:
    """Routes of a service; those of the configuration can be read only."""

    def __init__(self, table: RouteTable) -> None:
        self._table = table

    def routes(self) -> Iterable[web.RouteDef]:
        path = "/v1/services/{service}/routes"
        return web.get(path, self._list), web.put(path, self._put), web.delete(path, self._delete)

    async def _list(self, request: web.Request) -> web.Response:
        query = _from_query(request, ListQuery)
        service = request.match_info["service"]
        return _json(200, RoutePage(*await asyncio.to_thread(self._table.page, service, query.after, query.limit)))

    async def _put(self, request: web.Request) -> web.Response:
        body = await _from_body(request, RouteBody)
        service = request.match_info["service"]
        view, is_new = await asyncio.to_thread(self._table.put, service, body.when, body.target, body.source)
        return _json(201 if is_new else 200, view)

    async def _delete(self, request: web.Request) -> web.Response:
        query = _from_query(request, RouteQuery)
        try:
            when = msgspec.json.decode(query.when, type=dict[str, str | int])
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise RequestError("invalid", "when", f"Must be conditions as JSON: {error}.") from error
        await asyncio.to_thread(self._table.remove, request.match_info["service"], when, query.source)
        return web.Response(status=204)


class LeaseResource:
    """Leases of all pools."""

    def __init__(self, table: LeaseTable) -> None:
        self._table = table

    def routes(self) -> Iterable[web.RouteDef]:
        one = "/v1/leases/{name}"
        return (
            web.get("/v1/leases", self._list),
            web.get(one, self._get),
            web.put(one, self._put),
            web.delete(one, self._delete),
            web.post(one + "/renew", self._renew),
        )

    async def _list(self, request: web.Request) -> web.Response:
        query = _from_query(request, ListQuery)
        found = await asyncio.to_thread(self._table.page, query.after, query.limit + 1)
        more = len(found) > query.limit
        page = found[: query.limit]
        return _json(200, LeasePage(page, page[-1].name if more else None))

    async def _get(self, request: web.Request) -> web.Response:
        return _json(200, await asyncio.to_thread(self._table.get, request.match_info["name"]))

    async def _put(self, request: web.Request) -> web.Response:
        body = await _from_body(request, LeaseBody)
        view = await asyncio.to_thread(
            self._table.add,
            request.match_info["name"],
            body.pool,
            service=body.service,
            when=body.when,
            source=body.source,
            port=0 if body.port == "same" else body.port,
            ttl=body.ttl,
            now=time.time(),
        )
        return _json(201, view)

    async def _delete(self, request: web.Request) -> web.Response:
        return _json(200, await asyncio.to_thread(self._table.release, request.match_info["name"], time.time()))

    async def _renew(self, request: web.Request) -> web.Response:
        body = await _from_body(request, RenewBody)
        name = request.match_info["name"]
        return _json(200, await asyncio.to_thread(self._table.renew, name, body.ttl, time.time()))


class TransferResource:
    """The registry as text, and back."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def routes(self) -> Iterable[web.RouteDef]:
        return web.get("/v1/export", self._export), web.post("/v1/import", self._import)

    async def _export(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        chunks = transfer.export(self._registry)
        try:
            while (chunk := await asyncio.to_thread(_next, chunks)) is not None:
                async with asyncio.timeout(_EXPORT_SECONDS):
                    await response.write(chunk)
        finally:
            await asyncio.to_thread(chunks.close)
        await response.write_eof()
        return response

    async def _import(self, request: web.Request) -> web.Response:
        query = _from_query(request, ImportQuery)
        text = bytearray()
        async for part in request.content.iter_any():
            text += part
            if len(text) > _MAX_IMPORT:
                raise RequestError(
                    "invalid", None, f"The lines have more than {_MAX_IMPORT} bytes; send them in parts."
                )
        return _json(200, await asyncio.to_thread(transfer.load, self._registry, bytes(text), query.line))


def _next(chunks: Iterator[bytes]) -> bytes | None:
    return next(chunks, None)


def _service_and_id(request: web.Request) -> tuple[str, str]:
    return request.match_info["service"], request.match_info["id"]


def _json(status: int, value: object) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


async def _from_body(request: web.Request, kind: type[T]) -> T:
    """The request's body as a struct; raises RequestError, naming the field."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except msgspec.DecodeError as error:
        raise RequestError("invalid", None, f"The body is not JSON: {error}.") from error


def _from_query(request: web.Request, kind: type[T]) -> T:
    """The request's query as a struct; raises RequestError, naming the field."""
    try:
        return msgspec.convert(dict(request.query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: msgspec.ValidationError) -> RequestError:
    what, _, where = str(error).partition(" - at `$.")
    named = re.search(r"field `(.*)`", what)
    field = where.removesuffix("`") if where else named[1] if named else None
    return RequestError("invalid", field, f"{what}.")
