"""Who comes next where several owners (API keys) share an engine: deficit round robin over tokens. No torch here.

Every owner with something to do has a credit. Each token that is computed for it costs one; when no owner that waits
has any left, a round begins and each gets the same again (M. Shreedhar and G. Varghese 1995). Who has more comes first,
so owners get the same number of tokens however many sequences they send. One owner alone is never held up.
"""

from collections import Counter
from collections.abc import Collection, Iterable

QUANTUM = 512  # tokens of an owner in one round


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
    """What each of some owners may have of a whole; never nothing."""
    return max(whole // max(owners, 1), 1)


def above(held: Counter[str], most: int, but: str) -> str | None:
    """The owner that holds most of all and more than `most`, if it is not `but`."""
    found = max(held, key=lambda name: held[name], default=None)
    return None if found is None or found == but or held[found] <= most else found
