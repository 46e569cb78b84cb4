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
            "give one number per column, of the layer that it was measured for"
        )
    x = importance.detach().to("cpu", torch.float64)
    if not (x.isfinite().all() and (x >= 0).all()):
        raise InputError("the importance holds NaN, infinity or a negative number; measure it again")
    mean = x.mean()
    return torch.ones(columns) if mean == 0 else (x / mean).clamp(min=_LEAST_IMPORTANCE).float()


def _encode(block: BlockType, layout: Layout | None, x: Tensor, w: Tensor | None) -> Tensor:
    if layout is None:
        return encode(block.name, x, w)
    if w is None and layout.scales is None:
        return _rounding(layout)(block, layout, x)
    weight = _magnitude(x, layout) if w is None else w
    groups = WeightGroups(x, layout.width, weight)
    found = fit(groups, layout, layout.trials)
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


def _rounding(layout: Layout) -> Callable[[BlockType, Layout, Tensor], Tensor]:
    """How ggml rounds a type without super-blocks."""
    if layout.affine:
        return _affine
    return _nearest if layout.low == -layout.high else _symmetric
