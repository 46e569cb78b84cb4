"""Texts one behind the other, cut into rows of one length: what pretraining on a stream reads."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from llama2.errors import InputError
from llama2.protocols import TokenizerLike


class ConstantLengthDataset:
    """Rows of `seq_length` ids from texts that follow each other with an end token between, as TRL's class of the name.

    dataset: rows with a text in dataset_text_field, or of which formatting_func makes one. About num_of_sequences rows
    are read ahead, counted by chars_per_token, and shuffled among themselves. The end token is the tokenizer's, and
    eos_token_id where it has none. infinite: begins again at the end; the remainder that fills no row is dropped. A row
    may hold the end of one text and the beginning of the next, which sees it; SFTConfig(packing=True) keeps them apart.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike,
        dataset: Iterable[Any],
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
    ) -> None:
        for name, value in (("seq_length", seq_length), ("num_of_sequences", num_of_sequences),
                            ("chars_per_token", chars_per_token)):  # fmt: skip
            if not value > 0:
                raise InputError(f"{name} is {value}; it must be more than 0")
        if formatting_func is None and dataset_text_field is None:
            raise InputError("which text is meant? Give dataset_text_field, the column of texts, or formatting_func")
        self.tokenizer, self.dataset, self.infinite, self.seq_length = tokenizer, dataset, infinite, seq_length
        end = tokenizer.eos_token_id
        self.concat_token_id: int = eos_token_id if end is None else end
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.formatting_func, self.dataset_text_field = formatting_func, dataset_text_field
        self.shuffle, self.append_concat_token = shuffle, append_concat_token
        self.add_special_tokens = add_special_tokens

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        more, texts = True, iter(self.dataset)
        while more:
            buffer, more, texts = self._read(texts)
            rows = list(self._rows(buffer))
            if self.infinite and not rows:
                raise InputError(
                    f"the texts read ahead fill no row of {self.seq_length} tokens; make num_of_sequences or "
                    "chars_per_token larger"
                )
            if self.shuffle:
                random.shuffle(rows)
            for row in rows:
                ids = torch.tensor(row, dtype=torch.long)
                yield {"input_ids": ids, "labels": ids.clone()}

    def _read(self, texts: Iterator[Any]) -> tuple[list[str], bool, Iterator[Any]]:
        """Texts up to the size of the buffer, whether there are more, and where they go on."""
        buffer: list[str] = []
        size = 0
        while size < self.max_buffer_size:
            try:
                buffer.append(self._text(next(texts)))
            except StopIteration:
                if not self.infinite:
                    return buffer, False, texts
                texts = iter(self.dataset)
                if not buffer and not any(True for _ in self.dataset):
                    raise InputError("the data set has no rows") from None
                continue
            size += len(buffer[-1])
        return buffer, True, texts

    def _text(self, row: object) -> str:
        if self.formatting_func is not None:
            return self.formatting_func(row)
        if not isinstance(row, Mapping) or self.dataset_text_field not in row:
            raise InputError(f"a row has no column {self.dataset_text_field!r}; dataset_text_field names that of texts")
        return str(row[self.dataset_text_field])

    def _rows(self, texts: list[str]) -> Iterator[list[int]]:
        if not texts:
            return
        ids: list[int] = []
        for found in self.tokenizer(texts, add_special_tokens=self.add_special_tokens, truncation=False)["input_ids"]:
            ids += [*found, self.concat_token_id] if self.append_concat_token else found
        for start in range(0, len(ids) - self.seq_length + 1, self.seq_length):
            yield ids[start : start + self.seq_length]
