"""Sums of matrix products, which training on a CPU consists of."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from llama2.compiled import kernels, pool


class Sum(NamedTuple):
    """scale * (A1 B1 + A2 B2 + ... + added) (rows, columns), in `dtype`, that of A1 or float32; into `out` if given.

    terms: up to 8 pairs A (rows, depth), B (depth, columns). Beside a bfloat16 A, B may be float32: it counts as rounded.
    transposed: the result is (columns, rows), and nothing is added. Of X^T Y and (Y^T X)^T that is faster whose A is
    the smaller one, since an A that is a transposed view is copied.
    """

    terms: Sequence[tuple[Tensor, Tensor]]
    added: Tensor | None = None
    scale: float = 1.0
    dtype: torch.dtype | None = None
    out: Tensor | None = None
    transposed: bool = False


def sums_of_products(*sums: Sum) -> list[Tensor]:
    """The results of several sums.

    In bfloat16 on a processor that multiplies it each is formed in float32 and rounded once, and all are computed
    together (csrc/product.inl); else torch adds one product to the other.
    """
    if not _has_kernel(sums[0].terms[0][0]):
        return [_by_torch(one) for one in sums]
    outs = [one.out if one.out is not None else _empty(one) for one in sums]
    kernels().products(pool(), [_given(out, one) for out, one in zip(outs, sums, strict=True)])
    return outs


def sum_of_products(*terms: tuple[Tensor, Tensor], added: Tensor | None = None, out: Tensor | None = None) -> Tensor:
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
    terms = [(to_dlpack(a), to_dlpack(b)) for a, b in one.terms]
    added = None if one.added is None else to_dlpack(one.added)
    return to_dlpack(out), terms, added, one.scale, one.transposed, grows


def _by_torch(one: Sum) -> Tensor:
    (a, b), *rest = [(b.T, a.T) for a, b in one.terms] if one.transposed else one.terms
    dtype = one.terms[0][0].dtype
    a, b = a.to(dtype), b.to(dtype)
    total = a @ b if one.added is None else torch.addmm(one.added, a, b)
    for a, b in rest:
        total.addmm_(a.to(dtype), b.to(dtype))
    total = total if one.scale == 1 else total.mul_(one.scale)
    return total.to(one.dtype or total.dtype) if one.out is None else one.out.copy_(total)


def _has_kernel(a: Tensor) -> bool:
    return a.dtype == torch.bfloat16 and a.device.type == "cpu" and has_kernel()


@cache
def has_kernel() -> bool:
    """Whether this processor multiplies bfloat16, and the compiled module is there."""
    found = kernels()
    return bool(found) and bool(found.has_products())
