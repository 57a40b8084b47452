"""How answers look: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

_UNBOUNDED = 10_000


def said(value: object, text: str, as_json: bool) -> None:
    """One thing: as JSON, or as a line for people."""
    typer.echo(json.dumps(value) if as_json else text)


def listed(
    found: list[dict[str, Any]],
    as_json: bool,
    title: str,
    columns: Iterable[str],
    row: Callable[[dict[str, Any]], Iterable[str]],
) -> None:
    """A list: as a JSON array, or as a table."""
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title)
    for each in found:
        table.add_row(*(Text(text, overflow="fold") for text in row(each)))
    console().print(table)


def console() -> Console:
    """For tables. Who reads them from a file or a pipe gets every line whole."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _UNBOUNDED)


def moment(seconds: float | None) -> str:
    """A time (seconds since the epoch) in local time, or `never`."""
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    left = int(seconds)
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size}{unit}")
            left %= size
    return " ".join(parts[:2])


def conditions(route: dict[str, Any]) -> str:
    """What a route compares."""
    return " ".join(f"{key}={value}" for key, value in route["when"].items()) or "any"
