"""A model as a measurement sees it: logits of tokens over a cache. Arrays of ids go in; logits come out as an array,
or as a tensor of torch where that computes them. No torch here.

NativeMeasured       a model that the native engine alone holds (`cpu.CpuModel`)
torch_steps       a module of torch, through generate()'s runner that fits
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama2 import cpu
from llama2.errors import InputError
from llama2.lazy import door

AT_ONCE = 512  # tokens of one step: the logits of 4,096 would take 0.8 GB with 49,152 entries
Ids = NDArray[np.int64]

_of_torch = door("evaluate.torch_steps", "torch_steps", "The steps of a module of torch.")


class MeasuredModel(Protocol):
    """Runs a network for a measurement."""

    weights: cpu.CpuWeights | None  # of the native engine; None where torch computes

    @property
    def engine(self) -> str:
        """The engine that computes, in a few words."""

    @property
    def cache_dtype(self) -> str:
        """Number format of keys and values."""

    @property
    def weights_dtype(self) -> str:
        """Number format of weights that are not packed."""

    @property
    def threads(self) -> int:
        """Threads that compute."""

    def new_cache(self, rows: int, length: int) -> Any:
        """An empty cache for `rows` rows of at most `length` positions."""

    def step(self, ids: Ids, positions: Ids, cache: Any, keep: int = 1) -> Any:
        """Logits (B, keep, V) of the last `keep` of new tokens (B, T), which the cache then has; None: without one."""

    def wait(self) -> None:
        """Until everything asked for is computed."""

    def scope(self) -> AbstractContextManager[Any]:
        """Within it nothing is kept for gradients."""


class ArrayCache:
    """The rows of one batch in the engine's pages."""

    def __init__(self, weights: cpu.CpuWeights, rows: int, length: int, dtype: cpu.KvDtype) -> None:
        # A page more for the end of each row.
        pages = cpu.PagedCache(weights, rows * (-(-length // cpu.PAGE) + 1) * cpu.PAGE, dtype)
        self.pages, self.sequences = pages, [pages.sequence() for _ in range(rows)]

    def crop(self, max_length: int) -> None:
        """Keeps the first positions of every row."""
        for sequence in self.sequences:
            sequence.crop(min(max_length, sequence.length))


class NativeMeasured:
    """See `MeasuredModel`."""

    def __init__(self, model: cpu.CpuModel, cache_dtype: cpu.KvDtype | None, precision: str) -> None:
        self.weights: cpu.CpuWeights | None = model.weights
        self._runner, self._model = cpu.CpuRunner(model.weights, precision), model
        self._dtype: cpu.KvDtype = cache_dtype or model.cache_dtype

    @property
    def engine(self) -> str:
        """As MeasuredModel.engine."""
        return f"CPU {self._runner.isa}"

    @property
    def cache_dtype(self) -> str:
        """As MeasuredModel.cache_dtype."""
        return self._dtype

    @property
    def weights_dtype(self) -> str:
        """As MeasuredModel.weights_dtype."""
        return "float32" if self._model.cache_dtype == "float32" else self._model.config.dtype_name or "bfloat16"

    @property
    def threads(self) -> int:
        """As MeasuredModel.threads."""
        return int(self._model.weights.pool.size)

    def new_cache(self, rows: int, length: int) -> ArrayCache:
        """As MeasuredModel.new_cache."""
        return ArrayCache(self._model.weights, rows, length, self._dtype)

    def step(self, ids: Ids, positions: Ids, cache: Any, keep: int = 1) -> NDArray[np.float32]:
        """As MeasuredModel.step."""
        rows, new = ids.shape
        own_cache = self.new_cache(rows, new) if cache is None else cache
        view, kept = own_cache.pages.view([(sequence, new) for sequence in own_cache.sequences]), min(keep, new)
        logit_rows = None if kept == 1 else np.arange(rows * new).reshape(rows, new)[:, new - kept :].ravel()
        chosen = None if self._model.adapter is None else [self._model.adapter] * rows
        places = np.broadcast_to(positions, ids.shape)
        logits = self._runner.step(ids.ravel(), places.ravel(), view, logit_rows, chosen)
        return logits.reshape(rows, kept, -1)

    def wait(self) -> None:
        """As MeasuredModel.wait: a step is computed when it returns."""

    def scope(self) -> AbstractContextManager[Any]:
        """As MeasuredModel.scope."""
        return nullcontext()


def make_steps(
    model: Any, runner: Any = "auto", cache_dtype: cpu.KvDtype | None = None, precision: str = "fast"
) -> MeasuredModel:
    """The runner of `model` for a measurement; arguments and errors as of `runners.padded.make_runner`."""
    measured: MeasuredModel
    if hasattr(runner, "scope"):  # made before
        measured = runner
        return measured
    if type(model) is not cpu.CpuModel:
        measured = _of_torch(model, runner, cache_dtype, precision)
        return measured
    cpu.check_precision(precision)
    if runner not in ("auto", "native"):
        raise InputError(f"the native engine alone holds this model, so runner={runner!r} cannot run it")
    return NativeMeasured(model, cache_dtype, precision)


def scored_logits(steps: MeasuredModel, ids: Ids, scored: int) -> Iterator[Any]:
    """Logits (n, V) that predict the last `scored` of the ids (T,), in order, in pieces of AT_ONCE rows at most."""
    length = len(ids)
    places = np.arange(length)[None]
    if length <= AT_ONCE:
        yield steps.step(ids[None], places, None, keep=scored + 1)[0, :-1]
        return
    cache = steps.new_cache(1, length)
    first = length - scored - 1  # whose logits predict the first one
    for start in range(0, length, AT_ONCE):
        end = min(start + AT_ONCE, length)
        keep = max(end - max(start, first), 1)
        logits = steps.step(ids[None, start:end], places[:, start:end], cache, keep=keep)[0]
        if end > first:
            yield logits[:-1] if end == length else logits
