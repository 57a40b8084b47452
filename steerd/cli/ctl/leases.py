"""`steerctl lease`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from steerd.cli.common import new_app
from steerd.cli.ctl import ask, complete, given, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json

NAME, PLURAL = "lease", "leases"
app = new_app("Leases: which name has which alias of a pool.")

Name = Annotated[str, typer.Argument(help="Whose lease it is.", autocompletion=complete.leases)]


@app.command("list")
def list_leases(limit: given.Limit = None, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """All leases."""
    looks = show.List("leases", ("name", "pool", "addresses", "ends", "route", "state"), _row)
    show.listed(looks, config, limit, as_json, "leases", "leases")


@app.command("add")
def add_lease(
    name: Annotated[str, typer.Argument(help="Whose lease it is.")],
    pool: Annotated[str, typer.Option(help="The pool that the alias is of.", autocompletion=complete.pools)],
    service: Annotated[
        str | None,
        typer.Option(help="The service whose connections the alias gets.", autocompletion=complete.services),
    ] = None,
    key: given.Conditions = None,
    source: given.Source = None,
    port: Annotated[str, typer.Option(help="The daemon's port on the alias; `same` is the client's.")] = "same",
    ttl: given.Ttl = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Give an alias of a pool to a name, and a route to it: the one it had before if that is free, else the lowest."""
    body: dict[str, Any] = {"pool": pool, "port": int(port) if port.isdecimal() else port}
    body |= {"service": service, "when": given.conditions(key), "source": source, "ttl": given.seconds(ttl)}
    made = ask.request(config, "PUT", "leases", name, body=body)
    show.said(made, f"{name}: {', '.join(made['addresses'])}", as_json)


@app.command("renew")
def renew_lease(name: Name, ttl: given.Ttl = None, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Let a lease end later: after the time it was given, or another one, from now on."""
    made = ask.request(config, "POST", "leases", name, "renew", body={"ttl": given.seconds(ttl)})
    show.said(made, f"{name}: ends {show.moment(made['expires'])}", as_json)


@app.command("release")
def release_lease(name: Name, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Take the alias from a name: its route goes, its connections end, and nobody else gets it for a while."""
    ended = ask.request(config, "DELETE", "leases", name)
    until = show.moment(ended["until"])
    show.said(ended, f"{name}: released, {ended['flows']} flows ended, in quarantine until {until}", as_json)


def _row(lease: dict[str, Any]) -> tuple[str, ...]:
    route = lease["route"]
    shown = "" if route is None else f"{route['service']}: {show.conditions(route)}"
    state = "in force" if lease["usable"] else "its alias is in no pool of the configuration"
    return lease["name"], lease["pool"], ", ".join(lease["addresses"]), show.moment(lease["expires"]), shown, state
