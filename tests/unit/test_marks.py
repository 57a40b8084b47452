"""Where an id stands in the packet mark."""

from __future__ import annotations

import pytest

from steerd.core.marks import FIRST_TARGET_ID, NO_DECISION, PASS_ID, RESET_ID, MarkLayout

HIGH = MarkLayout(8, 31)
LOW = MarkLayout(0, 19)


def test_the_parts_of_a_layout() -> None:
    assert (HIGH.shift, HIGH.width, HIGH.mask, HIGH.highest_id) == (8, 24, 0xFFFFFF00, 0x7FFFFF)
    assert (LOW.shift, LOW.width, LOW.mask, LOW.highest_id) == (0, 20, 0x000FFFFF, 0x7FFFF)


@pytest.mark.parametrize("layout", [HIGH, LOW, MarkLayout(5, 27)])
def test_ids_stay_inside_the_mask_and_off_the_flag(layout: MarkLayout) -> None:
    for id_ in (NO_DECISION, RESET_ID, PASS_ID, FIRST_TARGET_ID, layout.highest_id):
        mark = layout.field(id_)
        assert mark & ~layout.mask == 0
        assert mark & 1 << layout.high == 0
        assert mark >> layout.shift == id_
    assert layout.field(layout.highest_id) | 1 << layout.high == layout.mask


@pytest.mark.parametrize("id_", [-1, 0x80000])
def test_an_id_that_does_not_fit_is_refused(id_: int) -> None:
    with pytest.raises(ValueError, match=rf"Id {id_} does not fit into mark bits 0-19: 0 to 524287\."):
        LOW.field(id_)
