"""llama.cpp's samplers, in the order that a caller gives: DRY, XTC, top-n-sigma, dynamic temperature, mirostat,
penalties over the last tokens.

`chain` makes processors of one sequence, ids (1, S) and scores (1, V), each a function of scores, settings and seed.
They come in place of the filters of `filters`, of which those that mean the same are used here too. The temperature,
which comes first in Hugging Face's order, is the last of them, unless `order` says otherwise. No torch here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama2.errors import InputError
from llama2.generation.arrays import Array, of, on_arrays, to_numpy
from llama2.generation.filters import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from llama2.generation.processors import LogitsProcessor
from llama2.generation.seeded import Uniform

ORDER = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
BREAKERS = ("\n", ":", '"', "*")
_NAMES: Mapping[str, str] = {  # llama.cpp's letters, and its other spellings
    "e": "penalties", "d": "dry", "s": "top_n_sigma", "k": "top_k", "y": "typ_p", "p": "top_p", "m": "min_p",
    "x": "xtc", "t": "temperature", "typical_p": "typ_p", "typical": "typ_p", "typ": "typ_p", "temp": "temperature",
    "nucleus": "top_p",
}  # fmt: skip
_XTC_STREAM = 0x58544300  # its numbers are none of those that pick tokens
_MOST_LOSS = 1e30  # finite in float32, and more than any logit
_MOST_EXPONENT = 88.7  # of e in float32, as llama.cpp bounds it


@dataclass(frozen=True)
class SamplerSettings:
    """Settings under llama.cpp's names and with its defaults, at which each of its own samplers is off.

    temperature: None takes the likeliest token of those that are left. penalty_last_n: tokens that penalties see, -1
    for all of them, the prompt's included. order: names of ORDER; what it leaves out does not run.
    """

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    min_keep: int = 0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = BREAKERS
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    order: tuple[str, ...] = ORDER

    def __post_init__(self) -> None:
        """Raises InputError for a value that means nothing."""
        _need(self.mirostat in (0, 1, 2), "mirostat", self.mirostat, "0, 1 or 2")
        for name in ("xtc_probability", "xtc_threshold"):
            _need(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("dynatemp_range", "dry_multiplier", "dry_base", "mirostat_tau", "mirostat_eta"):
            value = getattr(self, name)
            _need(value >= 0 and math.isfinite(value), name, value, "a finite number of at least 0")
        for name in ("penalty_last_n", "dry_penalty_last_n"):
            _need(getattr(self, name) >= -1, name, getattr(self, name), "at least -1")


def _need(good: bool, name: str, value: Any, bound: str) -> None:
    if not good:
        raise InputError(f"{name} is {value!r}; it must be {bound}")


def ordered(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """An order of samplers as clients write it, by names or as llama.cpp's letters; and what is none of them."""
    names_in_order, unknown = dict[str, None](), list[str]()
    for name in names:
        plain = _NAMES.get(name.strip().lower().replace("-", "_"), name.strip().lower().replace("-", "_"))
        if plain in ORDER:
            names_in_order[plain] = None
        else:
            unknown.append(name)
    return tuple(names_in_order), tuple(unknown)


def chain(settings: SamplerSettings, seed: int, piece: Callable[[int], bytes]) -> list[LogitsProcessor]:
    """The processors of one sequence. piece: the bytes of a token, in which DRY looks for sequence breakers.

    With mirostat only penalties, the temperature and mirostat run, as in llama.cpp.
    """
    least = max(settings.min_keep, 1)
    processors: dict[str, LogitsProcessor] = {}
    penalties = (settings.repeat_penalty, settings.frequency_penalty, settings.presence_penalty)
    if penalties != (1, 0, 0) and settings.penalty_last_n:
        processors["penalties"] = LastTokensPenalty(*penalties, settings.penalty_last_n)
    if settings.dry_multiplier and settings.dry_base >= 1 and settings.dry_penalty_last_n:
        processors["dry"] = DryPenalty(settings, piece)
    if settings.top_n_sigma > 0:
        processors["top_n_sigma"] = TopNSigma(settings.top_n_sigma)
    if settings.top_k > 0:
        processors["top_k"] = TopKLogitsWarper(settings.top_k)
    if settings.typical_p < 1:
        processors["typ_p"] = TypicalLogitsWarper(settings.typical_p, min_tokens_to_keep=least)
    if settings.top_p < 1:
        processors["top_p"] = TopPLogitsWarper(settings.top_p, min_tokens_to_keep=least)
    if settings.min_p > 0:
        processors["min_p"] = MinPLogitsWarper(settings.min_p, min_tokens_to_keep=least)
    if settings.xtc_probability > 0 and settings.xtc_threshold <= 0.5:
        processors["xtc"] = Xtc(settings.xtc_probability, settings.xtc_threshold, settings.min_keep, seed)
    if settings.temperature is not None and settings.dynatemp_range:
        spread = settings.dynatemp_range
        processors["temperature"] = DynamicTemperature(settings.temperature, spread, settings.dynatemp_exponent)
    elif settings.temperature not in (None, 1):
        processors["temperature"] = TemperatureLogitsWarper(settings.temperature)
    if settings.mirostat and settings.temperature is not None:
        first = [processors[name] for name in ("penalties", "temperature") if name in processors]
        return [*first, Mirostat(settings.mirostat, settings.mirostat_tau, settings.mirostat_eta)]
    return [processors[name] for name in settings.order if name in processors]


class LastTokensPenalty(LogitsProcessor):
    """Penalties for ids among the last tokens: repetition as Hugging Face's, then frequency and presence."""

    def __init__(self, repeat: float, frequency: float, presence: float, last_n: int) -> None:
        """last_n: how many tokens count, -1 for all."""
        self.repeat, self.frequency, self.presence, self.last_n = repeat, frequency, presence, last_n

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        row = to_numpy(input_ids)[0]
        ids, counts = np.unique(row if self.last_n < 0 else row[-self.last_n :], return_counts=True)
        arrays = of(scores)
        seen = arrays.array(ids[None], input_ids)
        score = arrays.take(scores, seen)
        score = arrays.where(score <= 0, score * self.repeat, score / self.repeat)
        less = counts[None] * self.frequency + self.presence
        return arrays.put(scores, seen, score - arrays.array(less.astype(np.float64), scores))


class DryPenalty(LogitsProcessor):
    """Lowers what would go on with a repetition: by multiplier * base ** (its length - allowed_length).

    The length is that of the longest end of the text that was there before, followed by the token; it does not reach
    over a sequence breaker, a text.
    """

    def __init__(self, settings: SamplerSettings, piece: Callable[[int], bytes]) -> None:
        self.multiplier, self.base = settings.dry_multiplier, settings.dry_base
        self.allowed, self.last_n = settings.dry_allowed_length, settings.dry_penalty_last_n
        self._breakers = [text.encode() for text in settings.dry_sequence_breakers if text]
        self._piece, self._tail = piece, b""
        self._seen, self._since = 0, 0  # tokens that were looked at; those behind the last breaker
        most = _MOST_EXPONENT / math.log(self.base) if self.base > 1.000001 else 1e9
        self._most = int(min(most, 1e6))  # of the exponent

    def _look(self, ids: list[int]) -> None:
        """Counts the tokens behind the last breaker; ids: those that are new."""
        longest = max(map(len, self._breakers), default=1)
        for token in ids:
            text = self._tail + self._piece(token)
            ends = any(
                text.find(breaker, max(len(self._tail) - len(breaker) + 1, 0)) >= 0 for breaker in self._breakers
            )
            self._since = 0 if ends else self._since + 1
            self._tail = text[-(longest - 1) :] if longest > 1 else b""

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        row = to_numpy(input_ids)[0]
        self._look(row[self._seen :].tolist())
        self._seen = len(row)
        row = row if self.last_n < 0 else row[-self.last_n :]
        limit = min(self._since, len(row) - 1)
        if limit < max(self.allowed, 1):
            return scores
        lengths = self._lengths(row, limit)
        if not lengths:
            return scores
        arrays = of(scores)
        ids = arrays.array(np.array([list(lengths)]), input_ids)
        powers = (self.multiplier * self.base ** min(n - self.allowed, self._most) for n in lengths.values())
        losses = np.array([[min(power, _MOST_LOSS) for power in powers]])
        return arrays.put(scores, ids, arrays.take(scores, ids) - arrays.array(losses, scores))

    def _lengths(self, row: np.ndarray, limit: int) -> dict[int, int]:
        """The length of the repetition that each token would go on with, where that counts; limit: the longest."""
        lengths: dict[int, int] = {}
        last = len(row) - 1
        ends = np.flatnonzero(row[:last] == row[last])  # places at which what is repeated may end
        length = 1
        while len(ends):
            if length >= self.allowed:
                lengths |= dict.fromkeys(row[ends + 1].tolist(), length)
            if length >= min(limit, self.allowed + self._most):
                return lengths
            ends = ends[ends >= length]
            ends = ends[row[ends - length] == row[last - length]]
            length += 1
        return lengths


class TopNSigma(LogitsProcessor):
    """Keeps logits within n standard deviations of the largest (Tang et al. 2024, arXiv 2411.07641)."""

    def __init__(self, n: float) -> None:
        self.n = n

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        row = to_numpy(scores)[0].astype(np.float64)
        left = row[row > -math.inf]
        if not len(left):
            return scores
        arrays = of(scores)
        return arrays.masked(scores, scores < float(left.max() - self.n * left.std()), -math.inf)


class Xtc(LogitsProcessor):
    """With some probability drops all tokens of at least a threshold but the least likely of them."""

    def __init__(self, probability: float, threshold: float, min_keep: int, seed: int) -> None:
        self.probability, self.threshold, self.min_keep = probability, threshold, min_keep
        self._numbers = Uniform(seed ^ _XTC_STREAM)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        if float(self._numbers.draw(1)[0]) > self.probability:
            return scores
        arrays = of(scores)
        p = to_numpy(arrays.softmax(scores))[0]
        top = np.flatnonzero(p >= self.threshold)
        if len(top) < 2 or int((p > 0).sum()) - (len(top) - 1) < self.min_keep:
            return scores
        gone = np.zeros(scores.shape, bool)
        gone[0, top] = True
        gone[0, top[np.argsort(-p[top], kind="stable")[-1]]] = False
        return arrays.masked(scores, arrays.array(gone, scores), -math.inf)


class DynamicTemperature(LogitsProcessor):
    """A temperature within a range, the higher the more even the distribution: its entropy over that of a uniform."""

    def __init__(self, temperature: float, spread: float, exponent: float) -> None:
        self.low, self.high, self.exponent = max(temperature - spread, 0.0), temperature + spread, exponent

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        p = to_numpy(of(scores).softmax(scores))[0].astype(np.float64)
        p = p[p > 0]
        if len(p) < 2:
            return scores
        share = float(-(p * np.log(p)).sum()) / math.log(len(p))
        temperature = self.low + (self.high - self.low) * share**self.exponent
        return scores / max(temperature, 1e-5)


class Mirostat(LogitsProcessor):
    """Keeps the surprise of what is picked near tau bits (Basu et al. 2020, arXiv 2007.14966); version 1 or 2.

    It receives what was picked as the last of the ids of its next call.
    """

    _ESTIMATED = 100  # tokens from which version 1 estimates how steeply probabilities fall

    def __init__(self, version: int, tau: float, eta: float) -> None:
        self.version, self.tau, self.eta, self.mu = version, tau, eta, 2 * tau
        self._left: tuple[np.ndarray, np.ndarray] | None = None  # ids and probabilities of the last draw

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        self._hear(int(input_ids[0, -1]))
        arrays = of(scores)
        p = to_numpy(arrays.softmax(scores))[0].astype(np.float64)
        order = np.argsort(-p, kind="stable")
        order = order[p[order] > 0]
        if not len(order):
            return scores
        count = self._first(p[order], len(p)) if self.version == 1 else self._second(p[order])
        order = order[: max(count, 1)]
        self._left = order, p[order] / p[order].sum()
        gone = np.ones(scores.shape, bool)
        gone[0, order] = False
        return arrays.masked(scores, arrays.array(gone, scores), -math.inf)

    def _hear(self, token: int) -> None:
        if self._left is None:
            return
        ids, p = self._left
        if len(positions := np.flatnonzero(ids == token)):
            self.mu -= self.eta * (-math.log2(float(p[positions[0]])) - self.tau)

    def _first(self, p: np.ndarray, vocabulary: int) -> int:
        top = p[: self._ESTIMATED]
        places = np.arange(1, len(top))
        t, b = np.log((places + 1) / places), np.log(top[:-1] / top[1:])
        s = float((t * b).sum() / (t * t).sum()) if len(top) > 1 else 0.0
        epsilon = s - 1
        under = 1 - vocabulary**-epsilon
        if s <= 0 or under == 0 or epsilon / under <= 0:
            return len(p)
        log_k = (math.log(epsilon / under) + self.mu * math.log(2)) / s
        return len(p) if log_k > math.log(len(p)) else int(math.exp(log_k))

    def _second(self, p: np.ndarray) -> int:
        return int((-np.log2(p) <= self.mu).sum())
