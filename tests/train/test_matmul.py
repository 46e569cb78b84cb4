"""Sums of products against float64, in every layout, with and without the kernel."""

from typing import Any

import pytest
import torch

from llama2.compiled import kernels, pool
from llama2.quantization.nf4 import Linear4bit
from llama2.quantization_config import BitsAndBytesConfig
from llama2.train import matmul
from llama2.train.matmul import (
    PackedFactor,
    Scratch,
    Sum,
    add_transposed,
    has_kernel,
    sum_of_products,
    sums_of_products,
)  # fmt: skip

needs_kernel = pytest.mark.skipif(not has_kernel(), reason="this processor has no bfloat16 products")
SHAPES = [
    (1, 1, (1,)),
    (7, 5, (3,)),
    (64, 64, (64, 32)),
    (37, 33, (101, 6)),
    (99, 130, (4300,)),
    (600, 70, (48, 16, 7)),
]


def matrix(rows: int, columns: int, across: bool, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(columns, rows).to(dtype).T if across else torch.randn(rows, columns).to(dtype)


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize("across", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_float64(
    shape: tuple[int, int, tuple[int, ...]], across: tuple[bool, bool], kernel: bool, monkeypatch: Any
) -> None:
    if not kernel:
        monkeypatch.setattr(matmul, "has_kernel", lambda: False)
    torch.manual_seed(0)
    rows, columns, depths = shape
    terms = [(matrix(rows, d, across[0]), matrix(d, columns, across[1])) for d in depths]
    added = matrix(rows, columns, False)
    exact = sum((a.double() @ b.double() for a, b in terms), torch.zeros(rows, columns).double())
    size = exact.norm() + 1e-9
    plain, scaled, turned = sums_of_products(
        Sum(terms, added), Sum(terms, scale=-0.5, dtype=torch.float32), Sum(terms, dtype=torch.float32, transposed=True)
    )
    tight = 1e-6 if kernel else 5e-3  # torch rounds each product to bfloat16
    assert plain.dtype == torch.bfloat16 and (plain - (exact + added)).norm() < 5e-3 * (size + added.norm())
    assert scaled.dtype == torch.float32 and (scaled + 0.5 * exact).norm() < tight * size
    assert turned.shape == (columns, rows) and (turned - exact.T).norm() < tight * size
    total = torch.randn(columns, rows)
    wanted = total + (terms[0][0].double() @ terms[0][1].double()).T
    add_transposed(total, *terms[0])
    assert (total - wanted).norm() < tight * wanted.norm()


@needs_kernel
def test_a_float32_right_factor_counts_as_rounded() -> None:
    torch.manual_seed(0)
    for across in (False, True):
        a, b = matrix(40, 70, False), matrix(70, 90, across, torch.float32)
        found = sums_of_products(Sum([(a, b)], dtype=torch.float32))[0]
        assert torch.allclose(found.double(), a.double() @ b.bfloat16().double(), rtol=1e-5, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 32), (50, 96), (200, 4416), (4301, 64)])
def test_codes_are_unpacked_where_they_are_needed(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    layer = Linear4bit.quantize(torch.randn(shape) * 0.1, None, config)
    factor, weight = PackedFactor(layer, Scratch()), layer.dequantize(torch.bfloat16)
    x, grad, low = matrix(70, shape[1], False), matrix(70, shape[0], False), matrix(70, 16, False)
    a = torch.randn(16, shape[1])
    for packed, dense, left in ((factor.T, weight.T, x), (factor, weight, grad)):
        assert packed.shape == dense.shape
        assert torch.equal(sum_of_products((left, packed)), sum_of_products((left, dense)))
    terms = [(grad, factor), (low, a), (grad, factor)]
    found, wanted = sums_of_products(Sum(terms), Sum([(left, weight if b is factor else b) for left, b in terms]))
    assert torch.equal(found, wanted)


@needs_kernel
def test_packed_weights_beside_each_other_do_not_share_memory() -> None:
    torch.manual_seed(0)
    scratch, grads = Scratch(), [matrix(20, 40, False), matrix(20, 40, False)]
    layers = [Linear4bit.quantize(torch.randn(40, 48), None, None) for _ in grads]  # 48 codes are no multiple of 32
    found = sum_of_products(*((g, PackedFactor(layer, scratch)) for g, layer in zip(grads, layers, strict=True)))
    dense = [layer.dequantize(torch.bfloat16) for layer in layers]
    assert torch.equal(found, sum_of_products(*zip(grads, dense, strict=True)))


@needs_kernel
def test_a_slice_of_rows_is_written_in_place_and_nothing_beside_it() -> None:
    torch.manual_seed(0)
    a, b, out = matrix(10, 33, False), matrix(33, 20, False), torch.full((12, 64), 7.0).bfloat16()
    sum_of_products((a, b), out=out[1:11, 5:25])
    assert torch.equal(out[1:11, 5:25], sum_of_products((a, b)))
    out[1:11, 5:25] = 7
    assert bool((out == 7).all())


@needs_kernel
def test_not_a_number_stays_in_its_row() -> None:
    a, b = torch.ones(13, 31).bfloat16(), torch.ones(31, 20).bfloat16()
    a[4, 30] = float("nan")
    found = sum_of_products((a, b))
    assert bool(found[4].isnan().all()) and not bool(found[:4].isnan().any()) and not bool(found[5:].isnan().any())


@needs_kernel
def test_any_number_of_threads_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    given = [
        Sum([(matrix(700, 4300, False), matrix(4300, 90, True))], matrix(700, 90, False)),
        Sum([(matrix(500, 40, True), matrix(40, 1100, False))], dtype=torch.float32, transposed=True),
    ]
    try:
        found = [torch.set_num_threads(n) or sums_of_products(*given) for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@needs_kernel
def test_what_does_not_fit_is_refused() -> None:
    a, b, out = torch.zeros(3, 4).bfloat16(), torch.zeros(4, 5).bfloat16(), torch.zeros(3, 5).bfloat16()
    run = kernels().products
    for terms, added, scale, turned, grows, word in (
        ([], None, 1.0, False, False, "between 1 and 8"),
        ([(a, b)] * 9, None, 1.0, False, False, "between 1 and 8"),
        ([(a, a)], None, 1.0, False, False, "depth"),
        ([(a.float(), b)], None, 1.0, False, False, "bfloat16"),
        ([(a, b.half())], None, 1.0, False, False, "bfloat16 or float32"),
        ([(a, torch.zeros(8, 10).bfloat16()[::2, ::2])], None, 1.0, False, False, "along memory"),
        ([(a, b)], b, 1.0, False, False, "shape"),
        ([(a, b)], None, 1.0, False, True, "float32"),
        ([(a, b)], None, 1.0, True, False, "depth"),
    ):
        with pytest.raises(ValueError, match=word):
            run(pool(), [(out, terms, added, scale, turned, grows)])
    with pytest.raises(ValueError, match="transposed"):
        run(pool(), [(out.T.contiguous(), [(a, b)], out, 1.0, True, False)])
