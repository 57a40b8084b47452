"""What steerd raises. Every message is a whole sentence for an operator: what is wrong, where, what would be right."""

from __future__ import annotations

from typing import Literal


class SteerdError(Exception):
    """Something the operator must know; the command line prints it without a traceback."""


class Problem:
    """One mistake in a configuration file: where it stands (a dotted key) and a sentence about it."""

    __slots__ = ("key", "message")

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        self.message = message

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"

    def __repr__(self) -> str:
        return f"Problem({self.key!r}, {self.message!r})"


class ConfigError(SteerdError):
    """A configuration that cannot be used; `problems` holds every mistake found, not only the first."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        super().__init__("\n".join(f"{file}: {problem}" for problem in problems))
        self.file = file
        self.problems = problems


class KernelError(SteerdError):
    """The kernel refused something that steerd needs; the message names the request and the errno's meaning."""


class RegistryError(SteerdError):
    """The registry cannot be opened, is of another version, or has no target id left."""


class NoAnswerError(SteerdError):
    """The daemon does not answer where it should listen."""


class ForbiddenError(SteerdError):
    """Who asks has not the right to it."""


class RequestError(SteerdError):
    """A request that cannot be carried out. The message is a sentence."""

    def __init__(self, code: Literal["not_found", "conflict", "invalid"], field: str | None, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.field = field
        """What of the request is wrong: "service", "id", "target", "source"."""
        self.message = message
