"""Logs: structlog events on standard error, JSON for a journal or a file, coloured lines for a terminal.

A log must never hold up a packet. So a line for which standard error has no room at once (a pipe whose reader is stuck)
or that it refuses (a full disk, a reader that is gone) is lost, and the next line that gets through says how many were.
"""

from __future__ import annotations

import logging
import os
import select
import sys

import structlog

# A pipe that is writable takes this much without blocking (pipe(7), PIPE_BUF); a longer line is cut.
_MOST_BYTES = select.PIPE_BUF


class StandardError:
    """File descriptor 2, for structlog's WriteLogger: whole lines, never blocking, never raising."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._lost = 0

    def write(self, text: str) -> None:
        """Write one line, or count it as lost."""
        if self._lost and self._written(
            f'{{"event": "log lines were lost", "lines": {self._lost}, "level": "warning"}}\n'
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


def configure(*, process: str) -> structlog.typing.FilteringBoundLogger:
    """Set structlog up for this process and return its logger; `process` ("main", "worker-0") stands in every event."""
    for_people = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer() if for_people else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=StandardError(sys.stderr.fileno())),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
