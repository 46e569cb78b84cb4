"""Answers of the model that is being trained, many at once: what rejection sampling, PPO and its relatives sample with.

On a CPU the native engine reads the trained weights where they are, and an active adapter beside them: nothing is
merged or copied. Elsewhere torch runs the module. Answers to one prompt share its pages of the cache, so a prompt is
computed once. A draw is a function of weights, prompt and seed alone, in whatever company it is sampled.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llama2.engine.engine import Engine
from llama2.engine.request import Completion, EngineRequest
from llama2.engine.stream import Stream
from llama2.errors import InputError
from llama2.generation.config import GenerationConfig
from llama2.train.distributed import Ranks

WIDTH = 128  # answers of one step at most
CACHE_BYTES = 1 << 30  # of keys and values that answers may take, unless a few answers need more
_LEAST = 8  # answers of one step at least


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How answers are drawn. Penalties and the rest of a model's own generation settings are left out, since training
    needs the probabilities of what was drawn. Raises InputError for a value beyond its bound."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"temperature is {self.temperature}; answers are sampled, so it must be above 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be at least 0, which keeps all tokens")
        if self.max_new_tokens < 1:
            raise InputError(f"the longest answer is {self.max_new_tokens} tokens; it must be at least 1")

    @property
    def whole(self) -> bool:
        """Whether every token can be drawn."""
        return self.top_p == 1 and self.top_k == 0 and not self.min_p


@dataclass
class Rollout:
    """One answer. ended: by an end token, which is its last; logs: of each token's probability when it was drawn.
    score: its reward, NaN for none; parts: the rewards that it was made of."""

    row: int
    k: int
    seed: int
    prompt_ids: list[int]
    ids: list[int]
    text: str
    ended: bool
    logs: list[float] = field(default_factory=list)
    score: float = float("nan")
    parts: dict[str, float] = field(default_factory=dict)


def seed_of(*parts: object) -> int:
    """The seed of one answer, from the run's seed, the iteration, the prompt and its number."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest())


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer. Raises InputError where there are none."""
    held = [getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
    held += [getattr(model.config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    found = [
        one for value in held if value is not None for one in (value if isinstance(value, list | tuple) else [value])
    ]
    if not found:
        raise InputError(
            "neither the model nor the tokenizer has an end token (eos_token_id), so no answer ends; set it"
        )
    return sorted({int(token) for token in found})


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode: no dropout, and the native engine takes it."""
    before = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in before:
            module.training = True


class RolloutSampler:
    """Samples from `model` as it is at each call, a share of the prompts on each rank."""

    def __init__(
        self, model: Any, tokenizer: Any, sampling: RolloutSettings, ranks: Ranks, runner: str = "auto"
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.ranks = model, tokenizer, sampling, ranks
        self.runner = runner
        self.reused = 0  # positions of the last call that were found in the cache
        eos = end_tokens(model, tokenizer)
        self.config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=eos if len(eos) > 1 else eos[0],
        )

    def __call__(
        self, prompts: Sequence[tuple[int, Sequence[int]]], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        """For each prompt (its row, its ids) one answer for each of its seeds, in order."""
        pairs = list(zip(prompts, seeds, strict=True))
        return self.ranks.joined(lambda: self._sampled(self.ranks.share(pairs)))

    def _sampled(self, pairs: Sequence[tuple[tuple[int, Sequence[int]], Sequence[int]]]) -> list[list[Rollout]]:
        if not pairs:
            return []
        asks = [(row, k, self._ask(ids, seed)) for (row, ids), seeds in pairs for k, seed in enumerate(seeds)]
        longest = max(len(ask.prompt) for _, _, ask in asks) + self.sampling.max_new_tokens
        width = min(len(asks), WIDTH, max(CACHE_BYTES // (longest * self._bytes_per_token()), _LEAST))
        with resting(self.model), torch.no_grad():
            engine = Engine(
                self.model,
                self.tokenizer,
                cache_tokens=(width + 1) * -(-longest // 64) * 64,
                budget=max(512, width),
                width=width,
                waiting=len(asks),
                runner=self.runner,
            )
            with engine:
                found = [_told(row, k, ask, stream) for row, k, ask, stream in self._streams(engine, asks)]
            self.reused = engine.tokens_reused
        rest = iter(found)
        return [[next(rest) for _ in seeds] for _, seeds in pairs]

    def _bytes_per_token(self) -> int:
        """Of keys and values."""
        config, size = self.model.config, next(self.model.parameters()).itemsize
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * min(size, 4))

    @staticmethod
    def _streams(
        engine: Engine, asks: Sequence[tuple[int, int, EngineRequest]]
    ) -> list[tuple[int, int, EngineRequest, Stream]]:
        return [(row, k, ask, Stream(engine, ask)) for row, k, ask in asks]

    def _ask(self, ids: Sequence[int], seed: int) -> EngineRequest:
        return EngineRequest(list(ids), self.config, seed, logprobs=0, drawn=True)


def _told(row: int, k: int, ask: EngineRequest, stream: Stream) -> Rollout:
    done = Completion()
    for event in stream:
        done.add(event)
    assert ask.seed is not None
    return Rollout(row, k, ask.seed, list(ask.prompt), done.tokens, done.text, done.finish == "eos", done.logprobs)
