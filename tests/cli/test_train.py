"""train: a SageMaker job from its files, on a root of our own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Run

from llama2 import AutoModelForCausalLM
from llama2.train import finetune

WORDS = ("red", "blue", "green", "grey")
ROWS = [{"prompt": f"{word} ", "completion": "sky"} for word in WORDS * 3]
GIVEN: dict[str, Any] = {
    "task": "sft", "lora-r": "4", "max_steps": '"6"', "batch_size": "4", "max_length": "32", "learning_rate": "0.01",
    "quiet": "True", "packing": "false", "use_rslora": "False", "sagemaker_program": "train.py", "logging_steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with GPUs the command would become torchrun, in the place of the tests."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def fill(root: Path, checkpoint: Path, given: dict[str, Any], files: tuple[str, ...] = ("train/rows.jsonl",)) -> Path:
    config = root / "input" / "config"
    config.mkdir(parents=True)
    (config / "hyperparameters.json").write_text(json.dumps({"model": str(checkpoint), **given}))
    (config / "resourceconfig.json").write_text(json.dumps({"hosts": ["algo-1"], "current_host": "algo-1"}))
    for name in files:
        path = root / "input" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def test_a_job(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    root = fill(tmp_path / "ml", checkpoint, GIVEN, ("training/rows.jsonl", "validation/rows.jsonl"))
    code, out, err = run("train", "--root", root)
    assert code == 0, err
    assert "held out, loss: " in out and not (root / "output" / "failure").exists()
    assert json.loads((root / "model" / "adapter_config.json").read_text())["r"] == 4
    assert AutoModelForCausalLM.from_pretrained(root / "model").config.vocab_size == 260
    assert (root / "checkpoints" / "checkpoint-6").is_dir() and not list((root / "model").glob("checkpoint*"))
    # Started again, as after an interruption, it goes on from its checkpoint.
    assert run("train", "--root", root)[0] == 0
    steps = [json.loads(line)["step"] for line in (root / "checkpoints" / "log.jsonl").read_text().splitlines()]
    assert steps.count(6) == 2 and steps[-1] == 6  # the loss and the measurement, once


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": "true"}])
def test_the_merged_model_needs_no_other(run: Run, checkpoint: Path, tmp_path: Path, flags: dict[str, str]) -> None:
    root = fill(tmp_path / "ml", checkpoint, {**GIVEN, "merge": "true", **flags})
    code, _, err = run("train", "--root", root)
    assert code == 0, err
    config = json.loads((root / "model" / "config.json").read_text())
    assert "quantization_config" not in config and not (root / "model" / "adapter_config.json").exists()
    code, text, err = run("generate", "-m", root / "model", "-n", "4", "--greedy", "red ")
    assert code == 0 and text, err


@pytest.mark.parametrize(
    ("changes", "files", "said"),
    [
        ({"task": "sftt"}, ("train/a.jsonl",), "task is 'sftt'"),
        ({"lora_rank": "4"}, ("train/a.jsonl",), "does not know '--lora-rank=4'; did you mean"),
        ({"merge": "maybe"}, ("train/a.jsonl",), "merge is 'maybe'; it must be true or false"),
        ({"lora-r": "four"}, ("train/a.jsonl",), "'four' is not a whole number"),
        ({}, (), "has no channel train"),
        ({}, ("train/a.jsonl", "train/b.jsonl"), "there are 2: a.jsonl, b.jsonl; name one"),
        ({}, ("train/a.bin",), "there are 0: none"),
        ({"data_file": "c.jsonl"}, ("train/a.jsonl",), "c.jsonl does not exist"),
    ],
)
def test_failures_are_written_down(
    run: Run, checkpoint: Path, tmp_path: Path, changes: dict[str, str], files: tuple[str, ...], said: str
) -> None:
    root = fill(tmp_path / "ml", checkpoint, {**GIVEN, **changes}, files)
    code, _, err = run("train", "--root", root)
    assert code == 2 and said in err
    assert said in (root / "output" / "failure").read_text()


def test_other_failures(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("train", "--root", tmp_path / "none")
    assert code == 2 and "is this a SageMaker container (--root)?" in err
    root = fill(tmp_path / "ml", checkpoint, GIVEN)
    (root / "input" / "config" / "resourceconfig.json").unlink()
    # A model that is lost after the training is a failure, not a success.
    monkeypatch.setattr(finetune.Finetune, "_write", lambda self, model: None)
    code, _, err = run("train", "--root", root)
    assert code == 2 and "does not hold the model" in (root / "output" / "failure").read_text()
    monkeypatch.setattr(finetune.Finetune, "run", lambda self, report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("train", "--root", root)
    assert (root / "output" / "failure").read_text() == "ZeroDivisionError: division by zero"


def test_several_machines_and_gpus(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words) or 1 / 0)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    root = fill(tmp_path / "ml", checkpoint, {**GIVEN, "fsdp": "full_shard"})
    resources = root / "input" / "config" / "resourceconfig.json"
    resources.write_text(json.dumps({"hosts": ["algo-1", "algo-2"], "current_host": "algo-2"}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ZeroDivisionError):
        run("train", "--root", root)
    assert started[0][1:] == [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=algo-1",
        "--master-port=7777", "-m", "llama2", "train", "--root", str(root),
    ]  # fmt: skip
    monkeypatch.setenv("RANK", "5")  # a process that torchrun has started does not start it again
    assert "fsdp is 'full_shard' on 2 machines, whose checkpoints need a folder" in run("train", "--root", root)[2]
    monkeypatch.delenv("RANK")
    resources.write_text(json.dumps({"hosts": ["algo-1", "algo-2"], "current_host": "algo-3"}))
    assert "'algo-3' is not among the job's hosts algo-1, algo-2" in run("train", "--root", root)[2]
    resources.write_text(json.dumps({"hosts": ["algo-1"], "current_host": "algo-1"}))
    with pytest.raises(ZeroDivisionError):
        run("train", "--root", root)
    assert {"--nnodes=1", "--nproc-per-node=4", "--standalone", "--max-restarts=3"} < {*started[1]}
