"""`llama2 compare` on tiny checkpoints: a base beside others, the base file both ways, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("How far is a model from another one, and how sure is that? " * 4)
    return path


def rows(out: str) -> dict[tuple[str, str], float]:
    return {(row["model"], row["test"]): row["value"] for row in json.loads(out)["rows"]}


def test_other_settings_and_the_base_file(run: Run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    saved = tmp_path / "base.kld"
    words = ("compare", checkpoint, "kv-cache=int8", "--window", "32", "--json")
    code, out, err = run(*words, text, "--save", saved)
    assert code == 0, err
    found = rows(out)
    name = next(model for model, _ in found)
    assert name.endswith("kv-cache=int8") and 0 < found[name, "mean KL divergence"] < 0.5
    again = rows(run("compare", saved, f"{checkpoint},kv-cache=int8", "--json")[1])
    assert again[name, "mean KL divergence"] == pytest.approx(found[name, "mean KL divergence"], abs=1e-4)
    assert again[name, "perplexity"] == pytest.approx(found[name, "perplexity"], rel=1e-6)
    assert "exists" in run(*words, text, "--save", saved)[2]


def test_the_base_file_alone(run: Run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    code, out, _ = run("compare", checkpoint, text, "--save", tmp_path / "base.kld", "--window", "32", "--chunks", "2")
    assert code == 0 and not out and (tmp_path / "base.kld").stat().st_size > 1000


def test_table(run: Run, checkpoint: Path, text: Path) -> None:
    out = run("compare", checkpoint, "runner=torch", "precision=exact", text, "--window", "32")[1]
    assert out.startswith("| test | ") and "| perplexity ratio |" in out and out.splitlines()[0].count("|") == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "BASE OTHER TEXT"),
        (("M", "TEXT"), "BASE OTHER TEXT"),
        (("M", "gone.gguf", "TEXT"), "gone.gguf"),
        (("M", "kv-cache=int9", "TEXT"), "int8"),
        (("M", "M", "TEXT", "--window", "200"), "at least 400"),
        (("M", "M", "TEXT", "--window", "100"), "context of"),
        (("M", "M", "TEXT", "--chunks", "0"), "at least 1"),
        (("M", "M", "/nowhere.txt"), "nowhere.txt"),
        (("M", "M", "TEXT", "--json", "--md"), "give one"),
    ],
)
def test_wrong_inputs(run: Run, checkpoint: Path, text: Path, words: tuple[str, ...], said: str) -> None:
    known = {"M": checkpoint, "TEXT": text}
    code, out, err = run("compare", *(known.get(word, word) for word in words))
    assert code == 2 and said in err and not out, err


def test_sweep_and_standard_input(
    run: Run, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    swept = json.loads(run("perplexity", checkpoint, text, "--window", "16,32-64*2", "--json")[1])["rows"]
    tests = [row["test"] for row in swept if row["test"].startswith("perplexity")]
    assert tests == ["perplexity @ 16", "perplexity @ 32", "perplexity @ 64"]
    by_test = {row["test"]: row["value"] for row in swept}
    assert by_test["bits per byte @ 32"] == pytest.approx(
        by_test["nats per token @ 32"] / 0.6931472, rel=1e-6
    )  # bytewise
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(text.read_text()))
    assert f"perplexity {by_test['perplexity @ 32']:.4f}" in run("perplexity", checkpoint, "-", "--window", "32")[1]
