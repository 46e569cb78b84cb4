"""Sampling from the few tokens that temperature, top-k and top-p leave, without a tensor of the whole vocabulary.

The filters of `filters` stay the definition. Here the compiled module finds the tokens that they leave in two passes
over the logits, computes in float64, and gives no answer where float32, in any order of summation, could decide
otherwise: then the filters run, with the same random numbers. So the tokens are the same, draw for draw. No torch here.

`WholeDraw` does so where only a temperature shapes the draw: one pass of exponentials in a buffer that stays, sums of
blocks, and a search in one of them.
"""

import math
from typing import Any, Protocol

import numpy as np

from llama2 import cpu
from llama2.generation.arrays import Array
from llama2.generation.filters import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from llama2.generation.processors import LogitsProcessorList
from llama2.generation.seeded import SeededSampler, Shortlisted

_ORDER = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


class Among(Protocol):
    """Draws one token per row from the few candidates: (their ids and probabilities, the vocabulary, how far these
    may be wrong) -> tokens, or None where that decides."""

    def __call__(self, rows: list[Shortlisted], vocabulary: int, margin: float, /) -> list[int] | None: ...


class DrawsAmong(Protocol):
    """The part of a sampler that is used."""

    do_sample: bool

    @property
    def among(self) -> Among: ...


class Shortlist:
    """Draws tokens from scores (B, V) as `filters` and `sampler` do one after the other; see `split`."""

    def __init__(self, filters: list[Any], sampler: DrawsAmong) -> None:
        self.sampler, self.temperature, self.most, self.top_p, self.keep = sampler, 1.0, 0, 1.0, 1
        for one in filters:
            if isinstance(one, TemperatureLogitsWarper):
                self.temperature = one.temperature
            elif isinstance(one, TopKLogitsWarper):
                self.most = one.top_k
            else:
                self.top_p, self.keep = one.top_p, one.min_tokens_to_keep

    def __call__(self, scores_BV: Array) -> list[int] | None:
        """A token per row, or None: the filters and the sampler have to say, which then draw the same."""
        if not isinstance(scores_BV, np.ndarray):
            if scores_BV.device.type != "cpu":
                return None
            scores_BV = scores_BV.numpy()
        if scores_BV.dtype != np.float32:
            return None
        found = cpu.shortlists(scores_BV, self.temperature, self.most, self.top_p, self.keep)
        rows = [row for row in found if row is not None]
        if len(rows) < len(found):
            return None
        return self.sampler.among(rows, scores_BV.shape[-1], cpu.shortlist_margin(max(len(p) for _, p in rows)))


class WholeDraw:
    """Draws a token from a whole row of logits (V,) float32 at a temperature, with its log-probability, as `sampler`
    would."""

    _BLOCK = 64
    _MARGIN = 1e-5  # a softmax in float32, in any order of summation, is within a few 1e-6 of a sum of probabilities

    def __init__(self, temperature: float, sampler: SeededSampler) -> None:
        self.temperature, self.sampler = temperature, sampler
        self._buffer = np.zeros(0, np.float32)

    def __call__(self, logits_V: np.ndarray) -> tuple[int, float] | None:
        """A token and log p(token); None where the sampler has to say, which then draws the same."""
        count, peak = len(logits_V), float(logits_V.max())
        if logits_V.dtype != np.float32 or not math.isfinite(peak):
            return None
        size = -(-count // self._BLOCK) * self._BLOCK
        if len(self._buffer) != size:
            self._buffer = np.zeros(size, np.float32)
        p = self._buffer[:count]
        np.subtract(logits_V, np.float32(peak), out=p)
        if self.temperature != 1:
            np.divide(p, np.float32(self.temperature), out=p)
        np.exp(p, out=p)
        blocks = self._buffer.reshape(-1, self._BLOCK)
        ends = blocks.sum(1).cumsum(dtype=np.float64)
        uniform = self.sampler.uniform()
        total = float(ends[-1])
        target = float(uniform[0]) * total
        block = min(int(ends.searchsorted(target, side="right")), len(ends) - 1)
        begin = float(ends[block - 1]) if block else 0.0
        inner = blocks[block].cumsum(dtype=np.float64) + begin
        column = int(inner.searchsorted(target, side="right"))
        token = block * self._BLOCK + column
        low = float(inner[column - 1]) if column else begin
        if (
            column == self._BLOCK
            or token >= count
            or min(target - low, float(inner[column]) - target) < self._MARGIN * total
        ):
            self.sampler.put_back(uniform)
            return None
        return token, (float(logits_V[token]) - peak) / self.temperature - math.log(total)


def whole_draw(processors: LogitsProcessorList, sampler: SeededSampler) -> WholeDraw | None:
    """The draw of a whole row, where nothing but a temperature comes before it."""
    if not sampler.do_sample or len(processors) > 1 or any(type(p) is not TemperatureLogitsWarper for p in processors):
        return None
    return WholeDraw(processors[0].temperature if processors else 1.0, sampler)


def split(
    processors: LogitsProcessorList, sampler: DrawsAmong
) -> tuple[LogitsProcessorList, LogitsProcessorList, Shortlist | None]:
    """Splits processors: those before the last filters, these filters, and the fused replacement of filters and
    sampler.

    There is no such thing, and no filter split off, without a draw, without top-k, or with a filter of another kind or
    a processor behind them.
    """
    first = len(processors)
    while first and type(processors[first - 1]) in _ORDER:
        first -= 1
    filters = list(processors[first:])
    places = [_ORDER.index(type(one)) for one in filters]
    fits = places == sorted(set(places)) and 1 in places and sampler.do_sample and cpu.available()
    if not fits or any(getattr(one, "filter_value", -math.inf) != -math.inf for one in filters):
        return processors, LogitsProcessorList(), None
    head, tail = LogitsProcessorList(processors[:first]), LogitsProcessorList(filters)
    return head, tail, Shortlist(filters, sampler)
