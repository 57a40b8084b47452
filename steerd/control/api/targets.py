"""Targets that have an id, and what is known of them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from steerd.control.api.context import Context
from steerd.control.api.drains import connections_left
from steerd.control.api.operation import MAX_PAGE, Answer, AnyOperation, Nothing, Operation, Request
from steerd.control.flows import Wanted
from steerd.model import DEAD, DRAINED, PROTOCOL_NAMES


class TargetQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """What part of the list is wanted."""

    after: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] = 0
    """An id; the `next` of the page before."""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE
    connections: bool = False
    """Whether connections are to be counted, which takes a look at all of conntrack."""


class TargetView(Struct, frozen=True):
    """One target for people and programs outside."""

    id: int
    """As in the packet mark; it never stands for another target."""
    target: str
    pool: str | None
    """None: its address is in no pool of the configuration in force."""
    lease: str | None
    relayed: str | None
    """The daemon on a unix socket that is reached there; None: there is none."""
    drained: bool
    """It takes no new connections."""
    dead: list[str]
    """Protocols, `tcp` or `udp`, for which it was looked whether somebody listens there, and nobody does."""
    listening: list[str] | None
    """Protocols in which something listens there now; null: it is on another host, or on whichever port."""
    connections: int | None
    """Connections that neither side has ended, and flows of datagrams; null: they were not counted."""


class TargetPage(Struct, frozen=True):
    """A part of the targets; `next` is the `after` of the next part."""

    targets: list[TargetView]
    next: int | None


def list_targets(context: Context, request: Request[Nothing, TargetQuery, Nothing]) -> Answer:
    query = request.query
    found = context.registry.targets(query.after + 1, query.limit + 1)
    pools = context.config.pools.values()
    views = []
    listening = context.machine.listening([target for _, target, _ in found[: query.limit]])
    left = connections_left(context, Wanted()) if query.connections else None
    for (id_, target, lease), protocols in zip(found[: query.limit], listening, strict=True):
        state = context.machine.target_state(id_)
        dead = [PROTOCOL_NAMES[protocol] for protocol, bit in DEAD.items() if state & bit]
        pool = next((pool.name for pool in pools if target.address in pool), None)
        (written,) = context.registry.written([target])
        relayed = written if written != str(target) else None
        views.append(
            TargetView(
                id_,
                str(target),
                pool,
                lease,
                relayed,
                bool(state & DRAINED),
                dead,
                None if pool is None or not target.port else [PROTOCOL_NAMES[each] for each in protocols],
                None if left is None else left.at(target.address, target.port),
            )
        )
    return Answer(200, TargetPage(views, views[-1].id if len(found) > query.limit else None))


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "listTargets",
        "GET",
        "/v1/targets",
        "All targets that ever had an id, by id. One that is led to no more keeps its id.",
        handle=list_targets,
        parameters=Nothing,
        query=TargetQuery,
        body=Nothing,
        answers={200: TargetPage},
        errors=("kernel",),
    ),
)
