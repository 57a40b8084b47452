"""Flows that conntrack knows (control.flows)."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from steerd.control import flows
from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Lines, Nothing, Operation, Request
from steerd.control.flows import Chooser
from steerd.errors import RequestError

ALL = "/v1/flows"

_LINES = 500
"""At a time: then others get their turn."""


class FlowQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which flows: of a client (an address or a prefix), a service, a target (ADDRESS or ADDRESS:PORT), a lease; with
    `over`, also those that are closed and that the kernel keeps for a while; at most `limit`."""

    client: str | None = None
    service: str | None = None
    target: str | None = None
    lease: str | None = None
    over: bool = False
    limit: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)] | None = None


class KillQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which flows, as in a list of them; at least one of these must be there."""

    client: str | None = None
    service: str | None = None
    target: str | None = None
    lease: str | None = None


class Killed(Struct, frozen=True):
    """How many flows were ended."""

    flows: int


def list_flows(context: Context, request: Request[Nothing, FlowQuery, Nothing]) -> Answer:
    query = request.query
    wanted = flows.wanted(query.client, query.service, query.target, query.lease, query.over)
    chooser = Chooser(context.registry, wanted)
    return Answer(200, _lines(context, chooser, query.limit))


def _lines(context: Context, chooser: Chooser, limit: int | None) -> Generator[bytes, None, None]:
    with closing(context.machine.entries(chooser.only_target)) as entries:
        named = ((entry, chooser.service_of(entry)) for entry in entries)
        chosen = ((entry, service) for entry, service in named if service is not None)
        lines = map(msgspec.json.encode, flows.views(context.registry, islice(chosen, limit), time.time()))
        while some := list(islice(lines, _LINES)):
            yield b"\n".join(some) + b"\n"


def kill_flows(context: Context, request: Request[Nothing, KillQuery, Nothing]) -> Answer:
    query = request.query
    if query == KillQuery():
        raise RequestError("invalid", None, "Say which flows: client, service, target or lease.")
    chooser = Chooser(context.registry, flows.wanted(query.client, query.service, query.target, query.lease))
    ended = context.machine.end_flows(chooser.only_target, lambda entry: chooser.service_of(entry) is not None)
    return Answer(200, Killed(ended))


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "listFlows",
        "GET",
        ALL,
        "The connections, and flows of datagrams, that were steered and that conntrack knows now, as JSON lines.",
        handle=list_flows,
        parameters=Nothing,
        query=FlowQuery,
        body=Nothing,
        answers={200: Lines},
        errors=("not_found", "kernel"),
        private=True,
    ),
    Operation(
        "killFlows",
        "DELETE",
        ALL,
        "End such flows: sockets of daemons on this machine are closed, clients reset, and conntrack forgets them.",
        handle=kill_flows,
        parameters=Nothing,
        query=KillQuery,
        body=Nothing,
        answers={200: Killed},
        errors=("not_found", "kernel"),
    ),
)
