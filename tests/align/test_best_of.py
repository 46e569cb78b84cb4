"""The best of N answers: unbiased, beside all subsets."""

import numpy_align as theirs
import pytest

from llama2 import InputError
from llama2.align.best_of import best_of, curve, divergence

SCORES = [0.1, 0.4, -0.3, 0.9, 0.4, 0, 1.2, -0.8]


def test_it_is_the_mean_over_all_subsets() -> None:
    found = [best_of(SCORES, n) for n in (1, 2, 4, 8)]
    assert found == pytest.approx([0.2375, 0.621429, 0.938571, 1.2], abs=1e-6)
    for n in range(1, 9):
        assert best_of(SCORES, n) == pytest.approx(theirs.best_of(SCORES, n), abs=1e-12)


def test_the_error_is_over_prompts() -> None:
    rows = [SCORES, [x + 1 for x in SCORES], SCORES[:4], []]
    found = curve(rows)
    assert list(found) == [1, 2, 3, 4]
    values = [best_of(row, 2) for row in rows[:3]]
    mean = sum(values) / 3
    error = (sum((v - mean) ** 2 for v in values) / 2 / 3) ** 0.5
    assert found[2] == pytest.approx((mean, error))
    assert curve([[], []]) == {}


def test_the_bound_of_the_divergence() -> None:
    wanted = [0.193147, 0.636294, 1.204442, 1.835089, 3.174508, 3.615170]
    assert [divergence(n) for n in (2, 4, 8, 16, 64, 100)] == pytest.approx(wanted, abs=1e-6)
    assert divergence(8) == pytest.approx(theirs.kl_of_best(8))


def test_too_few_scores() -> None:
    with pytest.raises(InputError, match="best of 9 cannot be told from 8"):
        best_of(SCORES, 9)
