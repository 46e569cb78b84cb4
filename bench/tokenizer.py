"""Tokenizer throughput against its rivals, interleaved in one process; the last line is JSON.

    python bench/tokenizer.py path/to/tokenizer.model path/to/text [--rounds 7]

Our fast class against the same vocabulary through transformers (a tokenizer.json with Meta's behaviour, loaded as
PreTrainedTokenizerFast); our slow class against bare sentencepiece. One paragraph a line; MB/s of UTF-8. (Not named
tokenize.py: as a script that would shadow the standard library's module.)
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerFast

from llama2.tokenizer import LlamaTokenizer, LlamaTokenizerFast


def measure(contestants: dict[str, Callable[[], object]], rounds: int, size: int) -> dict[str, list[float]]:
    """MB/s of each contestant in each round; the order turns from round to round."""
    names = list(contestants)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            contestants[name]()
            elapsed = time.perf_counter() - start
            if i:  # the first round warms up
                speeds[name].append(size / elapsed / 1e6)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    texts = arguments.text.read_text(encoding="utf-8").splitlines()
    size = sum(len(t.encode()) for t in texts)
    fast, slow = LlamaTokenizerFast(arguments.model), LlamaTokenizer(arguments.model)
    bare = sentencepiece.SentencePieceProcessor(model_file=str(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        rival = PreTrainedTokenizerFast.from_pretrained(folder)
    assert fast(texts)["input_ids"] == rival(texts)["input_ids"] == slow(texts)["input_ids"]

    results = {}
    short = [t[:80] for t in texts]
    short_size = sum(len(t.encode()) for t in short)
    cases: list[tuple[str, int, dict[str, Callable[[], object]]]] = [
        ("batch", size, {"llama2 fast": lambda: fast(texts), "transformers": lambda: rival(texts)}),
        (
            "single",
            size,
            {"llama2 fast": lambda: [fast(t) for t in texts], "transformers": lambda: [rival(t) for t in texts]},
        ),
        (
            "short",
            short_size,
            {"llama2 fast": lambda: [fast(t) for t in short], "transformers": lambda: [rival(t) for t in short]},
        ),
        (
            "slow batch",
            size,
            {"llama2 slow": lambda: slow(texts), "sentencepiece": lambda: bare.encode(texts, add_bos=True)},
        ),
        (
            "slow single",
            size,
            {
                "llama2 slow": lambda: [slow.encode(t) for t in texts],
                "sentencepiece": lambda: [bare.encode(t, add_bos=True) for t in texts],
            },
        ),
    ]
    print(f"{'case':12} {'ours MB/s':>10} {'rival MB/s':>10} {'ratio':>7}")
    for name, volume, contestants in cases:
        ours, theirs = measure(contestants, arguments.rounds, volume).values()
        ratio = statistics.median(a / b for a, b in zip(ours, theirs))
        results[name] = round(ratio, 3)
        print(f"{name:12} {statistics.median(ours):10.2f} {statistics.median(theirs):10.2f} {ratio:7.2f}")
    print(json.dumps({"bench": "tokenizer", "bytes": size, "ratios": results}))


if __name__ == "__main__":
    main()
