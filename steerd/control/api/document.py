"""The OpenAPI 3.1 document of a table of operations (https://spec.openapis.org/oas/v3.1.0)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import msgspec
from msgspec import Struct

from steerd.control.api.operation import CODES, AnyOperation, Lines, Nothing, Problem

_COMPONENT = "#/components/schemas/{name}"
_OF_EVERY_OPERATION = ("invalid", "forbidden", "fault", "registry")
_READ_ONLY = "On both sockets."
_READ_WRITE = "Not on the read-only socket."
_JSON_LINES = {"application/x-ndjson": {"schema": {"type": "string"}}}


class Document(Struct, frozen=True):
    """An OpenAPI document."""

    openapi: str
    info: dict[str, Any]
    servers: list[dict[str, str]]
    paths: dict[str, dict[str, Any]]
    components: dict[str, Any]


def describe(operations: Iterable[AnyOperation]) -> Document:
    """The document that says of these operations what the table says of them."""
    operations = tuple(operations)
    kinds = [kind for operation in operations for kind in (operation.body, *operation.answers.values())]
    components = _components(
        {Problem, *(kind for kind in kinds if kind is not None and issubclass(kind, Struct) and kind is not Nothing)}
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return Document(
        openapi="3.1.0",
        info={
            "title": "steerd",
            "version": metadata.version("steerd"),
            "description": "HTTP and JSON on a unix socket, api.sock in run_dir; the host in the URL means nothing.",
        },
        servers=[{"url": "http://steerd"}],
        paths=paths,
        components={"schemas": components},
    )


def _described(operation: AnyOperation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.sentence,
        "description": _READ_ONLY if operation.method == "GET" and not operation.private else _READ_WRITE,
        "parameters": [*_parameters(operation.parameters, "path"), *_parameters(operation.query, "query")],
        "responses": _responses(operation),
    }
    if operation.body is not Nothing:
        described["requestBody"] = {"required": True, "content": _content(operation.body)}
    return described


def _parameters(kind: type[Struct], where: str) -> list[dict[str, Any]]:
    """Each field of a struct as a parameter."""
    schema = _components({kind})[kind.__name__]
    required = schema.get("required", ())
    return [
        {"name": name, "in": where, "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]


def _responses(operation: AnyOperation) -> dict[str, Any]:
    codes: dict[int, list[str]] = {}
    for code in (*_OF_EVERY_OPERATION, *operation.errors):
        codes.setdefault(CODES[code], []).append(code)
    if operation.body is not Nothing:
        codes |= {CODES[code]: [code] for code in ("too_large", "too_slow")}
    failures = {
        str(status): {"description": f"Code: {', '.join(names)}.", "content": _content(Problem)}
        for status, names in codes.items()
    }
    successes = {
        str(status): {"description": "Done."} if kind is None else {"description": "Done.", "content": _content(kind)}
        for status, kind in operation.answers.items()
    }
    return dict(sorted((failures | successes).items()))


def _content(kind: type[Struct | Lines]) -> Mapping[str, Any]:
    if kind is Lines:
        return _JSON_LINES
    return {"application/json": {"schema": {"$ref": _COMPONENT.format(name=kind.__name__)}}}


def _components(kinds: Iterable[type[Struct]]) -> dict[str, Any]:
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components(ordered, ref_template=_COMPONENT)
    return dict(components)
