"""Matrix products of the native engine on every instruction set that this processor has, in turns in one run.

    python bench/isas.py                     Q4_0, Q4_K and Q8_0, 4096 x 4096, 1, 8 and 64 rows of activations
    python bench/isas.py --only Q4_0 --rounds 15

Every round goes through all instruction sets, so that a busy machine slows all of them alike. Prints GMAC/s (median of
the rounds) and the ratio to AVX2's in the same round; the last line is JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np
from kernels import GGUF, gguf

from llama2.compiled import instruction_sets, make_pool, native

ROWS, COLS, TOKENS = 4096, 4096, (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(GGUF), default=["Q4_0", "Q4_K", "Q8_0"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    rng, pool, arena = np.random.default_rng(0), make_pool(args.threads), native().Arena()
    found = {}
    isas = [isa for isa in instruction_sets() if isa != "scalar"]
    print("| weights | rows | " + " | ".join(f"{isa} GMAC/s (of avx2)" for isa in isas) + " |")
    print("|---|---|" + "---|" * len(isas))
    for name in args.only:
        packed = gguf(name, ROWS, COLS, rng)(arena, pool)
        for tokens in TOKENS:
            x, out = rng.standard_normal((tokens, COLS), dtype=np.float32), np.empty((tokens, ROWS), np.float32)
            times: dict[str, list[float]] = {isa: [] for isa in isas}
            for _ in range(args.rounds):
                for isa in isas:
                    native().matmul(pool, isa, packed, x, out, False)
                    start = time.perf_counter()
                    for _ in range(max(16 // tokens, 1)):
                        native().matmul(pool, isa, packed, x, out, False)
                    times[isa].append((time.perf_counter() - start) / max(16 // tokens, 1))
            rates = {isa: tokens * ROWS * COLS / statistics.median(times[isa]) / 1e9 for isa in isas}
            ratios = {
                isa: statistics.median(b / a for a, b in zip(times[isa], times["avx2"], strict=True))
                for isa in isas
                if "avx2" in times
            }
            cells = [f"{rates[isa]:.1f} ({ratios.get(isa, float('nan')):.2f})" for isa in isas]
            print(f"| {name} | {tokens} | " + " | ".join(cells) + " |", flush=True)
            found[f"{name} {tokens}"] = {"gmac_s": rates, "of_avx2": ratios}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
