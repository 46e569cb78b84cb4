"""The native CPU engine beside the programs of llama.cpp and ik_llama.cpp: decode, prompts, 16 sequences at once.

    bench/rivals.sh ../ik_llama.cpp                          builds them; prints the folder of the programs
    python bench/rivals.py ik=../ik_llama.cpp/build-bench/bin [llama=FOLDER ...]
    python bench/rivals.py ik=FOLDER --types Q4_0 Q4_K_M Q8_0 BF16 --layers 8

Without --types the file is SmolLM2-135M's Q4_1; with it, files of Llama-2-7B's shape with random weights and --layers
of its 32 layers are written to --folder once. ik_llama.cpp repacks as it loads (-rtr 1); flash attention is on in both.
Each round runs every program once, so that a busy machine slows all alike. Prints medians, the ratio to the fastest
rival of each round, and for decode the share of a plain read of the weights; the last line is JSON.
"""

import argparse
import json
import re
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
from demo import default_model
from random_gguf import write_7b
from regime import Regime

from llama2.checkpoint.gguf import GgufFile
from llama2.cpu import CpuRunner, CpuWeights, PagedCache

PROMPT, SEQUENCES = 512, 16
TESTS = ("decode", "prefill", "together")


class Engine:
    """Ours, in this process."""

    def __init__(self, path: Path, threads: int) -> None:
        self.weights = CpuWeights.from_gguf(GgufFile(path), threads)
        self.runner, self.cache = CpuRunner(self.weights), PagedCache(self.weights, 2 * PROMPT + 64 * SEQUENCES)
        self.regime = Regime(self.weights.pool)
        self.tokens = [int(t) for t in np.random.default_rng(0).integers(3, self.weights.config.vocab_size - 1, PROMPT)]
        self.shares: list[float] = []  # of the plain read, of each decode

    def rate(self, test: str, steps: int) -> float:
        """Tokens per second of one test."""
        return getattr(self, test)(steps)

    def decode(self, steps: int) -> float:
        sequence = self.cache.sequence()
        self.runner.feed(sequence, self.tokens[:1])
        unit = self.regime.time(lambda: [self.runner.feed(sequence, self.tokens[:1]) for _ in range(steps)])
        self.shares.append(self.weights.decode_bytes * steps / unit.seconds / unit.read)
        sequence.free()
        return steps / unit.seconds

    def prefill(self, steps: int) -> float:
        sequence = self.cache.sequence()
        start = time.perf_counter()
        self.runner.feed(sequence, self.tokens)
        seconds = time.perf_counter() - start
        sequence.free()
        return PROMPT / seconds

    def together(self, steps: int) -> float:
        sequences = [self.cache.sequence() for _ in range(SEQUENCES)]
        start = time.perf_counter()
        for i in range(steps):
            self.runner.step([7] * SEQUENCES, [i] * SEQUENCES, self.cache.view([(s, 1) for s in sequences]))
        seconds = time.perf_counter() - start
        for sequence in sequences:
            sequence.free()
        return SEQUENCES * steps / seconds


class Program:
    """llama-bench and llama-batched-bench of one folder."""

    def __init__(self, folder: Path, path: Path, threads: int, flash: bool) -> None:
        self.folder, self.common = folder, ["-m", str(path), "-t", str(threads)]
        if not (folder / "llama-bench").exists():
            raise SystemExit(f"{folder}: no llama-bench there; bench/rivals.sh builds it")
        usage = subprocess.run([folder / "llama-bench", "-h"], capture_output=True, text=True).stdout
        self.more = (["-rtr", "1"] if "-rtr" in usage else []) + ["-fa", "1" if flash else "0"]

    def rate(self, test: str, steps: int) -> float:
        """Tokens per second of one test, in a process of its own."""
        if test == "together":
            return self._together(steps)
        shape = ["-p", "0", "-n", str(steps)] if test == "decode" else ["-p", str(PROMPT), "-n", "0"]
        command = [self.folder / "llama-bench", *self.common, *self.more, *shape, "-r", "1", "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr[-500:]}")
        return float(json.loads(done.stdout[done.stdout.index("[") :])[0]["avg_ts"])

    def _together(self, steps: int) -> float:
        more = ["-rtr"] if "-rtr" in self.more else []
        shape = ["-npp", "1", "-ntg", str(steps), "-npl", str(SEQUENCES), "-c", str(SEQUENCES * (steps + 64))]
        command = [self.folder / "llama-batched-bench", *self.common, *more, *shape]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # some log it
        rows = [line.split("|") for line in done.stdout.splitlines() if re.match(r"\|\s+\d", line)]
        if done.returncode or not rows:
            raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stdout[-500:]}")
        return float(rows[-1][8])  # PP, TG, B, N_KV, T_PP, S_PP, T_TG, S_TG


def measure(path: Path, rivals: dict[str, Path], args: argparse.Namespace) -> dict[str, object]:
    """Rounds of every program on one file; prints a line per test."""
    programs: dict[str, Engine | Program] = {"ours": Engine(path, args.threads)}
    programs |= {
        name: Program(folder, path, args.threads, not args.no_flash_attention) for name, folder in rivals.items()
    }
    report: dict[str, object] = {}
    for test in args.only:
        rates: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(args.rounds):
            for name, program in programs.items():
                rates[name].append(program.rate(test, args.steps))
        fastest = [max(rates[name][i] for name in rivals) for i in range(args.rounds)]
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], fastest, strict=True))
        medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        engine = programs["ours"]
        assert isinstance(engine, Engine)
        share = f", {statistics.median(engine.shares):.2f} of the read" if test == "decode" else ""
        listed = ", ".join(f"{name} {rate}" for name, rate in medians.items())
        print(f"{path.name}: {test}: tokens/s {listed}; {ratio:.2f} times the fastest rival{share}", flush=True)
        report[test] = {**medians, "ratio": round(ratio, 2)}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rivals", nargs="+", metavar="NAME=FOLDER", help="folders of llama-bench")
    parser.add_argument("--types", nargs="*", default=[], help="file types of the 7B shape, or BF16")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where files of the 7B shape are kept")
    parser.add_argument("--only", nargs="*", choices=TESTS, default=TESTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="tokens of decode and of 16 sequences")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-flash-attention", action="store_true", help="where it was not built, which takes the compiler most time"
    )
    args = parser.parse_args()
    rivals = {name: Path(folder) for name, _, folder in (text.partition("=") for text in args.rivals)}
    if args.types:
        paths = [args.folder / f"random-7b-{args.layers}-{kind}.gguf" for kind in args.types]
    else:
        paths = [default_model()]
    report = {}
    for path, kind in zip(paths, args.types or [""], strict=True):
        if not path.exists():
            write_7b(path, kind, args.layers)
        report[path.name] = measure(path, rivals, args)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
