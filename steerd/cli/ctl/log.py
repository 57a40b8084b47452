"""`steerctl log`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from steerd.cli.common import UsageError, new_app
from steerd.cli.ctl import ask, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json

app = new_app(
    "What the daemon logs, changed while it runs; until it ends, or a reload changes `log` or `access_log`.", alone=True
)

_WORDS = {"off": 0, "all": 1}


@app.callback(invoke_without_command=True)
def log(context: typer.Context, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Say what is logged."""
    if context.invoked_subcommand is None:
        _say(ask.request(config, "GET", "log"), as_json)


@app.command("level")
def level(
    least: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Argument(help="The least that is logged.", metavar="LEVEL")
    ],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Log what is of this level, or above it: debug, info, warning, error."""
    _put(config, as_json, level=least)


@app.command("access")
def access(
    what: Annotated[
        str, typer.Argument(help="`all`: every decision. N: one of N. `off`: those that failed.", metavar="all|off|N")
    ],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Log decisions, at the level info, each on a line: with its client, keys, route and target."""
    number = _WORDS.get(what, int(what) if what.isdecimal() and what.isascii() else None)
    if number is None:
        raise UsageError(f"What is logged must be all, off, or a whole number N for one of N decisions, not {what!r}.")
    _put(config, as_json, access_log=number)


def _put(config: Path, as_json: bool, **changed: object) -> None:
    settings = ask.request(config, "GET", "log")
    _say(ask.request(config, "PUT", "log", body={**settings, **changed}), as_json)


def _say(settings: dict[str, Any], as_json: bool) -> None:
    number = settings["access_log"]
    decisions = {0: "only those that failed", 1: "all"}.get(number, f"one of {number}, and those that failed")
    show.said(settings, f"level: {settings['level']}\ndecisions: {decisions}", as_json)
