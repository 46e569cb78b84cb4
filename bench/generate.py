"""What the loop above the engine costs: generate() and the command line beside the engine alone, on one GGUF file.

    python bench/generate.py                  SmolLM2-135M, the real Q4_1 file
    python bench/generate.py --tokens 200     so many new tokens a turn
    python bench/generate.py --only greedy cli
    taskset -c 0 python bench/generate.py --busy     on a machine that others use: one thread, its processor time counts
    python bench/generate.py --only predicate   what looking for changes of a torch model costs, and nothing else

The model is AutoModelForCausalLM.from_pretrained(FILE) and its generate(), as README shows them. One process, in turns:
README's lines whole, prompt, tokenizer and all, beside the engine fed by hand; the engine alone (feed and argmax), then
generate() greedy, sampled (temperature 0.6, top_p 0.9, top_k 50, with a seed
and without), sampled with a repetition penalty, the command line's loop writing text to a pipe, and, where it is
installed, llama.cpp's own high level (llama-cpp-python 0.3.36, create_completion with stream=True) greedy and sampled.
A rate counts from the first new token to the last; end tokens are forbidden or ignored, so that all write as many.
"predicate" takes, in turns, the processor time of
plain_network.difference (run once a call of generate()) and the wall time of a decoded token on the native engine:
the share is that of a token if every call wrote one only. Prints medians of the rates, of the ratios to the engine's
turn just before, and of eight prompts at once to eight sequences in the engine; the last line is JSON.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import default_model

from llama2.auto import AutoModelForCausalLM, AutoTokenizer
from llama2.cli.session import Speaker
from llama2.cpu import CpuRunner, PagedCache
from llama2.generation.config import GenerationConfig
from llama2.generation.streamers import BaseStreamer
from llama2.plain_network import difference
from llama2.runners.native import native_weights

README = "The capital of France is"
PROMPT = "The history of the lighthouse begins on a hill above the sea, where"
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50}
NO_END = 10**6  # no id: nothing ends before the last token


class Times(BaseStreamer):
    """When each token came."""

    clock = time.perf_counter

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        self.at.append(type(self).clock())

    def end(self) -> None:
        pass

    def rate(self, skip: int = 0) -> float:
        """Tokens per second behind the first one."""
        at = self.at[skip:]
        return (len(at) - 1) / (at[-1] - at[0])


class Bench:
    """The subjects; each method writes `tokens` tokens and gives tokens per second."""

    def __init__(self, path: Path, tokens: int) -> None:
        self.model, self.tokenizer = (cls.from_pretrained(path) for cls in (AutoModelForCausalLM, AutoTokenizer))
        self.tokens, self.weights = tokens, native_weights(self.model)
        assert self.weights is not None
        self.ids: list[int] = self.tokenizer(PROMPT)["input_ids"]
        self.batch = torch.tensor([self.ids] * 8)
        self.engine_runner = CpuRunner(self.weights)
        self.pipe = open(os.devnull, "w")  # noqa: SIM115
        self.rival: Any = None
        if importlib.util.find_spec("llama_cpp") is not None:
            import llama_cpp

            self.rival = llama_cpp.Llama(
                str(path), n_ctx=1024, n_threads=self.weights.pool.size, verbose=False, logits_all=False
            )

    def engine(self, rows: int = 1) -> float:
        """feed (or one step of `rows` sequences) and argmax, nothing else."""
        cache, times = PagedCache(self.weights, 1024 * rows), Times()
        sequences = [cache.sequence() for _ in range(rows)]
        new = [int(self.engine_runner.feed(s, self.ids).argmax()) for s in sequences]
        times.put(None)
        for at in range(len(self.ids), len(self.ids) + self.tokens - 1):
            if rows == 1:
                new = [int(self.engine_runner.feed(sequences[0], new).argmax())]
            else:
                view = cache.view([(s, 1) for s in sequences])
                new = self.engine_runner.step(new, np.full(rows, at), view).argmax(1).tolist()
            times.put(None)
        return rows * times.rate()

    def engine_call(self) -> float:
        """What README's call needs of the engine, its prompt included: 20 tokens."""
        ids = self.tokenizer(README).input_ids
        began = Times.clock()
        cache = PagedCache(self.weights, len(ids) + 20)
        sequence = cache.sequence()
        new = ids
        for _ in range(20):
            new = [int(self.engine_runner.feed(sequence, new).argmax())]
        return 20 / (Times.clock() - began)

    def readme(self) -> float:
        """README's lines behind the loading, word for word."""
        model, tokenizer, began = self.model, self.tokenizer, Times.clock()
        tokenizer.decode(model.generate(**tokenizer(README, return_tensors="pt"), max_new_tokens=20)[0])
        return 20 / (Times.clock() - began)

    def generate(self, **settings: Any) -> float:
        times, ids = Times(), torch.tensor([self.ids])
        self.model.generate(ids, max_new_tokens=self.tokens, eos_token_id=NO_END, streamer=times, **settings)
        return times.rate(skip=1)

    def together(self, **settings: Any) -> float:
        """Eight prompts; there is no streamer, so a criterion that never stops takes the times."""
        times = Times()

        def criterion(ids: Any, scores: Any) -> bool:
            times.put(None)
            return False

        self.model.generate(
            self.batch, max_new_tokens=self.tokens, eos_token_id=NO_END, stopping_criteria=[criterion], **settings
        )
        return 8 * times.rate()

    def cli(self, **settings: Any) -> float:
        """What `llama2 generate` does behind the parsing of its options."""

        def write(text: str) -> None:
            self.pipe.write(text)
            self.pipe.flush()

        config = GenerationConfig(max_new_tokens=self.tokens, eos_token_id=NO_END, **settings)
        answer = Speaker(self.model, self.tokenizer).say(self.ids, config, write, seed=1, continues=True)
        return (answer.tokens - 1) / answer.rest

    def llama_cpp(self, **settings: Any) -> float:
        times = Times()
        self.rival.reset()
        bias = {self.rival.token_eos(): -100.0}
        for _ in self.rival.create_completion(
            self.ids, max_tokens=self.tokens, stream=True, seed=1, logit_bias=bias, repeat_penalty=1.0, **settings
        ):
            times.put(None)
        return times.rate()


def subjects(bench: Bench) -> dict[str, tuple[str, Callable[[], float]]]:
    """Name: what it is set beside, and the turn."""
    own = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
    rival = {
        "llama.cpp greedy": ("engine", lambda: bench.llama_cpp(temperature=0.0)),
        "llama.cpp sampled": ("engine", lambda: bench.llama_cpp(**own)),
    }
    return {
        "readme": ("engine, 20 tokens", bench.readme),
        "greedy": ("engine", lambda: bench.generate(do_sample=False)),
        "sampled": ("engine", lambda: bench.generate(seed=1, **SAMPLED)),
        "sampled, no seed": ("engine", lambda: bench.generate(**SAMPLED)),
        "sampled, penalty": ("engine", lambda: bench.generate(seed=1, repetition_penalty=1.1, **SAMPLED)),
        "cli greedy": ("engine", lambda: bench.cli(do_sample=False)),
        "cli sampled": ("engine", lambda: bench.cli(**SAMPLED)),
        **(rival if bench.rival is not None else {}),
        "8 greedy": ("engine of 8", lambda: bench.together(do_sample=False)),
        "8 sampled": ("engine of 8", lambda: bench.together(seed=1, **SAMPLED)),
    }


def predicate(path: Path, rounds: int, tokens: int) -> dict[str, float]:
    """Microseconds of the predicate and of a token, medians of interleaved rounds, and the share of each call."""
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([AutoTokenizer.from_pretrained(path)(PROMPT)["input_ids"]])
    looked: list[float] = []
    decoded: list[float] = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(20):
            difference(model)
        looked.append((time.process_time() - began) / 20)
        times = Times()
        model.generate(ids, max_new_tokens=tokens, eos_token_id=NO_END, streamer=times, do_sample=False)
        decoded.append(1 / times.rate(skip=1))
    once, token = statistics.median(looked), statistics.median(decoded)
    return {
        "predicate us": round(1e6 * once, 1),
        "token us": round(1e6 * token, 1),
        "share of a token": round(once / token, 4),
        f"share, {tokens} tokens a call": round(once / token / tokens, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--busy", action="store_true", help="count this thread's processor time; not for cli")
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names")
    args = parser.parse_args()
    if args.only == ["predicate"]:
        print(json.dumps(predicate(default_model(), args.rounds, args.tokens)))
        return
    if args.busy:
        Times.clock = time.thread_time  # type: ignore[method-assign]
    bench = Bench(default_model(), args.tokens)
    chosen = {n: s for n, s in subjects(bench).items() if any(n.startswith(part) for part in args.only)}
    beside = {"engine": bench.engine, "engine of 8": lambda: bench.engine(8), "engine, 20 tokens": bench.engine_call}
    rates: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, (reference, turn) in chosen.items():
            alone = beside[reference]()
            rate = turn()
            rates.setdefault(reference, []).append(alone)
            rates.setdefault(name, []).append(rate)
            ratios.setdefault(name, []).append(rate / alone)
    summary: dict[str, Any] = {}
    print(f"{'':20}{'tokens/s':>10}{'of the engine':>15}")
    for name, values in rates.items():
        rate = statistics.median(values)
        share = statistics.median(ratios[name]) if name in ratios else 1.0
        print(f"{name:20}{rate:10.1f}{share:15.3f}")
        summary[name] = [round(rate, 1), round(share, 3)]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
