"""Order of owners (API keys) that share an engine: deficit round robin over tokens. No torch here.

Every owner with something to do has a credit. Each token that is computed for it costs one; when no owner that waits
has any left, a round begins and each gets the same again (M. Shreedhar and G. Varghese 1995). Who has more comes first,
so owners get the same number of tokens however many sequences they send. One owner alone is never held up.

Everyone in a step waits for its end, so an owner of many sequences would slow down the others by the width of the step
alone. Where there are several owners a step therefore takes at most a few times what equal shares would take, by the
times that steps of this model on this machine have taken.
"""

from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np

QUANTUM = 512  # tokens of an owner in one round
STRETCH = 2.0  # the time of a step of several owners at most, in that of equal shares
RECENT = 16  # steps of one size whose mean is taken
FADES = 1024  # steps after which a size that was not seen again counts half


class StepTimes:
    """How long a step takes: a part of its own, one per decoding sequence, one per token of a prompt.

    Least squares over steps of like sizes, each size with its recent mean, so that what was learnt about wide steps is
    not lost while all are narrow; a size that was not seen for long counts less.
    """

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, int], tuple[list[float], int, int]] = {}  # means, how many, when seen last
        self._count = 0

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        """Takes in a step of `rows` decoding sequences and `tokens` of prompts."""
        key = rows.bit_length(), tokens.bit_length()
        means, count, _ = self._sizes.get(key, ([0.0, 0.0, 0.0], 0, 0))
        share = 1 / min(count + 1, RECENT)
        means = [old + share * (new - old) for old, new in zip(means, (rows, tokens, seconds), strict=True)]
        self._count += 1
        self._sizes[key] = means, count + 1, self._count

    def fit(self) -> tuple[float, float, float] | None:
        """Seconds of a step itself, of a row and of a token of a prompt; None before 8 steps have been seen."""
        if self._count < 8:
            return None
        means = np.array([m for m, _, _ in self._sizes.values()])
        weights = np.array([min(n, RECENT) * 0.5 ** ((self._count - at) / FADES) for _, n, at in self._sizes.values()])
        x = np.column_stack((np.ones(len(means)), means[:, :2]))
        products, sums = x.T @ (weights[:, None] * x), x.T @ (weights * means[:, 2])
        # Where all steps were alike nothing tells the parts apart: then all of it is the rows', and steps become
        # narrower, from which the rest is learnt.
        ridge = np.diag(products) * (1e-3, 1e-6, 1e-6) + 1e-12
        base, row, token = np.linalg.solve(products + np.diag(ridge), sums)
        return max(float(base), 0.0), max(float(row), 1e-9), max(float(token), 1e-9)

    def room(self, fair: int, stretch: float) -> tuple[float, float, float] | None:
        """Seconds for the rows and prompts of a step beside which equal shares have `fair` rows; of a row; of a token
        of a prompt. None where nothing is known."""
        found = self.fit()
        if found is None:
            return None
        base, row, token = found
        return stretch * (base + row * fair) - base, row, token


class Credits:
    """The credit of each active owner."""

    def __init__(self, quantum: int = QUANTUM) -> None:
        self.quantum = quantum
        self._left: dict[str, int] = {}

    def keep(self, active: Collection[str]) -> None:
        """Forgets owners with nothing to do, debts included; new ones begin where the best of the others stands."""
        best = min(max(self._left.values(), default=0), self.quantum)
        self._left = {owner: self._left.get(owner, best) for owner in active}

    def charge(self, owner: str, tokens: int) -> None:
        """Counts tokens that are computed for an owner."""
        self._left[owner] = self._left.get(owner, 0) - tokens

    def first(self, waiting: Iterable[str]) -> str:
        """Of the owners that wait, in the order of their arrival, the one whose turn it is."""
        names = list(waiting)
        most = max(self._left.get(name, 0) for name in names)
        if most <= 0:  # the next round that gives one of them something
            rounds = -most // self.quantum + 1
            for owner in self._left:
                self._left[owner] = min(self._left[owner] + rounds * self.quantum, self.quantum)
        return max(names, key=lambda name: self._left.get(name, 0))


def share(whole: int, owners: int) -> int:
    """Share of each owner in a total; at least 1."""
    return max(whole // max(owners, 1), 1)


def above(held: Counter[str], most: int, but: str) -> str | None:
    """The owner that holds most of all and more than `most`, if it is not `but`."""
    found = max(held, key=lambda name: held[name], default=None)
    return None if found is None or found == but or held[found] <= most else found
