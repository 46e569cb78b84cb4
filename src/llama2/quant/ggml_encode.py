"""Weights -> GGUF blocks, the inverse of `quant.ggml`: the quantisers of llama.cpp (ggml-quants.c) in torch.

Each encoder takes float32 blocks (N, weights) and returns packed bytes (N, bytes). The five plain types give the bits
of gguf.quants.quantize. The K types search as make_qkx2_quants and make_qx_quants do; a later ggml (0.25) chooses other
scales for Q4_K and Q5_K, whose error is 0.5 % and 0.3 % smaller. Naming inside: N blocks, d scale, m minimum, q codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.quant.ggml import BlockType, block_type

_CHUNK = 1 << 19  # weights encoded in one go; the searches hold a dozen copies of them in float32
_TINY = 1e-15  # ggml's bound below which a group counts as zero


def quantize(weights: Tensor, kind: str | BlockType) -> Tensor:
    """Packed rows (..., row_bytes) of uint8 from weights (..., columns).

    Raises InputError for a type without an encoder or weights that are not finite, CheckpointError where blocks would
    straddle rows.
    """
    block = kind if isinstance(kind, BlockType) else block_type(kind)
    row_bytes = block.row_bytes(weights.shape[-1])
    if block.dense is not None:
        return weights.to(block.dense).contiguous().view(torch.uint8)
    if block.name not in ENCODERS:
        raise InputError(f"nothing here writes {block.name}; the types are F32, F16, BF16, {', '.join(ENCODERS)}")
    blocks = weights.reshape(-1, block.weights)
    out = torch.empty(len(blocks), block.bytes, dtype=torch.uint8)
    step = max(1, _CHUNK // block.weights)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step].float()
        if not part.isfinite().all():
            raise InputError(f"the weights hold NaN or infinity, which {block.name} cannot; check the checkpoint")
        out[start : start + step] = ENCODERS[block.name](part)
    return out.view(*weights.shape[:-1], row_bytes)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)


def _bytes(x: Tensor) -> Tensor:
    """Float16 fields (N, k) as bytes (N, 2k)."""
    return x.half().contiguous().view(torch.uint8)


def _pairs_of_nibbles(q: Tensor, run: int) -> Tensor:
    """(N, 2b) codes -> (N, b) bytes: of each 2 * run codes the first run in low nibbles, the second in high ones."""
    low, high = q.unflatten(1, (-1, 2, run)).unbind(2)
    return ((low & 15) | ((high & 15) << 4)).flatten(1)


def _fifth_bits(q: Tensor) -> Tensor:
    """(N, 32) codes -> (N, 4) bytes of their bits 4, little endian."""
    bits = (q >> 4).unflatten(1, (4, 8)).int() << torch.arange(8)
    return bits.sum(-1).to(torch.uint8)


def _extreme(x: Tensor) -> Tensor:
    """The first value of largest magnitude of each block, with its sign."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    size = scaled.abs()
    whole = size.floor()
    q = scaled.sign() * (whole + (2 * (size - whole)).floor())  # half away from zero
    return torch.cat((_bytes(d), q.to(torch.int8).view(torch.uint8)), 1)


def _symmetric(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    d = _extreme(x) / -top
    return d, (x * _inverse(d) + (top + 0.5)).trunc().clamp(0, 2 * top - 1).to(torch.uint8)


def _affine(x: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    low = x.amin(1, keepdim=True)
    d = (x.amax(1, keepdim=True) - low) / top
    return d, low, ((x - low) * _inverse(d) + 0.5).trunc().clamp(0, top).to(torch.uint8)


def _q4_0(x: Tensor) -> Tensor:
    d, q = _symmetric(x, 8)
    return torch.cat((_bytes(d), _pairs_of_nibbles(q, 16)), 1)


def _q4_1(x: Tensor) -> Tensor:
    d, m, q = _affine(x, 15)
    return torch.cat((_bytes(d), _bytes(m), _pairs_of_nibbles(q, 16)), 1)


def _q5_0(x: Tensor) -> Tensor:
    d, q = _symmetric(x, 16)
    return torch.cat((_bytes(d), _fifth_bits(q), _pairs_of_nibbles(q, 16)), 1)


def _q5_1(x: Tensor) -> Tensor:
    d, m, q = _affine(x, 31)
    return torch.cat((_bytes(d), _bytes(m), _fifth_bits(q), _pairs_of_nibbles(q, 16)), 1)


# -- super-blocks ------------------------------------------------------------------------------------------------


def _best_affine(x: Tensor, top: int, first: float, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum (both >= 0, ..., 1) of each group (..., 32): the least weighted squares over `steps` trials.

    Codes of a trial scale are fixed, then scale and minimum follow by linear regression (make_qkx2_quants).
    """
    w = (x.square().mean(-1, keepdim=True)).sqrt() + x.abs()
    sum_w, sum_x = w.sum(-1, keepdim=True), (w * x).sum(-1, keepdim=True)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    span = high - low
    flat = span == 0
    span = torch.where(flat, 1.0, span)

    def codes(trial: float) -> Tensor:
        return ((x - low) * ((trial + top) / span)).round().clamp(0, top)

    scale, minimum = span / top, low
    best = (w * (scale * codes(0.0) + minimum - x).square()).sum(-1, keepdim=True)
    for i in range(steps + 1):
        q = codes(first + 0.1 * i)
        sum_q, sum_qq, sum_qx = ((w * q * other).sum(-1, keepdim=True) for other in (1.0, q, x))
        determinant = sum_w * sum_qq - sum_q.square()
        safe = torch.where(determinant > 0, determinant, 1.0)
        s, m = (sum_w * sum_qx - sum_x * sum_q) / safe, (sum_qq * sum_x - sum_q * sum_qx) / safe
        s = torch.where(m > 0, sum_qx / sum_qq.clamp(min=1e-30), s)
        m = m.clamp(max=0)
        error = (w * (s * q + m - x).square()).sum(-1, keepdim=True)
        better = (determinant > 0) & (error < best)
        scale, minimum, best = (torch.where(better, new, old) for new, old in ((s, scale), (m, minimum), (error, best)))
    return torch.where(flat, 0.0, scale), -torch.where(flat, low, minimum)


def _six_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 8) numbers >= 0 as codes of six bits and their common scale (N, 1)."""
    top = x.amax(1, keepdim=True)
    return (x * torch.where(top > 0, 63 / top, 0.0)).round().clamp(0, 63).to(torch.uint8), top / 63


def _six_bit_bytes(s: Tensor, m: Tensor) -> Tensor:
    low = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    mid = (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6)
    return torch.cat((low, mid, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)), 1)


def _affine_groups(x: Tensor, top: int, first: float, steps: int) -> tuple[Tensor, Tensor]:
    """The 16 bytes of scales, and the codes (N, 256), of 8 groups of 32 with six-bit scales and minima."""
    groups = x.unflatten(1, (8, 32))
    scale, minimum = _best_affine(groups, top, first, steps)
    s, d = _six_bits(scale.squeeze(-1))
    m, dm = _six_bits(minimum.squeeze(-1).clamp(min=0))
    each = (d.half().float() * s).unsqueeze(-1)
    shifted = groups + (dm.half().float() * m).unsqueeze(-1)
    q = (shifted * 1.0 / torch.where(each == 0, 1.0, each)).round().clamp(0, top)
    q = torch.where(each == 0, 0.0, q).to(torch.uint8).flatten(1)
    return torch.cat((_bytes(d), _bytes(dm), _six_bit_bytes(s, m)), 1), q


def _q4_k(x: Tensor) -> Tensor:
    head, q = _affine_groups(x, 15, -1.0, 20)
    return torch.cat((head, _pairs_of_nibbles(q, 32)), 1)


def _q5_k(x: Tensor) -> Tensor:
    head, q = _affine_groups(x, 31, -0.5, 15)
    high = (q >> 4).unflatten(1, (8, 32)).int() << torch.arange(8)[:, None]
    return torch.cat((head, high.sum(1).to(torch.uint8), _pairs_of_nibbles(q, 32)), 1)


def _best_symmetric(x: Tensor, top: int) -> Tensor:
    """The scale (..., 1) of each group with least squares weighted by x * x, over 19 trials (make_qx_quants)."""
    extreme = _extreme(x)
    empty = extreme.abs() < _TINY
    extreme = torch.where(empty, 1.0, extreme)
    scale = best = torch.zeros_like(extreme)
    for i in (0, *range(-9, 0), *range(1, 10)):
        q = (x * (-(top + 0.1 * i) / extreme)).round().clamp(-top, top - 1)
        w = x.square()
        sum_qx, sum_qq = (w * x * q).sum(-1, keepdim=True), (w * q * q).sum(-1, keepdim=True)
        s = torch.where(sum_qq > 0, sum_qx / sum_qq.clamp(min=1e-38), 0.0)
        better = (sum_qq > 0) & (sum_qx.square() > best * sum_qq) if i else torch.ones_like(empty)
        scale, best = torch.where(better, s, scale), torch.where(better, s * sum_qx, best)
    return torch.where(empty, 0.0, scale)


def _q6_k(x: Tensor) -> Tensor:
    groups = x.unflatten(1, (16, 16))
    scale = _best_symmetric(groups, 32).squeeze(-1)
    extreme = _extreme(scale)
    empty = extreme.abs() < _TINY
    inverse = -128 / torch.where(empty, 1.0, extreme)
    d = torch.where(empty, 0.0, 1 / inverse).half()
    s = torch.where(empty, 0.0, (scale * inverse).round().clamp(max=127))
    each = (d.float() * s).unsqueeze(-1)
    q = torch.where(each == 0, 0.0, (groups / torch.where(each == 0, 1.0, each)).round().clamp(-32, 31))
    q = (q + 32).to(torch.uint8).flatten(1)
    quarters = q.unflatten(1, (2, 4, 32))
    low = (quarters[:, :, :2] & 15) | ((quarters[:, :, 2:] & 15) << 4)
    high = ((quarters >> 4).int() << (2 * torch.arange(4))[:, None]).sum(2).to(torch.uint8)
    return torch.cat((low.flatten(1), high.flatten(1), s.to(torch.int8).view(torch.uint8), _bytes(d)), 1)


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
