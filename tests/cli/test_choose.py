"""`llama2 choose` and `llama2 report`: the decision, its picture, reports side by side."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llama2.cli.choose import Candidate, decide
from llama2.errors import InputError

Run = Callable[..., tuple[int, str, str]]


def candidate(name: str, decode: float, nll: float, memory: float = 1e9) -> Candidate:
    return Candidate(name, decode, 100.0, int(memory), [nll * 10, nll * 10 + 0.01], [10, 10], [])


def test_the_fastest_that_is_good_enough() -> None:
    found = [candidate("big", 5, 2.0, 8e9), candidate("mid", 9, 2.01, 4e9), candidate("small", 20, 2.3, 2e9)]
    assert decide(found, 0.02, 100)[0].name == "mid"
    assert decide(found, 0.5, 100)[0].name == "small"
    assert decide(found, 0.0, 100)[0].name == "big"
    assert decide(found, 0.02, 3)[0].name == "small"  # all that fits
    assert "1.80 times those of big" in decide(found, 0.02, 100)[1]
    with pytest.raises(InputError, match="small, the smallest, takes 2 GB"):
        decide(found, 0.02, 1)


def test_choose_writes_a_table_and_a_picture(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama2.cli.choose.first_token.measure", lambda *_: "not measured here")
    other = tmp_path / "other"
    other.symlink_to(checkpoint)
    out_file = tmp_path / "picture.svg"
    code, out, err = run("choose", checkpoint, other, "-r", "1", "--picture", out_file)
    assert code == 0, err
    assert "\nuse " in out and "| perplexity |" in out and out_file.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("words", "said"),
    [(("M",), "two or more"), (("M", "gone.gguf"), "gone.gguf"), (("M", "M", "--loss", "-1"), "--loss"),
     (("M", "M", "--json", "--md"), "give one")],
)  # fmt: skip
def test_wrong_inputs(run: Run, checkpoint: Path, words: tuple[str, ...], said: str) -> None:
    code, out, err = run("choose", *(checkpoint if word == "M" else word for word in words))
    assert code == 2 and said in err and not out


def test_reports_side_by_side(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text to be predicted. " * 10)
    for name, runner in (("a", "auto"), ("b", "torch")):
        out = run("perplexity", checkpoint, tmp_path / "text.txt", "--window", "32", "--runner", runner, "--json")[1]
        (tmp_path / f"{name}.json").write_text(out)
    code, out, _ = run("report", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0 and "(a.json)" in out and "(b.json)" in out and "| perplexity @ 32 |" in out
    merged = json.loads(run("report", tmp_path / "a.json", tmp_path / "b.json", "--json")[1])
    assert merged["schema"] == "llama2.report/1" and len({row["model"] for row in merged["rows"]}) == 2
    assert "no report" in run("report")[2] and "x.json" in run("report", "x.json")[2]
