"""The configuration file, put in force anew."""

from __future__ import annotations

import asyncio

from msgspec import Struct

from steerd.control import elsewhere
from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Request
from steerd.errors import ConfigError


class Mistake(Struct, frozen=True):
    """One mistake in the file: where (a dotted key, or null) and what."""

    key: str | None
    message: str


class Refused(Struct, frozen=True):
    """Why the file is not in force. `message` says all of it; what was in force stays."""

    code: str
    field: str | None
    message: str
    file: str
    problems: list[Mistake]


class Reloaded(Struct, frozen=True):
    """What is in force now."""

    file: str
    services: int
    pools: int
    warnings: list[str]
    """What cannot work now, though nothing is wrong with the file: endpoints at addresses that are not here."""


async def reload(context: Context, _request: Request[Nothing, Nothing, Nothing]) -> Answer:
    problem = await context.machine.reload()
    config = context.registry.routes.force.config
    if isinstance(problem, ConfigError):
        mistakes = [Mistake(each.key, each.message) for each in problem.problems]
        return Answer(409, Refused("configuration", mistakes[0].key, str(problem), problem.file, mistakes))
    if problem is not None:
        mistakes = [Mistake(None, str(problem))]
        return Answer(409, Refused("configuration", None, str(problem), config.file, mistakes))
    warnings = await asyncio.to_thread(elsewhere.sentences, config, context.machine.elsewhere)
    return Answer(200, Reloaded(config.file, len(config.services), len(config.pools), warnings))


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "reload",
        "POST",
        "/v1/reload",
        "Put what the configuration file says now in force; answered when it is, or with its mistakes (409).",
        handle=reload,
        parameters=Nothing,
        query=Nothing,
        body=Nothing,
        answers={200: Reloaded, 409: Refused},
        errors=("kernel",),
    ),
)
