"""Matrix products of the native engine by weight format, beside a plain read: 1 row and 8 rows, weights in memory.

    python bench/kernels.py                       every format, 4096 x 4096 and 11008 x 4096
    python bench/kernels.py --only NF4 Q6_K --exact

Copies of each matrix, 300 MB or more together, are used in turn, so that no cache holds them. Every round goes through
all formats; each pass over the copies stands between two reads and carries the label of `regime.py`. Prints medians per
label: GB/s of packed bytes, their share of the read, bits per weight, and the relative error of the product against
float64 on the dequantised weights, with outlier channels; the last line is JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from regime import Regime

from llama2.compiled import make_pool, native
from llama2.quantization.packable import CodebookWeight, GroupWeight, Int8Weight

SHAPES = [(4096, 4096), (11008, 4096)]
ROTATE = 300 << 20
GGUF = {"Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34)}
GGUF |= {"Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210)}
FIELDS = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}  # float16 in a block


def gguf(name: str, rows: int, cols: int, rng: np.random.Generator) -> Callable[[Any, Any], Any]:
    type_id, width, size = GGUF[name]
    raw = rng.integers(0, 256, (rows, cols // width, size), dtype=np.uint8)
    for at in FIELDS.get(name, (0,)):
        raw[:, :, at : at + 2] = rng.uniform(0.001, 0.02, (rows, cols // width, 1)).astype(np.float16).view(np.uint8)
    return lambda arena, pool: native().pack(arena, pool, raw.reshape(-1), type_id, rows, cols, None)


def codebook(arithmetic: Any, rows: int, cols: int, rng: np.random.Generator) -> Callable[[Any, Any], Any]:
    codes = rng.integers(0, 256, rows * cols // 2, dtype=np.uint8)
    absmax = rng.uniform(0.01, 0.1, rows * cols // 64).astype(np.float32)
    return CodebookWeight(codes, absmax, (rows, cols), arithmetic=arithmetic).pack


def groups(group: int, bits: int, shuffled: bool, rows: int, cols: int, rng: np.random.Generator) -> Callable[..., Any]:
    count = 1 if group < 0 else cols // group
    codes = rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, (rows, count)).astype(np.float16)
    zeros = rng.integers(6, 10, (rows, count), dtype=np.uint8) if bits == 4 else np.full((rows, count), 128, np.uint8)
    order = rng.permutation(cols).astype(np.int32) if shuffled else None
    return GroupWeight(codes, scales, zeros, group, bits, order).pack


def int8(rows: int, cols: int, rng: np.random.Generator) -> Callable[[Any, Any], Any]:
    values = rng.integers(-127, 128, (rows, cols), dtype=np.int8)
    return Int8Weight(values, rng.uniform(1e-4, 1e-3, rows).astype(np.float32)).pack


def bfloat16(rows: int, cols: int, rng: np.random.Generator) -> Callable[[Any, Any], Any]:
    bits = (rng.standard_normal((rows, cols), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return lambda arena, pool: native().view(bits.copy(), True)


FORMATS: dict[str, Callable[[int, int, np.random.Generator], Callable[[Any, Any], Any]]] = {
    **{name: lambda r, c, g, name=name: gguf(name, r, c, g) for name in GGUF},  # type: ignore[misc]
    "NF4": lambda r, c, g: codebook("bfloat16", r, c, g),
    "NF4 int8": lambda r, c, g: codebook("int8", r, c, g),
    "GPTQ g128": lambda r, c, g: groups(128, 4, False, r, c, g),
    "GPTQ g128 act-order": lambda r, c, g: groups(128, 4, True, r, c, g),
    "GPTQ g32": lambda r, c, g: groups(32, 4, False, r, c, g),
    "GPTQ 8-bit g128": lambda r, c, g: groups(128, 8, False, r, c, g),
    "int8 rows": int8,
    "bfloat16": bfloat16,
}


class Case:
    """Copies of one matrix, used in turn."""

    def __init__(self, name: str, rows: int, cols: int, pool: Any, exact: bool, seed: int) -> None:
        self.name, self.rows, self.cols, self.pool, self.exact = name, rows, cols, pool, exact
        arena, pack = native().Arena(), FORMATS[name](rows, cols, np.random.default_rng(seed))
        first = pack(arena, pool)
        self.copies = [first] + [pack(arena, pool) for _ in range(-(-ROTATE // first.nbytes) - 1)]
        self.arena, self.bits = arena, 8 * first.nbytes / rows / cols
        self.found: dict[int, dict[str, list[tuple[float, float]]]] = {}
        rng = np.random.default_rng(1)
        self.x = rng.standard_normal((8, cols)).astype(np.float32)
        self.x[:, rng.integers(0, cols, cols // 500)] *= 20

    def multiply(self, m: int, copies: list[Any]) -> np.ndarray:
        out = np.empty((m, self.rows), np.float32)
        native().matmul_each(self.pool, "auto", copies, self.x[:m], out, self.exact)
        return out

    def error(self) -> float:
        """Relative error of the product, against float64 on the dequantised weights."""
        w = np.empty((self.rows, self.cols), np.float32)
        native().dequantize("auto", self.copies[0], w)
        want = self.x.astype(np.float64) @ w.T.astype(np.float64)
        return float(np.sqrt(np.mean((self.multiply(8, self.copies[:1]) - want) ** 2) / np.mean(want**2)))

    def round(self, regime: Regime) -> None:
        for m in (1, 8):
            size = len(self.copies) * self.copies[0].nbytes
            u = regime.time(lambda m=m: self.multiply(m, self.copies))  # type: ignore[misc]
            self.found.setdefault(m, {}).setdefault(u.label, []).append((size / u.seconds, size / u.seconds / u.read))

    def report(self, summary: dict[str, Any]) -> None:
        error, shape = self.error(), f"{self.rows}x{self.cols}"
        for m, labels in self.found.items():
            for label, values in labels.items():
                rate, share = (statistics.median(v[i] for v in values) for i in (0, 1))
                print(
                    f"{self.name:21}{shape:12}{m:3}  {label:6}{len(values):3}{rate / 1e9:8.1f}{share:8.2f}"
                    f"{max(v[1] for v in values):8.2f}{self.bits:8.3f}{error:10.1e}",
                    flush=True,
                )
                summary[f"{self.name}, {shape}, {m}, {label}"] = [round(rate / 1e9, 2), round(share, 3), error]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--shape", type=int, nargs="*", default=[0, 1], help="which of the shapes")
    args = parser.parse_args()
    pool = make_pool(args.threads)
    regime, summary = Regime(pool, 256 << 20), {}
    print(f"{'format':21}{'shape':12}rows  label  n    GB/s of read    best    bits     error")
    for rows, cols in (SHAPES[i] for i in args.shape):
        cases = [Case(name, rows, cols, pool, args.exact, i) for i, name in enumerate(args.only)]
        for _ in range(args.rounds):
            for case in cases:
                case.round(regime)
        for case in cases:
            case.report(summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
