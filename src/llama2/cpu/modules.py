"""Packed layers of torch as the native kernels take them. Apart from `weights`, which does without torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llama2.cpu.gguf_reader import BlockMatrix, block_matrix, unpermute
from llama2.errors import InputError
from llama2.lora import LoraLinear
from llama2.quantization.formats import layer_classes
from llama2.quantization.ggml import TYPES
from llama2.quantization.gguf import GgufEmbedding, GgufLinear, origin_of, rows_of
from llama2.quantization.linear import PackedLinear
from llama2.quantization.packable import PackableWeight


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
    a, b = ([factors[name].detach() for name in names] for factors in (layer.lora_A, layer.lora_B))
    if len(names) == 1:
        return a[0], b[0], layer.scaling[names[0]]
    scaled = [factor.float() * layer.scaling[name] for factor, name in zip(b, names, strict=True)]
    return torch.cat([factor.float() for factor in a]), torch.cat(scaled, 1), 1.0


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
    """The codes of a packed linear on the CPU, None where no layout holds them, and for a plain linear.

    Raises InputError for a layer of another library, and for values that no kernel takes."""
    if type(layer) is nn.Linear:
        return None
    if type(layer) not in layer_classes():
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        names = ", ".join(known.__name__ for known in layer_classes())
        raise InputError(f"it is a {kind}; the native engine takes plain linears and {names}, or use runner='torch'")
    assert isinstance(layer, PackedLinear)
    if any(tensor.device.type != "cpu" for tensor in layer.packed.values()):
        raise InputError("its tensors are not on the CPU; move the model with .to('cpu'), or use runner='torch'")
    return layer.packable()
