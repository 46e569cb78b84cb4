"""Each instruction set against a float64 product of the dequantised weights, and against the scalar kernels."""

from __future__ import annotations

import numpy as np
import pytest
from cpu.ggml_blocks import TYPES, dequantize, random_blocks

native = pytest.importorskip("llama2._native", reason="the native module is not built")

ISAS = native.available_isas()
# Odd on purpose: rows that end inside a tile, a last block of 32 columns, several row blocks.
SHAPES = [(16, 64), (37, 96), (50, 288), (33, 32)]
TOKENS = [1, 2, 3, 4, 5, 8, 9, 17]


def activations(rng: np.random.Generator, m: int, cols: int) -> np.ndarray:
    x = rng.standard_normal((m, cols)).astype(np.float32)
    x[:, rng.integers(0, cols, max(1, cols // 50))] *= 20  # outlier channels, as real models have
    return x


def product(isa: str, w: object, x: np.ndarray, rows: int, exact: bool, threads: int = 2) -> np.ndarray:
    out = np.full((x.shape[0], rows), np.nan, np.float32)
    native.matmul(native.Pool(threads, []), isa, w, x, out, exact)
    return out


def as_int8(x: np.ndarray) -> np.ndarray:
    """float64 values of the activations as the kernels round them: 8 bits, one scale per 32 columns."""
    m, cols = x.shape
    groups = np.pad(x, ((0, 0), (0, -cols % 32))).reshape(m, -1, 32)
    top = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    values = np.rint(groups * inverse).astype(np.float64) * (top / np.float32(127)).astype(np.float64)
    return values.reshape(m, -1)[:, :cols]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def packed(name: str, raw: np.ndarray, rows: int, cols: int, row_map: np.ndarray | None = None) -> object:
    return native.pack(native.Arena(), native.Pool(2, []), raw.reshape(-1), TYPES[name][0], rows, cols, row_map)


def shapes_of(name: str) -> list[tuple[int, int]]:
    return [(r, 256 * (1 + c // 100)) for r, c in SHAPES] if TYPES[name][1] == 256 else SHAPES


@pytest.mark.parametrize("name", TYPES)
def test_packing_loses_nothing(name: str) -> None:
    rng = np.random.default_rng(1)
    for rows, cols in shapes_of(name):
        raw = random_blocks(name, rows, cols, rng)
        out = np.empty((rows, cols), np.float32)
        for isa in ISAS:
            native.dequantize(isa, packed(name, raw, rows, cols), out)
            np.testing.assert_allclose(out, dequantize(name, raw), rtol=3e-7, atol=1e-7)


def test_row_map_reorders_rows() -> None:
    rng = np.random.default_rng(2)
    raw, order = random_blocks("Q4_0", 48, 64, rng), rng.permutation(48).astype(np.int32)
    out = np.empty((48, 64), np.float32)
    native.dequantize("scalar", packed("Q4_0", raw, 48, 64, order), out)
    np.testing.assert_allclose(out, dequantize("Q4_0", raw)[order], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", TYPES)
def test_packed_products(isa: str, name: str) -> None:
    rng = np.random.default_rng(3)
    for rows, cols in shapes_of(name):
        raw = random_blocks(name, rows, cols, rng)
        w, dense = packed(name, raw, rows, cols), dequantize(name, raw)
        for m in TOKENS:
            x = activations(rng, m, cols)
            want = x.astype(np.float64) @ dense.T
            assert relative(product(isa, w, x, rows, True), want) < 1e-6
            fast = product(isa, w, x, rows, False)
            assert relative(fast, as_int8(x) @ dense.T) < 2e-6
            assert relative(fast, product("scalar", w, x, rows, False)) < 1e-6


def bf16_bits(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_products_in_place(isa: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    for rows, cols in [(16, 64), (37, 95), (50, 288), (3, 7), (65, 33)]:
        dense = rng.standard_normal((rows, cols)).astype(np.float32)
        stored = bf16_bits(dense) if kind == "bfloat16" else dense.astype(kind)
        if kind == "bfloat16":
            dense = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            dense = stored.astype(np.float32)
        w = native.view(stored, kind == "bfloat16")
        for m in TOKENS:
            x = activations(rng, m, cols)
            want = x.astype(np.float64) @ dense.astype(np.float64).T
            assert relative(product(isa, w, x, rows, True), want) < 1e-6
            fast = product(isa, w, x, rows, False)
            assert relative(fast, want) < (4e-3 if kind == "bfloat16" else 1e-6)
            assert relative(fast, product("scalar", w, x, rows, False)) < 1e-6


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    rng = np.random.default_rng(5)
    w = packed(name, random_blocks(name, 64, 512, rng), 64, 512)
    x = activations(rng, 13, 512)
    together = product("auto", w, x, 64, False)
    for i in range(13):
        np.testing.assert_array_equal(together[i : i + 1], product("auto", w, x[i : i + 1], 64, False, threads=1))


@pytest.mark.parametrize("name", TYPES)
def test_whole_and_cut_tiles_are_packed_alike(name: str) -> None:
    """Fast paths take tiles of 16 rows; a row must come out the same from a tile that is cut."""
    raw = random_blocks(name, 31, 512, np.random.default_rng(6))
    together, alone = np.empty((31, 512), np.float32), np.empty((15, 512), np.float32)
    native.dequantize("scalar", packed(name, raw, 31, 512), together)
    native.dequantize("scalar", packed(name, raw[:15].copy(), 15, 512), alone)
    np.testing.assert_array_equal(together[:15], alone)


def test_wrong_sizes_raise() -> None:
    pool, arena = native.Pool(1, []), native.Arena()
    raw = np.zeros(18 * 2 * 4, np.uint8)
    with pytest.raises(ValueError, match="takes 144 bytes, got 143"):
        native.pack(arena, pool, raw[:-1], 2, 4, 64)
    with pytest.raises(ValueError, match="multiple of 32 columns, got 48"):
        native.pack(arena, pool, raw, 2, 4, 48)
    with pytest.raises(ValueError, match="no packing"):
        native.pack(arena, pool, raw, 99, 4, 64)
    with pytest.raises(ValueError, match="outside 0..3"):
        native.pack(arena, pool, raw, 2, 4, 64, np.array([0, 1, 2, 4], np.int32))
    w = native.pack(arena, pool, raw, 2, 4, 64)
    with pytest.raises(ValueError, match="x is m x cols"):
        native.matmul(pool, "scalar", w, np.zeros((1, 65), np.float32), np.zeros((1, 4), np.float32), False)
    with pytest.raises(ValueError, match="instruction set 'pentium'"):
        native.matmul(pool, "pentium", w, np.zeros((1, 64), np.float32), np.zeros((1, 4), np.float32), False)
