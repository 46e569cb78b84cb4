"""One call of a tokenizer: its arguments made definite, then text to columns."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama2.errors import TokenizerError
from llama2.tokenizer import batching
from llama2.tokenizer.chat import ChatPrompt
from llama2.tokenizer.encoding import BatchEncoding, Encoding, Segment
from llama2.tokenizer.post_processor import BARE, Template, TemplatePart

if TYPE_CHECKING:
    from llama2.tokenizer.base import PreTrainedTokenizer

VERY_LARGE = int(1e30)  # what files write for "no limit"
ACCEPTED = "str, a list of str (a batch), or with is_split_into_words=True a list of words or a list of such lists"


class TokenizerCall:
    """One call of a tokenizer: normalises its arguments, then runs."""

    def __init__(
        self, tok: PreTrainedTokenizer, text: Any, pair: Any, *, add_special_tokens: bool = True,
        padding: bool | str = False, truncation: bool | str | None = None, max_length: int | None = None,
        stride: int = 0, is_split_into_words: bool = False, pad_to_multiple_of: int | None = None,
        padding_side: str | None = None, return_tensors: str | None = None,
        return_token_type_ids: bool | None = None, return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False, return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False, return_length: bool = False, verbose: bool = True,
        split_special_tokens: bool | None = None,
    ):  # fmt: skip
        self.tok, self.words, self.verbose = tok, is_split_into_words, verbose
        self.specials = add_special_tokens
        split = tok.split_special_tokens if split_special_tokens is None else split_special_tokens
        self.keep_special = not split
        self.padding = batching.padding_of(padding)
        self.max_length, self.truncation = self._limit(truncation, whole("max_length", max_length))
        self.stride, self.multiple = whole("stride", stride) or 0, whole("pad_to_multiple_of", pad_to_multiple_of)
        self.side = padding_side
        both = self.truncation != "do_not_truncate" and self.padding != "do_not_pad"
        if both and self.multiple and self.max_length and self.max_length % self.multiple:
            raise TokenizerError(
                f"max_length={self.max_length} truncates to a length that is not a multiple of "
                f"pad_to_multiple_of={self.multiple}; make it one"
            )
        self.tensors, self.overflow, self.offsets = return_tensors, return_overflowing_tokens, return_offsets_mapping
        names = tok.model_input_names
        self.types = "token_type_ids" in names if return_token_type_ids is None else return_token_type_ids
        self.mask = "attention_mask" in names if return_attention_mask is None else return_attention_mask
        self.special_mask, self.length = return_special_tokens_mask, return_length
        self.single, self.rows = self._rows(text, pair)
        self.given: list[tuple[Segment, Segment | None]] | None = None

    def _limit(self, truncation: bool | str | None, max_length: int | None) -> tuple[int | None, batching.Truncation]:
        strategy = batching.truncation_of(truncation)
        if max_length is not None and truncation is None and self.padding == "do_not_pad":
            self.tok.warn_once(
                "implicit truncation", "max_length without truncation=True: truncating to it all the same"
            )
            strategy = "longest_first"
        if max_length is None and strategy != "do_not_truncate":
            if self.tok.model_max_length < VERY_LARGE:
                max_length = self.tok.model_max_length
            else:
                self.tok.warn_once(
                    "no limit", "truncation=True without max_length, and the model has none: nothing is cut"
                )
                strategy = "do_not_truncate"
        return max_length, strategy

    def _rows(self, text: Any, pair: Any) -> tuple[bool, list[tuple[Any, Any]]]:
        """(whether one row was passed, rows of (text, pair or None))."""
        single = isinstance(text, str) or (
            self.words and isinstance(text, (list, tuple)) and (not text or isinstance(text[0], str))
        )
        if single:
            rows: list[tuple[Any, Any]] = [(text, pair)]
        elif not isinstance(text, (list, tuple)):
            raise TokenizerError(f"text must be {ACCEPTED}; got {type(text).__name__}")
        elif pair is not None:
            if not isinstance(pair, (list, tuple)) or len(pair) != len(text):
                raise TokenizerError(f"{len(text)} texts need as many text_pairs, as a list")
            rows = list(zip(text, pair))
        else:
            rows = [row if self._is_pair(row) else (row, None) for row in text]
        for first, second in rows:
            self._check(first)
            if second is not None:
                self._check(second)
        return single, rows

    def _is_pair(self, row: Any) -> bool:
        kinds: Any = (list, tuple) if self.words else str
        return isinstance(row, (list, tuple)) and len(row) == 2 and all(isinstance(part, kinds) for part in row)

    def _check(self, value: Any) -> None:
        if isinstance(value, str) and not self.words:
            return
        if self.words and isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
            return
        raise TokenizerError(f"text must be {ACCEPTED}; got {type(value).__name__} {str(value)[:60]}")

    def run(self) -> BatchEncoding:
        plain = self.given is None and not self.words and self.truncation == "do_not_truncate"
        extra = self.offsets or self.special_mask or self.types or self.overflow
        if plain and not extra and all(pair is None for _, pair in self.rows):
            columns = self._plain_columns()
        else:
            columns = self._columns(self._encodings(detail=self.offsets))
        self._warn_long(columns["input_ids"])
        tok = self.tok
        length = tok.pad_columns(columns, self.padding, self.max_length, self.multiple, self.side)
        if self.length:
            columns["length"] = [len(row) for row in columns["input_ids"]]
        single = self.single and not self.overflow
        data = {k: v[0] for k, v in columns.items()} if single and self.tensors is None else dict(columns)
        alignment = self._alignment(length) if self.given is None else None
        pairs = bool(self.rows) and self.rows[0][1] is not None
        return BatchEncoding(data, alignment, self.tensors, n_sequences=1 + pairs, is_fast=tok.is_fast)

    def _plain_columns(self) -> dict[str, list[Any]]:
        rows = self.tok.encode_texts([text for text, _ in self.rows], self.keep_special)
        before, after = self.tok.special_tokens_template.around() if self.specials else ([], [])
        if before or after:
            rendered = [isinstance(text, ChatPrompt) for text, _ in self.rows]
            for row, has_its_own in zip(rows, rendered, strict=True):
                if not has_its_own:
                    self.tok.warn_of_double_bos(row)
            rows = [row if own else before + row + after for row, own in zip(rows, rendered, strict=True)]
        columns: dict[str, list[Any]] = {"input_ids": rows}
        if self.mask:
            columns["attention_mask"] = [[1] * len(row) for row in rows]
        return columns

    def _alignment(self, length: int | None) -> Callable[[], list[Encoding]]:
        def make() -> list[Encoding]:
            rows = [row for group in self._encodings(detail=True) for row in group]
            side = self.side or self.tok.padding_side
            for row in rows if length is not None else ():
                row.pad(length or 0, side, self.tok.pad_token_id or 0, self.tok.pad_token or "")
            return rows

        return make

    def _segments(self, detail: bool) -> list[tuple[Segment, Segment | None]]:
        """One segment a text; of a list of words, the words' segments joined."""
        flat = [value for row in self.rows for value in row if value is not None]
        texts = [word for value in flat for word in value] if self.words else flat
        if detail:
            found = iter(self.tok.encode_segments(texts, self.keep_special))
        else:
            found = iter([Segment(ids) for ids in self.tok.encode_texts(texts, self.keep_special)])
        if not self.words:
            return [(next(found), None if pair is None else next(found)) for _, pair in self.rows]
        return [
            (_join([next(found) for _ in text]), None if pair is None else _join([next(found) for _ in pair]))
            for text, pair in self.rows
        ]

    def _encodings(self, detail: bool) -> list[list[Encoding]]:
        """For each row passed in, its encodings: one, or with overflow several."""
        out = []
        found = self._segments(detail) if self.given is None else self.given
        for (a, b), (text, _) in zip(found, self.rows, strict=True):
            template = self.tok.special_tokens_template if self.specials and not isinstance(text, ChatPrompt) else BARE
            room = (self.max_length or 0) - template.added(b is not None)
            side = batching.check_side("truncation_side", self.tok.truncation_side)
            cut = batching.truncate(a, b, room, self.truncation, self.stride, side)
            out.append([self._assemble(template, x, y) for x, y in (cut if self.overflow else cut[:1])])
        return out

    def _assemble(self, template: Template, a: Segment, b: Segment | None) -> Encoding:
        row = Encoding([], [], [], [], [], [])
        parts: Sequence[TemplatePart] = template.single if b is None else template.pair
        for part in parts:
            if part.kind == "special":
                segment, sequence, special = Segment(list(part.ids)), None, 1
            else:
                segment, sequence, special = (a, 0, 0) if part.kind == "A" else (b or Segment([]), 1, 0)
            n = len(segment.ids)
            row.ids += segment.ids
            row.type_ids += [part.type_id] * n
            row.special_tokens_mask += [special] * n
            row.sequence_ids += [sequence] * n
            row.offsets += segment.offsets or [(0, 0)] * n
            row.word_ids += segment.words or [None] * n
        row.tokens = [self.tok.piece_of_id(i) for i in row.ids] if a.offsets is not None else []
        return row

    def _columns(self, groups: list[list[Encoding]]) -> dict[str, list[Any]]:
        rows = [row for group in groups for row in group]
        columns: dict[str, list[Any]] = {"input_ids": [row.ids for row in rows]}
        if self.types:
            columns["token_type_ids"] = [row.type_ids for row in rows]
        if self.mask:
            columns["attention_mask"] = [row.attention_mask for row in rows]
        if self.special_mask:
            columns["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if self.offsets:
            columns["offset_mapping"] = [row.offsets for row in rows]
        if self.overflow:
            columns["overflow_to_sample_mapping"] = [i for i, group in enumerate(groups) for _ in group]
        return columns

    def _warn_long(self, rows: list[list[int]]) -> None:
        limit = self.tok.model_max_length
        longest = max(map(len, rows), default=0)
        if self.verbose and self.max_length is None and longest > limit:
            self.tok.warn_once("too long", f"{longest} tokens are more than the model's {limit}; use truncation=True")


def _join(segments: list[Segment]) -> Segment:
    joined = Segment([], [], [])
    for word, segment in enumerate(segments):
        joined.ids += segment.ids
        joined.offsets = (joined.offsets or []) + (segment.offsets or [(0, 0)] * len(segment.ids))
        joined.words = (joined.words or []) + [word] * len(segment.ids)
    return joined


def whole(name: str, value: Any) -> int | None:
    """A length as an int: numpy's integers and one-element tensors are lengths too."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TokenizerError(f"{name}={value!r}; it must be a whole number") from error
    if number < 0:
        raise TokenizerError(f"{name}={number}; it must be at least 0")
    return number


def tensor_kind(column: Any) -> str | None:
    """ "pt" or "np" where a column, or its first row, is a tensor or an array; None for lists."""
    first = column[0] if isinstance(column, (list, tuple)) and len(column) else column
    if not hasattr(first, "tolist") or not hasattr(first, "shape"):
        return None
    return "pt" if type(first).__module__.partition(".")[0] == "torch" else "np"


def to_list(values: Any) -> list[Any]:
    """A list of plain numbers from an int, list, numpy array or torch tensor."""
    if isinstance(values, list) and not (values and hasattr(values[0], "tolist")):
        return values
    if isinstance(values, int):
        return [values]
    if isinstance(values, (Mapping, str)):
        raise TokenizerError(f"expected ids, got {type(values).__name__}; pass its 'input_ids'")
    if hasattr(values, "tolist"):
        plain = values.tolist()
        return plain if isinstance(plain, list) else [plain]
    return [v.tolist() if hasattr(v, "tolist") else v for v in values]
