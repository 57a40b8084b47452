"""Logs: structlog events on standard error, JSON for a journal or a file, coloured lines for a terminal."""

from __future__ import annotations

import logging
import sys

import structlog


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
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
