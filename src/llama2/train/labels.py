"""Labels of texts: what they are called, and rows with them as ids and targets. No torch here.

single_label_classification    a label a row: a name, or a number from 0 on
multi_label_classification     a list of names or numbers, or one 0 or 1 for each label
regression                     a number
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat, get_args

from llama2.errors import InputError
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, Row, each
from llama2.train.shapes import CLASSIFICATION, TEXT

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE, MULTI, REGRESSION = get_args(ProblemType)
MOST = 10_000  # labels; numbers beyond it are measurements, not classes
Target = int | float | list[float]
Labelled = tuple[list[int], Target]


@dataclass(frozen=True)
class Labels:
    """The kind of a labelling and its names in the order of their numbers (none for a regression)."""

    kind: str
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[Row], kind: str | None = None, names: Sequence[str] = ()) -> "Labels":
        """Infers the rows' labels; `kind` and `names` override that. Raises InputError where that makes no sense."""
        if kind is not None and kind not in get_args(ProblemType):
            raise InputError(f"problem_type is {kind!r}; it must be one of {', '.join(get_args(ProblemType))}")
        values = [row["label"] for row in rows if row.get("label") is not None]
        if not values:
            raise InputError("no row has a label; name the column of the labels (label_column)")
        kind = kind or _kind(values)
        if kind == REGRESSION:
            return cls(kind)
        found = tuple(names) or _names(values, kind)
        if len(set(found)) != len(found):
            raise InputError(f"the labels {', '.join(found)} are not all different")
        if len(found) < 2:
            raise InputError(f"all rows have the label {found[0]!r}; a classifier needs at least two")
        return cls(kind, found)

    def text(self) -> str:
        """A line for people."""
        if not self.names:
            return "regression: the labels are numbers"
        return f"{self.kind.replace('_', ' ')}: {len(self.names)} labels: {', '.join(self.names[:12])}"

    def target(self, value: object) -> Target:
        """Returns the target of a label for the loss. Raises InputError for one that is not among them."""
        if self.kind == REGRESSION:
            number = _number(value)
            if number is None or not math.isfinite(number):
                raise InputError(f"the label {value!r} is not a number")
            return number
        if self.kind == SINGLE:
            return self._index(value)
        row = [0.0] * len(self.names)
        parts = _parts(value)
        if _is_row(parts, len(self.names)):
            return [float(part) for part in parts]
        for part in parts:
            row[self._index(part)] = 1.0
        return row

    def _index(self, value: object) -> int:
        name = _name(value)
        if name in self.names:
            return self.names.index(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.names):
            return value
        shown = f"0 .. {len(self.names) - 1} ({', '.join(self.names[:8])}{', ...' if len(self.names) > 8 else ''})"
        raise InputError(f"the label {value!r} is none of {shown}")


def _kind(values: Sequence[Any]) -> str:
    if any(isinstance(value, list | tuple) for value in values):
        return MULTI
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers) and not all(float(number or 0).is_integer() for number in numbers):
        return REGRESSION
    return SINGLE


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, SupportsFloat | str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _name(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parts(value: object) -> list[Any]:
    if isinstance(value, str):  # of a .csv file
        return [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise InputError(f"the label {value!r} is no list of labels")
    return list(value)


def _is_row(parts: Sequence[Any], count: int) -> bool:
    """Whether a list is one 0 or 1 for each label, and not a list of their numbers."""
    numeric = len(parts) == count and all(not isinstance(p, str) and p in (0, 1) for p in parts)
    return numeric and (any(isinstance(p, float) for p in parts) or len(set(parts)) < len(parts) or count == 2)


def _names(values: Sequence[Any], kind: str) -> tuple[str, ...]:
    if kind == MULTI:
        lists = [_parts(value) for value in values]
        width = len(lists[0])
        if width > 1 and all(_is_row(parts, width) for parts in lists):
            return tuple(f"LABEL_{i}" for i in range(width))
        values = [part for parts in lists for part in parts]
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        if low < 0 or high >= MOST:
            raise InputError(
                f"there are labels from {low} to {high}; numbers of classes run from 0 to at most {MOST - 1} "
                "(measurements need problem_type regression)"
            )
        return tuple(f"LABEL_{i}" for i in range(high + 1))
    names = {_name(value) for value in values}
    if len(names) > MOST:
        raise InputError(f"there are {len(names)} different labels, above {MOST}; is this the right column?")
    return tuple(sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))


def prepare_labelled(
    rows: Iterable[Row], tokenizer: TokenizerLike, max_length: int | None, labels: Labels
) -> tuple[list[Labelled], DataReport]:
    """The usable rows as (ids, target), ids cut to max_length at the end, and the report on all rows."""
    report, made = DataReport(max_length=max_length), []

    def encode(row: Row) -> Labelled:
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str):
            raise InputError(f"text is a {type(text).__name__}, not a text")
        if label is None:
            raise InputError("it has no label")
        target = labels.target(label)
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if not ids:
            raise InputError("its text is empty")
        return ids, target

    for number, (ids, target) in each(rows, report, encode, (CLASSIFICATION, TEXT)):
        if max_length is not None and len(ids) > max_length:
            report.truncated.append(number)
        made.append((ids[:max_length], target))
        report.tokens += len(made[-1][0])
        report.targets += 1
    return made, report
