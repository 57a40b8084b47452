"""A log line never blocks and never raises; what was lost is said."""

from __future__ import annotations

import fcntl
import os
import resource
from pathlib import Path

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
