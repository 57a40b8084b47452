"""Sessions of a service (control.sessions)."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Page, Request
from steerd.control.api.services import ServiceName
from steerd.control.sessions import SessionView

ALL = "/v1/services/{service}/sessions"
ONE = "/v1/services/{service}/sessions/{id}"


class SessionName(Struct, frozen=True):
    """Which session."""

    service: str
    id: str


class SessionBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A session: its target as in the configuration, and the client's address; without one, the first that comes."""

    target: Any
    source: str | None = None


class SessionPage(Struct, frozen=True):
    """A part of the sessions of a service; `next` is the `after` of the next part."""

    sessions: list[SessionView]
    next: str | None


def list_sessions(context: Context, request: Request[ServiceName, Page, Nothing]) -> Answer:
    limit = request.query.limit
    found = context.registry.sessions.page(request.path.service, request.query.after, limit + 1)
    page = found[:limit]
    return Answer(200, SessionPage(page, page[-1].id if len(found) > limit else None))


def get_session(context: Context, request: Request[SessionName, Nothing, Nothing]) -> Answer:
    return Answer(200, context.registry.sessions.get(request.path.service, request.path.id))


def put_session(context: Context, request: Request[SessionName, Nothing, SessionBody]) -> Answer:
    view, is_new = context.registry.sessions.put(
        request.path.service, request.path.id, target=request.body.target, source=request.body.source
    )
    return Answer(201 if is_new else 200, view)


def delete_session(context: Context, request: Request[SessionName, Nothing, Nothing]) -> Answer:
    context.registry.sessions.remove(request.path.service, request.path.id)
    return Answer(204, None)


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "listSessions",
        "GET",
        ALL,
        "The sessions of a service, by id.",
        handle=list_sessions,
        parameters=ServiceName,
        query=Page,
        body=Nothing,
        answers={200: SessionPage},
        errors=("not_found",),
        private=True,
    ),
    Operation(
        "getSession",
        "GET",
        ONE,
        "One session.",
        handle=get_session,
        parameters=SessionName,
        query=Nothing,
        body=Nothing,
        answers={200: SessionView},
        errors=("not_found",),
        private=True,
    ),
    Operation(
        "putSession",
        "PUT",
        ONE,
        "Define a session (201), or define it anew (200).",
        handle=put_session,
        parameters=SessionName,
        query=Nothing,
        body=SessionBody,
        answers={200: SessionView, 201: SessionView},
        errors=("not_found", "conflict"),
    ),
    Operation(
        "deleteSession",
        "DELETE",
        ONE,
        "Forget a session that was added; its connections go on.",
        handle=delete_session,
        parameters=SessionName,
        query=Nothing,
        body=Nothing,
        answers={204: None},
        errors=("not_found", "conflict"),
    ),
)
