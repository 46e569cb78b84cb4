"""`llama2 embed`: the hidden states of the network, in every format, on both engines."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2 import AutoModelForCausalLM, AutoTokenizer

Run = Callable[..., tuple[int, str, str]]
TEXTS = ("One text.", "Another one that is longer than the first.")


def expected(checkpoint: Path, pooling: str) -> np.ndarray:
    model, tokenizer = (cls.from_pretrained(checkpoint) for cls in (AutoModelForCausalLM, AutoTokenizer))
    with torch.no_grad():
        states = [model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    return np.stack([(s.mean(0) if pooling == "mean" else s[-1]).numpy() for s in states])


@pytest.mark.parametrize("runner", ["auto", "torch"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_the_hidden_states(run: Run, checkpoint: Path, tmp_path: Path, runner: str, pooling: str) -> None:
    out = tmp_path / "v.npy"
    words = ("embed", *TEXTS, "-m", checkpoint, "--pooling", pooling, "--runner", runner, "-o", out)
    assert run(*words)[0] == 0
    found = np.load(out)
    assert found.dtype == np.float32 and np.allclose(found, expected(checkpoint, pooling), atol=1e-4)
    assert "exists" in run(*words)[2]


def test_formats_and_inputs(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in run("embed", *TEXTS, "-m", checkpoint)[1].splitlines()]
    assert [line["text"] for line in lines] == list(TEXTS)
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    words = ("embed", "-f", rows, "--field", "body", "-m", checkpoint)
    run(*words, "-o", tmp_path / "v.jsonl")
    assert [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()] == lines
    parquet = pytest.importorskip("pyarrow.parquet")
    run(*words, "-o", tmp_path / "v.parquet", "--normalise")
    table = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["text"] == list(TEXTS) and np.allclose(np.linalg.norm(table["embedding"], axis=1), 1)
    assert np.argmax(np.abs(table["embedding"][0])) == np.argmax(np.abs(lines[0]["embedding"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a", "-o", "v.txt"), ".npy"),
        (("a", "-f", "x.txt"), "give one of them"),
        (("a", " "), "text 2 is empty"),
        (("-f", "gone.txt"), "gone.txt"),
    ],
)
def test_wrong_inputs(run: Run, checkpoint: Path, words: tuple[str, ...], said: str) -> None:
    code, out, err = run("embed", *words, "-m", checkpoint)
    assert code == 2 and said in err and not out
    assert "text 1" in run("embed", "x" * 200, "-m", checkpoint)[2]
