"""Logs: structlog events on standard error, JSON for a journal or a file, coloured lines for a terminal.

A log must never hold up a packet. So a line for which standard error has no room at once (a pipe whose reader is stuck)
or that it refuses (a full disk, a reader that is gone) is lost, and the next line that gets through says how many were.

Nor may a client fill a disk. What clients say is cut to a bounded length (`shown_keys`), the renderers escape whatever
is no plain text in it, and lines that any client can cause have an allowance (`Allowance`).

Where standard error is the journal (JOURNAL_STREAM, systemd.exec(5)) each line begins with its priority, as
sd-daemon(3) wants it, so that `journalctl -p warning` finds what it should.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Mapping
from typing import Literal

import structlog

Format = Literal["auto", "json", "console"]
Level = Literal["debug", "info", "warning", "error"]
LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# A pipe that is writable takes this much without blocking (pipe(7), PIPE_BUF); a longer line is cut.
_MOST_BYTES = select.PIPE_BUF
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_MOST_OF_A_TEXT = 128
# A character may take six bytes of JSON; with what else stands in a line this is well below _MOST_BYTES.
_MOST_OF_ALL_KEYS = 400

_least = logging.INFO


class StandardError:
    """File descriptor 2, for structlog's WriteLogger: whole lines, never blocking, never raising. `before` is written
    in front of the lines that it makes itself."""

    def __init__(self, descriptor: int, before: str = "") -> None:
        self._descriptor = descriptor
        self._before = before
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._lost = 0

    def write(self, text: str) -> None:
        """Write one line, or count it as lost."""
        if self._lost and self._written(
            f'{self._before}{{"event": "log lines were lost", "lines": {self._lost}, "level": "warning"}}\n'
        ):
            self._lost = 0
        if self._lost or not self._written(text):
            self._lost += 1

    def flush(self) -> None:
        """Nothing is kept back."""

    def _written(self, text: str) -> bool:
        line = text.encode(errors="backslashreplace")
        if len(line) > _MOST_BYTES:
            line = line[: _MOST_BYTES - 1] + b"\n"
        try:
            return bool(self._poll.poll(0)) and os.write(self._descriptor, line) == len(line)
        except OSError:
            return False


class Allowance:
    """A token bucket: `burst` lines at once, and `rate` for each second after that. Counts what was not allowed."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._filled = 0.0
        self.refused = 0

    def take(self, now: float) -> bool:
        """Whether one more line may be written; `now` in seconds, of a clock that never goes back."""
        if not self.has_room(now):
            self.refused += 1
            return False
        self._tokens -= 1
        return True

    def has_room(self, now: float) -> bool:
        """Whether `take` would say yes."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        return self._tokens >= 1

    def forgive(self) -> int:
        """How many were not allowed since this was asked last."""
        refused, self.refused = self.refused, 0
        return refused


def configure(
    *, process: str, style: Format = "auto", level: int = logging.INFO
) -> structlog.typing.FilteringBoundLogger:
    """Set structlog up for this process and return its logger; `process` ("main", "worker-0") stands in every event.
    `style` "auto": for people if standard error is a terminal, else JSON."""
    for_people = style == "console" or (style == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if for_people else structlog.processors.JSONRenderer()
    )
    before = ""
    if is_journal(sys.stderr.fileno()):
        renderer, before = _Prioritised(renderer), f"<{_PRIORITIES['warning']}>"
    set_level(level)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _drop_lesser,
            structlog.contextvars.merge_contextvars,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if for_people else [structlog.processors.dict_tracebacks]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(file=StandardError(sys.stderr.fileno(), before)),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


def set_level(level: int) -> None:
    """From now on this process logs what is of this level or above it (10, 20, 30, 40, as in the module `logging`)."""
    global _least  # noqa: PLW0603 (as structlog's own settings, it is the whole process's)
    _least = level


def is_journal(descriptor: int) -> bool:
    """Whether this is the stream that systemd connected to the journal."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def shown_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """What a client said, for a line of a log: long texts are cut, which `...` shows, and what goes beyond
    _MOST_OF_ALL_KEYS characters is left out, which the key `...` shows."""
    shown: dict[str, str] = {}
    room = _MOST_OF_ALL_KEYS
    for key, value in keys.items():
        key, value = _cut(key), _cut(value)
        room -= len(key) + len(value)
        if room < 0:
            shown["..."] = f"{len(keys) - len(shown)} more"
            break
        shown[key] = value
    return shown


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_OF_A_TEXT else text[: _MOST_OF_A_TEXT - 3] + "..."


def _drop_lesser(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if LEVELS.get(event["level"], logging.CRITICAL) < _least:
        raise structlog.DropEvent
    return event


class _Prioritised:
    """A renderer whose lines begin with `<N>`."""

    def __init__(self, renderer: structlog.typing.Processor) -> None:
        self._render = renderer

    def __call__(self, logger: object, name: str, event: structlog.typing.EventDict) -> str:
        priority = _PRIORITIES.get(event["level"], _PRIORITIES["error"])
        text = str(self._render(logger, name, event))
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())
