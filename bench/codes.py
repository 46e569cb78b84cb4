"""Decode at Llama-2-7B's shape from packed codes, and what share of a plain read of the same bytes it reaches.

    python bench/codes.py                              GPTQ g128, NF4, int8, NF4 in bfloat16, Q4_0; all 32 layers
    python bench/codes.py --only NF4 --layers 16

Random codes with scales that keep activations finite, packed as the loader packs a checkpoint's; embedding and head
stay in bfloat16, as in such checkpoints. One format after the other, so that memory holds one model. Every unit of a
few tokens stands between two reads with all threads and carries the label of `regime.py`. The share is bytes of weights
that a token reads, times tokens per second, over the faster of the two reads; the cache is 16 positions long. Prints
medians per label; the last line is JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from kernels import GGUF
from regime import Regime

from llama2.compiled import native
from llama2.config import LlamaConfig
from llama2.cpu import CpuRunner, CpuWeights, PagedCache
from llama2.quantization.packable import CodebookWeight, GroupWeight, Int8Weight


def codebook(arithmetic: Any) -> Callable[[int, int, np.random.Generator], Any]:
    def made(rows: int, cols: int, rng: np.random.Generator) -> Any:
        codes = rng.integers(0, 256, rows * cols // 2, dtype=np.uint8)
        absmax = rng.uniform(0.5, 1.5, rows * cols // 64).astype(np.float32) * np.float32(1.5 / np.sqrt(cols))
        return CodebookWeight(codes, absmax, (rows, cols), arithmetic=arithmetic).pack

    return made


def groups(rows: int, cols: int, rng: np.random.Generator) -> Any:
    codes = rng.integers(0, 16, (rows, cols), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1.5, (rows, cols // 128)) * 0.2 / np.sqrt(cols)).astype(np.float16)
    return GroupWeight(codes, scales, rng.integers(6, 10, (rows, cols // 128), dtype=np.uint8), 128).pack


def int8(rows: int, cols: int, rng: np.random.Generator) -> Any:
    values = rng.integers(-127, 128, (rows, cols), dtype=np.int8)
    return Int8Weight(values, np.full(rows, 0.013 / np.sqrt(cols), np.float32)).pack


def q4_0(rows: int, cols: int, rng: np.random.Generator) -> Any:
    raw = rng.integers(0, 256, (rows, cols // 32, 18), dtype=np.uint8)
    raw[:, :, :2] = np.float16(0.2 / np.sqrt(cols)).reshape(1).view(np.uint8)
    return lambda arena, pool: native().pack(arena, pool, raw.reshape(-1), GGUF["Q4_0"][0], rows, cols, None)


FORMATS: dict[str, Callable[[int, int, np.random.Generator], Any]] = {
    "GPTQ g128": groups,
    "NF4": codebook("int8"),
    "int8 rows": int8,
    "NF4 in bfloat16": codebook("bfloat16"),
    "Q4_0": q4_0,
}


class RandomWeights(CpuWeights):
    """The 7B shape with random codes; matrices of one shape have the same codes, each its own place."""

    def __init__(self, name: str, layers: int, threads: int | None) -> None:
        super().__init__(LlamaConfig.preset("7b", num_hidden_layers=layers), threads)
        c, rng = self.config, np.random.default_rng(0)
        h, f, ones = c.hidden_size, c.intermediate_size, np.ones(c.hidden_size, np.float32)
        packs = {shape: FORMATS[name](*shape, rng) for shape in ((h, h), (f, h), (h, f))}
        shapes = {**dict.fromkeys("qkvo", (h, h)), "gate": (f, h), "up": (f, h), "down": (h, f)}
        normal = rng.standard_normal((c.vocab_size, h), np.float32) / np.float32(np.sqrt(h))
        table = (normal.view(np.uint32) >> 16).astype(np.uint16)
        self._begin(self.view(table, bfloat16=True), self.view(table.copy(), bfloat16=True), ones)
        for _ in range(layers):
            parts = {}
            for part, shape in shapes.items():
                parts[part] = packs[shape](self._arena, self.pool)
                self._matrices.append(parts[part])
            self._layer(ones, ones, parts)


def measure(name: str, args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Times one format and prints its rows."""
    weights = RandomWeights(name, args.layers, args.threads)
    runner, cache = CpuRunner(weights), PagedCache(weights, 256)
    regime, found = Regime(weights.pool), {}
    sequence = cache.sequence()
    logits = runner.feed(sequence, list(range(1, 17)))
    assert np.isfinite(logits).all() and logits.std() > 0

    def tokens() -> None:
        for _ in range(args.tokens):
            runner.feed(sequence, [5])

    for _ in range(args.rounds):
        u = regime.time(tokens)
        sequence.crop(16)
        rate = args.tokens / u.seconds
        found.setdefault(u.label, []).append((rate, weights.decode_bytes * rate / u.read, u.read))
    size = weights.decode_bytes / 1e9
    for label, values in found.items():
        rate, share, read = (statistics.median(v[i] for v in values) for i in range(3))
        best = max(v[1] for v in values)
        print(
            f"{name:18}{size:6.2f}  {label:6}{len(values):3}{rate:9.2f}{rate * size:8.1f}{read / 1e9:8.1f}"
            f"{share:9.3f}{best:8.3f}",
            flush=True,
        )
        summary[f"{name}, {label}"] = [len(values), round(rate, 3), round(share, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=3, help="tokens of a unit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    print(f"{'format':18}{'GB':>6}  label   n  tokens/s    GB/s    read of read    best")
    summary: dict[str, Any] = {"layers": args.layers}
    for name in args.only:
        measure(name, args, summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
