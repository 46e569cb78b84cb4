"""A cache with a bound on its bytes, and one on those of each owner: nobody can push out what others keep."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Kept(Generic[V]):
    """Values by owner and key, the least recently used of an owner forgotten first. Any thread may call it."""

    def __init__(self, most: int, of_one: int) -> None:
        """most: bytes of all; of_one: bytes of one owner, when others have some too."""
        self.most, self.of_one = most, of_one
        self._rows: dict[str, OrderedDict[Hashable, tuple[V, int]]] = {}
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes of all values."""
        return sum(self._held.values())

    def of(self, owner: str) -> int:
        """Bytes of an owner's values."""
        return self._held.get(owner, 0)

    def get(self, owner: str, key: Hashable) -> V | None:
        """The value, now the most recently used."""
        with self._lock:
            rows = self._rows.get(owner)
            if rows is None or key not in rows:
                return None
            rows.move_to_end(key)
            return rows[key][0]

    def put(self, owner: str, key: Hashable, value: V, size: int) -> None:
        """Keeps a value of `size` bytes, where it fits at all."""
        with self._lock:
            self._drop(owner, key)
            bound = self.most if set(self._rows) <= {owner} else self.of_one
            if size > bound:
                return
            self._rows.setdefault(owner, OrderedDict())[key] = value, size
            self._held[owner] = self._held.get(owner, 0) + size
            while self._held[owner] > bound:
                self._drop(owner, next(iter(self._rows[owner])))
            while sum(self._held.values()) > self.most:
                largest = max(self._held, key=lambda name: self._held[name])
                self._drop(largest, next(iter(self._rows[largest])))

    def _drop(self, owner: str, key: Hashable) -> None:
        row = self._rows.get(owner, OrderedDict()).pop(key, None)
        if row is not None:
            self._held[owner] -= row[1]
            if not self._rows[owner]:
                del self._rows[owner], self._held[owner]
