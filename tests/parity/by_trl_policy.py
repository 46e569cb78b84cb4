"""What GRPO and RLOO of TRL, in the interpreter that runs this file, make of fixed completions and rewards.

    python by_trl_policy.py JOB.json

JOB: {"model": folder, "prompts": texts, "answers": ids by text and number, "eos": id, "runs": [[name, "grpo" or "rloo",
settings of the configuration]], "out": a folder}. OUT/NAME.safetensors are the weights after the run, OUT/NAME.json the
losses of its steps. Generation alone is replaced. Knows nothing of this library.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Of the ids alone."""
    return [sum(ids) % 7 / 3 - len(ids) / 10 for ids in completion_ids]


def trained(job: dict[str, Any], name: str, kind: str, settings: dict[str, Any]) -> None:
    """One run."""
    trainer_class, config = TRAINERS[kind]
    folder, out = job["model"], Path(job["out"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config(output_dir=str(out / name), **settings),
        train_dataset=Dataset.from_list([{"prompt": text} for text in job["prompts"]]),
        processing_class=tokenizer,
    )

    def answers(prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        seen: Counter[str] = Counter()
        found = []
        for ids in prompt_ids:
            text = tokenizer.decode(ids)
            found.append(job["answers"][text][seen[text]])
            seen[text] += 1
        return (found, None) if kind == "grpo" else found

    trainer._generate_single_turn = answers
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (out / f"{name}.json").write_text(json.dumps(losses))
    save_file({n: p.detach().clone() for n, p in trainer.model.named_parameters()}, out / f"{name}.safetensors")


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    for one in given["runs"]:
        trained(given, *one)
