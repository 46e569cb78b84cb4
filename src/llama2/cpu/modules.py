"""Packed linears of torch as the native kernels take them. Apart from `weights`, which does without torch."""

from typing import Any

import numpy as np
import torch
from torch import nn

from llama2.cpu.codes import CodebookWeight, GroupWeight, Int8Weight, PackableWeight, order_of
from llama2.errors import InputError
from llama2.quant.gptq import GptqLinear
from llama2.quant.int8 import LEVELS, Linear8bit
from llama2.quant.linear import PackedLinear
from llama2.quant.nf4 import TABLES, Linear4bit

_PACKED: tuple[type[PackedLinear], ...] = (GptqLinear, Linear4bit, Linear8bit)


def packable(layer: nn.Module) -> PackableWeight | None:
    """The codes of a packed linear on the CPU, None for a plain linear. Raises InputError for what has no kernel."""
    if type(layer) is nn.Linear:
        return None
    if type(layer) not in _PACKED:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        names = ", ".join(known.__name__ for known in _PACKED)
        raise InputError(
            f"it is a {kind}; the native engine takes plain linears and {names} (merge adapters), or use runner='torch'"
        )
    assert isinstance(layer, PackedLinear)
    held: dict[str, Any] = layer.packed
    if any(tensor.device.type != "cpu" for tensor in held.values()):
        raise InputError("its tensors are not on the CPU; move the model with .to('cpu'), or use runner='torch'")
    if isinstance(layer, Linear8bit):
        return Int8Weight(held["weight"].numpy(), (held["SCB"] / LEVELS).numpy())
    if isinstance(layer, GptqLinear):
        return _groups(layer)
    assert isinstance(layer, Linear4bit)
    shape, state = (layer.out_features, layer.in_features), layer.state
    return CodebookWeight(layer.codes.numpy(), layer.absmax.numpy(), shape, TABLES[state.kind], state.block)


def _groups(layer: GptqLinear) -> GroupWeight:
    """GPTQ's groups: 2 and 3 bits by the kernel of 4, which their codes are a part of."""
    scales = layer.packed["scales"]
    halves = scales.to(torch.float16)
    if not torch.equal(halves.float(), scales.float()):
        at = scales.float().flatten()[(halves.float() != scales.float()).flatten()][0].item()
        raise InputError(f"a scale, {at} in {scales.dtype}, is no float16, which the kernel reads; use runner='torch'")
    codes, zeros = layer.codes()
    if int(zeros.max()) > 255:
        raise InputError("a zero is 256, which does not fit the 8 bits of the kernel; use runner='torch'")
    return GroupWeight(
        np.ascontiguousarray(codes.to(torch.uint8).mT),
        np.ascontiguousarray(halves.mT),
        np.ascontiguousarray(zeros.to(torch.uint8).mT),
        group=-1 if layer.group_size == layer.in_features else layer.group_size,
        bits=max(4, layer.bits),
        order=order_of(layer.packed["g_idx"].numpy(), layer.group_size),
    )
