"""20 steps of reward models, KTO, ORPO, CPO and SimPO beside TRL's trainers, in another Python (make parity-peft)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_config, tiny_model
from tolerance import STEPS_FLOAT32

from llama2 import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)
from llama2.scoring import Scorer
from llama2.train.finetune import Finetune, Recipe
from llama2.train.recipe import recipe_of
from llama2.train.trainer import Trainer, TrainingArguments

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
INTERPRETER = os.environ.get("LLAMA2_PEFT", "")
COLOURS = ("red", "blue", "green", "grey", "pink", "black", "white", "brown")
# The prompt is one token, so that ORPO's likelihood, which TRL forms of prompt and answer, is the answer's.
PAIRS = [{"prompt": "ABCDEFGH"[i], "chosen": f"sky {c}" * (1 + i % 2), "rejected": f"no {c[::-1]} sea"}
         for i, c in enumerate(COLOURS)]  # fmt: skip
RANKED = [{**row, "margin": [0.0, 1.0, 1 / 3, 2 / 3][i % 4]} for i, row in enumerate(PAIRS)]
JUDGED = [{"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
          for i, row in enumerate(PAIRS)]  # fmt: skip
# All rows in every step and in one batch, so that neither their order nor a mean of means matters.
STEPS: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 20, "learning_rate": 2e-4,
                         "lr_scheduler_type": "linear", "logging_steps": 1}  # fmt: skip
THEIRS = {**STEPS, "bf16": False, "gradient_checkpointing": False, "optim": "adamw_torch", "report_to": "none",
          "save_strategy": "no", "use_cpu": True, "max_length": 64}  # fmt: skip
# name -> task and its settings, trainer of TRL and its settings, rows
RUNS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], Any]] = {
    "reward": ("reward", {}, "reward", {}, PAIRS),
    "margins": ("reward", {"center": 0.01}, "reward", {"center_rewards_coefficient": 0.01}, RANKED),
    "kto": ("kto", {"undesirable_weight": 1.2}, "kto", {"undesirable_weight": 1.2}, JUDGED),
    "orpo": ("orpo", {"beta": 0.2}, "orpo", {"beta": 0.2}, PAIRS),
    "cpo": ("cpo", {}, "cpo", {}, PAIRS),
    "simpo": ("simpo", {"gamma": 0.5}, "cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}, PAIRS),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, and a classifier of one label, with a tokenizer whose pad token is none of the rows'."""
    if not INTERPRETER:
        pytest.skip("make parity-peft gives LLAMA2_PEFT, a Python with peft and trl")
    root = tmp_path_factory.mktemp("trl")
    for name in ("base", "scores", "rows"):
        (root / name).mkdir()
    tiny_model(torch.float32, vocab_size=260).save_pretrained(root / "base")
    torch.manual_seed(0)
    ranker = LlamaForSequenceClassification(tiny_config(vocab_size=260, num_labels=1, pad_token_id=3))
    with torch.no_grad():
        for name, parameter in ranker.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    ranker.save_pretrained(root / "scores")
    for name in ("base", "scores"):
        write_tokenizer(root / name)
        settings = root / name / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": "<|system|>"}))
    return root


def reward_model(root: Path) -> Path:
    """What `finetune reward` writes."""
    data, out = root / "rows" / "pairs.jsonl", root / "reward-model"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    recipe = Recipe(task="reward", model=str(root / "base"), data=str(data), output_dir=str(out))
    Finetune(recipe, TrainingArguments(output_dir=str(out), max_steps=2, learning_rate=1e-3)).run()
    return out


@pytest.fixture(scope="module")
def theirs(folders: Path) -> dict[str, list[float]]:
    """What TRL and transformers make of it."""
    made = reward_model(folders)
    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = [list(tokenizer(row["prompt"] + row["chosen"] + "<|end|>")["input_ids"]) for row in PAIRS]
    runs = {name: [kind, {**THEIRS, **how}, rows] for name, (_, _, kind, how, rows) in RUNS.items()}
    job = {"folder": str(folders / "base"), "scores": str(folders / "scores"), "runs": runs, "ids": ids,
           "reads": {"read": str(made)}, "out": str(folders / "found.json")}  # fmt: skip
    (folders / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    script = Path(__file__).with_name("by_trl.py")
    ran = subprocess.run(
        [INTERPRETER, str(script), str(folders / "job.json")], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, list[float]] = json.loads((folders / "found.json").read_text())
    scorer = Scorer(AutoModelForSequenceClassification.from_pretrained(made), tokenizer)
    found["ours"] = scorer.of_ids(ids)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_trls(folders: Path, theirs: dict[str, list[float]], name: str, tmp_path: Path) -> None:
    kind, settings, _, _, rows = RUNS[name]
    folder = folders / ("scores" if kind == "reward" else "base")
    task = recipe_of(kind)(task=kind, model="m", data="d", output_dir=str(tmp_path / "x"), **settings).of_task
    load: Any = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    items, _ = task.items(rows, AutoTokenizer.from_pretrained(folder), 64, None)
    trainer = Trainer(
        load.from_pretrained(folder, dtype="float32"),
        TrainingArguments(output_dir=str(tmp_path), **STEPS, save_strategy="no"),
        objective=task.objective(items),
        rows=items,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.history if "loss" in entry]
    assert len(losses) == len(theirs[name]) == 20
    assert losses == pytest.approx(theirs[name], rel=STEPS_FLOAT32, abs=STEPS_FLOAT32)
    assert losses[-1] < 0.95 * losses[0]


def test_transformers_reads_our_reward_models(theirs: dict[str, list[float]]) -> None:
    assert theirs["ours"] == pytest.approx(theirs["read"], rel=1e-4, abs=1e-5)
