"""Drains: targets that take no new connections, and how many are left (control.drains)."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing

from msgspec import Struct

from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Request
from steerd.control.drains import DrainView
from steerd.control.flows import Chooser, Wanted
from steerd.control.places import parse_place
from steerd.model import IPAddress, Target

ALL = "/v1/drains"
ONE = "/v1/drains/{target}"


class DrainTarget(Struct, frozen=True):
    """What is drained: `10.64.0.1:8080` or `10.64.0.1:same`, as in a route, or all of `10.64.0.1`."""

    target: str


class Drain(Struct, frozen=True):
    """One drain, and what is left there."""

    target: str
    since: int
    """Seconds since the epoch."""
    connections: int
    """Connections that neither side has ended, and flows of datagrams, as conntrack knows them now."""


class DrainList(Struct, frozen=True):
    """All drains."""

    drains: list[Drain]


def list_drains(context: Context, _request: Request[Nothing, Nothing, Nothing]) -> Answer:
    views = context.registry.drains.all()
    return Answer(200, DrainList(_counted(context, views) if views else []))


def get_drain(context: Context, request: Request[DrainTarget, Nothing, Nothing]) -> Answer:
    (drain,) = _counted(context, [context.registry.drains.get(request.path.target)])
    return Answer(200, drain)


def put_drain(context: Context, request: Request[DrainTarget, Nothing, Nothing]) -> Answer:
    view, is_new = context.registry.drains.add(request.path.target, time.time())
    (drain,) = _counted(context, [view])
    return Answer(201 if is_new else 200, drain)


def delete_drain(context: Context, request: Request[DrainTarget, Nothing, Nothing]) -> Answer:
    context.registry.drains.remove(request.path.target)
    return Answer(204, None)


def _counted(context: Context, views: list[DrainView]) -> list[Drain]:
    """Drains, each with what is left there, from one look at conntrack."""
    places = [parse_place(view.target) for view in views]
    # What keeps the client's port may have come to any.
    wanted = Wanted(target=Target(places[0].address, places[0].port or 0)) if len(places) == 1 else Wanted()
    left = connections_left(context, wanted)
    return [
        Drain(view.target, view.since, left.at(place.address, place.port or 0))
        for view, place in zip(views, places, strict=True)
    ]


class Left:
    """How many connections there are, by where they are delivered."""

    def __init__(self) -> None:
        self._ports: dict[bytes, Counter[int]] = {}

    def add(self, address: bytes, port: int) -> None:
        self._ports.setdefault(address, Counter())[port] += 1

    def at(self, address: IPAddress, port: int) -> int:
        """To a target; port 0: to whichever."""
        ports = self._ports.get(address.packed, Counter())
        return ports[port] if port else ports.total()


def connections_left(context: Context, wanted: Wanted) -> Left:
    """Count, from one look at conntrack, the steered connections that are wanted and not over. Raises KernelError."""
    chooser = Chooser(context.registry, wanted)
    left = Left()
    with closing(context.machine.entries(chooser.only_target)) as entries:
        for entry in entries:
            if chooser.service_of(entry) is not None:
                left.add(entry.delivered.dst, entry.delivered.dport)
    return left


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "listDrains",
        "GET",
        ALL,
        "All drains, and how many connections are left at each.",
        handle=list_drains,
        parameters=Nothing,
        query=Nothing,
        body=Nothing,
        answers={200: DrainList},
        errors=("kernel",),
    ),
    Operation(
        "getDrain",
        "GET",
        ONE,
        "One drain, and how many connections are left there.",
        handle=get_drain,
        parameters=DrainTarget,
        query=Nothing,
        body=Nothing,
        answers={200: Drain},
        errors=("not_found", "kernel"),
    ),
    Operation(
        "putDrain",
        "PUT",
        ONE,
        "Let a target, or all targets of an address, take no new connections; those that are there go on.",
        handle=put_drain,
        parameters=DrainTarget,
        query=Nothing,
        body=Nothing,
        answers={200: Drain, 201: Drain},
        errors=("not_found", "conflict", "kernel"),
    ),
    Operation(
        "deleteDrain",
        "DELETE",
        ONE,
        "Let a target take connections again.",
        handle=delete_drain,
        parameters=DrainTarget,
        query=Nothing,
        body=Nothing,
        answers={204: None},
        errors=("not_found",),
    ),
)
