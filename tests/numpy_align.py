"""The formulas of rewards, advantages and losses in float64 numpy, a loop for each sum: written from the papers."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def gate(helpful: Floats, safe: Floats, tagged: Sequence[bool], threshold: float) -> Floats:
    """Llama 2, section 3.2.3."""
    probability = 1 / (1 + np.exp(-safe))
    return np.where(np.array(tagged) | (probability < threshold), safe, helpful)


def whiten(values: Floats) -> Floats:
    """Population mean and variance."""
    return (values - values.mean()) / np.sqrt(values.var() + 1e-8)


def gae(scores: Floats, kl: list[Floats], values: list[Floats], beta: float, gamma: float, lam: float) -> list[Floats]:
    """Advantages of each answer."""
    found = []
    for score, away, v in zip(scores, kl, values, strict=True):
        rewards = -beta * away
        rewards[-1] += score
        made, last = np.zeros_like(v), 0.0
        for t in reversed(range(len(v))):
            ahead = v[t + 1] if t + 1 < len(v) else 0.0
            last = rewards[t] + gamma * ahead - v[t] + gamma * lam * last
            made[t] = last
        found.append(made)
    return found


def group(scores: Floats, scale: str) -> Floats:
    """(P, G)."""
    made = np.zeros_like(scores)
    for i, row in enumerate(scores):
        deviation = {"group": row.std(ddof=1), "batch": scores.std(ddof=1), "none": 1 - 1e-4}[scale]
        made[i] = (row - row.mean()) / (deviation + 1e-4)
    return made


def leave_one_out(scores: Floats) -> Floats:
    """(P, G)."""
    made = np.zeros_like(scores)
    for i, row in enumerate(scores):
        for k in range(len(row)):
            made[i, k] = row[k] - np.mean([r for j, r in enumerate(row) if j != k])
    return made


def policy(
    new: list[Floats], old: list[Floats], advantages: list[Floats], low: float, high: float, level: str
) -> list[Floats]:
    """The clipped loss of each token."""
    found = []
    for n, o, a in zip(new, old, advantages, strict=True):
        away = n - o
        if level == "answer":
            away = np.full_like(away, away.sum())
        if level == "sequence":
            away = np.full_like(away, away.mean())
        ratio = np.exp(away)
        found.append(np.maximum(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high)))
    return found


def reduced(losses: list[Floats], how: str, longest: int) -> float:
    """The mean that is minimised."""
    if how == "token":
        return float(sum(one.sum() for one in losses) / sum(map(len, losses)))
    if how == "answer":
        return float(np.mean([one.mean() for one in losses]))
    return float(sum(one.sum() for one in losses) / (len(losses) * longest))


def value(v: Floats, old: Floats, returns: Floats, clip: float | None) -> Floats:
    """Half the larger squared error."""
    plain = (v - returns) ** 2
    if clip is None:
        return plain / 2
    bounded = (old + np.clip(v - old, -clip, clip) - returns) ** 2
    return np.maximum(plain, bounded) / 2


def best_of(scores: Sequence[float], n: int) -> float:
    """The mean over all subsets of n scores of their largest."""
    from itertools import combinations

    return float(np.mean([max(part) for part in combinations(scores, n)]))


def kl_of_best(n: int) -> float:
    """The bound of KL(best of n || start)."""
    return math.log(n) - (n - 1) / n
