"""Packed layers of torch as the native kernels take them. Apart from `weights`, which does without torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llama2.cpu.gguf_reader import BlockMatrix, block_matrix, unpermute
from llama2.cpu.quantized_weights import CodebookWeight, GroupWeight, Int8Weight, PackableWeight, order_of
from llama2.errors import InputError
from llama2.lora import LoraLinear
from llama2.quantization.ggml import TYPES
from llama2.quantization.gguf import GgufEmbedding, GgufLinear, origin_of, rows_of
from llama2.quantization.gptq import GptqLinear
from llama2.quantization.int8 import LEVELS, Linear8bit
from llama2.quantization.linear import PackedLinear
from llama2.quantization.nf4 import TABLES, Linear4bit

_PACKED: tuple[type[PackedLinear], ...] = (GgufLinear, GptqLinear, Linear4bit, Linear8bit)


@dataclass(frozen=True)
class BlockRows:
    """Rows of GGUF's blocks: in a file's map, or in memory of their own with the file row of each row."""

    kind: str
    shape: tuple[int, int]
    rows: torch.Tensor
    order: Any = None  # int32 (rows,), None where it is the same
    file: BlockMatrix | None = None

    @property
    def floats(self) -> torch.Tensor | None:
        """The matrix where it is of a float type, in place where its rows are in order; None for blocks."""
        dtype = TYPES[self.kind].dense
        if dtype is None:
            return None
        rows = self.rows if self.order is None else self.rows[torch.from_numpy(self.order).long()]
        return (rows.contiguous() if rows.data_ptr() % dtype.itemsize == 0 else rows.clone()).view(dtype)


def base_of(layer: nn.Module) -> Any:
    """The linear beneath a layer with adapters; any other layer itself. Raises InputError for DoRA."""
    if type(layer) is not LoraLinear:
        return layer
    if any(name in layer.lora_magnitude_vector for name in layer.active):
        raise InputError("DoRA has no native kernel; use runner='torch'")
    return layer.base_layer


def pair_of(layer: LoraLinear) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and scale of the sum of a layer's active adapters; None where it has none."""
    names = [name for name in layer.active if name in layer.lora_A]
    if not names:
        return None
    a, b = ([held[name].detach() for name in names] for held in (layer.lora_A, layer.lora_B))
    if len(names) == 1:
        return a[0], b[0], layer.scaling[names[0]]
    scaled = [part.float() * layer.scaling[name] for part, name in zip(b, names, strict=True)]
    return torch.cat([part.float() for part in a]), torch.cat(scaled, 1), 1.0


def blocks_of(layer: nn.Module) -> BlockRows | None:
    """The blocks of a layer of a GGUF file on the CPU; None for any other layer."""
    if type(layer) not in (GgufLinear, GgufEmbedding):
        return None
    assert isinstance(layer, GgufLinear | GgufEmbedding)
    rows = rows_of(layer)
    if rows.device.type != "cpu":
        raise InputError("its tensors are not on the CPU; move the model with .to('cpu'), or use runner='torch'")
    if isinstance(layer, GgufLinear):
        shape, heads = (layer.out_features, layer.in_features), layer.heads
    else:
        shape, heads = (layer.num_embeddings, layer.embedding_dim), 0
    order, origin, file = unpermute(heads, shape[0]) if heads else None, origin_of(layer), None
    if origin is not None and TYPES[layer.kind].dense is None:
        file = block_matrix(origin.file, origin.name, heads or None)
    return BlockRows(layer.kind, shape, rows, order, file)


def packable(layer: nn.Module) -> PackableWeight | None:
    """The codes of a packed linear on the CPU, None for a plain linear. Raises InputError for what has no kernel."""
    if type(layer) is nn.Linear:
        return None
    if type(layer) not in _PACKED:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        names = ", ".join(known.__name__ for known in _PACKED)
        raise InputError(f"it is a {kind}; the native engine takes plain linears and {names}, or use runner='torch'")
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
