"""Callbacks: what they are told and may steer, early stopping, and what a run saves, uploads and goes on from."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import (
    EarlyStoppingCallback,
    InputError,
    LlamaForCausalLM,
    LoraConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    lora,
)
from llama2.checkpoint import hub
from llama2.train import checkpoints

ROWS = [{"input_ids": tiny_ids(1, 4 + i % 3, i)[0].tolist()} for i in range(8)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-3, "logging_steps": 1, **changes}
    return TrainingArguments(str(folder), **given)


def made(folder: Path, *callbacks: Any, model: Any = None, rows: Any = ROWS, **changes: Any) -> Trainer:
    model = tiny_model(torch.float32) if model is None else model
    return Trainer(model, arguments(folder, **changes), train_dataset=rows, eval_dataset=ROWS[:2], callbacks=callbacks)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class At(TrainerCallback):
    """Sets switches of the control after a step."""

    def __init__(self, step: int, **switches: bool) -> None:
        self.step, self.switches = step, switches

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if state.global_step == self.step:
            for name, value in self.switches.items():
                setattr(control, name, value)
        return control


def test_switches_of_the_control(tmp_path: Path) -> None:
    run = made(tmp_path, At(3, should_training_stop=True, should_save=True, should_evaluate=True), logging_steps=100)
    output = run.train()
    assert output.global_step == 3 and not run.interrupted
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == [3]
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path)] == [3]
    run = made(tmp_path / "log", At(2, should_log=True), logging_strategy="no")
    run.train()
    assert [e["step"] for e in run.state.log_history if "loss" in e] == [2, 6]


def test_an_epoch_that_is_ended_early(tmp_path: Path) -> None:
    run = made(tmp_path, At(2, should_epoch_stop=True), max_steps=-1, num_train_epochs=2, save_steps=3)
    run.train()  # 4 steps per epoch
    assert run.state.global_step == 6 and run.state.epoch == 2.0
    again = made(tmp_path, max_steps=-1, num_train_epochs=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(run)


def test_what_a_callback_is_given(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.update(kwargs, rate=kwargs["lr_scheduler"].get_last_lr()[0], step=state.global_step)
            seen["groups"] = kwargs["optimizer"].param_groups

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.setdefault("logs", []).append(dict(logs))

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            seen["metrics"] = metrics

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen["grad"] = model.lm_head.weight.grad is not None

    run = made(tmp_path, Looks, eval_strategy="epoch", lr_scheduler_type="linear")
    run.train()
    assert seen["model"] is run.model and seen["grad"] and seen["groups"] and seen["processing_class"] is None
    assert seen["rate"] == 0.0 and seen["step"] == 6 and "eval_loss" in seen["metrics"]
    assert seen["logs"][0]["loss"] == losses(run)[0] and seen["logs"][0]["epoch"] == 0.25


def test_callbacks_are_added_found_and_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, max_steps=1)
    run.add_callback(PrinterCallback)
    assert isinstance(run.pop_callback(PrinterCallback), PrinterCallback) and run.pop_callback(PrinterCallback) is None
    mine = PrinterCallback()
    run.add_callback(mine)
    run.train()
    assert "'loss': '" in capsys.readouterr().out
    run.remove_callback(mine)
    assert not run.callbacks.all
    with pytest.raises(InputError, match="is no callback: it has no on_init_end; derive it from TrainerCallback"):
        run.add_callback(SimpleNamespace())


@pytest.mark.parametrize(
    ("measured", "patience", "threshold", "stops"),
    [
        ([5.0, 4.0, 4.5, 4.6, 3.0, 2.0], 2, 0.0, 4),
        ([5.0, 4.0, 4.5, 3.0, 3.5, 2.0], 2, 0.0, 6),
        ([5.0, 4.9, 4.8, 4.7, 4.6, 4.5], 2, 0.5, 3),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1, 0.0, 2),
    ],
)
def test_early_stopping(tmp_path: Path, measured: list[float], patience: int, threshold: float, stops: int) -> None:
    """transformers' rule: better than the best so far, by more than the threshold."""
    stopping = EarlyStoppingCallback(patience, threshold)
    run = made(tmp_path, stopping, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    _measure(run, measured)
    kept: dict[int, Any] = {}
    run.add_callback(At(99))
    save = run.save

    def saved() -> Path:
        kept[run.state.global_step] = run.model.lm_head.weight.detach().clone()
        return save()

    run.save = saved  # type: ignore[method-assign]
    run.train()
    assert run.state.global_step == stops and not run.interrupted
    best = min(range(stops), key=lambda i: (measured[i], i)) + 1
    assert run.state.best_global_step == best and run.state.best_metric == measured[best - 1]
    assert torch.equal(run.model.lm_head.weight, kept[best])  # loaded, although the run was ended early


def _measure(run: Trainer, measured: list[float]) -> None:
    """Gives a trainer's measurements these losses."""

    def evaluate(*args: Any, **given: Any) -> dict[str, float]:
        metrics = {"eval_loss": measured[run.state.global_step - 1]}
        run._call("on_evaluate", metrics=metrics)
        return metrics

    run.evaluate = evaluate  # type: ignore[method-assign]


def test_the_best_weights_are_loaded_after_a_signal(tmp_path: Path) -> None:
    run = made(tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    _measure(run, [2.0, 1.0, 3.0, 4.0, 5.0, 6.0])

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                run.stop()

    run.add_callback(Stops)
    run.train()
    assert run.interrupted and run.state.global_step == 3 and run.state.best_global_step == 2
    second = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(run.model.lm_head.weight, second.lm_head.weight)


def test_what_early_stopping_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="early_stopping_patience is 0"):
        EarlyStoppingCallback(0)
    with pytest.raises(InputError, match="needs metric_for_best_model"):
        made(tmp_path, EarlyStoppingCallback(), eval_strategy="epoch").train()
    with pytest.raises(InputError, match="needs rows to be measured"):
        made(tmp_path, EarlyStoppingCallback(), metric_for_best_model="loss").train()
    with pytest.warns(UserWarning, match="without load_best_model_at_end=True"):
        made(tmp_path, EarlyStoppingCallback(), metric_for_best_model="loss", eval_strategy="epoch").train()
    with pytest.raises(InputError, match="metric_for_best_model is 'f1'; measured are eval_loss"):
        made(tmp_path / "f1", metric_for_best_model="f1", eval_strategy="epoch").train()


def test_states_of_callbacks_are_kept_and_given_back(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    run = made(tmp_path, EarlyStoppingCallback(5), max_steps=3, **changes)
    _measure(run, [1.0, 2.0, 3.0])
    run.train()
    kept = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["EarlyStoppingCallback"]["attributes"] == {"early_stopping_patience_counter": 2}
    stopping = EarlyStoppingCallback(9)
    again = made(tmp_path, stopping, max_steps=4, restore_callback_states_from_checkpoint=True, **changes)
    _measure(again, [1.0, 2.0, 3.0, 4.0])
    again.train(resume_from_checkpoint=True)
    assert stopping.early_stopping_patience == 5 and stopping.early_stopping_patience_counter == 3
    state = TrainerState.load_from_json(tmp_path / "checkpoint-4" / "trainer_state.json")
    assert state.global_step == 4 and state.best_metric == 1.0
    state.save_to_json(tmp_path / "state.json")
    assert TrainerState.load_from_json(tmp_path / "state.json") == state


# -- when to log, measure and save -------------------------------------------------------------------------------


def test_shares_first_steps_and_delays(tmp_path: Path) -> None:
    run = made(tmp_path, logging_steps=0.5, logging_first_step=True, eval_strategy="steps", eval_steps=0.2,
               eval_delay=3, save_steps=0.5, include_num_input_tokens_seen=True)  # fmt: skip
    run.train()
    assert [e["step"] for e in run.state.log_history if "loss" in e] == [1, 3, 6]
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == [4, 6]
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path)] == [3, 6]
    assert run.state.log_history[-1]["num_input_tokens_seen"] == run.state.num_input_tokens_seen > 0


def test_the_best_step_alone_is_saved(tmp_path: Path) -> None:
    run = made(tmp_path, save_strategy="best", eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
    _measure(run, [3.0, 2.0, 4.0, 1.0, 5.0, 6.0])
    run.train()
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path)] == [1, 2, 4]
    with pytest.raises(InputError, match="save_strategy is 'best', which needs metric_for_best_model"):
        made(tmp_path, save_strategy="best")


def test_a_checkpoint_is_a_model_or_an_adapter(tmp_path: Path) -> None:
    run = made(tmp_path / "whole", save_steps=3)
    run.train()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert torch.equal(again.lm_head.weight, run.model.lm_head.weight)
    base = tiny_model(torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora.add_adapter(model, LoraConfig(r=2))
    made(tmp_path / "adapter", model=model).train()
    found = LlamaForCausalLM.from_pretrained(tmp_path / "adapter" / "checkpoint-6")
    with torch.no_grad():
        assert torch.equal(found(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_checkpoint_without_moments(tmp_path: Path) -> None:
    made(tmp_path, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-6" / "optimizer.safetensors").exists()
    assert LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6").config.vocab_size == 97
    with pytest.raises(InputError, match="was written with save_only_model, so nothing can go on from it"):
        made(tmp_path, max_steps=9).train(resume_from_checkpoint=True)


# -- going on ----------------------------------------------------------------------------------------------------


def test_a_run_becomes_longer(tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant"}
    straight = made(tmp_path / "a", max_steps=9, **constant)
    straight.train()
    made(tmp_path / "b", max_steps=6, **constant).train()
    again = made(tmp_path / "b", max_steps=9, **constant)
    assert again.train(resume_from_checkpoint=True).global_step == 9
    assert losses(again) == losses(straight)
    shorter = made(tmp_path / "b", max_steps=4, **constant)
    with pytest.warns(UserWarning, match="the checkpoint is at step 9 of 4, so nothing is left to train"):
        shorter.train(resume_from_checkpoint=True)


def test_other_rows_or_another_scale_are_another_run(tmp_path: Path) -> None:
    made(tmp_path / "rows").train()
    changed = [*ROWS[:-1], {"input_ids": [9, 9, 9]}]
    with pytest.raises(InputError, match="it differs in the rows; give the same data"):
        made(tmp_path / "rows", rows=changed, max_steps=9).train(resume_from_checkpoint=True)

    def adapted(alpha: float) -> Any:
        model = tiny_model(torch.float32)
        lora.add_adapter(model, LoraConfig(r=2, lora_alpha=alpha))
        return model

    made(tmp_path / "alpha", model=adapted(4)).train()
    with pytest.raises(InputError, match="it differs in .*lora_alpha"):
        made(tmp_path / "alpha", model=adapted(8), max_steps=9).train(resume_from_checkpoint=True)


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="output_dir .*file/out' cannot be written"):
        made(tmp_path / "file" / "out")


def test_a_run_goes_on_in_another_folder(tmp_path: Path) -> None:
    made(tmp_path / "a", save_steps=3).train()
    again = made(tmp_path / "new" / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    logged = (tmp_path / "new" / "b" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4, 5, 6]


def test_the_log_of_an_interval_goes_on(tmp_path: Path) -> None:
    straight = made(tmp_path / "a", logging_steps=4, max_steps=8, save_steps=2)
    straight.train()
    again = made(tmp_path / "a", logging_steps=4, max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert losses(again) == losses(straight) and len(losses(again)) == 2


# -- order of rows -----------------------------------------------------------------------------------------------


def test_orders_of_rows(tmp_path: Path) -> None:
    run = made(tmp_path, train_sampling_strategy="sequential")
    assert run.order(0) == run.order(3) == list(range(8))
    run = made(tmp_path, group_by_length=True)
    order = run.order(0)
    lengths = [len(ROWS[i]["input_ids"]) for i in order]
    assert sorted(order) == list(range(8)) and lengths[0] == 6 and order != made(tmp_path).order(0)
    assert sum(abs(lengths[i] - lengths[i + 1]) for i in range(0, 8, 2)) <= 3
    assert made(tmp_path, data_seed=7).order(0) != made(tmp_path).order(0) == made(tmp_path, data_seed=42).order(0)
    odd = ROWS[:7]
    assert made(tmp_path, rows=odd, max_steps=-1, num_train_epochs=1).steps == 4
    dropped = made(tmp_path, rows=odd, max_steps=-1, num_train_epochs=1, dataloader_drop_last=True)
    assert dropped.steps == 3
    dropped.train()
    assert dropped.state.epoch == 1.0


def test_a_function_that_makes_the_model(tmp_path: Path) -> None:
    def model() -> Any:
        return tiny_model(torch.float32)

    run = Trainer(args=arguments(tmp_path, save_strategy="no"), model_init=model, train_dataset=ROWS)
    first = run.train().training_loss
    assert run.train().training_loss == first  # from new weights, as in transformers
    with pytest.raises(InputError, match="give a model or model_init, one of them"):
        Trainer(model(), arguments(tmp_path), model_init=model, train_dataset=ROWS)
    with pytest.raises(InputError, match="model is the path 'x'; load it"):
        Trainer("x", arguments(tmp_path), train_dataset=ROWS)


# -- the hub -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "uploads"), [("end", 0), ("every_save", 2), ("checkpoint", 4)])
def test_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, uploads: int) -> None:
    calls: list[tuple[str, Any]] = []

    def upload(**given: Any) -> str:
        files = sorted(str(p.relative_to(given["folder_path"])) for p in Path(given["folder_path"]).rglob("*"))
        calls.append(("upload", {**given, "files": files}))
        return "https://address"

    fake = SimpleNamespace(create_repo=lambda **given: calls.append(("create", given)), upload_folder=upload)
    monkeypatch.setattr(hub, "huggingface_hub", fake)
    changes = {"push_to_hub": True, "hub_model_id": "we/ours", "hub_token": "secret", "hub_strategy": strategy}
    run = made(tmp_path / "out", save_steps=3, hub_revision="draft", **changes)
    assert calls[0][0] == "create" and calls[0][1]["repo_id"] == "we/ours"  # before anything is trained
    run.train()
    pushed = [given for kind, given in calls if kind == "upload"]
    assert len(pushed) == uploads and all(given["revision"] == "draft" for given in pushed)
    assert run.push_to_hub("done", revision="main") == "https://address"
    last = calls[-1][1]
    assert last["token"] == "secret" and last["commit_message"] == "done" and last["revision"] == "main"
    assert {"model.safetensors", "README.md"} <= set(last["files"])
    assert not any("checkpoint" in name for name in last["files"])
    with pytest.warns(UserWarning, match="blocking=False has no effect"):
        run.push_to_hub(blocking=False, tags=["x"], license="llama2")
    assert 'license: "llama2"' in (tmp_path / "out" / "README.md").read_text()
    run.save_model()
    assert calls[-1][1]["commit_message"] == "Model save"


def test_an_upload_that_cannot_be_fails_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: Any) -> None:
        raise ValueError("401")

    monkeypatch.setattr(hub, "huggingface_hub", SimpleNamespace(create_repo=refuse))
    with pytest.raises(OSError, match="401"):
        made(tmp_path, push_to_hub=True)


def test_a_tracker_hears_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    module = SimpleNamespace(
        __spec__=SimpleNamespace(name="wandb"), run=None, init=lambda **given: told.append("init"),
        log=lambda entry: told.append(entry), finish=lambda: told.append("finish"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    run = made(tmp_path, report_to=["wandb"], max_steps=1, eval_strategy="epoch")
    run.train()
    assert told[0] == "init" and told[-1] == "finish"
    assert told[1]["train/loss"] == losses(run)[0] and "eval/loss" in told[2] and "train/train_loss" in told[3]
