"""steerctl's nouns: tables for people, JSON for programs, and names for shells, from a daemon that answers."""

from __future__ import annotations

import inspect
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import typer
from typer.testing import CliRunner

from steerd import config as configuration
from steerd import paths
from steerd.cli import ctl
from steerd.cli.ctl import show
from steerd.cli.explain import as_text
from steerd.control.explain import ExplanationView, StepView
from steerd.control.registry import Registry
from steerd.errors import SteerdError
from tests.unit.test_api import Bare, Served, serving
from tests.unit.test_complete import SHELLS, offered

TEXT = """
[gateway]
run_dir = "{directory}"
state_dir = "{directory}"
[pools.tenants]
prefixes = ["10.64.0.0/29", "fd00:64::/125"]
[pools.others]
prefixes = ["10.65.0.0/30"]
mode = "anyip"
[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
routes = [{{ when = {{ http.host = "a.example" }}, target = "10.64.0.1:80" }}]
[services.names]
endpoints = ["203.0.113.10:53/udp"]
inspect = ["dns"]
default = "10.64.0.4:53"
"""
RUNNER = CliRunner()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "steerd.toml").write_text(TEXT.format(directory=tmp_path))
    registry = Registry(str(tmp_path))
    registry.publish(configuration.load(tmp_path / "steerd.toml"))
    for name in ("alice", "bob"):
        registry.leases.add(name, "tenants", service=None, when={}, source=None, port=0, ttl=None, now=0)
    with serving(registry, tmp_path) as served:
        yield served
    assert served.faults == []
    registry.close()


def steerctl(api: Served, *arguments: str) -> str:
    """What it says; an error is raised as it is."""
    result = RUNNER.invoke(ctl.app, [*arguments, "--config", str(api.run_dir / "steerd.toml")])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def rows(text: str) -> list[list[str]]:
    """The rows of a table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def leaves(app: typer.Typer, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words."""
    for command in app.registered_commands:
        assert command.callback is not None
        yield (*path, command.name or command.callback.__name__), command.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from leaves(group.typer_instance, *path, str(group.name))


def test_every_command_gives_json_and_says_what_it_does() -> None:
    found = dict(leaves(ctl.app))
    assert {("status",), ("lease", "add"), ("leases", "add"), ("flows", "kill"), ("export",)} <= found.keys()
    for words, callback in found.items():
        assert "as_json" in inspect.signature(callback).parameters, words
        assert inspect.getdoc(callback), words


def test_services_and_endpoints(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    services = json.loads(steerctl(api, "services", "--json"))
    assert [service["name"] for service in services] == ["names", "web"]
    assert rows(steerctl(api, "services"))[1][:4] == [
        "web", "203.0.113.10:80/tcp, [2001:db8::10]:80/tcp", "http", "",
    ]  # fmt: skip
    assert len(json.loads(steerctl(api, "endpoints", "--json"))) == 3
    assert rows(steerctl(api, "endpoints"))[0] == ["203.0.113.10:53/udp", "names", "every datagram", ""]
    monkeypatch.setattr(Bare, "elsewhere", lambda _machine, addresses: set(addresses))
    assert {row[3] for row in rows(steerctl(api, "endpoints"))} == {"not an address of this machine now"}


def test_pools_and_aliases(api: Served) -> None:
    assert [pool["leased"] for pool in json.loads(steerctl(api, "pools", "--json"))] == [0, 2]
    assert ["tenants", "10.64.0.0/29, fd00:64::/125", "addresses", "8", "8", "2", "0"] in rows(steerctl(api, "pools"))
    aliases = json.loads(steerctl(api, "aliases", "tenants", "--json"))
    assert [(alias["index"], alias["lease"]) for alias in aliases if alias["lease"]] == [(0, "alice"), (2, "bob")]
    assert len(aliases) == 8
    assert ["0", "10.64.0.0, fd00:64::", "leased", "alice"] in rows(steerctl(api, "aliases", "tenants"))
    assert len(rows(steerctl(api, "aliases", "tenants", "--state", "leased"))) == 2
    with pytest.raises(SteerdError, match=r"^none is not a pool of "):
        steerctl(api, "aliases", "none")


def test_targets_and_what_is_known_of_them(api: Served) -> None:
    targets = json.loads(steerctl(api, "targets", "--json"))
    by_target = {target["target"]: target for target in targets}
    assert {"10.64.0.1:80", "10.64.0.4:53"} <= by_target.keys()
    shown = {row[1]: row[6] for row in rows(steerctl(api, "targets"))}
    first, second = (target["target"] for target in targets[:2])
    assert shown[first] == "drained"
    assert shown[second] == "nobody listens (tcp)"


def test_lists_end_where_they_are_told_to(api: Served) -> None:
    assert len(json.loads(steerctl(api, "services", "--json", "--limit", "1"))) == 1
    text = steerctl(api, "leases", "list", "--limit", "1")
    assert text.endswith("There are more; see --limit.\n")
    assert len(rows(text)) == 1
    assert "There are more" not in steerctl(api, "lease", "list", "--limit", "2")


def test_log_and_reload(api: Served) -> None:
    assert steerctl(api, "log") == "level: info\ndecisions: only those that failed\n"
    assert "decisions: one of 100, " in steerctl(api, "log", "access", "100")
    assert json.loads(steerctl(api, "log", "level", "debug", "--json")) == {"level": "debug", "access_log": 100}
    with pytest.raises(SteerdError, match=r"^steerd\.toml: services: Is missing\.$"):
        steerctl(api, "reload")


def test_routes_of_all_services(api: Served) -> None:
    assert [route["service"] for route in json.loads(steerctl(api, "route", "list", "--json"))] == ["web"]
    removed = {"service": "web", "when": {"http.host": "b.example"}, "source": None}
    steerctl(api, "route", "add", "web", "10.64.0.5:80", "--key", "http.host=b.example")
    assert len(json.loads(steerctl(api, "route", "list", "web", "--json"))) == 2
    assert json.loads(steerctl(api, "route", "remove", "web", "--key", "http.host=b.example", "--json")) == removed


LINES = {
    "steerctl lease renew al": "alice",
    "steerctl route list we": "web",
    "steerctl flows --service we": "web",
    "steerctl lease add x --pool ten": "tenants",
}


@pytest.mark.parametrize(
    ("shell", "line"), [("bash", line) for line in LINES] + [(shell, "steerctl lease renew al") for shell in SHELLS[1:]]
)
def test_names_are_completed_from_a_running_daemon(api: Served, shell: str, line: str) -> None:
    said = offered(shell, line, STEERD_CONFIG=str(api.run_dir / "steerd.toml"))
    assert LINES[line] in said
    assert {"bob", "names", "others"}.isdisjoint(said.split())


def test_what_is_wrong_with_a_value_is_said_of_its_field(api: Served) -> None:
    with pytest.raises(
        SteerdError, match=r'^when\.http\.hots: Is not a key of any parser; did you mean "http\.host"\?$'
    ):
        steerctl(api, "route", "add", "web", "10.64.0.5:80", "--key", "http.hots=b.example")
    with pytest.raises(SteerdError, match=r"a condition is an option \(--key tls\.sni=a\.example\)"):
        steerctl(api, "route", "add", "web", "10.64.0.5:80", "tls.sni=a.example")
    with pytest.raises(SteerdError, match=r"^There is no lease of the name carol\.$"):
        steerctl(api, "lease", "renew", "carol")


def test_a_terminal_shows_only_columns_with_words_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"a": "one", "b": ""}, {"a": "two", "b": ""}]
    monkeypatch.setenv("TERM", "dumb")
    looks = show.List("few", ("a", "b"), lambda each: (each["a"], each["b"]))
    printed = io.StringIO()
    monkeypatch.setattr(printed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", printed)
    show.table(looks, found, is_all=True)
    assert [line.split() for line in printed.getvalue().splitlines()] == [["few"], ["a"], [ANY], ["one"], ["two"]]
    printed.seek(0)
    printed.truncate()
    show.table(looks, [], is_all=True)
    assert printed.getvalue().splitlines()[1].split() == ["a", "b"]


def test_explain_asks_the_daemon_where_the_default_configuration_is_not(
    api: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "CONFIG", api.run_dir / "none.toml")
    monkeypatch.setattr(paths, "RUN_DIR", str(api.run_dir))
    arguments = (
        "explain",
        "--config",
        str(paths.CONFIG),
        "--to",
        "203.0.113.10:53/udp",
        "--key",
        "dns.qname=a.example",
    )
    result = RUNNER.invoke(ctl.app, arguments)
    assert result.exit_code == 0, result.output
    assert "According to the running daemon:" in result.stdout
    assert "steered to 10.64.0.4:53" in result.stdout


def test_an_explanation_fits_a_terminal() -> None:
    step = StepView("table", "handshake4: the decision is noted in bound4; synproxy checks the cookie, and opens it.")
    told = ExplanationView(
        "198.51.100.7:5000", "203.0.113.10:80/tcp", "early", None, None, None, None, {}, None, None, None, [], [], [],
        [step],
    )  # fmt: skip
    assert as_text(told).splitlines()[1:] == [f"  table       {step.text}"]
    wrapped = as_text(told, 60).splitlines()[1:]
    assert len(wrapped) == 2
    assert max(map(len, wrapped)) <= 60
    assert wrapped[1].startswith(" " * 14)
    assert " ".join(line.strip() for line in wrapped).removeprefix("table       ") == step.text
