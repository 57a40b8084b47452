"""What a shell offers for names: those that a running daemon knows. Quick and silent, whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import typer

from steerd import paths

_SECONDS = 0.5


def leases(context: typer.Context, incomplete: str) -> list[str]:
    """Names of leases that begin so."""
    return _names(context, incomplete, "leases", {"after": incomplete})


def services(context: typer.Context, incomplete: str) -> list[str]:
    """Names of services that begin so."""
    return _names(context, incomplete, "services", {"after": incomplete})


def pools(context: typer.Context, incomplete: str) -> list[str]:
    """Names of pools that begin so."""
    return _names(context, incomplete, "pools", {})


def drains(context: typer.Context, incomplete: str) -> list[str]:
    """Drained targets that begin so."""
    return _names(context, incomplete, "drains", {}, "target")


def _names(context: typer.Context, incomplete: str, what: str, query: dict[str, str], field: str = "name") -> list[str]:
    from steerd.cli.ctl import ask
    from steerd.control import client
    from steerd.errors import SteerdError

    try:
        run_dir = ask.run_dir(Path(context.params.get("config") or paths.CONFIG))
        page = client.request(run_dir, "GET", what, query=query, timeout=_SECONDS)
        return [each[field] for each in page[what] if each[field].startswith(incomplete)]
    except (SteerdError, KeyError, TypeError):
        return []
