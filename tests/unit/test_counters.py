"""Counters outlive those who count, and say it in a sentence when they are not there."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from steerd.errors import SteerdError
from steerd.model import Reason
from steerd.telemetry.counters import (
    BOUNDS,
    KEEP_SECONDS,
    LOG_WORD,
    MAX_SERIES,
    OTHER,
    Counters,
    Extra,
    Gauge,
    LogSwitch,
    Meter,
    log_switch,
)


def test_what_a_worker_counts_is_seen_by_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "counters"
    main = Counters.create(path, 3)
    worker, another = Counters.open(path, write=True), Counters.open(path, write=True)
    looking = Counters.open(path)
    worker.slot(0)[Reason.ROUTE] += 5
    another.slot(2)[Reason.ROUTE] += 2
    another.slot(2)[Extra.LOADED] += 1
    for counters in (main, worker, another, looking):
        assert counters.workers == 3
        assert counters.total(Reason.ROUTE) == 7
        assert [counters.slot(number)[Reason.ROUTE] for number in range(3)] == [5, 0, 2]
        assert counters.total(Extra.LOADED) == 1
        assert counters.total(Reason.DEFAULT) == 0


def test_who_has_the_file_mapped_goes_on_to_see_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "counters"
    Counters.create(path, 2).slot(1)[Gauge.PENDING_BYTES] = 7
    looking = Counters.open(path)
    with path.open("rb") as before:
        Counters.create(path, 1)
        assert os.fstat(before.fileno()).st_size > path.stat().st_size
    assert looking.slot(1)[Gauge.PENDING_BYTES] == 7


def test_no_two_counters_share_a_word(tmp_path: Path) -> None:
    counters = Counters.create(tmp_path / "counters", 2)
    words = [*Reason, *Extra, *Gauge]
    for worker in range(2):
        for value, word in enumerate(words, 1):
            counters.slot(worker)[word] = value + 100 * worker
    for value, word in enumerate(words, 1):
        assert [counters.slot(worker)[word] for worker in range(2)] == [value, value + 100]
    assert (counters.workers, counters.generation) == (2, 0)


def test_a_new_start_of_the_same_shape_keeps_counts_and_generation(tmp_path: Path) -> None:
    path = tmp_path / "counters"
    first = Counters.create(path, 2)
    first.slot(1)[Reason.UNMATCHED] = 1 << 40
    first.next_generation()
    second = Counters.create(path, 2)
    assert (second.total(Reason.UNMATCHED), second.generation) == (1 << 40, 1)
    second.next_generation()
    assert first.generation == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_another_shape_starts_from_zero(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "counters"
    counters = Counters.create(path, 2)
    for slot in range(2):
        counters.slot(slot)[Reason.ROUTE] = 7
    counters = Counters.create(path, workers)
    assert (counters.workers, counters.total(Reason.ROUTE)) == (workers, 0)


def test_another_layout_starts_from_zero_and_is_not_opened_before(tmp_path: Path) -> None:
    path = tmp_path / "counters"
    Counters.create(path, 1).slot(0)[Reason.ROUTE] = 7
    with path.open("r+b") as file:
        file.write(struct.pack("=Q", 1))
    with pytest.raises(
        SteerdError, match=r"^/.*/counters was written by another version of steerd: restart the daemon$"
    ):
        Counters.open(path)
    assert Counters.create(path, 1).total(Reason.ROUTE) == 0
    assert Counters.open(path).total(Reason.ROUTE) == 0


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SteerdError, match=r"^/.*/counters does not exist: is steerd running\?$"):
        Counters.open(tmp_path / "counters")
    assert not (tmp_path / "counters").exists()


@pytest.mark.parametrize("content", [b"", b"1234567", b"\0" * 64])
def test_a_file_that_was_never_finished_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "counters").write_bytes(content)
    with pytest.raises(SteerdError, match=r"^/.*/counters was written by another version of steerd"):
        Counters.open(tmp_path / "counters")
    assert Counters.create(tmp_path / "counters", 1).total(Reason.ROUTE) == 0


def test_who_only_looks_changes_nothing(tmp_path: Path) -> None:
    Counters.create(tmp_path / "counters", 1)
    looking = Counters.open(tmp_path / "counters")
    with pytest.raises(TypeError):
        looking.slot(0)[Reason.ROUTE] = 1
    with pytest.raises(TypeError):
        looking.next_generation()


# ---- series ----


def counted(counters: Counters) -> dict[tuple[str, str], int]:
    """How many decisions each series has."""
    return {(each.service, each.parser): sum(each.reasons) for each in counters.series()}


def test_decisions_are_counted_by_service_parser_and_reason_and_timed(tmp_path: Path) -> None:
    counters = Counters.create(tmp_path / "counters", 2)
    counters.name_series([("web", ["tls", "http"]), ("mail", [])])
    for worker, meter in enumerate((Meter(counters, 0), Meter(counters, 1))):
        meter.count("web", "tls", Reason.ROUTE, 5_000)
        meter.count("web", "tls", Reason.UNMATCHED, 5_001)
        meter.count("web", "", Reason.TOO_SLOW, 100_000_001 + worker)
        meter.count("", "", Reason.NOT_READABLE, 0)
    found = {(each.service, each.parser): each for each in Counters.open(tmp_path / "counters").series()}
    assert found.keys() == {
        (OTHER, ""), ("", ""), ("web", ""), ("web", "tls"), ("web", "http"), ("mail", ""),
    }  # fmt: skip
    tls = found["web", "tls"]
    assert (tls.reasons[Reason.ROUTE], tls.reasons[Reason.UNMATCHED], sum(tls.reasons)) == (2, 2, 4)
    assert (tls.times, tls.nanoseconds) == ([2, 2] + [0] * (len(BOUNDS) - 1), 2 * 10_001)
    slow = found["web", ""]
    assert (slow.reasons[Reason.TOO_SLOW], slow.times[-1], slow.nanoseconds) == (2, 2, 200_000_003)
    assert found["", ""].reasons[Reason.NOT_READABLE] == 2
    assert counters.total(Reason.ROUTE) == 2


def test_a_service_keeps_its_counts_over_reloads_and_restarts(tmp_path: Path) -> None:
    counters = Counters.create(tmp_path / "counters", 1)
    counters.name_series([("a", ["tls"]), ("b", ["tls"])], now=1000)
    meter = Meter(counters, 0)
    meter.count("a", "tls", Reason.ROUTE, 1)
    meter.count("b", "tls", Reason.ROUTE, 1)
    counters.name_series([("c", ["dns"]), ("b", ["http", "tls"])], now=2000)  # a has gone
    meter.refresh()
    meter.count("b", "tls", Reason.ROUTE, 1)
    counters = Counters.create(tmp_path / "counters", 1)
    counters.name_series([("b", ["tls"]), ("a", ["tls"])], now=2000 + KEEP_SECONDS - 1)  # it is back in time
    assert counted(counters) == {
        (OTHER, ""): 0, ("", ""): 0, ("a", ""): 0, ("a", "tls"): 1, ("b", ""): 0, ("b", "tls"): 2, ("b", "http"): 0,
        ("c", ""): 0, ("c", "dns"): 0,
    }  # fmt: skip


def test_a_place_is_given_away_an_hour_after_its_service_went_and_begins_at_zero(tmp_path: Path) -> None:
    counters = Counters.create(tmp_path / "counters", 2)
    counters.name_series([("a", [])], now=1000)
    block = counters.blocks()["a", ""]
    for worker in range(2):
        Meter(counters, worker).count("a", "", Reason.ROUTE, 1)
    counters.name_series([], now=2000)
    assert counted(counters)["a", ""] == 2
    counters.name_series([("b", [])], now=2000 + KEEP_SECONDS)
    assert counters.blocks()["b", ""] == block
    assert counted(counters) == {(OTHER, ""): 0, ("", ""): 0, ("b", ""): 0}


def test_where_there_is_no_place_left_a_service_counts_as_another_and_no_place_is_taken_away(tmp_path: Path) -> None:
    counters = Counters.create(tmp_path / "counters", 1)
    many = [(f"{number:03}{'x' * 61}", ["port-extension"]) for number in range(MAX_SERIES)]
    counters.name_series(many, now=1000)
    served = (MAX_SERIES - 2) // 2
    meter = Meter(counters, 0)
    for service, _ in many:
        meter.count(service, "port-extension", Reason.ROUTE, 1)
    counts = counted(counters)
    assert len(counts) == MAX_SERIES
    assert counts[OTHER, ""] == MAX_SERIES - served
    assert all(counts[service, "port-extension"] == 1 for service, _ in many[:served])
    counters.name_series([("new", [])], now=1001)
    assert counted(counters) == counts
    counters.name_series([("new", [])], now=1001 + KEEP_SECONDS)
    assert counted(counters) == {(OTHER, ""): counts[OTHER, ""], ("", ""): 0, ("new", ""): 0}


def test_the_log_switch_is_seen_at_once(tmp_path: Path) -> None:
    counters = Counters.create(tmp_path / "counters", 1)
    worker = Counters.open(tmp_path / "counters", write=True)
    for switch in (LogSwitch(10, 0), LogSwitch(40, 1), LogSwitch(20, (1 << 32) - 1)):
        counters.log = switch
        assert worker.log == log_switch(worker.header[LOG_WORD]) == switch
