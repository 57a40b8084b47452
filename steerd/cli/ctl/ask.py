"""Asking the daemon, through its API."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from steerd import paths


def run_dir(config: Path) -> str:
    """The run_dir in a configuration; raises ConfigError if it cannot be read. Nothing else in it is looked at: a
    mistake that is being made in it is no reason not to talk to the daemon. Without the file that is read by default,
    the directory that is used by default: members of the group steerd may not be allowed to read the file."""
    try:
        gateway = tomllib.loads(config.read_text()).get("gateway", {})
        found = gateway.get("run_dir", paths.RUN_DIR)
        if isinstance(found, str):
            return found
    except OSError:
        if config == paths.CONFIG:
            return paths.RUN_DIR
    except (ValueError, AttributeError):
        pass  # said below, with the place
    from steerd import config as configuration

    return configuration.load(config).gateway.run_dir


def request(
    config: Path,
    method: str,
    *path: str,
    query: dict[str, str] | None = None,
    body: object = None,
    timeout: float = 60.0,
) -> Any:
    """What the API answers (control.client.request)."""
    from steerd.control import client

    return client.request(run_dir(config), method, *path, query=query, body=body, timeout=timeout)


def pages(
    config: Path, what: str, *path: str, query: dict[str, str] | None = None, at_most: int | None = None
) -> list[dict[str, Any]]:
    """A list that the API gives in pages; only its beginning, if `at_most` says so."""
    from steerd.control import client

    found: list[dict[str, Any]] = []
    where = run_dir(config)
    position: dict[str, str] = {}
    while at_most is None or len(found) < at_most:
        page = client.request(where, "GET", *path, query=(query or {}) | position)
        found += page[what]
        if page.get("next") is None:
            break
        position = {"after": str(page["next"])}
    return found[:at_most]
