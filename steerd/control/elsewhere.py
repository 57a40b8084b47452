"""Endpoints whose addresses this machine does not have. That is no mistake (the address of a cluster comes and goes),
but nobody would notice otherwise: what is sent to such an address never gets here, or goes on to somebody else."""

from __future__ import annotations

from collections.abc import Callable, Collection

from steerd.config import Config
from steerd.model import IPAddress

Elsewhere = Callable[[Collection[IPAddress]], set[IPAddress]]
"""Those of the addresses that are not addresses of this machine now. Raises KernelError."""


def sentences(config: Config, elsewhere: Elsewhere) -> list[str]:
    """One for each address of an endpoint that is not here, in the order of the file. Raises what `elsewhere` does."""
    addresses = dict.fromkeys(endpoint.address for service in config.services for endpoint in service.endpoints)
    missing = elsewhere(addresses.keys())
    return [
        f"{address} is not an address of this machine now; no connection to it is steered until it is"
        for address in addresses
        if address in missing
    ]
