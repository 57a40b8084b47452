"""All operations of the API, and the one that describes them all."""

from __future__ import annotations

import functools

from steerd.control.api import (
    document,
    drains,
    explain,
    flows,
    leases,
    log,
    pools,
    reload,
    routes,
    services,
    sessions,
    status,
    targets,
    transfer,
)
from steerd.control.api.context import Context
from steerd.control.api.document import Document
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Request


def get_document(_context: Context, _request: Request[Nothing, Nothing, Nothing]) -> Answer:
    return Answer(200, _document())


@functools.cache
def _document() -> Document:
    return document.describe(OPERATIONS)


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "getDocument",
        "GET",
        "/v1/openapi.json",
        "This document.",
        handle=get_document,
        parameters=Nothing,
        query=Nothing,
        body=Nothing,
        answers={200: Document},
    ),
    *status.OPERATIONS,
    *services.OPERATIONS,
    *pools.OPERATIONS,
    *targets.OPERATIONS,
    *drains.OPERATIONS,
    *sessions.OPERATIONS,
    *routes.OPERATIONS,
    *leases.OPERATIONS,
    *flows.OPERATIONS,
    *transfer.OPERATIONS,
    *explain.OPERATIONS,
    *reload.OPERATIONS,
    *log.OPERATIONS,
)
