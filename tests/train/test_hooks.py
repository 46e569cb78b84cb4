"""Subclasses, collators and losses of one's own: transformers' signatures, order of events and values.

Losses are those of transformers 5.23 for the same weights, rows and arguments, recorded.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_ids, tiny_model
from torch.utils.data import DataLoader

from llama2 import (
    InputError,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LoraConfig,
    lora,
)
from llama2.train import hooks
from llama2.train.answers import Preferences
from llama2.train.arguments import TrainingArguments
from llama2.train.callbacks import EVENTS, TrainerCallback
from llama2.train.data import EncodedPair, Example
from llama2.train.neftune import noisy
from llama2.train.trainer import Trainer

ROWS = [{"input_ids": (ids := tiny_ids(1, 6, i)[0].tolist()), "labels": ids} for i in range(7)]
PLAIN = [6.28892, 6.85176, 4.96034, 5.68307]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1,
             "learning_rate": 1e-3, "save_strategy": "no", "train_sampling_strategy": "sequential"}  # fmt: skip
    return TrainingArguments(str(folder), **{**given, **changes})


def run(folder: Path, kind: type = Trainer, changes: Any = None, **given: Any) -> Any:
    args = arguments(folder, **(changes or {}))
    trainer = kind(tiny_model(torch.float32), args, train_dataset=ROWS, eval_dataset=ROWS[:3], **given)
    trainer.output = trainer.train()
    return trainer


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Halved(Trainer):
    """The documented way: super()'s loss, changed."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (found[0] * 0.5, found[1]) if return_outputs else found * 0.5  # type: ignore[index,operator]


class OwnLoss(Trainer):
    """A loss that does not divide by the items of the step, which transformers takes for one that does."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OldLoss(Trainer):
    """The signature before 4.46: a mean of the batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_losses_without_any_override(tmp_path: Path) -> None:
    assert losses(run(tmp_path)) == pytest.approx(PLAIN, abs=2e-4)


def test_compute_loss_is_called(tmp_path: Path) -> None:
    found = run(tmp_path, Halved, {"eval_strategy": "steps", "eval_steps": 4})
    assert losses(found) == pytest.approx([3.14446, 3.42588, 2.48017, 2.84153], abs=2e-4)
    assert losses(found, "eval_loss") == pytest.approx([2.13316], abs=2e-4)
    assert losses(run(tmp_path, OwnLoss)) == pytest.approx([12.57783, 13.36089, 9.91962, 10.81595], abs=4e-4)
    first = losses(run(tmp_path, OldLoss))[0]
    assert first == pytest.approx(12.57783 / 2, abs=2e-4)  # transformers 5 refuses it; a mean over the batches


def test_a_loss_function_and_label_smoothing(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits, wanted = outputs.logits[:, :-1].reshape(-1, 97), labels[:, 1:].reshape(-1)
        return F.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch

    assert losses(run(tmp_path, compute_loss_func=loss)) == pytest.approx(PLAIN, abs=2e-4)
    changes = {"label_smoothing_factor": 0.2, "eval_strategy": "steps", "eval_steps": 2}
    found = run(tmp_path, changes=changes)
    assert losses(found) == pytest.approx([6.44121, 6.93474, 5.37027, 5.96969], abs=2e-4)
    assert losses(found, "eval_loss") == pytest.approx([5.23427, 4.79923], abs=2e-4)


def test_training_step_and_the_other_hooks_are_called(tmp_path: Path) -> None:
    called: list[str] = []

    class Mine(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            called.append(f"training_step {sorted(inputs)} {num_items_in_batch}")
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)  # type: ignore[arg-type]
            return loss.detach()  # type: ignore[union-attr]

        def get_train_dataloader(self) -> Any:
            called.append("get_train_dataloader")
            return super().get_train_dataloader()

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            called.append("get_eval_dataloader")
            return super().get_eval_dataloader(eval_dataset)

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            called.append(f"prediction_step {prediction_loss_only}")
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            called.append("log")
            super().log({**logs, "mine": 1.0}, start_time)

        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            called.append("evaluate")
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            called.append(f"save_model {_internal_call}")
            super().save_model(output_dir, _internal_call)

    found = run(tmp_path, Mine, {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps"})
    assert losses(found) == pytest.approx(PLAIN, abs=2e-4) and all(losses(found, "mine"))
    for name in ("get_train_dataloader", "evaluate", "get_eval_dataloader", "prediction_step True", "log",
                 "save_model True"):  # fmt: skip
        assert name in called, name
    step = "training_step ['attention_mask', 'input_ids', 'labels'] 20"
    assert called.count(step) == 4 and len([c for c in called if c.startswith("training_step")]) == 8
    assert LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4").config.vocab_size == 97


def test_a_data_loader_of_ones_own(tmp_path: Path) -> None:
    class Mine(Trainer):
        def get_train_dataloader(self) -> Any:
            rows = [{k: torch.tensor(v) for k, v in row.items()} for row in ROWS]
            return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]

    found = run(tmp_path, Mine)
    assert losses(found) == pytest.approx(PLAIN, abs=2e-4) and found.epoch_steps == 2


def test_optimisers_of_ones_own(tmp_path: Path) -> None:
    class Mine(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
            return self.optimizer

    found = run(tmp_path, Mine)
    assert losses(found) == pytest.approx([6.28892, 6.84735, 5.87362, 6.32591], abs=2e-4)
    assert losses(found, "learning_rate") == pytest.approx([0.05, 0.0375, 0.025, 0.0125])

    class Steps(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, num_training_steps // 2, 0.1)
            return self.lr_scheduler

    assert losses(run(tmp_path, Steps), "learning_rate") == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    model = tiny_model(torch.float32)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    args = arguments(tmp_path, gradient_accumulation_steps=1, max_grad_norm=0)
    given = (sgd, torch.optim.lr_scheduler.StepLR(sgd, 2, 0.1))
    trainer = Trainer(model, args, train_dataset=ROWS, optimizers=given)
    trainer.train()
    assert losses(trainer) == pytest.approx([6.64409, 5.61206, 7.10741, 5.95107], abs=2e-4)
    assert losses(trainer, "learning_rate") == pytest.approx([0.05, 0.05, 0.005, 0.005])
    kind = (torch.optim.SGD, {"lr": 0.05})
    assert losses(run(tmp_path, optimizer_cls_and_kwargs=kind))[1] == pytest.approx(6.84735, abs=2e-4)


def test_an_optimiser_of_ones_own_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    def made(folder: str, **changes: Any) -> Trainer:
        model = tiny_model(torch.float32)
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=2, max_steps=6, **changes)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return Trainer(model, args, train_dataset=ROWS, optimizers=(adam, None))

    straight, cut = made("straight", bf16=True), made("cut", bf16=True)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == 2:
                cut.stop()

    cut.add_callback(Stop)
    cut.train()
    again = made("cut", bf16=True)
    again.train(resume_from_checkpoint=True)
    ours, theirs = again.updates.state(), straight.updates.state()
    assert ours and all(name.startswith("master.") for name in ours)  # float32 copies of bfloat16 weights
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(again) == losses(straight)


def test_gradients_are_never_scaled_up(tmp_path: Path) -> None:
    for most in (0, -1):
        found = run(tmp_path, changes={"max_grad_norm": most})
        assert losses(found) == pytest.approx([6.28892, 6.85173, 4.96867, 5.65612], abs=2e-4)


@pytest.mark.parametrize("name", sorted(hooks.REFUSED))
def test_methods_that_nothing_calls_are_refused_by_name(tmp_path: Path, name: str) -> None:
    kind = type("Mine", (Trainer,), {name: lambda self, *args, **given: None})
    with pytest.raises(InputError, match=f"Mine overrides {name}, which is never called here; "):
        run(tmp_path, kind)


# Every method of transformers' Trainer (4.46.3 and 5.23) is ours, called or refused.
METHODS = """add_callback autocast_smart_context_manager call_model_init compute_loss compute_loss_context_manager
create_model_card create_optimizer create_optimizer_and_scheduler create_scheduler evaluate evaluation_loop
floating_point_ops get_batch_samples get_decay_parameter_names get_eval_dataloader get_optimizer_cls_and_kwargs
get_test_dataloader get_train_dataloader hyperparameter_search init_hf_repo is_local_process_zero is_world_process_zero
log num_examples pop_callback predict prediction_loop prediction_step push_to_hub remove_callback save_model
set_initial_training_values store_flos train training_step _get_train_sampler _get_eval_sampler _inner_training_loop
_save _save_checkpoint _load_from_checkpoint _wrap_model _prepare_inputs _prepare_input _maybe_log_save_evaluate
_remove_unused_columns _evaluate _rotate_checkpoints _clip_grad_norm _load_best_model _run_epoch""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", METHODS)
def test_every_hook_of_transformers_is_called_or_refused(name: str) -> None:
    assert (name in hooks.REFUSED) != hasattr(Trainer, name)


# -- collators ---------------------------------------------------------------------------------------------------


def test_a_collator_of_ones_own_gets_the_rows(tmp_path: Path) -> None:
    seen: list[Any] = []

    def collate(rows: Any) -> Any:
        seen.extend(rows)
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.clone()}

    rows = [{**row, "text": "not an argument"} for row in ROWS]
    args = arguments(tmp_path)
    trainer = Trainer(tiny_model(torch.float32), args, collate, rows)
    trainer.train()
    assert losses(trainer) == pytest.approx(PLAIN, abs=2e-4) and sorted(seen[0]) == ["input_ids", "labels"]
    seen.clear()
    args = arguments(tmp_path, remove_unused_columns=False)
    Trainer(tiny_model(torch.float32), args, collate, rows).train()
    assert sorted(seen[0]) == ["input_ids", "labels", "text"]
    with pytest.raises(InputError, match="none of the columns text is an argument of the model's forward pass"):
        Trainer(tiny_model(torch.float32), arguments(tmp_path), collate, [{"text": "x"}])


def test_noisy_embeddings(tmp_path: Path) -> None:
    with_noise = run(tmp_path, changes={"neftune_noise_alpha": 5.0})
    found = losses(with_noise)
    assert found != pytest.approx(PLAIN, abs=1e-3) and found == losses(
        run(tmp_path, changes={"neftune_noise_alpha": 5})
    )
    assert not with_noise.network.get_input_embeddings()._forward_hooks
    module, ones = torch.nn.Embedding(2, 4), torch.ones(1, 9, 4)
    changed = noisy(3.0, module, None, ones) - ones
    assert 0.4 < changed.abs().max() <= 3.0 / 6 and torch.equal(noisy(3.0, module.eval(), None, ones), ones)


def test_a_forward_pass_of_ones_own_is_trained(tmp_path: Path) -> None:
    """The trainer's own loss goes past forward, so a model that changes it is run as it is written."""
    model = tiny_model(torch.float32)
    plain = model.forward
    model.forward = lambda *args, **given: _scaled(plain(*args, **given))  # type: ignore[method-assign]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(2 * PLAIN[0], abs=4e-4)


def test_a_head_that_is_not_plain_is_trained_as_it_is(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    assert losses(trainer)[0] < 0.9 * PLAIN[0]
    adapted = tiny_model(torch.float32)
    lora.add_adapter(adapted, LoraConfig(r=2, target_modules=("lm_head", "q_proj")))
    trainer = Trainer(adapted, arguments(tmp_path, learning_rate=1e-2), train_dataset=ROWS)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(PLAIN[0], abs=2e-4) and losses(trainer)[2] < PLAIN[0]
    assert bool(adapted.lm_head.lora_B["default"].any())


def _scaled(outputs: Any) -> Any:
    outputs.loss = outputs.loss * 2
    return outputs


# -- measuring ---------------------------------------------------------------------------------------------------


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction
    return {"acc": float((logits.argmax(-1)[:, :-1] == labels[:, 1:]).mean())}


def test_metrics_of_predictions(tmp_path: Path) -> None:
    found = run(tmp_path, changes={"eval_strategy": "steps", "eval_steps": 2}, compute_metrics=accuracy)
    assert losses(found, "eval_loss") == pytest.approx([4.8023, 4.26631], abs=2e-4)
    assert losses(found, "eval_acc") == pytest.approx([0.2, 4 / 15])
    predicted = found.predict(ROWS[:3])
    assert predicted.predictions.shape == (3, 6, 97) and predicted.label_ids.shape == (3, 6)
    assert predicted.metrics["test_loss"] == pytest.approx(4.266313, abs=2e-4)
    assert np.abs(predicted.predictions).sum() == pytest.approx(3370.019, rel=1e-3)
    assert predicted.metrics["test_acc"] == pytest.approx(4 / 15) and "test_runtime" in predicted.metrics


def test_what_metrics_are_given(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        seen.append((prediction, compute_result))
        return {"n": len(prediction.label_ids)} if compute_result else {}

    changes = {"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 2}
    rows = [*ROWS[:2], {"input_ids": [5, 6], "labels": [5, 6]}]
    made = Trainer(
        tiny_model(torch.float32), arguments(tmp_path, **changes), train_dataset=ROWS, eval_dataset=rows,
        compute_metrics=metrics, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    assert made.evaluate()["eval_n"] == 3
    ((prediction, _),) = seen
    assert prediction.predictions.shape == (3, 6) and prediction.predictions[2].tolist()[2:] == [-100] * 4
    assert prediction.label_ids[2].tolist() == [-100, 6, *[-100] * 4]  # the first token is no target
    assert prediction.inputs.shape == (3, 6)
    assert prediction.losses.shape == (3,) and len(prediction.elements) == 4
    seen.clear()
    made.args.batch_eval_metrics = True
    assert made.evaluate()["eval_n"] == 1 and [last for _, last in seen] == [False, True]
    with pytest.raises(InputError, match=r"batch_eval_metrics needs compute_metrics\(prediction, compute_result\)"):
        args = arguments(tmp_path, batch_eval_metrics=True)
        Trainer(tiny_model(torch.float32), args, train_dataset=ROWS, compute_metrics=accuracy)


def test_several_sets_and_sets_that_are_given(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=4, metric_for_best_model="second_loss",
                     greater_is_better=False, save_strategy="no")  # fmt: skip
    sets = {"first": ROWS[:2], "second": ROWS[2:4]}
    trainer = Trainer(tiny_model(torch.float32), args, train_dataset=ROWS, eval_dataset=sets)
    trainer.train()
    found = trainer.evaluate()
    assert {"eval_first_loss", "eval_second_loss"} <= set(found)
    assert trainer.state.best_metric == pytest.approx(found["eval_second_loss"])
    assert trainer.evaluate(ROWS[2:4])["eval_loss"] == pytest.approx(found["eval_second_loss"])
    assert trainer.evaluate("second", metric_key_prefix="x")["x_loss"] == pytest.approx(found["eval_second_loss"])
    assert "eval_third_loss" in trainer.evaluate({"third": ROWS[4:]})
    with pytest.raises(InputError, match="there is no set 'fourth'"):
        trainer.evaluate("fourth")
    with pytest.raises(InputError, match="has no rows; give rows to measure on"):
        trainer.evaluate([])


def test_a_classifier_is_predicted_without_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0))
    rows = [{"input_ids": tiny_ids(1, 4 + i % 2, seed=i)[0].tolist(), "label": i % 3} for i in range(6)]
    args = arguments(tmp_path, max_steps=1)

    def metrics(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    bare = trainer.predict([{"input_ids": row["input_ids"]} for row in rows])
    labelled = trainer.predict(rows)
    assert np.allclose(bare.predictions, labelled.predictions, atol=1e-5) and bare.predictions.shape == (6, 3)
    assert bare.label_ids is None and "test_loss" not in bare.metrics
    assert labelled.label_ids.tolist() == [0, 1, 2, 0, 1, 2] and "test_accuracy" in labelled.metrics


def test_rows_without_targets_are_no_loss_of_zero(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no target"):
        Trainer(tiny_model(torch.float32), arguments(tmp_path), train_dataset=ROWS,
                eval_dataset=[{"input_ids": [1, 2], "labels": [-100, -100]}])  # fmt: skip
    trainer = Trainer(tiny_model(torch.float32), arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(InputError, match="there are no rows to measure on"):
        trainer.evaluate()


# -- events ------------------------------------------------------------------------------------------------------


def recorder(into: list[str]) -> TrainerCallback:
    def event(name: str) -> Any:
        return lambda args, state, control, **given: into.append(name.removeprefix("on_"))

    return type("Recorder", (TrainerCallback,), {name: staticmethod(event(name)) for name in EVENTS})()


STEP = ["step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end"]
EPOCH = ["epoch_begin", *STEP, *STEP, "log", "epoch_end", "prediction_step", "log", "evaluate"]


@pytest.mark.parametrize("kind", [Trainer, Halved])
def test_the_order_of_events_is_transformers(tmp_path: Path, kind: type) -> None:
    events: list[str] = []
    changes = {"max_steps": -1, "num_train_epochs": 2, "logging_steps": 2, "eval_strategy": "epoch"}
    found = run(tmp_path, kind, changes, callbacks=[recorder(events)])
    assert events == ["init_end", "train_begin", *EPOCH, *EPOCH, "log", "train_end"]
    logged = [(entry["step"], entry["epoch"]) for entry in found.state.log_history if "loss" in entry]
    assert logged == [(2, 1.0), (4, 2.0)] and found.state.total_flos == 37352448.0


def test_losses_of_the_interval_and_of_the_run(tmp_path: Path) -> None:
    found = run(tmp_path, changes={"logging_steps": 2})
    means = [(PLAIN[0] + PLAIN[1]) / 2, (PLAIN[2] + PLAIN[3]) / 2]
    assert losses(found) == pytest.approx(means, abs=2e-4)
    step, loss, metrics = found.output
    assert step == 4 and loss == metrics["train_loss"] == pytest.approx(5.94602, abs=2e-4)
    assert found.state.epoch == 2.0 and found.state.log_history[-1]["train_loss"] == loss
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"} <= set(metrics)


def test_a_second_call_trains_again(tmp_path: Path) -> None:
    """From the weights and moments that are there, as in transformers: 4.210838 is its second loss."""
    found = run(tmp_path, changes={"max_steps": -1, "num_train_epochs": 2, "logging_steps": 2})
    again = found.train()
    assert again.global_step == 4 and again.training_loss == pytest.approx(4.210838, abs=1e-3)
    assert [entry["step"] for entry in found.state.log_history if "loss" in entry] == [2, 4]


def test_strategies_that_measure_nothing_are_refused(tmp_path: Path) -> None:
    """transformers refuses it too: eval_strategy without eval_dataset."""
    with pytest.raises(InputError, match="eval_strategy is 'epoch', and there are no rows to measure on"):
        Trainer(tiny_model(torch.float32), arguments(tmp_path, eval_strategy="epoch"), train_dataset=ROWS)
    pair = EncodedPair(Example([1, 2], [-100, 2]), Example([1, 3], [-100, 3]))
    with pytest.raises(InputError, match="compute_metrics is given, and Preferences has no predictions"):
        Trainer(tiny_model(torch.float32), arguments(tmp_path), objective=Preferences(), rows=[pair],
                compute_metrics=accuracy)  # fmt: skip


def test_what_scripts_write_at_their_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path)
    metrics = dict(found.output.metrics)
    with found.args.main_process_first(desc="rows"):
        metrics["train_samples"] = len(ROWS)
    found.log_metrics("train", metrics)
    found.save_metrics("train", metrics)
    found.save_metrics("eval", found.evaluate())
    found.save_state()
    found.create_model_card(finetuned_from="we/base", tags=["x"], dataset="cups", tasks="text-generation")
    assert "***** train metrics *****" in capsys.readouterr().out
    every = json.loads((tmp_path / "all_results.json").read_text())
    assert every["train_samples"] == 7 and "eval_loss" in every and (tmp_path / "eval_results.json").exists()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4
    card = (tmp_path / "README.md").read_text()
    assert 'base_model: "we/base"' in card and "on cups." in card and "- eval_loss: " in card
    assert found.get_num_trainable_parameters() == sum(p.numel() for p in found.model.parameters())
    assert found.tokenizer is None and found.args.parallel_mode.value == "not_parallel" and found.args.should_save
    assert found.args.get_process_log_level() == 30 and found.args.world_size == 1


class Line(torch.nn.Module):
    """A model that is none of the library's."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
        found = self.line(x).squeeze(-1)
        return {"loss": ((found - labels) ** 2).mean(), "logits": found}


@pytest.mark.parametrize("kind", ["tokens", "answers", "any"])
def test_models_with_a_loss_of_their_own(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model: Any = Line()
    rows: list[dict[str, Any]] = [{"x": [0.5, 1.0], "labels": 1.0, "note": "text"}] * 4
    if kind == "tokens":
        model = LlamaForTokenClassification(tiny_config(num_labels=3))
        rows = [{"input_ids": [1, 2, 3, 4], "labels": [0, 1, 2, -100]}] * 4
    if kind == "answers":
        model = LlamaForQuestionAnswering(tiny_config())
        rows = [{"input_ids": [1, 2, 3, 4], "start_positions": 1, "end_positions": 2}] * 4
    args = arguments(tmp_path, learning_rate=1e-2, max_steps=8, save_strategy="steps")
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    predicted = trainer.predict(rows)
    assert predicted.metrics["test_loss"] < 0.9 * before
    assert len(predicted.label_ids) == (2 if kind == "answers" else 4)
    assert (tmp_path / "checkpoint-8" / "model.safetensors").exists()


def test_a_trainer_that_only_measures(tmp_path: Path) -> None:
    trainer = Trainer(tiny_model(torch.float32), arguments(tmp_path))
    assert trainer.predict(ROWS[:2]).predictions.shape == (2, 6, 97)
    assert trainer.evaluate(ROWS[:2])["eval_loss"] == pytest.approx(6.64409, abs=2e-4)
    with pytest.raises(InputError, match="there are no rows to train on; pass train_dataset="):
        trainer.train()
