"""finetune on a tiny checkpoint: every task learns, its result loads, a stopped run goes on, mistakes are told."""

import errno
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Run

from llama2 import AutoModelForCausalLM, AutoTokenizer, InputError, LoraConfig, TrainingArguments
from llama2.cli.finetune import before_torch
from llama2.cli.progress import StepMeter
from llama2.train import checkpoint_state, checkpoints
from llama2.train.finetune import Finetune, Recipe

QUICK = ("--max-length", "64", "--max-steps", "12", "--batch-size", "4", "--learning-rate", "0.005", "--seed", "1")
WORDS = ("red", "blue", "green", "grey")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learnt(out: Path) -> bool:
    """Whether the loss of a run that logged every step fell by a fifth: single steps are noise, thirds of it are not.

    Measured over these rows: to 0.48 to 0.70 of the first third's, alike on every instruction set.
    """
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    third = len(losses) // 3
    assert third >= 4
    return sum(losses[-third:]) < 0.8 * sum(losses[:third])


def test_threads_wait_asleep_unless_it_is_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, wanted in (({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
        environment = dict(given)
        monkeypatch.setattr("os.environ", environment)
        before_torch()
        assert environment.get("GOMP_SPINCOUNT") == wanted and environment["LRU_CACHE_CAPACITY"] == "128"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word} sky"}]}
        for word in WORDS * 4
    ]
    return write(tmp_path / "chats.jsonl", [*rows, {"messages": [{"role": "user", "content": "no answer"}]}])


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [{"review": f"{word} {i}", "kind": "warm" if word == "red" else "cold"} for i in range(6) for word in WORDS]
    return write(tmp_path / "labelled.jsonl", rows)


def test_an_adapter_for_chats(run: Run, checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("finetune", "sft", checkpoint, chats, out, *QUICK, "--lora-r", "4", "--eval-split", "0.25")
    code, said, err = run(*words)
    assert code == 0, err
    assert "1 rows left out, it has no target: rows" in err and "step 0: held out, loss" in err
    assert f"llama2 chat -m {checkpoint} --adapter {out}" in said and "held out, loss: " in said
    content = json.loads((out / "finetune.json").read_text())
    assert content["result"]["after"]["eval_loss"] < content["result"]["before"]["eval_loss"] - 0.5
    assert (out / "loss.svg").read_text().count("<polyline") == 2
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps[0] == 0 and steps[-1] == 12
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 8 and "up_proj" in settings["target_modules"]
    assert settings["base_model_name_or_path"] == str(checkpoint)
    plain = run("generate", "-m", checkpoint, "-n", "8", "--greedy", "--chat", "red")[1]
    tuned = run("generate", "-m", checkpoint, "--adapter", out, "-n", "8", "--greedy", "--chat", "red")[1]
    assert tuned != plain
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "red"}], add_generation_prompt=True)
    new = model.generate(torch.tensor([ids]), max_new_tokens=8, runner="torch")[0, len(ids) :]
    assert tokenizer.decode(new, skip_special_tokens=True) + "\n" == tuned
    code, _, err = run(*words)
    assert code == 2 and "holds checkpoint-12 of an earlier run; go on from it (--resume" in err


@pytest.mark.parametrize(
    "flags",
    [("--use-dora",), ("--load-in-4bit",), ("--load-in-8bit",), ("--use-rslora", "--bf16", "--lora-alpha", "4")],
)
def test_kinds_of_adapters(run: Run, checkpoint: Path, chats: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    words = ("finetune", "sft", checkpoint, chats, tmp_path / "out", *QUICK, "--logging-steps", "1", *flags)
    code, _, err = run(*words)
    assert code == 0, err
    assert learnt(tmp_path / "out")
    words = ("generate", "-m", checkpoint, "-n", "8", "--greedy", "--chat", "red")
    code, tuned, err = run(*words, "--adapter", tmp_path / "out")
    assert code == 0, err
    assert tuned != run(*words)[1]
    assert ("merged into the weights" in err) == ("--use-dora" in flags)


def test_all_weights(run: Run, checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, err = run("finetune", "sft", checkpoint, chats, "--output-dir", out, *QUICK, "--packing")
    assert code == 0, err
    assert f"llama2 chat -m {out}" in said and "--adapter" not in said
    code, text, err = run("generate", "-m", out, "-n", "8", "--greedy", "--chat", "blue")
    assert code == 0 and text, err
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (checkpoint, out))
    assert all(not torch.equal(before[name], after[name]) for name in before if "embed" not in name)


@pytest.mark.parametrize("flags", [("--lora-r", "4"), ("--lora-r", "4", "--reference-free"), ("--loss-type", "ipo")])
def test_preferences(run: Run, checkpoint: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    rows = [{"prompt": f"{word} ", "chosen": f"{word} sky", "rejected": f"{word} sea"} for word in WORDS * 4]
    data = write(tmp_path / "pairs.jsonl", rows)
    words = ("finetune", "dpo", checkpoint, data, tmp_path / "out", *QUICK, "--eval-split", "0.25", "--json", *flags)
    code, said, err = run(*words)
    assert code == 0, err
    result = json.loads(said)
    assert result["after"]["eval_rewards/margins"] > result["before"]["eval_rewards/margins"]
    assert result["after"]["eval_rewards/accuracies"] == 1.0


def test_text_from_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join("the sky is blue and the sea is green, " * 6 for _ in range(8)))
    code, _, err = run(
        "finetune",
        "pretrain",
        checkpoint,
        tmp_path / "text.txt",
        tmp_path / "out",
        "--fresh",
        *QUICK,
        "--logging-steps",
        "1",
    )
    assert code == 0, err
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert logged[0]["loss"] > 5 and learnt(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert content["data"]["tokens"] == 8 * (
        len("the sky is blue and the sea is green, ") * 6 - 1 + 1
    )  # and no end is cut


# -- interruption ------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_the_same_command_goes_on(
    run: Run, checkpoint: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(out: str) -> list[str]:
        flags = [*QUICK, "--lora-r", "4", "--logging-steps", "1", "--output-dir", str(tmp_path / out)]
        return ["finetune", "sft", str(checkpoint), str(chats), *flags]

    told = StepMeter.__call__

    def interrupted(steps: StepMeter, entry: dict[str, Any]) -> None:
        told(steps, entry)
        if entry["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StepMeter, "__call__", interrupted)
        patch.setattr(sys, "argv", ["llama2", *words("cut")])
        code, _, err = run(*words("cut"))
    assert code == 130 and "stopped at step 3 of 12, which is saved; go on with\n  llama2 finetune sft" in err
    again = err.splitlines()[-1].split()
    assert again == ["llama2", *words("cut"), "--resume"]
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path / "cut")] == [3]
    assert not (tmp_path / "cut" / "adapter_config.json").exists()
    for command in (again[1:], words("straight")):
        code, _, err = run(*command)
        assert code == 0, err
    files = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("cut", "straight")]
    assert files[0] == files[1]
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        for out in ("cut", "straight")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 12


def test_a_full_disk_keeps_what_was_saved(checkpoint: Path, chats: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, written = tmp_path / "out", checkpoint_state.write_safetensors

    def fails(file: Any, tensors: Any) -> None:
        if len(checkpoints.found(out)) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(file, tensors)

    monkeypatch.setattr(checkpoint_state, "write_safetensors", fails)
    recipe = Recipe(
        task="sft", model=str(checkpoint), data=str(chats), output_dir=str(out), max_length=64, lora=LoraConfig()
    )
    args = TrainingArguments(output_dir=str(out), max_steps=6, save_steps=2)
    with pytest.raises(InputError, match="is full, so nothing could be saved; checkpoint-4 is kept: make room and go"):
        Finetune(recipe, args).run()
    assert [p.name for p in checkpoints.found(out)] == ["checkpoint-2", "checkpoint-4"]
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    monkeypatch.undo()
    args.resume_from_checkpoint = True
    assert Finetune(recipe, args).run().finished


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune"], "finetune needs one of sft, dpo, "),
        (["finetune", "sff", "a", "b", "c"], "not 'sff'; did you mean sft?"),
        (["finetune", "sft", "MODEL"], "needs a model, its rows and a new folder (or --output-dir), but 1 paths"),
        (["finetune", "sft", "MODEL", "DATA", "OUT", "--max-length", "4096"], "beyond the model's context of 96"),
        (["finetune", "sft", "MODEL", "EMPTY", "OUT"], "holds no rows"),
        (["finetune", "sft", "MODEL", "gone.jsonl", "OUT"], "gone.jsonl does not exist"),
        (["finetune", "dpo", "MODEL", "DATA", "OUT", "--max-length", "64"], "no row of"),
        (["finetune", "sft", "MODEL", "DATA", "OUT", "--max-length", "4"], "no target is left within the longest"),
        (["finetune", "pretrain", "MODEL", "DATA", "OUT", "--max-length", "64"], "takes rows with a text, not"),
        (["finetune", "classify", "MODEL", "DATA", "OUT", "--max-length", "64", "--text-column", "mesages"],
         "there is no column 'mesages'; there are messages; did you mean messages?"),
        (["finetune", "sft", "MODEL", "DATA", "OUT", "--load-in-4bit", "--load-in-8bit", "--max-length", "64"],
         "set one of them"),
        (["finetune", "sft", "MODEL", "DATA", "OUT", "--target-modules", "qproj", "--max-length", "64"],
         "target_modules ('qproj',) name none of"),
        (["finetune", "pretrain", "MODEL", "DATA", "OUT", "--fresh", "--lora-r", "4"], "fresh weights are for"),
        (["finetune", "sft", "MODEL", "DATA", "OUT", "--merge"], "merge is for an adapter"),
        (["finetune", "sft", "MODEL", "DATA", "OUT", "--lora-r", "4", "--fp16"], "fp16 needs a CUDA device"),
        (["finetune", "sft", "ADAPTER", "DATA", "OUT"], "is an adapter; put it into its model first"),
        (["finetune", "sft", "MODEL", "DATA", "DATA"], "is a file; give the path of a folder"),
        (["finetune", "sft", "MODEL", "DATA", "MODEL"], "is the model itself, which would be overwritten"),
        (["finetune", "sft", "MODEL", "DATA", "MODEL", "--resume"], "is the model itself, which would be overwritten"),
        (["finetune", "sft", "MODEL", "DATA", "ADAPTER"], "holds adapter_config.json already"),
    ],
)  # fmt: skip
def test_mistakes(run: Run, checkpoint: Path, chats: Path, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    names = {"MODEL": checkpoint, "DATA": chats, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty.jsonl"}
    names["ADAPTER"] = tmp_path / "adapter"
    code, _, err = run(*(names.get(word, word) for word in words))
    assert code == 2 and said in err, err


def test_help_lists_tasks_and_flags(run: Run) -> None:
    code, out, _ = run("finetune", "--help")
    assert code == 0 and all(f"  {task}" in out for task in ("sft", "dpo", "classify", "pretrain"))
    code, out, _ = run("finetune", "dpo", "--help")
    assert code == 0 and "--beta" in out and "--lora-r" in out and "--label-column" not in out


def test_a_name_of_ones_own_is_a_model(
    run: Run, checkpoint: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names that `llama2 list` shows, in the place of a path or a hub id."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "llama2").mkdir()
    (tmp_path / "llama2" / "models.toml").write_text(f'mine = "{checkpoint}"\n')
    code, _, err = run("finetune", "sft", "mine", chats, tmp_path / "out", *QUICK, "--lora-r", "4", "--dry-run")
    assert code == 0, err


def test_columns_under_other_names(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{w} ", "response_j": "sky", "response_k": "sea", "id": i} for i, w in enumerate(WORDS * 2)]
    data = write(tmp_path / "pairs.jsonl", rows)
    words = ("finetune", "dpo", checkpoint, data, tmp_path / "out", *QUICK, "--max-steps", "1", "--lora-r", "2")
    names = "prompt=question,chosen=response_j,rejected=response_k"
    code, _, err = run(*words, "--columns", names)
    assert code == 0, err
    assert "8 rows (8 preference)" in err and "columns that are not used: id (8 rows)" in err
    content = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert content["recipe"]["columns"] == dict(part.split("=") for part in names.split(","))
    for wrong, said in (("prompt", "give pairs such as"), ("prompt=quest", "did you mean question?")):
        code, _, err = run(*words[:4], tmp_path / "other", "--max-length", "64", "--columns", wrong)
        assert code == 2 and said in err, err
