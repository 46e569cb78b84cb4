"""Rejection sampling: rows with their lineage, resuming to the same bytes, pooling, temperatures, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from align.policies import write_policy
from bytewise import write_tokenizer
from tiny import tiny_config

from llama2 import AutoTokenizer, InputError, LlamaForSequenceClassification
from llama2.align.rejection import REPORT, ROWS, SAMPLES, Rejection, Round
from llama2.cli import main
from llama2.train.data import encode

REWARDS = """
calls = 0

def vowels(completions, **_):
    return [sum(ord(c) % 3 for c in text) / 10 - 0.01 * len(text) for text in completions]

def breaks(completions, **_):
    global calls
    calls += 1
    if calls == 2:
        raise RuntimeError("out of luck")
    return vowels(completions)

breaks.__name__ = "vowels"

def same(completions, **_):
    return [1.0] * len(completions)

def careful(completions, **_):
    return [3.0 if len(text) % 2 else -3.0 for text in completions]

def never(completions, **_):
    return [-5.0] * len(completions)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, prompts and a module of rewards."""
    folder = tmp_path_factory.mktemp("made")
    write_policy(folder / "policy")
    rows = [{"prompt": f"prompt {i}"} for i in range(19)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards_of_tests.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def importable(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(made))


def round_of(made: Path, out: Path, reward: str = "vowels", **changes: Any) -> Round:
    settings: dict[str, Any] = {"count": 4, "max_new_tokens": 8, "dtype": "float32", **changes}
    rewards = settings.pop("rewards", (f"rewards_of_tests:{reward}",))
    return Round(policy=str(made / "policy"), prompts=str(made / "prompts.jsonl"), output_dir=str(out), rewards=rewards,
                 **settings)  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_answer_of_each_prompt_is_kept(made: Path, tmp_path: Path) -> None:
    outcome = Rejection(round_of(made, tmp_path)).run()
    samples, rows = lines(tmp_path / SAMPLES), lines(tmp_path / ROWS)
    assert len(samples) == 20 and len(rows) == 19 and outcome.rows == 19
    for line, row in zip(samples[1:], rows, strict=True):
        scores = [answer["score"] for answer in line["answers"]]
        best = scores.index(max(scores))
        assert row["completion"] == line["answers"][best]["text"] and row["prompt"] == line["prompt"]
        lineage = row["lineage"]
        assert lineage["k"] == best and lineage["scores"] == scores and lineage["temperature"] == 1.0
        assert lineage["seed"] == line["answers"][best]["seed"] and lineage["model"].endswith("policy")
    means = [mean for mean, _ in outcome.best_of.values()]
    assert means == sorted(means) and len(means) == 4 and means[3] > means[0]
    assert outcome.mean == pytest.approx(means[0])
    assert json.loads((tmp_path / REPORT).read_text())["result"]["best_of"]["4"][0] == pytest.approx(means[3])
    assert (tmp_path / "best-of-n.svg").read_text().startswith("<svg")
    tokenizer = AutoTokenizer.from_pretrained(made / "policy")
    assert all(encode(row, tokenizer).input_ids for row in rows)  # as finetune sft takes them


@pytest.mark.parametrize("torn", [0, 7])
def test_a_round_that_ended_early_goes_on(
    made: Path, tmp_path: Path, torn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards_of_tests.calls", 0)
    Rejection(round_of(made, tmp_path / "whole")).run()
    with pytest.raises(InputError, match="out of luck"):
        Rejection(round_of(made, tmp_path / "broken", "breaks")).run()
    path = tmp_path / "broken" / SAMPLES
    data = path.read_bytes()
    assert data.count(b"\n") == 9  # the settings, and the eight prompts before the failure
    path.write_bytes(data + b'{"row": 8'[:torn])
    text = path.read_text().replace("rewards_of_tests:breaks", "rewards_of_tests:vowels")
    path.write_text(text)
    with pytest.raises(InputError, match="--resume"):
        Rejection(round_of(made, tmp_path / "broken"))
    Rejection(round_of(made, tmp_path / "broken"), resume=True).run()
    assert path.read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()
    rows = [lines(tmp_path / name / ROWS) for name in ("whole", "broken")]
    for row in (*rows[0], *rows[1]):
        row["lineage"].pop("round")
    assert rows[0] == rows[1]


def test_another_round_is_not_gone_on_with(made: Path, tmp_path: Path) -> None:
    Rejection(round_of(made, tmp_path)).run()
    with pytest.raises(InputError, match=r"differs in k, seed \(4, not 3\)"):
        Rejection(round_of(made, tmp_path, count=3, seed=7), resume=True).run()


def test_earlier_rounds_stand_for_election(made: Path, tmp_path: Path) -> None:
    first = Rejection(round_of(made, tmp_path / "first", seed=1)).run()
    second = Rejection(round_of(made, tmp_path / "second", seed=2, pool=(str(tmp_path / "first"),))).run()
    before, after = lines(tmp_path / "first" / ROWS), lines(tmp_path / "second" / ROWS)
    assert 0 < second.pooled < 19 and first.pooled == 0
    assert sum(row["lineage"]["round"] == "first" for row in after) == second.pooled
    for old, new in zip(before, after, strict=True):
        assert new["lineage"]["score"] >= old["lineage"]["score"]
        assert ("first_score" in new["lineage"]) == (new["lineage"]["round"] == "first")


def test_temperatures_are_compared(made: Path, tmp_path: Path) -> None:
    outcome = Rejection(round_of(made, tmp_path, temperatures=(0.5, 1.0, 1.5), sweep_prompts=6)).run()
    assert set(outcome.sweep) == {0.5, 1.0, 1.5}
    best = max(outcome.sweep, key=lambda t: outcome.sweep[t][4][0])
    assert outcome.temperature == best
    assert all(row["lineage"]["temperature"] == best for row in lines(tmp_path / ROWS))
    assert len(lines(tmp_path / "sweep.jsonl")) == 19


def test_unsafe_prompts_and_equal_answers_are_counted(made: Path, tmp_path: Path) -> None:
    safety = "rewards_of_tests:careful"
    outcome = Rejection(round_of(made, tmp_path / "gate", safety=safety)).run()
    assert outcome.rows + outcome.unsafe == 19
    assert all(row["lineage"]["parts"]["safety"] > -1.74 for row in lines(tmp_path / "gate" / ROWS))
    with pytest.raises(InputError, match="every best one is unsafe"):
        Rejection(round_of(made, tmp_path / "never", safety="rewards_of_tests:never")).run()
    equal = Rejection(round_of(made, tmp_path / "equal", "same")).run()
    assert equal.equal == 19 and equal.rows == 19
    assert all(row["lineage"]["k"] == 0 for row in lines(tmp_path / "equal" / ROWS))
    with pytest.raises(InputError, match="no prompt has an answer to keep"):
        Rejection(round_of(made, tmp_path / "dropped", "same", drop_equal=True)).run()


# -- reward models -----------------------------------------------------------------------------------------------


def reward_model(folder: Path, tokens: int = 260, labels: int = 1, tokenizer: bool = True) -> Path:
    torch.manual_seed(4)
    config = tiny_config(vocab_size=tokens, num_labels=labels, pad_token_id=0, bos_token_id=None, eos_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def test_a_reward_model_judges_the_row_as_it_was_trained_on(made: Path, tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "reward")
    Rejection(round_of(made, tmp_path / "out", rewards=(str(folder),))).run()
    model = LlamaForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = lines(tmp_path / "out" / ROWS)[3]
    ids = encode({"prompt": row["prompt"], "completion": row["completion"]}, tokenizer).input_ids
    with torch.no_grad():
        wanted = float(model(torch.tensor([ids]), torch.ones((1, len(ids)))).logits[0, 0])
    assert row["lineage"]["score"] == pytest.approx(wanted, abs=1e-4)


def test_wrong_reward_models_are_refused(made: Path, tmp_path: Path) -> None:
    other = reward_model(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"] = {token: (i + 3) % 260 for token, i in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="another vocabulary"):
        Rejection(round_of(made, tmp_path / "a", rewards=(str(other),))).run()
    two = reward_model(tmp_path / "two", labels=2)
    with pytest.raises(InputError, match="2 labels"):
        Rejection(round_of(made, tmp_path / "b", rewards=(str(two),))).run()
    with pytest.raises(InputError, match="head"):
        Rejection(round_of(made, tmp_path / "c", rewards=(str(made / "policy"),))).run()
    for name, said in (("nowhere:f", "cannot be imported"), ("rewards_of_tests:nothing", "no function")):
        with pytest.raises(InputError, match=said):
            Rejection(round_of(made, tmp_path / "d", rewards=(name,)), resume=True).run()
    with pytest.raises(InputError, match="gave no rewards"):
        Rejection(round_of(made, tmp_path / "e", rewards=("http://127.0.0.1:9",)), resume=True).run()


# -- the command -------------------------------------------------------------------------------------------------


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["align", "rejection", str(made / "policy"), str(made / "prompts.jsonl"), str(tmp_path / "out"), "--reward",
             "rewards_of_tests:vowels", "-k", "3", "--max-new-tokens", "6", "--quiet"]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "best of 3" in said and "finetune sft" in said
    assert main(words) == 2 and "--resume" in capsys.readouterr().err
    assert main([*words, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 19


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rejection", "a", "b"], "needs a policy, prompts and a new folder"),
        (["reject"], "rejection"),
        (["rejection", "a", "b", "c", "--reward", "x:y", "--temperature", "hot"], "--temperature is 'hot'"),
        (["rejection", "a", "b", "c"], "no reward"),
        (["rejection", "a", "b", "c", "--reward", "x:y", "--pool", "nowhere"], "has no rows.jsonl"),
    ],
)
def test_what_the_command_refuses(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", *words]) == 2
    assert said in capsys.readouterr().err
