"""The registry as text, and back (control.transfer)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from steerd.control import transfer
from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Lines, Nothing, Operation, Request


class ImportQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The number of the first line, for messages."""

    line: Annotated[int, Meta(ge=1)] = 1


def export_registry(context: Context, _request: Request[Nothing, Nothing, Nothing]) -> Answer:
    return Answer(200, transfer.export(context.registry))


def import_registry(context: Context, request: Request[Nothing, ImportQuery, Lines]) -> Answer:
    return Answer(200, transfer.load(context.registry, request.body.text, request.query.line))


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "export",
        "GET",
        "/v1/export",
        "The routes that were added, and the leases, as JSON lines; the same content gives the same text.",
        handle=export_registry,
        parameters=Nothing,
        query=Nothing,
        body=Nothing,
        answers={200: Lines},
        private=True,
    ),
    Operation(
        "import",
        "POST",
        "/v1/import",
        "Add the routes and leases of such lines, all or none; nothing is removed, and what is there stays.",
        handle=import_registry,
        parameters=Nothing,
        query=ImportQuery,
        body=Lines,
        answers={200: transfer.Loaded},
        errors=("not_found", "conflict"),
        at_once=2,
    ),
)
