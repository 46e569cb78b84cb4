"""Reward models: the loss beside numpy and golden values, rows, the command, its report and files, and scores."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bytewise import write_tokenizer
from cli.conftest import Run, checkpoint, run  # noqa: F401  # fixtures
from tiny import tiny_config

from llama2 import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    InputError,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MismatchError,
    pipeline,
)
from llama2.errors import ContextLengthError
from llama2.scoring import Scorer, score
from llama2.train.calibration import measured
from llama2.train.ranking import RATINGS, Ranked, reward_pairs
from llama2.train.reward import Rewards, reward_loss

CHOSEN, REJECTED = [1.2, 0.3, -0.5], [0.4, 0.9, -1.0]
MARGIN, SAFE = [1.0, 1 / 3, 0.0], [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
WORDS = ("red", "blue", "green", "grey", "pink", "gold")
QUICK = ("--max-length", "64", "--learning-rate", "0.02", "--batch-size", "4", "--seed", "1", "--logging-steps", "1")


def rows(count: int = 36) -> list[dict[str, Any]]:
    """Pairs whose better answer ends in a mark; the rating says how many."""
    made = []
    for i in range(count):
        word, rating = WORDS[i % len(WORDS)], RATINGS[i % 3]
        chosen, rejected = f"{word} sky" + "!" * (3 - i % 3), f"{word} sky"
        made.append({"prompt": [{"role": "user", "content": f"{word} {i}"}],
                     "chosen": [{"role": "assistant", "content": chosen}],
                     "rejected": [{"role": "assistant", "content": rejected}],
                     "rating": rating, "chosen_safe": True, "rejected_safe": i % 3 != 0})  # fmt: skip
    return made


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture
def tok(tmp_path: Path) -> Any:
    """The byte-level tokenizer, with a pad token of its own."""
    (tmp_path / "tok").mkdir()
    write_tokenizer(tmp_path / "tok")
    found = AutoTokenizer.from_pretrained(tmp_path / "tok")
    found.pad_token = "<|system|>"
    return found


def ranker(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "num_labels": 1, "pad_token_id": 3, **changes}
    model = LlamaForSequenceClassification(tiny_config(**sizes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model.to(dtype)


# -- the loss ----------------------------------------------------------------------------------------------------


def by_numpy(c: Any, r: Any, m: Any, center: float, safety: float, safe: Any, weight: float) -> Any:
    """Five lines from the formulas."""
    losses = np.logaddexp(0, -(c - r - m)) + center * (c + r) ** 2
    both, known = np.stack((c, r)), ~np.isnan(safe)
    bce = np.logaddexp(0, both) - np.where(known, safe, 0) * both
    return losses + safety * weight * (bce * known).sum(0)


def test_the_loss_is_numpys() -> None:
    rng = np.random.default_rng(0)
    c, r, m = rng.normal(size=(3, 50)) * 4
    safe = np.where(rng.random((2, 50)) < 0.3, np.nan, rng.integers(0, 2, (2, 50)))
    found = reward_loss(*map(torch.tensor, (c, r, m)), 0.01, 0.7, torch.tensor(safe), 0.8).total
    assert np.abs(found.numpy() - by_numpy(c, r, m, 0.01, 0.7, safe, 0.8)).max() < 1e-10


def test_golden_values() -> None:
    """Worked out by hand and with TRL's method in float64."""
    c, r, m, s = (torch.tensor(x, dtype=torch.float64) for x in (CHOSEN, REJECTED, MARGIN, SAFE))
    c.requires_grad_(True)

    def mean(*how: Any) -> float:
        return float(reward_loss(c, r, *how).total.mean().detach())

    assert mean() == pytest.approx(0.627555, abs=1e-6) and mean(m) == pytest.approx(0.845727, abs=1e-6)
    assert mean(0.0, 0.01) == pytest.approx(0.648389, abs=1e-6) and mean(m, 0.01) == pytest.approx(0.866561, abs=1e-6)
    assert mean(m, None, 1.0, s) == pytest.approx(1.322251, abs=1e-6)
    reward_loss(c, r, m).total.mean().backward()
    assert c.grad is not None
    assert np.allclose(c.grad, [-0.183278, -0.239250, -0.125847], atol=1e-6)


def test_labels_weigh_alike_in_every_batch(tok: Any) -> None:
    """The mean over all pairs, in batches of any size, is the mean over labelled answers."""
    given = rows(9)
    for row in given[:5]:
        del row["chosen_safe"]
    items, _ = reward_pairs(given, tok, None)
    model, objective = ranker(torch.float64), Rewards(None, 2.0)
    plain = Rewards()

    def total(of: Rewards, size: int) -> float:
        with torch.no_grad():
            return sum(float(of.loss(model, of.collate(items[i : i + size])).total) for i in range(0, 9, size)) / 9

    extra = [total(objective, size) - total(plain, size) for size in (1, 4, 9)]
    with torch.no_grad():
        rewards = plain.rewards(model, plain.collate(items)).reshape(2, -1).numpy()
    labels = np.array([[np.nan if x is None else x for x in item.safe] for item in items]).T
    known = ~np.isnan(labels)
    bce = np.logaddexp(0, rewards[known]) - labels[known] * rewards[known]
    assert known.sum() == 13 and np.allclose(extra, 2.0 * bce.mean(), atol=1e-10)


# -- rows --------------------------------------------------------------------------------------------------------


def test_ratings_are_margins(tok: Any) -> None:
    for name, wanted in (("small", (1, 2 / 3, 1 / 3, 0)), ("large", (3, 2, 1, 0)), ("none", (0, 0, 0, 0))):
        given = [{"prompt": "a", "chosen": "b", "rejected": "c", "rating": rating} for rating in RATINGS]
        assert [item.margin for item in reward_pairs(given, tok, None, name)[0]] == list(wanted)  # type: ignore[arg-type]
    odd = [{"chosen": "ab", "rejected": "ac", "rating": "Significantly better"}, {"chosen": "ab", "rejected": "ac"},
           {"chosen": "ab", "rejected": "ac", "rating": "unsure"},
           {"chosen": "ab", "rejected": "ac", "margin": 0.25}]  # fmt: skip
    items, report = reward_pairs(odd, tok, None)
    assert [item.margin for item in items] == [1.0, 0.0, 0.0, 0.25] and not report.unused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rating": "good"}, "row 1: rating is 'good'; it must be one of significantly_better, better"),
        ({"rating": None, "margin": "wide"}, "row 1: margin is 'wide'; it must be a number"),
        ({"rating": None, "margin": float("nan")}, "row 1: margin is nan; it must be a finite number"),
        ({"margin": 1}, "row 1 has the margin 1 and the rating better; give one of them"),
        ({"chosen_safe": "perhaps"}, "row 1: chosen_safe is 'perhaps'; it must be true or false"),
    ],
)
def test_what_a_row_cannot_say(
    run: Run,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    changes: dict[str, Any],
    said: str,
) -> None:
    given = rows(6)
    given[1] |= changes
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    code, _, err = run("finetune", "reward", checkpoint, data, tmp_path / "out", *QUICK)
    assert code == 2 and said in err and err.count("llama2:") == 1


def test_pairs_without_a_difference(run: Run, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    code, _, err = run("finetune", "reward", checkpoint, data, tmp_path / "out", *QUICK)
    assert code == 2 and "no row of" in err and "both answers are the same" in err


# -- the report --------------------------------------------------------------------------------------------------


def test_figures_are_right() -> None:
    answer = [1, 2]
    item = Ranked(((answer, answer), (answer, answer)), 0.0, "better")  # type: ignore[arg-type]

    class Pair:
        def __init__(self, a: int, b: int) -> None:
            self.items = [type("E", (), {"input_ids": [0] * n})() for n in (a, b)]

        def __iter__(self) -> Any:
            return iter(self.items)

    items = [item._replace(pair=Pair(4, 2), rating=rating, safe=(1.0, 0.0))  # type: ignore[arg-type]
             for rating in ("better", "better", "slightly_better", None)]  # fmt: skip
    rewards = np.array([[2.0, 0.0, 1.0, 0.5], [0.0, 1.0, 1.0, -0.5]])
    found = measured(items, rewards)
    assert found["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["by_rating"]["better"]["accuracy"] == 0.5 and found["by_rating"]["slightly_better"]["accuracy"] == 0.5
    assert set(found["by_rating"]) == {"better", "slightly_better"}
    assert found["safety"] == {"answers": 8, "accuracy": (3 + 2) / 8, "unsafe_recall": 2 / 4}
    p = [1 / (1 + math.exp(-gap)) for gap in (2, 1, 0, 1)]
    assert [one["pairs"] for one in found["calibration"]] == [1, 2, 1]
    second = found["calibration"][1]
    assert second["predicted"] == pytest.approx(p[1]) and second["observed"] == 0.5
    wanted = (abs(p[2] - 0.5) + 2 * abs(p[1] - 0.5) + abs(p[0] - 1)) / 4
    assert found["calibration_error"] == pytest.approx(wanted)
    assert found["length_correlation"] == pytest.approx(np.corrcoef(rewards.ravel(), [4] * 4 + [2] * 4)[0, 1])


# -- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [("--learning-rate", "0.005"), ("--lora-r", "4"), ("--lora-r", "4", "--merge", "--center", "0.01")]
)
def test_a_reward_model_ranks_and_scores(
    run: Run,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    pairs: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    code, said, err = run("finetune", "reward", checkpoint, pairs, out, *QUICK, "--epochs", "6", "--eval-split", "0.25",
                          *flags)  # fmt: skip
    assert code == 0, err
    held_out = re.search(r"held out: accuracy (\S+)", said)  # of 9 pairs, a third of which differ little
    assert f"llama2 score {out}" in said and held_out and float(held_out[1]) > 0.75, said
    content = json.loads((out / "finetune.json").read_text())
    assert content["arguments"]["adam_beta2"] == 0.95 and content["arguments"]["adam_epsilon"] == 1e-5
    assert content["arguments"]["warmup_steps"] == 5 and content["arguments"]["weight_decay"] == 0.1
    assert content["result"]["report"]["by_rating"]["better"]["accuracy"] == 1.0
    assert (out / "calibration.svg").read_text().count("<rect") == 5
    assert (out / "calibration.csv").read_text().startswith("bin,pairs,predicted,observed\n")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "red 1", "answers": [[{"role": "assistant", "content": text}]
                                for text in ("red sky", "red sky!!!")]}) + "\n")  # fmt: skip
    code, said, err = run("score", out, data)
    assert code == 0, err
    found = json.loads(said)
    assert found["best"] == 1 and found["scores"][1] > found["scores"][0] + 1
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    chat = [{"role": "user", "content": "red 1"}, {"role": "assistant", "content": "red sky!!!"}]
    assert pipeline("text-classification", model=model, tokenizer=tokenizer)(chat)[0]["score"] == pytest.approx(
        found["scores"][1], rel=1e-5
    )


def test_resumed_it_ends_with_the_same_bits(
    run: Run,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    pairs: Path,
    tmp_path: Path,
) -> None:
    words = ("finetune", "reward", checkpoint, pairs, *QUICK, "--lora-r", "4", "--save-steps", "2", "--keep", "9")
    assert run(*words, "--output-dir", tmp_path / "a", "--max-steps", "8")[0] == 0
    assert run(*words, "--output-dir", tmp_path / "b", "--max-steps", "8")[0] == 0
    for path in sorted((tmp_path / "b").glob("checkpoint-[68]")):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    assert run(*words, "--output-dir", tmp_path / "b", "--max-steps", "8", "--resume")[0] == 0
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert one == other


# -- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runners_agree(tok: Any, dtype: torch.dtype) -> None:
    model = ranker(dtype)
    given = ["a", "hello there", {"prompt": "say ", "answers": ["one", "two and three", "two and four"]},
             [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]]  # fmt: skip
    native = score(model, tok, given, runner="native")
    plain = score(model.float(), tok, given, runner="torch")
    assert [len(row) for row in native] == [1, 1, 3, 1]
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert np.allclose(np.concatenate(native), np.concatenate(plain), atol=bound * max(map(abs, np.concatenate(plain))))


def test_a_trained_head_is_seen_at_once(tok: Any) -> None:
    model = ranker()
    scorer = Scorer(model, tok, runner="native")
    before = scorer(["abc"])[0][0]
    with torch.no_grad():
        model.score.weight.mul_(2)
        assert scorer(["abc"])[0][0] == pytest.approx(2 * before, rel=1e-5)
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
    assert scorer(["abc"])[0] == pytest.approx(Scorer(model, tok, runner="torch")(["abc"])[0], rel=1e-4)


def test_rows_are_encoded_as_in_training(tok: Any) -> None:
    """The end included, which is what a reward is read at."""
    scorer = Scorer(ranker(), tok, runner="torch")
    for row in [{"prompt": "say ", "chosen": "it is", "rejected": "no"}, rows(1)[0]]:
        pair = reward_pairs([row], tok, None)[0][0].pair
        given = [{"prompt": row["prompt"], "answers": [row["chosen"], row["rejected"]]}]
        assert scorer(given)[0] == scorer.of_ids([pair.chosen.input_ids, pair.rejected.input_ids])


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"prompt": "a", "answers": []}, InputError, "row 3: answers is no list of answers"),
        ({"answers": ["b"]}, InputError, "row 3: it has answers and no prompt"),
        ({"chosen": "a", "rejected": "b"}, InputError, "row 3: it is a pair"),
        (7, InputError, "row 3: it is a int; give a text"),
        ({"said": "a"}, InputError, "row 3: a row with the keys"),
        ("a" * 200, ContextLengthError, "row 3 has 201 tokens with its prompt, and 64 fit"),
    ],
)
def test_what_cannot_be_scored(tok: Any, given: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        Scorer(ranker(), tok)([given], 3)


def test_models_that_give_no_reward(tok: Any) -> None:
    with pytest.raises(InputError, match="a LlamaForCausalLM, which gives no reward"):
        Scorer(LlamaForCausalLM(tiny_config()), tok)
    with pytest.raises(InputError, match="the model has 3 labels"):
        Scorer(ranker(num_labels=3), tok)
    with pytest.raises(MismatchError, match="outside the reward model's vocabulary of 50"):
        score(ranker(vocab_size=50), tok, ["abc"])
    broken = ranker()
    with torch.no_grad():
        broken.score.weight.fill_(math.nan)
    with pytest.raises(InputError, match="row 0: the reward is nan"):
        score(broken, tok, ["abc"])


def test_a_mixture_holds_out_of_every_set(run: Run, checkpoint: Path, pairs: Path, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"{i} ", "chosen": "a", "rejected": "b"}) + "\n" for i in range(40)))
    words = (
        "finetune",
        "reward",
        checkpoint,
        pairs,
        tmp_path / "out",
        *QUICK,
        "--max-steps",
        "1",
        "--eval-split",
        "0.25",
    )
    code, _, err = run(*words, "--mix", f"{other}=0.25", "--lora-r", "2")
    assert code == 0, err
    assert "training: 36 rows" in err and "held out: 19 rows" in err and "9 of 30 rows, 25.0% of all" in err
