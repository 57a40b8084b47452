"""From the start of steerd to the moment when it tells systemd that it is ready, with 65,536 aliases and 1,000,000
routes.

One gateway (tests/netns/gateway.py). The time begins before the process does, so it has everything in it: the
interpreter, all imports, and two workers with theirs. It ends when READY=1 arrives at NOTIFY_SOCKET, where systemd
would listen. Then a client asks for a name out of the million, and its daemon answers: it was ready indeed.

- *cold*: no aliases, no table, nothing in run_dir, and no page of the registry in the page cache, as after a boot. The
  interpreter's files stay in the cache.
- *killed*: SIGKILL to steerd before; *restarted*: SIGTERM before. Table, aliases and registry are there already.
- *small_...*: the same with 16 aliases and one route, in turn with the others: what does not depend on the size.

What Python takes to import the daemon, and a worker, and to do nothing with it, is told as well, in turn with the rest:
the floor of all this.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import datetime
from typing import Any, NamedTuple

from rich.console import Console

from tests.bench import registries, report
from tests.bench.scenario import Goal, Result, rounds_of, spread
from tests.netns.gateway import ENDPOINT4, ROOT, Gateway, gateway
from tests.netns.lab import Host

ROUTES = 1_000_000
ROUNDS = rounds_of(5)
ALLOWED_S = {"cold": 3.0, "killed": 1.0, "restarted": 1.0}
WAYS = ("cold", "killed", "restarted")
_PATIENCE = 60
# In the order in which the log tells of them; "ready" is told before systemd is.
_EVENTS = {"privileges given up": "imports", "table loaded": "aliases_and_table", "ready": "workers"}


class Size(NamedTuple):
    """One of the two machines that are started."""

    prefix: str
    """Of the names of its kinds."""
    network: str
    routes: int


SIZES = (Size("", str(registries.PREFIX), ROUTES), Size("small_", "10.64.0.0/28", 1))


class Start(NamedTuple):
    """One start, in seconds."""

    ready: float
    parts: dict[str, float]
    """Of it, by the log: until privileges are given up, until the table is loaded, until the workers are bound."""
    answered: float
    """From there to the first answer of a daemon."""


class Steerd:
    """A gateway with one configuration, and its state."""

    def __init__(self, lab: Gateway, size: Size) -> None:
        self._lab = lab
        self._routes = size.routes
        self.import_s = registries.fill(str(lab.directory / "state"), size.routes)
        text = registries.body("addresses").replace(str(registries.PREFIX), size.network)
        lab.configure(text.replace(registries.ENDPOINT, ENDPOINT4))
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(str(lab.directory / "notify"))
        lab.start()
        lab.respond((registries.alias(self._asked), 1, registries.PORT))

    @property
    def _asked(self) -> int:
        """The route that is asked for, to one of the first aliases."""
        return self._routes // registries.ALIASES // 2 * registries.ALIASES

    def again(self, way: str) -> Start:
        """End it and start it; `way`: one of WAYS."""
        if way == "killed":
            self._lab.kill()
        else:
            self._lab.stop()
        if way == "cold":
            self._forget()
        self._hear_out()
        return self._start()

    def _forget(self) -> None:
        """What a boot takes away."""
        self._lab.host.sh(f"{sys.executable} -m steerd down {self._lab.config}")
        shutil.rmtree(self._lab.directory / "run")
        with (self._lab.directory / "state" / "registry" / "data.mdb").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _hear_out(self) -> None:
        """Forget what the one that ended said."""
        self._notified.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._notified.recv(4096)
        self._notified.settimeout(_PATIENCE)

    def _start(self) -> Start:
        seen = len(self._lab.events())
        ready = 0.0

        def listen() -> None:
            nonlocal ready
            while not self._notified.recv(4096).startswith(b"READY=1"):
                pass
            ready = time.monotonic() - began

        clock, began = time.time(), time.monotonic()
        self._lab.start(listen, through=("env", f"NOTIFY_SOCKET={self._lab.directory / 'notify'}"))
        asked = time.monotonic()
        self._ask()
        answered = time.monotonic() - asked
        parts = {}
        for event in self._lab.events()[seen:]:
            if event["event"] in _EVENTS:
                at = datetime.fromisoformat(event["timestamp"]).timestamp()
                parts[_EVENTS[event["event"]]] = at - clock
                clock = at
        return Start(ready, parts, answered)

    def _ask(self) -> None:
        expected = registries.alias(self._asked)
        with self._lab.client.entered():
            client = socket.create_connection((ENDPOINT4, 80), timeout=15)
        with client:
            client.sendall(f"GET / HTTP/1.1\r\nHost: {registries.name(self._asked)}\r\n\r\n".encode())
            answer = client.recv(4096).decode().strip()
        if not answer.startswith(expected):
            raise SystemExit(f"bench: meant for {expected}, answered by {answer}")


def _import_alone(module: str) -> float:
    """Seconds that an interpreter takes that imports a module and ends."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=ROOT)
    return time.monotonic() - began


def _parts(starts: list[Start]) -> dict[str, float]:
    return {part: round(spread([start.parts[part] for start in starts]).median, 3) for part in starts[0].parts}


def run(console: Console) -> Result:
    """All kinds in turn; two minutes, half of which the import of the routes takes."""
    with ExitStack() as stack:

        def new_host(role: str) -> Host:
            host = Host(role)
            stack.callback(host.close)
            return host

        console.print(f"importing {ROUTES:,} routes ...")
        machines = {size: Steerd(stack.enter_context(gateway(new_host)), size) for size in SIZES}
        starts: dict[str, list[Start]] = {f"{size.prefix}{way}": [] for size in SIZES for way in WAYS}
        alone: dict[str, list[float]] = {"steerd.daemon": [], "steerd.worker": []}
        for _ in range(ROUNDS):
            for way in WAYS:
                for size, machine in machines.items():
                    starts[f"{size.prefix}{way}"].append(machine.again(way))
            for module, seconds in alone.items():
                seconds.append(_import_alone(module))
        import_s = machines[SIZES[0]].import_s
    ready = {name: spread([start.ready for start in found]) for name, found in starts.items()}
    figures = {
        name: {
            "ready_s": report.rounded(ready[name], 3),
            "parts_s": _parts(found),
            "first_answer_s": round(spread([start.answered for start in found]).median, 4),
        }
        for name, found in starts.items()
    }
    ratios = {f"{way}/allowed": spread([s.ready / allowed for s in starts[way]]) for way, allowed in ALLOWED_S.items()}
    ratios |= {
        f"{way}/small_{way}": report.paired((s.ready for s in starts[way]), (s.ready for s in starts[f"small_{way}"]))
        for way in WAYS
    }
    _show(console, figures)
    report.show_ratios(console, ratios)
    return Result(
        "start",
        ratios,
        {
            **figures,
            "import_alone_s": {name: report.rounded(spread(seconds), 3) for name, seconds in alone.items()},
            "conditions": {
                "routes": ROUTES, "aliases": registries.ALIASES, "rounds": ROUNDS, "import_s": round(import_s, 1),
            },
        },
        [Goal(f"{way}/allowed", 1, at_least=False) for way in ALLOWED_S],
    )  # fmt: skip


def _show(console: Console, figures: dict[str, dict[str, Any]]) -> None:
    parts = [part.replace("_", " ") for part in _EVENTS.values()]
    table = report.table("start to ready, seconds", "", "median (lowest - highest)", *parts, "first answer")
    for name, found in figures.items():
        ready = "{median:.2f} ({lowest:.2f} - {highest:.2f})".format(**found["ready_s"])
        table.add_row(name, ready, *(f"{found['parts_s'][part]:.2f}" for part in _EVENTS.values()),
                      f"{found['first_answer_s']:.3f}")  # fmt: skip
    console.print(table)
