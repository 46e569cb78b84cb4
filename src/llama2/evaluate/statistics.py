"""Estimates with their errors: means, ratios and shares, each with what its spread says of it. No torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Two-sided 95 % quantiles of Student's t with 1, 2, ... 30 degrees of freedom (any table of the distribution).
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z95 = 1.959964


class Estimate(NamedTuple):
    """A value with its standard error; None where one observation tells nothing of the spread."""

    value: float
    error: float | None = None


class Interval(NamedTuple):
    """A value with the bounds of its 95 % confidence interval; None where one observation tells no bounds."""

    value: float
    low: float | None
    high: float | None


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values with its standard error."""
    spread = deviation(values)
    error = None if spread is None else spread / math.sqrt(len(values))
    return Estimate(math.fsum(values) / len(values), error)


def ratio_of_sums(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """sum(sums) / sum(counts), as a mean per token of windows that hold unequally many tokens.

    The error is that of the linearised ratio estimator (Cochran, Sampling Techniques, 6.4): windows are the
    independent units, because tokens of one window depend on each other.
    """
    total = math.fsum(counts)
    value = math.fsum(sums) / total
    n = len(sums)
    if n < 2:
        return Estimate(value)
    squares = math.fsum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return Estimate(value, math.sqrt(squares * n / (n - 1)) / total)


def student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t: beyond the table its expansion about the normal one."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The geometric mean of paired ratios of positive values; its interval from Student's t of their logarithms."""
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    found = mean(logs)
    if found.error is None:
        return Interval(math.exp(found.value), None, None)
    half = student(len(logs) - 1) * found.error
    return Interval(math.exp(found.value), math.exp(found.value - half), math.exp(found.value + half))


def share(hits: float, total: int) -> Interval:
    """hits / total with Wilson's score interval (1927), which holds near 0 and 1 too; half a hit counts as a tie."""
    z, p = _Z95, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return Interval(p, middle - half, middle + half)


def percent(share: float | None) -> float | None:
    """A share in percent."""
    return None if share is None else 100 * share


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of sorted values, linear between two of them."""
    place = (len(values) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)
