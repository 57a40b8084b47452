"""A log line never blocks and never raises; what was lost is said."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest
import structlog

from steerd.telemetry import logs
from steerd.telemetry.logs import StandardError


def drained(reader: int) -> str:
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_NONBLOCK)
    text = b""
    while True:
        try:
            text += os.read(reader, 65536)
        except BlockingIOError:
            return text.decode()


def test_a_stuck_reader_costs_lines_and_no_time_and_is_told() -> None:
    reader, writer = os.pipe()
    log = StandardError(writer)
    for number in range(2000):
        log.write(f"line {number:5} {'.' * 90}\n")
    first = drained(reader).splitlines()
    assert first[0].startswith("line     0 ")
    log.write("heard again\n")
    lost, heard = drained(reader).splitlines()
    assert lost == f'{{"event": "log lines were lost", "lines": {2000 - len(first)}, "level": "warning"}}'
    assert heard == "heard again"
    os.close(reader)
    log.write("nobody reads\n")  # EPIPE
    os.close(writer)


def test_a_line_longer_than_a_pipe_takes_at_once_is_cut() -> None:
    reader, writer = os.pipe()
    StandardError(writer).write("x" * 10_000 + "\n")
    text = drained(reader)
    assert len(text) == 4096
    assert text.endswith("x\n")
    os.close(reader)
    os.close(writer)


def test_a_file_that_may_not_grow_costs_lines(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "log").open("w") as file:
        log = StandardError(file.fileno())
        log.write("one\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))  # Python ignores SIGXFSZ: the write fails with EFBIG
        try:
            log.write("two\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.write("three\n")
    assert (tmp_path / "log").read_text().splitlines()[0] == "one"
    assert (tmp_path / "log").read_text().splitlines()[-1] == "three"
    assert '"lines": 1' in (tmp_path / "log").read_text()


# ---- what is written, and how ----


class Written(NamedTuple):
    """A logger of this process, and what it wrote."""

    log: structlog.typing.FilteringBoundLogger
    reader: int

    def lines(self) -> list[str]:
        return drained(self.reader).splitlines()


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Written]]:
    """Configures the log of this process, onto a pipe."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)

    def configure(style: logs.Format = "auto", level: int = logging.INFO, *, journal: bool = False) -> Written:
        monkeypatch.setattr(sys, "stderr", stream)
        if journal:
            status = os.fstat(writer)
            monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        return Written(logs.configure(process="main", style=style, level=level), reader)

    yield configure
    stream.close()
    os.close(reader)
    logs.set_level(logging.INFO)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.parametrize("style", ["auto", "json"])
def test_a_pipe_gets_json(configured: Callable[..., Written], style: str) -> None:
    made = configured(style)
    made.log.info("ready", workers=2)
    (line,) = made.lines()
    event = json.loads(line)
    assert datetime.fromisoformat(event.pop("timestamp")).tzinfo is not None
    assert event == {"event": "ready", "level": "info", "process": "main", "workers": 2}


def test_a_console_gets_lines_for_people_in_which_no_client_controls_the_terminal(
    configured: Callable[..., Written],
) -> None:
    made = configured("console")
    made.log.info("decision", keys={"http.host": "\x1b[2J\x9b31m\nevent"})
    (line,) = made.lines()
    assert "decision" in line
    assert "process=main" in line
    assert line.isprintable()


def test_json_lines_are_ascii(configured: Callable[..., Written]) -> None:
    made = configured("json")
    made.log.info("decision", keys={"http.host": "\x1b[2J\x9b31m\r\n\u2028\ud800é"})
    (line,) = made.lines()
    assert line.isascii()
    assert line.isprintable()


def test_the_journal_gets_priorities(configured: Callable[..., Written]) -> None:
    made = configured(journal=True, level=logging.DEBUG)
    made.log.debug("a")
    made.log.info("b")
    made.log.warning("c")
    made.log.error("d")
    lines = made.lines()
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>"]
    assert [json.loads(line[3:])["event"] for line in lines] == ["a", "b", "c", "d"]


def test_every_line_of_a_traceback_in_the_journal_has_its_priority(configured: Callable[..., Written]) -> None:
    made = configured("console", journal=True)
    try:
        raise ValueError("wrong")
    except ValueError:
        made.log.exception("fault")
    lines = made.lines()
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)


def test_the_journal_of_another_stream_is_not_ours(configured: Callable[..., Written]) -> None:
    made = configured()
    os.environ["JOURNAL_STREAM"] = "1:2"
    logs.configure(process="main").info("a")
    assert made.lines()[0].startswith("{")


def test_the_level_can_be_changed_while_a_logger_is_in_use(configured: Callable[..., Written]) -> None:
    made = configured(level=logging.WARNING)
    made.log.info("a")
    made.log.warning("b")
    logs.set_level(logging.DEBUG)
    made.log.debug("c")
    logs.set_level(logging.ERROR)
    made.log.warning("d")
    made.log.error("e")
    assert [json.loads(line)["event"] for line in made.lines()] == ["b", "c", "e"]


# ---- what a client can make it write ----


def test_what_clients_say_is_cut_and_the_longest_line_is_whole(configured: Callable[..., Written]) -> None:
    keys = {f"http.header.{'k' * 300}{number}": "\x00\u2028" * 5000 for number in range(100)}
    shown = logs.shown_keys(keys)
    assert list(shown)[-1] == "..."
    assert shown["..."] == f"{100 - (len(shown) - 1)} more"
    assert all(len(key) <= 128 and len(value) <= 128 for key, value in shown.items())
    made = configured()
    made.log.info(
        "decision", service="s" * 64, client=f"[{'f' * 39}]:65535", endpoint=f"[{'f' * 39}]:65535", keys=shown,
        route=f"services.{'s' * 64}.routes[1000000]", target=f"[{'f' * 39}]:65535", microseconds=10**9,
    )  # fmt: skip
    (line,) = made.lines()
    assert json.loads(line)["keys"] == shown


def test_short_keys_are_shown_as_they_are() -> None:
    keys = {"http.host": "a.example", "http.path": "/" + "x" * 127}
    assert logs.shown_keys(keys) == keys
    assert logs.shown_keys({"http.path": "/" + "x" * 128}) == {"http.path": "/" + "x" * 124 + "..."}


def test_an_allowance_fills_again_and_counts_what_it_refused() -> None:
    allowance = logs.Allowance(rate=5, burst=20)
    assert [allowance.take(1000.0) for _ in range(30)] == [True] * 20 + [False] * 10
    assert not allowance.has_room(1000.1)
    assert allowance.has_room(1000.25)
    assert allowance.forgive() == 10
    assert [allowance.take(1000.5) for _ in range(4)] == [True, True, False, False]
    assert allowance.refused == 2
    assert sum(allowance.take(2000.0) for _ in range(30)) == 20
