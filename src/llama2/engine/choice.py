"""How one sequence of many picks its tokens: the processors, their order and the draws of generate()."""

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.generation_config import GenerationConfig
from llama2.rope import promoted
from llama2.runner import invalid_logits
from llama2.sampling import Prompt, Sampler, build_processors


class Picked(NamedTuple):
    """A token; with logprobs asked for its log-probability and the likeliest (id, log-probability), best first.

    Log-probabilities are those of the model's own logits, before penalties, temperature and filters.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Choice:
    """Picks token after token of one sequence. The draws depend on `seed` alone, not on the rest of a batch."""

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Sequence[int],
        limit: int,
        seed: int | None = None,
        logprobs: int | None = None,
        own: Sequence[Any] = (),
    ) -> None:
        """limit: tokens with the prompt at most. logprobs: how many likeliest tokens to tell, None for nothing."""
        ids = torch.tensor([list(prompt)])
        self._sample = bool(config.value("do_sample"))
        self.seed = secrets.randbits(63) if seed is None else seed
        self._processors = build_processors(config, Prompt(ids), limit, own)
        self._sampler = Sampler(self._sample, None, [self.seed] if self._sample else None)
        self._ids, self.length, self._logprobs = ids, ids.shape[1], logprobs
        if self._processors:
            self._ids = torch.cat((ids, torch.zeros((1, limit - self.length), dtype=torch.long)), 1)

    def __call__(self, logits_V: Tensor) -> Picked:
        """The next token. Raises InputError where there is none to pick."""
        raw_V = logits_V.to(promoted(logits_V.dtype))
        if not self._processors and not self._sample:
            token = int(raw_V.argmax())
            if not bool(raw_V[token].isfinite()):
                raise self._invalid(raw_V[None], raw_V[None])
        else:
            scores_BV = self._processors(self._ids[:, : self.length], raw_V[None])
            token_B, peak_B = self._sampler(scores_BV)
            if not bool(peak_B.isfinite()):
                raise self._invalid(raw_V[None], scores_BV)
            token = int(token_B)
        if self._processors:
            self._ids[0, self.length] = token
        self.length += 1
        if self._logprobs is None:
            return Picked(token)
        return self.rate(token, raw_V.log_softmax(-1))

    def log_probabilities(self, logits_TV: Tensor) -> Tensor:
        """Those of the model's own logits."""
        return logits_TV.to(promoted(logits_TV.dtype)).log_softmax(-1)

    def rate(self, token: int, log_V: Tensor) -> Picked:
        """A token with its log-probability and as many of the likeliest as were asked for."""
        best = log_V.topk(self._logprobs) if self._logprobs else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Picked(token, float(log_V[token]), top)

    def _invalid(self, raw_BV: Tensor, scores_BV: Tensor) -> InputError:
        return invalid_logits(raw_BV, scores_BV, torch.ones(1, dtype=torch.bool), self.length)
