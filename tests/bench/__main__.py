"""`make bench [ONLY=name]`: every scenario in turn, or one. Each ends with one line `bench: {...}`, and a JSON file and
plots of it (tests/bench/results.py). With `--plots`, plots are drawn from the JSON again, and nothing is measured.

Everything happens in network namespaces, which are removed at the end, also when interrupted. Needs root.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from tests.bench import results


def scenarios() -> list[str]:
    """The names that ONLY= takes: one for each file bench_NAME.py."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def _interrupted(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(names: list[str]) -> int:
    if names == ["--plots"]:
        _plot()
        return 0
    unknown = [name for name in names if name not in scenarios()]
    if unknown:
        print(f"bench: there is no scenario {unknown[0]}; there are: {', '.join(scenarios())}", file=sys.stderr)
        return 2
    if os.geteuid():
        print("bench: root is needed, for network namespaces: make bench asks for it by itself", file=sys.stderr)
        return 2
    # A pipe has no width, and tables would be cut to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name in names or scenarios():
        console.rule(f"bench {name}")
        before = results.used()
        result = importlib.import_module(f"tests.bench.bench_{name}").run(console)
        found = results.document(result, results.cores_of_others(before, results.used()))
        results.store(found)
        print(results.line(found), flush=True)
    _plot()
    return 0


def _plot() -> None:
    """Say where they are, too."""
    results.show_all()
    print(f"bench: figures and plots are in {results.directory()}")


if __name__ == "__main__":
    for signal_number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(signal_number, _interrupted)
    sys.exit(main(sys.argv[1:]))
