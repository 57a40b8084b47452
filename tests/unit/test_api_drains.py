"""Drains over the API, and `steerctl drain`, `undrain`, `drains`, `targets`: what is left is counted in conntrack."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from steerd import config
from steerd.cli import ctl
from steerd.control.registry import Registry
from steerd.errors import SteerdError
from steerd.model import TCP, UDP, Target
from tests.unit.test_api import Bare, Served, serving
from tests.unit.test_flows import ENTRIES, TEXT, Known

RUNNER = CliRunner()


class Machine(Bare):
    """One whose conntrack holds `left`; everything on port 80 listens."""

    def __init__(self) -> None:
        super().__init__()
        self.left = dict(ENTRIES)
        self.looks = 0

    def entries(self, answered_by: bytes) -> Generator[Known, None, None]:
        self.looks += 1
        yield from (each for each in self.left.values() if answered_by in (b"", each.delivered.dst))

    def listening(self, targets: Sequence[Target]) -> list[list[int]]:
        return [[TCP, UDP] if target.port == 53 else [TCP] if target.port == 80 else [] for target in targets]


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def api(tmp_path: Path, machine: Machine) -> Iterator[Served]:
    (tmp_path / "steerd.toml").write_text(TEXT.format(directory=tmp_path))
    registry = Registry(str(tmp_path))
    registry.publish(config.load(tmp_path / "steerd.toml"))
    with serving(registry, tmp_path, machine=machine) as served:
        yield served
    assert served.faults == []
    registry.close()


def steerctl(api: Served, *arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(ctl.app, [*arguments, "--config", str(api.run_dir / "steerd.toml")])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_what_is_left_is_what_conntrack_holds_and_is_not_over(api: Served) -> None:
    before = int(time.time())
    counts = {"10.64.0.1:80": 1, "[fd00:64::1]:80": 1, "10.64.0.2:same": 1, "10.64.0.3": 1, "10.64.0.4:53": 1}
    counts |= {"10.64.0.5": 0, "192.0.2.7:80": 1, "10.64.0.1": 1, "10.64.0.1:81": 0}
    for target, connections in counts.items():
        status, made = api.ask("PUT", f"/v1/drains/{quote(target)}")
        assert (status, made["target"], made["connections"]) == (201, target, connections)
        assert before <= made["since"] <= time.time()
        assert api.ask("PUT", f"/v1/drains/{quote(target)}") == (200, made)
        assert api.ask("GET", f"/v1/drains/{quote(target)}") == (200, made)
    _, listed = api.ask("GET", "/v1/drains")
    assert {drain["target"]: drain["connections"] for drain in listed["drains"]} == counts
    for target in counts:
        assert api.ask("DELETE", f"/v1/drains/{quote(target)}") == (204, None)
    assert api.ask("GET", "/v1/drains") == (200, {"drains": []})


def test_what_cannot_be_drained(api: Served) -> None:
    for target, status, code in (
        ("x", 400, "invalid"),
        ("10.99.0.1:80", 404, "not_found"),
        ("10.64.0.2:80", 409, "conflict"),
    ):
        assert (api.ask("PUT", f"/v1/drains/{target}")[0], api.ask("PUT", f"/v1/drains/{target}")[1]["code"]) == (
            status,
            code,
        )
    assert api.ask("GET", "/v1/drains/10.64.0.1")[0] == api.ask("DELETE", "/v1/drains/10.64.0.1")[0] == 404


def test_nothing_is_counted_where_nothing_is_drained(api: Served, machine: Machine) -> None:
    api.ask("GET", "/v1/drains")
    assert machine.looks == 0


def test_steerctl(api: Served) -> None:
    assert steerctl(api, "drain", "10.64.0.1:80") == (0, "10.64.0.1:80: drained, 1 connections left\n")
    assert json.loads(steerctl(api, "drains", "--json")[1])[0]["connections"] == 1
    assert "10.64.0.1:80" in steerctl(api, "drains")[1]
    _, said = steerctl(api, "undrain", "10.64.0.1:80", "--json")
    assert json.loads(said) == {"target": "10.64.0.1:80"}
    with pytest.raises(SteerdError, match="is not drained"):
        steerctl(api, "undrain", "10.64.0.1:80")


def test_waiting_ends_when_nobody_is_left(api: Served, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter(["a", "leased", "b"])
    monkeypatch.setattr("steerd.cli.ctl.drains.time.sleep", lambda _: machine.left.pop(next(waits)))
    machine.left["second"] = machine.left["b"]._replace(delivered=machine.left["a"].delivered)
    monkeypatch.setitem(machine.left, "b", machine.left.pop("second"))
    status, said = steerctl(api, "drain", "10.64.0.1", "--wait", "--json")
    assert (status, json.loads(said)["connections"]) == (0, 0)
    assert list(waits) == []


def test_waiting_gives_up_in_time_and_the_drain_stays(api: Served) -> None:
    status, said = steerctl(api, "drain", "10.64.0.1", "--wait", "--timeout", "0")
    assert (status, said) == (1, "10.64.0.1: drained, 1 connections left\n")
    assert api.ask("GET", "/v1/drains/10.64.0.1")[0] == 200


def test_targets_say_what_listens_and_how_many_are_there(api: Served) -> None:
    def targets(query: str) -> dict[str, Any]:
        return {target["target"]: target for target in api.ask("GET", f"/v1/targets{query}")[1]["targets"]}

    plain, counted = targets(""), targets("?connections=true")
    assert {target["connections"] for target in plain.values()} == {None}
    assert {name: (each["listening"], each["connections"]) for name, each in counted.items()} == {
        "10.64.0.1:80": (["tcp"], 1),
        "[fd00:64::1]:80": (["tcp"], 1),
        "10.64.0.2:same": (None, 1),
        "10.64.0.3:80": (["tcp"], 1),
        "10.64.0.4:53": (["tcp", "udp"], 1),
        "10.64.0.9:80": (["tcp"], 1),
        "192.0.2.7:80": (None, 1),
    }
    _, said = steerctl(api, "targets", "--connections")
    assert "tcp, udp" in said
    assert json.loads(steerctl(api, "targets", "--json")[1])[0]["connections"] is None
