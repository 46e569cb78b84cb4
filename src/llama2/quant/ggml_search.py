"""Scales for the super-blocks of Q4_K, Q5_K and Q6_K: 256 weights in groups with small integer scales.

ggml searches a real scale for each group and then rounds it to the six or eight bits that are stored. Here the search
is coarser, and what is stored is searched too: each group takes the best of the neighbouring integer scales (and
minima), the super-block's factors follow by least squares, and once more the neighbours. For the same time the error is
smaller, most where six bits are coarse. Errors are weighted as ggml weights them, large weights more.

Naming inside: N super-blocks of k groups of e weights; a matrix of groups is (e, N * k), a group to a column, so that
sums over a group add whole rows. d, dm factors (N, 1); s, m integers (N, k), as floats; q codes (e, N * k).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ROUNDS = 2  # of neighbours, with the factors refitted in between


class Groups:
    """The weights x (N, 256) by groups, with their importance `w`. Sums over a group are float64."""

    def __init__(self, x: Tensor, width: int, w: Tensor) -> None:
        self.count, self.width = len(x), width
        self.x, self.w = by_column(x, width), by_column(w, width)
        self.wx = self.w * self.x
        self.sum_w, self.sum_wx = _sum(self.w), _sum(self.wx)
        self.sum_wxx = _sum(self.wx * self.x)

    def per_block(self, x: Tensor) -> Tensor:
        """(N * k,) -> (N, k)."""
        return x.view(self.count, -1)

    def moments(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sums of q, q * q and q * x over each group."""
        wq = self.w * q
        return _sum(wq), _sum(wq.mul_(q)), _sum(self.wx * q)


def by_column(x: Tensor, width: int) -> Tensor:
    """(N, 256) -> (width, N * 256 / width)."""
    return x.reshape(-1, width).T.contiguous()


def by_block(q: Tensor, count: int) -> Tensor:
    """The inverse of `by_column`: (e, N * k) -> (N, 256)."""
    return q.T.reshape(count, -1)


def _sum(x: Tensor) -> Tensor:
    return x.sum(0).double()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / torch.where(x == 0, 1.0, x))


def _halves(x: Tensor) -> Tensor:
    """What is left of a factor when it is stored as float16."""
    return x.half().float()


# -- x ~ d s q - dm m, 0 <= q <= top -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Affine:
    """A fit of scales and minima."""

    d: Tensor
    s: Tensor
    dm: Tensor
    m: Tensor

    def codes(self, groups: Groups, top: int) -> Tensor:
        """The nearest codes, 0 where the scale is 0."""
        shifted = groups.x + (self.dm * self.m).flatten()
        return shifted.mul_(_inverse(self.d * self.s).flatten()).round_().clamp_(0, top)

    def errors(self, groups: Groups, top: int) -> Tensor:
        """Weighted squares (N, k) of what the nearest codes miss."""
        missed = self.codes(groups, top).mul_((self.d * self.s).flatten()).sub_((self.dm * self.m).flatten())
        return groups.per_block(missed.sub_(groups.x).square_().mul_(groups.w).sum(0))


def fit_affine(groups: Groups, top: int, trials: list[float]) -> Affine:
    """The best fit with six-bit scales and minima; `trials`: what is added to `top` codes over a group's span."""
    scale, minimum = map(groups.per_block, _search_affine(groups, top, trials))
    d, dm = (_halves(x.amax(1, keepdim=True) / 63) for x in (scale, minimum))
    s, m = ((x * _inverse(y)).round().clamp(0, 63) for x, y in ((scale, d), (minimum, dm)))
    fit = Affine(d, s, dm, m)
    for left in reversed(range(_ROUNDS)):
        fit = _nearby(groups, fit, top)
        if left:
            fit = _refit_affine(groups, fit, top)
    return fit


def _search_affine(groups: Groups, top: int, trials: list[float]) -> tuple[Tensor, Tensor]:
    """Scale and minimum (both >= 0) of each group: of each trial's codes by linear regression, as make_qkx2_quants."""
    low, high = groups.x.amin(0).clamp(max=0), groups.x.amax(0)
    scale, minimum, best = (high - low) / top, low, torch.full_like(groups.sum_w, torch.inf)
    for trial in trials:
        span = high - minimum
        q = (groups.x - minimum).mul_((trial + top) * _inverse(span)).round_().clamp_(0, top)
        sum_q, sum_qq, sum_qx = groups.moments(q)
        determinant = groups.sum_w * sum_qq - sum_q.square()
        sound = determinant > 0
        safe = torch.where(sound, determinant, 1.0)
        s = (groups.sum_w * sum_qx - groups.sum_wx * sum_q) / safe
        m = (sum_qq * groups.sum_wx - sum_q * sum_qx) / safe
        s, m = torch.where(m > 0, sum_qx / sum_qq.clamp(min=1e-300), s), m.clamp(max=0)
        error = (
            groups.sum_wxx + s * (s * sum_qq - 2 * sum_qx) + m * (m * groups.sum_w + 2 * (s * sum_q - groups.sum_wx))
        )
        better = sound & (error < best)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, s.float(), scale), torch.where(better, m.float(), minimum)
    return scale, -minimum


def _nearby(groups: Groups, fit: Affine, top: int) -> Affine:
    """Each group's best among its scale and minimum and those one above and below."""
    best, least = fit, fit.errors(groups, top)
    for ds in (-1, 0, 1):
        for dm in (-1, 0, 1):
            other = replace(fit, s=(fit.s + ds).clamp(0, 63), m=(fit.m + dm).clamp(0, 63))
            errors = other.errors(groups, top)
            better = errors < least
            least = torch.where(better, errors, least)
            best = replace(best, s=torch.where(better, other.s, best.s), m=torch.where(better, other.m, best.m))
    return best


def _refit_affine(groups: Groups, fit: Affine, top: int) -> Affine:
    """The factors d and dm by least squares for the codes that the fit gives, where that is better."""
    sum_q, sum_qq, sum_qx = map(groups.per_block, groups.moments(fit.codes(groups, top)))
    sum_w, sum_wx = groups.per_block(groups.sum_w), groups.per_block(groups.sum_wx)
    a, b, c, u, v = (
        x.sum(1, keepdim=True)
        for x in (fit.s**2 * sum_qq, fit.s * fit.m * sum_q, fit.m**2 * sum_w, fit.s * sum_qx, fit.m * sum_wx)
    )
    determinant = a * c - b * b
    sound = determinant > 1e-12 * a * c
    safe = torch.where(sound, determinant, 1.0)
    d, dm = (u * c - b * v) / safe, (b * u - a * v) / safe
    sound &= (d > 0) & (dm >= 0)
    other = replace(
        fit,
        d=torch.where(sound, _halves(d), fit.d),
        dm=torch.where(sound, _halves(dm), fit.dm),
    )
    better = other.errors(groups, top).sum(1, keepdim=True) < fit.errors(groups, top).sum(1, keepdim=True)
    return replace(fit, d=torch.where(better, other.d, fit.d), dm=torch.where(better, other.dm, fit.dm))


# -- x ~ d s q, -top <= q < top ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Symmetric:
    """A fit of signed scales."""

    d: Tensor
    s: Tensor

    def codes(self, groups: Groups, top: int) -> Tensor:
        """The nearest codes, 0 where the scale is 0."""
        return (groups.x * _inverse(self.d * self.s).flatten()).round_().clamp_(-top, top - 1)

    def errors(self, groups: Groups, top: int) -> Tensor:
        """Weighted squares (N, k) of what the nearest codes miss."""
        missed = self.codes(groups, top).mul_((self.d * self.s).flatten()).sub_(groups.x)
        return groups.per_block(missed.square_().mul_(groups.w).sum(0))


def fit_symmetric(groups: Groups, top: int, trials: list[float]) -> Symmetric:
    """The best fit with eight-bit scales; `trials`: what is added to the `top` codes of the largest weight."""
    scale = groups.per_block(_search_symmetric(groups, top, trials))
    extreme = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = _halves(extreme / -128)
    fit = Symmetric(d, (scale * _inverse(d)).round().clamp(-128, 127))
    for left in reversed(range(_ROUNDS)):
        best, least = fit, fit.errors(groups, top)
        for ds in (-1, 1):
            other = replace(fit, s=(fit.s + ds).clamp(-128, 127))
            errors = other.errors(groups, top)
            better = errors < least
            least, best = torch.where(better, errors, least), replace(best, s=torch.where(better, other.s, best.s))
        fit = _refit_symmetric(groups, best, top) if left else best
    return fit


def _search_symmetric(groups: Groups, top: int, trials: list[float]) -> Tensor:
    """The scale of each group with the least error of the trials (make_qx_quants)."""
    extreme = groups.x.gather(0, groups.x.abs().argmax(0, keepdim=True)).squeeze(0)
    scale, best = torch.zeros_like(extreme), torch.full_like(groups.sum_w, -1.0)
    for trial in trials:
        q = (groups.x * (-(top + trial) * _inverse(extreme))).round_().clamp_(-top, top - 1)
        _, sum_qq, sum_qx = groups.moments(q)
        gained = sum_qx.square() / sum_qq.clamp(min=1e-300)  # by how much the error falls below that of zeros
        better = (sum_qq > 0) & (gained > best)
        scale = torch.where(better, (sum_qx / sum_qq.clamp(min=1e-300)).float(), scale)
        best = torch.where(better, gained, best)
    return scale


def _refit_symmetric(groups: Groups, fit: Symmetric, top: int) -> Symmetric:
    """The factor d by least squares for the codes that the fit gives, where that is better."""
    _, sum_qq, sum_qx = map(groups.per_block, groups.moments(fit.codes(groups, top)))
    power = (fit.s**2 * sum_qq).sum(1, keepdim=True)
    d = (fit.s * sum_qx).sum(1, keepdim=True) / torch.where(power > 0, power, 1.0)
    other = replace(fit, d=torch.where(power > 0, _halves(d), fit.d))
    better = other.errors(groups, top).sum(1, keepdim=True) < fit.errors(groups, top).sum(1, keepdim=True)
    return replace(fit, d=torch.where(better, other.d, fit.d))
