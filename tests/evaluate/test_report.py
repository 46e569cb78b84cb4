"""The common report: round trip, tables side by side, and what is no report."""

import json
from pathlib import Path

import pytest

from llama2.errors import InputError
from llama2.evaluate import report
from llama2.evaluate.report import EvaluationReport, Row


def example(name: str = "a", speed: float = 120.0) -> EvaluationReport:
    return EvaluationReport(
        "bench",
        [
            Row(name, "pp512", speed, 2.345, "tokens/s", "higher", details={"n": [1, 2]}),
            Row(name, "a|b", 0.5, low=0.41, high=0.59),
            Row(name, "kind", "Q4_1"),
        ],
        {"repetitions": 5},
        {name: {"file_bytes": 10}},
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(example().as_json())
    assert json.loads(path.read_text())["schema"] == report.SCHEMA
    assert report.read(path) == example().__class__(**vars(example()) | {"created": report.read(path).created})


def test_what_is_no_number_is_null() -> None:
    assert json.loads(EvaluationReport("x", [Row("a", "t", float("nan"))]).as_json())["rows"][0]["value"] is None


def test_side_by_side() -> None:
    lines = report.table([example("a", 120), example("b", 130)]).splitlines()
    assert lines[0] == "| test | a | b |"
    assert lines[2] == "| pp512, tokens/s | 120.0 ± 2.3 | **130.0 ± 2.3** |"
    assert lines[3] == "| a\\|b | 0.500 [0.410, 0.590] | 0.500 [0.410, 0.590] |"
    assert lines[4] == "| kind | Q4_1 | Q4_1 |"


def test_models_of_one_name_are_told_apart() -> None:
    assert report.table([example(), example()], ["x.json", "y.json"]).startswith("| test | a (x.json) | a (y.json) |")


@pytest.mark.parametrize(
    "text", ["{}", '{"schema": "llama2.report/1"}', '{"schema": "llama2.report/1", "command": "x", "rows": [{"a": 1}]}']
)
def test_what_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="--json"):
        report.read(tmp_path / "x.json")
