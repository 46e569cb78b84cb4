"""One process of tests/align/test_kills.py: a small run of PPO or GRPO, that may end by SIGKILL in a phase.

python align_worker.py '{"folder": ..., "kind": "ppo", "dies": ["scoring", 2]}'

dies: a phase, and after how many times in it. Rank 0 keeps the trained weights as OUT/after.safetensors.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bytewise import write_tokenizer
from safetensors.torch import save_file
from tiny import tiny_model

from llama2 import AutoTokenizer, GRPOConfig, GRPOTrainer, LoraConfig, PPOConfig, PPOTrainer
from llama2.train.distributed import join, shutdown

PHASES = {"sampling": "_sampled", "scoring": "_scored", "forward": "_measure", "training": "_losses",
          "update": "_update", "saving": "_write_state"}  # fmt: skip


def reward(completions: list[str], **_: Any) -> list[float]:
    """Tells answers apart."""
    return [sum(ord(c) % 3 for c in text) / 10 - 0.01 * len(text) for text in completions]


def main(job: dict[str, Any]) -> None:
    """One run, resumed where there is a checkpoint."""
    torch.set_num_threads(1)
    folder, world = Path(job["folder"]), join().world
    home = folder / f"tokenizer-{os.environ.get('RANK', '0')}"
    home.mkdir(parents=True, exist_ok=True)
    write_tokenizer(home)
    model = tiny_model(torch.float32, 0, vocab_size=260, eos_token_id=0, bos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    shared: dict[str, Any] = {
        "learning_rate": 1e-3, "max_completion_length": 8, "seed": 3, "save_steps": 1, "logging_steps": 1,
        "use_cpu": True, "resume_from_checkpoint": True, "per_device_train_batch_size": 4 // world,
    }  # fmt: skip
    prompts = [{"prompt": text} for text in ("ab", "the sky", "one two three", "x")]
    rest: dict[str, Any] = {"processing_class": AutoTokenizer.from_pretrained(home), "train_dataset": prompts,
                            "peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")}  # fmt: skip
    trainer: Any
    if job["kind"] == "ppo":
        config = PPOConfig(str(folder), gradient_accumulation_steps=2, num_mini_batches=2, num_ppo_epochs=1,
                           temperature=1.0, max_steps=6, target_kl=0.1, **shared)  # fmt: skip
        trainer = PPOTrainer(config, model=model, reward_model=reward, **rest)
    else:
        own = GRPOConfig(str(folder), num_generations=4, gradient_accumulation_steps=2, steps_per_generation=2,
                         num_iterations=2, beta=0.1, max_steps=6, **shared)  # fmt: skip
        trainer = GRPOTrainer(model, reward, own, **rest)
    if job.get("dies"):
        phase, count = job["dies"]
        seen: Counter[str] = Counter()
        inner = getattr(trainer, PHASES[phase])

        def deadly(*given: Any, **named: Any) -> Any:
            seen[phase] += 1
            if seen[phase] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*given, **named)

        setattr(trainer, PHASES[phase], deadly)
    trainer.train()
    if trainer.ranks.first:
        save_file(
            {n: p.detach().contiguous() for n, p in trainer.updates.parameters.items()}, folder / "after.safetensors"
        )
    shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
