"""`llama2 align measure`: rewards with errors over prompts, wins and the KL against another model, resuming."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from align.policies import write_policy

from llama2 import AutoModelForCausalLM, InputError
from llama2.align.measure import Measurement, MeasurePlan, mean_error
from llama2.align.synthesis import REPORT, ROWS, SAMPLES
from llama2.cli import main

REWARDS = """
def length(completions, **_):
    return [float(len(text)) for text in completions]

def some(prompts, completions, **_):
    return [None if prompt == "prompt 0" else 1.0 for prompt in prompts]

def none(completions, **_):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, another one whose weights differ a little, prompts and rewards."""
    folder = tmp_path_factory.mktemp("made")
    write_policy(folder / "policy")
    write_policy(folder / "other")
    model = AutoModelForCausalLM.from_pretrained(folder / "other")
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight), alpha=0.02)
    model.save_pretrained(folder / "other")
    write_policy(folder / "strange", vocab_size=300)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(6)))
    (folder / "rewards_of_measuring.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def importable(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(made))


def plan_of(made: Path, out: Path, **changes: Any) -> MeasurePlan:
    settings: dict[str, Any] = {"count": 3, "max_new_tokens": 6, "dtype": "float32", "device": "cpu",
                                "rewards": ("rewards_of_measuring:length",)}  # fmt: skip
    return MeasurePlan(policy=str(made / "policy"), prompts=str(made / "prompts.jsonl"), output_dir=str(out),
                       **{**settings, **changes})  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_have_errors_over_prompts() -> None:
    found = mean_error([[1.0, 3.0], [None, 5.0], [None]])
    assert found == {"mean": 3.5, "error": pytest.approx(math.sqrt(4.5 / 2))}
    with pytest.raises(InputError, match="no answer has a reward"):
        mean_error([[None]])


def test_a_model_beside_itself(made: Path, tmp_path: Path) -> None:
    """Half of the wins, and a KL of nought, of every answer."""
    outcome = Measurement(plan_of(made, tmp_path / "out", against=str(made / "policy"))).run()
    found = outcome.values["rewards"]["rewards_of_measuring:length"]
    assert found["wins"] == {"mean": 0.5, "error": 0.0} and outcome.values["kl"] == {"mean": 0.0, "error": 0.0}
    samples, rows = lines(tmp_path / "out" / SAMPLES)[1:], lines(tmp_path / "out" / ROWS)
    assert len(samples) == 6 and outcome.rows == len(rows) == 18
    told = [[len(a["text"]) for a in line["answers"]] for line in samples]
    assert found["mean"] == pytest.approx(mean_error(told)["mean"], abs=0.5)  # a text's ends are stripped in the file
    assert json.loads((tmp_path / "out" / REPORT).read_text())["kl"]["mean"] == 0.0


def test_another_model(made: Path, tmp_path: Path) -> None:
    """The KL is that of the two models' own log-probabilities, at the temperature of sampling."""
    plan = plan_of(made, tmp_path / "out", against=str(made / "other"), temperature=0.8, count=40)
    outcome = Measurement(plan).run()
    kl = outcome.values["kl"]
    assert kl["mean"] > 3 * kl["error"] > 0
    models = [AutoModelForCausalLM.from_pretrained(made / name) for name in ("policy", "other")]
    job = Measurement(plan, resume=True)
    ids = job.asked[0].ids
    with torch.no_grad():  # of the first token exactly, which is a part of the whole
        one, two = (torch.log_softmax(m(torch.tensor([ids])).logits[0, -1].double() / 0.8, -1) for m in models)
    first = float((one.exp() * (one - two)).sum())
    assert 0 < first < kl["mean"] + 3 * kl["error"]
    wins = outcome.values["rewards"]["rewards_of_measuring:length"]["wins"]
    assert 0 < wins["mean"] < 1 and wins["error"] > 0


def test_a_run_goes_on_behind_its_last_line(made: Path, tmp_path: Path) -> None:
    whole = plan_of(made, tmp_path / "whole", against=str(made / "other"))
    Measurement(whole).run()
    held = (tmp_path / "whole" / SAMPLES).read_bytes()
    part = tmp_path / "part"
    part.mkdir()
    (part / SAMPLES).write_bytes(held[: len(held) // 2])
    Measurement(plan_of(made, part, against=str(made / "other")), resume=True).run()
    assert (part / ROWS).read_bytes() == (tmp_path / "whole" / ROWS).read_bytes()
    assert lines(part / SAMPLES) == lines(tmp_path / "whole" / SAMPLES)


def test_an_answer_without_a_reward_does_not_count(made: Path, tmp_path: Path) -> None:
    rewards = ("rewards_of_measuring:some", "rewards_of_measuring:length")
    found = Measurement(plan_of(made, tmp_path, rewards=rewards)).run().values["rewards"]
    assert found["rewards_of_measuring:some"] == {"mean": 1.0, "error": 0.0}
    assert "wins" not in found["rewards_of_measuring:length"]


def test_what_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no reward; give one"):
        plan_of(made, tmp_path, rewards=())
    with pytest.raises(InputError, match="a reward is given twice"):
        plan_of(made, tmp_path, rewards=("a:b", "a:b"))
    with pytest.raises(InputError, match="no answer has a reward"):
        Measurement(plan_of(made, tmp_path / "a", rewards=("rewards_of_measuring:none",))).run()
    with pytest.raises(InputError, match="has 300 tokens and .* 260; compare models of one vocabulary"):
        Measurement(plan_of(made, tmp_path / "b", against=str(made / "strange"))).run()
    (tmp_path / "rows.jsonl").write_text('{"text": "no prompt"}\n')
    with pytest.raises(InputError, match=r"row 0 of .*rows\.jsonl: a row with the keys \['text'\] has no prompt"):
        Measurement(MeasurePlan(**{**vars(plan_of(made, tmp_path / "c")), "prompts": str(tmp_path / "rows.jsonl")}))


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["align", "measure", str(made / "policy"), str(made / "prompts.jsonl"), str(tmp_path / "out"), "--reward",
             "rewards_of_measuring:length", "--against", str(made / "other"), "-k", "2", "--max-new-tokens", "4",
             "--device", "cpu"]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "12 answers to 6 prompts" in said and "wins" in said and "KL to" in said and "finetune sft" not in said
    assert main([*words, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == 12
