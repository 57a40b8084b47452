"""The API's routes, leases, export and import, over its socket, and what `steerctl` makes of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from steerd import config
from steerd.cli import ctl
from steerd.control import client, transfer
from steerd.control.api import server as api_module
from steerd.control.registry import Registry
from steerd.errors import RegistryError, SteerdError
from tests.unit.test_api import Served, serving
from tests.unit.test_leases import Kernel

TEXT = """
[gateway]
state_dir = "{directory}"
run_dir = "{directory}"
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
mode = "anyip"
[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["http"]
routes = [{{ when = {{ "http.host" = "static.example" }}, target = "10.64.0.1:80" }}]
"""
HOST = {"http.host": "a.example"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "steerd.toml").write_text(TEXT.format(directory=tmp_path))
    registry = Registry(str(tmp_path), Kernel())
    registry.publish(config.load(tmp_path / "steerd.toml"))
    with serving(registry, tmp_path) as served:
        yield served
    assert served.faults == []
    registry.close()


def steerctl(api: Served, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `steerctl` prints; raises SystemExit as it ends."""
    sys.argv = ["steerctl", *arguments, "--config", str(api.run_dir / "steerd.toml")]
    with pytest.raises(SystemExit) as ended:
        ctl.main()
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return said.out


def test_routes(api: Served) -> None:
    path = "/v1/services/web/routes"
    made = {
        "service": "web",
        "when": HOST,
        "source": None,
        "targets": ["10.64.0.5:80"],
        "origin": "dynamic",
        "usable": True,
        "place": None,
        "choose": None,
        "hash": None,
    }
    assert api.ask("PUT", path, {"when": HOST, "target": "10.64.0.5:80"}) == (201, made)
    assert api.ask("PUT", path, {"when": HOST, "target": "10.64.0.6:80"})[0] == 200
    _, listed = api.ask("GET", path)
    assert [(route["origin"], route["place"]) for route in listed["routes"]] == [
        ("static", "services.web.routes[0]"),
        ("dynamic", None),
    ]
    _, first = api.ask("GET", f"{path}?limit=1")
    _, second = api.ask("GET", f"{path}?limit=5&after={first['next']}")
    assert first["routes"] + second["routes"] == listed["routes"]
    assert second["next"] is None
    several = {"target": ["10.64.0.5:80", "10.64.0.6:80"], "choose": "hash", "hash": "http.host"}
    code, view = api.ask("PUT", path, {"when": {"http.host": "s.example"}} | several)
    assert (code, view["targets"], view["choose"], view["hash"]) == (201, several["target"], "hash", "http.host")
    code, problem = api.ask("PUT", path, {"when": {"http.host": "s.example"}, "target": several["target"]})
    assert (code, problem["field"]) == (400, "target[1]")
    assert api.ask("DELETE", f"{path}?when={quote(json.dumps({'http.host': 's.example'}))}") == (204, None)
    code, problem = api.ask("PUT", path, {"when": {"http.host": "static.example"}, "target": "10.64.0.6:80"})
    assert (code, problem["code"], problem["field"]) == (409, "conflict", "when")
    assert api.ask("PUT", path, {"when": HOST})[1]["field"] == "target"
    where = f"{path}?when={quote(json.dumps(HOST))}"
    assert api.ask("DELETE", where) == (204, None)
    assert api.ask("DELETE", where)[0] == 404
    assert api.ask("DELETE", f"{path}?when=x")[1]["field"] == "when"
    assert api.ask("GET", "/v1/services/none/routes")[0] == 404


def test_leases(api: Served) -> None:
    before = time.time()
    body = {"pool": "tenants", "service": "web", "when": HOST, "port": 8080, "ttl": 3600}
    code, made = api.ask("PUT", "/v1/leases/a", body)
    assert (code, made["addresses"], made["ttl"]) == (201, ["10.64.0.0", "fd00:64::"], 3600)
    assert before + 3600 <= made["expires"] <= time.time() + 3600
    assert made["route"]["targets"] == ["10.64.0.0:8080", "[fd00:64::]:8080"]
    assert api.ask("GET", "/v1/leases/a") == (200, made)
    assert api.ask("PUT", "/v1/leases/a", body)[1]["code"] == "conflict"
    assert api.ask("PUT", "/v1/leases/b", {"pool": "tenants"})[1]["addresses"] == ["10.64.0.2", "fd00:64::2"]
    assert api.ask("PUT", "/v1/leases/c", {"pool": "tenants", "ttl": 0})[1]["field"] == "ttl"
    assert api.ask("PUT", "/v1/leases/c", {"pool": "tenants", "port": 65536})[1]["field"] == "port"
    assert api.ask("PUT", "/v1/leases/c", {})[1]["field"] == "pool"
    _, page = api.ask("GET", "/v1/leases?limit=1")
    assert ([lease["name"] for lease in page["leases"]], page["next"]) == (["a"], "a")
    _, page = api.ask("GET", "/v1/leases?limit=1&after=a")
    assert ([lease["name"] for lease in page["leases"]], page["next"]) == (["b"], None)
    assert api.ask("POST", "/v1/leases/a/renew", {"ttl": 60})[1]["ttl"] == 60
    assert api.ask("POST", "/v1/leases/none/renew", {})[0] == 404
    code, ended = api.ask("DELETE", "/v1/leases/a")
    assert (code, ended["addresses"], ended["flows"]) == (200, ["10.64.0.0", "fd00:64::"], 2)
    assert api.ask("DELETE", "/v1/leases/a")[0] == 404


def test_export_and_import(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"".join(
        b'{"kind":"route","service":"web","when":{"http.host":"h%04d.example"},"target":["10.64.0.9:80"]}\n' % number
        for number in range(3000)
    )
    heading = b'{"kind":"registry","format":1}\n'
    assert api.ask("POST", "/v1/import", heading + lines) == (200, {"added": 3000, "changed": 0, "unchanged": 0})
    assert b"".join(client.download(str(api.run_dir), "export")) == heading + lines
    code, problem = api.ask("POST", "/v1/import?line=1001", b"\n{}\n")
    assert (code, problem["code"], problem["field"]) == (400, "invalid", "line 1002")
    monkeypatch.setattr(api_module, "_MAX_LINES", 1000)
    assert "send them in parts" in api.ask("POST", "/v1/import", lines)[1]["message"]


def test_an_export_that_breaks_off_is_told_from_a_whole_one(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_registry: Registry) -> Iterator[bytes]:
        yield b"one\n"
        raise SteerdError("the disk is gone")

    monkeypatch.setattr(transfer, "export", broken)
    with pytest.raises(SteerdError, match="gave no answer that can be understood"):
        list(client.download(str(api.run_dir), "export"))
    assert "the disk is gone" in api.faults.pop()

    def refused(_registry: Registry) -> Iterator[bytes]:
        raise RegistryError("the disk is gone")
        yield b""

    monkeypatch.setattr(transfer, "export", refused)
    assert api.ask("GET", "/v1/export") == (503, {"code": "registry", "field": None, "message": "the disk is gone"})


def test_steerctl(api: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert steerctl(api, capsys, "route", "add", "web", "10.64.0.5:80", "--key", "http.host=b.example") == (
        "http.host=b.example: 10.64.0.5:80\n"
    )
    added = steerctl(
        api, capsys, "lease", "add", "t1", "--pool", "tenants", "--service", "web",
        "--key", "http.host=t1.example", "--port", "8080", "--ttl", "1h",
    )  # fmt: skip
    assert added == "t1: 10.64.0.0, fd00:64::\n"
    listed: list[dict[str, Any]] = json.loads(steerctl(api, capsys, "route", "list", "web", "--json"))
    assert [route["origin"] for route in listed] == ["static", "lease t1", "dynamic"]
    assert "lease t1" in steerctl(api, capsys, "route", "list", "web")
    assert json.loads(steerctl(api, capsys, "lease", "list", "--json"))[0]["ttl"] == 3600
    assert "t1" in steerctl(api, capsys, "lease", "list")
    assert steerctl(api, capsys, "lease", "renew", "t1", "--ttl", "2d").startswith("t1: ends 20")
    exported = steerctl(api, capsys, "export")
    assert [json.loads(line)["kind"] for line in exported.splitlines()] == ["registry", "route", "lease"]
    assert steerctl(api, capsys, "lease", "release", "t1").startswith(
        "t1: released, 2 flows ended, in quarantine until 20"
    )
    assert steerctl(api, capsys, "route", "remove", "web", "--key", "http.host=b.example") == "removed\n"
    several = ("10.64.0.5:80", "10.64.0.6:80", "--choose", "hash", "--hash", "http.cookie.sid")
    steerctl(api, capsys, "route", "add", "web", *several, "--key", "http.host=c.example")
    assert "10.64.0.5:80, 10.64.0.6:80 (hash of http.cookie.sid)" in steerctl(api, capsys, "route", "list", "web")
    steerctl(api, capsys, "route", "remove", "web", "--key", "http.host=c.example")
    file = tmp_path / "lines"
    file.write_text(exported)
    assert steerctl(api, capsys, "import", str(file)) == "2 added, 0 changed, 0 unchanged\n"
    assert json.loads(steerctl(api, capsys, "import", str(file), "--json"))["unchanged"] == 2
    assert steerctl(api, capsys, "export") == exported


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["lease", "add", "t", "--pool", "tenants", "--ttl", "soon"], 2, "soon is no time; one is written 90s"),
        (["lease", "add", "t", "--pool", "none"], 1, "none is not a pool of "),
        (["route", "add", "web", "10.64.0.5:80", "--key", "x"], 2, "x is no condition; one is written KEY=VALUE"),
        (["route", "add", "web", "10.64.0.5:80", "--key", "a=1", "--key", "a=2"], 2, "The key a is there twice"),
        (["import", "/does/not/exist"], 1, "/does/not/exist cannot be read: No such file"),
    ],
)
def test_mistakes_are_sentences(
    api: Served, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, sentence: str
) -> None:
    sys.argv = ["steerctl", *arguments, "--config", str(api.run_dir / "steerd.toml")]
    with pytest.raises(SystemExit) as ended:
        ctl.main()
    assert ended.value.code == status
    assert capsys.readouterr().err.startswith(f"steerctl: {sentence}")


def test_explain_asks_the_daemon_where_its_registry_cannot_be_read(
    api: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert api.ask("PUT", "/v1/services/web/routes", {"when": HOST, "target": "10.64.0.5:80"})[0] == 201
    file = api.run_dir / "steerd.toml"
    question = ("explain", "--to", "203.0.113.10:443", "--key", "http.host=a.example")
    text = TEXT.format(directory=api.run_dir)
    file.write_text(text.replace(f'state_dir = "{api.run_dir}"', 'state_dir = "/nowhere"'))
    said = steerctl(api, capsys, *question)
    assert said.startswith("According to the running daemon:\n")
    assert "steered to 10.64.0.5:80" in said
    (told,) = json.loads(steerctl(api, capsys, *question, "--json"))["explanations"]
    assert (told["target"], told["matched"]) == ("10.64.0.5:80", ["http.host=a.example (dynamic)"])
    (api.run_dir / "api.sock").rename(api.run_dir / "elsewhere")
    sys.argv = ["steerctl", *question, "--config", str(file)]
    with pytest.raises(SystemExit) as ended:
        ctl.main()
    assert ended.value.code == 1  # by the file alone nothing matches
    assert capsys.readouterr().out.startswith(f"By {file} alone (the registry in /nowhere/registry cannot be read")
    (api.run_dir / "elsewhere").rename(api.run_dir / "api.sock")
