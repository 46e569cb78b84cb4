"""The table of commands: help without torch, exit codes, one paragraph for every error."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama2
from llama2 import cli
from llama2.errors import CheckpointError, InputError

Run = Callable[..., tuple[int, str, str]]


def test_overview_lists_every_command(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for name, (_, text) in cli.COMMANDS.items():
        assert f"  {name}" in out and text in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"llama2 {llama2.__version__}\n", "")


def test_no_command_is_a_mistake(run: Run) -> None:
    assert run()[0] == 2


def test_unknown_command(run: Run) -> None:
    code, out, err = run("generat")
    assert (code, out) == (2, "")
    assert err == "llama2: 'generat' is not a command; did you mean generate?\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(run: Run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0 and out.startswith(f"usage: llama2 {name}")


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids="-".join)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    heavy = ("torch", "numpy", "rich", "jinja2", "tokenizers", "sentencepiece", "huggingface_hub", "safetensors")
    code = f"import sys; from llama2.cli import main; main({argv!r}); print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_path())
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_help_is_instant() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llama2.cli", "generate", "--help"], capture_output=True, env=_path())
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.15


def _path() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(llama2.__file__).parent.parent), "PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("first\n  second"), 2, "llama2: first second\n"),
        (CheckpointError("no such thing"), 2, "llama2: no such thing\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "llama2: x.txt: No such file or directory\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_errors_become_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, run: Run, error: BaseException, code: int, said: str
) -> None:
    _fail_with(monkeypatch, error)
    assert run("info") == (code, "", said)


def test_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    _fail_with(monkeypatch, InputError("first"))
    assert "Traceback" not in run("info")[2]
    code, _, err = run("info", "--debug")
    assert code == 2 and err.startswith("Traceback") and err.endswith("llama2: first\n")


def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    _fail_with(monkeypatch, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        run("info")


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr("llama2.cli.info.run", fail)


def test_a_closed_pipe_is_quiet(checkpoint: Path) -> None:
    command = f"{sys.executable} -m llama2.cli tokenize -m {checkpoint} {'word ' * 3000} | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=_path())
    assert (done.returncode, done.stderr) == (cli.BROKEN_PIPE, "")


def test_library_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    import warnings

    def warn(options: Any) -> int:
        warnings.simplefilter("always")
        warnings.warn("look\n out", stacklevel=1)
        return 0

    monkeypatch.setattr("llama2.cli.info.run", warn)
    assert run("info") == (0, "", "llama2: warning: look out\n")
