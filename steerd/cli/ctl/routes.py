"""`steerctl route`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from steerd.cli.common import new_app
from steerd.cli.ctl import ask, complete, given, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json
from steerd.model import Policy

NAME, PLURAL = "route", "routes"
app = new_app("Routes: those of the configuration, and others that come and go.")


@app.command("list")
def list_routes(
    service: Annotated[
        str | None, typer.Argument(help="Only of this service.", autocompletion=complete.services)
    ] = None,
    limit: given.Limit = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Routes, and where each comes from."""
    looks = show.List("routes", ("service", "when", "source", "target", "from", "state"), _row)
    path = ("routes",) if service is None else ("services", service, "routes")
    show.listed(looks, config, limit, as_json, "routes", *path)


@app.command("add")
def add_route(
    service: given.Service,
    targets: Annotated[
        list[str],
        typer.Argument(
            help="ADDRESS:PORT, or ADDRESS:same; one for each address family, or several with --choose.",
            metavar="TARGET",
        ),
    ],
    key: given.Conditions = None,
    source: given.Source = None,
    choose: Annotated[
        Policy | None, typer.Option(help="How one of several targets of an address family is chosen.")
    ] = None,
    hash_: Annotated[
        str | None,
        typer.Option("--hash", help="For hash: the key whose value says it; `source` is the client's address."),
    ] = None,
    external: given.External = False,
    proxy_protocol: given.ProxyProtocol = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Define a route, or give it another target; it counts from the next connection on."""
    to = given.targets(targets, external, proxy_protocol)
    body = {"when": given.conditions(key), "source": source, "target": to, "choose": choose, "hash": hash_}
    made = ask.request(config, "PUT", "services", service, "routes", body=body)
    show.said(made, f"{show.conditions(made)}: {', '.join(made['targets'])}", as_json)


@app.command("remove")
def remove_route(
    service: given.Service,
    key: given.Conditions = None,
    source: given.Source = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Take a route away that was added; its connections go on."""
    when = given.conditions(key)
    query = {"when": json.dumps(when)} | ({} if source is None else {"source": source})
    ask.request(config, "DELETE", "services", service, "routes", query=query)
    show.said({"service": service, "when": when, "source": source}, "removed", as_json)


def _row(route: dict[str, Any]) -> tuple[str, ...]:
    origin = route["origin"] if route["place"] is None else f"static ({route['place']})"
    state = "in force" if route["usable"] else "not in force under this configuration"
    targets = ", ".join(route["targets"])
    if route["choose"]:
        targets += f" ({route['choose']}{' of ' + route['hash'] if route['hash'] else ''})"
    return route["service"], show.conditions(route), route["source"] or "", targets, origin, state
