"""The native CPU engine beside llama.cpp on one GGUF file: decode, prefill and 16 sequences at once.

    python bench/native_gguf.py                    SmolLM2-135M, the real Q4_1 file
    python bench/native_gguf.py --shape 7b         Llama-2-7B's shape, random Q4_0 weights, written once to --folder
    python bench/native_gguf.py --context 4096     decode with so many positions cached, and nothing else

Both load the same file and run in turns in one process (llama.cpp through the C calls of llama-cpp-python 0.3.36).
The machine may move its processors between chiplets, which halves or doubles the bandwidth: every timed unit is
labelled by a cache-line ping-pong before and after it ("same" < 200 ns, "cross" > 250 ns, else "mixed"), and set
beside a plain read of as many bytes. Prints medians per label; the last line is JSON.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from demo import default_model
from random_gguf import write_7b
from regime import Regime

from llama2.checkpoint.gguf import GgufFile
from llama2.cpu import KV_DTYPES, PAGE, CachedSequence, CpuRunner, CpuWeights, KvDtype, PagedCache


class Rival:
    """llama.cpp, through its C calls."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p())
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.kv_unified = True
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = context, 512, 512, 16
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def crop(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), 0, length, -1)

    def step(self, tokens: list[int], first: int, sequences: list[int] | None = None) -> None:
        """All tokens to sequence 0 from position `first`, or token i to sequences[i] at position `first`."""
        b = self.batch
        b.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            b.token[i] = token
            b.pos[i] = first if sequences else first + i
            b.n_seq_id[i] = 1
            b.seq_id[i][0] = sequences[i] if sequences else 0
            b.logits[i] = bool(sequences) or i == len(tokens) - 1
        if llama_cpp.llama_decode(self.context, b):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits_ith(self.context, len(tokens) - 1)


class Bench:
    """Timed units with their label, beside the read."""

    def __init__(self, path: Path, threads: int | None, context: int, kv: KvDtype, rival: bool) -> None:
        start = time.perf_counter()
        self.weights = CpuWeights.from_gguf(GgufFile(path), threads)
        self.loaded = time.perf_counter() - start
        self.runner = CpuRunner(self.weights)
        self.cache = PagedCache(self.weights, context * 2, kv)
        self._rival = Rival(path, self.weights.pool.size, context) if rival else None
        self.regime = Regime(self.weights.pool)
        self.rng = np.random.default_rng(0)
        self.found: dict[str, dict[str, list[tuple[float, float]]]] = {}

    @property
    def rival(self) -> Rival:
        assert self._rival is not None
        return self._rival

    def tokens(self, count: int) -> list[int]:
        return [int(t) for t in self.rng.integers(3, self.weights.config.vocab_size - 1, count)]

    def unit(self, name: str, work: Callable[[], Any], amount: int, read_bytes: int) -> None:
        """Times `work` (amount tokens, read_bytes of weights in all) with its label and the read around it."""
        u = self.regime.time(work)
        self.found.setdefault(name, {}).setdefault(u.label, []).append(
            (amount / u.seconds, read_bytes / u.seconds / u.read)
        )

    def decode(self, count: int) -> None:
        sequence, token = self.cache.sequence(), self.tokens(1)
        self.runner.feed(sequence, self.tokens(16))
        self.rival.clear()
        self.rival.step(self.tokens(16), 0)
        size = self.weights.decode_bytes * count
        for turn in range(3):

            def ours() -> None:
                for _ in range(count):
                    self.runner.feed(sequence, token)

            def theirs(turn: int = turn) -> None:
                for i in range(count):
                    self.rival.step(token, 16 + turn * count + i)

            self.unit("decode ours", ours, count, size)
            self.unit("decode llama.cpp", theirs, count, size)
        sequence.free()

    def fill(self, context: int) -> CachedSequence:
        """A sequence of `context` positions: the first 256 are computed, the others are copies of their pages."""
        sequence, first = self.cache.sequence(), min(context, 256)
        self.runner.feed(sequence, self.tokens(first))
        self.cache.view([(sequence, context - first + 1)])  # takes the pages
        for page in range(first // PAGE, len(sequence.pages)):
            self.cache.handle.copy_page(sequence.pages[page % (first // PAGE)], sequence.pages[page])
        sequence.length = context
        if self._rival is not None:
            self.rival.clear()
            for at in range(0, context, 512):
                self.rival.step(self.tokens(min(512, context - at)), at)
        return sequence

    def decode_behind(self, context: int, count: int, rounds: int) -> None:
        """Decode with `context` positions cached; the bytes are those of the weights and of the cache together."""
        sequence, token = self.fill(context), self.tokens(1)
        held = context / self.cache.tokens * self.cache.nbytes
        size = int((self.weights.decode_bytes + held) * count)
        name = f"decode at {context}"
        for _ in range(rounds):

            def ours() -> None:
                for _ in range(count):
                    self.runner.feed(sequence, token)

            def theirs() -> None:
                for i in range(count):
                    self.rival.step(token, context + i)

            self.unit(f"{name} ours", ours, count, size)
            sequence.crop(context)
            if self._rival is not None:
                self.unit(f"{name} llama.cpp", theirs, count, size)
                self.rival.crop(context)
        sequence.free()

    def prefill(self) -> None:
        prompt, sequence = self.tokens(512), self.cache.sequence()
        self.unit("prefill ours", lambda: self.runner.feed(sequence, prompt), 512, 0)
        sequence.free()
        self.rival.clear()
        self.unit("prefill llama.cpp", lambda: self.rival.step(prompt, 0), 512, 0)

    def together(self, steps: int) -> None:
        """16 sequences, one new token each per step."""
        sequences = [self.cache.sequence() for _ in range(16)]
        self.rival.clear()

        def ours() -> None:
            for i in range(steps):
                view = self.cache.view([(s, 1) for s in sequences])
                self.runner.step([7] * 16, [i] * 16, view)

        def theirs() -> None:
            for i in range(steps):
                self.rival.step([7] * 16, i, list(range(16)))

        self.unit("16 together ours", ours, 16 * steps, 0)
        self.unit("16 together llama.cpp", theirs, 16 * steps, 0)
        for sequence in sequences:
            sequence.free()

    def report(self) -> None:
        summary: dict[str, Any] = {"load_seconds": round(self.loaded, 2)}
        print(f"{'unit':24}{'label':8}{'n':>4}{'tokens/s':>10}{'best':>10}{'of read':>9}")
        for name, labels in self.found.items():
            for label, values in labels.items():
                rate, share = (statistics.median(v[i] for v in values) for i in (0, 1))
                best = max(v[0] for v in values)
                print(f"{name:24}{label:8}{len(values):4}{rate:10.1f}{best:10.1f}{share:9.2f}")
                summary[f"{name}, {label}"] = [round(rate, 2), round(share, 3)]
        for what in sorted({name.rsplit(" ", 1)[0] for name in self.found}):
            for label in ("same", "cross", "mixed"):
                ours, theirs = (self.found.get(f"{what} {who}", {}).get(label) for who in ("ours", "llama.cpp"))
                if ours and theirs:
                    ratio = statistics.median(v[0] for v in ours) / statistics.median(v[0] for v in theirs)
                    print(f"{what}, {label}: {ratio:.2f} times llama.cpp")
                    summary[f"{what} ratio, {label}"] = round(ratio, 2)
        print(json.dumps(summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["decode", "prefill", "together"])
    parser.add_argument("--shape", choices=["smollm2", "7b"], default="smollm2")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where the 7B file is kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--context", type=int, default=None, help="decode behind so many cached positions")
    parser.add_argument("--kv", choices=KV_DTYPES, default="bfloat16", help="our keys and values (llama.cpp: float16)")
    parser.add_argument(
        "--alone", action="store_true", help="with --context: without llama.cpp, whose prompt takes minutes"
    )
    args = parser.parse_args()
    path = default_model() if args.shape == "smollm2" else args.folder / "llama2-7b-random.Q4_0.gguf"
    if not path.exists():
        write_7b(path)
    if args.context is not None:
        bench = Bench(path, args.threads, args.context + 64, args.kv, not args.alone)
        bench.decode_behind(args.context, 20 if args.shape == "smollm2" else 3, args.rounds)
        bench.report()
        return
    bench = Bench(path, args.threads, 1024, args.kv, rival=True)
    for _ in range(args.rounds):
        if "decode" in args.only:
            bench.decode(40 if args.shape == "smollm2" else 3)
        if "prefill" in args.only:
            bench.prefill()
        if "together" in args.only:
            bench.together(10 if args.shape == "smollm2" else 2)
    bench.report()


if __name__ == "__main__":
    main()
