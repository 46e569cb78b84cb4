"""What is left of the engine's speed beside one busy loop per processor: decode, prefill of 512, a step of LoRA.

    python bench/busy.py [--rounds 5] [--threads 2] [--no-train]

The loops are processes of the usual priority, each bound to one processor, stopped and continued by signals, so that
quiet and busy units alternate. Half of the quiet speed is a fair share; threads that spin or wait for each other get
less. Prints medians of the ratios; the last line is JSON.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from demo import default_model

from llama2.checkpoint.gguf import GgufFile
from llama2.cpu import CpuRunner, CpuWeights, PagedCache

LOOP = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


class Loops:
    """One busy process per processor, stopped until `busy` is set."""

    def __init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        self._processes = [subprocess.Popen([sys.executable, "-c", LOOP, str(cpu)]) for cpu in cpus]
        self.set(False)

    def set(self, busy: bool) -> None:
        """Continues or stops them."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
        time.sleep(0.1)

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            process.kill()
            process.wait()


def engine(threads: int | None) -> dict[str, Callable[[], None]]:
    """Decoding 64 tokens, and prefilling 512."""
    weights = CpuWeights.from_gguf(GgufFile(default_model()), threads)
    cache, runner = PagedCache(weights, 2048), CpuRunner(weights)
    rng = np.random.default_rng(0)
    prompt, token = (rng.integers(0, weights.config.vocab_size, n).astype(np.int32) for n in (512, 1))

    def decode() -> None:
        sequence = cache.sequence()
        for _ in range(64):
            runner.feed(sequence, token)
        sequence.free()

    def prefill() -> None:
        sequence = cache.sequence()
        runner.feed(sequence, prompt)
        sequence.free()

    return {"decode": decode, "prefill": prefill}


def training() -> Callable[[], None]:
    """Forward and backward of LoRA on all linears, 344 tokens."""
    import torch

    from llama2 import AutoModelForCausalLM, LoraConfig, lora

    model = AutoModelForCausalLM.from_pretrained(str(default_model()), dtype="bfloat16")
    lora.add_adapter(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.train()
    ids = torch.randint(3, 49000, (1, 344), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(ids, labels=ids).loss.backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-train", action="store_true")
    args = parser.parse_args()
    units = engine(args.threads)
    if not args.no_train:
        units["LoRA step"] = training()
    loops, found = Loops(), {}
    print("| unit | quiet s | busy s | of the quiet speed |\n|---|---|---|---|")
    try:
        for name, unit in units.items():
            unit()
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(args.rounds):
                for busy in (False, True):
                    loops.set(busy)
                    start = time.perf_counter()
                    unit()
                    times[busy].append(time.perf_counter() - start)
            quiet, beside = (statistics.median(times[busy]) for busy in (False, True))
            ratio = statistics.median(a / b for a, b in zip(times[False], times[True], strict=True))
            found[name] = {"quiet_s": quiet, "busy_s": beside, "of_quiet": ratio}
            print(f"| {name} | {quiet:.3f} | {beside:.3f} | {ratio:.2f} |", flush=True)
    finally:
        loops.close()
    print(json.dumps({"bench": "busy", "threads": args.threads or len(os.sched_getaffinity(0)), **found}))


if __name__ == "__main__":
    main()
