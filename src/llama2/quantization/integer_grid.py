"""Integer grids of the solver: w = scale * (code - zero), with scale and zero for every row and span of columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama2.errors import InputError

# Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, half to even. torch.round does the same
# but wakes all threads for a few thousand elements.
_ROUND = 1.5 * 2**23
# What the search multiplies the scale that spans the whole range with: a coarse run, and a fine one around its best.
_COARSE = tuple(1.08 - 0.06 * i for i in range(12))
_FINE = (-0.045, -0.03, -0.015, 0.015, 0.03, 0.045)
_CHUNK = 1 << 17  # weights whose scales are searched in one go: half a MiB stays in a core's cache


@dataclass(frozen=True)
class Steps:
    """scale, zero: (N,) float32, scale exact in `dtype`; low, high: least and largest value of code - zero."""

    scale: Tensor
    zero: Tensor
    low: Tensor | float
    high: Tensor | float
    dtype: torch.dtype

    def nearest(self, weight: Tensor, axes: int = 0) -> Tensor:
        """The nearest values; weight (N,), or with axes=1 (N, S), is overwritten."""
        scale, low, high = (_raised(part, axes) for part in (self.scale, self.low, self.high))
        return _codes(weight, scale, low, high).mul_(scale)


def _raised(part: Tensor | float, axes: int) -> Tensor | float:
    return part[:, None] if axes and isinstance(part, Tensor) else part


def _codes(weight: Tensor, scale: Tensor | float, low: Tensor | float, high: Tensor | float) -> Tensor:
    near = weight.div_(scale).add_(_ROUND).sub_(_ROUND)
    if isinstance(low, Tensor):
        return torch.clamp(near, low, high, out=near)  # type: ignore[arg-type]
    return near.clamp_(low, high)  # type: ignore[arg-type]


class IntegerGrid:
    """Codes 0..2^bits - 1. sym: the zero is 2^(bits - 1); otherwise it is fitted, from `low` up.

    The scale spans the largest magnitude (sym), or the range from the least to the largest value and 0. search: it is
    then shrunk to the least squared error, weighed by importance. Scales are rounded to `dtype` before anything is
    rounded to them. They are above 0, whatever the weights.
    """

    def __init__(
        self, span: int, bits: int, sym: bool = True, *, low: int = 0, search: bool = False,
        dtype: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        if bits not in (2, 3, 4, 8):
            raise InputError(f"bits is {bits}; GPTQ files hold 2, 3, 4 or 8")
        self.span, self.bits, self.sym, self.low, self.search, self.dtype = span, bits, sym, low, search, dtype
        self.top = (1 << bits) - 1

    def fit(self, weight_NS: Tensor, importance_S: Tensor) -> Steps:
        """As Grid.fit."""
        step = max(1, _CHUNK // weight_NS.shape[1])
        found = [self._fit(rows, importance_S) for rows in weight_NS.split(step)]
        scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self._steps(scale, zero)

    def round(self, column_N: Tensor, params: Steps, index: int) -> Tensor:
        """As Grid.round."""
        return params.nearest(column_N)

    def refit(self, values_SN: Tensor, pull_SN: Tensor, own_SS: Tensor, params: Steps) -> tuple[Steps, Tensor]:
        """As Refitting.refit: each row's scale to the least error with its codes kept."""
        codes = values_SN.div(params.scale).round_()
        pulled, stiff = (pull_SN * codes).sum(0), ((own_SS @ codes) * codes).sum(0)
        scale = self._stored(params.scale + torch.where(stiff > 0, pulled / stiff, 0))
        step = scale - params.scale
        scale = torch.where(step * (2 * pulled - step * stiff) > 0, scale, params.scale)
        return self._steps(scale, params.zero), codes.mul_(scale)

    def _steps(self, scale: Tensor, zero: Tensor) -> Steps:
        if self.sym:
            middle = 1 << (self.bits - 1)
            return Steps(scale, zero, float(-middle), float(self.top - middle), self.dtype)
        return Steps(scale, zero, -zero, self.top - zero, self.dtype)

    def _stored(self, scale: Tensor) -> Tensor:
        """Rounded to the dtype of the file, and never to 0 or inf."""
        limits = torch.finfo(self.dtype)
        least = limits.smallest_normal / 16 if self.dtype == torch.float16 else limits.smallest_normal
        return scale.clamp(least, limits.max).to(self.dtype).float()

    def _fit(self, weight_NS: Tensor, importance_S: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero (N,) of a few rows."""
        low, high = weight_NS.aminmax(dim=1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.sym:
            high = torch.maximum(-low, high)
            low = -high
        flat = low == high
        low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
        first = self._spanning(low, high)
        if not self.search:
            return first
        best = _Best(self, weight_NS, importance_S, *first)
        for factor in _COARSE:
            best.offer(*self._spanning(low * factor, high * factor))
        middle = best.scale / first[0]
        for shift in _FINE:
            factor_N = middle + shift
            best.offer(*self._spanning(low * factor_N, high * factor_N))
        best.polish()
        return best.scale, best.zero

    def _spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero (N,) of a range around 0."""
        scale = self._stored((high - low) / self.top)
        if self.sym:
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        zero = (-low / scale).round_()
        # A zero below the least one would clip the upper end: that end then gives the scale.
        scale = torch.where(zero < self.low, self._stored(high / (self.top - self.low)), scale)
        return scale, zero.clamp_(self.low, self.top)


class _Best:
    """The scales and zeros (N,) of the least weighted squared error among those offered."""

    def __init__(self, grid: IntegerGrid, weight_NS: Tensor, importance_S: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.grid, self.weight, self.importance = grid, weight_NS, importance_S
        self.scale, self.zero = scale, zero
        self._work = torch.empty_like(weight_NS)
        self.cost = self._cost(scale, zero)

    def _cost(self, scale: Tensor, zero: Tensor) -> Tensor:
        values = self.grid._steps(scale, zero).nearest(self._work.copy_(self.weight), 1)
        return values.sub_(self.weight).square_() @ self.importance

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        cost = self._cost(scale, zero)
        better = cost < self.cost
        self.cost, self.scale, self.zero = (
            torch.where(better, new, old) for new, old in ((cost, self.cost), (scale, self.scale), (zero, self.zero))
        )

    def polish(self) -> None:
        """Neighbouring zeros; then the scale that fits the codes best, and the codes that fit it."""
        if not self.grid.sym:
            for shift in (-1, 1):
                self.offer(self.scale, (self.zero + shift).clamp_(self.grid.low, self.grid.top))
        for _ in range(2):
            codes = self.grid._steps(self.scale, self.zero).nearest(self._work.copy_(self.weight), 1)
            codes.div_(self.scale[:, None])
            weighed = codes * self.importance
            over, under = (weighed * self.weight).sum(1), (weighed * codes).sum(1)
            self.offer(self.grid._stored(torch.where(under > 0, over / under, self.scale)), self.zero)
