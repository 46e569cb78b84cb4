"""From logits to the next token: the sampling filters, the order of all processors, and the draw.

The order is Hugging Face's: guidance, biases, penalties, bans, lengths, constraints, the caller's own processors, and
then, when sampling, temperature, top-h, top-k, top-p, min-p, typical, epsilon, eta; last the normalisation.
Everything runs in promote(logits.dtype, float32). B rows, V vocabulary.
"""

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llama2.generation.processors as pr
from llama2.errors import InputError
from llama2.generation.config import GenerationConfig, as_list
from llama2.generation.processors import LogitsProcessor, LogitsProcessorList
from llama2.noise import can_end, is_known, some_of
from llama2.plain import plain

Shortlisted = tuple[list[int], list[float]]  # ids of the tokens that are left of a row, and their probabilities

__all__ = ["LogitsProcessor", "LogitsProcessorList", "Sampler", "build_processors"]


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

    def _drop(self, scores: Tensor, drop: Tensor) -> Tensor:
        """`scores` without the tokens marked in `drop` (B, V), the best ones excepted (ties of the last are kept)."""
        keep = min(self.min_tokens_to_keep, scores.shape[-1])
        least = scores.amax(-1, keepdim=True) if keep == 1 else scores.topk(keep).values[:, -1:]
        return scores.masked_fill(drop & (scores < least), self.filter_value)


class TemperatureLogitsWarper(LogitsProcessor):
    """Divides the logits by a positive temperature."""

    def __init__(self, temperature: float) -> None:
        good = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature > 0
        _need(good, "temperature", temperature, "a positive number; for the likeliest token set do_sample=False")
        self.temperature = float(temperature)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


class TopKLogitsWarper(_Filter):
    """Keeps the k largest logits and whatever ties with the k-th (Fan et al. 2018, arXiv 1805.04833)."""

    def __init__(self, top_k: int, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(top_k, int) and top_k >= 1, "top_k", top_k, "an integer of at least 1")
        self.top_k = max(top_k, min_tokens_to_keep)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        least = scores.topk(min(self.top_k, scores.shape[-1]), sorted=True).values[:, -1:]
        return scores.masked_fill(scores < least, self.filter_value)


class TopPLogitsWarper(_Filter):
    """Keeps the smallest set of most likely tokens with probability p (Holtzman et al. 2019, arXiv 1904.09751)."""

    def __init__(self, top_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(top_p, int | float) and 0 <= top_p <= 1, "top_p", top_p, "in [0, 1]")
        self.top_p = float(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        places = _finite_places(scores)
        part = scores if places is None else scores.gather(1, places)
        ascending, order = part.sort(dim=-1, stable=True)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
        drop[:, -self.min_tokens_to_keep :] = False
        kept = part.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), self.filter_value)
        return kept if places is None else scores.scatter(1, places, kept)


def _finite_places(scores: Tensor) -> Tensor | None:
    """Where the finite scores are (B, n), in order of the ids, or None where looking does not pay.

    After top-k a few dozen of 32,000 tokens are left, and those that are -inf add nothing to a cumulative sum. Rows
    with fewer than n finite scores are filled up with some that are -inf. On a GPU, counting would cost a
    synchronisation and sorting everything is cheap.
    """
    if scores.device.type != "cpu" or scores.shape[-1] < 1024:
        return None
    most = int((scores > -math.inf).sum(-1).max())
    if not 0 < most <= scores.shape[-1] // 8:
        return None
    return scores.topk(most, sorted=False).indices.sort(-1).values


class TopHLogitsWarper(_Filter):
    """Keeps the likeliest tokens, of 100 at most, while their share of the entropy is within top_h."""

    def __init__(self, top_h: float, filter_value: float = -math.inf) -> None:
        super().__init__(filter_value)
        _need(isinstance(top_h, int | float) and 0 < top_h <= 1, "top_h", top_h, "in (0, 1]")
        self.top_h, self.top_n = top_h, 100

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits, places = scores.topk(min(self.top_n, scores.shape[-1]), sorted=True)
        log_p = logits.log_softmax(-1)
        share = -(log_p.exp() * log_p).nan_to_num(0.0)
        keep = share.cumsum(-1) <= self.top_h * share.sum(-1, keepdim=True)
        keep[:, 0] = True
        return scores.masked_fill(~torch.zeros_like(scores, dtype=torch.bool).scatter(1, places, keep), -math.inf)


class MinPLogitsWarper(_Filter):
    """Drops tokens less likely than min_p times the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""

    def __init__(self, min_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(min_p, int | float) and 0 <= min_p <= 1, "min_p", min_p, "in [0, 1]")
        self.min_p = min_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p = scores.softmax(-1)
        return self._drop(scores, p < self.min_p * p.amax(-1, keepdim=True))


class TypicalLogitsWarper(_Filter):
    """Keeps tokens whose information is closest to the entropy, up to `mass` (Meister et al. 2022, 2202.00666)."""

    def __init__(self, mass: float = 0.9, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(mass, int | float) and 0 < mass <= 1, "typical_p", mass, "in (0, 1]")
        self.mass = float(mass)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = scores.log_softmax(-1)
        p = log_p.exp()
        entropy = -(log_p * p).nansum(-1, keepdim=True)
        distance, order = (-log_p - entropy).abs().sort(-1)
        reached = p.gather(1, order).cumsum(-1)
        last = (reached < self.mass).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        drop = distance > distance.gather(1, last)
        drop[:, : self.min_tokens_to_keep] = False
        return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), self.filter_value)


class EpsilonLogitsWarper(_Filter):
    """Drops tokens less likely than epsilon (Hewitt et al. 2022, arXiv 2210.15191)."""

    def __init__(self, epsilon: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(epsilon, int | float) and 0 < epsilon < 1, "epsilon_cutoff", epsilon, "in (0, 1)")
        self.epsilon = epsilon

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._drop(scores, scores.softmax(-1) < self.epsilon)


class EtaLogitsWarper(_Filter):
    """Drops tokens less likely than min(epsilon, sqrt(epsilon) exp(-entropy)) (Hewitt et al. 2022)."""

    def __init__(
        self, epsilon: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1, device: Any = None
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        _need(isinstance(epsilon, int | float) and 0 < epsilon < 1, "eta_cutoff", epsilon, "in (0, 1)")
        self.epsilon = epsilon

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = scores.log_softmax(-1)
        p = log_p.exp()
        entropy = -(log_p * p).nansum(-1, keepdim=True)
        eta = (math.sqrt(self.epsilon) * torch.exp(-entropy)).clamp(max=self.epsilon)
        return self._drop(scores, p < eta)


@dataclass
class Prompt:
    """What processors need to know of the prompt: ids (rows, P), which are real (None: all), and how often each row
    will be repeated."""

    ids: Tensor
    mask: Tensor | None = None
    beams: int = 1


def build_processors(
    config: GenerationConfig,
    prompt: Prompt,
    max_length: int,
    own: Sequence[Any] = (),
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    guidance: LogitsProcessor | None = None,
) -> LogitsProcessorList:
    """The processors of these settings in their order; a filter at its neutral value is left out.

    One of the caller's `own` with the class of a built-in replaces it, with a warning.
    """
    built = LogitsProcessorList([] if guidance is None else [guidance])
    built += (
        _penalties(config, prompt)
        + _bans(config, prompt, prefix_allowed_tokens_fn)
        + _forced(config, prompt, max_length)
    )
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


def _bans(config: GenerationConfig, prompt: Prompt, allowed: Callable[[int, Tensor], list[int]] | None) -> list[Any]:
    out: list[Any] = []
    eos, width = config.eos_token_ids, prompt.ids.shape[1]
    if config.bad_words_ids:
        out.append(pr.NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if eos and config.value("min_length") > 0 and config.min_new_tokens is None:  # the latter counts where both are
        out.append(pr.MinLengthLogitsProcessor(config.value("min_length"), eos))
    if eos and config.min_new_tokens:
        out.append(pr.MinNewTokensLengthLogitsProcessor(width, config.min_new_tokens, eos))
    if allowed is not None:
        out.append(pr.PrefixConstrainedLogitsProcessor(allowed, prompt.beams))
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


def likeliest(scores_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the best tokens of each row (B,) and its score (B,); NaN counts as best."""
    if scores_BV.device.type != "cpu":
        peak_B, best_B = scores_BV.max(dim=-1)
        return best_B, peak_B
    scores = scores_BV.numpy()  # whose argmax takes a tenth of the time of torch's maximum with its place
    best = scores.argmax(-1)
    return torch.from_numpy(best), torch.from_numpy(scores[_counting(len(best)), best])


@cache
def _counting(count: int) -> Any:
    return np.arange(count)


class Sampler:
    """Picks the next token of each row: the likeliest, or a draw.

    Without `seeds` the draw is torch.multinomial with `generator` or torch's global state, the same numbers that
    transformers draws. With `seeds` (one a row) each row has a generator of its own, on the CPU, and uses one uniform
    number a step: its draws do not depend on the rest of the batch nor on the device.
    """

    _BLOCK = 64  # uniform numbers drawn ahead for each row

    def __init__(
        self, do_sample: bool, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None
    ) -> None:
        self.do_sample, self.generator = do_sample, generator
        self._rows = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
        self._ahead: list[Tensor] = []
        self._noise: Tensor | None = None  # of a draw that `among` began and left to `draw`

    def __call__(self, scores_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) and the largest score of each row (B,), which is not finite where no token could be picked."""
        best_B, peak_B = likeliest(scores_BV)
        if not self.do_sample:
            return best_B, peak_B
        return self.draw(scores_BV.softmax(-1), peak_B), peak_B

    def draw(self, p_BV: Tensor, peak_B: Tensor | None = None) -> Tensor:
        """One token a row from probabilities; rows whose peak is not finite get an arbitrary one."""
        if peak_B is not None:
            p_BV = torch.where(peak_B.isfinite()[:, None], p_BV, 1.0)
        if self._noise is not None:  # what it does not reach has probability 0
            noise_BV, begun = torch.ones_like(p_BV), self._noise
            noise_BV.view(-1)[: len(begun)] = begun
            self._noise = None
            return (p_BV / noise_BV).argmax(-1)
        if self._rows is None:
            return torch.multinomial(p_BV, 1, generator=self.generator).squeeze(1)
        # Inverse of the cumulative distribution in float64. A token of probability 0 has an empty interval, and the
        # clamp keeps a number that rounds up to the total inside the last interval that is not empty.
        cumulative = p_BV.double().cumsum(-1)
        total = cumulative[:, -1:]
        target = self.uniform().to(p_BV.device)[:, None] * total
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, target, right=True).squeeze(1)

    def among(self, rows: Sequence[Shortlisted], vocabulary: int, margin: float) -> list[int] | None:
        """As `draw`, a token a row, from ids in ascending order with their probabilities.

        None where probabilities `margin` away could give another: the next `draw` then uses the same random numbers.
        """
        if self._rows is not None:
            uniform = self.uniform()
            found = [_inverse(*row, u, margin) for row, u in zip(rows, uniform.tolist(), strict=True)]
            if None in found:
                self.put_back(uniform)
        else:
            # A row with one token left races alone: its numbers count as drawn and are not looked at.
            places = [i * vocabulary + at for i, (ids, _) in enumerate(rows) if len(ids) > 1 for at in ids]
            values, undo = self._noise_at(places, len(rows) * vocabulary)
            waits = iter(values)
            found = [ids[0] if len(ids) == 1 else _race(ids, p, [next(waits) for _ in ids], margin) for ids, p in rows]
            if None in found:
                undo()
        return None if None in found else [token for token in found if token is not None]

    def _noise_at(self, places: list[int], total: int) -> tuple[list[float], Callable[[], None]]:
        """Those at `places` of the `total` Exp(1) numbers that torch.multinomial would draw, which count as drawn; and
        what leaves them all to the next `draw`."""
        source = torch.default_generator if self.generator is None else self.generator
        if source.device.type == "cpu" and is_known():
            return some_of(source, places, total)
        noise = self._first_noise(max(places, default=0) + 1, total)

        def keep() -> None:
            self._noise = noise

        return noise.numpy()[places].tolist(), keep

    def _first_noise(self, count: int, total: int) -> Tensor:
        """The first `count`, or more, of the `total` Exp(1) numbers that torch.multinomial would draw."""
        count = min(total, max(count, 64)) if can_end() else total
        return torch.empty(count).exponential_(generator=self.generator)

    def exponential(self, like_BV: Tensor) -> Tensor:
        """Draws of Exp(1) in the shape of `like_BV`, each row from its own generator where there are seeds."""
        if self._rows is None:
            return torch.empty_like(like_BV).exponential_(generator=self.generator)
        rows = [torch.empty(like_BV.shape[1], dtype=like_BV.dtype).exponential_(generator=g) for g in self._rows]
        return torch.stack(rows).to(like_BV.device)

    def uniform(self) -> Tensor:
        """One number in [0, 1) a row, float64; one number in all without seeds."""
        if self._rows is None:
            device = "cpu" if self.generator is None else self.generator.device
            return torch.rand(1, dtype=torch.float64, generator=self.generator, device=device)
        if not self._ahead:
            self._draw_ahead(self._rows)
        return self._ahead.pop()

    def peek(self, place: int) -> Tensor:
        """The number that `uniform` will give after `place` others; needs seeds."""
        while self._rows is not None and len(self._ahead) <= place:
            self._draw_ahead(self._rows)
        return self._ahead[-1 - place]

    def put_back(self, uniform: Tensor) -> None:
        """Makes a number the next that `uniform` gives."""
        self._ahead.append(uniform)

    def _draw_ahead(self, rows: list[torch.Generator]) -> None:
        block = torch.stack([torch.rand(self._BLOCK, dtype=torch.float64, generator=g) for g in rows])
        self._ahead[:0] = block.unbind(1)[::-1]


def _inverse(ids: list[int], p: list[float], u: float, margin: float) -> int | None:
    """The token whose stretch of the cumulative distribution holds u in [0, 1), None within `margin` of its ends."""
    ends = list(accumulate(p))
    at = min(bisect_right(ends, u), len(ids) - 1)
    above = at == 0 or u - ends[at - 1] > margin
    below = at == len(ids) - 1 or ends[at] - u > margin
    return ids[at] if above and below else None


def _race(ids: list[int], p: list[float], noise: list[float], margin: float) -> int | None:
    """The token of the largest p / noise, None where another is as good but for `margin`."""
    if min(noise) <= 0:
        return None
    times = [share / wait for share, wait in zip(p, noise, strict=True)]
    best = max(times)
    near = [i for i, ratio in enumerate(times) if ratio > best * (1 - 2 * margin)]
    return ids[near[0]] if len(near) == 1 else None


def row_seeds(seed: int | Sequence[int] | None, prompts: int, returned: int) -> list[int] | None:
    """A seed for each of prompts * returned rows.

    An int s gives row i the seed s + i, so row i alone is `seed=s + i`. A list has one seed s a prompt, whose j-th
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
