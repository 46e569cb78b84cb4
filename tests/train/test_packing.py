"""Every row in exactly one bin, no bin too full, and few of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2 import InputError
from llama2.train.packing import bins, pack


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=60))
def test_bins(lengths: list[int]) -> None:
    found = bins(lengths, 64)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    totals = [sum(lengths[row] for row in rows) for rows in found]
    assert all(total <= 64 for total in totals)
    # Two bins that together would fit in one are never both made.
    assert all(a + b > 64 for i, a in enumerate(totals) for b in totals[:i])


def test_best_fit_decreasing_by_hand() -> None:
    # 7 opens bin 0, 5 bin 1, 4 bin 2 (7 + 4 and 5 + 4 are over 8), 3 fits bin 1 exactly, 1 fits bin 0 exactly, 2 bin 2.
    assert bins([4, 7, 1, 3, 2, 5], 8) == [[0, 4], [1, 2], [3, 5]]


def test_a_row_that_is_too_long() -> None:
    with pytest.raises(InputError, match="row 1 has 9 tokens, a bin 8"):
        bins([3, 9], 8)


def test_pack() -> None:
    packed = pack([([5, 6, 7], [5, 6, 7]), ([8, 9], [-100, 9])])
    assert packed.input_ids == [5, 6, 7, 8, 9]
    assert packed.labels == [-100, 6, 7, -100, 9]
    assert packed.position_ids == [0, 1, 2, 0, 1] and packed.starts == [0, 3]
    with pytest.raises(InputError, match="2 ids and 1 labels"):
        pack([([1, 2], [1])])
