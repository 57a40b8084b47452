"""Pools of the configuration in force, and their aliases: who has which."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from msgspec import Meta, Struct

from steerd.control.api.context import Context
from steerd.control.api.operation import MAX_PAGE, Answer, AnyOperation, Nothing, Operation, Request
from steerd.control.leases import AliasView, PoolView


class PoolList(Struct, frozen=True):
    """All pools."""

    pools: list[PoolView]


class AliasQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose aliases, and what part of the list; `state` leaves the others out."""

    pool: str
    state: Literal["leased", "quarantined"] | None = None
    after: Annotated[int, Meta(ge=-1, le=(1 << 63) - 1)] = -1
    """An index; the `next` of the page before."""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE


class AliasPage(Struct, frozen=True):
    """A part of the aliases of a pool; `next` is the `after` of the next part."""

    aliases: list[AliasView]
    next: int | None


def list_pools(context: Context, _request: Request[Nothing, Nothing, Nothing]) -> Answer:
    return Answer(200, PoolList(context.registry.leases.pools(time.time())))


def list_aliases(context: Context, request: Request[Nothing, AliasQuery, Nothing]) -> Answer:
    query = request.query
    found = context.registry.leases.aliases(query.pool, query.state, query.after + 1, query.limit + 1, time.time())
    page = found[: query.limit]
    return Answer(200, AliasPage(page, page[-1].index if len(found) > query.limit else None))


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "listPools",
        "GET",
        "/v1/pools",
        "The pools, and how much of each is leased.",
        handle=list_pools,
        parameters=Nothing,
        query=Nothing,
        body=Nothing,
        answers={200: PoolList},
    ),
    Operation(
        "listAliases",
        "GET",
        "/v1/aliases",
        "The aliases of a pool, by index, and who has each.",
        handle=list_aliases,
        parameters=Nothing,
        query=AliasQuery,
        body=Nothing,
        answers={200: AliasPage},
        errors=("not_found",),
    ),
)
