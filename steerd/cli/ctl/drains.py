"""`steerctl drain`, `undrain` and `drains`."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from steerd.cli.common import Exit
from steerd.cli.ctl import ask, complete, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json

_LOOK_SECONDS = 0.5

Drained = Annotated[
    str,
    typer.Argument(
        help="ADDRESS:PORT or ADDRESS:same, as in a route, or ADDRESS for all its targets.",
        metavar="TARGET",
        autocompletion=complete.drains,
    ),
]


def drain(
    target: Annotated[
        str,
        typer.Argument(
            help="ADDRESS:PORT or ADDRESS:same, as in a route, or ADDRESS for all its targets.", metavar="TARGET"
        ),
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Until no connection is left there.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="With --wait: give up after so many seconds, with status 1.", min=0.0)
    ] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Let a target take no new connections; those that are there go on. It stays so until `undrain`."""
    left = ask.request(config, "PUT", "drains", target)
    give_up = None if timeout is None else time.monotonic() + timeout
    while wait and left["connections"] and (give_up is None or time.monotonic() < give_up):
        before = left["connections"]
        time.sleep(_LOOK_SECONDS)
        left = ask.request(config, "GET", "drains", target)
        if left["connections"] != before and sys.stderr.isatty():
            typer.echo(_line(left), err=True)
    show.said(left, _line(left), as_json)
    if wait and left["connections"]:
        raise typer.Exit(Exit.FAILED)


def undrain(target: Drained, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Let a target take connections again."""
    ask.request(config, "DELETE", "drains", target)
    show.said({"target": target}, f"{target}: takes connections", as_json)


def drains(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """What is drained, since when, and how many connections are left there, as conntrack counts them."""
    looks = show.List("drains", ("target", "since", "connections left"), _row)
    show.listed(looks, config, None, as_json, "drains", "drains")


def _line(drained: dict[str, Any]) -> str:
    return f"{drained['target']}: drained, {drained['connections']:,} connections left"


def _row(drained: dict[str, Any]) -> tuple[str, ...]:
    return drained["target"], show.moment(drained["since"]), f"{drained['connections']:,}"
