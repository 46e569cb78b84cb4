"""`llama2 bench` on a tiny checkpoint: what it prints in each form, and what it refuses before anything loads."""

import csv
import json
import sqlite3
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

from llama2.cli import numbers
from llama2.errors import InputError

Run = Callable[..., tuple[int, str, str]]
SMALL = ("-p", "8", "-n", "4", "-r", "2", "--no-start")


def test_table(run: Run, checkpoint: Path) -> None:
    code, out, _ = run("bench", checkpoint, *SMALL, "-d", "0,16", "-s", "1,3", "-pg", "8,4")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("| model | size | params | backend | threads | test | t/s |")
    tests = [line.split("|")[6].strip() for line in lines[2:14]]
    assert tests[:3] == ["pp8", "tg4", "pp8+tg4"] and tests[-1] == "pp8+tg4 @ d16 x3" and len(set(tests)) == 12
    assert all("±" in line for line in lines[2:14])


def test_rows(run: Run, checkpoint: Path) -> None:
    made = {name: run("bench", checkpoint, *SMALL, "-o", name)[1] for name in ("csv", "json", "jsonl", "sql")}
    rows = json.loads(made["json"])
    assert [row["n_prompt"] for row in rows] == [8, 0] and all(row["avg_ts"] > 0 for row in rows)
    assert len(rows[0]["samples_ns"]) == 2
    assert [json.loads(line).keys() for line in made["jsonl"].splitlines()] == [rows[0].keys()] * 2
    assert [list(row) for row in csv.DictReader(StringIO(made["csv"]))] == [list(rows[0])] * 2
    with sqlite3.connect(":memory:") as base:
        base.executescript(made["sql"])
        assert base.execute("SELECT n_prompt, n_gen FROM llama_bench").fetchall() == [(8, 0), (0, 4)]


def test_report_against_other_settings(run: Run, checkpoint: Path) -> None:
    code, out, _ = run("bench", checkpoint, *SMALL, "--against", "threads=1,kv-cache=float32", "--json")
    report = json.loads(out)
    assert code == 0 and report["schema"] == "llama2.report/1" and len(report["models"]) == 2
    rows = [row for row in report["rows"] if row["test"] == "tg4"]
    assert rows[0]["details"]["ratio"] is None
    ratio = rows[1]["details"]
    assert ratio["ratio_low"] < ratio["ratio"] < ratio["ratio_high"]


@pytest.mark.slow
def test_first_token(run: Run, checkpoint: Path) -> None:
    _, out, _ = run("bench", checkpoint, "-p", "8", "-n", "0", "-r", "1", "--json")
    found = {row["test"]: row["value"] for row in json.loads(out)["rows"]}
    assert found["process start to first token"] > 0.2 and found["peak memory"] > 50


def test_numbers() -> None:
    assert numbers.read("-p", ("1,2", "4-8+2", "1-8*2"), 512, 0) == [1, 2, 4, 6, 8, 1, 2, 4, 8]
    assert numbers.read("-p", (), 512, 0) == [512]


@pytest.mark.parametrize("text", ["x", "", "1,,2", "4-2", "1-9*1", "-3", "1.5"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(InputError, match="-p"):
        numbers.read("-p", (text,), 512, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-p", "97", "-n", "0"), "context has 96"),
        (("-p", "0", "-n", "0"), "no test is left"),
        (("-r", "0"), "at least 1"),
        (("-p", "8", "-n", "4", "-t", "0"), "at least 1"),
        (("-s", "0"), "at least 1"),
        (("-p", "8", "-n", "4", "--against", "kvcache=int8"), "kv-cache"),
        (("-p", "8", "-n", "4", "--against", "kv-cache=int7"), "int8"),
        (("-p", "8", "-n", "4", "--against", "gone.gguf"), "gone.gguf"),
        (("-p", "8", "-n", "4", "--against", "threads=1", "-t", "1,2"), "give one"),
        (("--json", "-o", "csv"), "give one of them"),
    ],
)
def test_wrong_inputs(
    run: Run, checkpoint: Path, words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama2.cli.bench.load", lambda *_: pytest.fail("a model was loaded"))
    code, out, err = run("bench", checkpoint, *words)
    assert code == 2 and said in err and not out
