"""How the daemon stands: workers, queues, counters, the table, conntrack."""

from __future__ import annotations

import time

from msgspec import Struct

from steerd.control.api.context import Context, Machinery
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Request
from steerd.control.leases import MAX_COUNT


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


class Status(Struct, frozen=True):
    """How it stands. Counters go on over restarts of the daemon, unless run_dir is emptied."""

    file: str
    machine: Machinery
    holds: Holdings


def get_status(context: Context, _request: Request[Nothing, Nothing, Nothing]) -> Answer:
    config, registry = context.config, context.registry
    pools = registry.leases.pools(time.time())
    routes = [registry.routes.count(service.name) for service in config.services]
    holds = Holdings(
        services=len(config.services),
        endpoints=sum(len(service.endpoints) for service in config.services),
        pools=len(pools),
        aliases=min(sum(pool.ipv4 + pool.ipv6 for pool in pools), MAX_COUNT),
        static_routes=sum(static for static, _ in routes),
        dynamic_routes=sum(dynamic for _, dynamic in routes),
        leases=sum(pool.leased for pool in pools),
        quarantined=sum(pool.quarantined for pool in pools),
    )
    return Answer(200, Status(config.file, context.machine.status(), holds))


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
