"""Block grids: what the solver rounds to packs without loss, and loses less of the outputs than rounding does."""

import pytest
import torch
from torch import Tensor

from llama2.errors import CheckpointError, InputError
from llama2.quantization.ggml import dequantize
from llama2.quantization.ggml_encode import ENCODERS, quantize
from llama2.quantization.ggml_grid import BlockGrid, block_order, gguf_rows
from llama2.quantization.gptq_solver import solve

SOLVED = [kind for kind in ENCODERS if not kind.startswith("IQ")]  # the rows of IQ4 types are searched, not solved


def problem(rows: int = 24, columns: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mix = torch.randn(columns, columns // 4, generator=generator)
    x = torch.randn(2048, columns // 4, generator=generator) @ mix.T + 2 * torch.randn(
        2048, columns, generator=generator
    )
    x *= torch.exp(torch.randn(columns, generator=generator))
    return weight, 2 / len(x) * x.T @ x


def lost(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    change = (weight - rounded).double()
    return float(((change @ hessian.double()) * change).sum())


@pytest.mark.parametrize("kind", SOLVED)
def test_the_solver_loses_less_than_rounding(kind: str) -> None:
    """Outputs: plain rounding, rounding by importance, the solver. Measured, squared errors: importance 0.23 to 0.48 of
    plain rounding's, the solver 0.11 to 0.36 of those of importance."""
    weight, hessian = problem()
    plain, weighted, solved = (
        lost(weight, dequantize(rows, kind), hessian)
        for rows in (
            gguf_rows(weight, kind),
            gguf_rows(weight, kind, hessian.diagonal()),
            gguf_rows(weight, kind, None, hessian),
        )
    )
    assert weighted < plain
    assert solved < 0.45 * weighted


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("ordered", [False, True])
def test_packing_is_exact(kind: str, ordered: bool) -> None:
    """Rows decode to what the solver rounded to, bit for bit; rows of zeros, constants and outliers among them."""
    weight, hessian = problem(12)
    weight[0], weight[1], weight[2, :256], weight[3, 7] = 0, -0.25, 0, 4.0
    weight[4] = weight[4].abs() + 1
    grid = BlockGrid(kind)
    solution = solve(weight, hessian, grid, act_order=ordered, static_groups=ordered)
    rows = grid.pack(solution.weight, solution.params)
    assert rows.shape == (12, grid.block.row_bytes(512)) and rows.dtype == torch.uint8
    assert torch.equal(dequantize(rows, kind), solution.weight)
    assert torch.equal(dequantize(rows, kind)[0], weight[0])


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_K", "Q3_K"])
def test_blocks_and_groups_come_back_from_the_order(kind: str) -> None:
    """The rows are what the solver found: its error, and near the weight block by block. A block of zeros stays so."""
    weight, hessian = problem(8)
    weight[:, 256:] *= 100
    weight[3, :256] = 0
    grid = BlockGrid(kind)
    order = block_order(hessian.diagonal(), grid)
    assert sorted(order.tolist()) == list(range(512)) and order.tolist() != list(range(512))
    blocks = order.view(-1, grid.span) // grid.span
    assert (blocks == blocks[:, :1]).all()
    values = dequantize(gguf_rows(weight, kind, None, hessian), kind)
    expected = solve(weight[:, order], hessian[order][:, order], grid)
    assert torch.equal(values[:, order], expected.weight)


def test_without_a_hessian_the_encoders_are_used() -> None:
    weight, hessian = problem(4)
    assert torch.equal(gguf_rows(weight, "Q4_K"), quantize(weight, "Q4_K"))
    importance = hessian.diagonal()
    assert torch.equal(gguf_rows(weight, "Q4_0", importance), quantize(weight, "Q4_0", importance))
    assert torch.equal(gguf_rows(weight, "F16", None, hessian), quantize(weight, "F16"))


def test_refusals() -> None:
    weight, hessian = problem(4, 256)
    with pytest.raises(CheckpointError, match="row of 224 weights cannot be stored as Q4_K"):
        gguf_rows(weight[:, :224], "Q4_K", None, hessian[:224, :224])
    with pytest.raises(InputError, match="Hessian"):
        gguf_rows(weight, "Q4_0", None, hessian[:32, :32])
    with pytest.raises(AssertionError, match="Q4_0 cannot hold"):
        grid = BlockGrid("Q4_0")
        solution = solve(weight, hessian, grid)
        grid.pack(solution.weight + 1e-3, solution.params)
