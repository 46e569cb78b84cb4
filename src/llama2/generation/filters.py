"""The sampling filters, and the order of all processors.

The order is Hugging Face's: guidance, biases, penalties, bans, lengths, constraints, the caller's own processors, and
then, when sampling, temperature, top-h, top-k, top-p, min-p, typical, epsilon, eta; last the normalisation.
Everything runs in promote(logits.dtype, float32), on numpy arrays or torch tensors (`arrays`). B rows, V vocabulary.
No torch here.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama2.generation.processors as pr
from llama2.errors import InputError
from llama2.generation.arrays import Array, of, on_arrays
from llama2.generation.config import GenerationConfig, as_list
from llama2.generation.processors import LogitsProcessor, LogitsProcessorList

__all__ = ["LogitsProcessor", "LogitsProcessorList", "Prompt", "build_processors"]


def _need(good: bool, name: str, value: Any, bound: str) -> None:
    if not good:
        raise InputError(f"{name} is {value!r}; it must be {bound}")


class _Filter(LogitsProcessor):
    """A filter that drops tokens but never the `min_tokens_to_keep` best."""

    def __init__(self, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        _need(
            isinstance(min_tokens_to_keep, int) and min_tokens_to_keep >= 1,
            "min_tokens_to_keep",
            min_tokens_to_keep,
            "an integer of at least 1",
        )
        self.filter_value, self.min_tokens_to_keep = filter_value, min_tokens_to_keep

    def _drop(self, scores: Array, drop: Array) -> Array:
        """`scores` without the tokens marked in `drop` (B, V), the best ones excepted (ties of the last are kept)."""
        arrays, keep = of(scores), min(self.min_tokens_to_keep, scores.shape[-1])
        least = arrays.peak(scores) if keep == 1 else arrays.kth(scores, keep)
        return arrays.masked(scores, drop & (scores < least), self.filter_value)


class TemperatureLogitsWarper(LogitsProcessor):
    """Divides the logits by a positive temperature."""

    def __init__(self, temperature: float) -> None:
        good = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature > 0
        _need(good, "temperature", temperature, "a positive number; for the likeliest token set do_sample=False")
        self.temperature = float(temperature)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return scores / self.temperature


class TopKLogitsWarper(_Filter):
    """Keeps the k largest logits and whatever ties with the k-th (Fan et al. 2018, arXiv 1805.04833)."""

    def __init__(self, top_k: int, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(top_k, int) and top_k >= 1, "top_k", top_k, "an integer of at least 1")
        self.top_k = max(top_k, min_tokens_to_keep)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        least = of(scores).kth(scores, min(self.top_k, scores.shape[-1]))
        return of(scores).masked(scores, scores < least, self.filter_value)


class TopPLogitsWarper(_Filter):
    """Keeps the smallest set of most likely tokens with probability p (Holtzman et al. 2019, arXiv 1904.09751)."""

    def __init__(self, top_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(top_p, int | float) and 0 <= top_p <= 1, "top_p", top_p, "in [0, 1]")
        self.top_p = float(top_p)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        arrays, kept = of(scores), self.min_tokens_to_keep
        p = arrays.softmax(scores)
        # All that are less likely than (1 - p) / V add up to less than 1 - p, so they go without being sorted.
        places = arrays.likely(p, _SURELY * (1 - self.top_p) / p.shape[-1], kept)
        kept_scores, p_part = (scores, p) if places is None else (arrays.take(scores, places), arrays.take(p, places))
        order = arrays.order(kept_scores)
        rising = arrays.take(p_part, order)
        rest = 0.0 if places is None else 1 - arrays.total(p_part)
        drop = arrays.sums(rising, rest) <= 1 - self.top_p
        drop[:, -kept:] = False
        left = arrays.masked(kept_scores, arrays.put(arrays.copy(drop), order, drop), self.filter_value)
        if places is None:
            return left
        return arrays.put(arrays.full_like(scores, self.filter_value), places, left)


_SURELY = 0.999  # far more than all of a row's rounding


class TopHLogitsWarper(_Filter):
    """Keeps the likeliest tokens, of 100 at most, while their share of the entropy is within top_h."""

    def __init__(self, top_h: float, filter_value: float = -math.inf) -> None:
        super().__init__(filter_value)
        _need(isinstance(top_h, int | float) and 0 < top_h <= 1, "top_h", top_h, "in (0, 1]")
        self.top_h, self.top_n = top_h, 100

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        arrays = of(scores)
        logits, places = arrays.best(scores, min(self.top_n, scores.shape[-1]))
        log_p = arrays.log_softmax(logits)
        share = -arrays.without_nan(arrays.exp(log_p) * log_p)
        keep = arrays.sums(share) <= self.top_h * arrays.total(share)
        keep[:, 0] = True
        left = arrays.masked(logits, ~keep, -math.inf)
        return arrays.put(arrays.full_like(scores, -math.inf), places, left)


class MinPLogitsWarper(_Filter):
    """Drops tokens less likely than min_p times the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""

    def __init__(self, min_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(min_p, int | float) and 0 <= min_p <= 1, "min_p", min_p, "in [0, 1]")
        self.min_p = min_p

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        arrays = of(scores)
        p = arrays.softmax(scores)
        return self._drop(scores, p < self.min_p * arrays.peak(p))


class TypicalLogitsWarper(_Filter):
    """Keeps tokens whose information is closest to the entropy, up to `mass` (Meister et al. 2022, 2202.00666)."""

    def __init__(self, mass: float = 0.9, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(mass, int | float) and 0 < mass <= 1, "typical_p", mass, "in (0, 1]")
        self.mass = float(mass)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        arrays = of(scores)
        log_p = arrays.log_softmax(scores)
        p = arrays.exp(log_p)
        entropy = -arrays.total(log_p * p)
        distance = abs(-log_p - entropy)
        order = arrays.order(distance)
        distance = arrays.take(distance, order)
        last = (arrays.sums(arrays.take(p, order)) < self.mass).sum(-1)[:, None].clip(max=scores.shape[-1] - 1)
        drop = distance > arrays.take(distance, last)
        drop[:, : self.min_tokens_to_keep] = False
        return arrays.masked(scores, arrays.put(arrays.copy(drop), order, drop), self.filter_value)


class EpsilonLogitsWarper(_Filter):
    """Drops tokens less likely than epsilon (Hewitt et al. 2022, arXiv 2210.15191)."""

    def __init__(self, epsilon: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(epsilon, int | float) and 0 < epsilon < 1, "epsilon_cutoff", epsilon, "in (0, 1)")
        self.epsilon = epsilon

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return self._drop(scores, of(scores).softmax(scores) < self.epsilon)


class EtaLogitsWarper(_Filter):
    """Drops tokens less likely than min(epsilon, sqrt(epsilon) exp(-entropy)) (Hewitt et al. 2022)."""

    def __init__(
        self, epsilon: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1, device: Any = None
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(epsilon, int | float) and 0 < epsilon < 1, "eta_cutoff", epsilon, "in (0, 1)")
        self.epsilon = epsilon

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        arrays = of(scores)
        log_p = arrays.log_softmax(scores)
        p = arrays.exp(log_p)
        entropy = -arrays.total(log_p * p)
        eta = (math.sqrt(self.epsilon) * arrays.exp(-entropy)).clip(max=self.epsilon)
        return self._drop(scores, p < eta)


@dataclass
class Prompt:
    """The prompt as processors see it: ids (rows, P), and which are real (None: all)."""

    ids: Array
    mask: Array | None = None


def build_processors(
    config: GenerationConfig,
    prompt: Prompt,
    max_length: int,
    own: Sequence[Any] = (),
    prefix: LogitsProcessor | None = None,
    guidance: LogitsProcessor | None = None,
) -> LogitsProcessorList:
    """The processors of these settings in their order; a filter at its neutral value is left out.

    prefix: that of a `prefix_allowed_tokens_fn`, which stands among the bans.

    One of the caller's `own` with the class of a built-in replaces it, with a warning.
    """
    built = LogitsProcessorList([] if guidance is None else [guidance])
    built += _penalties(config, prompt) + _bans(config, prompt, prefix) + _forced(config, prompt, max_length)
    built.extend(own)
    if config.value("do_sample"):
        built += _filters(config)
    if config.value("renormalize_logits"):
        built.append(pr.LogitNormalization())
    kinds = {type(processor) for processor in own}
    replaced = [p for p in built if type(p) in kinds and not any(p is mine for mine in own)]
    for processor in replaced:
        warnings.warn(
            f"the given {type(processor).__name__} replaces the one that the settings ask for; set one of the two",
            stacklevel=4,
        )
    return LogitsProcessorList([p for p in built if not any(p is gone for gone in replaced)])


def _penalties(config: GenerationConfig, prompt: Prompt) -> list[Any]:
    out: list[Any] = []
    if config.sequence_bias:
        out.append(pr.SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.encoder_repetition_penalty not in (None, 1):
        out.append(
            pr.EncoderRepetitionPenaltyLogitsProcessor(config.encoder_repetition_penalty, prompt.ids, prompt.mask)
        )
    if config.repetition_penalty not in (None, 1):
        out.append(pr.RepetitionPenaltyLogitsProcessor(config.repetition_penalty, prompt_mask=prompt.mask))
    if config.no_repeat_ngram_size:
        out.append(pr.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size, prompt.mask))
    if config.encoder_no_repeat_ngram_size:
        size = config.encoder_no_repeat_ngram_size
        out.append(pr.EncoderNoRepeatNGramLogitsProcessor(size, prompt.ids, prompt.mask))
    return out


def _bans(config: GenerationConfig, prompt: Prompt, prefix: LogitsProcessor | None) -> list[Any]:
    out: list[Any] = []
    eos, width = config.eos_token_ids, prompt.ids.shape[1]
    if config.bad_words_ids:
        out.append(pr.NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if eos and config.value("min_length") > 0 and config.min_new_tokens is None:  # the latter counts where both are
        out.append(pr.MinLengthLogitsProcessor(config.value("min_length"), eos))
    if eos and config.min_new_tokens:
        out.append(pr.MinNewTokensLengthLogitsProcessor(width, config.min_new_tokens, eos))
    if prefix is not None:
        out.append(prefix)
    return out


def _forced(config: GenerationConfig, prompt: Prompt, max_length: int) -> list[Any]:
    out: list[Any] = []
    width = prompt.ids.shape[1]
    if config.forced_bos_token_id is not None:
        out.append(pr.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if as_list(config.forced_eos_token_id):
        out.append(pr.ForcedEOSTokenLogitsProcessor(max_length, config.forced_eos_token_id))
    if config.remove_invalid_values is True:
        out.append(pr.InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None and config.eos_token_ids:
        out.append(
            pr.ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, config.eos_token_ids, width)
        )
    if as_list(config.suppress_tokens):
        out.append(pr.SuppressTokensLogitsProcessor(config.suppress_tokens))
    if as_list(config.begin_suppress_tokens):
        begin = width if width > 1 or config.forced_bos_token_id is None else width + 1
        out.append(pr.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin))
    return out


def _filters(config: GenerationConfig) -> list[Any]:
    least = len(config.eos_token_ids) + 1 if config.value("num_beams") > 1 else 1
    least = max(least, 2) if config.value("num_beams") > 1 else least
    out: list[Any] = []
    if config.temperature not in (None, 1):
        out.append(TemperatureLogitsWarper(config.temperature))
    if config.top_h not in (None, 1):
        out.append(TopHLogitsWarper(config.top_h))
    if config.top_k:
        out.append(TopKLogitsWarper(config.top_k, min_tokens_to_keep=least))
    if config.top_p is not None and config.top_p < 1:
        out.append(TopPLogitsWarper(config.top_p, min_tokens_to_keep=least))
    if config.min_p is not None:
        out.append(MinPLogitsWarper(config.min_p, min_tokens_to_keep=least))
    if config.typical_p is not None and config.typical_p < 1:
        out.append(TypicalLogitsWarper(config.typical_p, min_tokens_to_keep=least))
    if config.epsilon_cutoff:
        out.append(EpsilonLogitsWarper(config.epsilon_cutoff, min_tokens_to_keep=least))
    if config.eta_cutoff:
        out.append(EtaLogitsWarper(config.eta_cutoff, min_tokens_to_keep=least))
    return out
