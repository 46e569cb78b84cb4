"""Packed linears of torch as the native kernels take them. Apart from `weights`, which does without torch."""

from typing import Any

from llama2.cpu.codes import Int8Weight, PackableWeight
from llama2.errors import InputError
from llama2.quant.int8 import LEVELS, Linear8bit
from llama2.quant.linear import PackedLinear


def packable(layer: PackedLinear) -> PackableWeight:
    """The codes of a packed linear on the CPU. Raises InputError for a layout that has no kernel."""
    held: dict[str, Any] = layer.packed
    if any(tensor.device.type != "cpu" for tensor in held.values()):
        raise InputError("its tensors are not on the CPU; move the model with .to('cpu'), or use runner='torch'")
    if isinstance(layer, Linear8bit):
        return Int8Weight(held["weight"].numpy(), (held["SCB"] / LEVELS).numpy())
    raise InputError(f"{type(layer).__name__} has no native kernel; use runner='torch'")
