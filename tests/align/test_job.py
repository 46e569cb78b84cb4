"""`llama2 align ppo|grpo|rloo`: from files to a folder, resumed runs, what is refused."""

import json
from pathlib import Path

import pytest
from align.policies import write_policy
from safetensors.torch import load_file

from llama2.cli import main

REWARD = """
def short(completions, **_):
    return [-len(text) / 10 for text in completions]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_policy(folder / "policy")
    rows = [{"prompt": f"prompt {i}"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward_of_jobs.py").write_text(REWARD)
    return folder


def words(made: Path, method: str, out: Path, *more: str) -> list[str]:
    return ["align", method, str(made / "policy"), str(made / "prompts.jsonl"), str(out), "--reward",
            "reward_of_jobs:short", "--max-new-tokens", "6", "--prompts", "4", "-k", "2", "--mini-batches", "2",
            "--iterations", "2", "--quiet", "--device", "cpu", "--dtype", "float32", *more]  # fmt: skip


@pytest.fixture(autouse=True)
def importable(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(made))


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_a_policy_is_trained_and_written(
    method: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--lora-r", "4", "--eval-split", "0.2", "--eval-every", "1", "--learning-rate", "1e-3"]
    assert main(words(made, method, tmp_path / "out", *more)) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "held out, reward:" in said and "4 steps" in said
    assert {"adapter_model.safetensors", "log.jsonl", "reward.svg", "align.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("critic" in name for name in held) and any(bool(t.any()) for n, t in held.items() if "lora_B" in n)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    told = next(entry for entry in log if "reward" in entry)
    assert {"reward", "entropy", "clip_fraction", "completions/mean_length", "tokens_per_second/sampling",
            "tokens_per_second/scoring", "tokens_per_second/training"} <= set(told)  # fmt: skip
    assert ("explained_variance" in told) == (method == "ppo")
    words_again = ["generate", "-m", str(made / "policy"), "--adapter", str(tmp_path / "out"), "x", "-n", "2"]
    assert main(words_again) == 0, capsys.readouterr().err


def test_all_weights_and_a_second_start(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = words(made, "ppo", tmp_path / "whole", "--learning-rate", "1e-3", "--save-every", "1")
    assert main(own) == 0, capsys.readouterr().err
    assert main(own) == 2 and "--resume" in capsys.readouterr().err
    shorter = [word if word != "2" or own[i - 1] != "--iterations" else "1" for i, word in enumerate(own)]
    first = [word.replace("whole", "parts") for word in shorter]
    assert main(first) == 0, capsys.readouterr().err
    again = [word.replace("whole", "parts") for word in own]
    assert main([*again, "--resume"]) == 0, capsys.readouterr().err
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--mini-batches", "3"], "--mini-batches 3"),
        (["--early-stop", "2"], "--early-stop needs prompts"),
        (["--set", "gamma=2"], "gamma is 2"),
        (["--set", "nothing=2"], "--set is"),
        (["--max-new-tokens", "64"], "prompt of row 0"),
    ],
)
def test_what_is_refused(
    more: list[str], said: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(made, "ppo", tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
