"""Decoding one sequence with torch on this machine, beside transformers' generate, in bfloat16 on SmolLM2-135M.

    python bench/decode.py [--rounds 5] [--tokens 64]

Both run the same weights (the GGUF file dequantised, saved once, loaded by both), the same prompt, greedy, in turns in
one process. Prints tokens per second, GB/s of weights read per token and the share of this process's plain read.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import transformers
from demo import default_model

from llama2 import AutoModelForCausalLM


def read_bandwidth() -> float:
    """GB/s of summing 512 MB of int64 with all threads: what reading the weights once could cost at best."""
    data = torch.zeros(64 * 2**20, dtype=torch.int64)
    start = time.perf_counter()
    data.sum()
    return data.numel() * 8 / (time.perf_counter() - start) / 1e9


def rate(generate: Callable[[int], torch.Tensor], tokens: int) -> float:
    """Decoded tokens per second: the time of `tokens` new tokens less the time of one, so that prefill is out."""
    start = time.perf_counter()
    generate(1)
    first = time.perf_counter()
    generate(tokens + 1)
    return tokens / (time.perf_counter() - first - (first - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a turn")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_pretrained(default_model(), dtype="bfloat16").save_pretrained(folder)
        ours = AutoModelForCausalLM.from_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        ids = torch.randint(3, 49000, (1, 32), generator=torch.Generator().manual_seed(0))
        greedy = {"do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)

        def here(n: int) -> torch.Tensor:
            return ours.generate(ids, max_new_tokens=n, min_new_tokens=n, runner="torch", **greedy)

        def there(n: int) -> torch.Tensor:
            return theirs.generate(ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, **greedy)

        here(4), there(4)
        turns = range(args.rounds)
        rows = [(rate(here, args.tokens), rate(there, args.tokens), read_bandwidth()) for _ in turns]
        weights = ours.get_memory_footprint() / 1e9
        equal = float((here(32) == there(32)).float().mean())

    print(
        "| round | llama2 tok/s | transformers tok/s | ratio | GB/s | of read |\n| --- | --- | --- | --- | --- | --- |"
    )
    for number, (a, b, read) in enumerate(rows):
        print(f"| {number} | {a:.1f} | {b:.1f} | {a / b:.2f} | {a * weights:.1f} | {a * weights / read:.2f} |")
    result = {
        "bench": "decode",
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "llama2_tok_s": statistics.median(r[0] for r in rows),
        "transformers_tok_s": statistics.median(r[1] for r in rows),
        "ratio": statistics.median(r[0] / r[1] for r in rows),
        "share_of_read": statistics.median(r[0] * weights / r[2] for r in rows),
        "same_tokens": equal,
    }
    print(f"\nmedian ratio {result['ratio']:.2f}; bfloat16 greedy tokens equal on {equal:.0%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
