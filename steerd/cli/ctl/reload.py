"""`steerctl reload`."""

from __future__ import annotations

from steerd.cli.ctl import ask, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json

_SECONDS = 600.0
"""Tens of thousands of new aliases take a while."""


def reload(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Put the configuration file in force as it is now, and wait until it is; with mistakes in it, say them (exit
    status 1), and what was in force stays."""
    answer = ask.request(config, "POST", "reload", timeout=_SECONDS)
    text = f"{answer['file']} is in force: services {answer['services']}, pools {answer['pools']}"
    text = "\n".join([text, *answer["warnings"]])
    show.said(answer, text, as_json)
