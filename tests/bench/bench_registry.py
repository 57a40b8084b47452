"""The registry with 1, 1,000 and 1,000,000 routes: importing them, deciding among them in a worker, one route changed,
starting again, and the memory of all of it.

    writer (as the main process)  --- LMDB ---  four readers (as workers), each a process of its own

No packets and no kernel: what a decision costs here is reading a request, the engine, and LMDB. `flat` is the decision
time with 1,000,000 routes over that with one, of which 1.2 is allowed. A change is visible once the last of the workers
has decided by it; they try every 0.2 ms, from before the writer is asked until then. `changed_ms` is from the request
on, with the write to the disk in it; `visible_ms` from the writer's answer on. `memory_mb` is what all processes have
resident, pages that they share counted once; a million routes are allowed 120 MB of it. The hosts asked for are drawn
from all, so that with 1,000,000 the caches of the machine miss as they would.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steerd import config
from steerd.control.registry import Reader, Registry
from steerd.core.engine import Engine
from steerd.model import TCP, Answer, Outcome
from steerd.wire.packet import Packet
from tests.bench import registries
from tests.bench.scenario import Goal, Result, count_of, rounds_of

SIZES = (1, 1_000, 1_000_000)
WORKERS = 4
DECISIONS = 50_000
CHANGES = count_of(200)
ALLOWED_MB, ALLOWED_MS = 120, 10
_LOOK_SECONDS = 0.0002
_fork = multiprocessing.get_context("fork")


def packet() -> Packet:
    client, endpoint = bytes([198, 51, 100, 1]), bytes([203, 0, 113, 10])
    return Packet(4, client, endpoint, TCP, 40000, 80, 0, 1, 0, b"", b"", b"", b"")


def request(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\n\r\n".encode()


class Worker:
    """Decides as steerd.worker does, without packets."""

    def __init__(self, directory: str) -> None:
        self._reader = Reader(directory)
        self._engine = Engine(self._reader.refresh(), self._reader.route)
        self._packet = packet()

    def decide(self, data: bytes) -> int:
        if self._reader.advance():
            self._engine = Engine(self._reader.refresh(), self._reader.route)
        decision = self._engine.decide_first(self._packet, data)
        self._reader.rest()
        assert decision is not Answer.NEED_MORE
        return decision.target_id if decision.outcome is Outcome.STEER else 0


def serve(directory: str, size: int, seed: int, orders: Connection) -> None:
    """A worker: measures what it is told to."""
    worker = Worker(directory)
    rng = random.Random(seed)
    payloads = [request(registries.name(rng.randrange(size))) for _ in range(DECISIONS)]
    orders.send("ready")
    while True:
        order = orders.recv()
        if order == "decide":
            began = time.perf_counter()
            for payload in payloads:
                assert worker.decide(payload)
            orders.send((time.perf_counter() - began) / DECISIONS * 1e6)
        elif order == "watch":
            changed = request(registries.name(0))
            before = worker.decide(changed)
            orders.send(None)
            while worker.decide(changed) == before:
                time.sleep(_LOOK_SECONDS)
            orders.send(time.perf_counter())
        elif order == "memory":
            orders.send(memory())


def memory() -> float:
    """This process's share of resident memory in MB: pages that several map are divided among them."""
    row = next(row for row in Path("/proc/self/smaps_rollup").read_text().splitlines() if row.startswith("Pss:"))
    return int(row.split()[1]) / 1024


def ask(workers: list[Connection], order: str) -> list[Any]:
    found = []
    for worker in workers:
        worker.send(order)
        found.append(worker.recv())
    return found


def measure(size: int) -> dict[str, float]:
    """Everything with so many routes."""
    with tempfile.TemporaryDirectory(prefix="steerd-bench-") as directory:
        figures = {"import_s": registries.fill(directory, size)}
        pipes = [_fork.Pipe() for _ in range(WORKERS)]
        processes = []
        main, of_main = _fork.Pipe()
        writer = _fork.Process(target=write, args=(directory, of_main))
        writer.start()
        figures["start_s"] = main.recv()
        for seed, (_, theirs) in enumerate(pipes):
            processes.append(_fork.Process(target=serve, args=(directory, size, seed, theirs)))
            processes[-1].start()
        workers = [pipe for pipe, _ in pipes]
        try:
            for worker in workers:
                worker.recv()
            figures["decision_us"] = statistics.median(
                value for _ in range(rounds_of(5)) for value in ask(workers, "decide")
            )
            changed, visible = [], []
            for number in range(CHANGES):
                ask(workers, "watch")
                main.send(number)
                asked, acknowledged = main.recv()
                seen = max(worker.recv() for worker in workers)
                changed.append((seen - asked) * 1e3)
                # Seen before the writer had said so is seen at once.
                visible.append(max(0.0, (seen - acknowledged) * 1e3))
            for name, delays in (("changed", changed), ("visible", visible)):
                figures[f"{name}_ms_median"] = statistics.median(delays)
                figures[f"{name}_ms_longest"] = max(delays)
            main.send("memory")
            figures["memory_mb"] = main.recv() + sum(ask(workers, "memory"))
            figures["file_mb"] = (Path(directory) / "registry" / "data.mdb").stat().st_blocks / 2048
        finally:
            for process in (*processes, writer):
                process.kill()
                process.join()
        return figures


def write(directory: str, orders: Connection) -> None:
    """The main process, started again: puts the configuration in force, and changes one route when it is told to."""
    began = time.perf_counter()
    registry = Registry(directory)
    registry.publish(config.parse(registries.body(), "bench"))
    orders.send(time.perf_counter() - began)
    while True:
        order = orders.recv()
        if order == "memory":
            orders.send(memory())
            continue
        asked = time.perf_counter()
        target = f"10.64.255.{order % 200 + 1}:9000"
        registry.routes.put("web", {"http.host": registries.name(0)}, target, None)
        orders.send((asked, time.perf_counter()))


def run(console: Console) -> Result:
    """Measure every size, show a table, and give the ratios."""
    assert os.cpu_count()
    figures = {f"routes_{size}": measure(size) for size in SIZES}
    table = Table("routes", *next(iter(figures.values())))
    for name, found in figures.items():
        table.add_row(name.removeprefix("routes_"), *(f"{value:.3f}" for value in found.values()))
    console.print(table)
    most, least = figures[f"routes_{SIZES[-1]}"], figures[f"routes_{SIZES[0]}"]
    ratios = {
        "flat": most["decision_us"] / least["decision_us"],
        "lookup_1m/lookup_1k": most["decision_us"] / figures["routes_1000"]["decision_us"],
        "memory_1m/allowed": (most["memory_mb"] - least["memory_mb"]) / ALLOWED_MB,
        "visible_1m/allowed": most["visible_ms_longest"] / ALLOWED_MS,
        "changed_1m/allowed": most["changed_ms_median"] / ALLOWED_MS,
    }
    goals = [Goal("flat", 1.2, at_least=False)]
    goals += [Goal(f"{what}_1m/allowed", 1, at_least=False) for what in ("memory", "visible", "changed")]
    return Result("registry", ratios, {name: _rounded(found) for name, found in figures.items()}, goals)


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in found.items()}
