"""The API's table of operations, the routes that are made of it and the document that describes it say the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from steerd.control.api.operation import CODES, AnyOperation, Nothing, Request
from steerd.control.api.table import OPERATIONS
from steerd.control.registry import Registry
from tests.unit.test_api import Served, serving
from tests.unit.test_sessions_table import publish


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Served]:
    registry = Registry(str(tmp_path))
    publish(registry)
    with serving(registry, tmp_path) as served:
        yield served
    registry.close()


@pytest.fixture
def document(api: Served) -> Any:
    status, found = api.ask("GET", "/v1/openapi.json")
    assert status == 200
    return found


def test_every_operation_is_in_the_document_and_there_is_no_other(document: Any) -> None:
    described = {
        (method.upper(), path): operation["operationId"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert described == {(operation.method, operation.path): operation.name for operation in OPERATIONS}
    assert len(set(described.values())) == len(OPERATIONS)


def test_every_operation_of_the_document_is_served_and_no_other(api: Served, document: Any) -> None:
    for path, methods in document["paths"].items():
        with api.connection() as connection:
            connection.request("OPTIONS", path.replace("{", "").replace("}", ""))
            answer = connection.getresponse()
            assert answer.status == 405
            assert set(answer.headers["Allow"].lower().split(",")) - {"head"} == methods.keys()


def test_every_reference_of_the_document_leads_somewhere(document: Any) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, each in value.items():
                if key == "$ref":
                    yield each
                else:
                    yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    found = {name.removeprefix("#/components/schemas/") for name in references(document)}
    assert found <= document["components"]["schemas"].keys()
    assert "Problem" in found


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_operation_is_whole(operation: AnyOperation) -> None:
    named = {part[1:-1] for part in operation.path.split("/") if part.startswith("{")}
    assert set(operation.parameters.__struct_fields__) == named
    assert operation.sentence.endswith(".")
    assert set(operation.errors) <= CODES.keys()
    assert min(operation.answers) < 300
    if operation.method == "GET":
        assert operation.body is Nothing
    # What the function says it takes is what it gets: the table's types are Any for the type checker.
    (request,) = (
        hint for hint in get_type_hints(operation.handle).values() if getattr(hint, "__origin__", None) is Request
    )
    assert get_args(request) == (operation.parameters, operation.query, operation.body)
    assert len(inspect.signature(operation.handle).parameters) == 2


def test_head_is_get_without_the_body(api: Served) -> None:
    for operation in OPERATIONS:
        if operation.method != "GET":
            continue
        url = operation.path.replace("{", "").replace("}", "")
        with api.connection() as connection:
            statuses = []
            for method in ("HEAD", "GET"):  # over one connection: a body that nobody expects is taken for an answer
                connection.request(method, url)
                answer = connection.getresponse()
                body = answer.read()
                statuses.append(answer.status)
                assert method == "GET" or body == b"", url
            assert statuses[0] == statuses[1], url
