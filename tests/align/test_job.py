"""`llama2 align ppo|grpo|rloo`: from files to a folder, resumed runs, what is refused."""

import json
from pathlib import Path

import pytest
from align.policies import write_policy
from safetensors.torch import load_file

from llama2.cli import main

REWARD = """
def short(completions, **_):
    return [-len(text if isinstance(text, str) else text[0]["content"]) / 10 for text in completions]
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


@pytest.mark.parametrize("task", ["ppo", "rejection", "ghost", "distil", "measure"])
def test_wrong_rewards_are_refused_before_a_model_is_loaded(
    task: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward model of another vocabulary, and a function that is not there; the policy's weights are never read."""
    other, policy = tmp_path / "other", tmp_path / "policy"
    for folder in (other, policy):
        write_policy(folder, max_position_embeddings=512)
        (folder / "model.safetensors").unlink()
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"] = {token: (i + 3) % 260 for token, i in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    (other / "tokenizer.json").write_text(json.dumps(content))
    flag = "--safety-reward" if task == "distil" else "--reward"
    shared = ["align", task, str(policy), str(made / "prompts.jsonl"), str(tmp_path / "out"), "--max-new-tokens", "6"]
    for reward, said in ((str(other), "another vocabulary"), ("reward_of_jobs:long", "no function 'long'")):
        assert main([*shared, flag, reward, "--quiet"]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_a_dry_run_writes_nothing(method: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs two iterations, and tells the steps, memory, hours and files of the whole run."""
    out = tmp_path / "out"
    own = words(made, method, out, "--lora-r", "4", "--iterations", "7", "--dry-run")
    assert main(own) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert said.startswith("14 steps, ") and "the second of two iterations" in said
    assert "memory: " in said and "files: the adapter " in said and not out.exists()
    assert main([*own, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hours"] > 0 and found["tokens_per_second"] > 0 and found["peak"] > 1 << 20


@pytest.mark.parametrize("task", ["rejection", "ghost", "distil", "measure"])
def test_a_dry_run_of_a_job_that_writes_rows(
    task: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers the first prompts, and tells the hours of all, the sweep of temperatures among them."""
    write_policy(tmp_path / "policy", max_position_embeddings=512)
    own = ["align", task, str(tmp_path / "policy"), str(made / "prompts.jsonl"), str(tmp_path / "out"), "--quiet",
           "--safety-reward" if task == "distil" else "--reward", "reward_of_jobs:short", "--max-new-tokens", "6",
           "--dtype", "float32", "--device", "cpu", "-k", "2", "--dry-run"]  # fmt: skip
    more = ["--temperature", "0.8,1", "--sweep-prompts", "3"] if task == "rejection" else []
    assert main([*own, *more]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    count = 16 if task == "rejection" else 10
    assert said.startswith(f"{count} prompts, ") and "memory: " in said and not (tmp_path / "out").exists()
    assert main([*own, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hours"] == pytest.approx(10 / found["tried"] * found["seconds"] / 3600) and found["seconds"] > 0


def test_answers_on_the_way_and_every_completion(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is begun again writes neither the answers of a step nor those of an iteration twice."""
    more = ["--learning-rate", "1e-3", "--save-every", "1", "--samples-every", "1", "--log-completions"]
    whole = words(made, "grpo", tmp_path / "whole", *more)
    assert main(whole) == 0, capsys.readouterr().err
    parts = [word.replace("whole", "parts") for word in whole]
    first = [word if word != "2" or parts[i - 1] != "--iterations" else "1" for i, word in enumerate(parts)]
    assert main(first) == 0, capsys.readouterr().err
    with (tmp_path / "parts" / "completions.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "row": 0}) + "\n" + '{"step": 2, "ro')  # of an iteration that a kill cut off
    assert main([*parts, "--resume"]) == 0, capsys.readouterr().err
    found = {name: [json.loads(line) for line in (tmp_path / name / "completions.jsonl").read_text().splitlines()]
             for name in ("whole", "parts")}  # fmt: skip
    assert found["whole"] == found["parts"] and len(found["whole"]) == 16
    assert [line["step"] for line in found["whole"]] == [0] * 8 + [2] * 8
    for line in found["whole"]:
        assert line["prompt"].startswith("prompt ") and line["reward"] == -len(line["completion"]) / 10
        assert line["rewards"] == {"reward_of_jobs:short": line["reward"]}
    pairs = [found["whole"][i : i + 2] for i in range(0, 16, 2)]
    for one, two in pairs:
        assert (one["prompt"], one["k"], two["k"]) == (two["prompt"], 0, 1)
        assert one["advantage"] == pytest.approx(-two["advantage"], abs=1e-6)
        assert (one["advantage"] > two["advantage"]) == (one["reward"] > two["reward"])
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [step for step in (0, 2, 4) for _ in range(4)]
    assert all(line["prompt"].startswith("prompt ") and line["answer"] for line in samples)
    assert (tmp_path / "parts" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


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
