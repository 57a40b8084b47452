"""The configuration: from a TOML file to values that the rest of steerd can use without checking anything again.

`load` and `parse` give a Config, or raise a ConfigError that names every mistake found, each with its dotted key and a
sentence: what is wrong, what would be right. A value that is already reported is left out of later checks, so that one
mistake is one line.

Three steps, and the files for them:
1. `reader` walks the structs of `schema` field by field;
2. text becomes addresses, endpoints, targets (`texts`) and conditions (`conditions`);
3. the parts are held against each other: what overlaps, what contradicts, what can never match. `gateway`, `pools`
   (with `wake`, `overlaps`) and `services` (with `targets`, `sessions`, `routes`) make the `values` that all others
   see. Those can be had from here, all else where it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from steerd.config import schema
from steerd.config.gateway import check_ids, check_relay, read_gateway
from steerd.config.overlaps import check_overlaps
from steerd.config.pools import check_real_addresses, read_pool, read_prefixes
from steerd.config.reader import Reader, parse_toml
from steerd.config.services import read_endpoints, read_service
from steerd.config.targets import Scene
from steerd.config.values import (
    Api,
    Config,
    ExtensionPool,
    Gateway,
    Limits,
    Listen,
    Log,
    Metrics,
    Pending,
    Relay,
    Service,
    Timeouts,
    Unextended,
)
from steerd.core.relays import Seats
from steerd.core.wake import Limits as WakeLimits
from steerd.errors import ConfigError, Problem

__all__ = [
    "Api", "Config", "ExtensionPool", "Gateway", "Limits", "Listen", "Log", "Metrics", "Pending", "Relay", "Service",
    "Timeouts", "Unextended", "load", "parse", "read",
]  # fmt: skip

MAX_SERVICES = 65536
"""The router's table keys hold a service's index in 16 bits."""


def load(path: str | os.PathLike[str], seats: Seats | None = None) -> Config:
    """Read and check a configuration file; raises ConfigError with every mistake in it, or why it cannot be read.
    `seats`: who gives aliases to daemons on unix sockets; None: as if there had been none before."""
    return parse(read(path), os.fspath(path), seats)


def read(path: str | os.PathLike[str]) -> str:
    """What a configuration file says, unchecked; raises ConfigError if it cannot be read."""
    file = os.fspath(path)
    try:
        return Path(file).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(file, [Problem("file", f"Cannot be read: {error.strerror}.")]) from error
    except UnicodeDecodeError as error:
        message = f"Is not text in UTF-8: the byte at offset {error.start} does not belong there."
        raise ConfigError(file, [Problem("file", message)]) from error


def parse(text: str, file: str, seats: Seats | None = None) -> Config:
    """Check a configuration that is already read; `file` is its name in messages. Raises ConfigError."""
    reader = Reader()
    raw = reader.read(schema.File, parse_toml(text, file), "")
    gateway = read_gateway(raw.gateway, reader)
    prefixes = {name: read_prefixes(name, pool, reader) for name, pool in raw.pools.items()}
    endpoints = {name: read_endpoints(name, service, reader) for name, service in raw.services.items()}
    check_overlaps(prefixes, endpoints, reader)
    pools = {name: read_pool(name, pool, prefixes[name], reader) for name, pool in raw.pools.items()}
    check_real_addresses(pools, reader)
    scene = Scene(pools, endpoints, reader)
    seats = Seats() if seats is None else seats
    scene.relay = check_relay(gateway.relay, raw.services, pools, reader)
    scene.place = seats.place
    services = [read_service(name, raw.services[name], scene) for name in sorted(raw.services)]
    if len(services) > MAX_SERVICES:
        reader.problem("services", f"There are {len(services)} services; at most {MAX_SERVICES} are possible.")
    check_ids(gateway, services, reader)
    if reader.problems:
        raise ConfigError(file, reader.problems)
    waking = WakeLimits(*msgspec.structs.astuple(raw.wake))
    wakes = {address: wake for address, (wake, _) in scene.wakes.items()}
    return Config(file, gateway, pools, tuple(services), tuple(scene.wildcard), waking, wakes, seats.given)
