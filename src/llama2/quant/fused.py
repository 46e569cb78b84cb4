"""Packed weights on a GPU: what `fused_kernels` does for the tensors of one layer, in Triton.

Each class is one format. `unpack` gives W (N, K) with the values of the layer's `dequantize`; `product` gives x W^T of
up to 16 rows of x without writing W, and is there where `multiplies` says so. float32, float16 and bfloat16.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2.quant import fused_kernels as kernels
from llama2.quant.codebooks import FP4, NF4

_TABLES = {"nf4": NF4, "fp4": FP4}
_ONES = {2: 0x55555555, 3: 0, 4: 0x11111111, 8: 0x01010101}  # what v1 leaves out of a word of zeros
_UNIT = 0x4B000000  # the bits of 2^23 in float32
_PAIR = {torch.float32: torch.int64, torch.float16: torch.int32, torch.bfloat16: torch.int32}
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Tile(NamedTuple):
    """What one program of a product reads at a time: rows of W, spans (or bytes) of K; and its warps."""

    rows: int
    spans: int
    warps: int = 4


# By kernel. `bench/gpu.py --tiles` times others.
TILES = {
    "blocks_row": Tile(8, 16),
    "blocks_rows": Tile(16, 4),
    "groups_row": Tile(128, 1),
    "groups_rows": Tile(64, 1),
    "bytes_row": Tile(8, 512),
    "bytes_rows": Tile(16, 256),
}
PROGRAMS = 512  # that a product is divided into at least, where K is long enough: 4 for each processor of an H100
PARTS = 16  # of K at most; a power of two


@dataclass(frozen=True)
class Blocks:
    """NF4 and FP4: two codes a byte (N K / 2,), scales of blocks of W taken as one run."""

    shape: tuple[int, int]
    kind: str
    block: int
    codes: Tensor
    absmax: Tensor
    nested_map: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested: int = 0
    offset: float = 0.0

    @property
    def multiplies(self) -> bool:
        """Whether rows of W are whole spans of whole bytes."""
        return self.shape[1] % self._span == 0

    @property
    def _span(self) -> int:
        return min(self.block, 64)

    @property
    def _scales(self) -> tuple[Any, ...]:
        unused = self.absmax
        return (
            self.codes,
            _table(self.kind, self.codes.device),
            self.absmax,
            unused if self.nested_map is None else self.nested_map,
            unused if self.nested_absmax is None else self.nested_absmax,
            self.offset,
        )

    @property
    def _settings(self) -> dict[str, int]:
        return {"SPAN": self._span, "PER_BLOCK": self.block // self._span, "NESTED": self.nested}

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """W (N, K)."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        spans = 2048 // self._span
        grid = (triton.cdiv(out.numel(), spans * self._span),)
        with torch.cuda.device_of(out):
            # Products and sums round one by one, as in torch.
            kernels.unpack_blocks[grid](
                *self._scales,
                out,
                out.numel(),
                self.codes.numel(),
                **self._settings,
                SPANS=spans,
                num_warps=4,
                enable_fp_fusion=False,
            )
        return out

    def product(self, x: Tensor) -> Tensor:
        """x (M, K) W^T."""
        (rows, columns), spans = self.shape, self.shape[1] // self._span
        pairs = _pairs(x)

        def launch(kernel: Any, grid: tuple[int, int], out: Tensor, share: int, tile: Tile, **more: Any) -> None:
            asm = _LOOKUP if x.is_cuda and x.dtype != torch.float32 else ""
            fixed = {**self._settings, "ASM": asm, "DTYPE": DTYPES[x.dtype]}
            fixed |= {"BLOCK_N": tile.rows, "SPANS": tile.spans}
            kernel[grid](pairs, *self._scales, out, rows, columns // 2, spans, share, **fixed, **more)

        return _split("blocks", x, rows, spans, launch)


@dataclass(frozen=True)
class Groups:
    """GPTQ. ordered: g_idx is k // group_size."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    v1: bool
    ordered: bool
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    @property
    def multiplies(self) -> bool:
        """Whether the codes have four bits."""
        return self.bits == 4

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.qweight, self.qzeros, self.scales, self.g_idx

    @property
    def _zeros(self) -> dict[str, Any]:
        return {"ADD": _ONES[self.bits] if self.v1 else 0, "V1": self.v1}

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """W (N, K)."""
        rows, columns = self.shape
        out = torch.empty(self.shape, dtype=dtype, device=self.qweight.device)
        grid = (triton.cdiv(columns, 64), triton.cdiv(rows, 64))
        with torch.cuda.device_of(out):
            kernels.unpack_groups[grid](
                *self._tensors, out, rows, columns, BITS=self.bits, **self._zeros, BLOCK_K=64, BLOCK_N=64, num_warps=4
            )
        return out

    def product(self, x: Tensor) -> Tensor:
        """x (M, K) W^T."""
        rows, columns = self.shape
        width = min(self.group_size & -self.group_size, 128)  # the largest power of two in a group
        ordered, span = self.ordered and width >= 32, 16
        if ordered and len(x) == 1:
            span = width // 8

        def launch(kernel: Any, grid: tuple[int, int], out: Tensor, share: int, tile: Tile, **more: Any) -> None:
            if len(x) > 1:
                more |= {"DTYPE": DTYPES[x.dtype], "SPANS": tile.spans}
            fixed = {**self._zeros, "ORDERED": ordered, "SPAN": span, "BLOCK_N": tile.rows}
            kernel[grid](x, *self._tensors, out, rows, columns, self.group_size, _UNIT, share, **fixed, **more)

        return _split("groups", x, rows, triton.cdiv(columns, 8 * span), launch)


@dataclass(frozen=True)
class Bytes:
    """int8 rows with the largest magnitude of each."""

    shape: tuple[int, int]
    weight: Tensor
    peaks: Tensor
    multiplies: bool = True

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """W (N, K)."""
        rows, columns = self.shape
        out = torch.empty(self.shape, dtype=dtype, device=self.weight.device)
        with torch.cuda.device_of(out):
            kernels.unpack_rows[(triton.cdiv(columns, 2048), rows)](
                self.weight, self.peaks, out, columns, BLOCK=2048, num_warps=4
            )
        return out

    def product(self, x: Tensor) -> Tensor:
        """x (M, K) W^T."""
        rows, columns = self.shape

        def launch(kernel: Any, grid: tuple[int, int], out: Tensor, share: int, tile: Tile, **more: Any) -> None:
            if len(x) > 1:
                more["DTYPE"] = DTYPES[x.dtype]
            fixed = {"BLOCK_N": tile.rows, "BLOCK_K": tile.spans}
            kernel[grid](x, self.weight, self.peaks, out, rows, columns, share, **fixed, **more)

        return _split("bytes", x, rows, columns, launch)


def _split(name: str, x: Tensor, rows: int, spans: int, launch: Any) -> Tensor:
    """(M, N) of a kernel's launch, K divided among programs where the rows of W alone make too few of them."""
    name += "_row" if len(x) == 1 else "_rows"
    tile = TILES[name]
    blocks, steps = triton.cdiv(rows, tile.rows), triton.cdiv(spans, tile.spans)
    share = triton.cdiv(steps, min(steps, PARTS, triton.cdiv(PROGRAMS, blocks)))
    parts = triton.cdiv(steps, share)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    sums = out if parts == 1 else torch.empty(parts, len(x), rows, dtype=torch.float32, device=x.device)
    more: dict[str, Any] = {"num_warps": tile.warps, "num_stages": 1}
    if len(x) > 1:
        more |= {
            "count": len(x),
            "DOT": DTYPES[x.dtype if x.is_cuda else torch.float32],
        }  # Triton's interpreter has no bfloat16 product
    with torch.cuda.device_of(x):
        launch(getattr(kernels, name), (blocks, parts), sums, share, tile, **more)
        if parts > 1:
            kernels.add_parts[(triton.cdiv(out.numel(), 128),)](sums, out, out.numel(), parts, PARTS=PARTS, BLOCK=128)
    return out


def _pairs(x: Tensor) -> Tensor:
    """x (M, K) as integers (M, K / 2) of twice the width."""
    even = x if x.storage_offset() % 2 == 0 else x.clone()
    return even.view(_PAIR[x.dtype])


@cache
def _table(kind: str, device: torch.device) -> Tensor:
    """The 16 values in float32, then their float16 bytes: the low ones of all, the high ones of all, (24,)."""
    values = torch.tensor(_TABLES[kind])
    planes = values.half().view(torch.uint8).view(16, 2).T.contiguous().view(torch.float32)
    return torch.cat((values, planes.flatten())).to(device)


def _lookup() -> str:
    """PTX for four bytes $8: values of the high four bits as float32 in $0..$3, of the low ones in $4..$7.

    The values have float16's precision, an eighth of bfloat16's. $9..$40 are the planes of `_table`, each word four
    times. prmt takes four bytes out of eight by four numbers at once: for either byte of a value, it looks in both
    halves of the plane, then chooses by the top bit.
    """
    lines = [
        ".reg .b32 c<2>, s<2>, a, b, lo, hi, pair;",
        ".reg .b16 x, y;",
        "and.b32 c0, $8, 0x77777777;",
        "shr.u32 s0, $8, 1;",
        "and.b32 s0, s0, 0x44444444;",
        "or.b32 s0, s0, 0x32103210;",
        "shr.u32 c1, c0, 16;",
        "shr.u32 s1, s0, 16;",
    ]
    for half in range(2):
        for plane, name in enumerate(("lo", "hi")):
            words = [f"${9 + 4 * (4 * plane + word)}" for word in range(4)]
            lines += [
                f"prmt.b32 a, {words[0]}, {words[1]}, c{half};",
                f"prmt.b32 b, {words[2]}, {words[3]}, c{half};",
                f"prmt.b32 {name}, a, b, s{half};",
            ]
        for byte, order in enumerate(("0x5140", "0x7362"), 2 * half):
            lines += [
                f"prmt.b32 pair, lo, hi, {order};",
                "mov.b32 {x, y}, pair;",
                f"cvt.f32.f16 ${4 + byte}, x;",
                f"cvt.f32.f16 ${byte}, y;",
            ]
    return "{\n" + "\n".join(lines) + "\n}"


_LOOKUP = _lookup()
