"""Decoding bfloat16 weights of Llama-2-7B's shape beside transformers: the same tensors in memory serve both.

    python bench/bfloat16.py [--layers 8] [--rounds 8] [--tokens 4]

Random weights. The native engine reads the module's parameters in place; transformers steps its module over a
DynamicCache, with torch's threads. In turns in one process, every unit with its label and a plain read around it
(`regime.py`). The last line is JSON.
"""

import argparse
import json
import statistics
import time
import warnings

import torch
import transformers
from regime import Regime

from llama2 import LlamaConfig, LlamaForCausalLM
from llama2.cpu import CpuRunner, CpuWeights, PagedCache

PROMPT = list(range(3, 19))


def models(layers: int) -> tuple[LlamaForCausalLM, transformers.LlamaForCausalLM]:
    """Ours with random weights, theirs over the same tensors."""
    ours = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, dtype="bfloat16")).to(torch.bfloat16).eval()
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers)).to(torch.bfloat16)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    return ours, theirs.eval()


class Theirs:
    """transformers, one token at a time."""

    def __init__(self, model: transformers.LlamaForCausalLM) -> None:
        self.model, self.cache = model, transformers.DynamicCache()

    def feed(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return (
                self.model(torch.tensor([tokens]), past_key_values=self.cache, logits_to_keep=1).logits[0, -1].float()
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    module, other = models(args.layers)
    weights = CpuWeights.from_module(module)
    runner, cache, theirs = CpuRunner(weights), PagedCache(weights, 1024), Theirs(other)
    sequence, regime = cache.sequence(), Regime(weights.pool)
    first, second = torch.from_numpy(runner.feed(sequence, PROMPT)), theirs.feed(PROMPT)
    apart, size = float((first - second).abs().max()), float(second.abs().max())
    print(f"largest difference of logits {apart:.3f}, largest {size:.2f}")
    found: dict[str, list[tuple[str, float, float]]] = {"ours": [], "transformers": []}
    for _ in range(args.rounds):
        steps = {"ours": lambda: runner.feed(sequence, [7]), "transformers": lambda: theirs.feed([7])}
        for name, step in steps.items():
            time.sleep(0.05)  # the other's threads spin on for a moment after their work
            unit = regime.time(lambda step=step: [step() for _ in range(args.tokens)])
            share = weights.decode_bytes * args.tokens / unit.seconds / unit.read
            found[name].append((unit.label, args.tokens / unit.seconds, share))
    summary: dict[str, object] = {"bench": "bfloat16", "layers": args.layers}
    for label in ("same", "cross", "mixed"):
        for name, units in found.items():
            if rows := [u for u in units if u[0] == label]:
                rate, share = (statistics.median(u[i] for u in rows) for i in (1, 2))
                print(f"{label:6} {name:13} {len(rows):3} units {rate:7.2f} tokens/s, {share:.2f} of the read")
                summary[f"{name}, {label}"] = [round(rate, 2), round(share, 3)]
    ratios = [a[1] / b[1] for a, b in zip(found["ours"], found["transformers"], strict=True)]
    print(f"ratio of neighbours: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(json.dumps(summary | {"ratio": round(statistics.median(ratios), 2)}))


if __name__ == "__main__":
    main()
