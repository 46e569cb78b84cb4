"""Results of a call: `Encoding`, one row with its alignment to the text, and `BatchEncoding`, the dict of columns."""

from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llama2.errors import MissingDependencyError, TokenizerError

Span = tuple[int, int]


class CharSpan(NamedTuple):
    """Characters start (included) to end (excluded)."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens start (included) to end (excluded)."""

    start: int
    end: int


@dataclass(slots=True)
class Segment:
    """One text as ids, before special tokens. `offsets` are Python character positions; `words` count from 0."""

    ids: list[int]
    offsets: list[Span] | None = None
    words: list[int | None] | None = None

    def add(self, token_id: int, span: Span, word: int) -> None:
        """One more token of a segment that has places."""
        self.ids.append(token_id)
        (self.offsets if self.offsets is not None else []).append(span)
        (self.words if self.words is not None else []).append(word)

    def cut(self, start: int, stop: int) -> "Segment":
        """The tokens start to stop."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        words = None if self.words is None else self.words[start:stop]
        return Segment(self.ids[start:stop], offsets, words)


@dataclass(slots=True)
class Encoding:
    """One row: ids, and for each its token type, place in the text (0, 0 for special tokens), word and sequence."""

    ids: list[int]
    type_ids: list[int]
    special_tokens_mask: list[int]
    sequence_ids: list[int | None]
    offsets: list[Span]
    word_ids: list[int | None]
    tokens: list[str] = field(default_factory=list)

    @property
    def attention_mask(self) -> list[int]:
        """Ones: padding is added to the columns, not to the rows."""
        return [1] * len(self.ids)

    def pad(self, length: int, side: str, pad_id: int, pad_token: str) -> None:
        """Grow to `length` tokens, so that positions agree with a padded column."""
        n = max(0, length - len(self.ids))
        fills: tuple[tuple[str, Any], ...] = (
            ("ids", pad_id),
            ("type_ids", 0),
            ("special_tokens_mask", 1),
            ("sequence_ids", None),
            ("offsets", (0, 0)),
            ("word_ids", None),
            ("tokens", pad_token),
        )
        for name, value in fills:
            old = getattr(self, name)
            setattr(self, name, [value] * n + old if side == "left" else old + [value] * n)


class BatchEncoding(UserDict[str, Any]):
    """Columns of token data: a dict whose keys are attributes too (`enc.input_ids`).

    The alignment methods (`word_ids`, `char_to_token`, ...) need the texts; they encode once more, with offsets, at
    the first use. They are lost by pickling.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        encodings: "list[Encoding] | Callable[[], list[Encoding]] | None" = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
        is_fast: bool = True,
    ):
        super().__init__(data or {})
        self._encodings = encodings
        self._n_sequences = n_sequences
        self._is_fast = is_fast
        if tensor_type is not None:
            self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getattr__(self, name: str) -> Any:
        if name in ("data", "_encodings") or name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(f"this BatchEncoding has no {name!r}; it has {', '.join(self.data)}") from None

    def __getitem__(self, key: Any) -> Any:
        """A column by name, a row's `Encoding` by number, or every column cut by a slice."""
        if isinstance(key, str):
            return self.data[key]
        if isinstance(key, slice):
            return {name: column[key] for name, column in self.data.items()}
        return self.encodings[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "_encodings": None, "_n_sequences": self._n_sequences, "_is_fast": self._is_fast}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def is_fast(self) -> bool:
        """Whether a fast tokenizer made it. The alignment methods work either way."""
        return self._is_fast

    @property
    def n_sequences(self) -> int | None:
        """1 for texts, 2 for pairs."""
        return self._n_sequences

    @property
    def encodings(self) -> list[Encoding]:
        """One `Encoding` a row."""
        if callable(self._encodings):
            self._encodings = self._encodings()
        if self._encodings is None:
            raise TokenizerError("this BatchEncoding has no alignment (built from ids, or unpickled); encode the text")
        return self._encodings

    def _row(self, batch_index: int) -> Encoding:
        rows = self.encodings
        if not -len(rows) <= batch_index < len(rows):
            raise TokenizerError(f"row {batch_index} of a batch of {len(rows)}")
        return rows[batch_index]

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The pieces of a row."""
        return self._row(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Word of each token of a row, None for special tokens. Words begin at spaces, or are those passed in."""
        return self._row(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 (text) or 1 (text_pair) of each token, None for special tokens."""
        return self._row(batch_index).sequence_ids

    def _find(self, batch_index: int, sequence: int, hit: Callable[[Encoding, int], bool]) -> list[int]:
        row = self._row(batch_index)
        return [i for i in range(len(row.ids)) if row.sequence_ids[i] == sequence and hit(row, i)]

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The first token that covers a character; None where none does."""
        row, char = (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        found = self._find(row, sequence_index, lambda e, i: e.offsets[i][0] <= char < e.offsets[i][1])
        return found[0] if found else None

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters of a token; None for a special token."""
        row, token = (0, batch_or_token_index) if token_index is None else (batch_or_token_index, token_index)
        encoding = self._row(row)
        return None if encoding.sequence_ids[token] is None else CharSpan(*encoding.offsets[token])

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The word of a token."""
        row, token = (0, batch_or_token_index) if token_index is None else (batch_or_token_index, token_index)
        return self._row(row).word_ids[token]

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """0 or 1, the text that a token belongs to."""
        row, token = (0, batch_or_token_index) if token_index is None else (batch_or_token_index, token_index)
        return self._row(row).sequence_ids[token]

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word."""
        row, word = (0, batch_or_word_index) if word_index is None else (batch_or_word_index, word_index)
        found = self._find(row, sequence_index, lambda e, i: e.word_ids[i] == word)
        return TokenSpan(found[0], found[-1] + 1) if found else None

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word."""
        row, word = (0, batch_or_word_index) if word_index is None else (batch_or_word_index, word_index)
        offsets = self._row(row).offsets
        found = [offsets[i] for i in self._find(row, sequence_index, lambda e, i: e.word_ids[i] == word)]
        return CharSpan(min(s for s, _ in found), max(e for _, e in found)) if found else None

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that covers a character."""
        row = 0 if char_index is None else batch_or_char_index
        token = self.char_to_token(batch_or_char_index, char_index, sequence_index)
        return None if token is None else self._row(row).word_ids[token]

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> "BatchEncoding":
        """Make every column a tensor: "pt" (torch.int64) or "np". Rows must have one length."""
        if tensor_type is None:
            return self
        make = _tensor_maker(str(getattr(tensor_type, "value", tensor_type)))
        for name, column in self.data.items():
            if column is None or hasattr(column, "shape"):
                continue
            try:
                self.data[name] = make([column] if prepend_batch_axis else column)
            except (ValueError, TypeError, RuntimeError) as error:
                raise TokenizerError(
                    f"cannot make a tensor of {name!r}: {_lengths(column)}. Activate padding=True and truncation=True "
                    "so that all rows have the same length"
                ) from error
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
        """Move the torch tensors to a device, in place; other columns stay."""
        for name, column in self.data.items():
            if hasattr(column, "to"):
                self.data[name] = column.to(device, non_blocking=non_blocking)
        return self


def _lengths(column: Sequence[Any]) -> str:
    sizes = sorted({len(row) for row in column if isinstance(row, Sequence)})
    return f"its rows have {sizes[0]} to {sizes[-1]} entries" if len(sizes) > 1 else "its rows are not plain numbers"


def _tensor_maker(tensor_type: str) -> Callable[[Any], Any]:
    if tensor_type == "np":
        import numpy

        return lambda rows: numpy.asarray(rows, dtype=numpy.int64)
    if tensor_type == "pt":
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError("return_tensors='pt' needs torch: pip install torch") from error

        return lambda rows: torch.tensor(rows, dtype=torch.int64)
    raise TokenizerError(f"return_tensors={tensor_type!r}; use 'pt' (torch) or 'np' (numpy)")
