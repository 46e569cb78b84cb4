"""The solver of GPTQ (Frantar et al., arXiv 2210.17323) for any grid of representable values.

Minimises the change of a layer's outputs, tr(E H E^T) / 2 with E = W - Q and H = 2/n sum x x^T, column by column: the
error of the columns that are rounded shifts those that are not. Written with the factors H = U D U^T (U unit upper
triangular), which give the paper's updates without the inverse of H (Chee et al., arXiv 2307.13304, theorem 6):
column k is rounded at w_k + sum_{j<k} (w_j - q_j) U_jk, at a cost of D_k times the square of what is rounded away.

Letters: N rows (outputs), K columns (inputs), S columns of a span, P of a panel, B of a step inside it.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
        each column costs (above 0) once later columns have made up for what they can."""

    def round(self, column_N: Tensor, params: Any, index: int) -> Tensor:
        """The nearest representable values (float32) of column `index` of a span; column_N may be overwritten."""


@runtime_checkable
class Refitting(Grid, Protocol):
    """A grid whose parameters can follow its codes."""

    def refit(self, values_SN: Tensor, pull_SN: Tensor, own_SS: Tensor, params: Any) -> tuple[Any, Tensor]:
        """Parameters that serve the codes behind the values (S, N) at least as well, and the values they now mean.

        pull: half the derivative of tr(E H E^T) by the values, with the sign turned; own: H of these columns.
        """


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
    passes: int = 0,
    block: int = 128,
) -> Solution:
    """Rounds a weight (float32) to a grid. Neither argument is changed.

    hessian: symmetric, float32. act_order: columns of large inputs first. static_groups: parameters of the spans come
    from the weight as it is given and its spans stay contiguous; otherwise from the shifted weight, as it is when
    their first column is reached, and spans follow the order. A column whose inputs were all 0 is rounded like any
    other, and shifts nothing. passes: over the solution, each of which takes every span to its best values given all
    the others (coordinate descent), parameters first where the grid refits them; the error only falls.

    Raises InputError for shapes that do not fit, NaN, and an H that no damping makes definite.
    """
    _check(weight_NK, hessian_KK, damp)
    columns = weight_NK.shape[1]
    diagonal = hessian_KK.diagonal()
    level = diagonal.double().mean().item() or 1.0
    order = diagonal.argsort(descending=True, stable=True) if act_order else None
    factor, pivots, used, double = _factor(hessian_KK, order, damp, level)
    run = _Run(grid, weight_NK, order, factor, pivots, static_groups)
    del factor
    error = sum(run.panel(start, end) for start, end in _panels(columns, grid.span, block))
    run.factor = pivots[:0]
    for _ in range(passes):
        error -= sum(run.again(at, hessian_KK, used * level) for at in run.spans(block))
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


def _factor(hessian_KK: Tensor, order: Tensor | None, damp: float, level: float) -> tuple[Tensor, Tensor, float, bool]:
    """U^T (K, K; unit lower triangular; above the diagonal is anything), D (K,), the damping and whether in float64."""
    forward = torch.arange(len(hessian_KK), device=hessian_KK.device) if order is None else order
    backward = forward.flip(0)
    for dtype in (torch.float32, torch.float64):
        for step in _RAISE:
            work = _reordered(hessian_KK, backward, dtype)
            work.diagonal().add_(damp * step * level)
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
        f"calibration text ({len(backward)} inputs need more tokens than that)"
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
        flipped = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(flipped)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(1).double().sum())


# -- columns -----------------------------------------------------------------------------------------------------


@dataclass
class _Columns:
    """P columns that are rounded one by one, each shifting those after it.

    factor (P, P): what the error of a column (second axis) shifts another by. weights, rounded, shift, lost (P, N):
    column i is rounded at weights[i] + shift[i]; then weights[i] is its error and lost[i] what was rounded away.
    places: for each the parameters and the index in their span.
    """

    grid: Grid
    places: list[tuple[Any, int]]
    factor: Tensor
    weights: Tensor
    rounded: Tensor
    shift: Tensor
    lost: Tensor

    def round(self, start: int, end: int) -> None:
        """Rounds the columns [start, end), by halves: most of the shifting is then products of matrices."""
        if end - start <= _STEP:
            self._step(start, end)
            return
        middle = start + -(-(end - start) // 2 // _STEP) * _STEP
        self.round(start, middle)
        self.push(start, middle, end)
        self.round(middle, end)

    def push(self, start: int, middle: int, end: int) -> None:
        """Shifts the columns [middle, end) by the errors of [start, middle)."""
        if middle < end:
            self.shift[middle:end].addmm_(self.factor[middle:end, start:middle], self.weights[start:middle])

    def _step(self, start: int, end: int) -> None:
        own = self.factor[start:end, start:end].mT.contiguous()
        for i in range(start, end):
            weight_N, rounded_N, lost_N = self.weights[i], self.rounded[i], self.lost[i]
            torch.add(weight_N, self.shift[i], out=lost_N)
            rounded_N.copy_(lost_N)
            found_N = self.grid.round(rounded_N, *self.places[i])
            if found_N.data_ptr() != rounded_N.data_ptr():
                rounded_N.copy_(found_N)
            lost_N.sub_(rounded_N)
            weight_N.sub_(rounded_N)
            if i + 1 < end:
                self.shift[i + 1 : end].addr_(own[i - start, i + 1 - start :], weight_N)


class _Run:
    """The state of one solve. Weights are held transposed, in the order of the columns: updates are contiguous."""

    def __init__(
        self,
        grid: Grid,
        weight_NK: Tensor,
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
            placed = pivots_K if order is None else torch.empty_like(pivots_K).index_copy_(0, order, pivots_K)
            for start in range(0, columns, span):
                part = slice(start, start + span)
                self.params.append(grid.fit(weight_NK[:, part].contiguous(), placed[part]))
            if order is not None:
                self.places = [divmod(column, span) for column in order.tolist()]
        ordered = weight_NK if order is None else weight_NK[:, order]
        self.errors_KN = ordered.mT.contiguous().clone() if order is None else ordered.mT.contiguous()
        self.rounded_KN = torch.empty_like(self.errors_KN)

    def panel(self, start: int, end: int) -> float:
        """Rounds the columns [start, end): tr(E H E^T) of them. Their weights become their errors."""
        shift_PN = self.factor[start:end, :start] @ self.errors_KN[:start]
        own, part, span = self.factor[start:end, start:end], slice(start, end), self.grid.span
        columns = _Columns(
            self.grid, [], own, self.errors_KN[part], self.rounded_KN[part], shift_PN, torch.empty_like(shift_PN)
        )
        for offset in range(0, end - start, span):
            stop = min(offset + span, end - start)
            if (start + offset) // span == len(self.params):
                self._fit(start + offset, own[offset:stop, offset:stop], shift_PN[offset:stop])
            columns.places += [(self.params[p], i) for p, i in self.places[start + offset : start + stop]]
            columns.round(offset, stop)
            columns.push(offset, stop, end - start)
        return float(columns.lost.square_().sum(1).double() @ self.pivots[part].double())

    def _fit(self, start: int, own: Tensor, shift: Tensor) -> None:
        """Parameters of the span from `start` from its weights, shifted as if none of its own errors were to come."""
        part = slice(start, start + len(own))
        moved = torch.linalg.solve_triangular(own, shift, upper=False, unitriangular=True)
        weights = moved.add_(self.errors_KN[part]).mT.contiguous()
        self.params.append(self.grid.fit(weights, self.pivots[part]))

    def spans(self, block: int) -> list[Tensor]:
        """For each span where its columns are held; of whole rows, runs of `block` columns."""
        device = self.errors_KN.device
        if self.grid.span >= len(self.places):
            return list(torch.arange(len(self.places), device=device).split(block))
        at = torch.tensor([place * self.grid.span + index for place, index in self.places], device=device)
        return list(at.argsort().split(self.grid.span))

    def again(self, chosen: Tensor, hessian_KK: Tensor, damping: float) -> float:
        """Takes the columns held at `chosen` to better values, all others as they are: by how much tr(E H E^T)
        falls."""
        rows = hessian_KK[chosen if self.order is None else self.order[chosen]]
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        errors, values = self.errors_KN[chosen], self.rounded_KN[chosen]
        pull = (rows @ self.errors_KN).add_(errors, alpha=damping)
        own = rows[:, chosen]
        own.diagonal().add_(damping)
        place, moved, fallen = self.places[int(chosen[0])][0], torch.zeros_like(values), 0.0
        if isinstance(self.grid, Refitting) and self.grid.span < len(self.places):
            self.params[place], fitted = self.grid.refit(values, pull, own, self.params[place])
            moved = fitted - values
            pulled = own @ moved
            fallen = _dot(moved, 2 * pull - pulled)
            values, pull = fitted, pull.sub_(pulled)
        costs = own.diagonal().clone()[:, None]
        shift, rounded = pull.div_(costs), torch.empty_like(values)
        places = [(self.params[p], i) for p, i in (self.places[k] for k in chosen.tolist())]
        columns = _Columns(self.grid, places, own.div_(costs), values.clone(), rounded, shift, torch.empty_like(values))
        columns.round(0, len(chosen))
        self.rounded_KN[chosen] = rounded
        self.errors_KN[chosen] = errors.sub_(rounded.sub_(values).add_(moved))
        gained = shift.square_().sum(1).double() - columns.lost.square_().sum(1).double()
        return fallen + float(gained @ costs[:, 0].double())

    def result(self) -> Tensor:
        """The rounded weight (N, K), columns as they were."""
        del self.errors_KN
        if self.order is None:
            return self.rounded_KN.mT.contiguous()
        out = torch.empty_like(self.rounded_KN)
        out[self.order] = self.rounded_KN
        return out.mT.contiguous()
