"""The `rtsp` parser: requests of ffprobe and curl, targets, session ids, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerd.model import Answer, Keys
from steerd.wire.lines import BOUND
from steerd.wire.rtsp import inspect

VECTORS = Path(__file__).parent.parent / "vectors"


def keys(data: bytes) -> Keys:
    answer = inspect(data)
    assert isinstance(answer, dict), answer
    return answer


def vector(name: str) -> Keys:
    return keys((VECTORS / f"rtsp-{name}.bin").read_bytes())


def request(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def test_ffprobe_options() -> None:
    assert vector("ffprobe-5.1.9-options") == {
        "rtsp.method": "OPTIONS",
        "rtsp.host": "cam7.example",
        "rtsp.path": "/live/Main?quality=high",
        "rtsp.header.cseq": "1",
        "rtsp.header.user-agent": "Lavf59.27.100",
    }


def test_ffprobe_play_names_its_session() -> None:
    found = vector("ffprobe-5.1.9-play")
    assert (found["rtsp.method"], found["rtsp.session"]) == ("PLAY", "4f2a91c7")


def test_curl_asks_about_the_server_as_a_whole() -> None:
    found = vector("curl-7.88.1-options")
    assert (found["rtsp.method"], found["rtsp.path"]) == ("OPTIONS", "*")
    assert "rtsp.host" not in found


@pytest.mark.parametrize(
    ("target", "host", "path"),
    [
        ("rtsp://Cam.Example.:554/a", "cam.example", "/a"),
        ("rtsps://cam.example", "cam.example", "/"),
        ("rtsp://[2001:DB8::1]:554/a?b", "[2001:db8::1]", "/a?b"),
        ("rtsp:///a", None, "/a"),
        ("*", None, "*"),
    ],
)
def test_targets(target: str, host: str | None, path: str) -> None:
    found = keys(request(f"DESCRIBE {target} RTSP/2.0", "CSeq: 1"))
    assert found.get("rtsp.host") == host
    assert found["rtsp.path"] == path


@pytest.mark.parametrize("target", ["/a", "cam.example", "rtsp://user:password@cam.example/", "rtsp://[::1/", "rtsp:"])
def test_targets_that_are_refused(target: str) -> None:
    assert inspect(request(f"PLAY {target} RTSP/1.0")) is Answer.NOT_MINE


@pytest.mark.parametrize("value", ["12345678", "12345678;timeout=60", "12345678 ; timeout=60", " 12345678\t"])
def test_a_session_is_its_id(value: str) -> None:
    found = keys(request("PLAY rtsp://a/ RTSP/1.0", f"session:{value}"))
    assert found["rtsp.session"] == "12345678"
    assert found["rtsp.header.session"] == value.strip()


@pytest.mark.parametrize(
    "fields",
    [["Session: 1", "session: 1"], ["Session:"], ["Session: ;timeout=60"], ["CSeq : 1"], ["CSeq: 1", " 2"]],
    ids=repr,
)
def test_fields_that_are_refused(fields: list[str]) -> None:
    data = request("PLAY rtsp://a/ RTSP/1.0", *fields)
    assert inspect(data) is Answer.NOT_MINE
    assert inspect(data[:-2]) is Answer.NEED_MORE


@pytest.mark.parametrize(
    "beginning",
    [b"\x16\x03", b"$\x00\x00\x10", b"GET / H", b"OPTIONS * RTSP/3", b"RTSP/1.0 200", b"PLAY rtsp://a/ RTSP/1.0x"],
    ids=repr,
)
def test_not_mine_as_soon_as_it_cannot_be_a_request(beginning: bytes) -> None:
    assert inspect(beginning) is Answer.NOT_MINE


def test_need_more_until_the_empty_line_or_the_bound() -> None:
    whole = request("OPTIONS * RTSP/1.0", "CSeq: 1")
    assert all(inspect(whole[:length]) is Answer.NEED_MORE for length in range(len(whole)))
    endless = b"OPTIONS * RTSP/1.0\r\nX: " + b"x" * BOUND
    assert inspect(endless[: BOUND - 1]) is Answer.NEED_MORE
    assert inspect(endless) is Answer.NOT_MINE
