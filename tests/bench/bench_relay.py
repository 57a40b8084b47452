"""The relay: what a daemon on a unix socket costs, against the same daemon on TCP.

    [ one namespace ]  client -- direct: the daemon on TCP
                        |---- copied: relay, `unix:`, the daemon
                        `---- handed over: relay, `unix-fd:`, the daemon

The daemon is the same program each time, in a process of its own. `bulk`: one connection, the daemon sends. `short`:
one connection after the other, of one question and one answer. What the relay uses of a CPU is read from /proc.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests.bench.bench_aliases import namespace
from tests.bench.report import paired
from tests.bench.scenario import Result, Spread, rounds_of, spread
from tests.relay import RelayProcess

KINDS = ("direct", "copied", "handed over")
ADDRESS, DIRECT_PORT, RELAY_PORT = "127.0.0.1", 9000, 9001
BLOCK = bytes(1 << 20)
BULK_BLOCKS = 512
SHORT = 2000


class Measured(NamedTuple):
    """One round of one kind."""

    bulk_mb_per_s: float
    short_per_s: float
    relay_us_per_mb: float
    relay_us_per_connection: float


def serve(listener: socket.socket, *, takes: bool) -> None:
    """The daemon: to "bulk" it answers with all of it, to anything else with the same. `takes`: it is handed
    connections over."""
    channel = listener.accept()[0] if takes else None
    while True:
        if channel is None:
            connection = listener.accept()[0]
        else:
            connection = socket.socket(fileno=socket.recv_fds(channel, 100, 1)[1][0])
        with connection, contextlib.suppress(ConnectionError):
            question = connection.recv(100)
            if question == b"bulk":
                for _ in range(BULK_BLOCKS):
                    connection.sendall(BLOCK)
            else:
                connection.sendall(question)


@contextmanager
def standing(kind: str, directory: Path) -> Iterator[tuple[int, RelayProcess | None]]:
    """A daemon, and where clients reach it; and the relay, if there is one in between."""
    path = f"{directory}/daemon.sock"
    with contextlib.ExitStack() as stack:
        takes = kind == "handed over"
        if kind == "direct":
            listener = stack.enter_context(socket.create_server((ADDRESS, DIRECT_PORT), backlog=1000))
            relay = None
        else:
            listener = stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if takes else socket.SOCK_STREAM)
            )
            listener.bind(path)
            listener.listen(1000)
            stack.callback(os.unlink, path)
            relay = RelayProcess(directory / "log")
            stack.callback(relay.close)
            line = {"address": ADDRESS, "port": RELAY_PORT, "kind": "unix-fd" if takes else "unix", "path": path}
            if failed := relay.listen(line):
                raise SystemExit(f"bench: the relay cannot listen: {failed}")
        daemon = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), kwargs={"takes": takes})
        daemon.start()
        stack.callback(daemon.join)
        stack.callback(daemon.kill)
        yield (DIRECT_PORT if relay is None else RELAY_PORT), relay


def measure(kind: str, directory: Path) -> Measured:
    """One round."""
    with standing(kind, directory) as (port, relay):
        buffer = bytearray(1 << 20)
        used = [0.0 if relay is None else relay.cpu_seconds()]
        began = time.perf_counter()
        with socket.create_connection((ADDRESS, port)) as client:
            client.sendall(b"bulk")
            while client.recv_into(buffer):
                pass
        bulk = time.perf_counter() - began
        used.append(0.0 if relay is None else relay.cpu_seconds())
        began = time.perf_counter()
        for _ in range(SHORT):
            with socket.create_connection((ADDRESS, port)) as client:
                client.sendall(b"question")
                if client.recv(100) != b"question":
                    raise SystemExit("bench: not the answer of the daemon")
        short = time.perf_counter() - began
        used.append(0.0 if relay is None else relay.cpu_seconds())
        megabytes = BULK_BLOCKS * len(BLOCK) / 1e6
        return Measured(
            megabytes / bulk,
            SHORT / short,
            (used[1] - used[0]) / megabytes * 1e6,
            (used[2] - used[1]) / SHORT * 1e6,
        )


def run(console: Console) -> Result:
    """Measure in turn, show a table, and give the ratios."""
    rounds: dict[str, list[Measured]] = {kind: [] for kind in KINDS}
    with namespace(), tempfile.TemporaryDirectory(prefix="steerd-bench-") as directory:
        for _ in range(rounds_of(5)):
            for kind, found in rounds.items():
                found.append(measure(kind, Path(directory)))
    figures: dict[str, dict[str, float]] = {}
    table = Table("", *(field.replace("_", " ") for field in Measured._fields))
    for kind, found in rounds.items():
        spreads: dict[str, Spread] = {
            field: spread([getattr(each, field) for each in found]) for field in Measured._fields
        }
        figures[kind.replace(" ", "_")] = {field: round(value.median, 1) for field, value in spreads.items()}
        table.add_row(kind, *(str(value) for value in spreads.values()))
    console.print(table)
    direct, copied, handed_over = (rounds[kind] for kind in KINDS)
    ratios = {
        "bulk_copied/direct": paired((r.bulk_mb_per_s for r in copied), (r.bulk_mb_per_s for r in direct)),
        "short_copied/direct": paired((r.short_per_s for r in copied), (r.short_per_s for r in direct)),
        "short_handed_over/direct": paired((r.short_per_s for r in handed_over), (r.short_per_s for r in direct)),
    }
    return Result("relay", ratios, figures)
