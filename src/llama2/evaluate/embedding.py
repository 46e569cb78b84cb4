"""Vectors of texts: the hidden states behind the last norm, their mean or that of the last token.

On the native engine they come out of a head whose first rows are the identity (`CpuWeights.states`), so that packed
weights stay packed. No torch here.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama2 import cpu
from llama2.errors import InputError
from llama2.lazy import door

Pooling = Literal["mean", "last"]
_native_weights = door("runners.native", "native_weights", "The engine's weights of a module, or None.")
_why_not = door("runners.native", "why_not", "Why torch has to run a module.")
_kept_in = door("runners.native", "kept_in", "What the engine keeps keys and values of a module in.")
_torch_states = door("engine.torch_plan_runner", "final_states", "The final hidden states of texts of one length.")
AT_ONCE = 256  # tokens of one step, each with a row as long as the vocabulary


class Embedder:
    """A model that gives vectors."""

    def __init__(self, model: Any, runner: str = "auto", precision: str = "exact", cache_dtype: Any = None) -> None:
        """Raises InputError for a runner that cannot have the model."""
        cpu.check_precision(precision)
        self.config, self._model = model.config, model
        self._weights = model.weights if isinstance(model, cpu.CpuModel) else None
        if runner == "torch" and self._weights is not None:
            raise InputError("this model runs on the native engine alone; leave out --runner torch")
        if getattr(model, "adapter", None) is not None:
            raise InputError("vectors are made without adapters; put it into the weights with `llama2 merge-adapter`")
        if runner != "torch" and self._weights is None:
            found = _native_weights(model)
            self._weights = None if found is None or found.own is not None else found
            if self._weights is None and runner == "native":
                raise InputError(f"the native engine cannot embed with this model: {_why_not(model)}")
        if self._weights is None:
            return
        width, size = self.config.hidden_size, self.config.vocab_size
        if width > size:
            raise InputError(f"hidden states of {width} do not fit a head of {size} entries; give --runner torch")
        own = model.cache_dtype if isinstance(model, cpu.CpuModel) else _kept_in(model)
        self._runner, self._cache_dtype = (
            cpu.CpuRunner(self._weights.states(precision == "fast"), precision),
            cache_dtype or own,
        )

    def hidden(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Hidden states float32 (n, D) of the tokens, behind the last norm, in pieces."""
        if self._weights is None:
            yield _torch_states(self._model, [ids])[0]
            return
        sequence = cpu.PagedCache(self._weights, len(ids) + cpu.PAGE, self._cache_dtype).sequence()
        for start in range(0, len(ids), AT_ONCE):
            part = np.asarray(ids[start : start + AT_ONCE], np.int32)
            view = sequence.cache.view([(sequence, len(part))])
            found = self._runner.step(part, np.arange(start, start + len(part)), view, np.arange(len(part)))
            yield found[:, : self.config.hidden_size].copy()

    def vector(self, ids: Sequence[int], pooling: Pooling = "mean", normalise: bool = False) -> NDArray[np.float32]:
        """The vector (D,) of a text's ids. normalise: of length 1. Raises InputError for no ids, or too many."""
        if not ids:
            raise InputError("a text without tokens has no vector; give at least one token")
        if len(ids) > self.config.max_position_embeddings:
            raise InputError(
                f"a text has {len(ids)} tokens and the context holds {self.config.max_position_embeddings}; shorten it"
            )
        total = np.zeros(self.config.hidden_size, np.float64)
        last = total
        for states in self.hidden(ids):
            total += states.sum(0, dtype=np.float64)
            last = states[-1].astype(np.float64)
        found = total / len(ids) if pooling == "mean" else last
        if normalise:
            found = found / max(float(np.linalg.norm(found)), 1e-12)
        return found.astype(np.float32)
