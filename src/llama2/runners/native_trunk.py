"""The decoder of a classifier on the native CPU engine: scores of texts, each at its last token."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from llama2 import cpu
from llama2.classifiers import LlamaForSequenceClassification
from llama2.errors import InputError, Llama2Error
from llama2.plain_network import difference
from llama2.runners.native import stamp_of, unsuited


class NativeTrunk:
    """A classifier's decoder on the engine's threads.

    The engine's head has a row per token of the vocabulary. Here its first rows are the classifier's and the others 0;
    it runs at last tokens alone, so that costs one product per text. The weights of the decoder are used in place.
    """

    def __init__(self, model: LlamaForSequenceClassification, precision: str) -> None:
        """Raises what `CpuWeights.from_module` does for layers without a kernel."""
        config = model.config
        self._head = nn.Linear(1, 1, bias=False)
        shape, dtype = (config.vocab_size, config.hidden_size), model.dtype
        self._head.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        self.weights = cpu.CpuWeights.from_module(SimpleNamespace(config=config, model=model.model, lm_head=self._head))
        self._engine = cpu.CpuRunner(self.weights, precision)

    def scores(self, rows: Sequence[Sequence[int]], score_LD: torch.Tensor) -> np.ndarray:
        """Scores float32 (rows, labels) at the last token of each row of ids, by the classifier's weight as it is now.

        What a row shares with the one before it in alphabetical order (the prompt of several answers) is computed once.
        """
        labels = len(score_LD)
        self._head.weight.data[:labels] = score_LD
        self.weights.refresh()
        longest = max(map(len, rows))
        sequence = cpu.CachedSequence(cpu.PagedCache(self.weights, longest, "float32"))
        scores, before = np.empty((len(rows), labels), np.float32), list[int]()
        for number in sorted(range(len(rows)), key=lambda i: list(rows[i])):
            row = list(rows[number])
            shared = next((i for i, (a, b) in enumerate(zip(row, before, strict=False)) if a != b), len(before))
            sequence.crop(min(shared, len(row) - 1, len(before)))
            scores[number] = self._engine.feed(sequence, row[sequence.length :])[:labels]
            before = row
        return scores


_HELD: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], NativeTrunk | str]] = WeakKeyDictionary()


def native_trunk(model: LlamaForSequenceClassification, precision: str = "exact") -> NativeTrunk | str:
    """`model`'s decoder on the engine, kept until its tensors are others; or why torch has to run it."""
    if reason := unsuited(model, LlamaForSequenceClassification) or difference(model):
        return reason
    if type(model.score) is not nn.Linear or model.score.bias is not None:
        return f"its classifier is a {type(model.score).__name__}"
    stamp = (precision, *stamp_of(model))
    entry = _HELD.get(model)
    if entry is None or entry[0] != stamp:
        try:
            if model.config.hidden_act not in ("silu", "swish"):
                raise InputError(f"hidden_act {model.config.hidden_act!r} has no native kernel")
            entry = (stamp, NativeTrunk(model, precision))
        except (Llama2Error, ValueError) as error:
            entry = (stamp, str(error))
        _HELD[model] = entry
    return entry[1]
