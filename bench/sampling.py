"""Time of picking one token of a row of logits in the engine: by setting, alone and beside a busy thread.

    python bench/sampling.py               49,152 and 32,000 entries, 300 rows of each setting, five rounds in turns
    python bench/sampling.py --rows 100

The busy thread parses JSON and so holds the interpreter's lock but for moments, as a server's checks of large bodies
do. Prints microseconds per row, the median of the rounds' medians, alone and beside it. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from llama2.engine.sampler import TokenSampler
from llama2.generation.config import GenerationConfig
from llama2.serve.logits_processors import Bias, CountPenalty

PROMPT = list(range(3, 67))
SAMPLED = {"do_sample": True, "top_k": 0}


class Half:
    """Lets half of the ids through, as a constraint does; the mask stands in for that of a grammar."""

    def __init__(self, vocabulary: int) -> None:
        from llama2.serve.constraint import Constrained

        class Matcher:
            def consume_tokens(self, tokens: list[int]) -> bool:
                return True

            def is_error(self) -> bool:
                return False

            def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
                import ctypes

                ctypes.memset(address, 0x55, size)

        self.processor = Constrained(Matcher(), len(PROMPT), vocabulary)

    def __call__(self, ids: Any, scores: Any) -> Any:
        return self.processor(ids, scores)


def cases(vocabulary: int) -> dict[str, Callable[[], TokenSampler]]:
    """What makes a sequence's choice, by name."""

    def choice(own: Callable[[], list[Any]] = list, logprobs: int | None = None, **settings: Any) -> TokenSampler:
        return TokenSampler(GenerationConfig(**settings), PROMPT, 100_000, 7, logprobs, own())

    def penalties() -> list[Any]:
        return [Bias({5: 1.0, 6: -1.0}), CountPenalty(0.5, 0.5, len(PROMPT))]

    return {
        "greedy": choice,
        "greedy, 5 logprobs": lambda: choice(logprobs=5),
        "temperature": lambda: choice(**SAMPLED, temperature=0.8),
        "top-k 40, top-p 0.9": lambda: choice(do_sample=True, temperature=0.8, top_k=40, top_p=0.9),
        "top-p 0.9": lambda: choice(**SAMPLED, temperature=0.8, top_p=0.9),
        "min-p 0.1": lambda: choice(**SAMPLED, temperature=0.8, min_p=0.1),
        "typical 0.9": lambda: choice(**SAMPLED, typical_p=0.9),
        "penalties, greedy": lambda: choice(penalties, repetition_penalty=1.1),
        "penalties, top-p 0.9": lambda: choice(penalties, **SAMPLED, top_p=0.9, repetition_penalty=1.1),
        "mask, greedy": lambda: choice(lambda: [Half(vocabulary)]),
        "mask, top-p 0.9": lambda: choice(lambda: [Half(vocabulary)], **SAMPLED, top_p=0.9),
    }


@contextmanager
def busy() -> Iterator[None]:
    """A thread that wants the interpreter's lock all the time."""
    text, stop = json.dumps(list(range(20_000))), threading.Event()

    def work() -> None:
        while not stop.is_set():
            json.loads(text)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure(choice: TokenSampler, logits: list[Any]) -> float:
    """Median microseconds per row."""
    took = []
    for row in logits:
        began = time.perf_counter()
        choice(row)
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sys.setswitchinterval(0.001)  # as the server has it
    told: dict[str, dict[str, float]] = {}
    for vocabulary in (49_152, 32_000):
        numbers = np.random.default_rng(1)
        logits = [3 * numbers.standard_normal(vocabulary, np.float32) for _ in range(16)]
        rows = [logits[i % len(logits)] for i in range(args.rows)]
        made = cases(vocabulary)
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.rounds):
            for name, make in made.items():
                found.setdefault((name, "alone"), []).append(measure(make(), rows))
                with busy():
                    found.setdefault((name, "beside"), []).append(measure(make(), rows[: max(args.rows // 10, 5)]))
        print(f"| {vocabulary} entries, us per row | alone | beside a busy thread |\n|---|---|---|")
        for name in made:
            alone, beside = (statistics.median(found[name, where]) for where in ("alone", "beside"))
            told[f"{name} of {vocabulary}"] = {"alone_us": alone, "beside_us": beside}
            print(f"| {name} | {alone:.0f} | {beside:.0f} |")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
