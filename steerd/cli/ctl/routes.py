"""`steerctl route`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from steerd.cli.common import new_app
from steerd.cli.ctl import ask, given, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json
from steerd.model import Policy

NAME, PLURAL = "route", "routes"
app = new_app("Routes: those of the configuration, and others that come and go.")


@app.command("list")
def list_routes(service: given.Service, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """All routes of a service, and where each comes from."""
    found = ask.pages(config, "routes", "services", service, "routes")
    show.listed(found, as_json, f"routes of {service}", ("when", "source", "target", "from", "state"), _row)


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
    return show.conditions(route), route["source"] or "", targets, origin, state
