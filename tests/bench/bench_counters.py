"""What counting a decision costs the hot path: the words of its service, parser and reason, its time, and the looks at
the two switches, as the worker does all of it for each packet (steerd.record).

No packets and no kernel. `cost` is nanoseconds for each decision, of which 1,000 are allowed; the least of many short
runs, since whatever else the machine does only ever adds. `before` is what was counted until there were series: one
word, by reason.
"""

from __future__ import annotations

import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import cast

import structlog
from rich.console import Console
from rich.table import Table

from steerd.control.registry import Reader
from steerd.core.engine import Decision
from steerd.model import TCP, Outcome, Reason
from steerd.record import Record
from steerd.telemetry.counters import Counters, LogSwitch
from steerd.wire.packet import ACK, Packet
from tests.bench.scenario import Result

SERVICES = 100
PARSERS = ("tls", "http", "ssh")
ALLOWED_NS = 1_000
_CALLS, _RUNS = 2_000, 500


def run(console: Console) -> Result:
    with tempfile.TemporaryDirectory(prefix="steerd-bench-") as directory:
        counters = Counters.create(Path(directory) / "counters", 2)
        counters.log = LogSwitch(20, 0)
        counters.name_series([(f"service-{number}", PARSERS) for number in range(SERVICES)])
        log = cast(structlog.typing.FilteringBoundLogger, structlog.get_logger())
        # Nothing is looked up where no line is written.
        record = Record(counters, 0, cast(Reader, None), log)
        packet = Packet(4, bytes(4), bytes(4), TCP, 1, 1, ACK, 1, 0, b"", b"", b"", b"")
        decision = Decision(Outcome.STEER, Reason.ROUTE, 4096, f"service-{SERVICES // 2}", {}, False, None, "http")
        slot = counters.slot(1)

        def nothing() -> None:
            pass

        def before() -> None:
            slot[Reason.ROUTE] += 1

        def counted() -> None:
            record.begin()
            record.decision(packet, decision)

        empty = _nanoseconds(nothing)
        cost = _nanoseconds(counted) - empty
        one_word = _nanoseconds(before) - empty
        (series,) = [each for each in counters.series() if sum(each.reasons)]
        assert series.reasons[Reason.ROUTE] == sum(series.times) == _CALLS * _RUNS
    table = Table("", "ns for a decision", title="counting")
    table.add_row("one word, by reason", f"{one_word:.0f}")
    table.add_row("all that is counted", f"{cost:.0f}")
    table.add_row("allowed", f"{ALLOWED_NS:.0f}")
    console.print(table)
    return Result(
        "counters",
        {"cost/allowed": round(cost / ALLOWED_NS, 2)},
        {"cost_ns": round(cost), "before_ns": round(one_word)},
    )


def _nanoseconds(call: Callable[[], None]) -> float:
    return min(timeit.repeat(call, number=_CALLS, repeat=_RUNS)) / _CALLS * 1e9
