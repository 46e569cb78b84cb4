"""Weights of other formats as the native kernels take them: codes with a codebook, groups with zeros, int8 rows.

A reader of files makes one of three from its arrays; each refuses what cannot be right, and `pack` turns it into a
matrix of the engine without losing a bit. Bytes that one token reads per weight: NF4 and FP4 4.5 bits, groups of 128
4.25 (of 64 4.5, of 32 5, one per row 4), 8-bit groups of 128 8.25, int8 rows 8.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from llama2.compiled import native
from llama2.errors import InputError, MismatchError
from llama2.quantization.codebooks import NF4

GPTQ_SPAN = 32  # columns that a kernel takes at once: a group is a multiple of it


class PackableWeight(Protocol):
    """Argument of `CpuWeights.pack_codes`."""

    def pack(self, arena: Any, pool: Any) -> Any: ...


def _finite(scales: NDArray[Any], what: str, bound: Literal["", " and 0 or more"] = "") -> None:
    bad = ~np.isfinite(scales)
    if bound:
        bad |= scales < 0
    if bad.any():
        at = int(np.argmax(bad.reshape(-1)))
        raise InputError(
            f"{what} {at} is {scales.reshape(-1)[at]}; it must be finite{bound}: "
            "the file is damaged, fetch or quantise it again"
        )


def _shape(array: NDArray[Any], shape: tuple[int, ...], what: str) -> None:
    if array.shape != shape:
        raise MismatchError(f"{what} has the shape {array.shape}, {shape} is needed: pass the arrays of one matrix")


def _dtype(array: NDArray[Any], dtype: Any, what: str) -> None:
    if array.dtype != dtype:
        raise InputError(f"{what} is {array.dtype}; convert it to {np.dtype(dtype)}, in which it is kept")


@dataclass(frozen=True)
class CodebookWeight:
    """Linear4bit of bitsandbytes: w = codebook[code] * absmax of its block, blocks running on through the rows.

    codes: uint8, one a byte (rows, columns), or two a byte (any shape of rows * columns / 2), the first in the high
    nibble, as in its files. absmax: float32 (rows * columns / block,), double quantisation undone (which may leave some
    below 0). codebook: 16 floats. Columns and block are multiples of 64. arithmetic: how the fast mode multiplies,
    "int8" (table and activations in 8 bits, error 1e-2 of the product) or "bfloat16" (both in bfloat16, error 2e-3,
    slower: docs/native.md).
    """

    codes: NDArray[np.uint8]
    absmax: NDArray[np.float32]
    shape: tuple[int, int]
    codebook: tuple[float, ...] = NF4
    block: int = 64
    arithmetic: Literal["int8", "bfloat16"] = "int8"

    def __post_init__(self) -> None:
        rows, cols = self.shape
        if self.block <= 0 or self.block % 64:
            raise InputError(f"a block of {self.block} weights; the kernels need a multiple of 64: quantise with 64")
        if rows <= 0 or cols <= 0 or cols % 64:
            raise InputError(f"{rows} x {cols} weights; rows of a multiple of 64 columns are needed, or runner='torch'")
        if self.arithmetic not in ("int8", "bfloat16"):
            raise InputError(f"arithmetic is {self.arithmetic!r}; it is 'int8' or 'bfloat16'")
        _dtype(self.codes, np.uint8, "codes")
        _dtype(self.absmax, np.float32, "absmax")
        if self.codes.shape != self.shape and 2 * self.codes.size != rows * cols:
            raise MismatchError(
                f"codes has {self.codes.size} bytes in the shape {self.codes.shape}; {self.shape} takes "
                f"{rows * cols // 2}, two codes a byte, or one a byte in exactly that shape"
            )
        _shape(self.absmax, (-(-rows * cols // self.block),), "absmax")
        _finite(self.absmax, "absmax")
        table = np.asarray(self.codebook, np.float32)
        if table.shape != (16,) or not np.isfinite(table).all():
            raise InputError(f"the codebook has the shape {table.shape}; 16 finite values are needed")

    def pack(self, arena: Any, pool: Any) -> Any:
        codes, absmax = (np.ascontiguousarray(a).reshape(-1) for a in (self.codes, self.absmax))
        table = np.asarray(self.codebook, np.float32)
        return native().pack_codebook(
            arena, pool, codes, absmax, table, *self.shape, self.block, self.arithmetic == "bfloat16"
        )


@dataclass(frozen=True)
class GroupWeight:
    """GPTQ: w = scale * (code - zero), with scale and zero for every row and group of columns.

    codes: uint8 (rows, columns), 0..15 or, with bits=8, 0..255. scales: float16 (rows, groups). zeros: uint8 (rows,
    groups), the number that is subtracted (a file of version 1 stores one less). group: a multiple of 32, or -1 for
    the whole row. order (act-order): int32 (columns,); group g is columns order[g * group], ... of the codes.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8]
    group: int = 128
    bits: int = 4
    order: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"groups of {self.bits} bits have no native kernel; 4 and 8 have: use runner='torch'")
        if self.codes.ndim != 2 or not self.codes.size:
            raise MismatchError(f"codes has the shape {self.codes.shape}; (rows, columns) is needed")
        rows, cols = self.codes.shape
        if self.group != -1 and (self.group <= 0 or self.group % GPTQ_SPAN):
            raise InputError(
                f"a group of {self.group} columns; a multiple of {GPTQ_SPAN} or -1 is needed: quantise again"
            )
        _dtype(self.codes, np.uint8, "codes")
        _dtype(self.scales, np.float16, "scales")
        _dtype(self.zeros, np.uint8, "zeros")
        for array, what in ((self.scales, "scales"), (self.zeros, "zeros")):
            _shape(array, (rows, -(-cols // self.width)), what)
        _finite(self.scales, "scale")  # AutoRound's are negative, those of groups of 0 are 0
        top = int(self.codes.max())
        if top >= 1 << self.bits:
            raise InputError(
                f"a code of {top} in {self.bits} bits; {(1 << self.bits) - 1} is the largest: unpack them first"
            )
        if self.order is not None:
            _dtype(self.order, np.int32, "order")
            _shape(self.order, (cols,), "order")
            if not np.array_equal(np.sort(self.order), np.arange(cols)):
                raise InputError(f"order is not a permutation of 0..{cols - 1}: take order_of(g_idx, group)")

    @property
    def width(self) -> int:
        """Columns of a group; for -1 those of the row, filled up to whole spans."""
        return self.group if self.group != -1 else -(-self.codes.shape[1] // GPTQ_SPAN) * GPTQ_SPAN

    def pack(self, arena: Any, pool: Any) -> Any:
        arrays = (np.ascontiguousarray(a).reshape(-1) for a in (self.codes, self.scales.view(np.uint16), self.zeros))
        order = None if self.order is None else np.ascontiguousarray(self.order)
        return native().pack_groups(arena, pool, *arrays, *self.codes.shape, self.width, self.bits, order)


def order_of(g_idx: NDArray[Any], group: int) -> NDArray[np.int32] | None:
    """The `order` of a GroupWeight from GPTQ's g_idx (the group of every column); None where columns are in order.

    Raises InputError unless every group has `group` columns (the last may have fewer).
    """
    groups = np.asarray(g_idx, np.int64)
    want = np.arange(groups.size) // group
    if np.array_equal(groups, want):
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], want):
        raise InputError(f"g_idx does not give {group} columns to every group; it belongs to another group size")
    return order


@dataclass(frozen=True)
class Int8Weight:
    """LLM.int8(): w = value * scale of its row. values: int8 (rows, columns); scales: float32 (rows,), SCB / 127."""

    values: NDArray[np.int8]
    scales: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.size:
            raise MismatchError(f"values has the shape {self.values.shape}; (rows, columns) is needed")
        _dtype(self.values, np.int8, "values")
        _dtype(self.scales, np.float32, "scales")
        _shape(self.scales, (self.values.shape[0],), "scales")
        _finite(self.scales, "scale", " and 0 or more")

    def pack(self, arena: Any, pool: Any) -> Any:
        values, scales = np.ascontiguousarray(self.values).reshape(-1), np.ascontiguousarray(self.scales)
        return native().pack_rows(arena, pool, values, scales, *self.values.shape)


@dataclass(frozen=True)
class TableWeight:
    """w = table[code] * scale of its group. codes: uint8 (rows, columns) below 16; scales: float32 (rows, columns /
    group); table: 16 numbers; group: 16 or 32 columns."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    table: tuple[float, ...]
    group: int = 32

    def __post_init__(self) -> None:
        if self.group not in (16, 32):
            raise InputError(f"a group of {self.group} columns; tables take 16 or 32")
        if self.codes.ndim != 2 or not self.codes.size or self.codes.shape[1] % self.group:
            raise MismatchError(
                f"codes has the shape {self.codes.shape}; rows of whole groups of {self.group} are needed"
            )
        _dtype(self.codes, np.uint8, "codes")
        _dtype(self.scales, np.float32, "scales")
        _shape(self.scales, (self.codes.shape[0], self.codes.shape[1] // self.group), "scales")
        _finite(self.scales, "scale")

    def pack(self, arena: Any, pool: Any) -> Any:
        arrays = (np.ascontiguousarray(a).reshape(-1) for a in (self.codes, self.scales))
        table = np.asarray(self.table, np.float32)
        return native().pack_table(arena, pool, *arrays, table, *self.codes.shape, self.group)


@dataclass(frozen=True)
class AffineWeight:
    """w = scale * code + minimum, both float32 for every row and group of columns: what GroupWeight's float16 scales
    and whole zeros cannot hold. The other fields are GroupWeight's."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    minima: NDArray[np.float32]
    group: int = 128
    bits: int = 4
    order: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        groups = 1 if self.group == -1 else -(-self.codes.shape[1] // self.group)
        if self.bits not in (4, 8) or (self.group != -1 and self.group % GPTQ_SPAN):
            raise InputError(
                f"{self.bits} bits in groups of {self.group}; 4 or 8 in multiples of {GPTQ_SPAN} are packed"
            )
        _dtype(self.codes, np.uint8, "codes")
        for array, what in ((self.scales, "scales"), (self.minima, "minima")):
            _dtype(array, np.float32, what)
            _shape(array, (self.codes.shape[0], groups), what)
            _finite(array, what)

    @property
    def width(self) -> int:
        """Columns of a group; for -1 those of the row, filled up to whole spans."""
        return self.group if self.group != -1 else -(-self.codes.shape[1] // GPTQ_SPAN) * GPTQ_SPAN

    def pack(self, arena: Any, pool: Any) -> Any:
        arrays = (np.ascontiguousarray(a).reshape(-1) for a in (self.codes, self.scales, self.minima))
        order = None if self.order is None else np.ascontiguousarray(self.order)
        return native().pack_affine(arena, pool, *arrays, *self.codes.shape, self.width, self.bits, order)
