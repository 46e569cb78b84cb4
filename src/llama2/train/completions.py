"""Collators that learn from answers only, and that put rows one behind the other, with the values of TRL's and of
transformers'."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.train.collators import Batch, DataCollatorForLanguageModeling, Row
from llama2.train.data import IGNORED


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Pads rows; targets are what follows response_template, with instruction_template up to the next of that.

    The templates are texts, or ids. A text is looked for as it is encoded alone, and as it is encoded behind a line
    break, which differs with SentencePiece. A row without one has no target, and a warning says so. padding_free: the
    rows become one, with position_ids that begin again at 0.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        *args: Any,
        mlm: bool = False,
        ignore_index: int = IGNORED,
        padding_free: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **{"mlm": mlm, **kwargs})
        if ignore_index != IGNORED:
            raise InputError(f"ignore_index is {ignore_index}; losses skip {IGNORED}: leave it out")
        self.response_template, self.instruction_template = response_template, instruction_template
        self.padding_free = padding_free
        self._responses = self._spellings(response_template)
        self._instructions = None if instruction_template is None else self._spellings(instruction_template)

    def _spellings(self, template: str | Sequence[int]) -> list[list[int]]:
        if not isinstance(template, str):
            return [list(template)]
        line, behind = self._ids("\n"), self._ids("\n" + template)
        found = [self._ids(template)]
        return [*found, behind[len(line) :]] if line and behind[: len(line)] == line else found

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Batch:
        batch = super().__call__(features, return_tensors)
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"], strict=True):
            self._mask(ids, labels)
        return _flat(batch) if self.padding_free else batch

    def _mask(self, ids: list[int], labels: Tensor) -> None:
        """Leaves in `labels` (T,) only the answers."""
        ends = [start + length for start, length in _places(ids, self._responses)]
        begins = [] if self._instructions is None else [start for start, _ in _places(ids, self._instructions)]
        if not ends or (self._instructions is not None and not begins):
            missing = "response_template" if not ends else "instruction_template"
            warnings.warn(
                f"{missing} {getattr(self, missing)!r} does not occur in a row, so nothing is learnt from it: "
                f"{self.tokenizer.decode(ids)[:200]!r}. Give the ids of the template, or a longer max_length",
                stacklevel=4,
            )
            labels[:] = IGNORED
            return
        if self._instructions is None:
            labels[: ends[-1]] = IGNORED
            return
        if begins[0] > ends[0]:
            begins = [0, *begins]
        begins[0] = 0  # what is before the first instruction is none of its answer
        for begin, end in zip(begins, ends, strict=False):
            labels[begin:end] = IGNORED
        if len(ends) < len(begins):
            labels[begins[-1] :] = IGNORED


def _places(ids: list[int], spellings: list[list[int]]) -> list[tuple[int, int]]:
    """Where one of the spellings begins, and its length, from the left."""
    found = {i: len(s) for s in spellings if s for i in range(len(ids)) if ids[i : i + len(s)] == s}
    return sorted(found.items())


def _flat(batch: Batch) -> Batch:
    """A padded batch as one row (1, N): ids, labels, and positions that begin again at 0."""
    real = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1)[real][None]
    labels = batch["labels"][real][None].masked_fill(positions == 0, IGNORED)
    return {"input_ids": batch["input_ids"][real][None], "labels": labels, "position_ids": positions}


@dataclass
class DataCollatorWithFlattening:
    """Rows one behind the other as one row (1, N), without padding; the model keeps them apart by their positions.

    The first label of each is separator_id. return_flash_attn_kwargs adds cu_seq_lens_q and _k and max_length_q and _k;
    return_seq_idx the number of each token's row.
    """

    return_position_ids: bool = True
    separator_id: int = IGNORED
    return_flash_attn_kwargs: bool = False
    return_seq_idx: bool = False
    return_tensors: str = "pt"

    def __call__(
        self, features: Sequence[Row], return_tensors: str | None = None, separator_id: int | None = None
    ) -> Batch:
        first = self.separator_id if separator_id is None else separator_id
        rows = [[int(i) for i in row["input_ids"]] for row in features]
        labels = [row["labels"] if row.get("labels") is not None else row["input_ids"] for row in features]
        lengths = [len(row) for row in rows]
        batch: Batch = {
            "input_ids": torch.tensor([list(chain.from_iterable(rows))]),
            "labels": torch.tensor([[i for row in labels for i in (first, *(int(x) for x in row[1:]))]]),
        }
        if self.return_position_ids:
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        if self.return_seq_idx:
            batch["seq_idx"] = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))[None].int()
        if self.return_flash_attn_kwargs:
            ends = torch.tensor([0, *lengths]).cumsum(0).int()
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths),
                      "max_length_k": max(lengths)}  # fmt: skip
        return batch
