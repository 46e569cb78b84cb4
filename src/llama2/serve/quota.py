"""Quotas of an API key: concurrent requests, and tokens per minute. Used in the event loop only."""

import math
import time
from collections import Counter
from collections.abc import Callable

from llama2.serve.errors import Refusal


class Places:
    """Requests that are inside. A full house still lets in a key that has less than its share."""

    def __init__(self, most: int, of_one: int | None = None) -> None:
        """of_one: of a single key at most."""
        self.most, self.of_one = most, of_one
        self.count: Counter[str] = Counter()

    def take(self, owner: str, patience: Callable[[], int]) -> None:
        """Raises Refusal where there is no place; patience: seconds to tell then."""
        inside, own = self.count.total(), self.count[owner]
        if self.of_one is not None and owner and own >= self.of_one:
            raise Refusal(
                "busy", f"{own} requests of this key are being served, which is its bound", retry_after=patience()
            )
        fair = self.most // max(len(self.count) + (own == 0), 1)
        if inside >= self.most and (own >= fair or inside >= 2 * self.most):
            raise Refusal(
                "busy",
                f"{inside} requests are being served, which is the bound (max_concurrent_requests)",
                retry_after=patience(),
            )
        self.count[owner] += 1

    def leave(self, owner: str) -> None:
        """Gives a place back."""
        self.count[owner] -= 1
        if not self.count[owner]:
            del self.count[owner]


class Rate:
    """Tokens in a minute for each key: a bucket that fills steadily, holds a minute's worth, and may go into debt."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._held: dict[str, tuple[float, float]] = {}  # what was in the bucket, and when

    def _level(self, owner: str) -> float:
        most = float(self.per_minute or 0)
        held, when = self._held.get(owner, (most, 0.0))
        return min(held + (self._clock() - when) * most / 60, most)

    def check(self, owner: str) -> None:
        """Raises Refusal, with the seconds after which it will not, where a key has used up its tokens."""
        if self.per_minute is None or not owner:
            return
        level = self._level(owner)
        if level <= 0:
            seconds = math.floor(-level * 60 / self.per_minute) + 1
            raise Refusal(
                "rate",
                f"this key has used its {self.per_minute} tokens per minute; the next request is taken in {seconds} s",
                retry_after=seconds,
            )

    def charge(self, owner: str, tokens: int) -> None:
        """Counts tokens of prompts and answers."""
        if self.per_minute is None or not owner or not tokens:
            return
        self._held[owner] = self._level(owner) - tokens, self._clock()
        if len(self._held) > 10_000:  # full buckets need no memory
            self._held = {name: row for name, row in self._held.items() if self._level(name) < self.per_minute}
