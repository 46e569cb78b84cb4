"""Process start to first token on one GGUF file: llama2 against transformers, and `import torch` as the floor.

    python bench/load.py [--runs 3] [--model FILE.gguf] [--given-ids]

Every run is a fresh process; the clock runs from its start until it prints the first token. Runs are interleaved, so
that a slow minute of the machine falls on all. Files are cached: the first round is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from demo import default_model

PROMPT = "The capital of France is"
PROMPT_IDS = [504, 3575, 282, 4649, 314]

TORCH = "import torch; print(torch.tensor([0]).item(), flush=True)"
OURS = """
from llama2.auto import AutoModelForCausalLM, AutoTokenizer
path, given = {path!r}, {given!r}
if given is None:
    tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
import torch
ids = torch.tensor([given]) if given else tokenizer({prompt!r}, return_tensors="pt")["input_ids"]
out = model.generate(ids, max_new_tokens=1, do_sample=False)
print(out[0, -1].item(), flush=True)
"""
THEIRS = """
import logging, os, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, given = {folder!r}, {file!r}, {given!r}
if given is None:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
ids = torch.tensor([given]) if given else tokenizer({prompt!r}, return_tensors="pt")["input_ids"]
out = model.generate(ids, max_new_tokens=1, do_sample=False)
print(out[0, -1].item(), flush=True)
"""


def first_token(code: str) -> tuple[float, int]:
    """Seconds from starting Python to its first line, and the token on that line."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - start
        if not line.strip():
            raise SystemExit(f"the process printed no token:\n{child.stderr.read()}")
    return seconds, int(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--given-ids", action="store_true", help="leave the tokenizers out")
    args = parser.parse_args()
    model = args.model or default_model()
    given = PROMPT_IDS if args.given_ids else None
    programs = {
        "import torch": TORCH,
        "llama2": OURS.format(path=str(model), given=given, prompt=PROMPT),
        "transformers": THEIRS.format(folder=str(model.parent), file=model.name, given=given, prompt=PROMPT),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    tokens = {}
    for round_ in range(args.runs + 1):
        for name, code in programs.items():
            took, tokens[name] = first_token(code)
            if round_ > 0:
                seconds[name].append(took)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"process start to first token, {model.name}, median of {args.runs} interleaved runs")
    for name, times in seconds.items():
        print(f"  {name:14} {medians[name]:7.2f} s   ({min(times):.2f} to {max(times):.2f})")
    ratio = medians["transformers"] / medians["llama2"]
    same = tokens["llama2"] == tokens["transformers"]
    print(f"  transformers / llama2 = {ratio:.1f}; first tokens {'agree' if same else 'differ'}")
    result = {name.replace(" ", "_") + "_s": round(value, 3) for name, value in medians.items()}
    print(
        json.dumps(
            {
                "bench": "load",
                **result,
                "ratio": round(ratio, 2),
                "same_token": same,
            }
        )
    )


if __name__ == "__main__":
    main()
