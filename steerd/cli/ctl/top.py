"""`steerctl top`: what happens now.

Decisions by service, by reason and by the time they took are differences of what the workers count in shared memory
(telemetry.counters), which costs the daemon nothing; queues and conntrack's use are the API's (GET /v1/status). The
busiest targets are counted from conntrack by this process itself, which takes root; where that is much work (6 us for
each entry) it is done less often than the rest.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from steerd.cli.ctl import ask, show
from steerd.cli.options import DEFAULT_CONFIG, Config, Json
from steerd.errors import ForbiddenError, KernelError

if TYPE_CHECKING:
    from steerd.telemetry.counters import Series

_SECONDS = 10.0
_ROWS, _LOWER_ROWS = 7, 8
_IDLE_SHARE = 10
"""Conntrack is read for at most a tenth of the time."""
_BAR = 10
_NAME = 22


class Sample(NamedTuple):
    """What was counted up to a moment."""

    at: float
    """Seconds of the monotonic clock."""
    status: dict[str, Any]
    """As GET /v1/status."""
    series: list[Series]


def top(
    interval: Annotated[float, typer.Option(help="Seconds from one look to the next.", min=0.1, max=3600)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look at one interval, show it, and end.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """A live view: decisions a second by service and by reason, queues, the busiest targets (as root), and how long
    decisions take. Until Ctrl-C. With --json a JSON object a line for each interval."""
    frames = _frames(config, interval)
    try:
        if as_json or once or not sys.stdout.isatty():
            for frame in frames:
                typer.echo(json.dumps(frame) if as_json else "\n".join(in_lines(frame)))
                if once:
                    break
            return
        from rich.live import Live
        from rich.text import Text

        with Live(Text("Looking ..."), console=show.console(), auto_refresh=False, screen=True) as live:
            for frame in frames:
                live.update(Text("\n".join(in_lines(frame)), no_wrap=True), refresh=True)
    except KeyboardInterrupt:
        return


def _frames(config: Path, interval: float) -> Iterator[dict[str, Any]]:
    from steerd.telemetry.counters import Counters

    run_dir = ask.run_dir(config)
    status = _status(run_dir)
    try:
        counters = Counters.open(Path(run_dir) / "counters")
    except PermissionError:
        raise ForbiddenError(f"{run_dir}/counters may not be read by you; be root, or in the group steerd.") from None
    targets = _Targets(config)
    before = Sample(time.monotonic(), status, list(counters.series()))
    while True:
        time.sleep(interval)
        after = Sample(time.monotonic(), _status(run_dir), list(counters.series()))
        yield frame_of(before, after, targets.busiest(time.monotonic()))
        before = after


def _status(run_dir: str) -> dict[str, Any]:
    from steerd.control import client

    found: dict[str, Any] = client.request(run_dir, "GET", "status", timeout=_SECONDS)
    return found


class _Targets:
    """Counts the open flows to each target."""

    def __init__(self, config: Path) -> None:
        import ipaddress

        from steerd.model import PROTOCOL_NUMBERS

        self._endpoints: dict[tuple[bytes, int], list[tuple[int, int]]] = {}
        for each in ask.pages(config, "endpoints", "endpoints"):
            place = (ipaddress.ip_address(each["address"]).packed, PROTOCOL_NUMBERS[each["protocol"]])
            self._endpoints.setdefault(place, []).append((each["first_port"], each["last_port"]))
        self._found: list[dict[str, Any]] | None = None
        self._next = 0.0

    def busiest(self, now: float) -> list[dict[str, Any]] | None:
        """The targets with the most open flows; None: this user may not look."""
        if now >= self._next:
            self._found = self._look()
            self._next = now + _IDLE_SHARE * (time.monotonic() - now)
        return self._found

    def _look(self) -> list[dict[str, Any]] | None:
        import ipaddress

        from steerd.kernel import conntrack
        from steerd.model import Target

        flows: Counter[tuple[bytes, int]] = Counter()
        try:
            for entry in conntrack.entries(translated=True):
                ranges = self._endpoints.get((entry.flow.dst, entry.protocol), ())
                if any(first <= entry.flow.dport <= last for first, last in ranges) and not entry.is_over:
                    flows[entry.delivered.dst, entry.delivered.dport] += 1
        except (KernelError, PermissionError):
            return None
        busiest = flows.most_common(_LOWER_ROWS)
        return [
            {"target": str(Target(ipaddress.ip_address(address), port)), "flows": count}
            for (address, port), count in busiest
        ]


# ---- what happened between two moments ----


def frame_of(before: Sample, after: Sample, targets: list[dict[str, Any]] | None) -> dict[str, Any]:
    """What happened between two samples; `targets` as they are."""
    from steerd.model import Reason
    from steerd.telemetry.counters import BOUNDS

    seconds = max(after.at - before.at, 1e-6)
    old = {(series.service, series.parser): series for series in before.series}
    services: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    times = [0] * (len(BOUNDS) + 1)
    for series in after.series:
        past = old.get((series.service, series.parser))
        for reason in Reason:
            more = _more(series.reasons[reason], past.reasons[reason] if past else 0)
            services[series.service] += more
            reasons[reason.name.lower()] += more
        for place, count in enumerate(series.times):
            times[place] += _more(count, past.times[place] if past else 0)

    def queues(sample: Sample, name: str) -> int:
        return sum(worker[name] or 0 for worker in sample.status["machine"]["workers"])

    def rates(counts: Counter[str]) -> dict[str, float]:
        return {name: round(count / seconds, 1) for name, count in counts.most_common() if count}

    machine = after.status["machine"]
    dropped = {
        name: round(_more(queues(after, name), queues(before, name)) / seconds, 1)
        for name in ("queue_dropped", "socket_dropped")
    }
    bounds = [*BOUNDS, None]
    return {
        "version": machine["version"],
        "seconds": round(seconds, 3),
        "decisions": round(services.total() / seconds, 1),
        "services": rates(services),
        "reasons": rates(reasons),
        "queues": {"waiting": queues(after, "waiting"), **dropped},
        "undecided": machine["gauges"],
        "conntrack": machine["conntrack"],
        "targets": targets,
        "latency": [
            {"at_most_ns": bound, "decisions": count} for bound, count in zip(bounds, times, strict=True) if count
        ],
        "p50_ns": _percentile(times, bounds, 0.5),
        "p99_ns": _percentile(times, bounds, 0.99),
    }


def _more(now: int, then: int) -> int:
    """How much a counter rose; one that was set back has begun anew."""
    return now - then if now >= then else now


def _percentile(times: list[int], bounds: list[int | None], share: float) -> int | None:
    """The bound of the class that it lies in; None: there is none."""
    wanted = share * sum(times)
    for bound, count in zip(bounds, times, strict=True):
        wanted -= count
        if count and wanted <= 0:
            return bound
    return None


# ---- how it looks ----


def in_lines(frame: dict[str, Any]) -> list[str]:
    """For a screen of 80 by 24."""
    queues, use = frame["queues"], frame["conntrack"]
    full = f", conntrack {100 * use['entries'] // use['limit']} % full" if use and use["limit"] else ""
    dropped = f"dropped/s {queues['queue_dropped']:,} (queue full), {queues['socket_dropped']:,} (socket full)"
    undecided = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in frame["undecided"].items())
    services = {name or "(no service)": rate for name, rate in frame["services"].items()}
    targets = frame["targets"]
    latency = [(_bound(each["at_most_ns"]), each["decisions"]) for each in frame["latency"]]
    return [
        f"steerd {frame['version']}: {frame['decisions']:,} decisions/s over {frame['seconds']:g} s{full}",
        f"queues: {queues['waiting']:,} waiting, {dropped}",
        undecided,
        "",
        *show.beside(
            _rows("decisions/s by service", services, _ROWS),
            _rows("decisions/s by reason", frame["reasons"], _ROWS),
        ),
        "",
        *show.beside(
            ["busiest targets: only root may look"]
            if targets is None
            else _rows("open flows by target", {_end(each["target"]): each["flows"] for each in targets}, _LOWER_ROWS),
            _histogram(latency),
        ),
    ]


def _rows(title: str, counts: dict[str, float], most: int) -> list[str]:
    """A title, and the largest; those that have no place are summed."""
    found = list(counts.items())
    if len(found) > most:
        others = found[most - 1 :]
        found = [*found[: most - 1], (f"{len(others)} others", round(sum(count for _, count in others), 1))]
    return [title, *(f"  {name[:_NAME]:<{_NAME}} {count:>13,}" for name, count in found)]


def _end(target: str) -> str:
    """Of a long one the end, which tells aliases apart."""
    return target if len(target) <= _NAME else f"..{target[2 - _NAME :]}"


def _histogram(classes: list[tuple[str, int]]) -> list[str]:
    """At most as many lines as there are for it: the last classes together, if there are more."""
    if len(classes) > _LOWER_ROWS:
        rest = classes[_LOWER_ROWS - 1 :]
        classes = [*classes[: _LOWER_ROWS - 1], (f"> {classes[_LOWER_ROWS - 2][0][3:]}", sum(n for _, n in rest))]
    most = max((count for _, count in classes), default=1)
    return [
        "time that decisions took",
        *(f"  {name:<10}{count:>13,} {'#' * -(-_BAR * count // most)}" for name, count in classes),
    ]


def _bound(nanoseconds: int | None) -> str:
    if nanoseconds is None:
        return "longer"
    for size, unit in ((1_000_000, "ms"), (1_000, "us")):
        if nanoseconds >= size:
            return f"<= {nanoseconds / size:g} {unit}"
    return f"<= {nanoseconds} ns"
