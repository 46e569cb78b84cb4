"""The linear layer of the network: torch's, with a faster weight layout for decoding in bfloat16 on a CPU.

A product of one row with a row-major bfloat16 matrix reaches a third of the memory bandwidth in torch; the same product
with the weight reordered once by oneDNN reaches up to twice that (figures: docs/LOG.md). The reordered copy costs the
weight's bytes again, so `prepack` makes it only where it fits easily, and it is dropped with the layer.
"""

import os
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHARE_OF_FREE_MEMORY = 0.25


class _Reordered(NamedTuple):
    source: Tensor
    version: int
    weight: Tensor


# Beside the layers, not in them: a layer stays what torch can copy, pickle and compile.
_REORDERED: WeakKeyDictionary[nn.Linear, _Reordered] = WeakKeyDictionary()
_multiply: Any = torch.ops.mkldnn._linear_pointwise.default


class Linear(nn.Linear):
    """x (..., in) -> x W^T + b (..., out); uses the weight's reordered copy while that is valid."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if _REORDERED and not torch.is_grad_enabled() and x.dtype == torch.bfloat16:
            held = _REORDERED.get(self)
            if held is not None and held.source is weight and held.version == weight._version:
                out: Tensor = _multiply(x, held.weight, self.bias, "none", [], "")
                return out
        return F.linear(x, weight, self.bias)


def prepack(model: nn.Module) -> int:
    """Reorders the bfloat16 weights of a CPU model in eval mode; returns how many layers now have a valid copy.

    0 where it cannot help: another device or dtype, training mode, a CPU without bfloat16 products, or where the copy
    would take more than a quarter of the free memory. Changing a weight afterwards only makes its layer slower again.
    """
    if model.training or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    layers = [layer for layer in model.modules() if type(layer) is Linear and _eligible(layer.weight)]
    stale = [layer for layer in layers if not _valid(layer)]
    needed = sum(2 * layer.weight.numel() for layer in stale)
    if needed > _SHARE_OF_FREE_MEMORY * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return 0
    for layer in stale:
        reordered = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)
        _REORDERED[layer] = _Reordered(layer.weight, layer.weight._version, reordered)
    return len(layers)


def _eligible(weight: Tensor) -> bool:
    # A weight made under inference_mode counts no versions, so a stale copy could not be told.
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.is_inference()


def _valid(layer: Linear) -> bool:
    held = _REORDERED.get(layer)
    return held is not None and held.source is layer.weight and held.version == layer.weight._version
