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

from llama2.quantization import fused_kernels as kernels
from llama2.quantization import fused_matrices as matrices
from llama2.quantization.codebooks import FP4, NF4

_TABLES = {"nf4": NF4, "fp4": FP4}
_ONES = {2: 0x55555555, 3: 0, 4: 0x11111111, 8: 0x01010101}  # what v1 leaves out of a word of zeros
_UNIT = 0x4B000000  # the bits of 2^23 in float32
_PAIR = {torch.float32: torch.int64, torch.float16: torch.int32, torch.bfloat16: torch.int32}
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Tile(NamedTuple):
    """The tile of one program of a product: rows of W, spans (or bytes) of K; and how it runs.

    stages: tiles in flight. programs: that a product is divided into at least, where K is long enough; an H100 has 132
    processors.
    """

    rows: int
    spans: int
    warps: int = 4
    stages: int = 1
    programs: int = 512


# By kernel. `bench/gpu.py --tiles` times others.
TILES = {
    "blocks_row": Tile(8, 16),
    "blocks_rows": Tile(64, 1, 4, 4),
    "groups_row": Tile(128, 1),
    "groups_rows": Tile(64, 1, 4, 4),
    "bytes_row": Tile(4, 512, 4, 3),
    "bytes_rows": Tile(32, 128, 4, 4),
}
MATRICES = {"blocks": 2, "groups": 2, "bytes": 2}  # rows of x from which a product is one of matrices
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

    def multiplies(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether rows of W are whole spans of whole bytes."""
        return self.shape[1] % self._span == 0 and _worth("blocks", rows, dtype)

    @property
    def _span(self) -> int:
        return min(self.block, 64)

    def _scales(self, planes: torch.dtype = torch.float16) -> tuple[Any, ...]:
        unused = self.absmax
        return (
            self.codes,
            _table(self.kind, self.codes.device, planes),
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
                *self._scales(),
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
        narrow = x.is_cuda and x.dtype != torch.float32

        def launch(kernel: Any, grid: tuple[int, int], out: Tensor, share: int, tile: Tile, **more: Any) -> None:
            fixed = {**self._settings, "DTYPE": DTYPES[x.dtype], "BLOCK_N": tile.rows}
            if kernel is kernels.blocks_row:
                fixed |= {"SPANS": tile.spans, "ASM": _LOOKUP if narrow else ""}
                of_x, scales = _pairs(x), self._scales()
            else:
                fixed["ASM"] = _ROUNDED if narrow else ""
                of_x, scales = x, self._scales(x.dtype if narrow else torch.float16)
            kernel[grid](of_x, *scales, out, rows, columns // 2, spans, share, **fixed, **more)

        return _split("blocks", x, rows, spans, launch)


@dataclass(frozen=True)
class Groups:
    """GPTQ. ordered: g_idx is k // group_size.

    order: the columns of x by their group, where that makes runs of them; `sorted` is then qweight in that order.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    v1: bool
    ordered: bool
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    order: Tensor | None = None
    sorted: Tensor | None = None

    def multiplies(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether the codes have four bits; for several rows, in spans of one group."""
        return self.bits == 4 and (rows < MATRICES["groups"] or self._runs) and _worth("groups", rows, dtype)

    @property
    def _runs(self) -> bool:
        return (self.ordered or self.order is not None) and self._width >= 32

    @property
    def _width(self) -> int:
        """The largest power of two in a group, up to 128."""
        return min(self.group_size & -self.group_size, 128)

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
        tensors, runs = self._tensors, self._runs
        if runs and self.order is not None and self.sorted is not None:
            x = x.index_select(1, self.order)
            tensors = (self.sorted, *tensors[1:])
        span = self._width // 8 if runs else 16

        def launch(kernel: Any, grid: tuple[int, int], out: Tensor, share: int, tile: Tile, **more: Any) -> None:
            fixed = {**self._zeros, "SPAN": span, "BLOCK_N": tile.rows}
            if kernel is kernels.groups_row:
                kernel[grid](
                    x, *tensors, out, rows, columns, self.group_size, _UNIT, share, ORDERED=runs, **fixed, **more
                )
                return
            asm, unit = _LESS[x.dtype] if x.is_cuda else ("", 0)
            fixed |= {"ASM": asm, "UNIT": unit, "DTYPE": DTYPES[x.dtype], "PER_GROUP": self.group_size // self._width}
            kernel[grid](x, *tensors[:3], out, rows, columns, share, **fixed, **more)

        return _split("groups", x, rows, triton.cdiv(columns, 8 * span), launch)


@dataclass(frozen=True)
class Bytes:
    """int8 rows with the largest magnitude of each."""

    shape: tuple[int, int]
    weight: Tensor
    peaks: Tensor

    def multiplies(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether it is faster."""
        return _worth("bytes", rows, dtype)

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
            fixed = {"BLOCK_N": tile.rows, "BLOCK_K": tile.spans}
            kernel[grid](x, self.weight, self.peaks, out, rows, columns, share, **fixed, **more)

        return _split("bytes", x, rows, columns, launch)


def _worth(name: str, rows: int, dtype: torch.dtype) -> bool:
    """Whether a product is one of vectors, or of matrices in 16 bits: those of float32 have no tensor cores."""
    return rows < MATRICES[name] or dtype != torch.float32


def _split(name: str, x: Tensor, rows: int, spans: int, launch: Any) -> Tensor:
    """(M, N) of a kernel's launch, K divided among programs where the rows of W alone make too few of them."""
    several = len(x) >= MATRICES[name]
    name += "_rows" if several else "_row"
    tile = TILES[name]
    blocks, steps = triton.cdiv(rows, tile.rows), triton.cdiv(spans, tile.spans)
    share = triton.cdiv(steps, min(steps, PARTS, triton.cdiv(tile.programs, blocks)))
    parts = triton.cdiv(steps, share)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    sums = out if parts == 1 else torch.empty(parts, len(x), rows, dtype=torch.float32, device=x.device)
    more: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    if several:
        more |= {
            "count": len(x),
            "DOT": DTYPES[x.dtype if x.is_cuda else torch.float32],
        }  # Triton's interpreter has no bfloat16 product
    with torch.cuda.device_of(x):
        launch(getattr(matrices if several else kernels, name), (blocks, parts), sums, share, tile, **more)
        if parts > 1:
            kernels.add_parts[(triton.cdiv(out.numel(), 128),)](sums, out, out.numel(), parts, PARTS=PARTS, BLOCK=128)
    return out


def _pairs(x: Tensor) -> Tensor:
    """x (M, K) as integers (M, K / 2) of twice the width."""
    even = x if x.storage_offset() % 2 == 0 else x.clone()
    return even.view(_PAIR[x.dtype])


@cache
def _table(kind: str, device: torch.device, planes: torch.dtype) -> Tensor:
    """The 16 values in float32, then their bytes in `planes`: the low ones of all, the high ones of all, (24,)."""
    values = torch.tensor(_TABLES[kind])
    narrow = values.to(torch.float16 if planes == torch.float32 else planes)
    split = narrow.view(torch.uint8).view(16, 2).T.contiguous().view(torch.float32)
    return torch.cat((values, split.flatten())).to(device)


def _lookup(first: int) -> list[str]:
    """PTX for four bytes: the 16 bits of four codes in lo and hi, for codes 0 to 3 and then for 4 to 7 (`half`).

    The table's planes are the operands from `first` on, each word four times; the bytes are the operand before. prmt
    takes four bytes out of eight by four numbers at once: for either byte of a value, it looks in both halves of the
    plane, then chooses by the top bit. The caller takes what it needs where a line says "half".
    """
    lines = [
        ".reg .b32 c<2>, s<2>, a, b, lo, hi, pair;",
        ".reg .b16 x, y;",
        f"and.b32 c0, ${first - 1}, 0x77777777;",
        f"shr.u32 s0, ${first - 1}, 1;",
        "and.b32 s0, s0, 0x44444444;",
        "or.b32 s0, s0, 0x32103210;",
        "shr.u32 c1, c0, 16;",
        "shr.u32 s1, s0, 16;",
    ]
    for half in range(2):
        for plane, name in enumerate(("lo", "hi")):
            words = [f"${first + 4 * (4 * plane + word)}" for word in range(4)]
            lines += [
                f"prmt.b32 a, {words[0]}, {words[1]}, c{half};",
                f"prmt.b32 b, {words[2]}, {words[3]}, c{half};",
                f"prmt.b32 {name}, a, b, s{half};",
            ]
        lines.append("half")
    return lines


def _as_float32() -> str:
    """PTX for four bytes $8: values of the high four bits as float32 in $0..$3, of the low ones in $4..$7.

    The planes are float16's, whose precision is an eighth of bfloat16's.
    """
    lines, half = [], 0
    for line in _lookup(9):
        if line != "half":
            lines.append(line)
            continue
        for byte, order in enumerate(("0x5140", "0x7362"), 2 * half):
            lines += [
                f"prmt.b32 pair, lo, hi, {order};",
                "mov.b32 {x, y}, pair;",
                f"cvt.f32.f16 ${4 + byte}, x;",
                f"cvt.f32.f16 ${byte}, y;",
            ]
        half += 1
    return "{\n" + "\n".join(lines) + "\n}"


def _as_planes() -> str:
    """PTX for four bytes $4: values, in the planes' type, of the high four bits in $0 and $1, of the low in $2, $3."""
    lines, half = [], 0
    for line in _lookup(5):
        if line != "half":
            lines.append(line)
            continue
        lines += [f"prmt.b32 ${half}, lo, hi, 0x7351;", f"prmt.b32 ${2 + half}, lo, hi, 0x6240;"]
        half += 1
    return "{\n" + "\n".join(lines) + "\n}"


def _less(kind: str, unit: int) -> str:
    """PTX for the words $8, $9 of two rows of W and their zeros plus a unit in $10: code j of both less zero in $j.

    unit: twice the bits of a number whose last four mantissa bits a code may be.
    """
    lines = [".reg .b32 t, u;"]
    for byte in range(4):
        lines.append(f"prmt.b32 t, $8, $9, 0x{4 + byte}{4 + byte}{byte}{byte};")
        for j, shifted in ((2 * byte, "t"), (2 * byte + 1, "u")):
            if shifted == "u":
                lines.append("shr.u32 u, t, 4;")
            lines.append(f"lop3.b32 u, {shifted}, 0x000F000F, 0x{unit:08X}, 0xEA;")  # and, then or
            lines.append(f"sub.{kind} ${j}, u, $10;")
    return "{\n" + "\n".join(lines) + "\n}"


_LOOKUP, _ROUNDED = _as_float32(), _as_planes()
_LESS = {
    torch.bfloat16: (_less("bf16x2", 0x43004300), 128),
    torch.float16: (_less("f16x2", 0x64006400), 1024),
    torch.float32: ("", 0),
}
