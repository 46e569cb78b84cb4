"""Products with torch's own linear layers, over a faster layout of the weight for decoding in bfloat16 on a CPU.

A product of one row with a row-major bfloat16 matrix reaches a third of the memory bandwidth in torch; the same product
with the weight reordered once by oneDNN reaches up to twice that (figures: docs/LOG.md). The reordered copy costs the
weight's bytes again, so `prepack` makes it only where it fits easily, and it is dropped with the layer.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_SHARE_OF_FREE_MEMORY = 0.25

has_global_hooks: Callable[[], bool] = nn.modules.module._has_any_global_hook


def runs_as_written(module: nn.Module, training: bool = True) -> bool:
    """Whether calling `module` does no more than the forward of its class: no hooks, nothing replaced or compiled.

    Where not, its parameters must not be used past its call. training=False leaves backward hooks out.
    """
    attributes = module.__dict__
    return not (
        attributes["_forward_pre_hooks"]
        or attributes["_forward_hooks"]
        or "forward" in attributes
        or attributes.get("_compiled_call_impl") is not None
        or (training and (attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]))
    )


# Layers that share an input. Any, because torch types the attributes of a module as Tensor | Module.
Group = tuple[Any, ...]


class _Reordered(NamedTuple):
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None


# By the first of the layers that share an input, beside the layers and not in them: a layer stays what torch can
# copy, pickle and compile.
_REORDERED: WeakKeyDictionary[nn.Module, _Reordered] = WeakKeyDictionary()
_multiply: Any = torch.ops.mkldnn._linear_pointwise.default


def is_plain(layer: Any) -> TypeGuard[nn.Linear]:
    """Whether `layer` is torch's linear, called as written: its product may be computed past its call.

    By identity of the class: libraries replace linears by subclasses, and look for exactly this one.
    """
    return type(layer) is nn.Linear and runs_as_written(layer)


def fused_linear(layers: Group, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers that share the input x, as one product where `prepack` has put their weights together."""
    if _REORDERED and not torch.is_grad_enabled() and x.dtype == torch.bfloat16:
        reordered = _valid(layers)
        if reordered is not None:
            out = _multiply(x, reordered.weight, reordered.bias, "none", [], "")
            return torch.split(out, [weight.shape[0] for weight in reordered.sources], dim=-1)
    return tuple(layer(x) for layer in layers)


def _valid(layers: Group) -> _Reordered | None:
    reordered = _REORDERED.get(layers[0])
    if reordered is None or len(reordered.sources) != len(layers) or has_global_hooks():
        return None
    for layer, source, version in zip(layers, reordered.sources, reordered.versions, strict=True):
        if not is_plain(layer) or layer.weight is not source or source._version != version:
            return None
    return reordered


def prepack(groups: list[Group]) -> int:
    """Reorders bfloat16 weights on a CPU, those of a group of layers as one; returns how many layers have a valid copy.

    0 where it cannot help: another device or dtype, training mode, a CPU without bfloat16 products, or where the copy
    would take more than a quarter of the free memory. Changing a weight afterwards only makes its layer slower again.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    groups = [group for group in groups if all(map(_eligible, group))]
    stale = [group for group in groups if _valid(group) is None]
    needed = sum(2 * layer.weight.numel() for group in stale for layer in group)
    if needed > _SHARE_OF_FREE_MEMORY * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return 0
    for group in stale:
        _REORDERED[group[0]] = _reorder(group)
    return sum(map(len, groups))


def _reorder(group: Group) -> _Reordered:
    weights = tuple(layer.weight for layer in group)
    biases = [layer.bias for layer in group]
    joined = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
    bias = None
    if any(b is not None for b in biases):
        parts = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
        bias = torch.cat(parts)
    reordered = torch.ops.mkldnn._reorder_linear_weight(joined, 1)
    return _Reordered(weights, tuple(w._version for w in weights), reordered, bias)


def _eligible(layer: Any) -> bool:
    # A weight made under inference_mode counts no versions, so a stale copy could not be told.
    return (
        is_plain(layer)
        and not layer.training
        and type(layer.weight) in (Tensor, nn.Parameter)
        and layer.weight.dtype == torch.bfloat16
        and layer.weight.device.type == "cpu"
        and not layer.weight.is_inference()
    )
