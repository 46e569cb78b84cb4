"""GGUF's blocks of codebooks: IQ4, IQ3, IQ2, IQ1, TQ and the FP4 types. Each weight is a code of 4 bits into a table of
16 numbers, times a scale of its 16 or 32 columns; every product is exact in float32, in whatever order it is formed.

A decoder here turns blocks (N, bytes) into codes (N, weights) uint8 and scales (N, weights / 16) float32; csrc does the
same (engine/codebooks.cpp). Layouts: ggml-quants.h of llama.cpp. The points of IQ2, IQ3 and IQ1 lie in grids.bin.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_TERNARY = (-1, 0, 1, 2, *(0,) * 12)


def _signed(*magnitudes: float) -> tuple[float, ...]:
    """Bit 3 of a code is the sign."""
    row = (*magnitudes, *(0,) * (8 - len(magnitudes)))
    return (*row, *(-value for value in row))


_IQ1 = (-0.875, 0.125, 1.125, 0, -1.125, -0.125, 0.875, *(0,) * 9)  # -1, 0, 1 plus an eighth; bit 2: less an eighth
_IQ2, _IQ3_XXS = _signed(8, 25, 43), _signed(4, 12, 20, 28, 36, 44, 52, 62)
_IQ3_S = _signed(1, 3, 5, 7, 9, 11, 13, 15)

# In the order of grids.bin: points and their width.
_GRIDS = {
    "IQ2_XXS": (256, 8),
    "IQ2_XS": (512, 8),
    "IQ2_S": (1024, 8),
    "IQ3_XXS": (256, 4),
    "IQ3_S": (512, 4),
    "IQ1_S": (2048, 8),
}
Coded = tuple[Tensor, Tensor]


@cache
def _grid(name: str) -> Tensor:
    data, at = Path(__file__).with_name("grids.bin").read_bytes(), 0
    for other, (rows, width) in _GRIDS.items():
        if other == name:
            return torch.frombuffer(bytearray(data[at : at + rows * width]), dtype=torch.uint8).view(rows, width)
        at += rows * width
    raise AssertionError(name)


def _points(name: str, at: Tensor) -> Tensor:
    """Magnitudes of points: at (N, n) -> (N, n, width)."""
    return _grid(name).to(at.device)[at.long()]


def _half(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.float16).float()


def _shorts(b: Tensor) -> Tensor:
    """(N, 2n) bytes -> (N, n) int32."""
    pairs = b.int().unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 8


def _words(b: Tensor) -> Tensor:
    """(N, 4n) bytes -> (N, n) int64."""
    parts = b.long().unflatten(1, (-1, 4))
    return parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16 | parts[..., 3] << 24


def _halves(b: Tensor, run: int) -> Tensor:
    """(N, n) bytes -> (N, 2n) nibbles: of each run of bytes first the low ones."""
    runs = b.unflatten(1, (-1, run))
    return torch.stack((runs & 15, runs >> 4), dim=2).flatten(1)


def _nibbles(b: Tensor) -> Tensor:
    """(N, n) bytes -> (N, 2n) nibbles, the low one of each byte first."""
    return torch.stack((b & 15, b >> 4), dim=2).flatten(1)


def _bits(x: Tensor, count: int) -> Tensor:
    """(N, n) integers -> (N, n, count) bits, the lowest first."""
    return (x[..., None] >> torch.arange(count, device=x.device)) & 1


def _parity(seven: Tensor) -> Tensor:
    """Seven bits -> eight, with bit 7 the parity of the others: how signs of eight weights are kept."""
    return seven | (_bits(seven, 7).sum(-1) & 1) << 7


def _with_signs(points: Tensor, signs: Tensor) -> Tensor:
    """Codes (N, weights) of magnitudes (N, n, 8) and eight bits of signs (N, n)."""
    return (points.int() | _bits(signs, 8).int() << 3).flatten(1).to(torch.uint8)


def _twice(scales: Tensor) -> Tensor:
    """Scales of 32 columns as scales of 16."""
    return scales.repeat_interleave(2, 1)


def _iq4_nl(b: Tensor) -> Coded:
    return _halves(b[:, 2:], 16), _twice(_half(b[:, :2]))


def _iq4_xs(b: Tensor) -> Coded:
    low = _nibbles(b[:, 4:8]).int()
    high = (_shorts(b[:, 2:4]) >> 2 * torch.arange(8, device=b.device)) & 3
    return _halves(b[:, 8:], 16), _twice(_half(b[:, :2]) * ((low | high << 4) - 32))


def _iq2_xxs(b: Tensor) -> Coded:
    words = _words(b[:, 2:]).unflatten(1, (8, 2))
    aux = words[..., 1]
    signs = _parity((aux[..., None] >> 7 * torch.arange(4, device=b.device)) & 127).flatten(1)
    at = b[:, 2:].unflatten(1, (8, 8))[..., :4].flatten(1)
    return _with_signs(_points("IQ2_XXS", at), signs), _twice(_half(b[:, :2]) * (0.5 + (aux >> 28)) * 0.25)


def _iq2_xs(b: Tensor) -> Coded:
    q, s = _shorts(b[:, 2:66]), _nibbles(b[:, 66:])
    return _with_signs(_points("IQ2_XS", q & 511), _parity(q >> 9)), _half(b[:, :2]) * (0.5 + s) * 0.25


def _iq2_s(b: Tensor) -> Coded:
    high = (b[:, 66:74, None].int() >> 2 * torch.arange(4, device=b.device)) & 3
    at = b[:, 2:34].int() | high.flatten(1) << 8
    scales = _half(b[:, :2]) * (0.5 + _nibbles(b[:, 74:])) * 0.25
    return _with_signs(_points("IQ2_S", at), b[:, 34:66].int()), scales


def _iq3_xxs(b: Tensor) -> Coded:
    aux = _words(b[:, 66:])
    signs = _parity((aux[..., None] >> 7 * torch.arange(4, device=b.device)) & 127).flatten(1)
    points = _points("IQ3_XXS", b[:, 2:66]).flatten(1).unflatten(1, (-1, 8))
    return _with_signs(points, signs), _twice(_half(b[:, :2]) * (0.5 + (aux >> 28)) * 0.5)


def _iq3_s(b: Tensor) -> Coded:
    at = b[:, 2:66].int() | _bits(b[:, 66:74].int(), 8).flatten(1) << 8
    points = _points("IQ3_S", at).flatten(1).unflatten(1, (-1, 8))
    return _with_signs(points, b[:, 74:106].int()), _twice(_half(b[:, :2]) * (1 + 2 * _nibbles(b[:, 106:]).int()))


def _less(points: Tensor, negative: Tensor) -> Tensor:
    """Codes of IQ1 from points (N, 32, 8) and whether an eighth is subtracted (N, 32)."""
    return (points.int() | negative[..., None].int() << 2).flatten(1).to(torch.uint8)


def _iq1_s(b: Tensor) -> Coded:
    h = _shorts(b[:, 34:])
    high = (h[..., None] >> 3 * torch.arange(4, device=b.device)) & 7
    at = b[:, 2:34].int() | high.flatten(1) << 8
    negative = (h >> 15).repeat_interleave(4, 1)
    return _less(_points("IQ1_S", at), negative), _twice(_half(b[:, :2]) * (2 * ((h >> 12) & 7) + 1))


def _iq1_m(b: Tensor) -> Coded:
    s = _shorts(b[:, 48:])
    bits = (s >> 12 << 4 * torch.arange(4, device=b.device)).sum(1, keepdim=True)
    d = bits.to(torch.int16).view(torch.float16).float()
    h = _nibbles(b[:, 32:48]).int()
    three = (s[..., None] >> 3 * torch.arange(4, device=b.device)) & 7
    return _less(_points("IQ1_S", b[:, :32].int() | (h & 7) << 8), h >> 3), d * (2 * three.flatten(1) + 1)


def _tq1_0(b: Tensor) -> Coded:
    def digits(x: Tensor, count: int) -> Tensor:
        powers = torch.tensor([1, 3, 9, 27, 81][:count], device=b.device)
        return (((x.int()[:, None] * powers[:, None]) & 255) * 3 >> 8).flatten(1)

    codes = torch.cat((digits(b[:, :32], 5), digits(b[:, 32:48], 5), digits(b[:, 48:52], 4)), 1)
    return codes.to(torch.uint8), _half(b[:, 52:]).expand(-1, 16)


def _tq2_0(b: Tensor) -> Coded:
    runs = b[:, :64].unflatten(1, (2, 1, 32))
    shifts = 2 * torch.arange(4, device=b.device, dtype=torch.uint8)
    return ((runs >> shifts[:, None]) & 3).flatten(1), _half(b[:, 64:]).expand(-1, 16)


def _mxfp4(b: Tensor) -> Coded:
    e = b[:, :1].int()
    scale = torch.where(e < 2, 0x00200000 << e, (e - 1) << 23)  # half of 2^(e - 127): the table is doubled
    return _halves(b[:, 1:], 16), _twice(scale.view(torch.float32))


def _nvfp4(b: Tensor) -> Coded:
    byte = b[:, :4].int()
    e, m = byte >> 3 & 15, (byte & 7).float()
    value = torch.where(e == 0, m * 2**-9, (1 + m / 8) * torch.exp2(e.float() - 7)) * 0.5
    return _halves(b[:, 4:], 8), torch.where((byte == 0) | (byte == 0x7F), 0.0, value)


CODED: dict[str, tuple[tuple[float, ...], Callable[[Tensor], Coded]]] = {
    "IQ4_NL": (_IQ4, _iq4_nl),
    "IQ4_XS": (_IQ4, _iq4_xs),
    "IQ2_XXS": (_IQ2, _iq2_xxs),
    "IQ2_XS": (_IQ2, _iq2_xs),
    "IQ2_S": (_IQ2, _iq2_s),
    "IQ3_XXS": (_IQ3_XXS, _iq3_xxs),
    "IQ3_S": (_IQ3_S, _iq3_s),
    "IQ1_S": (_IQ1, _iq1_s),
    "IQ1_M": (_IQ1, _iq1_m),
    "TQ1_0": (_TERNARY, _tq1_0),
    "TQ2_0": (_TERNARY, _tq2_0),
    "MXFP4": (_E2M1_TWICE, _mxfp4),
    "NVFP4": (_E2M1_TWICE, _nvfp4),
}


def decoder(name: str) -> Callable[[Tensor], Tensor]:
    """The decoder of a type: blocks (N, bytes) uint8 -> weights (N, weights) float32."""
    table, coded = CODED[name]

    def decode(blocks: Tensor) -> Tensor:
        codes, scales = coded(blocks)
        values = torch.tensor(table, dtype=torch.float32, device=blocks.device)[codes.int()]
        return values.unflatten(1, (-1, 16)).mul_(scales[..., None]).flatten(1)

    return decode
