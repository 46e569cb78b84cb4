"""Parameters for GGUF blocks: the scales, and minima, with the least weighted error that a type can store.

ggml searches a real scale for each group of weights and then rounds it to what is stored: float16, or six or eight bits
under float16 factors. Here the search is coarser, and what is stored is searched too. Within super-blocks each group
takes the best of the neighbouring integer scales (and minima), the block's factors follow by least squares, and
once more the neighbours. For the same time the error is smaller, most where six bits are coarse.

Naming inside: N blocks of k groups of e weights; a matrix of groups is (e, N * k), a group to a column, so that
sums over a group add whole rows. d, dm factors (N, 1); s, m integers (N, k), as floats; q codes (e, N * k).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llama2.quantization.ggml_pack import Fit, Layout

_ROUNDS = 2  # of neighbours, with the factors refitted in between
_REFITS = 3  # of codes and factors in turn, for types without groups


class WeightGroups:
    """The weights x (N, k * e) by groups, with the importance `w` of each. Sums over a group are float64."""

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

    def codes(self, fit: Fit, layout: Layout) -> Tensor:
        """The nearest codes, 0 (or what is nearest to it) where the scale is 0."""
        x = self.x if fit.minimum is None else self.x + fit.minimum.flatten()
        return (x * _inverse(fit.scale).flatten()).round_().clamp_(layout.low, layout.high)

    def errors(self, fit: Fit, layout: Layout) -> Tensor:
        """Weighted squares (N, k) of what the nearest codes miss."""
        missed = self.codes(fit, layout).mul_(fit.scale.flatten())
        if fit.minimum is not None:
            missed.sub_(fit.minimum.flatten())
        return self.per_block(missed.sub_(self.x).square_().mul_(self.w).sum(0))


def by_column(x: Tensor, width: int) -> Tensor:
    """(N, k * e) -> (e, N * k)."""
    return x.reshape(-1, width).T.contiguous()


def by_block(q: Tensor, count: int) -> Tensor:
    """The inverse of `by_column`: (e, N * k) -> (N, k * e)."""
    return q.T.reshape(count, -1)


def _sum(x: Tensor) -> Tensor:
    return x.sum(0).double()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / torch.where(x == 0, 1.0, x))


def half(x: Tensor) -> Tensor:
    """Rounds a factor to float16."""
    return x.clamp(-65504, 65504).half().float()


def fit(groups: WeightGroups, layout: Layout, trials: Sequence[float]) -> Fit:
    """The best parameters found. `trials`: over how many codes a group's values are spread, one attempt each; without
    a minimum, to which code the value of largest magnitude goes."""
    search = _search_affine if layout.affine else _search_symmetric
    found = search(groups, layout, trials)
    if layout.scales is None:
        for _ in range(_REFITS):
            found = _refit(groups, found, layout)
        return found
    for left in reversed(range(_ROUNDS)):
        found = nearby(groups, found, layout)
        if left:
            found = _refit(groups, found, layout)
    return found


def _search_affine(groups: WeightGroups, layout: Layout, trials: Sequence[float]) -> Fit:
    """Of each trial's codes by linear regression, as make_qkx3_quants; the next trial starts at the best minimum."""
    low, high, bound = groups.x.amin(0), groups.x.amax(0), layout.scales
    if bound is not None:
        low = low.clamp(max=0)
    scale, minimum, best = (high - low) / layout.high, low, torch.full_like(groups.sum_w, torch.inf)
    for trial in trials:
        q = (groups.x - minimum).mul_(trial * _inverse(high - minimum)).round_().clamp_(0, layout.high)
        sum_q, sum_qq, sum_qx = groups.moments(q)
        determinant = groups.sum_w * sum_qq - sum_q.square()
        sound = determinant > 0
        safe = torch.where(sound, determinant, 1.0)
        s = (groups.sum_w * sum_qx - groups.sum_wx * sum_q) / safe
        m = (sum_qq * groups.sum_wx - sum_q * sum_qx) / safe
        if bound is not None:
            s, m = torch.where(m > 0, sum_qx / sum_qq.clamp(min=1e-300), s), m.clamp(max=0)
        error = (
            groups.sum_wxx + s * (s * sum_qq - 2 * sum_qx) + m * (m * groups.sum_w + 2 * (s * sum_q - groups.sum_wx))
        )
        better = sound & (error < best)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, s.float(), scale), torch.where(better, m.float(), minimum)
    scale, minimum = groups.per_block(scale), groups.per_block(-minimum)
    if bound is None:
        return Fit(half(scale), torch.ones_like(scale), half(-minimum), -torch.ones_like(scale))
    d, dm = (half(x.amax(1, keepdim=True) / bound[1]) for x in (scale, minimum))
    s, m = ((x * _inverse(y)).round().clamp(*bound) for x, y in ((scale, d), (minimum, dm)))
    return Fit(d, s, dm, m)


def _search_symmetric(groups: WeightGroups, layout: Layout, trials: Sequence[float]) -> Fit:
    """The scale of each group by least squares for the codes of each trial (make_qx_quants)."""
    extreme = groups.x.gather(0, groups.x.abs().argmax(0, keepdim=True)).squeeze(0)
    scale, best = torch.zeros_like(extreme), torch.full_like(groups.sum_w, -1.0)
    for trial in trials:
        q = (groups.x * (trial * _inverse(extreme))).round_().clamp_(layout.low, layout.high)
        _, sum_qq, sum_qx = groups.moments(q)
        gained = sum_qx.square() / sum_qq.clamp(min=1e-300)  # by how much the error falls below that of zeros
        better = (sum_qq > 0) & (gained > best)
        scale = torch.where(better, (sum_qx / sum_qq.clamp(min=1e-300)).float(), scale)
        best = torch.where(better, gained, best)
    scale = groups.per_block(scale)
    if layout.scales is None:
        return Fit(half(scale), torch.ones_like(scale))
    widest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = half(widest / layout.scales[0])
    return Fit(d, (scale * _inverse(d)).round().clamp(*layout.scales))


def nearby(groups: WeightGroups, start: Fit, layout: Layout) -> Fit:
    """Each group's best among its scale and minimum and those one above and below."""
    assert layout.scales is not None
    best, least = start, groups.errors(start, layout)
    for ds in (-1, 0, 1):
        s = (start.s + ds).clamp(*layout.scales)
        for dm in (-1, 0, 1) if layout.affine else (0,):
            if ds == dm == 0:
                continue
            m = None if start.m is None else (start.m + dm).clamp(*layout.scales)
            errors = groups.errors(replace(start, s=s, m=m), layout)
            better = errors < least
            least = torch.where(better, errors, least)
            best = replace(
                best,
                s=torch.where(better, s, best.s),
                m=None if m is None or best.m is None else torch.where(better, m, best.m),
            )
    return best


def _refit(groups: WeightGroups, start: Fit, layout: Layout) -> Fit:
    """The factors by least squares for the codes that the fit gives, where that is better."""
    moments = groups.moments(groups.codes(start, layout))
    other = _factors(groups, start, layout, *map(groups.per_block, moments))
    better = groups.errors(other, layout).sum(1, keepdim=True) < groups.errors(start, layout).sum(1, keepdim=True)
    dm = None if start.dm is None or other.dm is None else torch.where(better, other.dm, start.dm)
    return replace(start, d=torch.where(better, other.d, start.d), dm=dm)


def _factors(groups: WeightGroups, start: Fit, layout: Layout, sum_q: Tensor, sum_qq: Tensor, sum_qx: Tensor) -> Fit:
    """d (and dm) by least squares over each block, from the moments (N, k) of its groups; as they are where that is
    not sound."""
    power, gain = ((x).sum(1, keepdim=True) for x in (start.s**2 * sum_qq, start.s * sum_qx))
    if start.m is None or start.dm is None:
        d = gain / torch.where(power > 0, power, 1.0)
        return replace(start, d=torch.where(power > 0, half(d), start.d))
    sum_w, sum_wx = groups.per_block(groups.sum_w), groups.per_block(groups.sum_wx)
    cross, square, pull = (
        x.sum(1, keepdim=True) for x in (start.s * start.m * sum_q, start.m**2 * sum_w, start.m * sum_wx)
    )
    determinant = power * square - cross * cross
    sound = determinant > 1e-12 * power * square
    safe = torch.where(sound, determinant, 1.0)
    d, dm = (gain * square - cross * pull) / safe, (cross * gain - power * pull) / safe
    if layout.scales is not None:
        sound &= (d > 0) & (dm >= 0)
    return replace(
        start,
        d=torch.where(sound, half(d), start.d),
        dm=torch.where(sound, half(dm), start.dm),
    )
