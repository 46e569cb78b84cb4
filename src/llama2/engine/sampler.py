"""How one sequence of many picks its tokens: the processors, their order and the draws of generate()."""

import math
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama2.generation.config import GenerationConfig
from llama2.generation.fast_sampling import Shortlist, split
from llama2.generation.sampler import Prompt, Sampler, build_processors, likeliest
from llama2.rope import promoted
from llama2.runners.contract import invalid_logits


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
        sample = bool(config.value("do_sample"))
        self.seed = secrets.randbits(63) if seed is None else seed
        processors = build_processors(config, Prompt(ids), limit, own)
        self._sampler = Sampler(sample, None, [self.seed] if sample else None)
        self._before, self._filters, self._shortlist = split(processors, self._sampler)
        self._guesser: tuple[Sampler, Shortlist | None] | None = None
        self._ids, self.length, self._logprobs = ids, ids.shape[1], logprobs
        if self._before:
            self._ids = torch.cat((ids, torch.zeros((1, limit - self.length), dtype=torch.long)), 1)

    def __call__(self, logits_V: Tensor) -> Picked:
        """The next token. Raises InputError where there is none to pick."""
        raw_BV = self._promoted(logits_V)[None]
        token = self._pick(raw_BV)
        if self._before:
            self._ids[0, self.length] = token
        self.length += 1
        if self._logprobs is None:
            return Picked(token)
        return self.rate(token, raw_BV[0].log_softmax(-1))

    def _pick(self, raw_BV: Tensor) -> int:
        ids_BS = self._ids[:, : self.length]
        scores_BV = self._before(ids_BS, raw_BV)
        found = None if self._shortlist is None else self._shortlist(scores_BV)
        if found is not None:
            return found[0]
        scores_BV = self._filters(ids_BS, scores_BV)
        token_B, peak_B = self._sampler(scores_BV)
        if not math.isfinite(float(peak_B)):
            raise invalid_logits(raw_BV, scores_BV, torch.ones(1, dtype=torch.bool), self.length)
        return int(token_B)

    def guess(self, logits_V: Tensor, ahead: int) -> int:
        """What a smaller model's logits give with the draw of the token `ahead` places behind the next; takes no draw.

        Penalties and other processors, which may count what they see, are left to the check of the guess.
        """
        scores_BV = self._promoted(logits_V)[None]
        if not self._sampler.do_sample:
            return int(likeliest(scores_BV)[0])
        if self._guesser is None:
            sampler = Sampler(True, None, [self.seed])
            self._guesser = sampler, split(self._filters, sampler)[2]
        sampler, shortlist = self._guesser
        sampler.put_back(self._sampler.peek(ahead))
        found = None if shortlist is None else shortlist(scores_BV)
        return found[0] if found is not None else int(sampler(self._filters(self._ids, scores_BV))[0])

    def log_probabilities(self, logits_TV: Tensor) -> Tensor:
        """Those of the model's own logits."""
        return self._promoted(logits_TV).log_softmax(-1)

    def rate(self, token: int, log_V: Tensor) -> Picked:
        """A token with its log-probability and as many of the likeliest as were asked for."""
        best = log_V.topk(self._logprobs) if self._logprobs else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Picked(token, float(log_V[token]), top)

    @staticmethod
    def _promoted(logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float32 else logits.to(promoted(logits.dtype))
