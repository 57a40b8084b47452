"""What all scenarios of `make bench` share: their result, the line it ends with, programs compiled at run time.

A scenario is a file `bench_NAME.py` with a function `run(console) -> Result`. It measures the thing and what it is
compared with in turn, in one run, on one machine, so that the ratio means something even where the figures do not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGES = ("lmdb", "msgspec", "netfilterqueue", "pyroute2")


class Result(NamedTuple):
    """What a scenario found. Ratios are named `ours/theirs`; more is better unless the name says otherwise."""

    scenario: str
    ratios: dict[str, float]
    figures: dict[str, Any]
    """Named with their unit (`..._per_s`, `..._us`, `..._s`), or nested by what was measured."""


class Spread(NamedTuple):
    """A figure from several rounds."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.lowest:,.0f} - {self.highest:,.0f})"


def rounds_of(number: int) -> int:
    """So many rounds, or two with STEERD_BENCH_QUICK in the environment, to see whether everything works."""
    return 2 if "STEERD_BENCH_QUICK" in os.environ else number


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def line(result: Result) -> str:
    """The one line that ends a scenario: `bench: {...}`."""
    return "bench: " + json.dumps({**result._asdict(), "machine": machine()})


def machine() -> dict[str, Any]:
    """Where this was measured."""
    memory = next(row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemTotal:"))
    nft = subprocess.run(["nft", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    return {
        "cores": os.cpu_count(),
        "memory_mb": int(memory.split()[1]) // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nft": nft.removeprefix("v"),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def compile_c(source: Path, directory: Path) -> Path:
    """Compile one C file with the system's compiler; returns the program. Raises SystemExit with what it said."""
    program = directory / source.stem
    done = subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"bench: cc could not compile {source}:\n{done.stderr}")
    return program
