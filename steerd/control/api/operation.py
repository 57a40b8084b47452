"""What an operation of the API is made of, and the parts that many have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from msgspec import Meta, Struct

from steerd.control.api.context import Context

MAX_PAGE = 1000
CODES = {
    "invalid": 400,
    "forbidden": 403,
    "not_found": 404,
    "not_allowed": 405,
    "too_slow": 408,
    "conflict": 409,
    "configuration": 409,
    "too_large": 413,
    "fault": 500,
    "registry": 503,
    "kernel": 503,
}
"""The codes of errors, and the status of each. `configuration`: the file has mistakes, or cannot be put in force now.
`registry`: it cannot be written, or is full. `kernel`: it refused what is needed. `fault`: our own, and in the log."""

P = TypeVar("P")
Q = TypeVar("Q")
B = TypeVar("B")

Method = Literal["GET", "PUT", "POST", "DELETE"]


class Problem(Struct, frozen=True):
    """What everything but success looks like."""

    code: str
    field: str | None
    message: str


class Nothing(Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters, or no body."""


class Page(Struct, frozen=True, forbid_unknown_fields=True):
    """What part of a list is wanted."""

    after: str = ""
    """The `next` of the page before."""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE


class Lines(NamedTuple):
    """A body of JSON lines (application/x-ndjson), as they came."""

    text: bytes


@dataclass(frozen=True, slots=True)
class Request(Generic[P, Q, B]):
    """What is asked for, checked."""

    path: P
    query: Q
    body: B


class Answer(NamedTuple):
    """What is answered: one of the operation's statuses, and what belongs to it."""

    status: int
    value: Struct | Generator[bytes, None, None] | None
    """As JSON; a generator as JSON lines, some at a time; None: nothing."""


@dataclass(frozen=True, slots=True)
class Operation(Generic[P, Q, B]):
    """One line of the table: what can be asked for, and what comes back."""

    name: str
    """As OpenAPI's operationId."""
    method: Method
    path: str
    """With {fields} of `parameters`."""
    sentence: str
    handle: Callable[[Context, Request[P, Q, B]], Answer] | Callable[[Context, Request[P, Q, B]], Awaitable[Answer]]
    parameters: type[P]
    """Of the path."""
    query: type[Q]
    body: type[B]
    """A Struct, as JSON; Lines; Nothing."""
    answers: Mapping[int, type[Struct | Lines] | None]
    errors: tuple[str, ...] = ()
    """Codes, beside those that every operation may have."""
    at_once: int | None = None
    """How many of it are carried out at a time, for what takes much memory or time; None: any number."""
    private: bool = False
    """Not on the read-only socket: who reads it may learn what lets him in somewhere."""


AnyOperation = Operation[Any, Any, Any]
