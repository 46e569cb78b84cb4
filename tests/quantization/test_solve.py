"""The solver against the paper's own column-by-column recurrence, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.quantization.gptq_solver import Hessian, solve
from llama2.quantization.integer_grid import IntegerGrid


class Steps:
    """Multiples of a scale, one for each row and span: max / 7."""

    def __init__(self, span: int) -> None:
        self.span = span

    def fit(self, weight_NS: Tensor, importance_S: Tensor) -> Any:
        assert importance_S.shape == weight_NS.shape[1:] and bool((importance_S > 0).all())
        return weight_NS.abs().amax(1) / 7

    def round(self, column_N: Tensor, params: Any, index: int) -> Tensor:
        near = (
            (column_N / params).add_(1.5 * 2**23).sub_(1.5 * 2**23)
            if column_N.dtype == torch.float32
            else (column_N / params).round()
        )
        return near.clamp_(-8, 7).mul_(params)


def textbook(
    weight: Tensor, hessian: Tensor, span: int, damp: float, act_order: bool, static: bool
) -> tuple[Tensor, float]:
    """Algorithm 1 of the paper with the inverse of H, by column, float64; and half of tr(E H E^T), damped."""
    w, h = weight.double().clone(), hessian.double().clone()
    grid, columns = Steps(span), w.shape[1]
    level = h.diagonal().mean()
    h[h.diagonal() == 0, h.diagonal() == 0] = 1
    h += damp * level * torch.eye(columns, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    ones = torch.ones(span, dtype=torch.float64)
    fixed = [grid.fit(w[:, i : i + span], ones[: w[:, i : i + span].shape[1]]) for i in range(0, columns, span)]
    w, h = w[:, order], h[order][:, order]
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    q, loss, scale = torch.zeros_like(w), 0.0, fixed[0]
    for i in range(columns):
        if static:
            scale = fixed[int(order[i]) // span]
        elif i % span == 0:
            part = w[:, i : i + span]
            scale = grid.fit(part, ones[: part.shape[1]])
        q[:, i] = grid.round(w[:, i].clone(), scale, 0)
        error = (w[:, i] - q[:, i]) / inverse[i, i]
        loss += float(error.square().sum()) / 2
        w[:, i:] -= torch.outer(error, inverse[i, i:])
    out = torch.empty_like(q)
    out[:, order] = q
    return out, loss


def problem(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=gen) / columns**0.5
    x = torch.randn(tokens, columns, generator=gen) @ mix * torch.rand(columns, generator=gen).mul(3).exp()
    return torch.randn(rows, columns, generator=gen), 2 / tokens * x.T @ x


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("columns", "span", "block"), [(96, 32, 64), (160, 16, 128), (96, 40, 32), (80, 80, 32)])
def test_equals_the_textbook(columns: int, span: int, block: int, static: bool, act_order: bool) -> None:
    weight, hessian = problem(24, columns, 400)
    kept = weight.clone(), hessian.clone()
    found = solve(weight, hessian, Steps(span), act_order=act_order, static_groups=static, block=block)
    wanted, loss = textbook(weight, hessian, span, 0.01, act_order, static)
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])
    assert (found.weight - wanted).abs().max() < 1e-6 * wanted.abs().max()
    assert found.error == pytest.approx(loss, rel=1e-4)
    assert len(found.params) == -(-columns // span) and (found.order is not None) == (act_order and not static)
    assert found.damp == 0.01 and not found.double


def cost(change: Tensor, hessian: Tensor) -> float:
    return float(((change @ hessian) * change).sum()) / 2


@pytest.mark.parametrize("act_order", [False, True])
def test_better_than_rounding(act_order: bool) -> None:
    weight, hessian = problem(64, 128, 600, seed=1)
    plain = torch.cat([Steps(32).round(p, (p.abs().amax(1) / 7)[:, None], 0) for p in weight.split(32, 1)], 1)
    found = solve(weight, hessian, Steps(32), act_order=act_order)
    ours, theirs = cost(weight - found.weight, hessian), cost(weight - plain, hessian)
    assert ours < 0.6 * theirs
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128)
    assert found.error == pytest.approx(cost(weight - found.weight, damped), rel=1e-4)


@pytest.mark.parametrize("span", [16, 96])
@pytest.mark.parametrize(("act_order", "static"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("refits", [False, True])
def test_passes_lower_the_error_that_is_reported(refits: bool, act_order: bool, static: bool, span: int) -> None:
    weight, hessian = problem(32, 96, 600, seed=7)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    grid: Any = IntegerGrid(span, 3) if refits else Steps(span)
    errors = []
    for passes in (0, 1, 2, 30):
        found = solve(weight, hessian, grid, act_order=act_order, static_groups=static, passes=passes)
        errors.append(found.error)
        assert found.error == pytest.approx(cost(weight - found.weight, damped), rel=1e-4)
    assert (
        errors[0] > errors[1] > errors[2] >= errors[3] * (1 - 1e-6)  # a float32 sum's order is the processor's
        and errors[2] < (0.97 if refits and span < 96 else 0.999) * errors[0]
    )
    # Converged: no single value has a better neighbour.
    pull, order = (weight - found.weight) @ damped, range(96) if found.order is None else found.order.tolist()
    for place, column in enumerate(order):
        target = found.weight[:, column] + pull[:, column] / damped[column, column]
        nearest = grid.round(target.clone(), found.params[place // span], place % span)
        assert torch.allclose(nearest, found.weight[:, column], atol=1e-5)


def test_dead_inputs_are_rounded_and_shift_nothing() -> None:
    weight, hessian = problem(16, 64, 300, seed=2)
    weight[:, 0] = 5  # gives every scale
    dead = torch.tensor([3, 40])
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = solve(weight, hessian, Steps(64), damp=0.01)
    other = weight.clone()
    other[:, dead] = other[:, dead].sign() * 0.01
    assert (found.weight[:, dead] - weight[:, dead]).abs().max() <= weight.abs().max() / 7
    alive = [i for i in range(64) if i not in dead]
    assert torch.equal(solve(other, hessian, Steps(64), damp=0.01).weight[:, alive], found.weight[:, alive])


def test_damping_is_raised_until_the_hessian_is_definite() -> None:
    weight, hessian = problem(8, 64, 500, seed=3)
    hessian -= 0.03 * hessian.diagonal().mean() * torch.eye(64)
    low = float(torch.linalg.eigvalsh(hessian.double())[0] / hessian.double().diagonal().mean())
    found = solve(weight, hessian, Steps(32), damp=0.01)
    assert found.damp in (0.02, 0.05, 0.1) and found.damp > -low > 0.01 and not found.double
    with pytest.raises(InputError, match=r"not positive definite even with damping 1e-05.*calibration text"):
        solve(weight, hessian, Steps(32), damp=1e-6)


def test_float64_where_float32_is_too_coarse() -> None:
    weight, _ = problem(8, 64, 8, seed=4)
    x = torch.randint(-2, 3, (20, 64), generator=torch.Generator().manual_seed(4)).float()  # exact, and of rank 20
    found = solve(weight, x.T @ x, Steps(32), damp=1e-9)
    assert found.double and bool(found.weight.isfinite().all())


@pytest.mark.parametrize("act_order", [False, True])
def test_large_case_stays_near_the_textbook(act_order: bool) -> None:
    """Panels, steps and spans of the default sizes; in float32 single values may fall on the other side of a tie."""
    weight, hessian = problem(48, 512, 2000, seed=5)
    found = solve(weight, hessian, Steps(128), act_order=act_order)
    wanted, loss = textbook(weight, hessian, 128, 0.01, act_order, False)
    assert ((found.weight - wanted).abs() > 1e-5).float().mean() < 0.01
    assert found.error == pytest.approx(loss, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, h: (w, h[:-1, :-1], 0.01), r"the weight is \(8, 64\) and its Hessian \(63, 63\)"),
        (lambda w, h: (w, h, 0.0), r"damp is 0.0; it must be above 0"),
        (lambda w, h: (w.where(w < w.max(), float("nan")), h, 0.01), "the weight holds NaN"),
        (lambda w, h: (w, h.where(h < h.max(), float("inf")), 0.01), "the Hessian holds NaN or inf"),
    ],
)
def test_wrong_arguments(change: Any, message: str) -> None:
    weight, hessian, damp = change(*problem(8, 64, 200))
    with pytest.raises(InputError, match=message):
        solve(weight, hessian, Steps(32), damp=damp)


@pytest.mark.parametrize("columns", [40, 512, 1100])
def test_hessian_is_a_running_mean(columns: int) -> None:
    gen = torch.Generator().manual_seed(6)
    parts = [torch.randn(*shape, columns, generator=gen) for shape in ((3, 20), (7,), (0,), (1, 33))]
    found = Hessian(columns)
    for part in parts:
        found.add(part.bfloat16())
    x = torch.cat([part.reshape(-1, columns) for part in parts]).bfloat16().double()
    wanted = 2 / len(x) * x.T @ x
    assert found.tokens == len(x) == 100
    assert (found.diagonal_K - wanted.diagonal()).abs().max() < 1e-5
    first = found.matrix().clone()
    assert torch.equal(first, first.mT) and (first - wanted).abs().max() < 1e-5
    found.add(x)  # the mean of the same again, after the lower half was filled
    assert found.tokens == 200 and (found.matrix() - wanted).abs().max() < 1e-5
    assert torch.equal(found.matrix(), found.matrix().mT)
