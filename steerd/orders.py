"""What the main process and a worker say to each other when the worker starts; from then on they share the registry,
the counters and the other files of state_dir and run_dir, and say nothing."""

from __future__ import annotations

import msgspec

from steerd.telemetry import logs

READY = b"ready\n"
"""The worker's only line on standard output: its queue is bound."""


class WorkerSettings(msgspec.Struct, frozen=True):
    """What the main process tells a worker; the rest stands in the registry."""

    index: int
    queue: int
    queue_length: int
    receive_buffer: int
    state_dir: str
    run_dir: str
    counters: str
    log_format: logs.Format
    main_pid: int
