"""The tokens of one text after another, with a cache that stays between them: what a session at a terminal draws from.

EngineSteps     a model that the native engine holds (`cpu.CpuModel`); no torch is imported
TorchSteps      a model of torch, through generate()'s loop on the runner that fits
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama2.cpu import PAGE, CpuModel, CpuRunner, KvDtype, PagedCache
from llama2.engine.sampler import TokenSampler
from llama2.engine.stop_text import StopText
from llama2.errors import InputError
from llama2.generation.call_settings import settings
from llama2.generation.config import GenerationConfig
from llama2.lazy import door
from llama2.protocols import TextTokenizer

_stream = door("generation.loop", "stream", "TokenSource of generate().")
_make_runner = door("runners.padded", "make_runner", "What runs a model.")


@dataclass(frozen=True)
class Continuation:
    """A prompt and how to continue it by at most `new` tokens."""

    ids: list[int]
    config: GenerationConfig
    tokenizer: TextTokenizer
    new: int
    seed: int | None
    processors: Sequence[Any] = ()


class TokenSource(Protocol):
    """Source of a session's tokens."""

    @property
    def engine(self) -> str:
        """Name of the implementation that runs the network."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    def crop(self, length: int) -> None:
        """Keeps the first tokens of the cache."""

    def forget(self, room: int) -> None:
        """An empty cache with room for so many tokens."""

    def tokens(self, continuation: Continuation) -> Iterator[int]:
        """Generates new tokens after the prompt, the first `length` tokens of which are in the cache."""


class EngineSteps:
    """On the native engine, one call per token."""

    def __init__(self, model: CpuModel, cache_dtype: KvDtype | None, precision: str) -> None:
        self._model, self._dtype = model, cache_dtype or model.cache_dtype
        self._runner = CpuRunner(model.weights, precision)

    @property
    def engine(self) -> str:
        """As TokenSource.engine."""
        return f"native engine ({self._runner.isa}, {self._model.weights.nbytes / 1e6:,.0f} MB of weights)"

    @property
    def length(self) -> int:
        """As TokenSource.length."""
        return self._sequence.length

    def crop(self, length: int) -> None:
        """As TokenSource.crop."""
        self._sequence.crop(min(length, self._sequence.length))

    def forget(self, room: int) -> None:
        """As TokenSource.forget."""
        # A page more for the end, and one to copy to; pages cost memory only once they are written.
        self._sequence = PagedCache(self._model.weights, (-(-room // PAGE) + 2) * PAGE, self._dtype).sequence()

    def tokens(self, continuation: Continuation) -> Iterator[int]:
        """As TokenSource.tokens."""
        ids, new = continuation.ids, continuation.new
        model: Any = self._model
        whole = settings(model, continuation.config, {"max_new_tokens": new})
        sampler = TokenSampler(whole, ids, len(ids) + new, continuation.seed, own=continuation.processors)
        stops, ends = tuple(whole.stop_strings or ()), frozenset(whole.eos_token_ids)
        text = StopText(continuation.tokenizer.stream_decoder(skip_special_tokens=True), stops) if stops else None
        pending = ids[self.length :]
        for _ in range(new):
            token = sampler(self._runner.feed(self._sequence, pending, self._model.adapter)).token
            if text is not None:
                text.put(token)
            yield token
            if token in ends or (text is not None and text.stopped):
                return
            pending = [token]


class TorchSteps:
    """On a module of torch: `runner` is "auto", "native" (the engine over the module's weights) or "torch"."""

    def __init__(self, model: Any, runner: str, cache_dtype: KvDtype | None, precision: str) -> None:
        self._model = model
        self._runner = _make_runner(runner, model, cache_dtype=cache_dtype, precision=precision)

    @property
    def engine(self) -> str:
        """As TokenSource.engine."""
        if (isa := getattr(self._runner, "isa", None)) is not None:
            return f"native engine ({isa}, {self._runner.weights.nbytes / 1e6:,.0f} MB of weights)"
        return f"torch ({str(self._model.dtype).removeprefix('torch.')} on {self._model.device})"

    @property
    def length(self) -> int:
        """As TokenSource.length."""
        return int(self._cache.get_seq_length())

    def crop(self, length: int) -> None:
        """As TokenSource.crop."""
        self._cache.crop(length)

    def forget(self, room: int) -> None:
        """As TokenSource.forget."""
        self._cache = self._runner.new_cache(None, 1, room)

    def tokens(self, continuation: Continuation) -> Iterator[int]:
        """As TokenSource.tokens."""
        import torch

        ids, seed = continuation.ids, continuation.seed
        extra: dict[str, Any] = {"tokenizer": continuation.tokenizer} if continuation.config.stop_strings else {}
        if continuation.processors:
            extra["logits_processor"] = list(continuation.processors)
        device = self._model.device
        for step in _stream(
            self._model,
            torch.tensor([ids], device=device),
            continuation.config,
            max_new_tokens=continuation.new,
            past_key_values=self._cache,
            runner=self._runner,
            # torch's own state starts the same in every process, so without a seed every run would say the same.
            seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=device),
            **extra,
        ):
            yield int(step.tokens[0])


def make_steps(model: Any, runner: str, cache_dtype: KvDtype | None, precision: str) -> TokenSource:
    """Returns the token source of a model. Raises InputError for a runner that cannot run it."""
    if isinstance(model, CpuModel):
        if runner == "torch":
            raise InputError("the native engine alone holds this model; leave --runner out, or give --runner native")
        return EngineSteps(model, cache_dtype, precision)
    return TorchSteps(model, runner, cache_dtype, precision)
