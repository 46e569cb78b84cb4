"""From a data set to what a trainer takes: items of an objective, or rows as they are for a collator."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llama2.classifiers import LlamaForSequenceClassification
from llama2.errors import InputError
from llama2.model import LlamaForCausalLM
from llama2.pretrained import PreTrainedModel
from llama2.protocols import TokenizerLike
from llama2.train.collators import ROW_BY_ROW, DataCollatorWithPadding, default_data_collator
from llama2.train.dataset_adapter import objective_for
from llama2.train.distributed import join
from llama2.train.objectives import Objective, padded
from llama2.train.readers import taken

if TYPE_CHECKING:
    from llama2.train.arguments import TrainingArguments

CLASSIFIERS: tuple[Any, ...] = (LlamaForSequenceClassification,)
TRAINED, EVAL_ROWS = "train_dataset", 10_000  # rows that are measured of a stream, which may be endless
_LABELS = ("labels", "label", "label_ids")


class Encoder:
    """How the rows of one trainer are encoded. raw: rows go to the collator as they are."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: TokenizerLike | None,
        collator: Callable[..., Any] | None,
        args: "TrainingArguments",
        objective: Objective | None,
    ) -> None:
        self.model, self.tokenizer, self.collator, self.args = model, tokenizer, collator, args
        self.objective: Any = objective
        known = isinstance(model, (LlamaForCausalLM, *CLASSIFIERS))
        self.raw = objective is None and (not known or (collator is not None and type(collator) not in ROW_BY_ROW))
        if self.raw and collator is None:
            self.collator = default_data_collator if tokenizer is None else DataCollatorWithPadding(tokenizer)

    def items(self, dataset: Iterable[Any], name: str) -> list[Any]:
        """The items of a set; what is wrong with its rows is warned of. Raises InputError where none is left."""
        if isinstance(dataset, Mapping):
            raise InputError(f"{name} is a dict of sets; choose one of {', '.join(map(str, dataset))}")
        most = self._most() if name == TRAINED else EVAL_ROWS
        rows = taken(dataset, most, name)
        if not rows:
            raise InputError(f"{name} has no rows; give rows to {'train' if name == TRAINED else 'measure'} on")
        if self.raw:
            return self._columns(rows)
        if self.collator is not None and isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
            rows = [_one(self.collator([row])) for row in rows]
        chosen, items, _ = objective_for(self.model, rows, self.tokenizer)
        self.objective = self.objective or chosen
        return list(items)

    def _most(self) -> int | None:
        """Rows that a run of max_steps takes, of a stream."""
        args = self.args
        most = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * join().world
        return most if most > 0 else None

    def sets(
        self, dataset: Iterable[Any] | Mapping[str, Iterable[Any]], name: str = "eval_dataset"
    ) -> list[Any] | dict[str, list[Any]]:
        """The items of a set, or of each set of a dict."""
        if isinstance(dataset, Mapping):
            return {key: self.items(rows, f"{name}[{key!r}]") for key, rows in dataset.items()}
        return self.items(dataset, name)

    def _columns(self, rows: Sequence[Any]) -> list[Any]:
        """Rows without the columns that the model's forward pass does not take, unless remove_unused_columns is off."""
        if not self.args.remove_unused_columns or not isinstance(rows[0], Mapping):
            return list(rows)
        taken = {*inspect.signature(self.model.forward).parameters, *_LABELS, *(self.args.label_names or ())}
        kept = [name for name in rows[0] if name in taken]
        if not kept:
            raise InputError(
                f"none of the columns {', '.join(map(str, rows[0]))} is an argument of the model's forward pass; "
                "encode the rows to input_ids, or set remove_unused_columns=False where the data_collator does that"
            )
        return [{name: row[name] for name in kept if name in row} for row in rows]

    def lengths(self, items: Sequence[Any]) -> list[int]:
        """Tokens of each item."""
        if self.objective is not None:
            return [self.objective.tokens(item) for item in items]
        return [len(item["input_ids"]) for item in items]

    def measured(
        self, dataset: Iterable[Any], collate: Callable[[Sequence[Any]], dict[str, Any]]
    ) -> tuple[list[Any], Callable[[Sequence[Any]], dict[str, Any]]]:
        """The items of a set that is predicted, which needs no labels, and what makes a batch of some."""
        rows = taken(dataset, EVAL_ROWS, "the set")
        bare = rows and isinstance(rows[0], Mapping) and not any(rows[0].get(name) is not None for name in _LABELS)
        if not bare or self.raw or not isinstance(self.model, CLASSIFIERS):
            return self.items(rows, "the set"), collate
        if "input_ids" in rows[0]:
            return [_ids(row["input_ids"]) for row in rows], inputs_of
        if "text" not in rows[0] or self.tokenizer is None:
            raise InputError(f"rows of {sorted(rows[0])} have no input_ids; pass processing_class=tokenizer and texts")
        length = self.model.config.max_position_embeddings
        return [list(self.tokenizer(row["text"])["input_ids"])[:length] for row in rows], inputs_of


def inputs_of(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Rows of ids as input_ids and attention_mask (B, T), filled on the right."""
    return {"input_ids": padded(rows, 0), "attention_mask": padded([[1] * len(row) for row in rows], 0)}


def _ids(values: Iterable[Any]) -> list[int]:
    return [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def _one(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The one row of a batch."""
    return {name: value[0] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
