"""Who may use the API's two sockets; and that neither malformed HTTP nor slow or many clients hurt it."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerd.control import client
from steerd.control.api import connection, peers, server
from steerd.control.api.peers import Door, Peer, peer_of
from steerd.control.api.table import OPERATIONS
from steerd.control.client import read_only_socket_path
from steerd.control.registry import Registry
from steerd.errors import ForbiddenError, SteerdError
from tests.unit.test_api import Served, serving
from tests.unit.test_sessions_table import entry, publish

SESSIONS = "/v1/services/tv/sessions"
OUR_GROUP = grp.getgrgid(os.getgid()).gr_name
STRANGER = Peer(4711, 65533, frozenset({65533}))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(str(tmp_path))
    publish(made, services=("tv",))
    yield made
    made.close()


@pytest.fixture
def api(tmp_path: Path, registry: Registry, capfd: pytest.CaptureFixture[str]) -> Iterator[Served]:
    with serving(registry, tmp_path, OUR_GROUP) as served:
        yield served
    assert served.faults == []
    assert capfd.readouterr().err == ""  # no client can make the daemon write


def read_only(api: Served) -> Served:
    """The same API, asked at its read-only socket."""

    class ReadOnly(Served):
        @property
        def path(self) -> Path:
            return read_only_socket_path(str(self.run_dir))

    return ReadOnly(*api)


@contextlib.contextmanager
def connected(api: Served) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(30)
        made.connect(str(api.path))
        yield made


def everything(made: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    read = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := made.recv(65536):
            read += piece
    return read


# ---- who may ----


def test_the_kernel_says_who_is_there() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert peer_of(here) == Peer(os.getpid(), os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


@pytest.mark.parametrize(
    ("uid", "groups", "may"),
    [
        (0, {0}, True),
        (os.geteuid(), {os.getegid()}, True),
        (65533, {65533}, False),
        (65533, {65533, 990}, True),
        (65533, {990}, True),
        (65533, {0}, False),
        (65533, set(), False),
    ],
)
def test_root_our_own_user_and_the_group_may_enter(uid: int, groups: set[int], may: bool) -> None:
    door = Door("api.sock", (990,), "root and the group x", read_only=False, on_refused=print)
    assert door.may_enter(Peer(1, uid, frozenset(groups))) is may


def test_who_may_not_is_told_and_the_log_says_so_once(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "peer_of", lambda _: STRANGER)
    for asked in (api, read_only(api)):
        refusal = {
            "code": "forbidden",
            "field": None,
            "message": f"The user 65533 may not use {asked.path}: it is for root and the group"
            f" {'steerd' if asked is api else OUR_GROUP}.",
        }
        for url in (SESSIONS, "/v1/openapi.json", "/nothing"):
            assert asked.ask("GET", url) == (403, refusal)
        assert asked.ask("PUT", f"{SESSIONS}/x", {"target": "10.64.0.1:554"}) == (403, refusal)
    with connected(api) as made:
        made.sendall(b"GET /v1/leases HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        assert everything(made).count(b"HTTP/1.1 403") == 1  # and the connection is over
    assert api.refused == [
        f"{api.path}: the user 65533 (process 4711) was refused: it is for root and the group steerd",
        f"{read_only(api).path}: the user 65533 (process 4711) was refused: it is for root and the group {OUR_GROUP}",
    ]


def test_the_log_says_again_after_a_while_and_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said: list[str] = []
    door = Door("api.sock", (), "root", read_only=False, on_refused=said.append)
    for _ in range(5):
        assert door.enter(STRANGER)
        door.leave(STRANGER)
    door.enter(STRANGER._replace(uid=65532))
    now[0] += 60
    door.enter(STRANGER)
    assert said == [
        "api.sock: the user 65533 (process 4711) was refused: it is for root",
        "api.sock: the user 65532 (process 4711) was refused: it is for root",
        "api.sock: the user 65533 (process 4711) was refused: it is for root (4 times more since the last time this was"
        " said)",
    ]


# ---- the read-only socket ----


def test_the_read_only_socket_is_there_only_for_a_group(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = read_only_socket_path(str(tmp_path))
    with serving(registry, tmp_path):
        assert not path.exists()
    with serving(registry, tmp_path, OUR_GROUP):
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getgid())
    assert not path.exists()
    with serving(registry, tmp_path, "no-such-group") as served:
        assert not path.exists()
        assert served.ask("GET", SESSIONS)[0] == 200
        assert served.faults == [
            "gateway.api.read_only_group: there is no group no-such-group on this machine, and hence no read-only"
            " socket"
        ]

    def refuse(*_: object) -> None:
        raise PermissionError

    # A daemon without CAP_CHOWN: then the check alone keeps others out.
    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(server, "GROUP", "no-such-group")
    with serving(registry, tmp_path, OUR_GROUP) as served:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        # Where there is no group that could be let in, nobody else is.
        assert stat.S_IMODE(served.path.stat().st_mode) == 0o660
    monkeypatch.setattr(server, "GROUP", OUR_GROUP)
    with serving(registry, tmp_path) as served:
        assert stat.S_IMODE(served.path.stat().st_mode) == 0o666
        monkeypatch.setattr(connection, "peer_of", lambda _: STRANGER)
        assert served.ask("GET", SESSIONS)[0] == 403


def test_at_the_read_only_socket_nothing_can_be_changed_and_no_secret_seen(api: Served) -> None:
    for operation in OPERATIONS:
        path = operation.path.replace("{", "").replace("}", "")
        status, answer = read_only(api).ask(operation.method, path, b"")
        if operation.method != "GET":
            message = f"{operation.method} is not for the read-only socket, only GET."
            assert (status, answer) == (403, {"code": "forbidden", "field": "method", "message": message})
        elif operation.private:
            message = f"{path} is not for the read-only socket."
            assert (status, answer) == (403, {"code": "forbidden", "field": "path", "message": message})
        else:
            assert status in (200, 400, 404), operation.name


def test_the_client_looks_at_the_read_only_socket_if_it_may_not_use_the_other(
    api: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(method: str, *path: str) -> Any:
        return client.request(str(api.run_dir), method, *path, body={})

    assert ask("GET", "leases") == {"leases": [], "next": None}
    monkeypatch.setattr(os, "access", lambda path, _mode: path != api.path)
    assert ask("GET", "services")["next"] is None
    with pytest.raises(ForbiddenError, match="/v1/leases is not for the read-only socket"):
        ask("GET", "leases")
    with pytest.raises(
        SteerdError, match="There is no lease of the name "
    ):  # what changes something is asked for at the other one, as ever
        ask("POST", "leases", "none", "renew")


def test_session_ids_routes_and_the_export_are_private() -> None:
    private = {operation.path for operation in OPERATIONS if operation.private}
    assert private >= {SESSIONS.replace("tv", "{service}"), "/v1/services/{service}/routes", "/v1/export", "/v1/leases"}


# ---- what is no HTTP, and too much of it ----

MALFORMED = {
    "nonsense": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
    "bad version": b"GET /v1/leases HTTP/9.9\r\nHost: x\r\n\r\n",
    "bad method": b"G\x00T /v1/leases HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad header": b"GET /v1/leases HTTP/1.1\r\nHo st : x\r\n\r\n",
    "long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "long header": b"GET /v1/leases HTTP/1.1\r\nHost: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET /v1/leases HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
    "two lengths": b"PUT /v1/leases/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "bad length": b"PUT /v1/leases/a HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}",
    "length and chunks": b"PUT /v1/leases/a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n"
    b"\r\n0\r\n\r\n",
    "bad chunk": b"PUT /v1/leases/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "bad escape": b"GET /v1/leases/%zz%ff%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "bad host": b"GET http://[/v1/leases HTTP/1.1\r\n\r\n",
    "deep": b"PUT /v1/services/tv/sessions/a HTTP/1.1\r\nConnection: close\r\nHost: x\r\nContent-Length: 60011\r\n\r\n"
    b'{"target": ' + b"[" * 60_000,
    "not text": b"PUT /v1/services/tv/sessions/a HTTP/1.1\r\nConnection: close\r\nHost: x\r\nContent-Length: 16\r\n\r\n"
    b'{"target": "\xff\xfe"}',
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_requests_are_answered_in_json_and_nobody_else_notices(api: Served, sent: bytes) -> None:
    with connected(api) as made:
        with contextlib.suppress(BrokenPipeError):
            made.sendall(sent)
        head, _, body = everything(made).partition(b"\r\n\r\n")
        first, *headers = head.decode().lower().split("\r\n")
        assert first.split(" ")[:2] in (["http/1.1", "400"], ["http/1.0", "400"], ["http/1.1", "404"])
        assert "content-type: application/json" in headers
        assert json.loads(body).keys() == {"code", "field", "message"}
    assert api.ask("GET", "/v1/leases")[0] == 200


def test_bodies_without_end_are_refused(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LINGERING_SECONDS", 0.2)
    for url in (f"{SESSIONS}/x", "/v1/leases/x"):
        with connected(api) as made:
            made.sendall(f"PUT {url} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(200):
                    made.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
            assert b" 413 " in everything(made).partition(b"\r\n")[0]
    assert api.ask("GET", "/v1/leases")[0] == 200


def test_a_body_that_is_announced_as_compressed_stays_as_it_is(api: Served) -> None:
    """No bomb: nothing is unpacked."""
    with connected(api) as made:
        made.sendall(
            b"PUT /v1/leases/a HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\nConnection: close"
            b"\r\n\r\n\x1f\x8b\x08\x00"
        )
        assert b"The body is not JSON" in everything(made)


@pytest.mark.parametrize("sent", [b"", b"GET /v1/leases HT", b"GET /v1/leases HTTP/1.1\r\nHost"])
def test_who_says_nothing_is_hung_up_on(api: Served, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "_IDLE_SECONDS", 0.2)
    with connected(api) as made:
        made.sendall(sent)
        assert everything(made) == b""


def test_a_body_that_does_not_come_is_not_waited_for(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_BODY_SECONDS", 0.2)
    monkeypatch.setattr(connection, "_LINGERING_SECONDS", 0.1)
    for url in (f"PUT {SESSIONS}/x", "POST /v1/import"):
        with connected(api) as made:
            made.sendall(f"{url} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{".encode())
            assert b'"code":"too_slow"' in everything(made)


@pytest.mark.parametrize("url", [SESSIONS, "/v1/export"])
def test_who_does_not_read_is_hung_up_on(api: Served, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(connection, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(server, "_STREAM_SECONDS", 0.2)
    publish(api.registry, *(entry(f"session-{number:0200}") for number in range(1000)), services=("tv",))
    line = b'{"kind":"route","service":"tv","when":{"rtsp.path":"/%s%d"},"target":["10.64.0.9:80"]}\n'
    api.ask("POST", "/v1/import", b"".join(line % (b"x" * 400, number) for number in range(5000)))
    with connected(api) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.sendall(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 8)
        gone = threading.Event()

        def wait_for_the_end() -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while not gone.wait(0.05):
                    made.sendall(b" ")
            gone.set()

        thread = threading.Thread(target=wait_for_the_end)
        thread.start()
        thread.join(20)
        was_hung_up_on = gone.is_set()
        gone.set()
        thread.join()
        assert was_hung_up_on
    assert api.ask("GET", "/v1/leases")[0] == 200


def test_many_connections_are_too_many_for_one_user_only(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_CONNECTIONS_OF_USER", 8)
    with contextlib.ExitStack() as held:
        ours = [held.enter_context(connected(api)) for _ in range(8)]
        for made in ours:
            made.sendall(b"GET /v1/leases HTTP/1.1\r\nHost: x\r\n\r\n")
            assert made.recv(65536).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            with connected(api) as made:
                assert everything(made) == b""
        # Another user is heard, and so are we at the other socket.
        assert read_only(api).ask("GET", "/v1/openapi.json")[0] == 200
        monkeypatch.setattr(connection, "peer_of", lambda _: STRANGER)
        assert api.ask("GET", "/v1/leases")[0] == 403
    monkeypatch.undo()
    said = [text for text in api.refused if "too many connections" in text]
    assert len(said) == 1
    assert api.ask("GET", "/v1/leases")[0] == 200


def test_many_connections_are_too_many_for_all_together(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_CONNECTIONS", 2)
    with contextlib.ExitStack() as held:
        for _ in range(2):
            made = held.enter_context(connected(api))
            made.sendall(b"GET /v1/leases HTTP/1.1\r\nHost: x\r\n\r\n")
            assert made.recv(65536).startswith(b"HTTP/1.1 200")
        with connected(api) as made:
            assert everything(made) == b""


def test_those_who_may_not_enter_keep_nobody_else_out() -> None:
    door = Door("api.sock", (990,), "root and the group x", read_only=False, on_refused=lambda _text: None)
    strangers = [Peer(pid, 2000 + pid, frozenset()) for pid in range(2 * peers.MAX_CONNECTIONS)]
    inside = [stranger for stranger in strangers if door.enter(stranger)]
    assert len(inside) == peers.MAX_CONNECTIONS_OF_USER
    assert door.enter(Peer(1, 0, frozenset()))
    for stranger in inside:
        door.leave(stranger)
    assert door.enter(strangers[-1])
