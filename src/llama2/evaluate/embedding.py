"""Vectors of texts: the hidden states behind the last norm, their mean or that of the last token.

On the native engine they come out of the head: a head whose first rows are the identity gives the hidden state itself,
so that packed weights stay packed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llama2.errors import InputError
from llama2.runners.contract import Runner, make_runner
from llama2.runners.native import NativeModel, why_not

Pooling = Literal["mean", "last"]
AT_ONCE = 256  # tokens of one step, each with a row as long as the vocabulary


class Embedder:
    """A model that gives vectors."""

    def __init__(self, model: Any, runner: str = "auto", precision: str = "exact", cache_dtype: Any = None) -> None:
        """Takes the model's head away where the native engine computes. Raises InputError where that cannot have it."""
        self.config, self._model = model.config, model
        self._runner: Runner | None = None
        reason = "it holds no torch module" if isinstance(model, NativeModel) else why_not(model)
        if runner == "torch" or (reason and runner == "auto"):
            if isinstance(model, NativeModel):
                raise InputError("this model runs on the native engine alone; leave out --runner torch")
            return
        if reason:
            raise InputError(f"the native engine cannot embed with this model: {reason}")
        size, width = self.config.vocab_size, self.config.hidden_size
        if width > size:
            raise InputError(f"hidden states of {width} do not fit a head of {size} entries; give --runner torch")
        head = nn.Linear(width, size, bias=False, dtype=torch.float32)
        with torch.no_grad():
            head.weight.zero_()
            head.weight[:width].copy_(torch.eye(width))
        model.lm_head = head
        self._runner = make_runner("native", model, cache_dtype=cache_dtype, precision=precision)

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Hidden states float32 (n, D) of the tokens, behind the last norm, in pieces."""
        tokens = torch.tensor([list(ids)], device=self._model.device)
        if self._runner is None:
            yield self._model.model(tokens).last_hidden_state[0].float().cpu().numpy()
            return
        places = torch.arange(len(ids))[None]
        cache = self._runner.new_cache(None, 1, len(ids))
        for start in range(0, len(ids), AT_ONCE):
            part = tokens[:, start : start + AT_ONCE]
            stretch = places[:, start : start + AT_ONCE]
            logits = self._runner.step(part, stretch, None, cache, keep=part.shape[1])
            yield logits[0, :, : self.config.hidden_size].numpy().copy()

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
