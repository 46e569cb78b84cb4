"""A whole step on code weights: act-order gathers the right columns for every matrix, whatever its neighbours do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llama2 import cpu
from llama2.config import LlamaConfig
from llama2.quantization.codebooks import NF4
from llama2.quantization.packable import CodebookWeight, GroupWeight, Int8Weight, PackableWeight

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native module is not built")

CONFIG = LlamaConfig(
    vocab_size=131,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=192,
    max_position_embeddings=128,
)
SHAPES = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128)}
SHAPES |= {"gate": (192, 128), "up": (192, 128), "down": (128, 192)}


def grouped(rng: np.random.Generator, rows: int, cols: int, order: np.ndarray | None) -> PackableWeight:
    scales = rng.uniform(0.005, 0.02, (rows, cols // 32)).astype(np.float16)
    zeros = rng.integers(6, 10, scales.shape, dtype=np.uint8)
    return GroupWeight(rng.integers(0, 16, (rows, cols), dtype=np.uint8), scales, zeros, 32, 4, order)


def mixed(rng: np.random.Generator, rows: int, cols: int, turn: int) -> PackableWeight:
    if turn % 3 == 0:
        absmax = rng.uniform(0.1, 0.3, rows * cols // 64).astype(np.float32)
        how: Any = ("bfloat16", "int8")[turn % 2]
        return CodebookWeight(rng.integers(0, 16, (rows, cols), dtype=np.uint8), absmax, (rows, cols), NF4, 64, how)
    if turn % 3 == 1:
        q = rng.integers(-127, 128, (rows, cols), dtype=np.int8)
        return Int8Weight(q, rng.uniform(5e-4, 2e-3, rows).astype(np.float32))
    return grouped(rng, rows, cols, None)


def layers(kind: str, rng: np.random.Generator) -> list[dict[str, PackableWeight]]:
    made = []
    for i in range(2):
        shared = {128: rng.permutation(128).astype(np.int32), 192: rng.permutation(192).astype(np.int32)}
        parts = {}
        for turn, (name, (rows, cols)) in enumerate(SHAPES.items()):
            order = None if (kind == "some" and turn % 2) else shared[cols]
            if kind == "each":
                order = rng.permutation(cols).astype(np.int32)
            if kind == "mixed":
                parts[name] = mixed(rng, rows, cols, turn + i)
            else:
                parts[name] = grouped(rng, rows, cols, order)
        made.append(parts)
    return made


def weights(parts: list[dict[str, PackableWeight]], embed: np.ndarray, threads: int, dense: bool) -> cpu.CpuWeights:
    """CpuWeights of `parts` as they are, or of their dequantised values in float32."""
    from llama2.compiled import native

    made = cpu.CpuWeights(CONFIG, threads)
    table, norm = made.view(embed), np.full(128, 0.7, np.float32)

    def matrix(weight: PackableWeight) -> Any:
        packed = made.pack_codes(weight)
        if not dense:
            return packed
        out = np.empty((packed.rows, packed.cols), np.float32)
        native().dequantize("scalar", packed, out)
        return made.view(out)

    made._begin(table, table, norm)
    for layer in parts:
        made._layer(norm, norm, {name: matrix(weight) for name, weight in layer.items()})
    return made


def logits(made: cpu.CpuWeights, precision: Any, isa: str, counts: list[list[int]]) -> np.ndarray:
    run, cache = cpu.CpuRunner(made, precision, isa), cpu.PagedCache(made, 256, "float32")
    sequences = [cache.sequence() for _ in counts[0]]
    rng, out = np.random.default_rng(9), []
    for new in counts:
        ids = rng.integers(0, 131, sum(new)).astype(np.int32)
        positions = np.concatenate([np.arange(s.length, s.length + n) for s, n in zip(sequences, new)])
        out.append(run.step(ids, positions, cache.view(zip(sequences, new))))
    return np.concatenate(out)


@pytest.mark.parametrize("isa", cpu.instruction_sets() if cpu.available() else [])
@pytest.mark.parametrize("kind", ["shared", "each", "some", "mixed"])
@pytest.mark.parametrize("counts", [[[7], [1], [1]], [[20, 3], [1, 1], [1, 17]]], ids=["one", "two"])
def test_a_step_equals_the_step_on_dequantised_weights(kind: str, isa: str, counts: list[list[int]]) -> None:
    rng = np.random.default_rng(5)
    parts, embed = layers(kind, rng), rng.standard_normal((131, 128)).astype(np.float32)
    want = logits(weights(parts, embed, 2, dense=True), "exact", isa, counts)
    packed = weights(parts, embed, 2, dense=False)
    assert np.abs(want).max() > 0.3
    assert np.abs(logits(packed, "exact", isa, counts) - want).max() <= 1e-5 * np.abs(want).max()
    fast = logits(packed, "fast", isa, counts)
    assert np.abs(fast - want).max() <= 0.1 * np.abs(want).max()
    one = logits(weights(parts, embed, 1, dense=False), "fast", isa, counts)
    np.testing.assert_array_equal(one, fast)
