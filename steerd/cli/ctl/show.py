"""How answers look: tables for people, JSON for programs."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from rich.console import Console

_UNBOUNDED = 10_000
WIDTH, HEIGHT = 80, 24
"""The screen that what is called one screen fits into, with the line of the command."""
SHOWN = 1000
"""Rows of a table, unless --limit says otherwise."""


def said(value: object, text: str, as_json: bool) -> None:
    """One thing: as JSON, or as a line for people."""
    typer.echo(json.dumps(value) if as_json else text)


class List(NamedTuple):
    """What a list looks like as a table."""

    title: str
    columns: tuple[str, ...]
    row: Callable[[dict[str, Any]], tuple[str, ...]]


def listed(
    looks: List,
    config: Path,
    limit: int | None,
    as_json: bool,
    what: str,
    *path: str,
    query: dict[str, str] | None = None,
) -> None:
    """A list of the API: as a JSON array, or as a table, of which not more is shown than somebody may want to read."""
    from steerd.cli.ctl import ask

    if as_json:
        typer.echo(json.dumps(ask.pages(config, what, *path, query=query, at_most=limit)))
        return
    at_most = limit or SHOWN
    found = ask.pages(config, what, *path, query=query, at_most=at_most + 1)
    table(looks, found[:at_most], is_all=len(found) <= at_most)


def table(looks: List, found: list[dict[str, Any]], *, is_all: bool) -> None:
    """A table, and whether it is all. On a terminal it has no more than it needs, since there the width is what lacks:
    no lines between columns, and no column without a word in it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns, rows = looks.columns, [looks.row(each) for each in found]
    if sys.stdout.isatty():
        used = [place for place in range(len(columns)) if not rows or any(row[place] for row in rows)]
        columns, rows = tuple(columns[place] for place in used), [tuple(row[place] for place in used) for row in rows]
        made = Table(*columns, title=looks.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    else:
        made = Table(*columns, title=looks.title)
    for row in rows:
        made.add_row(*(Text(text, overflow="fold") for text in row))
    console().print(made)
    if not is_all:
        typer.echo("There are more; see --limit.")


def beside(left: list[str], right: list[str]) -> list[str]:
    """Two columns of lines."""
    both = itertools.zip_longest(left, right, fillvalue="")
    return [f"{one:<{WIDTH // 2}}{other}".rstrip() for one, other in both]


def console() -> Console:
    """For tables. Who reads them from a file or a pipe gets every line whole."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _UNBOUNDED)


def moment(seconds: float | None) -> str:
    """A time (seconds since the epoch) in local time, or `never`."""
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def age(moment: float) -> float:
    """Seconds since then."""
    return max(0.0, time.time() - moment)


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
