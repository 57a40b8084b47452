"""Counters outlive those who count, and say it in a sentence when they are not there."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from steerd.errors import SteerdError
from steerd.model import Reason
from steerd.telemetry.counters import Counters, Extra


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


def test_no_two_counters_share_a_word(tmp_path: Path) -> None:
    counters = Counters.create(tmp_path / "counters", 2)
    words = [*Reason, *Extra]
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
