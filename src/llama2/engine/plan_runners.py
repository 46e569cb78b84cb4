"""Runners of plans: the native engine over its own pages, or torch (`torch_plan_runner`). No torch here."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from llama2 import cpu
from llama2.engine.scheduler import Chunk
from llama2.errors import InputError
from llama2.lazy import door
from llama2.protocols import CausalLM

PAGE = cpu.PAGE

_of_torch_model = door("engine.torch_plan_runner", "runner_of", "The runner of a torch model.")


class PlanRunner(Protocol):
    """Runs the chunks of a plan over pages of PAGE positions."""

    pages: int
    bytes_per_page: int
    limit_openmp: AbstractContextManager[None]  # held by the thread that steps

    def step(self, chunks: Sequence[Chunk], adapters: Sequence[str | None]) -> list[np.ndarray]:
        """Keys and values of the chunks go into their pages; logits (wanted, V) of each chunk that wants any, in order,
        float32 or float64.

        adapters: for each chunk the adapter it runs with.
        """

    def close(self) -> None:
        """No step follows."""


class NativePlanRunner:
    """The native CPU engine: a whole plan in one call."""

    def __init__(self, weights: cpu.CpuWeights, pages: int, dtype: cpu.KvDtype, precision: str = "fast") -> None:
        self.weights, self.pages = weights, pages
        self._cache = cpu.PagedCache(weights, pages * PAGE, dtype)
        self._runner = cpu.CpuRunner(weights, precision)
        self.bytes_per_page = self._cache.nbytes // pages
        self.limit_openmp: AbstractContextManager[None] = (
            cpu.OneOpenMpThread()
        )  # the engine's own threads run beside torch's

    def step(self, chunks: Sequence[Chunk], adapters: Sequence[str | None]) -> list[np.ndarray]:
        """As PlanRunner.step."""
        counts = np.array([len(chunk.tokens) for chunk in chunks])
        starts = np.concatenate(([0], counts.cumsum())).astype(np.int32)
        past = np.array([chunk.start for chunk in chunks], np.int32)
        tables = np.zeros((len(chunks), max(len(c.sequence.pages) for c in chunks)), np.int32)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.sequence.pages)] = chunk.sequence.pages
        tokens = np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int32)
        positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(past - starts[:-1], counts)
        wanted = [range(end - c.wanted, end) for c, end in zip(chunks, starts[1:], strict=True) if c.wanted]
        rows = np.array([row for chunk_rows in wanted for row in chunk_rows], np.int32)
        view = cpu.CacheView(self._cache, starts, past, tables, starts[1:] - 1)
        logits = self._runner.step(tokens, positions, view, rows, adapters)
        ends = np.cumsum([len(chunk_rows) for chunk_rows in wanted])
        return np.split(logits, ends[:-1]) if wanted else []

    def close(self) -> None:
        """Nothing to do."""


def make_plan_runner(
    model: CausalLM, pages: int, runner: str = "auto", dtype: cpu.KvDtype | None = None, precision: str = "fast"
) -> PlanRunner:
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
        found: PlanRunner = model.plan_runner(pages)
        return found
    if isinstance(model, cpu.CpuModel) and runner != "torch":
        return NativePlanRunner(model.weights, pages, dtype or model.cache_dtype, precision)
    made: PlanRunner = _of_torch_model(model, pages, runner, dtype, precision)
    return made
