"""KTO, ORPO, SimPO, CPO and a precomputed reference: losses beside numpy and golden values, rows, and small runs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bytewise import write_tokenizer
from cli.conftest import Run, checkpoint, run  # noqa: F401  # fixtures
from tiny import tiny_model

from llama2 import (
    AutoTokenizer,
    CPOConfig,
    CPOTrainer,
    InputError,
    KTOConfig,
    KTOTrainer,
    LoraConfig,
    ORPOConfig,
    ORPOTrainer,
    Trainer,
    TrainingArguments,
    lora,
)
from llama2.train.answers import LogProbs, Preferences, UnpairedObjective
from llama2.train.precomputed import FILE
from llama2.train.tasks.cpo import cpo_loss
from llama2.train.tasks.kto import kto_loss
from llama2.train.tasks.orpo import orpo_loss
from llama2.train.tasks.simpo import simpo_loss
from llama2.train.unpaired import unpaired

S_C, S_R, T_C, T_R = [-12.0, -8.0], [-15.0, -7.5], [10, 8], [12, 5]
QUICK = ("--max-length", "64", "--batch-size", "4", "--seed", "1", "--logging-steps", "1")
WORDS = ("red", "blue", "green", "grey")
PAIRS = [{"prompt": f"{word} {i} ", "chosen": f"{word} sky", "rejected": f"{word} sea"}
         for i in range(4) for word in WORDS]  # fmt: skip
JUDGED = [{"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
          for row in PAIRS for name in ("chosen", "rejected")]  # fmt: skip


def log_probs(sums: Any, counts: Any) -> LogProbs:
    return LogProbs(torch.as_tensor(sums, dtype=torch.float64), torch.as_tensor(counts))


# -- losses ------------------------------------------------------------------------------------------------------


def softplus(x: Any) -> Any:
    return np.logaddexp(0, x)


def cpo_numpy(c: Any, r: Any, tc: Any, tr: Any) -> Any:
    return softplus(-0.3 * (c - r)) - 0.7 * c / 11.0


def simpo_numpy(c: Any, r: Any, tc: Any, tr: Any) -> Any:
    return softplus(-(2.0 * (c / tc - r / tr) - 0.6))


def orpo_numpy(c: Any, r: Any, tc: Any, tr: Any) -> Any:
    up, down = (a - np.log(-np.expm1(a)) for a in (c / tc, r / tr))
    return -c / 11.0 + 0.2 * softplus(-(up - down))


@pytest.mark.parametrize(
    ("loss", "settings", "numpys"),
    [
        (cpo_loss, {"beta": 0.3, "alpha": 0.7}, cpo_numpy),
        (simpo_loss, {"beta": 2.0, "gamma": 0.6}, simpo_numpy),
        (orpo_loss, {"beta": 0.2}, orpo_numpy),
    ],
)
def test_losses_of_pairs_are_numpys(loss: Any, settings: dict[str, float], numpys: Any) -> None:
    rng = np.random.default_rng(0)
    c, r = -rng.gamma(2.0, 4.0, (2, 60))
    tc, tr = rng.integers(1, 30, (2, 60))
    found = loss(log_probs(c, tc), log_probs(r, tr), 11.0, **settings)[0]
    assert np.abs(found.numpy() - numpys(c, r, tc, tr)).max() < 1e-10


def test_golden_values_of_pairs() -> None:
    """Worked out in float64 with TRL's methods."""
    chosen, rejected = log_probs(S_C, T_C), log_probs(S_R, T_R)
    assert np.allclose(cpo_loss(chosen, rejected, 1.0, 0.1, 0.0)[0], [0.554355, 0.718460], atol=1e-6)
    assert np.allclose(simpo_loss(chosen, rejected, 1.0, 2.0, 0.5)[0], [0.913015, 0.474077], atol=1e-6)
    averages = log_probs([-1.2, -0.9], [1, 1]), log_probs([-1.25, -1.5], [1, 1])
    odds = orpo_loss(*averages, 1e12, 0.1)[0]
    assert np.allclose(odds, [0.1 * math.log1p(math.exp(-0.070803)), 0.1 * math.log1p(math.exp(-1.0 * log_odds()))],
                       atol=1e-6)  # fmt: skip


def log_odds() -> float:
    up, down = (a - math.log(-math.expm1(a)) for a in (-0.9, -1.5))
    return up - down


def test_orpo_of_certain_answers_is_finite() -> None:
    sums = torch.tensor([-1e-9, -1e-30, 0.0], requires_grad=True)
    losses = orpo_loss(LogProbs(sums, torch.ones(3)), LogProbs(torch.full((3,), -1.0), torch.ones(3)), 1.0, 0.1)[0]
    losses.sum().backward()
    assert losses.isfinite().all() and sums.grad is not None and sums.grad.isfinite().all()


def test_kto_is_numpys() -> None:
    rng = np.random.default_rng(0)
    d, good = rng.normal(size=50) * 9, rng.random(50) < 0.5
    found = kto_loss(torch.tensor(d), torch.tensor(good), 0.35, 0.1, 1.3, 0.7)
    s = 1 / (1 + np.exp(-0.1 * (d - 0.35)))
    assert np.abs(found.numpy() - np.where(good, 1.3 * (1 - s), 0.7 * s)).max() < 1e-10


@pytest.mark.parametrize(("weight", "mean"), [(1.0, 0.487514), (1.5, 0.608771)])
def test_golden_values_of_kto(weight: float, mean: float) -> None:
    ratios = torch.tensor([-12.0, -8, -15, -7.5]) - torch.tensor([-13.0, -8.5, -14, -8])
    mismatched = torch.tensor([-20.0, -18, -22, -19]) - torch.tensor([-20.5, -18.6, -21.9, -19.4])
    objective = UnpairedObjective(0.1)
    objective.take(float(mismatched.mean()))
    found = kto_loss(ratios, torch.tensor([True, True, False, False]), objective._z0, 0.1, 1.0, weight)
    assert float(found.mean()) == pytest.approx(mean, abs=1e-6)


# -- rows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tok(tmp_path: Path) -> Any:
    (tmp_path / "tok").mkdir()
    write_tokenizer(tmp_path / "tok")
    return AutoTokenizer.from_pretrained(tmp_path / "tok")


def test_rows_of_kto(tok: Any) -> None:
    rows = [{"prompt": "a ", "completion": "one", "label": True}, {"prompt": "b ", "completion": "two", "label": 0},
            {"prompt": "b ", "completion": "six", "label": "False"}]  # fmt: skip
    items, report = unpaired(rows, tok, 64)
    assert [item.desirable for item in items] == [True, False, False] and report.rows == 3 and not report.unused
    texts = [tok.decode(item.mismatched.input_ids) for item in items]
    assert texts == ["a six<|end|>", "b one<|end|>", "b one<|end|>"]  # never an answer to the same prompt
    assert items[0].mismatched.labels[:2] == [-100, -100]
    both, _ = unpaired(PAIRS[:2], tok, 64)
    assert [item.desirable for item in both] == [True, False, True, False]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([JUDGED[0], {**JUDGED[1], "label": 2}], "row 1: label is 2; it must be true"),
        ([JUDGED[0], PAIRS[0]], "some rows are pairs and some are single answers"),
        ([JUDGED[0], JUDGED[1]], "all answers have the same prompt"),
    ],
)
def test_what_kto_cannot_take(tok: Any, rows: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        unpaired(rows, tok, 64)


def test_uneven_answers_are_said(tok: Any, tmp_path: Path) -> None:
    good = [row for row in JUDGED if row["label"]]
    args = KTOConfig(str(tmp_path / "out"), max_steps=1, save_strategy="no")
    model = tiny_model(torch.float32, vocab_size=260)
    with pytest.warns(UserWarning, match="desirable answers weigh 8.00 times the others"):
        KTOTrainer(model, args=args, train_dataset=[*good, JUDGED[1], JUDGED[3]], processing_class=tok)


# -- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "rows", "flags"),
    [
        ("simpo", PAIRS, ("--lora-r", "4")),
        ("cpo", PAIRS, ("--lora-r", "4")),
        ("orpo", PAIRS, ()),
        ("kto", JUDGED, ("--lora-r", "4")),
        ("kto", PAIRS, ()),
        ("dpo", PAIRS, ("--precompute-reference",)),
    ],
)
def test_a_task_learns_and_goes_on_to_the_same_bits(
    run: Run,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    task: str,
    rows: list[dict[str, Any]],
    flags: tuple[str, ...],
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("finetune", task, checkpoint, data, *QUICK, "--learning-rate", "0.005", "--max-steps", "12",
             "--save-steps", "4", "--keep", "9", "--eval-split", "0.25", *flags)  # fmt: skip
    for name in "ab":
        code, said, err = run(*words, "--output-dir", tmp_path / name)
        assert code == 0, err
    result = json.loads((tmp_path / "a" / "finetune.json").read_text())["result"]
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"]
    up, down = (result["after"][f"eval_rewards/{name}"] for name in ("chosen", "rejected"))
    assert up > down and "held out, rewards/chosen" in said
    for path in (tmp_path / "b").glob("checkpoint-*"):
        if path.name != "checkpoint-4":
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
    assert run(*words, "--output-dir", tmp_path / "b", "--resume")[0] == 0
    weights = "adapter_model.safetensors" if "--lora-r" in flags else "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


def pairs_of(tok: Any) -> list[Any]:
    from llama2.train.data import prepare_pairs

    return list(prepare_pairs(PAIRS, tok, None)[0])


def test_kto_does_not_depend_on_the_size_of_a_pass(tok: Any, tmp_path: Path) -> None:
    """z0 is that of the whole step."""
    items = unpaired(JUDGED, tok, 64)[0]
    losses = []
    for size, parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = tiny_model(torch.float64, vocab_size=260)
        lora.add_adapter(model, LoraConfig(r=2))
        args = TrainingArguments(str(tmp_path / str(size)), per_device_train_batch_size=size, max_steps=4,
                                 gradient_accumulation_steps=parts, learning_rate=1e-2, logging_steps=1,
                                 save_strategy="no")  # fmt: skip
        trainer = Trainer(model=model, args=args, objective=UnpairedObjective(0.5, function=kto_loss), rows=items)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.history if "loss" in entry])
        assert max(entry["kl"] for entry in trainer.state.history if "kl" in entry) > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0][0] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_a_precomputed_reference_changes_nothing(
    run: Run,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = ("finetune", "dpo", checkpoint, data, *QUICK, "--max-steps", "6", "--learning-rate", "0.005", "--loss-type",
             kind)  # fmt: skip
    assert run(*words, "--output-dir", tmp_path / "a")[0] == 0
    code, _, err = run(*words, "--output-dir", tmp_path / "b", "--precompute-reference")
    assert code == 0, err
    logs = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in "ab"]  # fmt: skip
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-3 * logs[0][0])
    content = json.loads((tmp_path / "b" / FILE).read_text())
    assert len(content["values"][0]) == len(PAIRS) and content["values"][0][0][0] < 0


def test_a_precomputed_reference_needs_no_copy(tok: Any) -> None:
    assert Preferences(precomputed=True).begin(tiny_model(vocab_size=260)) == 0
    assert Preferences().begin(tiny_model(vocab_size=260)) > 0


def test_a_reference_of_other_weights_is_computed_again(
    run: Run,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    out = tmp_path / "out"
    words = ("finetune", "dpo", checkpoint, data, out, *QUICK, "--max-steps", "1", "--precompute-reference")
    out.mkdir()
    (out / FILE).write_text(json.dumps({"fingerprint": "of something else", "values": [[[0.0, 0.0]] * 16, []]}))
    assert run(*words)[0] == 0
    assert json.loads((out / FILE).read_text())["values"][0][0][0] < 0


# -- TRL's names -------------------------------------------------------------------------------------------------

HOW: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 1, "learning_rate": 5e-3,
                       "save_strategy": "no"}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config", "rows"),
    [
        (KTOTrainer, lambda out: KTOConfig(out, **HOW, desirable_weight=1.2, beta=1.0), JUDGED),
        (ORPOTrainer, lambda out: ORPOConfig(out, **HOW), PAIRS),
        (CPOTrainer, lambda out: CPOConfig(out, **HOW), PAIRS),
        (CPOTrainer, lambda out: CPOConfig(out, **HOW, loss_type="simpo", cpo_alpha=0.0, beta=2.0), PAIRS),
    ],
)
def test_trls_names(tmp_path: Path, tok: Any, kind: Any, config: Any, rows: Any) -> None:
    tiny_model(torch.float32, vocab_size=260).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    trainer = kind(str(tmp_path / "base"), args=config(str(tmp_path / "out")), train_dataset=rows,
                   peft_config=LoraConfig(r=4))  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda out: KTOConfig(out, loss_type="apo_zero_unpaired"), "loss_type is 'apo_zero_unpaired', which is not"),
        (lambda out: CPOConfig(out, loss_type="hinge"), "loss_type is 'hinge'; it must be sigmoid or simpo"),
        (lambda out: CPOConfig(out, label_smoothing=0.1), "label_smoothing is 0.1, which is not supported"),
        (lambda out: ORPOConfig(out, max_prompt_length=9), "max_prompt_length is 9, which is not supported"),
    ],
)
def test_what_the_configurations_refuse(tmp_path: Path, make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(str(tmp_path))


def test_simpo_with_cpos_weight_is_refused(tmp_path: Path, tok: Any) -> None:
    args = CPOConfig(str(tmp_path), loss_type="simpo", **HOW)
    with pytest.raises(InputError, match=r"cpo_alpha is 1.0 with loss_type 'simpo'; set it to 0"):
        CPOTrainer(tiny_model(torch.float32, vocab_size=260), args, train_dataset=PAIRS, processing_class=tok)
