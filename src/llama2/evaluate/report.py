"""The one report of every command that measures: rows of one schema, as JSON and as a Markdown table. No torch.

{"schema": "llama2.report/1", "command": "bench", "version": ..., "created": ..., "machine": {...}, "settings": {...},
 "models": {name: {...}}, "rows": [{"model": name, "test": ..., "value": ..., "error": ..., "low": ..., "high": ...,
 "unit": ..., "better": "higher" | "lower" | "", "details": {...}}]}

`error` is a standard error or, where `details` says "deviation", a sample standard deviation; `low` and `high` bound a
95 % confidence interval. Each is null where nothing tells it.
"""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import llama2
from llama2.errors import InputError
from llama2.evaluate import machine
from llama2.text_file import read_object

SCHEMA = "llama2.report/1"


@dataclass(frozen=True)
class Row:
    """One measured value: of which model, in which test, in which unit, and which direction is better."""

    model: str
    test: str
    value: float | str
    error: float | None = None
    unit: str = ""
    better: str = ""
    low: float | None = None
    high: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The value with its error or interval, in as many digits as they carry."""
        if isinstance(self.value, str):
            return self.value
        if self.error is not None and math.isfinite(self.error):
            return f"{_digits(self.value, self.error)} ± {_digits(self.error, self.error)}"
        if self.low is not None and self.high is not None:
            spread = (self.high - self.low) / 2
            shown = (_digits(x, spread) for x in (self.value, self.low, self.high))
            return "{} [{}, {}]".format(*shown)
        return _plain(self.value)


@dataclass(frozen=True)
class EvaluationReport:
    """Results of one command. models: a description of each model, by the name that rows have."""

    command: str
    rows: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=machine.describe)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    version: str = llama2.__version__

    def as_json(self) -> str:
        """The report in its schema; what is no number in JSON (NaN, infinities) is null."""
        return json.dumps(_finite({"schema": SCHEMA, **asdict(self)}), indent=2, ensure_ascii=False)

    def as_markdown(self) -> str:
        """A table with a row for each test and a column for each model."""
        return table([self])


def read(path: str | Path) -> EvaluationReport:
    """A report from its file. Raises InputError where it is none."""
    found = read_object(Path(path), str(path))
    if found.get("schema") != SCHEMA:
        raise InputError(
            f"{path} is no report: its schema is {found.get('schema')!r}, not {SCHEMA!r}; write one with --json"
        )
    try:
        rows = [Row(**row) for row in found["rows"]]
        rest = {name: found[name] for name in ("command", "settings", "models", "machine", "created", "version")}
        report = EvaluationReport(rows=rows, **rest)
        for row in rows:
            row.text()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is no whole report ({error}); write it again with --json") from error
    return report


def merged(reports: Sequence[EvaluationReport], names: Sequence[str]) -> EvaluationReport:
    """One report with the rows of several; a model's name has its report's where two measured models of one name."""
    held = [set(_models(report)) for report in reports]
    rows: list[Row] = []
    models: dict[str, Mapping[str, Any]] = {}
    for i, report in enumerate(reports):
        twice = set().union(*held[:i], *held[i + 1 :])
        rows += [replace(r, model=f"{r.model} ({names[i]})") if r.model in twice else r for r in report.rows]
        for name, about in report.models.items():
            models[f"{name} ({names[i]})" if name in twice else name] = about
    settings = {name: dict(report.settings) for name, report in zip(names, reports, strict=True)}
    return EvaluationReport("report", rows, settings, models)


def table(reports: Sequence[EvaluationReport], names: Sequence[str] = ()) -> str:
    """Reports side by side: a row for each test and unit, a column for each model of each report.

    names: what tells reports apart that measured models of one name, such as their files'.
    """
    models = [(i, model) for i, report in enumerate(reports) for model in _models(report)]
    titles = [model for _, model in models]
    if len(set(titles)) < len(titles):
        titles = [f"{model} ({names[i]})" if i < len(names) else f"{model} ({i + 1})" for i, model in models]
    cells: dict[tuple[str, str], dict[tuple[int, str], Row]] = {}
    for i, report in enumerate(reports):
        for row in report.rows:
            cells.setdefault((row.test, row.unit), {})[i, row.model] = row
    lines = ["| test | " + " | ".join(map(_escaped, titles)) + " |", "| --- |" + " ---: |" * len(titles)]
    for (test, unit), found in cells.items():
        best = _best(list(found.values())) if len(models) > 1 else None
        texts = []
        for key in models:
            cell = found.get(key)
            text = "" if cell is None else _escaped(cell.text())
            texts.append(f"**{text}**" if cell is not None and cell is best else text)
        lines.append(f"| {_escaped(test)}{f', {unit}' if unit else ''} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _models(report: EvaluationReport) -> list[str]:
    return list(dict.fromkeys(row.model for row in report.rows))


def _best(rows: list[Row]) -> Row | None:
    """The row with the best value where a direction is known and there is something to compare."""
    numbers = [row for row in rows if not isinstance(row.value, str) and row.value is not None and row.better]
    if len(numbers) < 2:
        return None
    ordered = sorted(numbers, key=lambda row: float(row.value), reverse=numbers[0].better == "higher")
    return None if ordered[0].value == ordered[1].value else ordered[0]


def _digits(value: float, error: float) -> str:
    """The value with two digits of its error."""
    if not math.isfinite(value):
        return str(value)
    if error <= 0 or not math.isfinite(error):
        return _plain(value)
    places = min(max(1 - math.floor(math.log10(error)), 0), 12)
    return f"{value:,.{places}f}"


def _plain(value: float) -> str:
    if value is None:
        return "-"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _finite(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
