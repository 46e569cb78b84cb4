"""The reference of preference optimisation: the model as it was before the first step.

A fresh adapter changes nothing, so there the reference is the model without it. Whatever else is trained is kept as a
copy, which takes the place of the trained parameters while the reference is computed: all weights, or an adapter that
was trained before (TRL keeps a frozen copy of it too).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from llama2 import lora
from llama2.pretrained import PreTrainedModel


class Start:
    """A copy of the model's present state. nbytes: memory that the copy takes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        if not is_fresh(model):
            self._held = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    @property
    def nbytes(self) -> int:
        """Bytes of the copy; 0 for a fresh adapter."""
        return sum(held.nbytes for _, held in self._held)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it the model computes what it did at the start. No gradient may be taken of what runs here."""
        now = [(parameter, parameter.data) for parameter, _ in self._held]
        for parameter, held in self._held:
            parameter.data = held.to(parameter.dtype)
        try:
            with nullcontext() if self._held else lora.disabled(self._model):
                yield
        finally:
            for parameter, data in now:
                parameter.data = data


@torch.no_grad()
def is_fresh(model: nn.Module) -> bool:
    """Whether nothing is trained but adapters that change nothing yet, since their B is zero."""
    adapted = lora.layers(model).values()
    own = {id(p) for layer in adapted for held in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
           for p in held.values()}  # fmt: skip
    if not own or any(p.requires_grad and id(p) not in own for p in model.parameters()):
        return False
    return not any(bool(layer.lora_B[name].any()) for layer in adapted for name in layer.active)


def without_dropout(model: PreTrainedModel) -> None:
    """Stops the dropout of adapters, which makes policy and reference differ at the start (TRL's disable_dropout)."""
    for layer in lora.layers(model).values():
        layer.training = False
