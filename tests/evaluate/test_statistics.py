"""Errors and intervals against values worked out elsewhere, and against the spread that repeated draws show."""

import math

import numpy as np
import pytest

from llama2.evaluate import statistics


def test_mean_and_deviation() -> None:
    assert statistics.deviation([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == pytest.approx(math.sqrt(32 / 7))
    found = statistics.mean([1.0, 2.0, 3.0])
    assert found.value == 2 and found.error == pytest.approx(1 / math.sqrt(3))
    assert statistics.mean([5.0]) == (5.0, None)


def test_error_of_a_ratio_is_the_spread_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(2000):
        counts = rng.integers(10, 30, 40)
        means = 3 + rng.normal(0, 0.5, 40)
        found = statistics.ratio_of_sums((means * counts).tolist(), counts.tolist())
        values.append(found.value)
        errors.append(found.error)
    assert float(np.mean(errors)) == pytest.approx(float(np.std(values)), rel=0.05)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (4, 2.776), (30, 2.042), (31, 2.0395), (100, 1.9840)])
def test_quantiles_of_student(freedom: int, value: float) -> None:
    assert statistics.student(freedom) == pytest.approx(value, abs=2e-4)


def test_ratio_of_pairs() -> None:
    found = statistics.ratio([2.0, 8.0], [1.0, 2.0])  # ratios 2 and 4: logs ln 2 and ln 4
    assert found.value == pytest.approx(math.sqrt(8))
    half = 12.706 * math.log(2) / 2  # the standard error of two values is half their distance
    assert found.low == pytest.approx(found.value / math.exp(half)) and found.high is not None
    assert statistics.ratio([3.0], [1.0]) == (pytest.approx(3), None, None)


def test_share_is_wilsons() -> None:
    found = statistics.share(8, 10)  # (0.8 + 1.92073 / 10) / 1.384146 -+ ...
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    nothing = statistics.share(0, 20)
    assert nothing.low == pytest.approx(0, abs=1e-12) and nothing.high is not None and 0.1 < nothing.high < 0.2


def test_percentile() -> None:
    assert statistics.percentile([0.0, 1.0, 2.0, 3.0], 50) == 1.5
    assert statistics.percentile([7.0], 99) == 7
