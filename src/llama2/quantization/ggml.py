"""GGUF weight blocks: sizes, and dequantisation in torch, bit-equal to ggml's own in float32.

A row of K weights is K / block.weights blocks in a row, so a matrix is a uint8 tensor (rows, row_bytes): rows can be
permuted, sliced and kept packed without being decoded. Layouts: ggml-quants.h of llama.cpp. Bytes are little endian.
Naming inside: N blocks; q integer codes; d a block's scale, m its minimum; both start as float16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2.compiled import kernels, pool
from llama2.errors import CheckpointError, InputError
from llama2.quantization.codebook_blocks import CODED, decoder
from llama2.quantization.formats import BLOCKS, FOREIGN_BLOCKS, Format

# Blocks decoded in one go hold this many weights: the float32 working set (2 MiB) stays near a core's cache.
_CHUNK = 1 << 19


@dataclass(frozen=True)
class BlockType:
    """One ggml type: `weights` values in `bytes` bytes; `decode` turns (N, bytes) uint8 into (N, weights) float32."""

    id: int
    name: str
    weights: int
    bytes: int
    decode: Callable[[Tensor], Tensor]
    dense: torch.dtype | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights; raises CheckpointError when blocks would straddle rows."""
        if columns % self.weights:
            raise CheckpointError(
                f"a row of {columns} weights cannot be stored as {self.name}: its blocks hold {self.weights} weights. "
                "Convert the file again with a type whose block divides the row."
            )
        return columns // self.weights * self.bytes


def block_type(kind: int | str) -> BlockType:
    """The block type with this ggml id or name; raises CheckpointError for one that is not implemented."""
    found = _BY_ID.get(kind) if isinstance(kind, int) else TYPES.get(kind)
    if found is None:
        label = FOREIGN_BLOCKS.get(kind, kind) if isinstance(kind, int) else kind
        raise CheckpointError(
            f"the ggml type {label} is not supported; supported are {', '.join(TYPES)}. "
            "Re-quantise the model to one of them, for example with llama.cpp's llama-quantize."
        )
    return found


def dequantize(rows: Tensor, kind: int | str | BlockType, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights (..., columns) in `dtype` from packed rows (..., row_bytes) of uint8.

    The arithmetic is float32 in ggml's order; `dtype` rounds the result once; the compiled module does the same bit for
    bit (csrc/engine/unpack.cpp), on a CPU for float32 and bfloat16. Dense types (F32, F16, BF16) of the same
    dtype come back as a view of `rows` where its alignment allows that. Raises InputError for rows that are
    not whole blocks.
    """
    block = kind if isinstance(kind, BlockType) else block_type(kind)
    if rows.dtype != torch.uint8 or rows.shape[-1] % block.bytes:
        raise InputError(
            f"packed rows are uint8 with a last axis that is a multiple of {block.bytes} for {block.name}, "
            f"not {rows.dtype} of shape {tuple(rows.shape)}"
        )
    shape = (*rows.shape[:-1], rows.shape[-1] // block.bytes * block.weights)
    if block.dense is not None:
        aligned = rows.storage_offset() % block.bytes == 0 and rows.data_ptr() % block.bytes == 0
        return (rows.contiguous() if aligned else rows.clone()).view(block.dense).to(dtype)
    if rows.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and rows.numel() and kernels():
        filled = torch.empty(shape, dtype=dtype)
        kernels().unpack_blocks(pool(), rows.contiguous().view(-1), block.id, filled.view(-1, shape[-1]))
        return filled
    blocks = rows.reshape(-1, block.bytes)
    out = torch.empty(len(blocks), block.weights, dtype=dtype, device=rows.device)
    step = max(1, _CHUNK // block.weights)
    for start in range(0, len(blocks), step):
        out[start : start + step] = block.decode(blocks[start : start + step])
    return out.view(shape)


def _half(x_Nb: Tensor) -> Tensor:
    """(N, 2k) bytes -> (N, k) float32: float16 fields, which lie on 2-byte borders only."""
    return x_Nb.contiguous().view(torch.float16).float()


def _nibbles(x_Nb: Tensor, run: int) -> Tensor:
    """(N, b) bytes -> (N, 2b) codes: of each run of bytes, first all low nibbles and then all high ones."""
    runs = x_Nb.unflatten(-1, (-1, run))
    return torch.stack((runs & 15, runs >> 4), dim=-2).flatten(1)


def _crumbs(x_Nb: Tensor) -> Tensor:
    """(N, b) bytes -> (N, 4b) two-bit codes: of each run of 32 bytes, all lowest pairs first."""
    runs = x_Nb.unflatten(-1, (-1, 32))
    return torch.stack([(runs >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(1)


def _bit_rows(x_Nb: Tensor) -> Tensor:
    """(N, 32) bytes -> (N, 256) bits: bit 0 of all bytes first, then bit 1, ..."""
    return torch.stack([(x_Nb >> bit) & 1 for bit in range(8)], dim=1).flatten(1)


def _bits(x_Nb: Tensor) -> Tensor:
    """(N, 4) bytes -> (N, 32) bits in little-endian order."""
    return torch.stack([(x_Nb >> bit) & 1 for bit in range(8)], dim=-1).flatten(1)


def _signed(q: Tensor, zero: int) -> Tensor:
    return q.float().sub_(zero) if zero else q.float()


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float().mul_(_half(b[:, :2]))


def _scaled_nibbles(b: Tensor, first: int, zero: int) -> Tensor:
    """(q - zero) * d for the codes that start at byte `first`. Whole blocks are decoded, fields and all, because
    torch is several times faster on contiguous bytes than on runs of 16."""
    d = _half(b[:, :2])
    out = torch.empty(len(b), 2, 16, device=b.device)
    for half, q in enumerate((b & 15, b >> 4)):
        torch.mul(_signed(q, zero)[:, first:], d, out=out[:, half])
    return out.flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _scaled_nibbles(b, 2, zero=8)


def _q4_1(b: Tensor) -> Tensor:
    return _scaled_nibbles(b, 4, zero=0).add_(_half(b[:, 2:4]))


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:], 16) | (_bits(b[:, 2:6]) << 4)
    return _signed(q, 16).mul_(_half(b[:, :2]))


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:], 16) | (_bits(b[:, 4:8]) << 4)
    return q.float().mul_(_half(b[:, :2])).add_(_half(b[:, 2:4]))


def _grouped(q_Nk: Tensor, scale_Ng: Tensor, minimum_Ng: Tensor | None = None) -> Tensor:
    """q * scale - minimum with one scale (and minimum) for each of g equal groups of a super-block."""
    groups = q_Nk.float().unflatten(1, (scale_Ng.shape[1], -1)).mul_(scale_Ng.unsqueeze(-1))
    return (groups if minimum_Ng is None else groups.sub_(minimum_Ng.unsqueeze(-1))).flatten(1)


def _six_bit_pairs(b_N12: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima of six bits: bytes 0-3 and 4-7 hold the first four of each, their top two bits
    and the nibbles of bytes 8-11 the last four."""
    low, mid, high = b_N12.split(4, dim=1)
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=1)
    minima = torch.cat((mid & 63, (high >> 4) | ((mid >> 6) << 4)), dim=1)
    return scales.float(), minima.float()


def _q2_k(b: Tensor) -> Tensor:
    packed, d_dm = b[:, :16], _half(b[:, 80:84])
    return _grouped(_crumbs(b[:, 16:80]), d_dm[:, :1] * (packed & 15), d_dm[:, 1:] * (packed >> 4))


def _q3_k(b: Tensor) -> Tensor:
    # A cleared mask bit subtracts 4. The scales are six bits: 16 nibbles, then their top pairs.
    q = _crumbs(b[:, 32:96]).float().sub_(4).add_(_bit_rows(b[:, :32]), alpha=4)
    packed = b[:, 96:108]
    top = torch.stack([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1).flatten(1)
    scales = _signed(_nibbles(packed[:, :8], 8) | (top << 4), 32)
    return _grouped(q, _half(b[:, 108:]) * scales)


def _q4_k(b: Tensor) -> Tensor:
    d_dm = _half(b[:, :4])
    scales, minima = _six_bit_pairs(b[:, 4:16])
    return _grouped(_nibbles(b[:, 16:], 32), d_dm[:, :1] * scales, d_dm[:, 1:] * minima)


def _q5_k(b: Tensor) -> Tensor:
    d_dm = _half(b[:, :4])
    scales, minima = _six_bit_pairs(b[:, 4:16])
    q = _nibbles(b[:, 48:], 32) | (_bit_rows(b[:, 16:48]) << 4)
    return _grouped(q, d_dm[:, :1] * scales, d_dm[:, 1:] * minima)


def _q6_k(b: Tensor) -> Tensor:
    q = _nibbles(b[:, :128], 64) | (_crumbs(b[:, 128:192]) << 4)
    return _grouped(_signed(q, 32), _half(b[:, 208:]) * b[:, 192:208].view(torch.int8))


def _dense(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda b: b.view(dtype)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
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
    **{name: decoder(name) for name in CODED},
}
_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _type(size: Format) -> BlockType:
    dense = _DENSE.get(size.id)
    decode = _DECODERS[size.id] if dense is None else _dense(dense)
    assert size.ggml is not None
    return BlockType(size.ggml, size.id, size.weights, size.bytes, decode, dense)


TYPES: dict[str, BlockType] = {size.id: _type(size) for size in BLOCKS.values()}
_BY_ID: dict[int | str, BlockType] = {t.id: t for t in TYPES.values()}
