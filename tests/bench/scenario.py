"""What all scenarios of `make bench` share: their result, its charts and goals, programs compiled at run time.

A scenario is a file `bench_NAME.py` with a function `run(console) -> Result`. It measures the thing and what it is
compared with in turn, in one run, on one machine, so that the ratio means something even where the figures do not.
What becomes of results is in tests/bench/results.py.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """A figure from several rounds."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.lowest:,.0f} - {self.highest:,.0f})"


class Goal(NamedTuple):
    """What one of the ratios should be."""

    ratio: str
    bound: float
    at_least: bool = True
    """Else at most."""


class Bar(NamedTuple):
    """One line of a chart."""

    label: str
    value: float | Spread
    ours: bool = False
    """Shown in another colour than what it is compared with."""
    note: str = ""
    """Behind the value: an absolute figure beside a ratio, say."""


class Chart(NamedTuple):
    """A picture of a few figures, drawn by tests/bench/plot.py."""

    name: str
    """Of the file, behind that of the scenario."""
    title: str
    """What, in which unit, and whether less is better."""
    bars: Sequence[Bar]
    reference: float | None = None
    """Where a line is drawn through all bars: 1 for ratios, or a goal."""


class Result(NamedTuple):
    """What a scenario found. Ratios are named `ours/theirs`; more is better unless the name says otherwise."""

    scenario: str
    ratios: Mapping[str, float | Spread]
    figures: Mapping[str, Any]
    """Named with their unit (`..._per_s`, `..._us`, `..._s`), or nested by what was measured."""
    goals: Sequence[Goal] = ()
    charts: Sequence[Chart] = ()


def is_quick() -> bool:
    """Whether scenarios are only to show that they work: STEERD_BENCH_QUICK is in the environment."""
    return "STEERD_BENCH_QUICK" in os.environ


def rounds_of(number: int) -> int:
    """So many rounds, or one if that is quick."""
    return 1 if is_quick() else number


def count_of(number: int) -> int:
    """So many connections, or a tenth if that is quick."""
    return number // 10 if is_quick() else number


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def compile_c(source: Path, directory: Path) -> Path:
    """Compile one C file with the system's compiler; returns the program. Raises SystemExit with what it said."""
    program = directory / source.stem
    done = subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"bench: cc could not compile {source}:\n{done.stderr}")
    return program
