"""Decoded forms of a packed linear, for every file format: integers, codes of a table, or small floats.

A format's reader makes one of these from the tensors of a file; the form unpacks the weight, and says how the native
engine takes it. N rows, K columns, G groups of columns.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llama2.quantization.integer_weight import integer_weight
from llama2.quantization.linear import arrays_of
from llama2.quantization.packable import PackableWeight, TableWeight

_SPAN = 32  # columns that a kernel takes at once


class Form(Protocol):
    """The weight (N, K) of one linear."""

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...

    def packable(self) -> PackableWeight | None: ...


@dataclass(frozen=True)
class Integers:
    """w = scale * (code - zero), or scale * code + minimum.

    codes (N, K) uint8; scales (N, G) of any float dtype; zeros (N, G) whole numbers or floats; minima (N, G), given
    in place of zeros. bits: codes are below 2^bits. index (K,): the group of each column, None where groups are
    runs of `group` columns. arithmetic: the dtype of the steps where that is what the format's own tool rounds to.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    zeros: Tensor | None = None
    minima: Tensor | None = None
    index: Tensor | None = None
    arithmetic: torch.dtype = torch.float32

    def _spread(self, each: Tensor) -> Tensor:
        """Values of groups (N, G) for each column (N, K)."""
        if self.index is not None:
            return each[:, self.index.long()]
        return each.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]] if each.shape[1] > 1 else each

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, each step rounded to `arithmetic`, the result to `dtype`."""
        q, scales = self.codes.to(self.arithmetic), self._spread(self.scales.to(self.arithmetic))
        if self.minima is not None:
            return (q * scales + self._spread(self.minima.to(self.arithmetic))).to(dtype)
        if self.zeros is not None:
            q = q - self._spread(self.zeros.to(self.arithmetic))
        return (q * scales).to(dtype)

    def packable(self) -> PackableWeight | None:
        """G4, G8 where scales are float16 and zeros bytes, R8 for signed bytes of whole rows, else A4, A8."""
        held = {"scales": self.scales, "zeros": self.zeros, "minima": self.minima, "index": self.index}
        arrays = arrays_of({name: tensor for name, tensor in held.items() if tensor is not None})
        return integer_weight(self.codes.numpy(), arrays.pop("scales"), self.bits, self.group, **arrays)


@dataclass(frozen=True)
class TableCodes:
    """w = table[code] * scale: codes (N, K) uint8 below 16, table of 16 numbers, scales (N, G) float32."""

    codes: Tensor
    table: tuple[float, ...]
    scales: Tensor
    group: int

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, products in float32."""
        values = torch.tensor(self.table, dtype=torch.float32, device=self.codes.device)[self.codes.int()]
        return (values.unflatten(1, (-1, self.group)) * self.scales[..., None]).flatten(1).to(dtype)

    def packable(self) -> PackableWeight | None:
        """T4, T4H where groups are of 16 columns."""
        scales, group = self.scales, self.group
        if group > _SPAN and group % _SPAN == 0:
            scales, group = scales.repeat_interleave(group // _SPAN, 1), _SPAN
        if group not in (16, _SPAN) or self.codes.shape[1] % group:
            return None
        codes, s = (np.ascontiguousarray(each.numpy()) for each in (self.codes, scales))
        return TableWeight(codes, s, self.table, group)


@dataclass(frozen=True)
class ScaledFloats:
    """w = value * scale: values (N, K) of a float of 8 bits, scales (A, B) float32, of blocks of rows, columns."""

    values: Tensor
    scales: Tensor
    block: tuple[int, int]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, products in float32."""
        rows, columns = self.values.shape
        spread = self.scales.float().repeat_interleave(self.block[0], 0)[:rows]
        spread = spread.repeat_interleave(self.block[1], 1)[:, :columns] if spread.shape[1] > 1 else spread
        return (self.values.float() * spread).to(dtype)

    def packable(self) -> None:
        """No layout holds floats of 8 bits: the engine takes the weight in bfloat16."""
        return
