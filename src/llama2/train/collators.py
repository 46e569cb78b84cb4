"""Rows of ids to one batch of tensors, with transformers' names and values.

A row is a dict of input_ids, perhaps attention_mask, and labels (or label). B rows, T tokens of the longest.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.protocols import CausalLM, TokenizerLike
from llama2.train.data import IGNORED

Row = Mapping[str, Any]
Batch = dict[str, Any]


def _check_tensors(return_tensors: str | None) -> None:
    if return_tensors not in (None, "pt"):
        raise InputError(f"return_tensors is {return_tensors!r}; batches are tensors of torch: leave it out, or 'pt'")


def default_data_collator(features: Sequence[Any], return_tensors: str | None = "pt") -> Batch:
    """Stacks the values of rows that are equally long; label and label_ids become labels. Texts and None are left out.

    Raises InputError for rows of several lengths.
    """
    _check_tensors(return_tensors)
    rows = [row if isinstance(row, Mapping) else vars(row) for row in features]
    batch = {}
    for name, value in rows[0].items():
        if value is not None and not isinstance(value, str):
            target = "labels" if name in ("label", "label_ids") else name
            batch[target] = _stacked([row[name] for row in rows], name)
    return batch


def _stacked(values: Sequence[Any], name: str) -> Tensor:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    try:
        return torch.from_numpy(np.stack([np.asarray(value) for value in values]).copy()).to(_dtype(values[0]))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"the rows' {name} are of several lengths or no numbers; use DataCollatorWithPadding(tokenizer), or "
            "DataCollatorForSeq2Seq(tokenizer) where labels are padded too"
        ) from error


def _dtype(value: object) -> torch.dtype:
    kind = np.asarray(value).dtype.kind
    return torch.float32 if kind == "f" else torch.bool if kind == "b" else torch.int64


@dataclass
class DefaultDataCollator:
    """`default_data_collator` as an object."""

    return_tensors: str = "pt"

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Batch:
        return default_data_collator(features, return_tensors or self.return_tensors)


@dataclass
class DataCollatorWithPadding:
    """Pads rows on the tokenizer's side; label and label_ids become labels (B,)."""

    tokenizer: TokenizerLike
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _check_tensors(self.return_tensors)

    def __call__(self, features: Sequence[Row]) -> Batch:
        rest, labels = _without_labels(features)
        batch = _padded(self, rest)
        if labels is not None:
            batch["labels"] = _stacked(labels, "labels")
        return batch


@dataclass
class DataCollatorForSeq2Seq:
    """Pads rows on the tokenizer's side, and their labels with label_pad_token_id."""

    tokenizer: TokenizerLike
    model: CausalLM | None = None
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = IGNORED
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _check_tensors(self.return_tensors)

    def __call__(self, features: Sequence[Row], return_tensors: str | None = None) -> Batch:
        _check_tensors(return_tensors)
        rest, labels = _without_labels(features)
        batch = _padded(self, rest)
        if labels is not None:
            length = max(batch["input_ids"].shape[1], *(len(_list(row)) for row in labels))
            batch["labels"] = _padded_labels(labels, length, self.tokenizer.padding_side, self.label_pad_token_id)
        return batch


@dataclass
class DataCollatorForTokenClassification(DataCollatorForSeq2Seq):
    """Pads rows, and the labels of their tokens with label_pad_token_id."""

    def __init__(
        self,
        tokenizer: TokenizerLike,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        label_pad_token_id: int = IGNORED,
        return_tensors: str = "pt",
    ) -> None:
        super().__init__(tokenizer, None, padding, max_length, pad_to_multiple_of, label_pad_token_id, return_tensors)


@dataclass
class DataCollatorForLanguageModeling:
    """Pads rows; labels are the ids themselves, -100 where the pad token stands. Needs mlm=False: Llama is causal."""

    tokenizer: TokenizerLike
    mlm: bool = True
    whole_word_mask: bool = False
    mlm_probability: float | None = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    seed: int | None = None
    padding: bool | str = True
    max_length: int | None = None

    def __post_init__(self) -> None:
        _check_tensors(self.return_tensors)
        if self.mlm or self.whole_word_mask:
            raise InputError("mlm is True, and a causal model has no masked tokens; use mlm=False")
        if self.tokenizer.pad_token_id is not None and self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            warnings.warn(
                "the pad token is the end token, so the ends of texts are no targets and the model does not learn to "
                "stop: add a pad token of its own (model.add_pad_token(tokenizer)), or give rows with labels to "
                "DataCollatorForSeq2Seq",
                stacklevel=3,
            )

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Batch:
        _check_tensors(return_tensors)
        rows = [row if isinstance(row, Mapping) else {"input_ids": row} for row in features]
        rest = [{k: v for k, v in row.items() if k not in ("labels", "special_tokens_mask")} for row in rows]
        batch = _padded(self, rest)
        labels = batch["input_ids"].clone()
        if self.tokenizer.pad_token_id is not None:
            labels[labels == self.tokenizer.pad_token_id] = IGNORED
        batch["labels"] = labels
        return batch


ROW_BY_ROW = (DefaultDataCollator, DataCollatorWithPadding, DataCollatorForSeq2Seq, DataCollatorForLanguageModeling)


def _list(values: Iterable[Any]) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _without_labels(features: Sequence[Row]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Rows without their labels, and these, or None where there are none."""
    name = next((n for n in ("labels", "label", "label_ids") if features[0].get(n) is not None), None)
    rest = [{k: v for k, v in row.items() if k not in ("labels", "label", "label_ids")} for row in features]
    return rest, None if name is None else [row[name] for row in features]


def _padded(collator: Any, rows: Sequence[Row]) -> Batch:
    """Columns of rows as tensors (B, T). Raises InputError where the tokenizer has nothing to pad with."""
    lists = [{k: _list(v) for k, v in row.items() if v is not None and not isinstance(v, str)} for row in rows]
    tokenizer = collator.tokenizer
    if tokenizer.pad_token_id is None and len({len(row["input_ids"]) for row in lists}) > 1:
        raise InputError(
            "rows are of several lengths, and the tokenizer has no pad token; call model.add_pad_token(tokenizer), or "
            "set tokenizer.pad_token"
        )
    batch = tokenizer.pad(
        lists,
        padding=collator.padding if tokenizer.pad_token_id is not None else False,
        max_length=collator.max_length,
        pad_to_multiple_of=collator.pad_to_multiple_of if tokenizer.pad_token_id is not None else None,
        return_tensors="pt",
    )
    return {name: torch.as_tensor(value) for name, value in batch.items()}


def _padded_labels(labels: Sequence[Any], length: int, side: str, fill: int) -> Tensor:
    rows = []
    for label in map(_list, labels):
        pad = [fill] * (length - len(label))
        rows.append([*label, *pad] if side == "right" else [*pad, *label])
    return torch.tensor(rows, dtype=torch.int64)
