"""Codes and parameters -> GGUF blocks: where each bit lies, the inverse of the decoders in `ggml`.

Every type stores value = d * s * q - dm * m: a code q for each weight, integers s and m for each group of `width`
weights, float16 factors d and dm for the block. Types without super-blocks have one group with s = 1 (and m = -1, so
that what is stored, -dm * m, is added). Naming inside: N blocks of k groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.quantization.ggml import BlockType


@dataclass(frozen=True)
class Layout:
    """Value range of a type. Codes run from `low` to `high`, group scales from scales[0] to scales[1] (None: there are
    none), minima from 0 to the same bound; `affine`: whether there is a minimum, free in sign without groups. trials:
    how a group's values are spread in the attempts of the search (`ggml_search.fit`)."""

    width: int
    low: int
    high: int
    trials: tuple[float, ...]
    affine: bool = False
    scales: tuple[int, int] | None = None


LAYOUTS: dict[str, Layout] = {
    "Q8_0": Layout(32, -127, 127, (-127.0, -126.4, -126.7, -127.3, -127.6, -128.0)),
    "Q4_0": Layout(32, -8, 7, (-8.0, -8.9, -8.6, -8.3, -7.7, -7.4, -7.1, 7.0, 7.4, 7.8, 8.2)),
    "Q4_1": Layout(32, 0, 15, (15.0, 14.0, 14.3, 14.6, 14.9, 15.2, 15.5, 15.8), affine=True),
    "Q5_0": Layout(32, -16, 15, (-16.0, -16.8, -16.5, -16.2, -15.8, -15.5, -15.2, 15.0, 15.5, 16.0)),
    "Q5_1": Layout(32, 0, 31, (30.0, 31.0, 30.3, 30.5, 30.8, 31.1, 31.4, 31.7, 32.0), affine=True),
    "Q2_K": Layout(16, 0, 3, (3.0, 2.2, 2.5, 2.8, 3.2, 3.5, 3.8), affine=True, scales=(0, 15)),
    "Q3_K": Layout(16, -4, 3, (-4.0, -4.6, -4.3, -3.7, -3.4, 3.0, 3.4), scales=(-32, 31)),
    "Q4_K": Layout(32, 0, 15, (15.0, 14.0, 14.3, 14.6, 14.9, 15.2, 15.5, 15.8), affine=True, scales=(0, 63)),
    "Q5_K": Layout(32, 0, 31, (30.0, 31.0, 30.5, 30.8, 31.1, 31.4, 31.7, 32.0), affine=True, scales=(0, 63)),
    "Q6_K": Layout(16, -32, 31, (-32.0, -31.1, -31.4, -31.7, -32.3, -32.6, -32.9), scales=(-128, 127)),
}


def layout_of(kind: str) -> Layout:
    """The layout of a type. Raises InputError for one that nothing here writes."""
    if kind not in LAYOUTS:
        raise InputError(
            f"nothing here writes {kind} so; the types are F32, F16, BF16, {', '.join(LAYOUTS)}, without the "
            "solver IQ4_NL and IQ4_XS"
        )
    return LAYOUTS[kind]


@dataclass(frozen=True)
class Fit:
    """Parameters of N blocks: d and dm (N, 1), float32 numbers that float16 holds; s and m (N, k), whole numbers as
    float32. dm and m are None for types without a minimum."""

    d: Tensor
    s: Tensor
    dm: Tensor | None = None
    m: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """(N, k): what a step of the code is worth, as decoders compute it."""
        return self.d * self.s

    @property
    def minimum(self) -> Tensor | None:
        """(N, k): what is subtracted, as decoders compute it."""
        return None if self.dm is None or self.m is None else self.dm * self.m


def pack(block: BlockType, fit: Fit, codes: Tensor) -> Tensor:
    """(N, bytes) uint8 from codes (N, weights), whole numbers from `low` to `high` of the layout."""
    q = (codes - LAYOUTS[block.name].low).to(torch.uint8) if block.name != "Q8_0" else codes.to(torch.int8)
    return _PACKERS[block.name](fit, q)


def _halves(x: Tensor) -> Tensor:
    """(N, 1) numbers -> their float16 bytes (N, 2)."""
    return x.half().view(torch.uint8)


def _integers(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.to(torch.int16)


def _nibbles(q: Tensor, run: int) -> Tensor:
    """Codes (N, n) -> bytes: of each two runs the first lies in the low nibbles, the second in the high ones."""
    low, high = q.unflatten(1, (-1, 2, run)).unbind(2)
    return ((low & 15) | ((high & 15) << 4)).flatten(1)


def _crumbs(q: Tensor) -> Tensor:
    """Codes (N, n) of two bits -> bytes: of each four runs of 32 the first lies in the lowest pair."""
    runs = q.unflatten(1, (-1, 4, 32)).int() << (2 * torch.arange(4))[:, None]
    return runs.sum(2).to(torch.uint8).flatten(1)


def _fifth_bits(q: Tensor) -> Tensor:
    """(N, 32) codes -> (N, 4) bytes of their bits 4, little endian."""
    return ((q >> 4).unflatten(1, (4, 8)).int() << torch.arange(8)).sum(-1).to(torch.uint8)


def _bit_rows(bits: Tensor) -> Tensor:
    """(N, 256) bits -> (N, 32) bytes: the first 32 become bit 0 of all bytes, and so on."""
    return (bits.unflatten(1, (8, 32)).int() << torch.arange(8)[:, None]).sum(1).to(torch.uint8)


def _offset(fit: Fit) -> Tensor:
    assert fit.minimum is not None
    return _halves(-fit.minimum)


def _q8_0(fit: Fit, q: Tensor) -> Tensor:
    return torch.cat((_halves(fit.d), q.view(torch.uint8)), 1)


def _q4_0(fit: Fit, q: Tensor) -> Tensor:
    return torch.cat((_halves(fit.d), _nibbles(q, 16)), 1)


def _q4_1(fit: Fit, q: Tensor) -> Tensor:
    return torch.cat((_halves(fit.d), _offset(fit), _nibbles(q, 16)), 1)


def _q5_0(fit: Fit, q: Tensor) -> Tensor:
    return torch.cat((_halves(fit.d), _fifth_bits(q), _nibbles(q, 16)), 1)


def _q5_1(fit: Fit, q: Tensor) -> Tensor:
    return torch.cat((_halves(fit.d), _offset(fit), _fifth_bits(q), _nibbles(q, 16)), 1)


def _factors(fit: Fit) -> tuple[Tensor, Tensor]:
    assert fit.dm is not None
    return _halves(fit.d), _halves(fit.dm)


def _q2_k(fit: Fit, q: Tensor) -> Tensor:
    scales = (_integers(fit.s) | (_integers(fit.m) << 4)).to(torch.uint8)
    return torch.cat((scales, _crumbs(q), *_factors(fit)), 1)


def _q3_k(fit: Fit, q: Tensor) -> Tensor:
    s = _integers(fit.s) + 32
    nibbles = (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4)
    tops = ((s >> 4).unflatten(1, (4, 4)) << (2 * torch.arange(4))[:, None]).sum(1)
    scales = torch.cat((nibbles, tops), 1).to(torch.uint8)
    return torch.cat((_bit_rows(q >> 2), _crumbs(q & 3), scales, _halves(fit.d)), 1)


def _six_bit_pairs(fit: Fit) -> Tensor:
    """8 scales and 8 minima of six bits -> 12 bytes, as ggml._six_bit_pairs reads them."""
    s, m = _integers(fit.s), _integers(fit.m)
    low = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    mid = (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6)
    return torch.cat((low, mid, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)), 1).to(torch.uint8)


def _q4_k(fit: Fit, q: Tensor) -> Tensor:
    return torch.cat((*_factors(fit), _six_bit_pairs(fit), _nibbles(q, 32)), 1)


def _q5_k(fit: Fit, q: Tensor) -> Tensor:
    return torch.cat((*_factors(fit), _six_bit_pairs(fit), _bit_rows(q >> 4), _nibbles(q, 32)), 1)


def _q6_k(fit: Fit, q: Tensor) -> Tensor:
    scales = fit.s.to(torch.int8).view(torch.uint8)
    return torch.cat((_nibbles(q & 15, 64), _crumbs(q >> 4), scales, _halves(fit.d)), 1)


_PACKERS: dict[str, Callable[[Fit, Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
