"""Recipes in files: YAML, JSON, and the finetune.json that a run has written; flags beside them win."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Run

from llama2 import InputError
from llama2.cli.args import parse
from llama2.cli.finetune import TASKS, arguments, recipe_of, words

pytest.importorskip("yaml", reason="comes with huggingface_hub")

YAML = """
task: dpo
model: base
data: pairs.jsonl
output_dir: out
lora_r: 8
learning_rate: 2e-4
num_train_epochs: 2
per-device-train-batch-size: 3
bf16: true
beta: 0.3
columns: {prompt: question}
adam_beta2: 0.95
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are folders here: what is none is a hub id, and is asked for whether it is an adapter."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        (tmp_path / name).mkdir()


def options(*given: str) -> Any:
    task, *rest = words(given)
    return parse(TASKS[task], "llama2 finetune", rest)


def test_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(YAML)
    found = options("--config", str(tmp_path / "a.yaml"))
    recipe, args = recipe_of(found), arguments(found)
    assert (recipe.task, recipe.model, recipe.data, recipe.output_dir) == ("dpo", "base", "pairs.jsonl", "out")
    assert recipe.lora is not None and recipe.lora.r == 8 and recipe.beta == 0.3 and recipe.dtype == "bfloat16"
    assert recipe.columns == {"prompt": "question"}
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (2e-4, 2, 3)
    assert args.adam_beta2 == 0.95


def test_flags_and_paths_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(YAML)
    file = str(tmp_path / "a.yaml")
    found = options("dpo", "other", f"--config={file}", "--lora-r", "2", "--no-bf16", "--beta", "0.5")
    recipe = recipe_of(found)
    assert (recipe.model, recipe.data, recipe.output_dir) == ("other", "pairs.jsonl", "out")
    assert recipe.lora is not None and recipe.lora.r == 2 and recipe.beta == 0.5 and recipe.dtype == "auto"
    moved = recipe_of(options("--config", file, "--output-dir", "elsewhere"))
    assert (moved.data, moved.output_dir) == ("pairs.jsonl", "elsewhere")
    assert words(["sft", "a", "b", "c"]) == ["sft", "a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lora_rank: 8", "does not know '--lora-rank=8'; did you mean --lora-r"),
        ("- 1", "is no object of names and values"),
        ("a: [", "is not YAML"),
        ("task: chat", "task is 'chat'; it must be one of sft"),
        ("bf16: 7", "bf16 is 7; it must be true or false"),
        ("lora: {r: 8, bias: all}", "the adapter has bias 'all', which no flag says"),
    ],
)
def test_what_a_file_cannot_say(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(InputError, match=said):
        options("--config", str(tmp_path / "a.yaml"))
    with pytest.raises(InputError, match="does not exist; --config takes"):
        options("--config", str(tmp_path / "b.yaml"))


def test_the_finetune_json_of_a_run_makes_the_same_run(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]} for w in "abcdefgh"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--max-length", "64", "--max-steps", "3", "--batch-size", "2", "--lora-r", "2", "--lora-dropout", "0.1",
             "--eval-split", "0.25", "--set", "adam_beta2=0.9", "--learning-rate", "0.01")  # fmt: skip
    code, _, err = run("finetune", "sft", checkpoint, data, tmp_path / "one", *flags)
    assert code == 0, err
    code, _, err = run("finetune", "--config", tmp_path / "one" / "finetune.json", "--output-dir", tmp_path / "two")
    assert code == 0, err
    files = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("one", "two")]
    assert files[0] == files[1]
    code, _, err = run("finetune", "sft", checkpoint, data, tmp_path / "three", "--set", "adam_beta3=1")
    assert code == 2 and "give a field of TrainingArguments" in err
