"""The draws of rows that have a seed each, from numbers that need no torch: see `SeededSampler`.

The numbers are those of torch's CPU generator: MT19937 seeded with the low 32 bits (Matsumoto and Nishimura 1998), two
words a number, of which 53 bits count. So a seed gives the same text with torch and without. B rows, V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from llama2.errors import InputError
from llama2.generation.arrays import NUMPY, Array, of, to_numpy
from llama2.plain import plain

Shortlisted = tuple[list[int], list[float]]  # ids of the tokens that are left of a row, and their probabilities


class Uniform:
    """Numbers in [0, 1), float64, the same as torch.rand draws with a generator of this seed."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)

    def draw(self, count: int) -> np.ndarray:
        """The next numbers (count,)."""
        words = self._words.randint(0, 2**32, size=(count, 2), dtype=np.uint32).astype(np.uint64)
        bits = (words[:, 0] << np.uint64(32) | words[:, 1]) & np.uint64(2**53 - 1)
        return bits * 2.0**-53


class SeededSampler:
    """Picks the next token of each row: the likeliest, or a draw from a stream of numbers that the row's seed begins.

    A draw takes one number per row, so it depends neither on the rest of the batch nor on the device.
    """

    _BLOCK = 64  # numbers drawn ahead for each row

    def __init__(self, do_sample: bool, seeds: Sequence[int]) -> None:
        self.do_sample = do_sample
        self._rows = [Uniform(seed) for seed in seeds] if do_sample else []
        self._ahead: list[np.ndarray] = []

    def __call__(self, scores_BV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B,) and the largest score of each row (B,), which is not finite where no token could be picked."""
        best_B, peak_B = likeliest(scores_BV)
        if not self.do_sample:
            return best_B, peak_B
        with np.errstate(all="ignore"):
            return self.draw(NUMPY.softmax(scores_BV), peak_B), peak_B

    def draw(self, p_BV: Array, peak_B: Array | None = None) -> Array:
        """One token per row from probabilities; rows whose peak is not finite get an arbitrary one."""
        arrays = of(p_BV)
        if peak_B is not None:
            p_BV = arrays.where(arrays.finite(peak_B)[:, None], p_BV, arrays.full_like(p_BV, 1.0))
        return arrays.inverse(p_BV, self.uniform())

    def among(self, rows: Sequence[Shortlisted], vocabulary: int, margin: float) -> list[int] | None:
        """As `draw`, a token per row, from ids in ascending order with their probabilities.

        None where probabilities `margin` away could give another: the next `draw` then uses the same numbers.
        """
        uniform = self.uniform()
        tokens = [_inverse(*row, u, margin) for row, u in zip(rows, uniform.tolist(), strict=True)]
        if None in tokens:
            self.put_back(uniform)
            return None
        return [token for token in tokens if token is not None]

    def uniform(self) -> np.ndarray:
        """The next number of each row (B,)."""
        if not self._ahead:
            self._draw_ahead()
        return self._ahead.pop()

    def peek(self, ahead: int) -> np.ndarray:
        """The numbers that `uniform` will give after `ahead` others."""
        while len(self._ahead) <= ahead:
            self._draw_ahead()
        return self._ahead[-1 - ahead]

    def put_back(self, uniform: np.ndarray) -> None:
        """Makes numbers the next that `uniform` gives."""
        self._ahead.append(uniform)

    def _draw_ahead(self) -> None:
        block = np.stack([row.draw(self._BLOCK) for row in self._rows])
        self._ahead[:0] = list(block.T[::-1])


def _inverse(ids: list[int], p: list[float], u: float, margin: float) -> int | None:
    """The token whose stretch of the cumulative distribution holds u in [0, 1), None within `margin` of its ends."""
    ends = list(accumulate(p))
    index = min(bisect_right(ends, u), len(ids) - 1)
    above = index == 0 or u - ends[index - 1] > margin
    below = index == len(ids) - 1 or ends[index] - u > margin
    return ids[index] if above and below else None


def likeliest(scores_BV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of the best tokens of each row (B,) and its score (B,); NaN counts as best."""
    best_B = scores_BV.argmax(-1)
    return best_B, scores_BV[np.arange(len(best_B)), best_B]


def row_seeds(seed: int | Sequence[int] | None, prompts: int, returned: int) -> list[int] | None:
    """A seed for each of prompts * returned rows.

    An int s gives row i the seed s + i, so row i alone is `seed=s + i`. A list has one seed s per prompt, whose j-th
    returned sequence gets s + j, or one for every row.
    """
    seed = plain(seed)
    if seed is None:
        return None
    rows = prompts * returned
    if isinstance(seed, int):
        return [seed + i for i in range(rows)]
    seeds = [int(s) for s in seed]
    if len(seeds) == rows:
        return seeds
    if len(seeds) == prompts:
        return [s + j for s in seeds for j in range(returned)]
    raise InputError(f"seed has {len(seeds)} entries; give one int, one for each of {prompts} prompts or {rows} rows")


def invalid_logits(raw_BV: Array, scores_BV: Array, rows: Sequence[int], step: int) -> InputError:
    """The error for rows whose scores leave nothing to pick: was it the network or the settings?"""
    names = list(rows)
    raw, scores = to_numpy(raw_BV)[names], to_numpy(scores_BV)[names]
    if bool(np.isnan(raw).any()) or bool((raw == np.inf).any()):
        return InputError(
            f"the model's logits hold NaN or inf in row {names} at new token {step}, so no probability tensor can be "
            "made of them: float16 overflows where bfloat16 does not, so load with dtype=torch.bfloat16 or float32; "
            "otherwise the weights are damaged. remove_invalid_values=True hides it"
        )
    if bool((scores == -np.inf).all()):
        return InputError(
            f"every token is forbidden in row {names} at new token {step}: the bans and constraints (bad_words_ids, "
            "suppress_tokens, no_repeat_ngram_size, min_length, processors) leave none; relax one of them"
        )
    return InputError(
        f"a logits processor made NaN or inf in row {names} at new token {step}; the model's logits were finite"
    )
