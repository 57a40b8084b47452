"""`steerctl pools` and `steerctl aliases`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from steerd.cli.ctl import complete, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json


def pools(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """The pools, and how much of each is leased."""
    columns = ("name", "prefixes", "mode", "IPv4", "IPv6", "leased", "in quarantine")
    show.listed(show.List("pools", columns, _pool), config, None, as_json, "pools", "pools")


def aliases(
    pool: Annotated[str, typer.Argument(help="Name of the pool.", autocompletion=complete.pools)],
    state: Annotated[Literal["leased", "quarantined"] | None, typer.Option(help="Only those.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1)] = show.SHOWN,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """The aliases of a pool, and who has each."""
    query = {"pool": pool} | ({} if state is None else {"state": state})
    looks = show.List(f"aliases of {pool}", ("index", "addresses", "state", "lease"), _alias)
    show.listed(looks, config, limit, as_json, "aliases", "aliases", query=query)


def _pool(pool: dict[str, Any]) -> tuple[str, ...]:
    counts = (f"{pool[name]:,}" for name in ("ipv4", "ipv6", "leased", "quarantined"))
    return pool["name"], ", ".join(pool["prefixes"]), pool["mode"], *counts


def _alias(alias: dict[str, Any]) -> tuple[str, ...]:
    return str(alias["index"]), ", ".join(alias["addresses"]), alias["state"], alias["lease"] or ""
