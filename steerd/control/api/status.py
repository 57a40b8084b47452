"""How the daemon stands: workers, queues, counters, the table, conntrack."""

from __future__ import annotations

import time
from collections.abc import Set

from msgspec import Struct

from steerd.control.api.context import Context, Machinery
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Request
from steerd.control.leases import MAX_COUNT
from steerd.errors import KernelError
from steerd.model import Target

MAX_LOOKED_AT = 1024
"""Targets, each of which is a question to the kernel; monitors ask for the status every few seconds."""


class Holdings(Struct, frozen=True):
    """How much there is of what."""

    services: int
    endpoints: int
    pools: int
    aliases: int
    static_routes: int
    dynamic_routes: int
    """Those of leases, too."""
    leases: int
    quarantined: int
    targets: int
    """That the configuration names."""
    unheard_targets: int | None
    """Those of them in pools on which nobody listens now; null: they are too many to look at them each time
    (GET /v1/targets does), or the kernel does not say. What a connection wakes is not looked at, nor what keeps the
    client's port."""


class Status(Struct, frozen=True):
    """How it stands. Counters go on over restarts of the daemon, unless run_dir is emptied."""

    file: str
    machine: Machinery
    holds: Holdings


def get_status(context: Context, _request: Request[Nothing, Nothing, Nothing]) -> Answer:
    config, registry = context.config, context.registry
    pools = registry.leases.pools(time.time())
    routes = [registry.routes.count(service.name) for service in config.services]
    targets = {target for service in config.services for target in service.targets}
    holds = Holdings(
        services=len(config.services),
        endpoints=sum(len(service.endpoints) for service in config.services),
        pools=len(pools),
        aliases=min(sum(pool.ipv4 + pool.ipv6 for pool in pools), MAX_COUNT),
        static_routes=sum(static for static, _ in routes),
        dynamic_routes=sum(dynamic for _, dynamic in routes),
        leases=sum(pool.leased for pool in pools),
        quarantined=sum(pool.quarantined for pool in pools),
        targets=len(targets),
        unheard_targets=_unheard(context, targets),
    )
    return Answer(200, Status(config.file, context.machine.status(), holds))


def _unheard(context: Context, targets: Set[Target]) -> int | None:
    """On how many of them nobody listens, who should; None: that is not known."""
    if len(targets) > MAX_LOOKED_AT:
        return None
    pools = context.config.pools.values()
    asked = [
        target
        for target in targets
        if target.port
        and context.config.wake_of(target.address) is None
        and any(target.address in pool for pool in pools)
    ]
    try:
        return sum(not protocols for protocols in context.machine.listening(asked))
    except KernelError:  # all else can be said
        return None


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "getStatus",
        "GET",
        "/v1/status",
        "How it stands: workers, queues, counters, the kernel's table, conntrack.",
        handle=get_status,
        parameters=Nothing,
        query=Nothing,
        body=Nothing,
        answers={200: Status},
    ),
)
