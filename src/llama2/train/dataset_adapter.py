"""A data set as users of transformers have it, rows of input_ids and labels or of texts, as items of an objective."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from llama2.errors import InputError
from llama2.pretrained import PreTrainedModel
from llama2.protocols import TokenizerLike
from llama2.train.answers import Preferences
from llama2.train.data import IGNORED, DataReport, Example, kind_of, prepare, prepare_pairs
from llama2.train.labels import MULTI, REGRESSION, SINGLE, Labels, prepare_labelled
from llama2.train.objectives import Classification, NextToken, Objective, packed_rows
from llama2.train.readers import taken
from llama2.train.shapes import PREFERENCE


def objective_for(
    model: PreTrainedModel,
    rows: Iterable[Any],
    tokenizer: Any,
    max_length: int | None = None,
    most: int | None = None,
) -> tuple[Objective, list[Any], DataReport]:
    """Selects the objective of rows, by the model's class and for texts by their shape, and makes their items.

    A classifier takes {"input_ids", "labels" or "label"} or {"text", "label"}; another model {"input_ids", "labels"}
    (without labels every token is a target), or texts in any shape that `shapes` knows, which need the tokenizer.
    max_length: tokens of a row of texts, by default the model's context. most: rows that are taken of a stream, which
    is not read to its end. What is left out, cut or not used is told by a warning; InputError where no row is left.
    """
    rows = taken(rows, most, "the data set")
    if not rows:
        return NextToken(), [], DataReport()
    if not isinstance(rows[0], Mapping):
        raise InputError(f"a row is a {type(rows[0]).__name__}; it must be a dict, with input_ids or with texts")
    objective, items, report = _items(model, rows, tokenizer, max_length or model.config.max_position_embeddings)
    if not items:
        raise InputError(f"no row of the data set can be used. {report.text()}")
    if remarks := report.remarks():
        warnings.warn(f"of {report.rows:,} rows: {'; '.join(remarks)}", stacklevel=3)
    return objective, items, report


def _items(
    model: PreTrainedModel, rows: list[Mapping[str, Any]], tokenizer: TokenizerLike, length: int
) -> tuple[Objective, list[Any], DataReport]:
    encoded = "input_ids" in rows[0]
    if not encoded and tokenizer is None:
        raise InputError(f"rows of {sorted(rows[0])} are texts; pass processing_class=tokenizer to have them encoded")
    if hasattr(model, "score"):
        return Classification(), *(
            _labelled(model, rows) if encoded else _labelled_texts(model, rows, tokenizer, length)
        )
    if encoded:
        items = packed_rows([_example(i, row) for i, row in enumerate(rows)], None)
        return NextToken(), items, DataReport(rows=len(items))
    if kind_of(rows[0]) == PREFERENCE:
        pairs, report = prepare_pairs(rows, tokenizer, length)
        return Preferences(), list(pairs), report
    examples, report = prepare(rows, tokenizer, length)
    return NextToken(), list(packed_rows(examples, None)), report


def _example(number: int, row: Mapping[str, Any]) -> Example:
    """The tokens that the attention mask keeps; rows may be lists, arrays or tensors."""
    ids = _list(row["input_ids"])
    labels = _list(row["labels"]) if row.get("labels") is not None else list(ids)
    mask = _list(row["attention_mask"]) if row.get("attention_mask") is not None else [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise InputError(
            f"row {number} has {len(ids)} input_ids, {len(labels)} labels and a mask of {len(mask)}; give as many"
        )
    kept = [i for i, on in enumerate(mask) if on]
    example = Example([int(ids[i]) for i in kept], [int(labels[i]) for i in kept])
    if all(label == IGNORED for label in example.labels[1:]):
        raise InputError(f"row {number} has no target: every label behind its first token is {IGNORED}")
    return example


def _labelled(model: PreTrainedModel, rows: list[Mapping[str, Any]]) -> tuple[list[Any], DataReport]:
    items, count = [], model.config.num_labels
    for number, row in enumerate(rows):
        label = row["labels"] if row.get("labels") is not None else row.get("label")
        label = _list(label) if hasattr(label, "tolist") or isinstance(label, list | tuple) else label
        if label is None:
            raise InputError(f"row {number} has no labels; its keys are {sorted(row)}")
        if isinstance(label, list) and len(label) != count:
            raise InputError(f"row {number} has {len(label)} labels, and the model {count}")
        if isinstance(label, int) and count > 1 and not 0 <= label < count:
            raise InputError(f"row {number} has the label {label}; the model has {count}, 0 .. {count - 1}")
        ids = _example(number, {**row, "labels": None}).input_ids
        items.append((ids, [float(x) for x in label] if isinstance(label, list) else label))
    return items, DataReport(rows=len(items))


def _labelled_texts(
    model: PreTrainedModel, rows: list[Mapping[str, Any]], tokenizer: TokenizerLike, length: int
) -> tuple[list[Any], DataReport]:
    config = model.config
    kind = config.problem_type or (REGRESSION if config.num_labels == 1 else None)
    if kind is None:
        kind = MULTI if isinstance(rows[0].get("label"), list | tuple) else SINGLE
    labels = Labels(kind, () if kind == REGRESSION else tuple(config.id2label.values()))
    items, report = prepare_labelled(rows, tokenizer, length, labels)
    return list(items), report


def _list(values: Any) -> list[Any]:
    found = values.tolist() if hasattr(values, "tolist") else values
    return list(found) if isinstance(found, list | tuple) else found
