"""DPO's reference is the model as it was at the start, whatever is trained: the first loss is log 2."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import AutoTokenizer, LoraConfig, Trainer, TrainingArguments, lora
from llama2.train.answers import Preferences
from llama2.train.data import prepare_pairs

ROWS = [{"prompt": f"{a} ", "chosen": f"{a} sky", "rejected": f"{a} sea"} for a in ("red", "blue", "green", "grey")]


@pytest.fixture
def tok(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def trained_adapter(model: Any, **settings: Any) -> None:
    """An adapter that was trained before: its B is not zero."""
    lora.add_adapter(model, LoraConfig(r=4, target_modules="all-linear", **settings))
    with torch.no_grad():
        for layer in lora.layers(model).values():
            layer.lora_B["default"].normal_(0, 0.1)


def model(kind: str) -> Any:
    made = tiny_model(torch.float32, vocab_size=300)
    if kind == "fresh adapter":
        lora.add_adapter(made, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2))
    elif kind in ("trained adapter", "DoRA", "dropout"):
        more = {"DoRA": {"use_dora": True}, "dropout": {"lora_dropout": 0.3}}.get(kind, {})
        trained_adapter(made, **more)
    elif kind == "one matrix":
        made.requires_grad_(False)
        made.model.layers[1].mlp.up_proj.requires_grad_(True)
    elif kind == "a second adapter":
        trained_adapter(made)
        lora.add_adapter(made, LoraConfig(r=2), "second")
        lora.set_adapter(made, "default", "second")
    return made


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["all weights", "fresh adapter", "trained adapter", "DoRA", "dropout", "one matrix", "a second adapter"]
)
def test_the_first_loss_is_log_2_and_then_falls(tmp_path: Path, tok: Any, kind: str, bf16: bool) -> None:
    args = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=4, logging_steps=1, learning_rate=2e-3,
                             per_device_train_batch_size=4, save_strategy="no", bf16=bf16)  # fmt: skip
    trainer = Trainer(model=model(kind), args=args, train_dataset=ROWS, processing_class=tok)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - (1e-4 if bf16 else 1e-3)


def test_the_reference_stays_while_the_model_moves(tok: Any) -> None:
    """Rewards are measured from the start, so they grow; the model itself is untouched by the reference."""
    policy, objective = model("trained adapter"), Preferences()
    twin = model("trained adapter")
    batch = objective.collate(prepare_pairs(ROWS, tok, None)[0])
    assert objective.begin(policy) == sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    moved = {name: p.clone() for name, p in policy.named_parameters()}
    loss = objective.loss(policy, batch)
    wanted = Preferences(reference=twin.requires_grad_(False)).loss(policy, batch)
    assert (
        loss.total.item() == pytest.approx(wanted.total.item(), rel=1e-6) and abs(loss.total.item() / 4 - 0.693) > 1e-3
    )
    loss.total.backward()
    assert all(torch.equal(p, moved[name]) for name, p in policy.named_parameters())
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_a_fresh_adapter_needs_no_copy() -> None:
    assert Preferences().begin(model("fresh adapter")) == 0
    whole = model("all weights")
    assert Preferences().begin(whole) == sum(p.nbytes for p in whole.parameters())
    assert Preferences(reference_free=True).begin(whole) == Preferences(reference=whole).begin(whole) == 0


def test_a_resumed_run_keeps_its_reference(tmp_path: Path, tok: Any) -> None:
    """The reference is the model that is given again, not the checkpoint that is gone on from."""

    def run(out: str, steps: int, **more: Any) -> list[float]:
        args = TrainingArguments(output_dir=str(tmp_path / out), max_steps=4, logging_steps=1, learning_rate=2e-3,
                                 per_device_train_batch_size=4, save_steps=2, **more)  # fmt: skip
        trainer = Trainer(model=model("trained adapter"), args=args, train_dataset=ROWS, processing_class=tok,
                          report=lambda entry: trainer.stop() if entry["step"] == steps else None)  # fmt: skip
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    straight = run("straight", 9)
    run("cut", 2)
    assert run("cut", 9, resume_from_checkpoint=True) == straight and len(straight) == 4
