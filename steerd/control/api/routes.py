"""Routes of a service; those of the configuration can be read only (control.routes)."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter
from typing import Any

import msgspec
from msgspec import Struct

from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Page, Request
from steerd.control.api.services import ServiceName
from steerd.control.route_records import RouteView
from steerd.errors import RequestError

OF_SERVICE = "/v1/services/{service}/routes"


class RouteBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A route as in the configuration."""

    when: dict[str, str | int]
    target: Any
    source: str | None = None
    choose: str | None = None
    hash: str | None = None


class RouteQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which route; `when` as JSON."""

    when: str = "{}"
    source: str | None = None


class RoutePage(Struct, frozen=True):
    """A part of the routes; `next` is the `after` of the next part."""

    routes: list[RouteView]
    next: str | None


def list_routes(context: Context, request: Request[ServiceName, Page, Nothing]) -> Answer:
    query = request.query
    return Answer(200, RoutePage(*context.registry.routes.page(request.path.service, query.after, query.limit)))


def list_all_routes(context: Context, request: Request[Nothing, Page, Nothing]) -> Answer:
    # `after` is the name of a service, and behind a colon what its own list calls `after`.
    services, limit = context.config.services, request.query.limit
    service, _, after = request.query.after.partition(":")
    views: list[RouteView] = []
    for each in services[bisect_left(services, service, key=attrgetter("name")) :]:
        page, behind = context.registry.routes.page(
            each.name, after if each.name == service else "", limit - len(views)
        )
        views += page
        if behind is not None:
            return Answer(200, RoutePage(views, f"{each.name}:{behind}"))
    return Answer(200, RoutePage(views, None))


def put_route(context: Context, request: Request[ServiceName, Nothing, RouteBody]) -> Answer:
    body = request.body
    view, is_new = context.registry.routes.put(
        request.path.service, body.when, body.target, body.source, body.choose, body.hash
    )
    return Answer(201 if is_new else 200, view)


def delete_route(context: Context, request: Request[ServiceName, RouteQuery, Nothing]) -> Answer:
    try:
        when = msgspec.json.decode(request.query.when, type=dict[str, str | int])
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise RequestError("invalid", "when", f"Must be conditions as JSON: {error}.") from error
    context.registry.routes.remove(request.path.service, when, request.query.source)
    return Answer(204, None)


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "listRoutes",
        "GET",
        "/v1/routes",
        "The routes of all services, by service.",
        handle=list_all_routes,
        parameters=Nothing,
        query=Page,
        body=Nothing,
        answers={200: RoutePage},
        private=True,
    ),
    Operation(
        "listRoutesOfService",
        "GET",
        OF_SERVICE,
        "The routes of a service, those of the configuration first.",
        handle=list_routes,
        parameters=ServiceName,
        query=Page,
        body=Nothing,
        answers={200: RoutePage},
        errors=("not_found",),
        private=True,
    ),
    Operation(
        "putRoute",
        "PUT",
        OF_SERVICE,
        "Define a route (201); one of the same conditions and source gets the new target (200).",
        handle=put_route,
        parameters=ServiceName,
        query=Nothing,
        body=RouteBody,
        answers={200: RouteView, 201: RouteView},
        errors=("not_found", "conflict"),
    ),
    Operation(
        "deleteRoute",
        "DELETE",
        OF_SERVICE,
        "Take a route away that was added; its connections go on.",
        handle=delete_route,
        parameters=ServiceName,
        query=RouteQuery,
        body=Nothing,
        answers={204: None},
        errors=("not_found", "conflict"),
    ),
)
