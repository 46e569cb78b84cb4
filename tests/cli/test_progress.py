"""Progress where standard error is no terminal: a line every few seconds, and none of short work."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Run

from llama2.checkpoint import convert as engine
from llama2.cli import loading, progress

FAST = 0.01
Lines = Callable[[], None]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Lines come soon. The result waits until one has come that was begun after the call."""
    written = threading.Semaphore(0)

    def write(*words: Any, **options: Any) -> None:
        print(*words, **options)
        written.release()

    def wait() -> None:
        while written.acquire(blocking=False):
            pass
        for _ in range(2):  # the first may have been begun before
            assert written.acquire(timeout=120)

    monkeypatch.setattr(progress, "INTERVAL", FAST)
    monkeypatch.setattr(progress, "print", write, raising=False)
    return wait


def test_lines_of_bytes_and_layers(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Meter("converting") as told:
        told(1.5e9, 3e9, "model.norm.weight")
        lines()
    err = capsys.readouterr().err
    pattern = r"^llama2: converting: 1\.50 of 3\.00 GB \(50 %\), model\.norm\.weight, \d+ s so far$"
    assert re.search(pattern, err, re.M), err
    assert err.count("\n") >= 2
    with progress.LayerBar("quantising") as layers:
        layers(3.5, 32, "layer 3")
        lines()
    assert "llama2: quantising: 3.5 of 32 layers, layer 3, " in capsys.readouterr().err


def test_what_cannot_say_how_far_it_is(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Waiting("loading who/tiny"):
        lines()
    assert re.match(r"llama2: loading who/tiny: \d+ s so far\n", capsys.readouterr().err)
    time.sleep(5 * FAST)
    assert capsys.readouterr().err == ""  # nothing after the end
    with progress.StepMeter("sft", 1) as steps:
        lines()
        steps({"step": 1, "steps": 2, "loss": 1.0, "tokens_per_second": 5.0})
        time.sleep(5 * FAST)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("llama2: sft: loading: ") and said[-1].startswith("step 1 of 2: loss 1.0000")


def test_short_and_quiet_work_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress.Meter("converting") as told:
        told(1, 2, "x")
    monkeypatch.setattr(progress, "INTERVAL", FAST)
    with progress.Meter("converting", quiet=True) as told:
        told(1, 2, "x")
        time.sleep(3 * FAST)
    assert capsys.readouterr().err == ""


def test_commands_that_take_long(
    lines: Lines, run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversion (one slow tensor is enough) and loading."""
    write, model = engine.HfTarget.write, loading.load_model

    def slow(self: Any, name: str, *args: Any) -> None:
        if name.endswith("embed_tokens.weight"):
            lines()
        write(self, name, *args)

    def slow_model(*args: Any) -> Any:
        lines()
        return model(*args)

    monkeypatch.setattr(engine.HfTarget, "write", slow)
    code, _, err = run("convert", checkpoint, tmp_path / "out")
    assert code == 0 and "llama2: converting: 0.00 of 0.00 GB" in err and "model.embed_tokens.weight" in err
    monkeypatch.setattr(loading, "load_model", slow_model)
    code, _, err = run("generate", "-m", checkpoint, "Hi", "--max-new-tokens", "1", "--runner", "torch")
    assert code == 0 and f"llama2: loading {checkpoint}: " in err and " s so far" in err


def test_the_thread_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress.Waiting("loading"):
        torch.zeros(1).item() / 0
    assert "so far" not in capsys.readouterr().err
