"""Weights -> GGUF's IQ4 blocks: for every 32 weights the scale and codes of the least weighted error.

A scale is tried for each of some values that the largest weight could take in the table; codes are the nearest, and the
scale is then the one that least squares gives for them. Naming inside: R runs of 32 weights, w what errors count for.
"""

import torch
from torch import Tensor

from llama2.quantization.codebook_blocks import CODED

_TABLE = CODED["IQ4_NL"][0]
IQ4 = ("IQ4_NL", "IQ4_XS")
# What the weight of largest magnitude is tried as, in steps of the table, either end of it.
_TRIES = (*range(-134, -119), *range(106, 121))


def _nearest(x: Tensor) -> Tensor:
    """Codes of the nearest numbers of the table."""
    table = torch.tensor(_TABLE)
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def _scales(x: Tensor, w: Tensor) -> Tensor:
    """The best scale of each run: x (R, 32), w (R, 32) -> (R, 1)."""
    table = torch.tensor(_TABLE)
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    best, found = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for step in _TRIES:
        values = table[_nearest(x * torch.where(extreme == 0, 0.0, step / extreme))]
        along, square = (w * values * x).sum(1, keepdim=True), (w * values * values).sum(1, keepdim=True)
        gain = torch.where(square > 0, along * along / square, 0.0)
        better = gain > best
        best, found = torch.where(better, gain, best), torch.where(better, along / square, found)
    return found


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return _nearest(x * torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))).to(torch.uint8)


def _halves(codes: Tensor) -> Tensor:
    """Codes (R, 32) -> bytes (R, 16): the first half in the low nibbles."""
    return codes[:, :16] | codes[:, 16:] << 4


def encode(name: str, x: Tensor, w: Tensor | None) -> Tensor:
    """Blocks (N, bytes) uint8 of weights (N, weights); w of the same shape, None for the squares of the weights."""
    runs = x.reshape(-1, 32)
    scales = _scales(runs, runs.square() if w is None else w.reshape(-1, 32))
    if name == "IQ4_NL":
        d = scales.half()
        return torch.cat((d.view(torch.uint8), _halves(_codes(runs, d.float()))), 1)
    of_block = scales.view(-1, 8)
    extreme = of_block.gather(1, of_block.abs().argmax(1, keepdim=True))
    d = (-extreme / 32).half()
    inverse = torch.where(d == 0, 0.0, 1 / torch.where(d == 0, 1.0, d.float()))
    levels = (of_block * inverse).round().clamp(-32, 31)
    codes = _codes(runs, (d.float() * levels).view(-1, 1))
    six = (levels + 32).int()
    high = ((six >> 4) << 2 * torch.arange(8)).sum(1, keepdim=True).to(torch.int32)
    pairs = torch.cat((high & 255, high >> 8), 1)
    low = (six[:, 0::2] & 15) | (six[:, 1::2] & 15) << 4
    parts = (d.view(torch.uint8), pairs.to(torch.uint8), low.to(torch.uint8), _halves(codes).view(len(x), -1))
    return torch.cat(parts, 1)
