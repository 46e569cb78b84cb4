"""Multiple choice beside lm-evaluation-harness's own `hf` class: numbers and speed, on the same requests in float32.

    python bench/evaluate.py TASK.json [--limit 40] [--shots 0,5]

TASK is a file that `llama2 evaluate` takes, such as a task.json of BIG-bench (the package `bigbench` ships hundreds).
Both classes hold SmolLM2-135M in float32 on the same threads and answer the same requests in turns. Prints the largest
difference of a request's log-likelihood, requests per second and their ratio; the last line is JSON.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from demo import default_model
from lm_eval.models.huggingface import HFLM

from llama2 import AutoModelForCausalLM, AutoTokenizer
from llama2.evaluate import tasks
from llama2.evaluate.harness import HarnessModel


def requests(path: str, shots: int, limit: int) -> list[Any]:
    """The requests that lm-eval makes of a task."""
    (task,) = tasks.load(tasks.entries([path]), shots).load(())["tasks"].values()
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    found: list[Any] = task.instances
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--limit", type=int, default=40, help="questions")
    parser.add_argument("--shots", default="0,5", help="examples before each question")
    parser.add_argument("--batch", default="8", help="of the hf class")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_pretrained(default_model(), dtype="float32").save_pretrained(folder)
        AutoTokenizer.from_pretrained(default_model()).save_pretrained(folder)
        theirs = HFLM(pretrained=folder, dtype="float32", batch_size=int(args.batch), device="cpu")
        ours = HarnessModel(folder, dtype="float32")
        print("| shots | requests | llama2, per s | hf, per s | ratio | largest difference | same choice |")
        print("| ---: " * 7 + "|")
        for shots in map(int, args.shots.split(",")):
            asked = requests(args.task, shots, args.limit)
            ours.loglikelihood(asked[:4], disable_tqdm=True)  # loads the model
            found, seconds = {}, {}
            for name, lm in (("llama2", ours), ("hf", theirs)):
                began = time.perf_counter()
                found[name] = lm.loglikelihood(asked, disable_tqdm=True)
                seconds[name] = time.perf_counter() - began
            pairs = list(zip(found["llama2"], found["hf"], strict=True))
            result = {
                "shots": shots,
                "requests": len(asked),
                "llama2_per_s": len(asked) / seconds["llama2"],
                "hf_per_s": len(asked) / seconds["hf"],
                "ratio": seconds["hf"] / seconds["llama2"],
                "difference": max(abs(a[0] - b[0]) for a, b in pairs),
                "same_greedy": sum(a[1] == b[1] for a, b in pairs) / len(pairs),
            }
            results.append(result)
            print(
                f"| {shots} | {len(asked)} | {result['llama2_per_s']:.1f} | {result['hf_per_s']:.2f} | "
                f"{result['ratio']:.2f} | {result['difference']:.1e} | {result['same_greedy']:.0%} |",
                flush=True,
            )
    name = Path(args.task).parent.name if Path(args.task).name == "task.json" else Path(args.task).stem
    print(json.dumps({"bench": "evaluate", "task": name, "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
