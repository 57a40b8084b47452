"""Leases of all pools (control.leases)."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from msgspec import Meta, Struct

from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Page, Request
from steerd.control.leases import MAX_TTL, LeaseView, ReleasedView

ALL = "/v1/leases"
ONE = "/v1/leases/{name}"


class LeaseName(Struct, frozen=True):
    """Whose lease."""

    name: str


class LeaseBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A lease, and with `service` a route to it. `ttl` in seconds; without it there is no end."""

    pool: str
    service: str | None = None
    when: dict[str, str | int] = {}
    source: str | None = None
    port: Annotated[int, Meta(ge=1, le=65535)] | Literal["same"] = "same"
    ttl: Annotated[int, Meta(ge=1, le=MAX_TTL)] | None = None


class RenewBody(Struct, frozen=True, forbid_unknown_fields=True):
    """How long from now on, in seconds; without it as long as at first."""

    ttl: Annotated[int, Meta(ge=1, le=MAX_TTL)] | None = None


class LeasePage(Struct, frozen=True):
    """A part of the leases; `next` is the `after` of the next part."""

    leases: list[LeaseView]
    next: str | None


def list_leases(context: Context, request: Request[Nothing, Page, Nothing]) -> Answer:
    limit = request.query.limit
    found = context.registry.leases.page(request.query.after, limit + 1)
    page = found[:limit]
    return Answer(200, LeasePage(page, page[-1].name if len(found) > limit else None))


def get_lease(context: Context, request: Request[LeaseName, Nothing, Nothing]) -> Answer:
    return Answer(200, context.registry.leases.get(request.path.name))


def put_lease(context: Context, request: Request[LeaseName, Nothing, LeaseBody]) -> Answer:
    body = request.body
    view = context.registry.leases.add(
        request.path.name,
        body.pool,
        service=body.service,
        when=body.when,
        source=body.source,
        port=0 if body.port == "same" else body.port,
        ttl=body.ttl,
        now=time.time(),
    )
    return Answer(201, view)


def renew_lease(context: Context, request: Request[LeaseName, Nothing, RenewBody]) -> Answer:
    return Answer(200, context.registry.leases.renew(request.path.name, request.body.ttl, time.time()))


def release_lease(context: Context, request: Request[LeaseName, Nothing, Nothing]) -> Answer:
    return Answer(200, context.registry.leases.release(request.path.name, time.time()))


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "listLeases",
        "GET",
        ALL,
        "All leases, by name.",
        handle=list_leases,
        parameters=Nothing,
        query=Page,
        body=Nothing,
        answers={200: LeasePage},
        private=True,
    ),
    Operation(
        "getLease",
        "GET",
        ONE,
        "One lease.",
        handle=get_lease,
        parameters=LeaseName,
        query=Nothing,
        body=Nothing,
        answers={200: LeaseView},
        errors=("not_found",),
        private=True,
    ),
    Operation(
        "putLease",
        "PUT",
        ONE,
        "Give an alias of a pool to a name, and a route to it, both or none.",
        handle=put_lease,
        parameters=LeaseName,
        query=Nothing,
        body=LeaseBody,
        answers={201: LeaseView},
        errors=("not_found", "conflict", "kernel"),
    ),
    Operation(
        "renewLease",
        "POST",
        "/v1/leases/{name}/renew",
        "Let a lease end later.",
        handle=renew_lease,
        parameters=LeaseName,
        query=Nothing,
        body=RenewBody,
        answers={200: LeaseView},
        errors=("not_found", "conflict"),
    ),
    Operation(
        "releaseLease",
        "DELETE",
        ONE,
        "Take the alias from a name: its route goes, its connections end, and nobody else gets it for a while.",
        handle=release_lease,
        parameters=LeaseName,
        query=Nothing,
        body=Nothing,
        answers={200: ReleasedView},
        errors=("not_found", "kernel"),
    ),
)
