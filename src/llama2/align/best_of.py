"""Expected reward of the best of N answers, estimated from K samples of each prompt. No torch here."""

import math
from collections.abc import Sequence

from llama2.errors import InputError
from llama2.evaluate.statistics import mean


def best_of(scores: Sequence[float], n: int) -> float:
    """The mean over all sets of n of these scores of their largest, without making the sets.

    Unbiased for the expected best of n new answers. Raises InputError where there are fewer than n scores.
    """
    count = len(scores)
    if not 1 <= n <= count:
        raise InputError(f"the best of {n} cannot be told from {count} scores; sample at least as many answers")
    total = math.comb(count, n)
    return sum(math.comb(i, n - 1) / total * score for i, score in enumerate(sorted(scores)) if i >= n - 1)


def curve(scores: Sequence[Sequence[float]]) -> dict[int, tuple[float, float]]:
    """N -> the mean over prompts of the best of N, and its standard error over prompts, for N = 1 .. K.

    K is the fewest scores that a prompt has; prompts without any do not count.
    """
    held = [row for row in scores if row]
    if not held:
        return {}
    found = {}
    for n in range(1, min(map(len, held)) + 1):
        value, error = mean([best_of(row, n) for row in held])
        found[n] = (value, error or 0.0)
    return found


def divergence(n: int) -> float:
    """The most that the best of n answers is from the policy, KL in nats (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n
