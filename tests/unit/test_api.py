"""The API, over its socket: what it answers, that every error is JSON with a code, a field and a sentence, and that
`steerctl` says the same."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import http.client
import json
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

from steerd.cli import ctl
from steerd.control import client
from steerd.control.api import MAX_PAGE, Api, Context, Machine
from steerd.control.api import server as api_module
from steerd.control.api.context import ConntrackUse, LogSettings, Machinery, WorkerStatus
from steerd.control.flows import Entry
from steerd.control.registry import Registry
from steerd.core.marks import FIRST_TARGET_ID
from steerd.errors import ConfigError, Problem, RegistryError, SteerdError
from steerd.model import DEAD, DRAINED, TCP, IPAddress, Target
from tests.unit.test_sessions_table import BOTH, TEXT, entry, publish

A = "198.51.100.7"
SESSIONS = "/v1/services/tv/sessions"
D1 = {
    "service": "tv",
    "id": "d1",
    "targets": ["10.64.0.1:554"],
    "source": A,
    "origin": "api",
    "usable": True,
}


class Bare:
    """A machine (control.api.Machine) without a kernel."""

    def __init__(self) -> None:
        self._log = LogSettings("info", 0)

    async def reload(self) -> SteerdError | None:
        """The file always has this mistake."""
        return ConfigError("steerd.toml", [Problem("services", "Is missing.")])

    def status(self) -> Machinery:
        """Of one worker, whose queue is not bound."""
        worker = WorkerStatus(0, 21300, False, None, None, None, None)
        use = ConntrackUse(7, 262144)
        return Machinery(
            "1", 4711, 1.5, None, [worker], {"route": 7}, {"held": 0}, {"pending_flows": 0}, {"untranslated": 0}, use
        )

    def target_state(self, target_id: int) -> int:
        """The first one is drained, the second one is dead."""
        return {FIRST_TARGET_ID: DRAINED, FIRST_TARGET_ID + 1: DEAD[TCP]}.get(target_id, 0)

    def listening(self, targets: Sequence[Target]) -> list[list[int]]:
        """On those with a port."""
        return [[TCP] if target.port else [] for target in targets]

    def elsewhere(self, addresses: Collection[IPAddress]) -> set[IPAddress]:
        """203.0.113.9."""
        return {address for address in addresses if str(address) == "203.0.113.9"}

    def log_settings(self) -> LogSettings:
        """What was put last."""
        return self._log

    def put_log_settings(self, settings: LogSettings) -> None:
        """Kept."""
        self._log = settings

    def entries(self, answered_by: bytes) -> Generator[Entry, None, None]:  # noqa: ARG002
        """Conntrack is empty."""
        yield from ()

    def end_flows(self, answered_by: bytes, is_wanted: Callable[[Entry], bool]) -> int:
        """Counts those that are wanted."""
        return sum(map(is_wanted, self.entries(answered_by)))


class Served(NamedTuple):
    """An API that is being served from a thread of its own."""

    registry: Registry
    run_dir: Path
    faults: list[str]
    refused: list[str]

    @property
    def path(self) -> Path:
        return self.run_dir / "api.sock"

    def ask(self, method: str, url: str, body: object = None) -> tuple[int, Any]:
        """(status, what the JSON says); a body in bytes is sent as it is."""
        with self.connection() as connection:
            content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            connection.request(method, url, content)
            answer = connection.getresponse()
            read = answer.read()
            assert not read or answer.headers["Content-Type"] == "application/json"
            return answer.status, json.loads(read) if read else None

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("steerd", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(str(self.path))
        try:
            yield connection
        finally:
            connection.close()


@contextlib.contextmanager
def serving(
    registry: Registry, run_dir: Path, read_only_group: str | None = None, machine: Machine | None = None
) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    served = Served(registry, run_dir, [], [])
    made = Api(
        Context(registry, machine or Bare()), str(run_dir), served.faults.append, served.refused.append, read_only_group
    )
    try:
        asyncio.run_coroutine_threadsafe(made.start(), loop).result(30)
        yield served
    finally:
        asyncio.run_coroutine_threadsafe(made.stop(), loop).result(30)
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(str(tmp_path))
    publish(made, entry("toml", "10.64.0.2:554", "198.51.100.9"), services=("tv",))
    yield made
    made.close()


@pytest.fixture
def api(tmp_path: Path, registry: Registry) -> Iterator[Served]:
    with serving(registry, tmp_path) as served:
        yield served
    assert served.faults == []


# ---- sessions ----


def test_put_get_list_and_delete(api: Served) -> None:
    assert api.ask("PUT", f"{SESSIONS}/d1", {"target": "10.64.0.1:554", "source": A}) == (201, D1)
    assert api.ask("GET", f"{SESSIONS}/d1") == (200, D1)
    changed = D1 | {"targets": ["10.64.0.3:554", "[fd00:64::3]:same"], "source": None}
    target = ["10.64.0.3:554", {"address": "[fd00:64::3]:same"}]
    assert api.ask("PUT", f"{SESSIONS}/d1", {"target": target}) == (200, changed)
    toml = D1 | {"id": "toml", "targets": ["10.64.0.2:554"], "source": "198.51.100.9", "origin": "configuration"}
    assert api.ask("GET", SESSIONS) == (200, {"sessions": [changed, toml], "next": None})
    assert api.ask("DELETE", f"{SESSIONS}/d1") == (204, None)
    assert api.ask("GET", SESSIONS) == (200, {"sessions": [toml], "next": None})


@pytest.mark.parametrize("session_id", ["a/b", "a b", "%2F", "a?b#c", "[x]&y=z+", "...", "~", "a" * 256, "\\", "%"])
def test_every_id_can_stand_in_a_url(api: Served, session_id: str) -> None:
    url = f"{SESSIONS}/{quote(session_id, safe='')}"
    assert api.ask("PUT", url, {"target": "10.64.0.1:554"})[0] == 201
    status, found = api.ask("GET", url)
    assert (status, found["id"]) == (200, session_id)
    assert api.registry.sessions.find("tv", session_id) is not None
    assert api.ask("DELETE", url)[0] == 204
    assert api.registry.sessions.find("tv", session_id) is None


def test_a_long_list_comes_in_pages(api: Served) -> None:
    for number in range(5):
        api.registry.sessions.put("tv", f"s{number}", "10.64.0.1:554", None)
    pages, after = [], ""
    while after is not None:
        status, page = api.ask("GET", f"{SESSIONS}?limit=2&after={after}")
        assert status == 200
        pages.append([session["id"] for session in page["sessions"]])
        after = page["next"]
    assert pages == [["s0", "s1"], ["s2", "s3"], ["s4", "toml"]]


CHECKED: list[tuple[str, str, object, int, str, str | None, str]] = [
    ("GET", f"{SESSIONS}/d1", None, 404, "not_found", "id", "The service tv has no session of this id."),
    ("GET", f"{SESSIONS}/%C3%A9", None, 404, "not_found", "id", "The service tv has no session of this id."),
    ("DELETE", f"{SESSIONS}/d1", None, 404, "not_found", "id", "The service tv has no session of this id."),
    (
        "DELETE",
        f"{SESSIONS}/toml",
        None,
        409,
        "conflict",
        "id",
        "The session toml of tv is in steerd.toml; change it there, and reload.",
    ),
    (
        "PUT",
        f"{SESSIONS}/toml",
        {"target": "10.64.0.1:554"},
        409,
        "conflict",
        "id",
        "The session toml of tv is in steerd.toml; change it there, and reload.",
    ),
    (
        "GET",
        "/v1/services/radio/sessions",
        None,
        404,
        "not_found",
        "service",
        "radio is not a service of steerd.toml.",
    ),
    (
        "GET",
        "/v1/services/tv2/sessions/d1",
        None,
        404,
        "not_found",
        "service",
        "The service tv2 has no sessions: steerd.toml names no key for them.",
    ),
    (
        "PUT",
        f"{SESSIONS}/d1",
        {"target": "10.65.0.1:554"},
        400,
        "invalid",
        "target",
        "10.65.0.1 is in no pool (p: 10.64.0.0/24, fd00:64::/120); use an alias, or say that"
        " it is external (steerctl: --external; in JSON:"
        ' "external": true).',
    ),
    (
        "PUT",
        f"{SESSIONS}/d1",
        {"target": "10.64.0.1:554", "source": "nobody"},
        400,
        "invalid",
        "source",
        '"nobody" is not an IP address; names are not looked up.',
    ),
    (
        "PUT",
        f"{SESSIONS}/d1",
        {"target": "10.64.0.1:554", "source": 7},
        400,
        "invalid",
        "source",
        "Expected `str | null`, got `int`.",
    ),
    (
        "PUT",
        f"{SESSIONS}/d1",
        {"source": A},
        400,
        "invalid",
        "target",
        "Object missing required field `target`.",
    ),
    (
        "PUT",
        f"{SESSIONS}/d1",
        {"target": "10.64.0.1:554", "sauce": A},
        400,
        "invalid",
        "sauce",
        "Object contains unknown field `sauce`.",
    ),
    ("PUT", f"{SESSIONS}/d1", [], 400, "invalid", None, "Expected `object`, got `array`."),
    (
        "PUT",
        f"{SESSIONS}/d1",
        b"{",
        400,
        "invalid",
        None,
        "The body is not JSON: Input data was truncated.",
    ),
    (
        "PUT",
        f"{SESSIONS}/d1",
        b" " * 70000,
        413,
        "too_large",
        None,
        "The body is longer than 65536 bytes.",
    ),
    ("GET", f"{SESSIONS}?limit=0", None, 400, "invalid", "limit", "Expected `int` >= 1."),
    ("GET", f"{SESSIONS}?limit=1001", None, 400, "invalid", "limit", f"Expected `int` <= {MAX_PAGE}."),
    ("GET", f"{SESSIONS}?limit=few", None, 400, "invalid", "limit", "Expected `int`, got `str`."),
    ("GET", f"{SESSIONS}?page=1", None, 400, "invalid", "page", "Object contains unknown field `page`."),
    ("GET", "/v1/nothing", None, 404, "not_found", None, "There is nothing at /v1/nothing."),
    ("POST", SESSIONS, b"{}", 405, "not_allowed", None, f"POST is not possible at {SESSIONS}."),
]


@pytest.mark.parametrize(("method", "url", "body", "status", "code", "field", "message"), CHECKED)
def test_an_error_says_what_where_and_why(
    api: Served, method: str, url: str, body: object, status: int, code: str, field: str | None, message: str
) -> None:
    answer = api.ask(method, url, body)
    assert answer == (status, {"code": code, "field": field, "message": message})
    assert [view.id for view in api.registry.sessions.page("tv", "", 9)] == ["toml"]


def test_a_method_that_is_not_allowed_is_told_which_are(api: Served) -> None:
    with api.connection() as connection:
        connection.request("POST", SESSIONS)
        assert connection.getresponse().headers["Allow"] == "GET,HEAD"


def test_a_registry_that_cannot_be_written_and_a_fault_of_ours_are_answered(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: list[Exception] = [RegistryError("the registry in x cannot be written: full"), ZeroDivisionError("ours")]

    def fail(*_args: object, **_kwargs: object) -> None:
        raise error.pop(0)

    monkeypatch.setattr(registry.sessions, "put", fail)
    with serving(registry, tmp_path) as served:
        answer = served.ask("PUT", f"{SESSIONS}/d1", {"target": "10.64.0.1:554"})
        message = "the registry in x cannot be written: full"
        assert answer == (503, {"code": "registry", "field": None, "message": message})
        assert served.faults == []
        answer = served.ask("PUT", f"{SESSIONS}/d1", {"target": "10.64.0.1:554"})
        message = "This is a fault of steerd; its log says more."
        assert answer == (500, {"code": "fault", "field": None, "message": message})
        error.append(ZeroDivisionError("ours"))
        assert served.ask("PUT", f"{SESSIONS}/d1", {"target": "10.64.0.1:554"})[0] == 500
        (fault,) = served.faults  # once: who can cause one can cause many
        assert "ZeroDivisionError: ours" in fault
        assert served.ask("GET", SESSIONS)[0] == 200


def test_many_at_once_are_all_answered_and_all_there(api: Served) -> None:
    answers: list[int] = []

    def put(worker: int) -> None:
        for number in range(20):
            answers.append(api.ask("PUT", f"{SESSIONS}/w{worker}-{number}", {"target": "10.64.0.1:554"})[0])

    threads = [threading.Thread(target=put, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [201] * 160
    assert len(api.registry.sessions.page("tv", "", 1000)) == 161


# ---- the socket ----


def test_the_socket_is_for_root_and_one_group(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = grp.getgrgid(os.getgroups()[0] if os.getgroups() else os.getgid())
    monkeypatch.setattr(api_module, "GROUP", ours.gr_name)
    with serving(registry, tmp_path) as served:
        found = served.path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert found.st_gid == ours.gr_gid
    assert not served.path.exists()
    monkeypatch.setattr(api_module, "GROUP", "no-group-has-this-name")
    with serving(registry, tmp_path) as served:
        assert stat.S_IMODE(served.path.stat().st_mode) == 0o660


def test_a_socket_that_a_killed_daemon_left_is_no_hindrance(tmp_path: Path, registry: Registry) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "api.sock"))
    with serving(registry, tmp_path) as served:
        assert served.ask("GET", SESSIONS)[0] == 200


def test_a_socket_that_cannot_be_made_is_a_sentence(tmp_path: Path, registry: Registry) -> None:
    for run_dir, why in (("none", "No such file or directory"), ("x" * 200, "AF_UNIX path too long")):
        api = Api(Context(registry, Bare()), str(tmp_path / run_dir), print, print)
        with pytest.raises(SteerdError, match=rf"/{run_dir}/api\.sock cannot be listened on: {why}$"):
            asyncio.run(api.start())


# ---- steerctl ----


def steerctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(exit status, what it said on standard output or, if nothing, on standard error)."""
    monkeypatch.setattr(sys, "argv", ["steerctl", "session", *arguments])
    status = 0
    try:
        ctl.main()
    except SystemExit as end:
        assert end.code is None or isinstance(end.code, int)
        status = end.code or 0
    said = capsys.readouterr()
    return status, said.out or said.err


@pytest.fixture
def file(tmp_path: Path) -> str:
    made = tmp_path / "steerd.toml"
    text = TEXT.format(pools=BOTH, default="10.64.0.200:554", mark_bits="8-31")
    made.write_text(text.replace("[gateway]", f'[gateway]\nrun_dir = "{tmp_path}"'))
    return str(made)


def test_steerctl_adds_lists_and_removes(
    api: Served, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        return steerctl(monkeypatch, capsys, *arguments, "--config", file)

    assert said("add", "tv", "d/1", "10.64.0.1:554", "[fd00:64::1]:554", "--source", A) == (
        0,
        "d/1: 10.64.0.1:554, [fd00:64::1]:554\n",
    )
    external = D1 | {"id": "out", "targets": ["192.0.2.7:same"], "source": None}
    assert said("add", "tv", "out", "192.0.2.7:same", "--external", "--json") == (0, json.dumps(external) + "\n")
    monkeypatch.setenv("COLUMNS", "200")
    publish(api.registry, entry("toml", "10.64.0.2:554"), pools='"10.64.0.200/32", "10.64.0.2/31"', services=("tv",))
    status, listed = said("list", "tv")
    assert status == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in listed.splitlines() if line.startswith("│")]
    assert rows == [
        ["d/1", "10.64.0.1:554, [fd00:64::1]:554", A, "api", "refused: the configuration allows its target no more"],
        ["out", "192.0.2.7:same", "the first that comes", "api", "in force"],
        ["toml", "10.64.0.2:554", "the first that comes", "configuration", "in force"],
    ]
    status, text = said("list", "tv", "--json")
    assert status == 0
    found = {session["id"]: session for session in json.loads(text)}
    assert list(found) == ["d/1", "out", "toml"]
    assert found["out"] == external
    assert [found[name]["usable"] for name in found] == [False, True, True]
    assert said("remove", "tv", "d/1") == (0, "d/1: removed\n")
    assert said("remove", "tv", "out", "--json") == (0, '{"service": "tv", "id": "out"}\n')
    assert said("remove", "tv", "out") == (1, "steerctl: The service tv has no session of this id.\n")
    assert said("add", "tv", "x", "10.65.0.1:554")[1].startswith("steerctl: 10.65.0.1 is in no pool (")


def test_steerctl_lists_more_than_a_page(
    api: Served, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = (entry(f"s{number:04}") for number in range(MAX_PAGE + 5))
    publish(api.registry, *entries, services=("tv",))
    status, text = steerctl(monkeypatch, capsys, "list", "tv", "--json", "--config", file)
    assert status == 0
    assert [session["id"] for session in json.loads(text)] == [f"s{number:04}" for number in range(MAX_PAGE + 5)]


def test_steerctl_without_a_daemon(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = (3, f"steerctl: nobody answers at {tmp_path}/api.sock: is steerd running?\n")
    assert steerctl(monkeypatch, capsys, "list", "tv", "--config", file) == expected
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "api.sock"))
    assert steerctl(monkeypatch, capsys, "list", "tv", "--config", file) == expected


def test_a_daemon_that_talks_nonsense_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "api.sock"))
        listener.listen()

        def answer() -> None:
            for text in (b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", b"HTTP/1.1 500 X\r\n\r\n"):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(text)

        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(3):
            with pytest.raises(SteerdError, match=r"/api\.sock gave no answer that can be understood: "):
                client.request(str(tmp_path), "GET", "services")
        thread.join()


# ---- the configuration ----


def test_a_reload_that_is_refused_says_file_key_and_sentence(api: Served) -> None:
    assert api.ask("POST", "/v1/reload") == (
        409,
        {
            "code": "configuration",
            "field": "services",
            "message": "steerd.toml: services: Is missing.",
            "file": "steerd.toml",
            "problems": [{"key": "services", "message": "Is missing."}],
        },
    )


def test_what_is_logged_can_be_changed(api: Served) -> None:
    assert api.ask("GET", "/v1/log") == (200, {"level": "info", "access_log": 0})
    wanted = {"level": "warning", "access_log": 100}
    assert api.ask("PUT", "/v1/log", wanted) == (200, wanted)
    assert api.ask("GET", "/v1/log") == (200, wanted)
    for wrong, field in (({"level": "loud"}, "level"), ({"access_log": -1}, "access_log"), ({"x": 1}, "x")):
        status, problem = api.ask("PUT", "/v1/log", wanted | wrong)
        assert (status, problem["field"]) == (400, field)
    assert api.ask("GET", "/v1/log") == (200, wanted)
