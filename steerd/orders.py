"""What the main process, the nursery and a worker say to each other when a worker starts; from then on main process and
worker share the registry, the counters and the other files of state_dir and run_dir, and say nothing.

The main process sends the nursery one order a datagram, as JSON; with `Start` comes the writing end of a pipe, on which
it is told of this worker, a line each:

    born PID      by the nursery
    ready         by the worker: its queue is bound
    ended STATUS  by the nursery: exit status, or minus the number of the signal

The end of the pipe without `ended` is the end of the nursery, and of all its workers. The end of the orders is that of
the main process.
"""

from __future__ import annotations

import msgspec

from steerd.telemetry import logs

READY = b"ready\n"


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


class Start(msgspec.Struct, frozen=True, tag=True):
    """Have a worker."""

    settings: WorkerSettings


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End a worker, if it has not ended."""

    pid: int


def born(pid: int) -> bytes:
    return f"born {pid}\n".encode()


def ended(status: int) -> bytes:
    return f"ended {status}\n".encode()


def number(line: bytes) -> int:
    """The number in one of these two."""
    return int(line.split()[1])


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Start | Kill).decode
