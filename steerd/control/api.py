"""The API of the main process: HTTP and JSON on a unix socket, RUN_DIR/api.sock (mode 0660, group `steerd` if there is
one), under /v1. `curl --unix-socket /run/steerd/api.sock http://steerd/v1/services/tv/sessions`.

    GET     /v1/services/NAME/sessions?after=ID&limit=N   {"sessions": [SESSION, ...], "next": ID or null}
    GET     /v1/services/NAME/sessions/ID                 SESSION
    PUT     /v1/services/NAME/sessions/ID                 SESSION; 201 if the id is new, else 200
    DELETE  /v1/services/NAME/sessions/ID                 204

SESSION is control.sessions.SessionView. PUT takes {"target": TARGET, "source": ADDRESS or null}; TARGET as a route's:
"10.64.0.1:554", {"address": "192.0.2.7:554", "external": true}, or a list of them, one for each address family. It
defines the session anew: without `source`, the next client is the first. An answer to PUT or DELETE is given when the
change is on the disk.

Everything but success is {"code", "field", "message"}: a word for programs, what of the request is wrong (or null), and
a sentence. Codes: `not_found` 404, `conflict` 409, `invalid` 400, `not_allowed` 405, `too_large` 413, `registry` 503
(the registry cannot be written, or is full), `fault` 500 (our own; it is in the log).

A resource is a class with `routes`; `Api` puts them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Meta, Struct

from steerd.control.client import socket_path
from steerd.control.registry import Registry
from steerd.control.sessions import RequestError, SessionTable, SessionView
from steerd.errors import RegistryError, SteerdError

GROUP = "steerd"
MAX_PAGE = 1000

_MODE = 0o660
_MAX_BODY = 65536
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


class SessionQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """What the list can be asked for."""

    after: str = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE


class SessionPage(Struct, frozen=True):
    """A part of the list; `next` is the `after` of the next part."""

    sessions: list[SessionView]
    next: str | None


class Api:
    """Serves from `start` to `stop`. `on_fault` is told what went wrong where nobody foresaw it."""

    def __init__(self, registry: Registry, run_dir: str, on_fault: Callable[[str], None]) -> None:
        self.path = socket_path(run_dir)
        self._on_fault = on_fault
        app = web.Application(middlewares=[self._errors_as_json], client_max_size=_MAX_BODY)
        app.add_routes(SessionResource(registry.sessions).routes())
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
        query = _from_query(request, SessionQuery)
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
