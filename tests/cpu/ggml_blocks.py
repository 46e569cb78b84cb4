"""Random GGUF blocks and their values, written from the format's description alone (an oracle of our own)."""

from __future__ import annotations

import numpy as np

TYPES: dict[str, tuple[int, int, int]] = {  # name -> GGUF type, columns and bytes of a block
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}  # offsets of float16 fields


def random_blocks(name: str, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes of a row]: random bytes with sane float16 scales."""
    _, width, size = TYPES[name]
    raw = rng.integers(0, 256, (rows, cols // width, size), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        scale = (rng.random((rows, cols // width)) * 0.02 + 0.001).astype(np.float16)
        raw[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    return np.ascontiguousarray(raw.reshape(rows, -1))


def _half(raw: np.ndarray, at: int) -> np.ndarray:
    return raw[..., at : at + 2].copy().view(np.float16).astype(np.float64)


def _nibbles(qs: np.ndarray) -> np.ndarray:
    return np.concatenate([qs & 15, qs >> 4], axis=-1).astype(np.float64)


def _high_bits(qh: np.ndarray) -> np.ndarray:
    word = qh.copy().view("<u4")[..., 0]
    return np.stack([(word >> k) & 1 for k in range(32)], axis=-1).astype(np.float64)


def _six_bit(s: np.ndarray, g: int) -> tuple[np.ndarray, np.ndarray]:
    if g < 4:
        return s[..., g] & 63, s[..., g + 4] & 63
    return (s[..., g + 4] & 15) | ((s[..., g - 4] >> 6) << 4), (s[..., g + 4] >> 4) | ((s[..., g] >> 6) << 4)


def _k45(raw: np.ndarray, five: bool) -> np.ndarray:
    out = []
    d, lowest, scales = _half(raw, 0), _half(raw, 2), raw[..., 4:16]
    high, low = raw[..., 16:48], raw[..., 48 if five else 16 :]
    for g in range(8):
        byte = low[..., 32 * (g // 2) : 32 * (g // 2) + 32]
        q = (byte >> 4 if g % 2 else byte & 15).astype(np.float64)
        if five:
            q = q + 16 * ((high >> g) & 1)
        sc, m = _six_bit(scales, g)
        out.append(d * sc[..., None] * q - lowest * m[..., None])
    return np.concatenate(out, axis=-1)


def _k6(raw: np.ndarray) -> np.ndarray:
    out, d = [], _half(raw, 208)
    scales = raw[..., 192:208].view(np.int8).astype(np.float64)
    for k in range(256):
        n, part, i = k // 128, k % 128 // 32, k % 32
        byte = raw[..., 64 * n + i + 32 * (part & 1)]
        low = byte & 15 if part < 2 else byte >> 4
        q = (low | (((raw[..., 128 + 32 * n + i] >> (2 * part)) & 3) << 4)).astype(np.float64) - 32
        out.append(d[..., 0] * scales[..., k // 16] * q)
    return np.stack(out, axis=-1)


def dequantize(name: str, raw: np.ndarray) -> np.ndarray:
    """float64 [rows, cols] of blocks [rows, bytes of a row]."""
    b = raw.reshape(raw.shape[0], -1, TYPES[name][2])
    if name == "Q4_0":
        w = _half(b, 0) * (_nibbles(b[..., 2:]) - 8)
    elif name == "Q4_1":
        w = _half(b, 0) * _nibbles(b[..., 4:]) + _half(b, 2)
    elif name == "Q5_0":
        w = _half(b, 0) * (_nibbles(b[..., 6:]) + 16 * _high_bits(b[..., 2:6]) - 16)
    elif name == "Q5_1":
        w = _half(b, 0) * (_nibbles(b[..., 8:]) + 16 * _high_bits(b[..., 4:8])) + _half(b, 2)
    elif name == "Q8_0":
        w = _half(b, 0) * b[..., 2:].view(np.int8).astype(np.float64)
    elif name == "Q6_K":
        w = _k6(b)
    else:
        w = _k45(b, name == "Q5_K")
    return w.reshape(raw.shape[0], -1)
