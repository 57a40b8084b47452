"""Arguments and options of several nouns, and what is made of their text."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from steerd.cli.common import UsageError
from steerd.cli.ctl import complete
from steerd.cli.ctl.show import SHOWN

Service = Annotated[str, typer.Argument(help="Name of the service.", autocompletion=complete.services)]
Targets = Annotated[
    list[str],
    typer.Argument(
        help="ADDRESS:PORT, or ADDRESS:same, one for each address family; of a route also unix:/path, unix-fd:/path.",
        metavar="TARGET",
    ),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option("--key", help="A condition, as in `tls.sni=a.example`; may be repeated.", metavar="KEY=VALUE"),
]
Source = Annotated[str | None, typer.Option(help="Only clients of this prefix.", metavar="PREFIX")]
External = Annotated[bool, typer.Option("--external", help="The targets are in no pool.")]
ProxyProtocol = Annotated[
    bool, typer.Option("--proxy-protocol", help="For unix:/path: tell the daemon who the client is (version 2).")
]
Limit = Annotated[
    int | None, typer.Option(help=f"At most so many. Default: {SHOWN} in a table, all with --json.", min=1)
]
Ttl = Annotated[str | None, typer.Option(help="When it ends unless renewed: 90s, 15m, 12h, 7d.", metavar="TIME")]


def conditions(written: list[str] | None) -> dict[str, str]:
    """The conditions of a route; raises UsageError."""
    found: dict[str, str] = {}
    for each in written or []:
        key, equals, value = each.partition("=")
        if not equals:
            raise UsageError(f"{each} is no condition; one is written KEY=VALUE, as in tls.sni=a.example.")
        if key in found:
            raise UsageError(f"The key {key} is there twice; a route compares each key once.")
        found[key] = value
    return found


def targets(written: list[str], external: bool, proxy_protocol: bool = False) -> list[dict[str, object]]:
    """Targets as the API takes them; raises UsageError for what is a condition."""
    for text in written:
        if re.fullmatch(r"[a-z0-9-]+(\.[^=/:]+)?=.*", text):
            raise UsageError(f"{text} is no target; a condition is an option (--key {text}).")
    more = {"proxy_protocol": "v2"} if proxy_protocol else {}
    return [{"address": target, "external": external, **more} for target in written]


def seconds(text: str | None) -> int | None:
    """A length of time; raises UsageError."""
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if not text[:-1].isdecimal() or text[-1:] not in units:
        raise UsageError(f"{text} is no time; one is written 90s, 15m, 12h or 7d.")
    return int(text[:-1]) * units[text[-1]]
