"""Logits processors of requests, besides those of generate(): penalties by count, biases, a watermark.

Each is a logits processor for one sequence: ids (1, S) so far and scores (1, V). No torch here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama2.compiled import available, native
from llama2.generation.arrays import Array, of, on_arrays
from llama2.lazy import door

WATERMARK_KEY = 15485863  # text-generation-inference's, so that its detectors work
_permuted_by_torch = door("generation.tensors", "permuted", "The first of a permutation, from torch.")


class CountPenalty:
    """OpenAI's penalties: scores minus frequency times the count of an id in the answer, minus presence if it is there.

    Ids of the prompt do not count.
    """

    def __init__(self, frequency: float, presence: float, prompt: int) -> None:
        """prompt: tokens of the prompt."""
        self.frequency, self.presence, self.seen = frequency, presence, prompt
        self._penalties: dict[int, float] = {}  # of each id of the answer

    @on_arrays
    def __call__(self, ids: Array, scores: Array) -> Array:
        for token in ids[0, self.seen :].tolist():
            self._penalties[token] = self._penalties.get(token, self.presence) + self.frequency
        self.seen = ids.shape[1]
        return _plus(scores, list(self._penalties), [-penalty for penalty in self._penalties.values()])


class Bias:
    """Adds a number to the scores of some ids."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids, self.values = list(bias), list(bias.values())

    @on_arrays
    def __call__(self, ids: Array, scores: Array) -> Array:
        return _plus(scores, self.ids, self.values)


class Watermark:
    """Favours a list of ids that the previous id seeds (Kirchenbauer et al. 2023, arXiv 2301.10226)."""

    def __init__(self, gamma: float = 0.5, delta: float = 2.0) -> None:
        self.gamma, self.delta = gamma, delta

    def green(self, previous: int, vocabulary: int) -> np.ndarray:
        """The favoured ids: the first of torch's random permutation for the seed of the previous id."""
        seed, count = WATERMARK_KEY * previous, int(self.gamma * vocabulary)
        if not available():  # then torch runs the model, and is here
            found: np.ndarray = _permuted_by_torch(seed, vocabulary, count)
            return found
        native().permutation(seed, vocabulary, ids := np.empty(count, np.int64))
        return ids

    @on_arrays
    def __call__(self, ids: Array, scores: Array) -> Array:
        green = self.green(int(ids[0, -1]), scores.shape[1])
        return _plus(scores, green, np.full(len(green), self.delta))


def _plus(scores: Array, ids: Any, values: Any) -> Array:
    """scores with values added to some ids, each of them there once."""
    arrays = of(scores)
    out = arrays.copy(scores)
    if len(ids):
        out[:, ids] += arrays.array(values, scores)
    return out
