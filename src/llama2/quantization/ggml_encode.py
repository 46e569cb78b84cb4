"""Weights -> GGUF blocks, the inverse of `quant.ggml`.

Without importance the five plain types give the bits of gguf.quants.quantize and of ggml, and the K types choose their
scales by `ggml_search`, weighted as ggml does without an importance matrix. With it every type minimises the sum of
importance[column] * (weight - stored)^2.
Naming inside: N blocks, d scale, m minimum, q codes, w importance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.quantization.codebook_encode import IQ4, encode
from llama2.quantization.ggml import BlockType, block_type
from llama2.quantization.ggml_pack import LAYOUTS, Fit, Layout, layout_of, pack
from llama2.quantization.ggml_search import WeightGroups, by_block, fit

_CHUNK = 1 << 19  # weights encoded in one go; the searches hold a dozen copies of them in float32
# No column counts for less than this part of the mean: the calibration text is a sample.
_LEAST_IMPORTANCE = 1e-4

ENCODERS = (*LAYOUTS, *IQ4)
# How a group's values are spread in the attempts of the search (`ggml_search.fit`).
_K_TRIALS: dict[str, tuple[float, ...]] = {
    "Q2_K": (3.0, 2.2, 2.5, 2.8, 3.2, 3.5, 3.8),
    "Q3_K": (-4.0, -4.6, -4.3, -3.7, -3.4, 3.0, 3.4),
    "Q4_K": (15.0, 14.0, 14.3, 14.6, 14.9, 15.2, 15.5, 15.8),
    "Q5_K": (30.0, 31.0, 30.5, 30.8, 31.1, 31.4, 31.7, 32.0),
    "Q6_K": (-32.0, -31.1, -31.4, -31.7, -32.3, -32.6, -32.9),
}
TRIALS: dict[str, tuple[float, ...]] = _K_TRIALS | {
    "Q8_0": (-127.0, -126.4, -126.7, -127.3, -127.6, -128.0),
    "Q4_0": (-8.0, -8.9, -8.6, -8.3, -7.7, -7.4, -7.1, 7.0, 7.4, 7.8, 8.2),
    "Q5_0": (-16.0, -16.8, -16.5, -16.2, -15.8, -15.5, -15.2, 15.0, 15.5, 16.0),
    "Q4_1": (15.0, 14.0, 14.3, 14.6, 14.9, 15.2, 15.5, 15.8),
    "Q5_1": (30.0, 31.0, 30.3, 30.5, 30.8, 31.1, 31.4, 31.7, 32.0),
}


def quantize(weights: Tensor, kind: str | BlockType, importance: Tensor | None = None) -> Tensor:
    """Packed rows (..., row_bytes) of uint8 from weights (..., columns).

    importance (columns,): what the square of an error in that column counts for, such as the mean square of the input
    that multiplies it. Raises InputError for a type without an encoder, weights that are not finite or an importance
    of another shape, negative or not finite; CheckpointError where blocks would straddle rows.
    """
    block = kind if isinstance(kind, BlockType) else block_type(kind)
    row_bytes = block.row_bytes(weights.shape[-1])
    if block.dense is not None:
        return weights.to(block.dense).contiguous().view(torch.uint8)
    layout = None if block.name in IQ4 else layout_of(block.name)
    per_column = None if importance is None else usable(importance, weights.shape[-1])
    rows = weights.reshape(-1, weights.shape[-1])
    out = torch.empty(len(rows), row_bytes, dtype=torch.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        x = rows[start : start + step].float()
        if not x.isfinite().all():
            raise InputError(f"the weights hold NaN or infinity, which {block.name} cannot; check the checkpoint")
        w = None if per_column is None else per_column.expand(len(x), -1).reshape(-1, block.weights)
        out[start : start + step] = _encode(block, layout, x.reshape(-1, block.weights), w).view(len(x), row_bytes)
    return out.view(*weights.shape[:-1], row_bytes)


def usable(importance: Tensor, columns: int) -> Tensor:
    """Importance with mean 1 in float32, no column of it negligible; all ones where nothing was measured. Raises
    InputError for another shape and for values that are negative or not finite."""
    if importance.shape != (columns,):
        raise InputError(
            f"the importance has shape {tuple(importance.shape)}, but the weights have {columns} columns; "
            "give one number a column, of the layer that it was measured for"
        )
    x = importance.detach().to("cpu", torch.float64)
    if not (x.isfinite().all() and (x >= 0).all()):
        raise InputError("the importance holds NaN, infinity or a negative number; measure it again")
    mean = x.mean()
    return torch.ones(columns) if mean == 0 else (x / mean).clamp(min=_LEAST_IMPORTANCE).float()


def _encode(block: BlockType, layout: Layout | None, x: Tensor, w: Tensor | None) -> Tensor:
    if layout is None:
        return encode(block.name, x, w)
    if w is None and block.name in _PLAIN:
        return _PLAIN[block.name](block, layout, x)
    weight = _magnitude(x, layout) if w is None else w
    groups = WeightGroups(x, layout.width, weight)
    found = fit(groups, layout, TRIALS[block.name])
    return pack(block, found, by_block(groups.codes(found, layout), len(x)))


def _magnitude(x: Tensor, layout: Layout) -> Tensor:
    """ggml's weight of an error without an importance matrix: the square of the weight, or for types with a minimum
    the group's root mean square plus the magnitude."""
    if not layout.affine:
        return x.square()
    size = x.unflatten(1, (-1, layout.width)).abs()
    return (size + size.square().mean(-1, keepdim=True).sqrt()).flatten(1)


# -- the plain types, as ggml rounds them -----------------------------------------------------------------------------


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)


def _nearest(block: BlockType, _layout: Layout, x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    size = scaled.abs()
    whole = size.floor()
    q = scaled.sign() * (whole + (2 * (size - whole)).floor())  # half away from zero
    return pack(block, Fit(d, torch.ones_like(d)), q)


def _symmetric(block: BlockType, layout: Layout, x: Tensor) -> Tensor:
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # the first of largest magnitude, with its sign
    d = extreme / layout.low
    q = (x * _inverse(d) + (0.5 - layout.low)).trunc().clamp(0, 2 * layout.high + 1)
    return pack(block, Fit(d, torch.ones_like(d)), q + layout.low)


def _affine(block: BlockType, layout: Layout, x: Tensor) -> Tensor:
    low = x.amin(1, keepdim=True)
    d = (x.amax(1, keepdim=True) - low) / layout.high
    q = ((x - low) * _inverse(d) + 0.5).trunc().clamp(0, layout.high)
    return pack(block, Fit(d, torch.ones_like(d), low, -torch.ones_like(d)), q)


_PLAIN: dict[str, Callable[[BlockType, Layout, Tensor], Tensor]] = {
    "Q8_0": _nearest,
    "Q4_0": _symmetric,
    "Q4_1": _affine,
    "Q5_0": _symmetric,
    "Q5_1": _affine,
}
