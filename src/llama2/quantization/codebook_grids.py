"""Grids of the solver for bitsandbytes' formats: it chooses the codes, all else is as `quantize` makes it."""

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.quantization.gptq_solver import Solution, solve
from llama2.quantization.int8 import LEVELS, Linear8bit
from llama2.quantization.nf4 import TABLES, Linear4bit


class CodebookGrid:
    """The 16 values of NF4 or FP4 times the scale of each block of a layer's rows; a Grid of the solver."""

    def __init__(self, layer: Linear4bit) -> None:
        """Raises InputError where a block would run on into the next row."""
        self.span, columns = layer.state.block, layer.in_features
        if columns % self.span:
            raise InputError(
                f"{layer.state.kind} has blocks of {self.span} values, which rows of {columns} do not divide into: "
                "leave calibration out"
            )
        self.table = torch.tensor(TABLES[layer.state.kind])
        self.order = torch.argsort(self.table, stable=True)
        self._values = self.table[self.order]
        self._bounds = (self._values[1:] + self._values[:-1]) / 2
        self.scales_NB = layer.absmax.view(layer.out_features, -1)
        self._next = 0

    def fit(self, weight_NS: Tensor, importance_S: Tensor) -> Tensor:
        """As Grid.fit: the scales (N,) of the next block; they are what they are."""
        self._next += 1
        return self.scales_NB[:, self._next - 1].contiguous()

    def round(self, column_N: Tensor, params: Tensor, index: int) -> Tensor:
        """As Grid.round."""
        return self._values[self._places(column_N, params)].mul_(params)

    def codes(self, weight_NK: Tensor) -> Tensor:
        """Two codes a byte, uint8 (N K / 2,), of values of this grid."""
        scales = self.scales_NB.repeat_interleave(self.span, 1)
        every = self.order[self._places(weight_NK, scales)].to(torch.uint8).flatten()
        return every[::2] << 4 | every[1::2]

    def _places(self, weight: Tensor, scales: Tensor) -> Tensor:
        shares = torch.where(scales == 0, 0.0, weight / torch.where(scales == 0, 1.0, scales))
        return torch.bucketize(shares, self._bounds, out_int32=True)


class RowGrid:
    """Whole numbers from -127 to 127 times the scale of each row of a layer; a Grid of the solver."""

    def __init__(self, layer: Linear8bit) -> None:
        self.span, self._peaks = layer.in_features, layer.packed["SCB"]
        self.step = self._peaks * (1 / LEVELS)

    def fit(self, weight_NS: Tensor, importance_S: Tensor) -> Tensor:
        """As Grid.fit: the scales are what they are."""
        return self.step

    def round(self, column_N: Tensor, params: Tensor, index: int) -> Tensor:
        """As Grid.round; the product is that of `Linear8bit.dequantize`, to the bit."""
        return self._codes(column_N, params).mul_(self._peaks).mul_(1 / LEVELS)

    def codes(self, weight_NK: Tensor) -> Tensor:
        """int8 (N, K) of values of this grid."""
        return self._codes(weight_NK, self.step[:, None]).to(torch.int8)

    def _codes(self, weight: Tensor, step: Tensor) -> Tensor:
        shares = torch.where(step == 0, 0.0, weight / torch.where(step == 0, 1.0, step))
        return shares.round_().clamp_(-LEVELS, LEVELS)


def solved(
    layer: Linear4bit | Linear8bit, weight_NK: Tensor, hessian_KK: Tensor, damp: float
) -> tuple[Linear4bit | Linear8bit, Solution]:
    """The layer with the codes that lose least of the outputs: same scales, same file. `layer`: what `quantize` made of
    the weight. Raises as `solve`."""
    grid = CodebookGrid(layer) if isinstance(layer, Linear4bit) else RowGrid(layer)
    found = solve(weight_NK.float(), hessian_KK, grid, damp=damp, act_order=True, static_groups=True)
    tensors, codes = layer.packed, grid.codes(found.weight)
    tensors["weight"] = codes.view(tensors["weight"].dtype).view_as(tensors["weight"])
    layer._buffers.update(tensors)
    return layer, found
