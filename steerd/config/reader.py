"""From TOML to the structs of config.schema: unknown keys, missing keys, wrong types, numbers out of range; and how
mistakes are collected, each with its dotted key (routes and lists are counted from 0).
"""

from __future__ import annotations

import datetime
import difflib
import functools
import json
import operator
import re
import tomllib
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Struct

from steerd.errors import ConfigError, Problem

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_T = TypeVar("_T")
_S = TypeVar("_S", bound=Struct)


class Reader:
    """Reads structs out of TOML, collects mistakes, and remembers where they are."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._bad: set[str] = set()
        self._fields: dict[type[Struct], tuple[msgspec.structs.FieldInfo, ...]] = {}

    def problem(self, key: str, message: str) -> None:
        """Report a mistake at a dotted key."""
        self.problems.append(Problem(key, message))
        self._bad.update(("", key))
        self._bad.update(key[: end.start()] for end in re.finditer(r"[.\[]", key))

    def clear(self) -> None:
        """Forget all mistakes."""
        self.problems = []
        self._bad.clear()

    def is_bad(self, key: str) -> bool:
        """Whether a mistake was reported at this key or below it."""
        return key in self._bad

    def attempt(self, key: str, parse: Callable[[str], _T], text: str) -> _T | None:
        """What a function makes of a text; it raises ValueError with a sentence. None: it did, or the text's place was
        reported before."""
        if key in self._bad:
            return None
        try:
            return parse(text)
        except ValueError as error:
            self.problem(key, str(error))
            return None

    def read(self, kind: type[_S], value: object, path: str) -> _S:
        """A struct from a TOML table. What is missing or wrong is reported, and has its default or an empty value."""
        is_table = self._is_table(value, path)
        table: dict[str, object] = value if isinstance(value, dict) else {}
        fields = self._fields.get(kind)
        if fields is None:
            fields = self._fields[kind] = msgspec.structs.fields(kind)
        found: dict[str, object] = {}
        for field in fields:
            key = join(path, field.name)
            if field.name in table:
                found[field.name] = self._value(field.type, table[field.name], key)
            elif field.required and is_table:
                self.problem(key, f"Is missing; it must be {described(field.type)}.")
        if not table.keys() <= found.keys():
            names = [field.name for field in fields]
            for name in table:
                if name not in names:
                    self.problem(join(path, name), f"Is not a known key; {instead(name, names)}")
                    # What follows from the right one's absence is no other mistake.
                    self._bad.update(join(path, meant) for meant in close_to(name, names) if meant not in table)
        for field in fields:
            if found.get(field.name, msgspec.UNSET) is msgspec.UNSET:
                found.pop(field.name, None)
                if field.required:
                    found[field.name] = _empty(field.type)
        return kind(**found)

    def _value(self, kind: Any, value: object, path: str) -> object:
        """The value of a field; UNSET if it is wrong (and reported)."""
        kind = _without_none(kind)
        if _is_struct(kind):
            return self.read(kind, value, path)
        args = get_args(kind)
        if get_origin(kind) is dict and isinstance(value, dict) and _is_struct(args[1]):
            tables = ((name, table, join(path, name)) for name, table in value.items())
            return {name: self.read(args[1], table, key) for name, table, key in tables if self._is_table(table, key)}
        if get_origin(kind) is list and isinstance(value, list):
            if _is_struct(args[0]):
                return [self.read(args[0], table, f"{path}[{index}]") for index, table in enumerate(value)]
            items = (self._leaf(args[0], text, f"{path}[{index}]") for index, text in enumerate(value))
            return ["" if item is msgspec.UNSET else item for item in items]
        return self._leaf(kind, value, path)

    def _is_table(self, value: object, path: str) -> bool:
        if not isinstance(value, dict):
            self.problem(path, f"Must be a table, not {shown(value)}.")
        return isinstance(value, dict)

    def _leaf(self, kind: Any, value: object, path: str) -> object:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            self.problem(path, f"Must be {described(kind)}, not {shown(value)}.")
            return msgspec.UNSET


def parse_toml(text: str, file: str) -> dict[str, Any]:
    """A file as TOML. Raises ConfigError, with the line as its key."""
    try:
        return tomllib.loads(text)
    except ValueError as error:
        message = str(error)
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
        line = place[1] if place and place[1] else str(len(text.splitlines()))
        reason = message[: place.start()] if place else message
        raise ConfigError(file, [Problem(f"line {line}", f"Is not TOML: {reason}.")]) from error


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def _without_none(kind: Any) -> Any:
    """`X | None` as X: TOML has no null, so None only ever means "not written"."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    return functools.reduce(operator.or_, (part for part in get_args(kind) if part is not types.NoneType))


def _empty(kind: Any) -> object:
    """What stands for a required value that is missing or wrong."""
    if get_origin(kind) is list:
        return []
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    return "" if kind is str else None


def described(kind: Any) -> str:
    """A type in an operator's words."""
    kind = _without_none(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"a {'whole ' if args[0] is int else ''}number from {args[1].ge} to {args[1].le}"
    if origin in (Union, types.UnionType):
        return " or ".join(described(part) for part in args)
    if origin is Literal:
        return " or ".join(f'"{word}"' for word in args)
    if origin is list:
        return "a list of tables" if _is_struct(args[0]) else "a list of texts in quotes"
    if kind is Any:
        return 'a target such as "10.64.0.1:8080"'
    return {str: "text in quotes", bool: "true or false"}.get(kind, "a table")


def shown(value: object) -> str:
    """A TOML value, short and on one line."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else f"{value[:60]}...", ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, datetime.date | datetime.time):
        return "a date or time"
    return str(value)


def join(path: str, key: str) -> str:
    """A dotted key, and one more word behind it, in quotes where TOML wants them."""
    key = key if _NAME.fullmatch(key) else json.dumps(key)
    return f"{path}.{key}" if path else key


def close_to(word: str, known: Iterable[str]) -> list[str]:
    """Which of the words that are known is meant, if it is one of them."""
    return difflib.get_close_matches(word, list(known), n=1)


def instead(word: str, known: Iterable[str]) -> str:
    """The second half of a sentence about a word that is not known."""
    known = list(known)
    close = close_to(word, known)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known here: {', '.join(known)}." if known else "there is none yet."


def check_name(kind: str, name: str, reader: Reader) -> None:
    """Report the name of a pool or a service that cannot be used; `kind` is the table that holds it."""
    if not _NAME.fullmatch(name):
        reader.problem(
            join(kind, name), "Is not a usable name; up to 64 of the letters A-Z, a-z, 0-9, _ and - would be."
        )
