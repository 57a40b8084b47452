"""`steerctl top`: what happened between two looks at the counters, for programs and on one screen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steerd import config as configuration
from steerd.cli import ctl
from steerd.cli.ctl import top
from steerd.cli.ctl.show import HEIGHT, WIDTH
from steerd.cli.ctl.top import Sample, frame_of, in_lines
from steerd.control.registry import Registry
from steerd.model import Reason
from steerd.telemetry.counters import BOUNDS, Counters, Series
from tests.unit.test_api import Served, serving
from tests.unit.test_ctl import TEXT


def status(waiting: int, dropped: int) -> dict[str, Any]:
    worker = {"waiting": waiting, "queue_dropped": dropped, "socket_dropped": None}
    use = {"entries": 50, "limit": 200}
    return {"machine": {"version": "1", "workers": [worker, worker], "gauges": {"pending_flows": 3}, "conntrack": use}}


def series(service: str, parser: str, counts: dict[Reason, int], times: dict[int, int]) -> Series:
    reasons = [counts.get(reason, 0) for reason in Reason]
    return Series(service, parser, reasons, [times.get(place, 0) for place in range(len(BOUNDS) + 1)], 0)


def test_what_happened_between_two_samples() -> None:
    before = Sample(100.0, status(9, 10), [series("web", "http", {Reason.ROUTE: 10}, {0: 10})])
    after = Sample(
        102.0,
        status(4, 15),
        [
            series("web", "http", {Reason.ROUTE: 110, Reason.UNMATCHED: 2}, {0: 15, 3: 97}),
            # New since then, and one that began anew.
            series("names", "dns", {Reason.DEFAULT: 8}, {len(BOUNDS): 1}),
        ],
    )
    assert frame_of(before, after, [{"target": "10.64.0.1:80", "flows": 7}]) == {
        "version": "1",
        "seconds": 2.0,
        "decisions": 55.0,
        "services": {"web": 51.0, "names": 4.0},
        "reasons": {"route": 50.0, "default": 4.0, "unmatched": 1.0},
        "queues": {"waiting": 8, "queue_dropped": 5.0, "socket_dropped": 0.0},
        "undecided": {"pending_flows": 3},
        "conntrack": {"entries": 50, "limit": 200},
        "targets": [{"target": "10.64.0.1:80", "flows": 7}],
        "latency": [
            {"at_most_ns": 5_000, "decisions": 5},
            {"at_most_ns": 50_000, "decisions": 97},
            {"at_most_ns": None, "decisions": 1},
        ],
        "p50_ns": 50_000,
        "p99_ns": 50_000,
    }
    # The counters were set back (another number of workers).
    fresh = Sample(103.0, status(0, 0), [series("web", "http", {Reason.ROUTE: 3}, {0: 3})])
    again = frame_of(after, fresh, None)
    assert (again["services"], again["queues"]["queue_dropped"], again["targets"]) == ({"web": 3.0}, 0.0, None)
    quiet = frame_of(fresh, fresh._replace(at=104.0), [])
    assert (quiet["decisions"], quiet["latency"], quiet["p99_ns"]) == (0.0, [], None)


@pytest.mark.parametrize("targets", [None, []])
def test_a_busy_daemon_fits_one_screen(targets: list[dict[str, Any]] | None) -> None:
    before = Sample(0.0, status(0, 0), [])
    counts = dict.fromkeys(Reason, 10**5)
    times = dict.fromkeys(range(len(BOUNDS) + 1), 10**6)
    names = [f"service-with-a-name-of-64-letters-{number:030}" for number in range(100)]
    after = Sample(1.0, status(10**6, 10**6), [series(name, "", counts, times) for name in names])
    host = "[2001:db8:1234:5678:1234:5678:1234:{}]:65535"
    busiest = None if targets is None else [{"target": host.format(n), "flows": 10**7} for n in range(8)]
    frame = frame_of(before, after, busiest)
    lines = in_lines(frame)
    assert len(lines) < HEIGHT
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert "94 others" in text
    assert ("only root may look" in text) is (targets is None)
    if targets is not None:
        assert all(f":{n}]:65535" in text for n in range(8))


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "steerd.toml").write_text(TEXT.format(directory=tmp_path))
    registry = Registry(str(tmp_path))
    registry.publish(configuration.load(tmp_path / "steerd.toml"))
    with serving(registry, tmp_path) as served:
        yield served
    registry.close()


def test_one_interval_of_a_running_daemon(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters.create(api.run_dir / "counters", 2)
    counters.name_series([("web", ["http"])])
    start = counters.blocks()["web", "http"]
    counters.slot(1)[start + Reason.ROUTE] = 1000

    clock = [100.0]

    class Clock:
        """Time passes while it sleeps."""

        @staticmethod
        def monotonic() -> float:
            return clock[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            clock[0] += seconds
            counters.slot(1)[start + Reason.ROUTE] += 30

    monkeypatch.setattr(top, "time", Clock)
    arguments = ["top", "--once", "--interval", "2", "--config", str(api.run_dir / "steerd.toml")]
    found = json.loads(CliRunner().invoke(ctl.app, [*arguments, "--json"]).stdout)
    assert (found["services"], found["reasons"]) == ({"web": 15.0}, {"route": 15.0})
    assert found["conntrack"] == {"entries": 7, "limit": 262144}
    shown = CliRunner().invoke(ctl.app, arguments)
    assert shown.exit_code == 0
    assert "decisions/s by service" in shown.stdout
    assert "\n  web " in shown.stdout
