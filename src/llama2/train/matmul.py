"""Sums of matrix products, which training on a CPU consists of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from llama2.compiled import kernels, pool
from llama2.quantization.linear import PackedLinear
from llama2.quantization.nf4 import Linear4bit


class Scratch:
    """One piece of memory for whichever weight is unpacked: taken and given back between tensors that stay, pieces of
    its size would leave holes among them, half as much memory again.
    """

    def __init__(self) -> None:
        self._values: Tensor | None = None

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(rows, columns), until the next call."""
        held, count = self._values, rows * columns
        if held is None or held.dtype != dtype or len(held) < count:
            held = self._values = torch.empty(count, dtype=dtype)
        return held[:count].view(rows, columns)


@dataclass(frozen=True)
class PackedFactor:
    """A weight (out, in) that stays packed until it is multiplied with, or its transpose."""

    layer: PackedLinear
    scratch: Scratch
    transposed: bool = False

    @property
    def T(self) -> "PackedFactor":
        """Its transpose."""
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """As a tensor's."""
        rows, columns = self.layer.out_features, self.layer.in_features
        return (columns, rows) if self.transposed else (rows, columns)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Unpacked; two codes a byte into the scratch memory, so until the next one's."""
        layer = self.layer
        if isinstance(layer, Linear4bit):
            weight = layer.dequantize(dtype, self.scratch.take(layer.out_features, layer.in_features, dtype))
        else:
            weight = layer.dequantize(dtype)
        return weight.T if self.transposed else weight

    def given(self) -> object:
        """As the kernel takes it, which unpacks two codes a byte where it needs them."""
        layer = self.layer
        if not isinstance(layer, Linear4bit) or layer.in_features % 32:
            weight = layer.dequantize(torch.bfloat16)  # not the scratch memory: other terms' weights live beside it
            return to_dlpack(weight.T if self.transposed else weight)
        parts = (to_dlpack(part) for part in (layer.codes, layer.absmax, layer.table))
        return *parts, layer.state.block, (layer.out_features, layer.in_features), self.transposed


Factor = Tensor | PackedFactor


class Sum(NamedTuple):
    """scale * (A1 B1 + A2 B2 + ... + added) (rows, columns), in `dtype`, that of A1 or float32; into `out` if given.

    terms: up to 8 pairs A (rows, depth), B (depth, columns). Beside a bfloat16 A a float32 B counts as rounded.
    transposed: the result is (columns, rows), and nothing is added. Of X^T Y and (Y^T X)^T that is faster whose A is
    the smaller one, since an A that is a transposed view is copied.
    """

    terms: Sequence[tuple[Tensor, Factor]]
    added: Tensor | None = None
    scale: float = 1.0
    dtype: torch.dtype | None = None
    out: Tensor | None = None
    transposed: bool = False


def sums_of_products(*sums: Sum) -> list[Tensor]:
    """The results of several sums.

    In bfloat16 on a processor that multiplies it each is formed in float32 and rounded once, and all are computed
    together (csrc/kernels/gemm_bf16.inl); else torch adds one product to the other.
    """
    if not _has_kernel(sums[0].terms[0][0]):
        return [_by_torch(one) for one in sums]
    outs = [one.out if one.out is not None else _empty(one) for one in sums]
    kernels().products(pool(), [_given(out, one) for out, one in zip(outs, sums, strict=True)])
    return outs


def sum_of_products(*terms: tuple[Tensor, Factor], added: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """One sum."""
    return sums_of_products(Sum(terms, added, out=out))[0]


def add_transposed(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += (A B)^T, total in promote(dtype, float32)."""
    if _has_kernel(a):
        kernels().products(pool(), [_given(total, Sum([(a, b)], transposed=True), grows=True)])
    else:
        total += b.T @ a.T


def _empty(one: Sum) -> Tensor:
    a, b = one.terms[0]
    shape = (b.shape[1], a.shape[0]) if one.transposed else (a.shape[0], b.shape[1])
    return torch.empty(shape, dtype=one.dtype or a.dtype)


def _given(out: Tensor, one: Sum, grows: bool = False) -> tuple[Any, ...]:
    """As the kernel takes it. Tensors go as capsules: Tensor.__dlpack__ costs 2 us each, and a step has 10,000."""
    terms = [(to_dlpack(a), b.given() if isinstance(b, PackedFactor) else to_dlpack(b)) for a, b in one.terms]
    added = None if one.added is None else to_dlpack(one.added)
    return to_dlpack(out), terms, added, one.scale, one.transposed, grows


def _by_torch(one: Sum) -> Tensor:
    dtype, total = one.terms[0][0].dtype, one.added
    for left, right in one.terms:
        a, b = left, right.dense(dtype) if isinstance(right, PackedFactor) else right.to(dtype)
        if one.transposed:
            a, b = b.T, a.T
        if total is None:
            total = a @ b
        elif total is one.added:
            total = torch.addmm(total, a, b)
        else:
            total.addmm_(a, b)
    assert total is not None
    total = total if one.scale == 1 else total.mul_(one.scale)
    return total.to(one.dtype or total.dtype) if one.out is None else one.out.copy_(total)


def _has_kernel(a: Tensor) -> bool:
    return a.dtype == torch.bfloat16 and a.device.type == "cpu" and has_kernel()


@cache
def has_kernel() -> bool:
    """Whether this processor multiplies bfloat16 by AVX-512 and no faster, and the compiled module is there."""
    found = kernels()
    return bool(found) and bool(found.has_products())
