"""NF4, GPTQ and int8 weights: bit-exact packing, products of every instruction set, mistakes told."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from cpu.test_kernels import ISAS, TOKENS, activations, as_int8, bf16_bits, native, product, relative

from llama2.errors import InputError, MismatchError
from llama2.quantization.codebooks import FP4, NF4
from llama2.quantization.packable import CodebookWeight, GroupWeight, Int8Weight, PackableWeight, order_of

Made = tuple[PackableWeight, np.ndarray]  # the weight and numpy's own float32 values


def codebook(rng: np.random.Generator, rows: int, cols: int, block: int, table: tuple[float, ...], how: str) -> Made:
    codes = rng.integers(0, 16, (rows, cols), dtype=np.uint8)
    absmax = rng.uniform(0.0, 0.1, -(-rows * cols // block)).astype(np.float32)
    absmax[0], absmax[1] = 0, -0.01  # a block of zeros is legal, and so is what double quantisation leaves
    values = np.asarray(table, np.float32)[codes] * np.repeat(absmax, block)[: rows * cols].reshape(rows, cols)
    two = (codes.reshape(-1, 2)[:, :1] << 4 | codes.reshape(-1, 2)[:, 1:]).reshape(-1, 1)  # the files' order
    given = codes if rng.random() < 0.5 else two
    return CodebookWeight(given, absmax, (rows, cols), table, block, how), values  # type: ignore[arg-type]


def groups(rng: np.random.Generator, rows: int, cols: int, group: int, bits: int, shuffled: bool) -> Made:
    width = cols if group == -1 else group
    count = -(-cols // width)
    codes = rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, (rows, count)).astype(np.float16)
    zeros = rng.integers(0, 17 if bits == 4 else 256, (rows, count), dtype=np.uint8)
    group_of = np.arange(cols) // width
    if shuffled:
        rng.shuffle(group_of)
    values = scales.astype(np.float32)[:, group_of] * (codes.astype(np.float32) - zeros[:, group_of])
    return GroupWeight(codes, scales, zeros, group, bits, order_of(group_of, width)), values


def int8(rng: np.random.Generator, rows: int, cols: int) -> Made:
    q = rng.integers(-128, 128, (rows, cols), dtype=np.int8)
    scales = rng.uniform(1e-4, 1e-2, rows).astype(np.float32)
    return Int8Weight(q, scales), q.astype(np.float32) * scales[:, None]


CODEBOOKS = [(5, 64, 64), (37, 192, 64), (50, 256, 128), (16, 192, 256), (9, 576, 4096)]
GROUPS = [(5, 64, 32), (37, 96, 32), (50, 384, 128), (16, 200, 64), (33, 72, -1), (17, 100, 96), (3, 7, -1)]
ROWS = [(5, 64), (37, 96), (50, 7), (3, 200), (16, 33)]
CASES = {
    **{
        f"nf4 {s} {how}": (lambda g, s=s, how=how: codebook(g, *s, NF4, how))
        for s in CODEBOOKS
        for how in ("bfloat16", "int8")
    },
    "fp4": lambda g: codebook(g, 20, 128, 64, FP4, "int8"),
    "fp4 bfloat16": lambda g: codebook(g, 20, 128, 64, FP4, "bfloat16"),
    **{f"gptq {s} {b}": (lambda g, s=s, b=b: groups(g, *s, b, False)) for s in GROUPS for b in (4, 8)},
    **{f"act-order {s}": (lambda g, s=s: groups(g, *s, 4, True)) for s in GROUPS if s[2] != -1},
    **{f"int8 {s}": (lambda g, s=s: int8(g, *s)) for s in ROWS},
}


def packed(weight: PackableWeight) -> object:
    return weight.pack(native.Arena(), native.Pool(2, []))


def as_fast(weight: PackableWeight, values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The float64 product of what the fast mode multiplies: everything it rounds is rounded here."""
    dense = values.astype(np.float64)
    if isinstance(weight, CodebookWeight):
        table = np.asarray(weight.codebook, np.float32)
        step = min(
            (np.abs(table).max() / n for n in range(64, 128)),
            key=lambda s: ((np.rint(table / s) * s - table) ** 2).sum(),
        )
        bf16 = (bf16_bits(table).astype(np.uint32) << 16).view(np.float32)
        rounded = bf16 if weight.arithmetic == "bfloat16" else np.rint(table / step) * step
        codes = weight.codes
        if codes.shape != weight.shape:
            codes = np.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], axis=1).reshape(weight.shape)
        size = weight.shape[0] * weight.shape[1]
        scales = np.repeat(weight.absmax, weight.block)[:size].reshape(weight.shape)
        dense = rounded.astype(np.float64)[codes] * scales
        if weight.arithmetic == "bfloat16":
            return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32).astype(np.float64) @ dense.T
    order = weight.order if isinstance(weight, GroupWeight) else None
    return as_int8(x) @ dense.T if order is None else as_int8(x[:, order]) @ dense[:, order].T


@pytest.mark.parametrize("name", CASES)
def test_packing_is_exact(name: str) -> None:
    weight, values = CASES[name](np.random.default_rng(1))
    out = np.empty(values.shape, np.float32)
    for isa in ISAS:
        native.dequantize(isa, packed(weight), out)
        np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_products(isa: str, name: str) -> None:
    rng = np.random.default_rng(2)
    weight, values = CASES[name](rng)
    w, (rows, cols) = packed(weight), values.shape
    for m in TOKENS:
        x = activations(rng, m, cols)
        want = x.astype(np.float64) @ values.astype(np.float64).T
        assert relative(product(isa, w, x, rows, True), want) < 1e-6
        fast = product(isa, w, x, rows, False)
        assert relative(fast, as_fast(weight, values, x)) < 2e-6
        assert relative(fast, product("scalar", w, x, rows, False)) < 1e-6


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    for name in ("nf4 (50, 256, 128) bfloat16", "nf4 (50, 256, 128) int8", "act-order (50, 384, 128)", "int8 (37, 96)"):
        weight, values = CASES[name](rng)
        w, (rows, cols) = packed(weight), values.shape
        x = activations(rng, 13, cols)
        together = product("auto", w, x, rows, False)
        for i in range(13):
            np.testing.assert_array_equal(together[i : i + 1], product("auto", w, x[i : i + 1], rows, False, 1))


def test_codebooks() -> None:
    quantile, top = NormalDist().inv_cdf, 0.9677083  # QLoRA, appendix E: 8 quantiles above 0, 7 below, over the largest
    above = [quantile(p) for p in np.linspace(top, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(top, 0.5, 8)[:-1]]
    np.testing.assert_allclose(NF4, np.array(sorted([*below, 0.0, *above])) / max(above), atol=2e-7)
    positive = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
    np.testing.assert_allclose(FP4, [*positive, *(-v for v in positive)], rtol=1e-7)


def test_the_table_in_8_bits_errs_as_little_as_it_can() -> None:
    eye = np.eye(64, dtype=np.float32)
    for table, most in ((NF4, 3.4e-3), (FP4, 2.3e-3)):
        codes = np.tile(np.arange(16, dtype=np.uint8), (16, 4))
        held = packed(CodebookWeight(codes, np.ones(16, np.float32), (16, 64), table))
        found = product("auto", held, eye, 16, False)[:16, 0]  # 1 is not rounded
        wanted = np.asarray(table, np.float32)
        assert np.sqrt(((found - wanted) ** 2).sum() / (wanted**2).sum()) < most


def test_bytes_a_weight() -> None:
    rng = np.random.default_rng(4)
    for (weight, values), most in [
        (codebook(rng, 64, 512, 64, NF4, "int8"), 4.5),
        (groups(rng, 64, 512, 128, 4, True), 4.25),
        (groups(rng, 64, 512, 128, 8, False), 8.25),
        (int8(rng, 64, 4096), 8.01),
    ]:
        assert 8 * packed(weight).nbytes / values.size <= most  # type: ignore[attr-defined]


def test_order_of() -> None:
    assert order_of(np.array([0, 0, 1, 1, 2]), 2) is None
    np.testing.assert_array_equal(order_of(np.array([1, 0, 0, 2, 1]), 2), [1, 2, 0, 4, 3])
    with pytest.raises(InputError, match="another group size"):
        order_of(np.array([0, 0, 0, 1]), 2)


def wrong(name: str) -> PackableWeight:
    u8, f16, f32 = np.uint8, np.float16, np.float32
    codes, absmax = np.zeros((4, 64), u8), np.ones(4, f32)
    scales, zeros, nan = np.ones((4, 2), f16), np.full((4, 2), 8, u8), np.array([1, 1, np.nan, 1], f32)
    bad = scales.copy()
    bad[1, 1] = 0
    infinite = scales.copy()
    infinite[0, 1] = np.inf
    made = {
        "columns": lambda: CodebookWeight(np.zeros((4, 63), u8), absmax, (4, 63)),
        "block": lambda: CodebookWeight(codes, absmax, (4, 64), block=32),
        "codes": lambda: CodebookWeight(np.zeros(127, u8), absmax, (4, 64)),
        "absmax": lambda: CodebookWeight(codes, absmax[:3], (4, 64)),
        "nan": lambda: CodebookWeight(codes, nan, (4, 64)),
        "codebook": lambda: CodebookWeight(codes, absmax, (4, 64), NF4[:15]),
        "arithmetic": lambda: CodebookWeight(codes, absmax, (4, 64), arithmetic="fp8"),  # type: ignore[arg-type]
        "dtype": lambda: CodebookWeight(codes, absmax.astype(np.float64), (4, 64)),
        "bits": lambda: GroupWeight(codes, scales, zeros, 32, bits=3),
        "group": lambda: GroupWeight(codes, scales, zeros, 48),
        "infinite": lambda: GroupWeight(codes, infinite, zeros, 32),
        "scales": lambda: GroupWeight(codes, scales[:, :1], zeros, 32),
        "zeros": lambda: GroupWeight(codes, scales, zeros[:3], 32),
        "large": lambda: GroupWeight(codes + u8(16), scales, zeros, 32),
        "order": lambda: GroupWeight(codes, scales, zeros, 32, order=np.zeros(64, np.int32)),
        "int8": lambda: Int8Weight(np.zeros((4, 8), np.int8), np.ones(3, f32)),
        "int8 dtype": lambda: Int8Weight(codes, np.ones(4, f32)),  # type: ignore[arg-type]
        "int8 nan": lambda: Int8Weight(np.zeros((4, 8), np.int8), nan),
        "int8 negative": lambda: Int8Weight(np.zeros((4, 8), np.int8), -absmax),
    }
    return made[name]()


MISTAKES = {
    "columns": "4 x 63 weights; rows of a multiple of 64",
    "block": "a block of 32 weights",
    "codes": "codes has 127 bytes",
    "absmax": "absmax has the shape",
    "nan": "absmax 2 is nan",
    "codebook": "16 finite values",
    "arithmetic": "'fp8'",
    "dtype": "absmax is float64; convert it to float32",
    "bits": "groups of 3 bits",
    "group": "a group of 48 columns",
    "infinite": "scale 1 is inf",
    "scales": r"scales has the shape \(4, 1\), \(4, 2\) is needed",
    "zeros": "zeros has the shape",
    "large": "a code of 16 in 4 bits; 15 is the largest",
    "order": "not a permutation of 0..63",
    "int8": "scales has the shape",
    "int8 dtype": "values is uint8; convert it to int8",
    "int8 nan": "scale 2 is nan",
    "int8 negative": "scale 0 is -1.0; it must be finite and 0 or more",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    with pytest.raises((InputError, MismatchError), match=MISTAKES[name]):
        wrong(name)


def test_the_compiled_side_checks_for_itself() -> None:
    arena, pool, codes = native.Arena(), native.Pool(1, []), np.zeros(256, np.uint8)
    one, table = np.ones(4, np.float32), np.zeros(16, np.float32)
    half, zeros = np.ones(8, np.float16).view(np.uint16), np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="got 255"):
        native.pack_codebook(arena, pool, codes[:255], one, table, 4, 64, 64, False)
    with pytest.raises(ValueError, match="a multiple of 64 columns, got 32"):
        native.pack_codebook(arena, pool, codes[:128], one, table, 4, 32, 64, False)
    with pytest.raises(ValueError, match="one scale for every 64 weights: 4, got 3"):
        native.pack_codebook(arena, pool, codes, one[:3], table, 4, 64, 64, False)
    with pytest.raises(ValueError, match="16 values, got 15"):
        native.pack_codebook(arena, pool, codes, one, table[:15], 4, 64, 64, False)
    with pytest.raises(ValueError, match="code 16 at 0"):
        native.pack_codebook(arena, pool, codes + np.uint8(16), one, table, 4, 64, 64, False)
    with pytest.raises(ValueError, match="take 8 scales and zeros, got 8 and 7"):
        native.pack_groups(arena, pool, codes, half, zeros[:7], 4, 64, 32, 4)
    with pytest.raises(ValueError, match="a group of 33 columns"):
        native.pack_groups(arena, pool, codes, half, zeros, 4, 64, 33, 4)
    with pytest.raises(ValueError, match=r"order\[1\] = 0: order is a permutation"):
        native.pack_groups(arena, pool, codes, half, zeros, 4, 64, 32, 4, np.zeros(64, np.int32))
    with pytest.raises(ValueError, match="4 rows have as many scales, got 3"):
        native.pack_rows(arena, pool, codes.view(np.int8), one[:3], 4, 64)
