"""Adapters in both directions beside peft, and 20 steps beside TRL, in another Python (make parity-peft).

Logits, losses of the steps, and the adapter after them.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from safetensors.torch import load_file
from tiny import random_adapter, tiny_config, tiny_model
from tolerance import ADAPTERS, STEPS_BFLOAT16, STEPS_FLOAT32

from llama2 import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, LoraConfig, lora
from llama2.checkpoint.peft import load_adapter, save_adapter
from llama2.train.answers import Preferences
from llama2.train.data import prepare, prepare_pairs
from llama2.train.objectives import NextToken, packed_rows
from llama2.train.trainer import Trainer, TrainingArguments

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
INTERPRETER = os.environ.get("LLAMA2_PEFT", "")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(1, 97, (1, 16), generator=torch.Generator().manual_seed(2))
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_dora": True},
    "patterns": {"r": 4, "target_modules": ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "all-linear": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
}
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ALL}
COLOURS = ("red", "blue", "green", "grey", "pink", "black", "white", "brown")
ROWS = {
    "sft": [{"prompt": f"The sky is {c}", "completion": f" and the sea {c} too" * (1 + i % 3)}
            for i, c in enumerate(COLOURS)],
    "dpo": [{"prompt": f"The sky is {c}", "chosen": " and " + c, "rejected": " or not " + COLOURS[i - 1]}
            for i, c in enumerate(COLOURS)],
}  # fmt: skip
# All rows in every step, so that the order of rows, which each library draws in its own way, does not matter.
STEPS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 20,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
}
THEIRS = {
    **STEPS,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch",
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "float32", {}),
    "dpo": ("dpo", "float32", {"beta": 0.2}),
    "ipo": ("dpo", "float32", {"loss_type": ["ipo"]}),
    "sft-bfloat16": ("sft", "bfloat16", {}),
    "dpo-bfloat16": ("dpo", "bfloat16", {"beta": 0.2}),
}


def base_model() -> LlamaForCausalLM:
    return tiny_model(torch.float32)


def byte_model() -> LlamaForCausalLM:
    return tiny_model(torch.float32, vocab_size=260, max_position_embeddings=128, eos_token_id=0, bos_token_id=None)


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(4)
    return LlamaForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).eval()


def randomised(model: Any, config: LoraConfig) -> Any:
    random_adapter(model, config, seed=6)
    if hasattr(model, "score"):
        torch.nn.init.normal_(model.score.weight)
    return model


def ours(kind: str) -> tuple[Any, LoraConfig]:
    """A model with a random adapter of ours."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in SETTINGS.get(kind, ADAPTER).items()}
    config = LoraConfig(**settings)
    return randomised(classifier() if kind == "labels" else base_model(), config), config


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the other interpreter makes: see by_peft.py. One process for all tests."""
    if not INTERPRETER:
        pytest.skip("needs LLAMA2_PEFT, a Python with peft and trl; `make parity-peft` makes one")
    root = tmp_path_factory.mktemp("peft")
    base_model().save_pretrained(root / "base")
    classifier().save_pretrained(root / "classifier")
    byte_model().save_pretrained(root / "bytes")
    write_tokenizer(root / "bytes")
    read = []
    for kind in (*SETTINGS, "labels"):
        model, config = ours(kind)
        save_adapter(model, root / f"ours-{kind}", config)
        base = root / ("classifier" if kind == "labels" else "base")
        read.append([f"ours-{kind}", str(base), str(root / f"ours-{kind}"), "labels" if kind == "labels" else "causal"])
    make = [[f"theirs-{kind}", str(root / "base"), {"task_type": "CAUSAL_LM", **how}] for kind, how in SETTINGS.items()]
    make.append(["theirs-labels", str(root / "classifier"), {"task_type": "SEQ_CLS", **ADAPTER}])
    more = {"task_type": "CAUSAL_LM", **ADAPTER}
    train = [
        [name, task, str(root / "bytes"), dtype, more, {**THEIRS, **how}, ROWS[task]]
        for name, (task, dtype, how) in RUNS.items()
    ]
    job = {"ids": IDS.tolist(), "make": make, "read": read, "train": train, "out": str(root)}
    (root / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("by_peft.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    ran = subprocess.run(
        [INTERPRETER, str(script), str(root / "job.json")], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return root


@torch.no_grad()
def assert_same_logits(model: Any, found: Path, name: str) -> None:
    """In float32 and in float64."""
    theirs = load_file(found / "logits.safetensors")
    want, exact = theirs[name], theirs[f"{name}-float64"]
    assert (want.dtype, exact.dtype) == (torch.float32, torch.float64)
    largest = float(exact.abs().max())
    torch.testing.assert_close(model.eval()(IDS).logits, want, rtol=0, atol=ADAPTERS * largest)
    torch.testing.assert_close(model.double()(IDS).logits, exact, rtol=0, atol=ADAPTERS * largest)


@pytest.mark.parametrize("kind", [*SETTINGS, "labels"])
def test_peft_reads_ours(found: Path, kind: str) -> None:
    assert_same_logits(ours(kind)[0], found, f"ours-{kind}")


@pytest.mark.parametrize("kind", [*SETTINGS, "labels"])
def test_we_read_pefts(found: Path, kind: str) -> None:
    model = classifier() if kind == "labels" else base_model()
    load_adapter(model, found / f"theirs-{kind}")
    assert_same_logits(model, found, f"theirs-{kind}")


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_of_trl(found: Path, tmp_path: Path, name: str) -> None:
    task, dtype, how = RUNS[name]
    model, tokenizer = byte_model().to(getattr(torch, dtype)), AutoTokenizer.from_pretrained(found / "bytes")
    load_adapter(model, found / name)
    if task == "sft":
        objective, items = NextToken(), packed_rows(prepare(ROWS["sft"], tokenizer, None)[0], None)
    else:
        objective = Preferences(beta=how.get("beta", 0.1), kind=how.get("loss_type", ["sigmoid"])[0])
        items = prepare_pairs(ROWS["dpo"], tokenizer, None)[0]
    assert len(items) == 8
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), **STEPS), objective=objective, rows=items)
    trainer.train()
    state = trainer.state
    losses, theirs = (
        [entry["loss"] for entry in state.history if "loss" in entry],
        json.loads((found / f"{name}.json").read_text()),
    )
    assert len(losses) == len(theirs) == 20 and losses[-1] < 0.9 * losses[0]
    if dtype == "bfloat16":  # rounding carries both away from TRL's float32 losses
        exact = json.loads((found / f"{task}.json").read_text())
        away = [max(abs(a - b) for a, b in zip(run, exact, strict=True)) / exact[0] for run in (losses, theirs)]
        print(f"{name}: {away[0]:.1e} of the first loss, TRL {away[1]:.1e}")
        assert away[0] < STEPS_BFLOAT16[task] and away[0] < 1.2 * away[1]
        return
    assert losses == pytest.approx(theirs, rel=STEPS_FLOAT32, abs=STEPS_FLOAT32)
    after = load_file(found / f"{name}-after" / "adapter_model.safetensors")
    for path, layer in lora.layers(model).items():
        for half in "AB":
            mine = getattr(layer, f"lora_{half}")["default"].detach()
            torch.testing.assert_close(mine, after[f"base_model.model.{path}.lora_{half}.weight"], rtol=0, atol=2e-4)
