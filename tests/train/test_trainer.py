"""The loop: what a step computes, that it learns, and that an interrupted run ends with the bits of a straight one."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_config, tiny_ids, tiny_model

from llama2 import AutoTokenizer, InputError, LlamaForSequenceClassification, lora
from llama2.checkpoint.peft import load_adapter
from llama2.lora_config import LoraConfig
from llama2.train import checkpoints
from llama2.train import trainer as loop
from llama2.train.answers import Preferences
from llama2.train.callbacks import TrainerCallback
from llama2.train.data import EncodedPair, Example
from llama2.train.objectives import Classification, NextToken, packed_rows
from llama2.train.optim import AdamW, clip, dynamic_code, from_codes, to_codes
from llama2.train.schedules import learning_rate
from llama2.train.trainer import Trainer, TrainingArguments


def examples(count: int = 12) -> list[Example]:
    lengths = torch.randint(3, 12, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [tiny_ids(1, n, seed=i)[0].tolist() for i, n in enumerate(lengths)]
    return [Example(ids, [-100, -100, *ids[2:]]) for ids in rows]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-3, "logging_steps": 1, **changes}
    return TrainingArguments(output_dir=str(folder), **given)


def trainer(folder: Path, model: Any = None, **changes: Any) -> Trainer:
    model = tiny_model(torch.float32) if model is None else model
    return Trainer(model, arguments(folder, **changes), objective=NextToken(), rows=packed_rows(examples(), 24))


def losses_of(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.history if "loss" in entry]


class Calls(TrainerCallback):
    """Calls a function at an event."""

    def __init__(self, **events: Any) -> None:
        for name, function in events.items():
            setattr(self, name, lambda *_, function=function, **__: function())


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- objectives --------------------------------------------------------------------------------------------------


def test_packed_equals_separate_documents() -> None:
    model, objective = tiny_model(), NextToken()
    rows = packed_rows(examples(), 24)
    assert len(rows) < 12 and max(len(r.starts) for r in rows) > 2
    alone = packed_rows(examples(), 24, packing=False)
    together = objective.loss(model, objective.collate(rows))
    separate = [objective.loss(model, objective.collate([row])) for row in alone]
    assert together.units == sum(loss.units for loss in separate)
    assert torch.allclose(together.total, sum(loss.total for loss in separate), atol=1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_no_document_sees_another(implementation: str) -> None:
    model, objective = tiny_model(), NextToken()
    model.set_attn_implementation(implementation)
    a, b, c = examples(3)
    batch = objective.collate(packed_rows([a, b], 64))
    changed = objective.collate(packed_rows([c, b], 64))
    first, second = len(a.input_ids), len(c.input_ids)
    with torch.no_grad():
        one, other = (
            model.model(x["input_ids"], x["attention_mask"], x["position_ids"]).last_hidden_state
            for x in (batch, changed)
        )
    assert torch.allclose(one[0, first:], other[0, second:], atol=1e-12)


def test_preferences_equal_a_computation_by_hand() -> None:
    model = tiny_model()
    pairs = [EncodedPair(*examples(2)), EncodedPair(*examples(4)[2:])]
    lora.add_adapter(model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for layer in lora.layers(model).values():
            layer.lora_B["default"].normal_(0, 0.1)
    objective = Preferences(beta=0.2)
    found = objective.loss(model, objective.collate(pairs))

    def log_p(model: Any, example: Example) -> torch.Tensor:
        logits = model(torch.tensor([example.input_ids])).logits[0, :-1].log_softmax(-1)
        total: torch.Tensor = sum(logits[i, t] for i, t in enumerate(example.labels[1:]) if t != -100)  # type: ignore
        return total

    wanted = 0.0
    for pair in pairs:
        policy = [log_p(model, answer) for answer in pair]
        with lora.disabled(model):
            reference = [log_p(model, answer) for answer in pair]
        d = (policy[0] - reference[0]) - (policy[1] - reference[1])
        wanted -= torch.nn.functional.logsigmoid(0.2 * d).item()
    assert found.units == 2 and found.total.item() == pytest.approx(wanted, rel=1e-10)
    assert found.logs["rewards/margins"] == pytest.approx(found.logs["rewards/chosen"] - found.logs["rewards/rejected"])


# -- one step ----------------------------------------------------------------------------------------------------


def test_accumulated_equals_one_large_batch(tmp_path: Path) -> None:
    found = []
    for size, times in ((4, 1), (1, 4)):
        model = tiny_model()
        run = trainer(tmp_path / str(size), model, per_device_train_batch_size=size, gradient_accumulation_steps=times)
        run.train()
        found.append(weights(model))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-9) for name in found[0])


def test_adamw_is_torchs_with_float32_masters() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3), [torch.randn(5, 3) for _ in range(4)]
    ours = torch.nn.Parameter(start.bfloat16())
    exact = torch.nn.Parameter(start.bfloat16().float())
    mine, theirs = AdamW([("w", ours)], weight_decay=0.1), torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.1)
    for grad in grads:
        ours.grad, exact.grad = grad.bfloat16(), grad.bfloat16().float()
        mine.step(1e-4)
        theirs.step()
    assert torch.allclose(mine.state()["master.w"], exact.detach(), atol=1e-7)
    assert torch.equal(ours.detach(), exact.detach().bfloat16()) and ours.grad is None


def test_codes_of_moments() -> None:
    signed, unsigned = dynamic_code(True), dynamic_code(False)
    for code in (signed, unsigned):
        assert len(code.unique()) == 256 and torch.equal(code, code.sort().values) and code[-1] == 1
    # The first power of ten of [0, 1] has two parts, [0.1, 0.55] and [0.55, 1], with middles 0.325 and 0.775.
    assert torch.allclose(unsigned[:3], torch.tensor([0.0, 0.325e-6, 0.775e-6])) and 0 in signed
    values = torch.randn(600, generator=torch.Generator().manual_seed(0)) ** 3
    for code, sample in ((signed, values), (unsigned, values.square())):
        codes, scales = to_codes(sample, code is signed)
        assert scales.tolist() == [sample[i : i + 256].abs().max().item() for i in (0, 256, 512)]
        shares = sample / scales.repeat_interleave(256)[:600]
        nearest = (shares[:, None] - code).abs().amin(1)
        assert torch.allclose((shares - code[codes.int()]).abs(), nearest)
        assert torch.equal(
            from_codes(codes, scales, code is signed), code[codes.int()] * scales.repeat_interleave(256)[:600]
        )
    codes, scales = to_codes(torch.zeros(5), True)
    assert torch.equal(from_codes(codes, scales, True), torch.zeros(5))


def test_adamw_in_bytes_follows_adamw() -> None:
    target = torch.randn(80, 64, generator=torch.Generator().manual_seed(1))
    found = {}
    for kind in ("adamw_torch", "adamw_8bit"):
        weight, small = torch.nn.Parameter(torch.zeros(80, 64)), torch.nn.Parameter(torch.zeros(64))
        optimizer = AdamW([("w", weight), ("s", small)], weight_decay=0.01, kind=kind)
        noise = torch.Generator().manual_seed(2)
        for _ in range(60):
            weight.grad = weight.detach() - target + 0.1 * torch.randn(80, 64, generator=noise)
            small.grad = small.detach() - target[0]
            optimizer.step(0.01)
        found[kind] = (weight.detach(), small.detach(), optimizer.state())
    (exact, exact_small, _), (near, near_small, state) = found.values()
    assert (near - exact).norm() < 0.05 * exact.norm()  # measured 0.028
    assert torch.allclose(near_small, exact_small, atol=1e-6)  # too small for bytes
    assert state["exp_avg_codes.w"].dtype == torch.uint8 and state["exp_avg_sq_scales.w"].shape == (20,)
    held = sum(t.nbytes for name, t in state.items() if name.endswith(".w"))
    assert held == 2 * (80 * 64 + 4 * 20) + 4
    other = AdamW([("w", torch.nn.Parameter(torch.zeros(80, 64))), ("s", torch.nn.Parameter(torch.zeros(64)))])
    with pytest.raises(InputError, match="same optim"):
        other.load(state)


def test_vectors_do_not_decay() -> None:
    vector, matrix = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 3))
    optimizer = AdamW([("v", vector), ("m", matrix)], weight_decay=0.5)
    vector.grad, matrix.grad = torch.zeros(3), torch.zeros(3, 3)
    optimizer.step(0.1)
    assert torch.equal(vector.detach(), torch.ones(3)) and torch.allclose(matrix.detach(), torch.full((3, 3), 0.95))


def test_clipping() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip([p, q], 10.0) == 5.0 and p.grad[0] == 3
    clip([p, q], 1.0)
    assert math.hypot(float(p.grad[0]), float(q.grad[1])) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 2 / 3, 1 / 3]),
        ("cosine", [0, 0.5, 1, 0.75, 0.25]),
    ],
)
def test_schedules(schedule: str, wanted: list[float]) -> None:
    assert [learning_rate(i, 5, 1.0, schedule, 2) for i in range(5)] == pytest.approx(wanted)


# -- runs --------------------------------------------------------------------------------------------------------


def test_it_learns(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=40, learning_rate=3e-3, save_steps=100)
    run.train()
    losses = losses_of(run)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged] == list(range(1, 41)) and logged[-1]["loss"] == losses[-1]
    assert run.state.history[-1]["train_loss"] == pytest.approx(sum(losses) / 40)
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-40"]


def test_a_classifier_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=2, pad_token_id=0))
    rows = [([int(t) for t in tiny_ids(1, 6, seed=i)[0]] + [5 if i % 2 else 6], i % 2) for i in range(16)]
    run = Trainer(
        model,
        arguments(tmp_path, max_steps=40, learning_rate=5e-3),
        objective=Classification(),
        rows=rows,
        eval_rows=rows,
    )
    run.train()
    assert run.evaluate()["eval_accuracy"] == 1.0


def test_bf16_updates_float32_copies(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    run = trainer(tmp_path, model, bf16=True, learning_rate=1e-5)
    before = run.optimizer.state()["master.lm_head.weight"].clone()
    run.train()
    after = run.optimizer.state()["master.lm_head.weight"]
    assert model.dtype == torch.bfloat16 and after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 1e-3


def test_each_epoch_has_every_row_once_in_its_own_order(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    first, second = run.order(0), run.order(1)
    assert sorted(first) == sorted(second) == list(range(len(run.rows))) and first != second
    per_epoch = math.ceil(len(run.rows) / 2)
    assert run.steps == 2 * per_epoch
    seen = [row for step in range(per_epoch) for row in run._rows_of(step)]
    assert seen == [run.rows[i] for i in first]


# -- interruption ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dropout", "optim"), [(None, "adamw_torch"), (0.1, "adamw_torch"), (0.0, "adamw_torch"), (None, "adamw_8bit")]
)
def test_resumed_equals_straight(tmp_path: Path, dropout: float | None, optim: str) -> None:
    def start(folder: str, **changes: Any) -> Trainer:
        model = tiny_model(torch.float32)
        if dropout is not None:
            torch.manual_seed(7)
            lora.add_adapter(model, LoraConfig(r=2, lora_dropout=dropout, target_modules="all-linear"))
        return trainer(tmp_path / folder, model, save_steps=2, optim=optim, **changes)

    straight = start("straight")
    straight.train()
    cut = start("cut")
    cut.add_callback(Calls(on_step_end=lambda: cut.stop() if cut.state.step == 3 else None))
    cut.train()
    assert cut.state.step == 3
    # The state of step 3 was never saved: the run goes on from step 2.
    again = start("cut", resume_from_checkpoint=None if dropout is None else True)
    again.train(resume_from_checkpoint=True if dropout is None else None)
    ours, theirs = weights(again.model), weights(straight.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses_of(again) == losses_of(straight)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_trainer import trainer
run = trainer(Path(sys.argv[1]), max_steps=int(1e6), save_steps=3, resume_from_checkpoint=True)
run._report = lambda entry: print(entry["step"], flush=True)
run.train()
"""


def test_killed_and_terminated_runs_leave_whole_checkpoints(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(7)]
        child.kill()
    assert all(line.strip().isdigit() for line in lines), lines
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and not checkpoints.problem(newest)
    killed = checkpoints.step_of(newest)
    run = trainer(tmp_path, max_steps=int(1e6), save_steps=3, resume_from_checkpoint=True)

    def report(entry: dict[str, Any]) -> None:
        if entry["step"] == killed + 5:
            signal.raise_signal(signal.SIGTERM)

    run._report = report
    run.train()
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and not checkpoints.problem(newest)
    assert run.interrupted and checkpoints.step_of(newest) == killed + 5


def test_a_hangup_ends_a_run_as_sigterm_does_unless_it_is_ignored(tmp_path: Path) -> None:
    run, before = trainer(tmp_path), signal.getsignal(signal.SIGHUP)
    try:
        for handler, number, stops in (
            (signal.SIG_DFL, signal.SIGTERM, True),
            (signal.SIG_DFL, signal.SIGHUP, True),
            (signal.SIG_IGN, signal.SIGHUP, False),
        ):
            signal.signal(signal.SIGHUP, handler)
            run._stop = False
            with run._signals():
                os.kill(os.getpid(), number)
            assert run._stop == stops
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    trainer(tmp_path, save_steps=2).train()
    newest = tmp_path / "checkpoint-6" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"checkpoint-6 is damaged and is skipped: the content of optimizer"):
        assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.warns(UserWarning):
        assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-2"


def test_old_checkpoints_go(tmp_path: Path) -> None:
    trainer(tmp_path, save_steps=1, save_total_limit=2).train()
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-5", "checkpoint-6"]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run._save_model = lambda folder: (folder / "x").write_text("y") and 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.save()
    assert not list(tmp_path.iterdir())


# -- refusals ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    with pytest.raises(InputError, match="of another run"):
        trainer(tmp_path, seed=1, resume_from_checkpoint=True).train()


def test_a_checkpoint_of_another_adapter(tmp_path: Path) -> None:
    def adapted(rank: int, **changes: Any) -> Trainer:
        model = tiny_model(torch.float32)
        lora.add_adapter(model, LoraConfig(r=rank))
        return trainer(tmp_path, model, **changes)

    adapted(2).train()
    with pytest.raises(InputError, match=r"lora_A.default is \(2, 64\) there and \(3, 64\) here; give the same"):
        adapted(3, resume_from_checkpoint=True).train()
    with pytest.raises(InputError, match=r"is not trained there and|there and not trained here"):
        trainer(tmp_path, resume_from_checkpoint=True).train()


def test_nan_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    run = trainer(tmp_path, model, save_steps=2)
    run._report = lambda entry: model.lm_head.weight.data.fill_(math.nan) if entry["step"] == 3 else None
    with pytest.raises(InputError, match="the loss is nan at step 4"):
        run.train()
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-2"


def test_wrong_arguments(tmp_path: Path) -> None:
    for name, value in (("logging_steps", 0), ("learning_rate", math.nan), ("lr_scheduler_type", "round")):
        with pytest.raises(InputError, match=f"{name} is {value!r}"):
            arguments(tmp_path, **{name: value})
    model = tiny_model(torch.float32)
    with pytest.raises(InputError, match="no rows"):
        Trainer(model, arguments(tmp_path), objective=NextToken(), rows=[])
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the model is trainable"):
        trainer(tmp_path, frozen)


# -- the fields that users of transformers set -------------------------------------------------------------------


def test_unknown_fields_are_named(tmp_path: Path) -> None:
    for given, said in (
        ({"learning_rat": 1.0}, "has no 'learning_rat'; did you mean learning_rate"),
        ({"zzz": 1}, "has no 'zzz'; leave it out"),
        ({"save_strategy": "never"}, "save_strategy is 'never'; it must be one of no, steps, epoch, best"),
        ({"report_to": "paper"}, "report_to is 'paper'"),
        ({"optim": "sgd"}, "optim is 'sgd'"),
        ({"bf16": True, "fp16": True}, "both set"),
        ({"load_best_model_at_end": True}, "needs every saved step to be measured"),
    ):
        with pytest.raises(InputError, match=said):
            arguments(tmp_path, **given)


@pytest.mark.parametrize(
    ("changes", "saved", "measured", "logged"),
    [
        ({"save_steps": 4}, [4, 6], [], [1, 2, 3, 4, 5, 6]),
        ({"eval_steps": 3, "save_strategy": "no"}, [], [3, 6], [1, 2, 3, 4, 5, 6]),
        ({"eval_strategy": "steps", "logging_steps": 4}, [6], [4, 6], [4, 6]),
        ({"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}, [2, 4, 6], [2, 4, 6],
         [2, 4, 6]),
        ({"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "logging_strategy": "no"}, [6], [0, 3, 6],
         [6]),
    ],
)  # fmt: skip
def test_strategies(
    tmp_path: Path, changes: dict[str, Any], saved: list[int], measured: list[int], logged: list[int]
) -> None:
    rows = packed_rows(examples(8), None)
    args = arguments(tmp_path, **{"per_device_train_batch_size": 4, "save_total_limit": 9, **changes})
    run = Trainer(tiny_model(torch.float32), args, objective=NextToken(), rows=rows, eval_rows=rows[:2])
    run.train()
    state = run.state
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path)] == saved
    assert [e["step"] for e in state.history if "eval_loss" in e] == measured
    assert [e["step"] for e in state.history if "loss" in e] == logged


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    rows, model = packed_rows(examples(), None), tiny_model(torch.float32)
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=1, load_best_model_at_end=True
    )
    run = Trainer(model, args, objective=NextToken(), rows=rows, eval_rows=rows[:2])
    measured = iter([5.0, 3.0, 1.0, 2.0, 4.0, 6.0])
    kept: dict[int, Any] = {}

    def evaluate() -> dict[str, float]:
        kept[run.state.step] = weights(model)
        return {"eval_loss": next(measured)}

    run.evaluate = evaluate  # type: ignore[method-assign]
    run.train()
    state = run.state
    assert (state.best_step, state.best_metric, state.step) == (3, 1.0, 6)
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    now = weights(model)
    assert all(torch.equal(now[name], kept[3][name]) for name in now)
    assert not torch.equal(now["lm_head.weight"], kept[6]["lm_head.weight"])


def test_float16_needs_cuda(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 needs a CUDA device, and the model is on cpu: use bf16=True.*NaN"):
        trainer(tmp_path, fp16=True)


def test_float16_scales_the_loss_and_leaves_overflows_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "check_float16", lambda model: None)
    plain, model = tiny_model(torch.float32), tiny_model(torch.float32)
    trainer(tmp_path / "plain", plain, bf16=False).train()
    run = trainer(tmp_path / "half", model, fp16=True, save_steps=3)
    run.train()
    state, scale = run.state, run.scale
    assert model.dtype == torch.float16 and scale == loop.LOSS_SCALE
    master = run.updates.state()["master.lm_head.weight"]
    assert (master - plain.lm_head.weight).abs().mean() < 2e-5 and state.step == 6
    overflowing = trainer(tmp_path / "over", tiny_model(torch.float32), fp16=True, max_steps=3)
    overflowing.scale = 2.0**40
    before = overflowing.optimizer.state()["master.lm_head.weight"].clone()
    overflowing.train()
    assert torch.equal(overflowing.optimizer.state()["master.lm_head.weight"], before)
    assert overflowing.scale == 2.0**37
    again = trainer(tmp_path / "over", tiny_model(torch.float32), fp16=True, max_steps=3, resume_from_checkpoint=True)
    again.train()
    assert again.scale == 2.0**37


def test_data_sets_of_ids_as_transformers_has_them(tmp_path: Path) -> None:
    made = examples()
    sets = [
        [{"input_ids": e.input_ids, "labels": e.labels} for e in made],
        [{"input_ids": torch.tensor([0, *e.input_ids]), "labels": torch.tensor([-100, *e.labels]),
          "attention_mask": torch.tensor([0, *[1] * len(e.input_ids)])} for e in made],
    ]  # fmt: skip
    wanted = Trainer(
        tiny_model(torch.float32), arguments(tmp_path / "a"), objective=NextToken(), rows=packed_rows(made, None)
    )
    wanted.train()
    for i, rows in enumerate(sets):
        args = arguments(tmp_path / str(i), eval_steps=6)
        run = Trainer(model=tiny_model(torch.float32), args=args, train_dataset=rows, eval_dataset=rows[:2])
        run.train()
        assert losses_of(run) == losses_of(wanted)
        assert "eval_loss" in run.state.history[-2]


def test_data_sets_of_texts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = tiny_model(torch.float32, vocab_size=260)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    first = Trainer(model=model, args=arguments(tmp_path / "a"), train_dataset=rows[:1], processing_class=tokenizer)
    assert isinstance(first.objective, NextToken) and first.rows[0].labels == [-100, *first.rows[0].input_ids[1:]]
    args, config = arguments(tmp_path / "b"), LoraConfig(r=2)
    second = Trainer(model=model, args=args, train_dataset=rows[1:], tokenizer=tokenizer, peft_config=config)
    assert isinstance(second.objective, Preferences) and isinstance(second.rows[0], EncodedPair)
    second.train()
    second.save_model(str(tmp_path / "out"))
    again = tiny_model(torch.float32, vocab_size=260)
    assert load_adapter(again, tmp_path / "out").r == 2 and (tmp_path / "out" / "tokenizer.json").exists()
    with torch.no_grad():
        assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)
    state = second.state
    assert state.global_step == 6 and state.log_history is state.history
    with pytest.raises(InputError, match="has no 'ref_model'; use DPOTrainer"):
        Trainer(model=model, args=args, train_dataset=rows, ref_model=model)
    with pytest.raises(InputError, match="pass processing_class=tokenizer"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=rows)


def test_data_sets_of_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0))
    rows = [{"input_ids": tiny_ids(1, 6, seed=i)[0], "label": i % 3} for i in range(6)]
    run = Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows)
    assert isinstance(run.objective, Classification) and [label for _, label in run.rows] == [0, 1, 2, 0, 1, 2]
    run.train()
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize(
    ("classes", "row", "message"),
    [
        (0, {"input_ids": [1, 2, 3], "labels": [1, 2]}, "3 input_ids, 2 labels and a mask of 3"),
        (0, {"input_ids": [1, 2], "labels": [1, -100]}, "row 0 has no target"),
        (0, 5, "a row is a int"),
        (3, {"input_ids": [1, 2], "label": 3}, r"the label 3; the model has 3, 0 \.\. 2"),
        (3, {"input_ids": [1, 2]}, "row 0 has no labels"),
        (3, {"input_ids": [1, 2], "labels": [0, 1]}, "2 labels, and the model 3"),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, classes: int, row: Any, message: str) -> None:
    model: Any = tiny_model(torch.float32)
    if classes:
        model = LlamaForSequenceClassification(tiny_config(num_labels=classes))
    with pytest.raises(InputError, match=message):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=[row])
