"""--dry-run and --samples-every: what two steps say of a run, and answers beside the losses."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Run, checkpoint, run  # noqa: F401  # fixtures

from llama2 import InputError, LoraConfig, TrainingArguments
from llama2.train.finetune import Finetune, Recipe
from llama2.train.rehearsal import Rehearsal, rehearse
from llama2.train.samples import FILE

WORDS = ("red", "blue", "green", "grey")
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": f"{w} sky"}]}
            for w in WORDS * 4],
    "dpo": [{"prompt": f"{w} ", "chosen": f"{w} sky", "rejected": f"{w} sea"} for w in WORDS * 4],
    "kto": [{"prompt": f"{w} {i} ", "completion": f"{w} sky", "label": i % 2 == 0} for i, w in enumerate(WORDS * 4)],
    "reward": [{"prompt": f"{w} ", "chosen": f"{w} sky", "rejected": f"{w} sea"} for w in WORDS * 4],
    "classify": [{"text": w, "label": w} for w in WORDS * 4],
    "pretrain": [{"text": f"{w} sky and sea"} for w in WORDS * 4],
}  # fmt: skip
QUICK = ("--max-length", "64", "--batch-size", "2", "--seed", "1")


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """The file of a task's rows."""

    def write(task: str) -> Path:
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
        return path

    return write


@pytest.mark.parametrize("task", ROWS)
def test_a_dry_run_of_every_task_writes_nothing(
    run: Run,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    data: Any,
    tmp_path: Path,
    task: str,
) -> None:
    out = tmp_path / "out"
    words = ("finetune", task, checkpoint, data(task), out, *QUICK, "--lora-r", "4", "--epochs", "3", "--dry-run")
    code, said, err = run(*words)
    assert code == 0, err
    assert not out.exists() and "16 rows" in err
    steps = 24 if task != "pretrain" else 3 * (16 // 2)
    if task != "pretrain":  # whose rows are packed
        assert said.startswith(f"{steps} steps, ")
    assert " tokens per second" in said and "memory: " in said and "files: the adapter " in said
    code, said, _ = run(*words, "--json")
    found = json.loads(said)
    assert found["hours"] > 0 and found["peak"] > 1 << 20 and found["free"] > 0


def test_the_estimate_is_that_of_the_run(checkpoint: Path, data: Any, tmp_path: Path) -> None:  # noqa: F811
    def job(out: str, **changes: Any) -> Finetune:
        recipe = Recipe(task="sft", model=str(checkpoint), data=str(data("sft")), output_dir=str(tmp_path / out),
                        max_length=64, lora=LoraConfig(r=4))  # fmt: skip
        return Finetune(recipe, TrainingArguments(output_dir=str(tmp_path / out), per_device_train_batch_size=3,
                                                  **changes))  # fmt: skip

    for changes in ({"num_train_epochs": 2}, {"max_steps": 5}, {"gradient_accumulation_steps": 2}):
        found, result = rehearse(job("a", **changes)), job(f"b{len(list(tmp_path.iterdir()))}", **changes).run()
        assert found.steps == result.steps
        assert found.hours * 3600 * found.tokens_per_second == pytest.approx(result.tokens, rel=0.2)
    adapter = next(tmp_path.glob("b*/adapter_model.safetensors")).stat().st_size
    assert found.files["the adapter"] == pytest.approx(adapter, abs=2048)  # the header


def test_too_little_is_said() -> None:
    plenty = Rehearsal(9, 100.0, 0.5, 1 << 20, 1 << 30, {"the model": 1 << 20}, 1 << 30)
    assert len(plenty.lines()) == 3 and "30.0 minutes" in plenty.lines()[0]
    tight = Rehearsal(9, 100.0, 2.0, 1 << 30, 1 << 30, {"the model": 1 << 30}, 1 << 20)
    assert "too little" in tight.lines()[3] and "the disk is too small" in tight.lines()[4]


@pytest.mark.parametrize("task", ["sft", "dpo", "kto"])
def test_answers_on_the_way_change_no_bit_and_resume(
    run: Run,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    data: Any,
    tmp_path: Path,
    task: str,
) -> None:
    words = ("finetune", task, checkpoint, data(task), *QUICK, "--lora-r", "4", "--max-steps", "8", "--save-steps", "3",
             "--keep", "9", "--learning-rate", "0.01", "--lora-dropout", "0.1")  # fmt: skip
    flags = ("--samples-every", "3")
    assert run(*words, "--output-dir", tmp_path / "plain")[0] == 0
    for name in "ab":
        code, _, err = run(*words, *flags, "--output-dir", tmp_path / name)
        assert code == 0, err
    assert "step 6: " in err and " -> " in err
    lines = [json.loads(line) for line in (tmp_path / "a" / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 4 + [3] * 4 + [6] * 4 + [8] * 4
    assert all(line["prompt"] and line["wanted"] for line in lines) and lines[0]["answer"] != lines[-1]["answer"]
    for path in (tmp_path / "b").glob("checkpoint-[68]"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    assert run(*words, *flags, "--output-dir", tmp_path / "b", "--resume")[0] == 0
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "a", "b")]
    assert adapters[0] == adapters[1] == adapters[2]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("reward", "samples_every needs a language model"),
        ("classify", "samples_every needs a language model"),
        ("pretrain", "samples_every needs rows with a prompt, and these have none"),
    ],
)
def test_where_there_is_nothing_to_answer(
    checkpoint: Path,  # noqa: F811
    data: Any,
    tmp_path: Path,
    task: str,
    said: str,
) -> None:
    recipe = Recipe(task=task, model=str(checkpoint), data=str(data(task)), output_dir=str(tmp_path / "out"),
                    max_length=64, samples_every=2)  # fmt: skip
    with pytest.raises(InputError, match=said):
        Finetune(recipe, TrainingArguments(output_dir=str(tmp_path / "out")))
