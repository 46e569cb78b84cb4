"""The solver of GPTQ (Frantar et al., arXiv 2210.17323) for any grid of representable values.

Minimises the change of a layer's outputs, tr(E H E^T) / 2 with E = W - Q and H = 2/n sum x x^T, column by column: the
error of the columns that are rounded shifts those that are not. Written with the factors H = U D U^T (U unit upper
triangular), which give the paper's updates without the inverse of H (Chee et al., arXiv 2307.13304, theorem 6):
column k is rounded at w_k + sum_{j<k} (w_j - q_j) U_jk, at a cost of D_k times the square of what is rounded away.

Letters: N rows (outputs), K columns (inputs), S columns of a span, P of a panel, B of a step inside it.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2.errors import InputError

# Damping is raised by these factors until H can be factored, in float32 and then in float64.
_RAISE = (1.0, 2.0, 5.0, 10.0)
_STEP = 8  # columns whose updates are done one by one: too few elements for torch to wake other threads each time
_ROWS = 1 << 22  # elements that a copy with another order moves at once
_TILE = 512  # rows of H that one product adds to, of its upper triangle only: half the work of all of it


class Hessian:
    """H = 2/n sum x x^T over the n inputs x (K,) seen so far, in float32."""

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        self.tokens = 0
        self._upper_KK = torch.zeros(columns, columns, device=device)

    def add(self, x: Tensor) -> None:
        """Adds inputs (..., K) of any float dtype. Padding has no place among them."""
        rows_TK = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows_TK):
            return
        self.tokens += len(rows_TK)
        keep, new = 1 - len(rows_TK) / self.tokens, 2 / self.tokens
        for start in range(0, len(self._upper_KK), _TILE):
            tile = self._upper_KK[start : start + _TILE, start:]
            tile.addmm_(rows_TK[:, start : start + _TILE].mT, rows_TK[:, start:], beta=keep, alpha=new)

    @property
    def diagonal_K(self) -> Tensor:
        """Of each input, twice its mean square: a view."""
        return self._upper_KK.diagonal()

    def matrix(self) -> Tensor:
        """H (K, K), symmetric. It is the memory in which `add` goes on, not a copy."""
        for start in range(0, len(self._upper_KK), _TILE):
            end = start + _TILE
            self._upper_KK[end:, start:end] = self._upper_KK[start:end, end:].mT
            own = self._upper_KK[start:end, start:end]
            own.copy_(own.triu() + own.triu(1).mT)
        return self._upper_KK


class Grid(Protocol):
    """The values that a format can represent, which spans of columns share parameters of."""

    span: int
    """Columns that share parameters: a GPTQ group, a block of ggml or NF4; K or more for whole rows."""

    def fit(self, weight_NS: Tensor, importance_S: Tensor) -> Any:
        """Parameters for these columns (float32; the last span of a row may have fewer), given what a squared error of
        each column costs (above 0)."""

    def round(self, column_N: Tensor, params: Any, index: int) -> Tensor:
        """The nearest representable values (float32) of column `index` of a span; column_N may be overwritten."""


@dataclass
class Solution:
    """weight: (N, K) float32, representable values, columns in the order of the input.

    params: what Grid.fit gave, by span; spans are of the columns order[0:S], order[S:2S], ..., or where order is None,
    of the columns as they stand. damp: the damping that was needed, in shares of H's mean diagonal. error: the mean
    over the calibration of the squared change of the outputs, summed over them, damping included. double: whether
    float32 was too coarse to factor H.
    """

    weight: Tensor
    params: list[Any]
    order: Tensor | None
    damp: float
    error: float
    double: bool


def solve(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block: int = 128,
) -> Solution:
    """Rounds a weight (float32) to a grid. Neither argument is changed.

    hessian: symmetric, float32. act_order: columns of large inputs first. static_groups: parameters of the spans come
    from the weight as it is given and its spans stay contiguous; otherwise from the shifted weight, as it is when
    their first column is reached, and spans follow the order. A column whose inputs were all 0 is rounded like any
    other, and shifts nothing. Raises InputError for shapes that do not fit, NaN, and an H that is never definite.
    """
    _check(weight_NK, hessian_KK, damp)
    columns = weight_NK.shape[1]
    importance = hessian_KK.diagonal().clone()
    dead = importance == 0
    level = importance.double().mean().item() or 1.0
    order = importance.argsort(descending=True, stable=True) if act_order else None
    factor, pivots, used, double = _factor(hessian_KK, order, dead, damp, level)
    run = _Run(grid, weight_NK, importance.add_(used * level), order, factor, pivots, static_groups)
    error = sum(run.panel(start, end) for start, end in _panels(columns, grid.span, block))
    placed = order if act_order and not static_groups else None
    return Solution(run.result(), run.params, placed, used, error / 2, double)


def _check(weight_NK: Tensor, hessian_KK: Tensor, damp: float) -> None:
    columns = weight_NK.shape[-1]
    if weight_NK.ndim != 2 or tuple(hessian_KK.shape) != (columns, columns):
        raise InputError(
            f"the weight is {tuple(weight_NK.shape)} and its Hessian {tuple(hessian_KK.shape)}; for (N, K) it is (K, K)"
        )
    if not damp > 0:
        raise InputError(f"damp is {damp}; it must be above 0, 0.01 for example")
    for tensor, what in ((weight_NK, "weight"), (hessian_KK.sum(1), "Hessian")):
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"the {what} holds NaN or inf: look at the checkpoint, or calibrate in bfloat16 or float32"
            )


def _panels(columns: int, span: int, block: int) -> list[tuple[int, int]]:
    """Runs of columns that are compensated by one product: whole spans, about `block` columns."""
    width = block if span >= columns else span * max(1, block // span)
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


# -- H = U D U^T -------------------------------------------------------------------------------------------------


def _factor(
    hessian_KK: Tensor, order: Tensor | None, dead: Tensor, damp: float, level: float
) -> tuple[Tensor, Tensor, float, bool]:
    """U^T (K, K; unit lower triangular; above the diagonal is anything), D (K,), the damping and whether in float64."""
    diagonal = torch.where(dead, torch.ones_like(dead, dtype=torch.float32), hessian_KK.diagonal())
    backward = torch.arange(len(dead), device=dead.device) if order is None else order
    backward = backward.flip(0)
    for dtype in (torch.float32, torch.float64):
        for step in _RAISE:
            work = _reordered(hessian_KK, backward, dtype)
            work.diagonal().copy_(diagonal[backward]).add_(damp * step * level)
            # Lower Cholesky factor of the reversed matrix, in place; seen row by row it is its transpose.
            info = torch.empty((), dtype=torch.int32, device=work.device)
            torch.linalg.cholesky_ex(work.mT, out=(work.mT, info))
            if int(info) == 0:
                _reverse_(work)
                roots = work.diagonal().clone()
                return work.div_(roots[:, None]).float(), roots.square().float(), damp * step, dtype == torch.float64
            del work
    raise InputError(
        f"the Hessian is not positive definite even with damping {damp * _RAISE[-1]:g}; give a larger damp or more "
        f"calibration text ({len(dead)} inputs need more tokens than that)"
    )


def _reordered(matrix_KK: Tensor, index_K: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with rows and columns in this order, without a second one on the way."""
    out = torch.empty_like(matrix_KK, dtype=dtype)
    step = max(1, _ROWS // len(index_K))
    for start in range(0, len(index_K), step):
        rows = index_K[start : start + step]
        out[start : start + step] = matrix_KK[rows].index_select(1, index_K)
    return out


def _reverse_(matrix_KK: Tensor) -> None:
    """Reverses rows and columns in place."""
    size, step = len(matrix_KK), max(1, _ROWS // len(matrix_KK))
    for start in range(0, (size + 1) // 2, step):
        end = min(start + step, (size + 1) // 2)
        upper, lower = matrix_KK[start:end], matrix_KK[size - end : size - start]
        held = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(held)


# -- columns -----------------------------------------------------------------------------------------------------


class _Run:
    """The state of one solve. Weights are held transposed, in the order of the columns: updates are contiguous."""

    def __init__(
        self,
        grid: Grid,
        weight_NK: Tensor,
        importance_K: Tensor,
        order: Tensor | None,
        factor_KK: Tensor,
        pivots_K: Tensor,
        static: bool,
    ) -> None:
        self.grid, self.order, self.factor, self.pivots = grid, order, factor_KK, pivots_K
        columns, span = weight_NK.shape[1], grid.span
        self.params: list[Any] = []
        self.places = [divmod(column, span) for column in range(columns)]
        if static or span >= columns:
            for start in range(0, columns, span):
                part = slice(start, start + span)
                self.params.append(grid.fit(weight_NK[:, part].contiguous(), importance_K[part]))
            if order is not None:
                self.places = [divmod(column, span) for column in order.tolist()]
        self.importance = importance_K if order is None else importance_K[order]
        ordered = weight_NK if order is None else weight_NK[:, order]
        self.errors_KN = ordered.mT.contiguous().clone() if order is None else ordered.mT.contiguous()
        self.rounded_KN = torch.empty_like(self.errors_KN)

    def panel(self, start: int, end: int) -> float:
        """Rounds the columns [start, end): tr(E H E^T) of them. Their weights become their errors."""
        shift_PN = self.factor[start:end, :start] @ self.errors_KN[:start]
        lost_PN, span = torch.empty_like(shift_PN), self.grid.span
        for at in range(start, end, span):
            stop = min(at + span, end)
            own, rest = shift_PN[at - start : stop - start], shift_PN[stop - start :]
            if at // span == len(self.params):
                self._fit(at, stop, own)
            self._columns(at, stop, own, lost_PN[at - start :])
            if len(rest):
                rest.addmm_(self.factor[stop:end, at:stop], self.errors_KN[at:stop])
        return float(lost_PN.square_().sum(1).double() @ self.pivots[start:end].double())

    def _fit(self, start: int, end: int, shift: Tensor) -> None:
        """Parameters of the span [start, end) from its weights, shifted as if none of its own errors were to come."""
        own = self.factor[start:end, start:end]
        moved = torch.linalg.solve_triangular(own, shift, upper=False, unitriangular=True)
        weights = moved.add_(self.errors_KN[start:end]).mT.contiguous()
        self.params.append(self.grid.fit(weights, self.importance[start:end]))

    def _columns(self, start: int, end: int, shift: Tensor, lost: Tensor) -> None:
        """As `panel`, of one span, by halves. shift[i] is what the columns before `start` move column start + i by;
        lost[i] becomes what is rounded away of it."""
        size = end - start
        if size <= _STEP:
            self._step(start, end, shift, lost)
            return
        half = -(-size // 2 // _STEP) * _STEP
        middle = start + half
        self._columns(start, middle, shift[:half], lost)
        shift[half:].addmm_(self.factor[middle:end, start:middle], self.errors_KN[start:middle])
        self._columns(middle, end, shift[half:], lost[half:])

    def _step(self, start: int, end: int, shift: Tensor, lost: Tensor) -> None:
        """As `_columns`, one by one."""
        own = self.factor[start:end, start:end].mT.contiguous()
        for i in range(end - start):
            weight_N, rounded_N, lost_N = self.errors_KN[start + i], self.rounded_KN[start + i], lost[i]
            place, index = self.places[start + i]
            torch.add(weight_N, shift[i], out=lost_N)
            rounded_N.copy_(lost_N)
            found_N = self.grid.round(rounded_N, self.params[place], index)
            if found_N.data_ptr() != rounded_N.data_ptr():
                rounded_N.copy_(found_N)
            lost_N.sub_(rounded_N)
            weight_N.sub_(rounded_N)
            if i + 1 < end - start:
                shift[i + 1 :].addr_(own[i, i + 1 :], weight_N)

    def result(self) -> Tensor:
        """The rounded weight (N, K), columns as they were."""
        del self.errors_KN
        if self.order is None:
            return self.rounded_KN.mT.contiguous()
        out = torch.empty_like(self.rounded_KN)
        out[self.order] = self.rounded_KN
        return out.mT.contiguous()
