"""W + scale * B A: an adapter put into the weights for good. The sum is taken in float32 and rounded once.

With DoRA the rows of the sum get the lengths that the adapter learnt.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.hf import CODES
from llama2.checkpoint.peft import Adapter, LowRank
from llama2.checkpoint.seen import SeenCheckpoint


def merged(weight: Tensor, low: LowRank, start: int = 0) -> Tensor:
    """Rows `start` .. start + len(weight) of the changed W, in the weight's dtype and on its device."""
    a, b = (half.to(weight.device, torch.float32) for half in (low.a, low.b[start : start + len(weight)]))
    total = torch.addmm(weight.float(), b, a, alpha=low.scale)
    if low.magnitude is not None:
        wanted = low.magnitude[start : start + len(weight)].to(weight.device, torch.float32)
        total *= (wanted / total.norm(dim=1))[:, None]
    return total.to(weight.dtype)


def merge_into(model: nn.Module, adapter: Adapter) -> None:
    """Adds an adapter to the weights of a LlamaForCausalLM in place."""
    with torch.no_grad():
        for module, low in adapter.modules.items():
            weight = model.get_submodule(module).weight
            assert isinstance(weight, Tensor)
            weight.copy_(merged(weight, low))


class MergedCheckpoint(SeenCheckpoint):
    """A checkpoint seen with an adapter merged into it, row by row as it is read."""

    def __init__(self, source: Checkpoint, adapter: Adapter) -> None:
        super().__init__(source)
        self.adapter = adapter
        self._low = {f"{module}.weight": low for module, low in adapter.modules.items()}

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        found = dict(self.source.tensors)
        for name in self._low:  # the sum of quantised weights and an adapter is not quantised
            shape, kind = found[name]
            found[name] = Stored(shape, kind if kind in CODES.values() else "F32")
        return found

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.source.read(name)
        if name in self._low:
            tensor = merged(tensor, self._low[name])
        return tensor if dtype is None else tensor.to(dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.source.read_rows(name, start, stop)
        return merged(rows, self._low[name], start) if name in self._low else rows

    def raw(self, name: str) -> RawTensor:
        if name not in self._low:
            return self.source.raw(name)
        shape, kind = self.tensors[name]
        return RawTensor(self.read(name).contiguous().view(torch.uint8), kind, shape)
