"""The API as others use it: curl over its sockets, as root, as another user, as a member of its groups; and a real
daemon behind it.

Needs root, to be somebody else. The first tests need no namespace: the API is served from this process.
"""

from __future__ import annotations

import grp
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerd.control.api import server
from steerd.control.client import read_only_socket_path
from steerd.control.registry import Registry
from tests.netns.conftest import hosts
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, Gateway, gateway
from tests.unit.test_api import Served, serving
from tests.unit.test_sessions_table import publish

OURS, MONITORS = grp.getgrnam("games"), grp.getgrnam("news")
"""Groups that every Debian has, and nobody needs."""
NOBODY = 65534
_CANNOT_CONNECT = 7  # of curl
SESSION = "/v1/services/tv/sessions/x"


def curl(
    path: Path, method: str, url: str, body: object = None, *, user: int = 0, groups: tuple[int, ...] = ()
) -> tuple[int, Any]:
    """(status, what the JSON says), as a user who is in some groups beside his own; (0, None) if he cannot connect."""
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}"]
    as_user += [f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"]
    command = ["curl", "-sS", "--max-time", "30", "-w", "\n%{http_code}", "--unix-socket", str(path), "-X", method]
    command += [] if body is None else ["-d", json.dumps(body)]
    done = subprocess.run([*as_user, *command, f"http://steerd{url}"], capture_output=True, text=True, check=False)
    if done.returncode:
        assert done.returncode == _CANNOT_CONNECT, done.stderr
        return 0, None
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(answer) if answer else None


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(server, "GROUP", OURS.gr_name)
    # Not in pytest's directory, into which others may not look.
    with tempfile.TemporaryDirectory(prefix="steerd-test-") as made:
        directory = Path(made)
        directory.chmod(0o755)
        registry = Registry(made)
        publish(registry, services=("tv",))
        with serving(registry, directory, MONITORS.gr_name) as served:
            yield served
        assert served.faults == []
        registry.close()


def test_root_and_members_of_the_group_may_do_everything(api: Served) -> None:
    made = {"target": "10.64.0.1:554"}
    assert curl(api.path, "PUT", SESSION, made)[0] == 201
    assert curl(api.path, "PUT", SESSION, made, user=NOBODY, groups=(OURS.gr_gid,))[0] == 200
    assert curl(api.path, "PUT", SESSION, made, user=NOBODY, groups=(1, 2, 3, OURS.gr_gid))[0] == 200
    assert curl(api.path, "DELETE", SESSION, user=NOBODY, groups=(OURS.gr_gid,)) == (204, None)
    assert api.refused == []


def test_others_do_not_get_in_by_two_checks(api: Served) -> None:
    """The file's mode keeps them out, and if somebody opened it, their credentials do."""
    read_only = read_only_socket_path(str(api.run_dir))
    strangers = ((NOBODY, ()), (NOBODY, (1,)))
    for path in (api.path, read_only):
        for user, groups in strangers:
            assert curl(path, "GET", "/v1/status", user=user, groups=groups) == (0, None)
    assert curl(api.path, "GET", "/v1/status", user=NOBODY, groups=(MONITORS.gr_gid,)) == (0, None)
    assert api.refused == []
    for path in (api.path, read_only):
        path.chmod(0o666)
        for user, groups in strangers:
            status, answer = curl(path, "GET", "/v1/status", user=user, groups=groups)
            assert (status, answer["code"]) == (403, "forbidden")
            assert answer["message"].startswith(f"The user {NOBODY} may not use {path}: it is for root and the group")
    status, answer = curl(api.path, "GET", "/v1/status", user=NOBODY, groups=(MONITORS.gr_gid,))
    assert (status, answer["code"]) == (403, "forbidden")
    assert [text.partition(" (")[0] for text in api.refused] == [
        f"{api.path}: the user {NOBODY}", f"{read_only}: the user {NOBODY}",
    ]  # fmt: skip


def test_monitors_may_look_and_no_more(api: Served) -> None:
    path = read_only_socket_path(str(api.run_dir))
    assert curl(api.path, "PUT", SESSION, {"target": "10.64.0.1:554"})[0] == 201
    for groups in ((MONITORS.gr_gid,), (1, MONITORS.gr_gid)):
        for url in ("/v1/status", "/v1/services", "/v1/targets", "/v1/openapi.json"):
            assert curl(path, "GET", url, user=NOBODY, groups=groups)[0] == 200
        for method, url in (
            ("PUT", SESSION), ("DELETE", SESSION), ("POST", "/v1/reload"), ("PUT", "/v1/log"), ("POST", "/v1/import"),
            ("GET", SESSION), ("GET", "/v1/export"), ("GET", "/v1/services/tv/sessions"), ("GET", "/v1/routes"),
        ):  # fmt: skip
            status, answer = curl(path, method, url, {} if method != "GET" else None, user=NOBODY, groups=groups)
            assert (status, answer["code"]) == (403, "forbidden")
            assert answer["field"] == ("path" if method == "GET" else "method")
    assert curl(api.path, "GET", SESSION)[0] == 200


# ---- a real daemon ----

BODY = """
[pools.tenants]
prefixes = ["10.64.0.0/30", "fd00:64::/126"]
[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
routes = [{ when = { "http.host" = "a.example" }, target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] }]
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Gateway]:
    with hosts() as make, gateway(make) as made:
        made.expected_warnings = ["not reloaded; the running configuration stays"]
        made.configure(BODY, f'api = {{ read_only_group = "{MONITORS.gr_name}" }}')
        made.start()
        made.respond(("10.64.0.1", 1, 8080), ("fd00:64::1", 1, 8080))
        yield made


def ask(lab: Gateway, method: str, url: str, body: object = None, at: str = "api.sock") -> tuple[int, Any]:
    return curl(lab.directory / "run" / at, method, url, body)


def served(lab: Gateway, address: str, port: int = 80) -> str:
    """What the daemon says that answers for http://a.example/."""
    with lab.client.entered():
        client = socket.create_connection((address, port), timeout=240)
    with client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        line = client.recv(4096)
        assert line
        return line.decode()


def test_status_is_that_of_the_machine(lab: Gateway) -> None:
    assert served(lab, ENDPOINT4).startswith("10.64.0.1 ")
    assert served(lab, ENDPOINT6).startswith("fd00:64::1 ")
    for at in ("api.sock", "api-ro.sock"):
        status, found = ask(lab, "GET", "/v1/status", at=at)
        assert status == 200
        machine = found["machine"]
        assert lab.daemon is not None
        assert (machine["pid"], machine["refused_reload"]) == (lab.daemon.pid, None)
        assert machine["decisions"]["route"] == 2
        assert machine["kernel"] == lab.counters()
        assert [(worker["is_bound"], worker["waiting"]) for worker in machine["workers"]] == [(True, 0)] * 2
        assert 0 < machine["conntrack"]["entries"] < machine["conntrack"]["limit"]
        assert abs(time.time() - machine["started"]) < 3600
        assert found["holds"]["aliases"] == 8
        assert found["file"] == str(lab.config)


def test_a_reload_is_answered_when_it_is_in_force_or_says_what_is_wrong(lab: Gateway) -> None:
    text = lab.config.read_text()
    lab.config.write_text(text + '[services.more]\nendpoints = ["203.0.113.10:81/tcp"]\ndefault = "10.64.0.1:8080"\n')
    assert ask(lab, "POST", "/v1/reload") == (200, {"file": str(lab.config), "services": 2, "pools": 1, "warnings": []})
    assert served(lab, ENDPOINT4, 81).startswith("10.64.0.1 ")
    assert ask(lab, "GET", "/v1/services/more")[0] == 200
    lab.config.write_text(text + '[services.more]\nendpoints = "secret"\nendpoint = 7\n')
    status, refused = ask(lab, "POST", "/v1/reload")
    assert (status, refused["code"], refused["file"]) == (409, "configuration", str(lab.config))
    keys = [problem["key"] for problem in refused["problems"]]
    assert keys[:2] == ["services.more.endpoints", "services.more.endpoint"]
    assert refused["field"] == "services.more.endpoints"
    assert ask(lab, "GET", "/v1/services/more")[0] == 200  # as before
    assert "secret" in refused["message"]
    said = ask(lab, "GET", "/v1/status", at="api-ro.sock")[1]["machine"]["refused_reload"]
    assert said.startswith(f"{lab.config}: services.more.endpoints, services.more.endpoint")
    assert "secret" not in said
    lab.config.write_text(text.replace("workers = 2", "workers = 1"))
    status, refused = ask(lab, "POST", "/v1/reload")
    assert (status, refused["field"]) == (409, None)
    assert "workers changed, which needs a restart" in refused["message"]
    lab.config.write_text(text)
    assert ask(lab, "POST", "/v1/reload")[0] == 200
    assert ask(lab, "GET", "/v1/services/more")[0] == 404


def test_decisions_are_logged_from_the_moment_on_that_it_is_asked_for(lab: Gateway) -> None:
    served(lab, ENDPOINT4)
    before = lab.count_events("decision")
    assert ask(lab, "PUT", "/v1/log", {"level": "info", "access_log": 1})[0] == 200
    served(lab, ENDPOINT4)
    lab.wait(lambda: lab.count_events("decision") > before, "a decision is logged")
    assert ask(lab, "PUT", "/v1/log", {"level": "info", "access_log": 0})[0] == 200
    logged = lab.count_events("decision")
    served(lab, ENDPOINT4)
    assert ask(lab, "GET", "/v1/status")[0] == 200
    assert lab.count_events("decision") == logged
