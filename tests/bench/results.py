"""What becomes of a result: a JSON file, the plots of its charts, and a page of all of them.

    results/NAME.json           the figures, with machine, versions and date
    results/NAME-CHART.svg      drawn from it
    results/README.md           all goals, charts and ratios, from all the JSON files

`results` is tests/bench/results, whose files are part of the sources and which the project's README shows; with
STEERD_BENCH_QUICK, whose figures mean nothing, it is build/bench. `python -m tests.bench --plots` makes plots and page
again without measuring.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench import plot
from tests.bench.scenario import Result, Spread, is_quick

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("steerd", "lmdb", "msgspec", "netfilterqueue", "pyroute2")
_PROGRAMS = {
    "nft": ("nft", "--version"),
    "haproxy": ("haproxy", "-v"),
    "nginx": ("nginx", "-v"),
    "sslh": ("sslh-select", "-V"),
    "cc": ("cc", "-dumpfullversion"),
}
# The share of the machine that others may use before what is measured means little.
DISTURBED = 0.1
_HEAD = """\
# What `make bench` measured

Made from the JSON files here by `python -m tests.bench --plots`; each scenario's file `tests/bench/bench_NAME.py` says
what it does and where the time goes. Everything ran in network namespaces on one machine: ratios of one run mean
something, absolute figures mean little. Ratios are medians of rounds in turn (A B A B ...), with the lowest and the
highest round. Where others used the machine meanwhile, only `..._per_cpu_second` means something: what is done for each
second of CPU time of client, server and system under test together.
"""


def directory() -> Path:
    """Where results of this run go."""
    return ROOT / "build" / "bench" if is_quick() else Path(__file__).parent / "results"


class Used(NamedTuple):
    """Seconds up to a moment."""

    at: float
    cpu: float
    """Of all cores."""
    ours: float
    """Of this process and of those that it has waited for."""


def used() -> Used:
    """Up to now."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    ours = os.times()
    ticks = user + nice + system + irq + softirq
    return Used(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(ours[:4]))


def cores_of_others(before: Used, after: Used) -> float:
    """How many cores everybody else has used in between, about: a killed daemon's workers are taken for others."""
    others = (after.cpu - before.cpu) - (after.ours - before.ours)
    return max(0.0, others / (after.at - before.at))


def document(result: Result, others: float) -> dict[str, Any]:
    """A result as it is in its JSON file. Spreads are objects with `median`, `lowest` and `highest`. `others`: cores
    that were used by others meanwhile."""
    return {
        "scenario": result.scenario,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine() | {"cores_of_others": round(others, 2)},
        "versions": _versions(),
        "goals": [goal._asdict() for goal in result.goals],
        "ratios": {name: _value(value, 4) for name, value in result.ratios.items()},
        "figures": result.figures,
        "charts": [
            {**chart._asdict(), "bars": [{**bar._asdict(), "value": _value(bar.value, 4)} for bar in chart.bars]}
            for chart in result.charts
        ],
    }


def line(found: Mapping[str, Any]) -> str:
    """The one line that ends a scenario: `bench: {...}`."""
    return "bench: " + json.dumps({name: part for name, part in found.items() if name != "charts"})


def store(found: Mapping[str, Any]) -> Path:
    """Write the JSON file of a document; returns its path."""
    path = directory() / f"{found['scenario']}.json"
    _write(path, json.dumps(found, indent=1) + "\n")
    return path


def show_all() -> list[Path]:
    """Plots and page anew from the JSON files that are there; returns the paths."""
    where = directory()
    documents = [json.loads(path.read_text()) for path in sorted(where.glob("*.json"))]
    files = {where / "README.md": page(documents)}
    for found in documents:
        files |= {where / plot_name(found, chart): plot.draw(chart) for chart in found["charts"]}
    for left_over in set(where.glob("*.svg")) - set(files):
        left_over.unlink()
    for path, text in files.items():
        _write(path, text)
    return list(files)


def plot_name(found: Mapping[str, Any], chart: Mapping[str, Any]) -> str:
    """The file of a chart, beside the JSON."""
    return f"{found['scenario']}-{chart['name']}.svg"


def page(documents: Iterable[Mapping[str, Any]]) -> str:
    """All results in Markdown."""
    text = _HEAD
    documents = list(documents)
    goals = [row for found in documents for row in _goal_rows(found)]
    if goals:
        text += "\n## Goals\n\n| scenario | ratio | goal | measured | |\n|---|---|---|---|---|\n" + "".join(goals)
    for found in documents:
        machine, versions = found["machine"], found["versions"]
        others = machine.get("cores_of_others")  # older results do not say
        text += (
            f"\n## {found['scenario']}\n\n{found['date'][:10]}; {machine['cpu']}, {machine['cores']} cores"
            f"{'' if others is None else f' ({others:.1f} of them used by others meanwhile)'},"
            f" {machine['memory_mb'] // 1024} GB; Linux {machine['kernel']}, {machine['system']};"
            f" {', '.join(f'{name} {version}' for name, version in versions.items())}\n\n"
        )
        for chart in found["charts"]:
            text += f"![{chart['title']}]({plot_name(found, chart)})\n\n"
        text += "| ratio | measured |\n|---|---|\n"
        text += "".join(f"| `{name}` | {_shown(value)} |\n" for name, value in found["ratios"].items())
    return text


def _goal_rows(found: Mapping[str, Any]) -> list[str]:
    rows = []
    machine = found["machine"]
    disturbed = ", disturbed" if machine.get("cores_of_others", 0) > machine["cores"] * DISTURBED else ""
    for goal in found["goals"]:
        value = found["ratios"][goal["ratio"]]
        measured = _median(value)
        met = measured >= goal["bound"] if goal["at_least"] else measured <= goal["bound"]
        sign = "at least" if goal["at_least"] else "at most"
        rows.append(
            f"| {found['scenario']} | `{goal['ratio']}` | {sign} {goal['bound']:g} | {_shown(value)} |"
            f" {'met' if met else '**missed**'}{disturbed} |\n"
        )
    return rows


def _median(value: Any) -> float:
    return float(value["median"] if isinstance(value, Mapping) else value)


def _shown(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"{value:.3g}"
    return f"{value['median']:.3f} ({value['lowest']:.3f} - {value['highest']:.3f})"


def _value(value: float | Spread, digits: int) -> Any:
    if isinstance(value, Spread):
        return {name: round(part, digits) for name, part in value._asdict().items()}
    return round(value, digits)


def _machine() -> dict[str, Any]:
    """Where this was measured."""
    memory = next(row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemTotal:"))
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": int(memory.split()[1]) // 1024,
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        # Of everybody that takes part; negative where others were using the machine meanwhile.
        "niceness": os.nice(0),
    }


def _versions() -> dict[str, str]:
    """Of everything that takes part."""
    versions = {"python": platform.python_version()}
    for name, command in _PROGRAMS.items():
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"\d+\.\d+[\w.+~-]*", done.stdout + done.stderr)
        versions[name] = found[0] if found else "unknown"
    return versions | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _write(path: Path, text: str) -> None:
    """As root, but for who owns the checkout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    owner = ROOT.stat()
    for made in (path, *path.relative_to(ROOT).parents[:-1]):
        os.chown(ROOT / made, owner.st_uid, owner.st_gid)
