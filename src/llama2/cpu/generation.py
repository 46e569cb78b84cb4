"""The native engine behind `generate()`: the runner and the cache that the generation loops expect.

Padding columns are neither computed nor cached; the cache remembers which columns they were.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama2.cpu.cache import PagedCache, Sequence
from llama2.cpu.runner import CpuRunner
from llama2.cpu.weights import CpuWeights
from llama2.errors import InputError


class NativeCache:
    """Rows of one `generate()` call: a sequence each, and per row which columns hold real tokens."""

    def __init__(self, pages: PagedCache, rows: int) -> None:
        self.pages = pages
        self.sequences: list[Sequence] = [pages.sequence() for _ in range(rows)]
        self.real = np.ones((rows, 0), bool)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held, padding included."""
        return int(self.real.shape[1])

    def crop(self, max_length: int) -> None:
        """Keeps the first `max_length` columns, or drops the last -max_length."""
        held = self.get_seq_length()
        keep = max_length if max_length >= 0 else max(held + max_length, 0)
        if keep >= held:
            return
        self.real = self.real[:, :keep]
        for sequence, count in zip(self.sequences, self.real.sum(1), strict=True):
            sequence.crop(int(count))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]; copies share their full pages."""
        order = [int(i) for i in beam_idx]
        old = self.sequences
        self.sequences = [old[i].fork() for i in order]
        self.real = self.real[order]
        for sequence in old:
            sequence.free()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        self.reorder_cache(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices`, in that order."""
        self.reorder_cache(indices)


class NativeRunner:
    """Steps a LlamaForCausalLM on the CPU with its own parameters, in place.

    Raises InputError where the model cannot run natively: another device or dtype, training mode, adapters attached.
    """

    def __init__(self, model: Any, precision: str = "fast", threads: int | None = None) -> None:
        if model.training:
            raise InputError("the native engine computes no gradients; call model.eval() first, or use runner='torch'")
        self.weights = CpuWeights.from_module(model, threads)
        self.runner = CpuRunner(self.weights, precision)  # type: ignore[arg-type]
        self._half = model.dtype == torch.bfloat16

    def new_cache(self, kind: str | None, rows: int, length: int) -> NativeCache:
        """As Runner.new_cache; pages grow as they are written, so every kind is the same."""
        if kind not in (None, "dynamic", "static"):
            raise InputError(f"cache_implementation is {kind!r}; the native engine takes None, 'dynamic' or 'static'")
        tokens = rows * (-(-length // 16) + 2) * 16  # a page more for the end, and one to copy a shared page to
        return NativeCache(PagedCache(self.weights, tokens, "bfloat16" if self._half else "float32"), rows)

    def step(self, tokens: Tensor, positions: Tensor, mask_BS: Tensor | None, cache: Any, keep: int = 1) -> Tensor:
        """As Runner.step: float32 logits (B, keep, V); zeros where a kept column is padding."""
        if tokens.is_floating_point():
            raise InputError("the native engine takes input_ids, not inputs_embeds; use runner='torch'")
        rows, new = tokens.shape
        if cache is None:
            cache = self.new_cache(None, rows, new)
        if not isinstance(cache, NativeCache) or len(cache.sequences) != rows:
            raise InputError(f"the native engine needs a cache of its own for {rows} rows, from new_cache()")
        fresh = np.ones((rows, new), bool) if mask_BS is None else mask_BS[:, -new:].bool().numpy()
        logits = self._packed(tokens.numpy(), positions.expand(rows, -1).numpy(), fresh, cache, keep)
        cache.real = np.concatenate((cache.real, fresh), axis=1)
        return torch.from_numpy(logits)

    def _packed(
        self, tokens: NDArray[Any], positions: NDArray[Any], real: NDArray[np.bool_], cache: NativeCache, keep: int
    ) -> NDArray[np.float32]:
        """Logits (B, keep, V) of the real tokens packed one row behind the other."""
        kept = np.zeros_like(real)
        kept[:, real.shape[1] - keep :] = True
        counts = [(s, int(n)) for s, n in zip(cache.sequences, real.sum(1), strict=True) if n]
        out = np.zeros((len(tokens), keep, self.weights.config.vocab_size), np.float32)
        if counts:
            wanted = np.flatnonzero(kept[real])
            logits = self.runner.step(tokens[real], positions[real], cache.pages.view(counts), wanted)
            out[real[:, real.shape[1] - keep :]] = logits
        return out
