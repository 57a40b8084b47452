"""States of targets: what one process writes, others see at once; and what a file must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerd.control.states import States, path
from steerd.core.marks import FIRST_TARGET_ID
from steerd.errors import SteerdError
from steerd.model import DEAD, DRAINED, TCP, UDP

HIGHEST = (1 << 23) - 1


def test_what_is_put_is_seen_by_others_at_once(tmp_path: Path) -> None:
    writer = States.create(str(tmp_path), HIGHEST)
    reader = States.open(str(tmp_path))
    assert reader.highest_id == HIGHEST
    assert (reader.get(FIRST_TARGET_ID), reader.get(HIGHEST)) == (0, 0)
    for target_id in (FIRST_TARGET_ID, HIGHEST):
        writer.put(target_id, DRAINED, True)
        writer.put(target_id, DEAD[TCP], True)
        assert reader.get(target_id) == DRAINED | DEAD[TCP]
        writer.put(target_id, DRAINED, False)
        assert reader.get(target_id) == DEAD[TCP]
    assert reader.get(FIRST_TARGET_ID + 1) == 0
    writer.clear(FIRST_TARGET_ID, 5)
    assert (reader.get(FIRST_TARGET_ID), reader.get(HIGHEST)) == (0, DEAD[TCP])


def test_every_state_has_a_bit_of_its_own_in_one_byte() -> None:
    bits = [DRAINED, DEAD[TCP], DEAD[UDP]]
    assert sum(bits) == int.from_bytes(bytes([bits[0] | bits[1] | bits[2]]))
    assert all(bit.bit_count() == 1 for bit in bits)


def test_a_daemon_that_starts_knows_nothing_of_what_another_one_knew(tmp_path: Path) -> None:
    States.create(str(tmp_path), HIGHEST).put(20, DRAINED, True)
    old = States.open(str(tmp_path))
    new = States.create(str(tmp_path), 1000)
    # Whoever still looks at the old file sees what was there, whatever the size of the new one.
    assert (old.get(20), old.get(HIGHEST), new.get(20)) == (DRAINED, 0, 0)
    assert States.open(str(tmp_path)).highest_id == 1000


def test_it_takes_no_room_for_ids_that_nothing_is_known_of(tmp_path: Path) -> None:
    States.create(str(tmp_path), HIGHEST).put(HIGHEST, DRAINED, True)
    assert path(str(tmp_path)).stat().st_blocks * 512 < 1 << 16


def test_answers_are_not_targets(tmp_path: Path) -> None:
    states = States.create(str(tmp_path), HIGHEST)
    with pytest.raises(ValueError, match="3 is no target id"):
        states.put(3, DRAINED, True)
    with pytest.raises(IndexError):
        states.get(HIGHEST + 1)


def test_who_reads_cannot_write(tmp_path: Path) -> None:
    States.create(str(tmp_path), HIGHEST)
    with pytest.raises(TypeError):
        States.open(str(tmp_path)).put(20, DRAINED, True)


def test_no_file_and_another_file(tmp_path: Path) -> None:
    with pytest.raises(SteerdError, match=r"targets cannot be read .*: is steerd running"):
        States.open(str(tmp_path))
    for content in (b"", b"something else that is long enough"):
        path(str(tmp_path)).write_bytes(content)
        with pytest.raises(SteerdError, match="another version"):
            States.open(str(tmp_path))
