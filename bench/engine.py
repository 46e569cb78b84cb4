"""What the engine's plan, choice, text and events cost: tokens per second beside bare native steps, on one GGUF file.

    python bench/engine.py                    SmolLM2-135M, the real Q4_1 file; 1, 4 and 16 sequences
    python bench/engine.py --profile 16       where the time above the native step goes

In turns in one process: bare steps of n sequences with an argmax of each row, the engine greedy, and the engine at
temperature 0.8, top-k 40 and top-p 0.95. Each turn writes `--tokens` tokens per sequence behind a prompt of 100; a
rate counts from when all sequences have their first token. Prints medians and the median ratio to the bare steps just
before; the last line is JSON.
"""

import argparse
import cProfile
import json
import pstats
import queue
import statistics
import time
from typing import Any

import numpy as np
from demo import default_model

from llama2.auto import AutoTokenizer
from llama2.cpu import CpuRunner, PagedCache
from llama2.engine.engine import Engine
from llama2.runners.native import NativeModel

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}
NO_END = 10**6  # no id: nothing ends before the last token


class Bench:
    """The subjects; each method gives tokens per second of `rows` sequences."""

    def __init__(self, tokens: int) -> None:
        self.model, self.tokens = NativeModel.from_gguf(default_model()), tokens
        self.engine = Engine(self.model, AutoTokenizer.from_pretrained(default_model()), prefix_cache=False)
        self.runner = CpuRunner(self.model.weights)
        rng = np.random.default_rng(1)
        self.prompts: list[list[int]] = rng.integers(100, 40000, (64, 100)).tolist()

    def bare(self, rows: int) -> float:
        """Steps of the native engine and an argmax."""
        cache = PagedCache(self.model.weights, 1024 * rows)
        sequences = [cache.sequence() for _ in range(rows)]
        new = [int(self.runner.feed(s, p).argmax()) for s, p in zip(sequences, self.prompts, strict=False)]
        began = time.perf_counter()
        for at in range(100, 100 + self.tokens - 1):
            view = cache.view([(s, 1) for s in sequences])
            new = self.runner.step(new, np.full(rows, at), view).argmax(1).tolist()
        return rows * (self.tokens - 1) / (time.perf_counter() - began)

    def many(self, rows: int, **way: Any) -> float:
        """Requests of the engine."""
        events: queue.SimpleQueue[tuple[int, float, bool]] = queue.SimpleQueue()
        for i, prompt in enumerate(self.prompts[:rows]):
            seed = {"seed": i} if way else {}
            ask = self.engine.ask(prompt, max_new_tokens=self.tokens, eos_token_id=NO_END, **seed, **way)
            self.engine.submit(ask, lambda e, i=i: events.put((i, time.perf_counter(), e.finish is not None)))
        seen, times = set(), []
        while len(times) < rows * self.tokens:
            row, at, _ = events.get()
            times.append(at)
            if row not in seen:
                seen.add(row)
                together = len(times)
        return (len(times) - together) / (times[-1] - times[together - 1])


def profile(bench: Bench, rows: int) -> None:
    """The functions above the native step, by their own time."""
    bench.many(rows)
    profiler, step = cProfile.Profile(), bench.engine._step
    bench.engine._step = lambda: profiler.runcall(step)  # type: ignore[method-assign]
    bench.many(rows, **SAMPLED)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--profile", type=int, default=None, metavar="ROWS")
    args = parser.parse_args()
    bench = Bench(args.tokens)
    if args.profile:
        profile(bench, args.profile)
        return
    summary: dict[str, Any] = {}
    print(f"{'':24}{'tokens/s':>10}{'of bare steps':>15}")
    for rows in args.rows:
        found: dict[str, list[float]] = {"bare": [], "greedy": [], "sampled": []}
        for _ in range(args.rounds):
            found["bare"].append(bench.bare(rows))
            found["greedy"].append(bench.many(rows))
            found["sampled"].append(bench.many(rows, **SAMPLED))
        for name, rates in found.items():
            share = statistics.median(r / b for r, b in zip(rates, found["bare"], strict=True))
            print(f"{rows:3} sequences, {name:9}{statistics.median(rates):10.1f}{share:15.3f}", flush=True)
            summary[f"{rows} {name}"] = [round(statistics.median(rates), 1), round(share, 3)]
    bench.engine.close()
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
