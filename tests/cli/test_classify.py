"""classify, from finetune to labels: single, several and numbers; adapters and whole models; lines and files."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Run

from llama2 import AutoModelForSequenceClassification, AutoTokenizer, pipeline

QUICK = ("--max-length", "32", "--batch-size", "8", "--learning-rate", "0.01", "--seed", "1", "--schedule", "constant")
WORDS = ("red", "blue", "green", "grey")
ROWS: dict[str, list[dict[str, Any]]] = {
    "single": [{"text": f"{i} {w}", "label": "warm" if w == "red" else "cold"} for i in range(4) for w in WORDS],
    "several": [{"text": f"{i} {w}", "label": ["r"] * (w == "red") + ["g"] * w.startswith("g")} for i in range(4)
                for w in WORDS],
    "number": [{"text": f"{i} {w}", "label": 1.5 if w == "red" else -1} for i in range(4) for w in WORDS],
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("flags", [("--lora-r", "8"), ()], ids=["adapter", "whole"])
def test_from_rows_to_labels(run: Run, checkpoint: Path, tmp_path: Path, kind: str, flags: tuple[str, ...]) -> None:
    data, out = write(tmp_path / "rows.jsonl", ROWS[kind]), tmp_path / "out"
    code, said, err = run("finetune", "classify", checkpoint, data, out, *QUICK, *flags, "--max-steps", "60")
    assert code == 0 and f"llama2 classify {out}" in said, err
    code, said, err = run("classify", out, data)
    records = [json.loads(line) for line in said.splitlines()]
    assert code == 0 and [r["text"] for r in records] == [r["text"] for r in ROWS[kind]], err
    if kind == "number":
        assert "from the labels on average, 16 rows" in err
        values = {word: [r["value"] for r in records if word in r["text"]] for word in WORDS}
        assert min(values["red"]) > max(values["blue"] + values["green"]) + 1
    else:
        assert "100.0% of 16 rows are labelled as they say" in err
    if kind == "single":
        assert all(sum(r["scores"].values()) == pytest.approx(1) and r["score"] == max(r["scores"].values())
                   for r in records)  # fmt: skip
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        found = pipeline("text-classification", model, tokenizer=tokenizer)([r["text"] for r in records])
        assert [f["label"] for f in found] == [r["label"] for r in records]
    if kind == "single" and flags:
        beside = run("classify", checkpoint, data, "--adapter", out)
        assert beside[0] == 0 and beside[1] == said


@pytest.fixture(scope="module")
def classifier(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(_config(checkpoint))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def _config(checkpoint: Path) -> Any:
    from llama2 import LlamaConfig

    names = {0: "a", 1: "b", 2: "c"}
    return LlamaConfig.from_pretrained(
        checkpoint,
        id2label=names,
        label2id={v: k for k, v in names.items()},
        problem_type="single_label_classification",
    )


def test_lines_and_files_agree(run: Run, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.txt").write_text("one\n\ntwo words\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo words\n"))
    code, lines, err = run("classify", classifier)
    assert code == 0 and len(lines.splitlines()) == 2, err
    code, out, err = run("classify", classifier, tmp_path / "texts.txt", "--output", tmp_path / "out.jsonl")
    assert (code, out) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.split()[0] for line in lines.splitlines()] == [record["label"] for record in records]
    (tmp_path / "rows.csv").write_text('review,stars\none,a\n"two, words",b\n')
    words = ("classify", classifier, tmp_path / "rows.csv", "--text-column", "review", "--label-column", "stars")
    code, out, err = run(*words)
    assert code == 0 and json.loads(out.splitlines()[0])["scores"] == pytest.approx(records[0]["scores"], rel=1e-4)
    assert "of 2 rows are labelled as they say" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a classifier and at most one file, but 0"),
        (["BASE"], "has no classifier's head; `llama2 finetune classify` trains one"),
        (["MODEL", "ROWS"], "row 0 of"),
        (["MODEL", "ROWS", "--text-column", "txt"], "there is no column 'txt'; there are review"),
        (["MODEL", "EMPTY"], "holds no texts"),
        (["MODEL", "ROWS", "--threshold", "1.5"], "--threshold is 1.5"),
        (["BASE", "--adapter", "MODEL"], "adapter_config.json does not exist"),
        (["MODEL", "LABELLED"], "the label 'z' is none of 0 .. 2 (a, b, c)"),
    ],
)
def test_mistakes(
    run: Run, checkpoint: Path, classifier: Path, tmp_path: Path, words: list[str], said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "empty.txt").write_text("\n")
    names = {"BASE": checkpoint, "MODEL": classifier, "EMPTY": tmp_path / "empty.txt"}
    names["ROWS"] = write(tmp_path / "rows.jsonl", [{"review": "x"}])
    names["LABELLED"] = write(tmp_path / "labelled.jsonl", [{"text": "x", "label": "z"}])
    code, _, err = run("classify", *(names.get(word, word) for word in words))
    assert code == 2 and said in err, err


def test_an_adapter_without_a_head_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Its head would be drawn at each run: random labels, different each time, and exit code 0."""
    from checkpoint.adapter_files import tensors_for, write_adapter

    from llama2 import AutoConfig

    tensors = tensors_for(AutoConfig.from_pretrained(checkpoint), ("q_proj", "v_proj"))
    folder = write_adapter(tmp_path / "adapter", tensors, base_model_name_or_path=str(checkpoint), task_type="SEQ_CLS")
    data = write(tmp_path / "rows.jsonl", ROWS["single"])
    code, out, err = run("classify", folder, data)
    assert code == 2 and out == "" and "without score.weight" in err and "random" in err
    code, out, err = run("classify", checkpoint, data, "--adapter", folder)
    assert code == 2 and out == "" and "has no head" in err
    code, out, err = run("classify", checkpoint, data)
    assert code == 2 and "has no classifier's head" in err
