"""`steerctl session`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from steerd.cli.common import new_app
from steerd.cli.ctl import ask, given, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json

NAME, PLURAL = "session", "sessions"
app = new_app("Sessions: which session id belongs to which target and source.")

SessionId = Annotated[str, typer.Argument(help="What clients say.", metavar="ID")]


@app.command("list")
def list_sessions(
    service: given.Service, limit: given.Limit = None, config: Config = DEFAULT_CONFIG, as_json: Json = False
) -> None:
    """All sessions of a service, those of the configuration and those that were added."""
    looks = show.List(f"sessions of {service}", ("id", "target", "source", "from", "state"), _row)
    show.listed(looks, config, limit, as_json, "sessions", "services", service, "sessions")


@app.command("add")
def add_session(
    service: given.Service,
    session_id: SessionId,
    targets: given.Targets,
    source: Annotated[str | None, typer.Option(help="The client's address. Default: the first that comes.")] = None,
    external: given.External = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Define a session, or define it anew."""
    body = {"target": given.targets(targets, external), "source": source}
    made = ask.request(config, "PUT", "services", service, "sessions", session_id, body=body)
    show.said(made, f"{made['id']}: {', '.join(made['targets'])}", as_json)


@app.command("remove")
def remove_session(
    service: given.Service, session_id: SessionId, config: Config = DEFAULT_CONFIG, as_json: Json = False
) -> None:
    """Forget a session that was added; its connections go on."""
    ask.request(config, "DELETE", "services", service, "sessions", session_id)
    show.said({"service": service, "id": session_id}, f"{session_id}: removed", as_json)


def _row(session: dict[str, Any]) -> tuple[str, ...]:
    return (
        session["id"],
        ", ".join(session["targets"]),
        session["source"] or "the first that comes",
        session["origin"],
        "in force" if session["usable"] else "refused: the configuration allows its target no more",
    )
