"""Places: what an operator names where a target, or all targets of an address, are meant."""

from __future__ import annotations

from typing import NamedTuple

from steerd.config.texts import parse_address, parse_target
from steerd.errors import RequestError
from steerd.model import IPAddress, Target


class Place(NamedTuple):
    """A target (port 0 is `same`), or with `port` None all targets of an address."""

    address: IPAddress
    port: int | None

    def __str__(self) -> str:
        return str(self.address if self.port is None else Target(self.address, self.port))


def parse_place(text: str) -> Place:
    """`10.64.0.1:8080`, `[fd00:64::1]:same`, `fd00:64::1`. Raises RequestError, for the field "target"."""
    try:
        if text.endswith("]"):
            return Place(parse_address(text.removeprefix("[").removesuffix("]")), None)
        if text.startswith("[") or text.count(":") == 1:
            return Place(*parse_target(text))
        return Place(parse_address(text), None)
    except ValueError:
        message = f"{text} is no target; one is written 10.64.0.1:8080, [fd00:64::1]:8080, or without its port."
        raise RequestError("invalid", "target", message) from None
