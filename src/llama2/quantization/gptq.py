"""GPTQ's files (Frantar et al., arXiv 2210.17323), as AutoGPTQ and GPTQModel write them.

w[n, k] = scale[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k]. For a weight (N, K) of b bits in G groups:
    qweight  int32 (K b / 32, N)   codes along the inputs, the first in the lowest bits
    qzeros   int32 (G, N b / 32)   zeros along the outputs; format "gptq" (v1) stores one less, "gptq_v2" the zero
    scales   float16 (G, N)        or bfloat16, float32
    g_idx    int32 (K,)            k // group, unless columns were quantised in another order; AutoRound leaves it out
A scale may be negative: AutoRound gives the end of the range with the extra code to the side that needs it. It may be
0 where a group is.
32 fields fill b words, little endian; of 3 bits, two of the 32 lie across words.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from llama2.errors import InputError
from llama2.lazy import door
from llama2.quantization.gptq_file import PARTS, SPAN, checked, format_of, packed, unpack, unpack_zeros
from llama2.quantization.gptq_solver import Solution
from llama2.quantization.integer_grid import IntegerGrid, Steps
from llama2.quantization.linear import Fused, PackedLinear, arrays_of
from llama2.quantization.packable import PackableWeight

__all__ = ["GptqLinear", "format_of", "grid_of", "pack", "pack_zeros", "unpack", "unpack_zeros"]

_CHUNK = 1 << 19  # codes unpacked in one go: their floats (2 MiB) stay near a core's cache
_groups = door("quantization.fused", "Groups", "The kernels of GPTQ's integers; imports triton.")


# -- fields in words ---------------------------------------------------------------------------------------------


def pack(codes_KN: Tensor, bits: int) -> Tensor:
    """Words (K bits / 32, N) int32 of codes (K, N) below 2^bits, packed along the first axis."""
    groups = codes_KN.to(torch.int32).unflatten(0, (-1, SPAN))
    words = groups.new_zeros(groups.shape[0], bits, groups.shape[2])
    for field in range(SPAN):
        word, shift = divmod(field * bits, 32)
        words[:, word] |= groups[:, field] << shift
        if shift + bits > 32:
            words[:, word + 1] |= groups[:, field] >> (32 - shift)
    return words.flatten(0, 1)


def pack_zeros(zeros_GN: Tensor, bits: int, v2: bool) -> Tensor:
    """qzeros of zeros (G, N). Raises InputError for a zero that v1 cannot say in the same way to every reader."""
    low, top = (0 if v2 else 1), (1 << bits) - 1
    if not v2 and bool((zeros_GN == 0).any()):
        raise InputError("a zero is 0, which readers of format 'gptq' disagree about: take format 'gptq_v2'")
    return pack((zeros_GN - low).bitwise_and(top).mT.contiguous(), bits).mT.contiguous()


# -- the layer ---------------------------------------------------------------------------------------------------


class GptqLinear(PackedLinear):
    """A linear layer of integers with a scale and a zero for every output and group of inputs."""

    def __init__(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], bias: nn.Parameter | None, config: Any
    ) -> None:
        super().__init__(shape, tensors, bias)
        self.bits: int = config.bits
        self.group_size = config.group_size if config.group_size != -1 else self.in_features
        self.v2 = config.format == "gptq_v2"
        self._seen: tuple[Tensor, int, bool] | None = None
        self._moved: tuple[tuple[Tensor, int], tuple[Tensor, int], Tensor | None, Tensor | None] | None = None

    @classmethod
    def from_file(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, config: Any
    ) -> Self:
        """As PackedLinear.from_file: qweight, qzeros, scales and, unless columns are in order, g_idx."""
        g_idx = torch.from_numpy(checked(arrays_of(tensors), shape, config)["g_idx"])
        kept = {**{name: tensors[name] for name in PARTS[:3]}, "g_idx": g_idx}
        if (given := tensors.get("g_idx")) is not None:
            kept["g_idx"] = given.to(torch.int32)
        return cls(shape, kept, bias, config)

    @classmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, config: Any) -> Self:
        """As PackedLinear.quantize: to the nearest, with the scales of the least squared error."""
        w_NK, grid = weight.detach().float(), grid_of(config, weight.shape[1], search=True)
        ones = torch.ones(grid.span, device=weight.device)
        params = [grid.fit(part, ones[: part.shape[1]]) for part in w_NK.split(grid.span, 1)]
        rounded = [
            steps.nearest(part.contiguous(), 1) for part, steps in zip(w_NK.split(grid.span, 1), params, strict=True)
        ]
        return cls.of_values(torch.cat(rounded, 1), params, None, bias, config)

    @classmethod
    def of_solution(cls, solution: Solution, bias: nn.Parameter | None, config: Any) -> Self:
        """The layer of what the solver found on the grid `grid_of(config, K)`."""
        return cls.of_values(solution.weight, solution.params, solution.order, bias, config)

    @classmethod
    def of_values(
        cls, weight_NK: Tensor, params: Sequence[Steps], order: Tensor | None, bias: nn.Parameter | None, config: Any
    ) -> Self:
        """The layer of values on the grid, exactly. order: the spans' columns are order[0:S], order[S:2S], ..."""
        shape = _packable(weight_NK)
        group = config.group_size if config.group_size != -1 else shape[1]
        places = torch.arange(shape[1], dtype=torch.int32, device=weight_NK.device) // group
        g_idx = places if order is None else torch.empty_like(places).index_copy_(0, order, places)
        scales, zeros = (torch.stack(each) for each in zip(*((p.scale, p.zero) for p in params), strict=True))
        group_of_row = g_idx.long()
        codes_KN = (weight_NK.mT / scales[group_of_row]).round_().add_(zeros[group_of_row])
        tensors = {
            "qweight": pack(codes_KN, config.bits),
            "qzeros": pack_zeros(zeros.to(torch.int32), config.bits, config.format == "gptq_v2"),
            "scales": scales.to(params[0].dtype),
            "g_idx": g_idx,
        }
        return cls(shape, tensors, bias, config)

    @property
    def in_order(self) -> bool:
        """Whether groups are runs of neighbouring columns.

        Looked up once for a g_idx: a GPU would have to be waited for at each product, and not while it records a graph.
        """
        g_idx = self.packed["g_idx"]
        version = _version(g_idx)
        if self._seen is None or self._seen[0] is not g_idx or self._seen[1] != version:
            places = torch.arange(len(g_idx), dtype=torch.int32, device=g_idx.device) // self.group_size
            self._seen = (g_idx, version, bool(torch.equal(g_idx, places)))
        return self._seen[2]

    def _by_group(self) -> tuple[Tensor | None, Tensor | None]:
        """(the columns by group, qweight in that order) of four bits in another order (act-order), made once.

        None where columns are in order already or groups differ in size. The copy takes the codes' memory again: with
        it a product is as fast as one in order, without it four times as slow.
        """
        if self.in_order or self.bits != 4:
            return None, None
        qweight, g_idx = self.packed["qweight"], self.packed["g_idx"]
        versions = ((qweight, _version(qweight)), (g_idx, _version(g_idx)))
        kept = self._moved
        if kept is None or any(a[0] is not b[0] or a[1] != b[1] for a, b in zip(kept[:2], versions, strict=True)):
            order = torch.argsort(g_idx, stable=True)
            places = torch.arange(len(g_idx), dtype=torch.int32, device=g_idx.device) // self.group_size
            if bool(torch.equal(g_idx[order], places)):
                kept = (*versions, order, pack(unpack(qweight, self.bits)[order], self.bits))
            else:
                kept = (*versions, None, None)
            self._moved = kept
        return kept[2], kept[3]

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes (K, N) and zeros (G, N), int32."""
        tensors = self.packed
        return unpack(tensors["qweight"], self.bits), unpack_zeros(tensors["qzeros"], self.bits, self.v2)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As PackedLinear.dequantize."""
        tensors = self.packed
        scales_GN = tensors["scales"].float()
        zeros_GN = unpack_zeros(tensors["qzeros"], self.bits, self.v2).float()
        out_NK = torch.empty(self.out_features, self.in_features, dtype=dtype, device=scales_GN.device)
        step = max(1, _CHUNK // (SPAN * self.out_features)) * SPAN
        groups = tensors["g_idx"].tolist() if self.in_order and self.group_size % SPAN == 0 else None
        if groups is not None:  # then no chunk reaches into two groups, and its rows share their scales
            step = math.gcd(step, self.group_size)
        for start in range(0, self.in_features, step):
            words = tensors["qweight"][start * self.bits // 32 : (start + step) * self.bits // 32]
            groups_of_rows = tensors["g_idx"][start : start + step].long() if groups is None else groups[start]
            weights = unpack(words, self.bits).float().sub_(zeros_GN[groups_of_rows]).mul_(scales_GN[groups_of_rows])
            out_NK[:, start : start + step] = weights.mT
        return out_NK

    def packable(self) -> PackableWeight:
        """As PackedLinear.packable: 2 and 3 bits by the kernel of 4, which their codes are a part of."""
        return packed(arrays_of(self.packed), self.bits, self.group_size, self.v2)

    def fused(self) -> Fused:
        """As PackedLinear.fused."""
        shape = (self.out_features, self.in_features)
        tensors = [self.packed[name] for name in PARTS]
        fused_weights: Fused = _groups(
            shape, self.bits, self.group_size, not self.v2, self.in_order, *tensors, *self._by_group()
        )
        return fused_weights

    def extra_repr(self) -> str:
        """As PackedLinear.extra_repr."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def grid_of(config: Any, columns: int, search: bool = False, dtype: torch.dtype = torch.float16) -> IntegerGrid:
    """The grid of a GPTQConfig for weights of so many columns; v1 keeps zeros of 1 and more. dtype: of the scales."""
    span = config.group_size if config.group_size != -1 else columns
    return IntegerGrid(
        span, config.bits, config.sym, low=0 if config.format == "gptq_v2" else 1, search=search, dtype=dtype
    )


def _packable(weight_NK: Tensor) -> tuple[int, int]:
    rows, columns = weight_NK.shape
    if rows % SPAN or columns % SPAN:
        raise InputError(
            f"a weight of {rows} rows and {columns} columns; GPTQ files pack {SPAN} of each at a time: quantise with "
            "nf4 or int8"
        )
    return rows, columns
