"""Several runs in one folder, runs that are gone on from, and what a resumed run may not differ in."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import AutoTokenizer, InputError, LoraConfig, Trainer, TrainingArguments, lora
from llama2.train import checkpoints
from llama2.train.answers import Preferences
from llama2.train.data import prepare_pairs

ROWS: list[Any] = [{"input_ids": [1 + i, 2, 3, 4]} for i in range(8)]


def trainer(out: Path, config: LoraConfig | None = None, rows: list[Any] | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = tiny_model(torch.float32)
    lora.add_adapter(model, config or LoraConfig(r=2, lora_alpha=16))
    args = TrainingArguments(**{"output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 4,
                                "save_steps": 1, "learning_rate": 1e-2, **settings})  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=rows or ROWS)


def steps(out: Path) -> list[str]:
    return [path.name for path in checkpoints.found(out)]


def test_a_second_run_removes_neither_its_own_new_checkpoints_nor_the_others(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=9, save_steps=3, save_total_limit=2).train()
    assert steps(tmp_path) == ["checkpoint-6", "checkpoint-9"]
    weights = (tmp_path / "checkpoint-9" / "trainable.safetensors").read_bytes()
    second = trainer(tmp_path, max_steps=4, save_total_limit=2)
    second.train()
    assert steps(tmp_path) == ["checkpoint-6", "checkpoint-9", "checkpoint-3", "checkpoint-4"]
    assert (tmp_path / "checkpoint-9" / "trainable.safetensors").read_bytes() == weights
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-4"  # of the run that began last


def test_a_checkpoint_of_the_same_step_is_kept_aside(tmp_path: Path) -> None:
    """Also at the end of a run, where another's last checkpoint has the same number."""
    trainer(tmp_path, save_steps=10).train()
    before = (tmp_path / "checkpoint-3" / "trainable.safetensors").read_bytes()
    trainer(tmp_path, save_steps=10, learning_rate=3e-2).train()
    assert (tmp_path / "checkpoint-3-earlier-1" / "trainable.safetensors").read_bytes() == before
    assert (tmp_path / "checkpoint-3" / "trainable.safetensors").read_bytes() != before


def test_what_was_killed_before_its_first_checkpoint_logs_no_step_twice(tmp_path: Path) -> None:
    lines = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n'
    (tmp_path / "log.jsonl").write_text(lines)
    trainer(tmp_path, resume_from_checkpoint=True, logging_steps=1).train()
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in found if "loss" in entry] == [1, 2, 3]


def test_training_longer(tmp_path: Path) -> None:
    """The first steps' rows and random numbers are those of a longer run; with a constant rate so are the weights."""
    trainer(tmp_path / "a", max_steps=3, lr_scheduler_type="constant", save_total_limit=2).train()
    longer = trainer(tmp_path / "a", max_steps=6, lr_scheduler_type="constant", save_total_limit=2,
                     resume_from_checkpoint=True)  # fmt: skip
    longer.train()
    straight = trainer(tmp_path / "b", max_steps=6, lr_scheduler_type="constant")
    straight.train()
    assert longer.state.global_step == 6 and steps(tmp_path / "a") == ["checkpoint-5", "checkpoint-6"]
    pairs = zip(longer.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("config", "rows", "said"),
    [
        (LoraConfig(r=2, lora_alpha=32), None, "lora_alpha (16.0, not 32.0)"),
        (LoraConfig(r=2, lora_alpha=16, lora_dropout=0.1), None, "lora_dropout (0.0, not 0.1)"),
        (LoraConfig(r=2, lora_alpha=16), [{"input_ids": [9, 2, 3, 4]}, *ROWS[1:]], "the rows"),
    ],
)
def test_what_is_gone_on_from_must_be_the_same_run(
    tmp_path: Path, config: LoraConfig, rows: list[Any] | None, said: str
) -> None:
    trainer(tmp_path).train()
    with pytest.raises(InputError, match=f"of another run: it differs in {re.escape(said)};"):
        trainer(tmp_path, config, rows, max_steps=5, resume_from_checkpoint=True).train()


def test_another_objective_is_another_run(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 4
    pairs = prepare_pairs(rows, AutoTokenizer.from_pretrained(tmp_path), None)[0]

    def run(beta: float, **more: Any) -> None:
        model = tiny_model(torch.float32, vocab_size=300)
        lora.add_adapter(model, LoraConfig(r=2))
        args = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, **more)
        Trainer(model=model, args=args, objective=Preferences(beta=beta), rows=pairs).train()

    run(0.1)
    with pytest.raises(InputError, match=r"it differs in beta \(0.1, not 0.5\)"):
        run(0.5, resume_from_checkpoint=True)


def test_a_run_killed_behind_its_last_checkpoint_keeps_no_more_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step follows after which the oldest would be removed."""
    with monkeypatch.context() as killed:
        killed.setattr(checkpoints, "prune", lambda *_: None)
        trainer(tmp_path, save_total_limit=2).train()
    assert steps(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    trainer(tmp_path, save_total_limit=2, resume_from_checkpoint=True).train()
    assert steps(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_checkpoints_of_earlier_versions_name_no_run(tmp_path: Path) -> None:
    first = trainer(tmp_path, save_total_limit=2)
    first.train()
    for place in checkpoints.found(tmp_path):
        content = json.loads((place / checkpoints.MANIFEST).read_text())
        del content["run"]
        (place / checkpoints.MANIFEST).write_text(json.dumps(content))
    trainer(tmp_path, max_steps=5, save_total_limit=2, resume_from_checkpoint=True).train()
    assert steps(tmp_path) == ["checkpoint-4", "checkpoint-5"]
