"""bfloat16 linears at oneDNN's own blocked layout, for decoding with torch on a CPU.

A product of one row with a row-major bfloat16 matrix reaches a third of the memory bandwidth in torch; the same
product with the weight reordered once reaches twice that (figures: docs/LOG.md). The reordered copy costs the weight's
bytes again, so it is made only where that fits easily, and is dropped with the model.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_SHARE_OF_FREE_MEMORY = 0.25
_Stamp = tuple[int, int]

# layer -> (address and version of the weight it was made from, the reordered weight)
_REORDERED: WeakKeyDictionary[nn.Linear, tuple[_Stamp, Tensor]] = WeakKeyDictionary()


def _eligible(model: nn.Module) -> list[nn.Linear]:
    """The plain bfloat16 linears of a model in eval mode on a CPU whose oneDNN multiplies bfloat16 in hardware."""
    if model.training or not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    linears = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16 and layer.weight.device.type == "cpu"
    ]
    needed = sum(2 * layer.weight.numel() for layer in linears if layer not in _REORDERED)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return linears if needed <= _SHARE_OF_FREE_MEMORY * free else []


def _reordered(layer: nn.Linear) -> Tensor:
    """The weight in oneDNN's layout; made again where the parameter has been changed or replaced since."""
    weight = layer.weight.detach()
    stamp = (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
    held = _REORDERED.get(layer)
    if held is None or held[0] != stamp or stamp[1] == -1:
        held = (stamp, torch.ops.mkldnn._reorder_linear_weight(weight, 1))
        _REORDERED[layer] = held
    return held[1]


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Inside, the plain bfloat16 linears of `model` multiply with their reordered weights; no gradients flow.

    Does nothing where it cannot help: another device or dtype, training mode, or not enough memory for the copy.
    """
    if torch.is_grad_enabled():
        yield
        return
    layers = _eligible(model)
    multiply: Any = torch.ops.mkldnn._linear_pointwise.default if layers else None

    def bound(layer: nn.Linear) -> Any:
        weight, bias = _reordered(layer), layer.bias
        return lambda x: multiply(x, weight, bias, "none", [], "")

    try:
        for layer in layers:
            layer.forward = bound(layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
