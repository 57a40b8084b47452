"""The API against its own document: whatever is sent, as the document says or otherwise, is answered as the document
says, and never with a fault.

The API runs in a process of its own (tests/api_process.py); schemathesis makes requests of the document.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema

from steerd.control.api.document import describe
from steerd.control.api.operation import Nothing
from steerd.control.api.table import OPERATIONS
from tests.unit.test_api import Served

ROOT = Path(__file__).parents[2]
EXAMPLES = 8
# Names that mean something, so that more than a 404 is found.
KNOWN = {
    "service": ["tv", "web"],
    "pool": ["tenants"],
    "name": ["a", "b"],
    "id": ["toml", "new"],
    "when": ['{"http.host": "a.example"}', "{}"],
    "target": ["10.64.0.1:443", "[fd00:64::1]:same"],
    "source": ["198.51.100.0/24", "2001:db8::/32"],
    "to": ["203.0.113.10:443", "203.0.113.10:443/udp", "[2001:db8::10]:70000"],
}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("api")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.api_process", str(directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    registry: Any = None  # it is in the other process
    yield Served(registry, directory, [], [])
    _, said = process.communicate()
    assert (process.returncode, said) == (0, "")


def aimed(described: Any) -> Any:
    """A document whose strings are often names that are known."""
    if isinstance(described, list):
        return [aimed(each) for each in described]
    if not isinstance(described, dict):
        return described
    made = {key: aimed(value) for key, value in described.items()}
    if made.get("in") in ("path", "query") and made["name"] in KNOWN:
        made["schema"] = {"anyOf": [{"enum": KNOWN[made["name"]]}, made["schema"]]}
    for name, schema in made.get("properties", {}).items():
        if name in KNOWN and "/components" not in str(schema) and name != "when":
            made["properties"][name] = {"anyOf": [{"enum": KNOWN[name]}, schema]}
    return made


@functools.cache
def schema() -> OpenApiSchema:
    """What schemathesis makes of the document."""
    return schemathesis.openapi.from_dict(aimed(msgspec.to_builtins(describe(OPERATIONS))))


def sent(api: Served, case: Case[Any]) -> Response:
    """What the API answers."""
    request = requests.Request(**case.as_transport_kwargs(base_url="http://steerd")).prepare()
    method, body = request.method, request.body
    assert method is not None and (body is None or isinstance(body, bytes | str))
    with api.connection() as connection:
        connection.request(method, request.path_url, body, dict(request.headers))
        answer = connection.getresponse()
        content = answer.read()
        headers = {name: [value] for name, value in answer.getheaders()}
        return Response(answer.status, headers, content, request, 0.0, verify=False)


@schemathesis.serializer("application/x-ndjson")
def as_lines(_context: object, value: object) -> bytes:
    """Texts as they are, and what is no text as JSON."""
    return value.encode(errors="replace") if isinstance(value, str) else msgspec.json.encode(value)


def to_be_tried() -> Iterator[tuple[str, GenerationMode]]:
    """Each operation with what the document allows, and those that take more than names with what it does not."""
    for operation in OPERATIONS:
        yield operation.name, GenerationMode.POSITIVE
        if operation.query is not Nothing or operation.body is not Nothing:
            yield operation.name, GenerationMode.NEGATIVE


@pytest.mark.parametrize(("name", "mode"), list(to_be_tried()))
def test_every_answer_is_as_the_document_says(api: Served, name: str, mode: GenerationMode) -> None:
    operation = schema().find_operation_by_id(name)

    @settings(max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Case[Any]) -> None:
        case.validate_response(sent(api, case), checks=CHECKS)

    check()
