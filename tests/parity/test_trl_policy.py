"""GRPO and RLOO beside TRL on the same completions and rewards, in another Python (make parity-peft).

Losses of the steps, and the weights after them.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from align.policies import write_policy
from safetensors.torch import load_file

from llama2 import AutoTokenizer, GRPOConfig, GRPOTrainer, LlamaForCausalLM, RLOOConfig, RLOOTrainer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
INTERPRETER = os.environ.get("LLAMA2_PEFT", "")
PROMPTS = ["the sky", "a b c d", "x", "water boils at"]
COUNT = 4
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "num_generations": COUNT,
    "max_completion_length": 12,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "max_steps": 4,
    "num_iterations": 2,
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dapo": ("grpo", {}),
    "grpo": ("grpo", {"loss_type": "grpo", "beta": 0.04}),
    "dr_grpo": ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "batch": ("grpo", {"scale_rewards": "batch", "beta": 0.1, "use_bias_correction_kl": False}),
    "cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": 1.05}),
    "gspo": ("grpo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-3}),
    "masked": ("grpo", {"loss_type": "grpo", "mask_truncated_completions": True, "temperature": 0.8}),
    "rloo": ("rloo", {}),
    "normalised": ("rloo", {"normalize_advantages": True, "beta": 0.2}),
}
THEIRS = {"bf16": False, "gradient_checkpointing": False, "optim": "adamw_torch", "report_to": "none",
          "save_strategy": "no", "use_cpu": True, "disable_dropout": True}  # fmt: skip


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """As by_trl_policy.py."""
    return [sum(ids) % 7 / 3 - len(ids) / 10 for ids in completion_ids]


def answers() -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(4)
    found: dict[str, list[list[int]]] = {}
    for text in PROMPTS:
        found[text] = []
        for k in range(COUNT):
            length = int(torch.randint(2, 10, (1,), generator=generator))
            ids = torch.randint(4, 260, (length if k else 12,), generator=generator).tolist()
            found[text].append([*ids, 0] if k else ids)  # the first one of each is cut
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What TRL makes of the job."""
    if not INTERPRETER:
        pytest.skip("needs LLAMA2_PEFT, a Python with TRL (make parity-peft)")
    folder = tmp_path_factory.mktemp("trl")
    write_policy(folder / "model")
    runs = [[name, kind, {**SHARED, **how, **THEIRS}] for name, (kind, how) in RUNS.items()]
    job = {"model": str(folder / "model"), "prompts": PROMPTS, "answers": answers(), "runs": runs, "out": str(folder)}
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("by_trl_policy.py")
    subprocess.run([INTERPRETER, str(script), str(folder / "job.json")], check=True, timeout=900)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_steps_of_trl(name: str, found: Path, tmp_path: Path) -> None:
    kind, how = RUNS[name]
    model = LlamaForCausalLM.from_pretrained(found / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(found / "model")
    given = answers()

    def fixed(prompts: list[str], trainer: Any) -> dict[str, Any]:
        made = [given[text][i % COUNT] for i, text in enumerate(prompts)]
        return {
            "prompt_ids": [tokenizer(text)["input_ids"] for text in prompts],
            "completion_ids": made,
            "logprobs": None,
        }

    settings = {**SHARED, **how, "use_cpu": True, "save_strategy": "no", "output_dir": str(tmp_path)}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if kind == "grpo":
        trainer: Any = GRPOTrainer(model, reward, GRPOConfig(**settings), [{"prompt": p} for p in PROMPTS],
                                   processing_class=tokenizer, rollout_func=fixed)  # fmt: skip
    else:
        trainer = RLOOTrainer(model, reward, RLOOConfig(**settings), [{"prompt": p} for p in PROMPTS],
                              processing_class=tokenizer, rollout_func=fixed)  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    theirs = json.loads((found / f"{name}.json").read_text())
    assert len(losses) == len(theirs) == 4
    assert losses == pytest.approx(theirs, abs=1e-5)
    after = load_file(found / f"{name}.safetensors")
    moved = max(float((p - before[n]).abs().max()) for n, p in model.named_parameters())
    away = max(float((p - after[n]).abs().max()) for n, p in model.named_parameters())
    assert moved > 4e-3 and away < 0.02 * moved
