"""`steerctl targets`."""

from __future__ import annotations

from typing import Any

from steerd.cli.ctl import given, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json


def targets(limit: given.Limit = None, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Every target that ever had an id, and what is known of it: whether it is drained, or nobody listens there."""
    looks = show.List("targets", ("id", "target", "pool", "lease", "state"), _row)
    show.listed(looks, config, limit, as_json, "targets", "targets")


def _row(target: dict[str, Any]) -> tuple[str, ...]:
    states = (["drained"] if target["drained"] else []) + [f"nobody listens ({name})" for name in target["dead"]]
    return str(target["id"]), target["target"], target["pool"] or "", target["lease"] or "", ", ".join(states)
