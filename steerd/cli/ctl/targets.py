"""`steerctl targets`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from steerd.cli.ctl import given, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json


def targets(
    limit: given.Limit = None,
    connections: Annotated[
        bool, typer.Option("--connections", help="Count connections, too, which takes a look at all of conntrack.")
    ] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Every target that ever had an id, and what is known of it: whether it is drained, and what listens there."""
    looks = show.List("targets", ("id", "target", "pool", "lease", "listening", "connections", "state"), _row)
    query = {"connections": "true"} if connections else None
    show.listed(looks, config, limit, as_json, "targets", "targets", query=query)


def _row(target: dict[str, Any]) -> tuple[str, ...]:
    states = (["drained"] if target["drained"] else []) + [f"nobody listens ({name})" for name in target["dead"]]
    return (
        str(target["id"]),
        target["target"],
        target["pool"] or "",
        target["lease"] or "",
        "?" if target["listening"] is None else ", ".join(target["listening"]) or "nothing",
        "" if target["connections"] is None else f"{target['connections']:,}",
        ", ".join(states),
    )
