"""How one sequence of many picks its tokens: the processors, their order and the draws of generate(). No torch here.

Logits are numpy arrays, float32 or float64, and so are the ids (1, S) and scores (1, V) that processors are given.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llama2.generation.arrays import NUMPY
from llama2.generation.config import GenerationConfig
from llama2.generation.fast_sampling import Shortlist, split, whole_draw
from llama2.generation.filters import Prompt, build_processors
from llama2.generation.processors import LogitsProcessorList
from llama2.generation.seeded import SeededSampler, invalid_logits, likeliest


class SampledToken(NamedTuple):
    """A token; with logprobs asked for its log-probability and the likeliest (id, log-probability), best first.

    Log-probabilities are those of the model's own logits, before penalties, temperature and filters, unless `drawn`
    asks for those after them.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """Picks token after token of one sequence. The draws depend on `seed` alone, not on the rest of a batch."""

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Sequence[int],
        limit: int,
        seed: int | None = None,
        logprobs: int | None = None,
        own: Sequence[Any] = (),
        drawn: bool = False,
    ) -> None:
        """limit: tokens with the prompt at most. logprobs: how many likeliest tokens to tell, None for nothing. drawn:
        rate tokens by the distribution that they are drawn from."""
        ids = np.array([prompt], np.int64)
        self.seed = secrets.randbits(63) if seed is None else seed
        processors = build_processors(config, Prompt(ids), limit, own)
        self._sampler = SeededSampler(bool(config.value("do_sample")), [self.seed])
        self._before, self._filters, self._shortlist = split(processors, self._sampler)
        self._guesser: tuple[SeededSampler, Shortlist | None] | None = None
        self._ids, self.length, self._logprobs = ids, ids.shape[1], logprobs
        self._drawn = drawn and logprobs is not None
        if self._drawn:  # the filters' scores are wanted, which the shortlist does without
            self._before, self._filters, self._shortlist = processors, LogitsProcessorList(), None
        self._whole = whole_draw(processors, self._sampler)
        if self._before:
            self._ids = np.concatenate((ids, np.zeros((1, limit - self.length), np.int64)), 1)

    def __call__(self, logits_V: np.ndarray) -> SampledToken:
        """The next token. Raises InputError where there is none to pick."""
        drawn = None if self._whole is None else self._whole(logits_V)
        token, scores_V = (drawn[0], None) if drawn is not None else self._pick(logits_V[None])
        if self._before:
            self._ids[0, self.length] = token
        self.length += 1
        if self._logprobs is None:
            return SampledToken(token)
        if drawn is not None and self._drawn and not self._logprobs:
            return SampledToken(*drawn)
        if not self._drawn:
            return self.rate(token, logits_V)
        if scores_V is None:
            scores_V = self._before(self._ids, logits_V[None])[0]
        return self.rate(token, scores_V)

    def _pick(self, raw_BV: np.ndarray) -> tuple[int, np.ndarray]:
        """A token, and the scores (V,) as far as they were made for it."""
        ids_BS = self._ids[:, : self.length]
        scores_BV = self._before(ids_BS, raw_BV)
        shortlisted = None if self._shortlist is None else self._shortlist(scores_BV)
        if shortlisted is not None:
            return shortlisted[0], scores_BV[0]
        scores_BV = self._filters(ids_BS, scores_BV)
        token_B, peak_B = self._sampler(scores_BV)
        if not math.isfinite(peak_B[0]):
            raise invalid_logits(raw_BV, scores_BV, [0], self.length)
        return int(token_B[0]), scores_BV[0]

    def guess(self, logits_V: np.ndarray, ahead: int) -> int:
        """Samples from a draft model's logits with the draw of the token `ahead` places after the next; takes no draw.

        Penalties and other processors, which may count what they see, are left to the check of the guess.
        """
        scores_BV = logits_V[None]
        if not self._sampler.do_sample:
            return int(likeliest(scores_BV)[0][0])
        if self._guesser is None:
            sampler = SeededSampler(True, [self.seed])
            self._guesser = sampler, split(self._filters, sampler)[2]
        sampler, shortlist = self._guesser
        sampler.put_back(self._sampler.peek(ahead))
        shortlisted = None if shortlist is None else shortlist(scores_BV)
        return shortlisted[0] if shortlisted is not None else int(sampler(self._filters(self._ids, scores_BV))[0][0])

    def rate(self, token: int, logits_V: np.ndarray) -> SampledToken:
        """A token with its log-probability in the model's own logits and as many of the likeliest as were asked for."""
        with np.errstate(all="ignore"):
            shifted_V = logits_V - logits_V.max()
            total = np.log(np.exp(shifted_V).sum())
            best = _likeliest_ids(logits_V, self._logprobs or 0)
            top = tuple(zip(best.tolist(), (shifted_V[best] - total).tolist(), strict=True))
            return SampledToken(token, float(shifted_V[token] - total), top)


def _likeliest_ids(logits_V: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` largest, falling; equal ones in their order."""
    size = len(logits_V)
    if not count:
        return np.zeros(0, np.int64)
    ids = np.arange(size)
    if count < size:
        ids = np.flatnonzero(logits_V >= NUMPY.kth(logits_V[None], count)[0])
    return ids[np.argsort(-logits_V[ids], kind="stable")][:count]
