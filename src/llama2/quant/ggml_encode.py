"""Weights -> GGUF blocks, the inverse of `quant.ggml`: the quantisers of llama.cpp (ggml-quants.c) in torch.

Each encoder takes float32 blocks (N, weights) and returns packed bytes (N, bytes). The five plain types give the bits
of gguf.quants.quantize; the K types choose their scales by `ggml_search`, with a smaller error than ggml's.
Naming inside: N blocks, d scale, m minimum, q codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.quant.ggml import BlockType, block_type
from llama2.quant.ggml_search import Groups, by_block, fit_affine, fit_symmetric

_CHUNK = 1 << 19  # weights encoded in one go; the searches hold a dozen copies of them in float32


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


def _six_bit_bytes(s: Tensor, m: Tensor) -> Tensor:
    low = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    mid = (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6)
    return torch.cat((low, mid, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)), 1)


def _affine_groups(x: Tensor, top: int, trials: list[float]) -> tuple[Tensor, Tensor]:
    """The 16 bytes of scales, and the codes (N, 256), of 8 groups of 32 with six-bit scales and minima."""
    groups = Groups(x, 32, _importance(x))
    fit = fit_affine(groups, top, trials)
    head = torch.cat((_bytes(fit.d), _bytes(fit.dm), _six_bit_bytes(fit.s.to(torch.uint8), fit.m.to(torch.uint8))), 1)
    return head, by_block(fit.codes(groups, top).to(torch.uint8), len(x))


def _importance(x: Tensor) -> Tensor:
    """ggml's weight of an error without an importance matrix: the group's root mean square plus the magnitude."""
    size = x.unflatten(1, (8, 32)).abs()
    return (size + size.square().mean(-1, keepdim=True).sqrt()).flatten(1)


def _q4_k(x: Tensor) -> Tensor:
    head, q = _affine_groups(x, 15, [0.0, -1.0, -0.7, -0.4, -0.1, 0.2, 0.5, 0.8])
    return torch.cat((head, _pairs_of_nibbles(q, 32)), 1)


def _q5_k(x: Tensor) -> Tensor:
    head, q = _affine_groups(x, 31, [0.0, -0.5, -0.2, 0.1, 0.4, 0.7, 1.0])
    high = (q >> 4).unflatten(1, (8, 32)).int() << torch.arange(8)[:, None]
    return torch.cat((head, high.sum(1).to(torch.uint8), _pairs_of_nibbles(q, 32)), 1)


def _q6_k(x: Tensor) -> Tensor:
    groups = Groups(x, 16, x.square())
    fit = fit_symmetric(groups, 32, [0.0, -0.9, -0.6, -0.3, 0.3, 0.6, 0.9])
    q = by_block((fit.codes(groups, 32) + 32).to(torch.uint8), len(x))
    quarters = q.unflatten(1, (2, 4, 32))
    low = (quarters[:, :, :2] & 15) | ((quarters[:, :, 2:] & 15) << 4)
    high = ((quarters >> 4).int() << (2 * torch.arange(4))[:, None]).sum(2).to(torch.uint8)
    return torch.cat((low.flatten(1), high.flatten(1), fit.s.to(torch.int8).view(torch.uint8), _bytes(fit.d)), 1)


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
