"""`steerctl services` and `steerctl endpoints`."""

from __future__ import annotations

from typing import Any

from steerd.cli.ctl import given, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json


def services(limit: given.Limit = None, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """The services of the configuration in force: endpoints, what is inspected, routes."""
    columns = ("name", "endpoints", "inspect", "default", "unmatched", "routes (static + dynamic)")
    show.listed(show.List("services", columns, _service), config, limit, as_json, "services", "services")


def endpoints(limit: given.Limit = None, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Where clients connect to, whose it is, and what decides there where a connection goes."""
    looks = show.List("endpoints", ("endpoint", "service", "decides", "state"), _endpoint)
    show.listed(looks, config, limit, as_json, "endpoints", "endpoints")


def _service(service: dict[str, Any]) -> tuple[str, ...]:
    return (
        service["name"],
        ", ".join(service["endpoints"]),
        ", ".join(service["inspect"]),
        ", ".join(service["default"]),
        service["unmatched"],
        f"{service['static_routes']:,} + {service['dynamic_routes']:,}",
    )


def _endpoint(endpoint: dict[str, Any]) -> tuple[str, ...]:
    state = "" if endpoint["is_here"] else "not an address of this machine now"
    return endpoint["endpoint"], endpoint["service"], endpoint["decides"], state
