"""Runs the scheduler's plans: packs their chunks for a runner of any kind (`runners.contract`). No torch here."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import numpy as np

from llama2 import cpu
from llama2.engine.scheduler import Chunk
from llama2.errors import InputError
from llama2.lazy import door
from llama2.protocols import CausalLM
from llama2.runners.contract import Runner

PAGE = cpu.PAGE
Pages = TypeVar("Pages")

_of_torch_model = door("engine.torch_plan_runner", "runner_of", "The runner of a torch model.")


class PlanRunner(Generic[Pages]):
    """Runs the chunks of a plan over `pages` pages of PAGE positions, kept in `cache`.

    weights: the native engine's, None where torch computes. limit_openmp: held by the thread that steps.
    """

    def __init__(
        self, runner: Runner[Pages], cache: Pages, pages: int, nbytes: int, weights: cpu.CpuWeights | None = None
    ) -> None:
        """nbytes: of all pages."""
        self.pages, self.bytes_per_page, self.weights = pages, nbytes // pages, weights
        self._runner, self.cache = runner, cache
        # The native engine's own threads run beside torch's.
        self.limit_openmp: AbstractContextManager[None] = nullcontext() if weights is None else cpu.OneOpenMpThread()

    def step(self, chunks: Sequence[Chunk], adapters: Sequence[str | None]) -> list[np.ndarray]:
        """Keys and values of the chunks go into their pages; logits (wanted, V) of each chunk that wants any, in order,
        float32 or float64.

        adapters: for each chunk the adapter it runs with.
        """
        counts = np.array([len(chunk.tokens) for chunk in chunks])
        starts = np.concatenate(([0], counts.cumsum())).astype(np.int32)
        past = np.array([chunk.start for chunk in chunks], np.int32)
        tables = np.zeros((len(chunks), max(len(c.sequence.pages) for c in chunks)), np.int32)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.sequence.pages)] = chunk.sequence.pages
        tokens = np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int32)
        positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(past - starts[:-1], counts)
        row_ranges = [range(end - c.wanted, end) for c, end in zip(chunks, starts[1:], strict=True) if c.wanted]
        rows = np.array([row for chunk_rows in row_ranges for row in chunk_rows], np.int32)
        view = cpu.CacheView(self.cache, starts, past, tables, starts[1:] - 1)
        logits = self._runner.step(tokens, positions, view, rows, adapters)
        ends = np.cumsum([len(chunk_rows) for chunk_rows in row_ranges])
        return np.split(logits, ends[:-1]) if row_ranges else []

    @property
    def failed(self) -> Exception | None:
        """The error that ended it for good, None while it runs."""
        return None

    def close(self) -> None:
        """No step follows."""


def native_plan_runner(
    weights: cpu.CpuWeights, pages: int, dtype: cpu.KvDtype, precision: str
) -> PlanRunner[cpu.PagedCache]:
    """Runs plans on the native CPU engine: a whole plan in one call."""
    cache = cpu.PagedCache(weights, pages * PAGE, dtype)
    return PlanRunner(cpu.CpuRunner(weights, precision), cache, pages, cache.nbytes, weights)


def make_plan_runner(
    model: CausalLM, pages: int, runner: str = "auto", dtype: cpu.KvDtype | None = None, precision: str = "fast"
) -> PlanRunner[Any]:
    """The runner of `model`: "native", "torch", or with "auto" the native engine where it can.

    dtype: what the native engine keeps keys and values in. precision: see `cpu.CpuRunner`. Raises InputError where
    "native" cannot be had.
    """
    cpu.check_precision(precision)
    if runner not in ("auto", "native", "torch"):
        raise InputError(f"runner is {runner!r}; it must be 'auto', 'native' or 'torch'")
    if hasattr(model, "plan_runner"):  # a model over several processes brings its own
        if runner == "native":
            raise InputError("the native engine runs whole models in one process; use runner='torch'")
        parallel: PlanRunner[Any] = model.plan_runner(pages)
        return parallel
    if isinstance(model, cpu.CpuModel) and runner != "torch":
        return native_plan_runner(model.weights, pages, dtype or model.cache_dtype, precision)
    of_torch: PlanRunner[Any] = _of_torch_model(model, pages, runner, dtype, precision)
    return of_torch
