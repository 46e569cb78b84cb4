"""The contract that both tokenizers keep: one call API over one primitive, "these texts as segments of ids"."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from llama2.errors import TokenizerError
from llama2.tokenizer import batching
from llama2.tokenizer.chat import ChatPrompt, ChatTemplates
from llama2.tokenizer.encoding import BatchEncoding, Encoding, Segment
from llama2.tokenizer.files import Files
from llama2.tokenizer.stream import PieceTable, StreamDecoder, clean_up_tokenization
from llama2.tokenizer.template import Part, Template

logger = logging.getLogger(__name__)
VERY_LARGE = int(1e30)  # what files write for "no limit"
_ACCEPTED = "str, a list of str (a batch), or with is_split_into_words=True a list of words or a list of such lists"


class PreTrainedTokenizer(ChatTemplates, Files):
    """Text <-> ids. `LlamaTokenizer` (sentencepiece) and `LlamaTokenizerFast` (tokenizers) give the same ids.

    `legacy` True (default) is Meta's behaviour: each stretch of text between special tokens starts with a "▁" of its
    own. False: only the start of the text does. `add_prefix_space=False`: none does.
    """

    is_fast: ClassVar[bool] = False
    model_input_names: list[str]
    padding_side: str
    truncation_side: str
    model_max_length: int
    clean_up_tokenization_spaces: bool
    split_special_tokens: bool
    _table: PieceTable | None
    _warned: set[str]

    # -- what the subclass supplies ------------------------------------------------------------------------------
    @property
    def vocab_size(self) -> int:
        """Size of the base vocabulary, without the tokens added later."""
        raise NotImplementedError

    def get_vocab(self) -> dict[str, int]:
        """Every token -> id, added ones included."""
        raise NotImplementedError

    def _encode_ids(self, texts: list[str], keep_special: bool) -> list[list[int]]:
        raise NotImplementedError

    def _encode_segments(self, texts: list[str], keep_special: bool) -> list[Segment]:
        """As `_encode_ids`, with offsets and words."""
        raise NotImplementedError

    def _encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Texts taken literally, between ids already known: one text whose special tokens were found by the caller."""
        raise NotImplementedError

    def _make_table(self) -> PieceTable:
        raise NotImplementedError

    # -- encoding ------------------------------------------------------------------------------------------------
    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Encode a text or a batch: `input_ids`, `attention_mask` and the columns asked for.

        One text gives flat lists, a batch gives lists of lists, `return_tensors` gives [B, T] tensors. Overflow comes
        as further rows with `overflow_to_sample_mapping`. `text_target` becomes `labels`.
        """
        options = dict(locals())
        for name in ("self", "text", "text_pair", "text_target", "text_pair_target"):
            del options[name]
        if text is None and text_target is None:
            raise TokenizerError(f"nothing to encode: text is None; pass {_ACCEPTED}")
        if text_target is None:
            return _Call(self, text, text_pair, **options).run()
        target = _Call(self, text_target, text_pair_target, **options).run()
        if text is None:
            return target
        encoded = _Call(self, text, text_pair, **options).run()
        encoded["labels"] = target["input_ids"]
        return encoded

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        """The ids of one text or pair; keywords as for a call."""
        if not kwargs and text_pair is None and isinstance(text, str):
            ids = self._encode_ids([text], not self.split_special_tokens)[0]
            if add_special_tokens and not isinstance(text, ChatPrompt):
                self._warn_double_bos(ids)
                before, after = self._template.around()
                return before + ids + after
            return ids
        result: list[int] = self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]
        return result

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """A call on one text."""
        return self(text, text_pair, **kwargs)

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **kwargs: Any) -> BatchEncoding:
        """A call on a list of texts or of (text, pair)."""
        return self(list(batch_text_or_text_pairs), **kwargs)

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        split_special_tokens: bool | None = None,
    ) -> list[str]:
        """The pieces of a text, e.g. ["▁Hello", "▁world"]; with a pair, those of both."""
        enc = self(text, pair, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens)
        return [self._id_token(i) for i in enc["input_ids"]]

    def prepare_for_model(self, ids: list[int], pair_ids: list[int] | None = None, **kwargs: Any) -> BatchEncoding:
        """Ids of one text or pair, as a call would return them: special tokens, truncation, padding."""
        call = _Call(self, "", None if pair_ids is None else "", **kwargs)
        call.given = [(Segment(list(ids)), None if pair_ids is None else Segment(list(pair_ids)))]
        return call.run()

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)

    def _warn_double_bos(self, ids: list[int]) -> None:
        if self._add_bos and ids and ids[0] == self.bos_token_id:
            self._warn(
                "double bos",
                f"the text already starts with {self.bos_token!r} and a second one is put in front; pass "
                "add_special_tokens=False, or let apply_chat_template tokenize",
            )

    # -- padding of what is encoded already ----------------------------------------------------------------------
    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad a dict of columns, or a list of dicts (a data collator's batch). `labels` are left as they are."""
        if isinstance(encoded_inputs, (list, tuple)):
            if not encoded_inputs:
                raise TokenizerError("pad() got an empty list; pass at least one row")
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        columns = {name: _to_list(column) for name, column in encoded_inputs.items()}
        ids = columns.get("input_ids")
        if ids is None:
            raise TokenizerError(f"pad() needs 'input_ids'; got {', '.join(columns) or 'no columns'}")
        single = not ids or not isinstance(ids[0], (list, tuple))
        if single:
            columns = {name: [column] for name, column in columns.items()}
        columns = {name: [_to_list(row) for row in rows] for name, rows in columns.items()}
        if return_attention_mask is not False and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        self._pad(columns, batching.padding_of(padding), max_length, pad_to_multiple_of, padding_side)
        if single and return_tensors is None:
            columns = {name: rows[0] for name, rows in columns.items()}
        return BatchEncoding(columns, tensor_type=return_tensors, is_fast=self.is_fast)

    def _pad(
        self,
        columns: dict[str, list[Any]],
        padding: batching.Padding,
        max_length: int | None,
        multiple: int | None,
        side: str | None,
    ) -> int | None:
        """Pad in place; the length reached, None where nothing is padded."""
        rows = columns["input_ids"]
        if padding == "do_not_pad" or not rows:
            return None
        if max_length is None and self.model_max_length < VERY_LARGE:
            max_length = self.model_max_length
        length = batching.target_length(max(map(len, rows)), padding, max_length, multiple)
        if self.pad_token_id is None:
            raise TokenizerError(
                "padding needs a pad token and this tokenizer has none. Set tokenizer.pad_token = tokenizer.eos_token, "
                "or tokenizer.add_special_tokens({'pad_token': '[PAD]'}) and resize the model's embeddings"
            )
        side = batching.check_side("padding_side", side or self.padding_side)
        batching.pad_columns(columns, length, side, {"input_ids": self.pad_token_id})
        return length

    # -- decoding ------------------------------------------------------------------------------------------------
    @property
    def _pieces(self) -> PieceTable:
        if self._table is None:
            self._table = self._make_table()
        return self._table

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
    ) -> Any:
        """The text of ids (int, list, array or tensor); a list of texts for a list of lists."""
        ids = _to_list(token_ids)
        if ids and isinstance(ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        if skip_special_tokens:
            special = self._skippable
            ids = [i for i in ids if i not in special]
        if spaces_between_special_tokens:
            text = self._decode_spaced(ids)
        else:
            text = self._pieces.decode(ids)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return clean_up_tokenization(text) if clean else text

    def _decode_spaced(self, ids: list[int]) -> str:
        parts: list[list[int]] = [[]]
        for i in ids:
            parts.extend(([i], [])) if i in self._skippable else parts[-1].append(i)
        return " ".join(self._pieces.decode(part) for part in parts if part)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in _to_list(sequences)]

    def stream_decoder(
        self, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> StreamDecoder:
        """Incremental `decode`: feed ids as they come, get text that never loses a space or splits a character."""
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return StreamDecoder(self._pieces, self._skippable if skip_special_tokens else frozenset(), clean)

    @property
    def _skippable(self) -> frozenset[int]:
        if self._skip is None:
            marked = (i for i, token in self._added.values() if token.special)
            self._skip = frozenset([*marked, *self.all_special_ids])
        return self._skip

    _skip: frozenset[int] | None = None

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The piece of an id, or the pieces of a list: "▁Hello", "<0x0A>"."""
        values = _to_list(ids)
        if isinstance(ids, int) or getattr(ids, "ndim", None) == 0:
            return self._id_token(values[0])
        return [self._id_token(i) for i in values if not (skip_special_tokens and i in self._skippable)]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a piece, or those of a list; an unknown piece gives the id of the unknown token, if any."""
        if tokens is None:
            return None
        if isinstance(tokens, str):
            found = self._token_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of pieces; a piece outside the vocabulary stands for itself."""
        known = [self._token_id(token) for token in tokens]
        if None not in known:
            return self._pieces.decode([i for i in known if i is not None])
        return "".join(tokens).replace("▁", " ").removeprefix(" ")

    # -- object --------------------------------------------------------------------------------------------------
    @property
    def max_len_single_sentence(self) -> int:
        """model_max_length less the special tokens of one text."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """model_max_length less the special tokens of a pair."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def __len__(self) -> int:
        return max([self.vocab_size, *(i + 1 for i, _ in self._added.values())])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, len={len(self)}, "
            f"padding_side={self.padding_side!r}, special_tokens={self.special_tokens_map})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def _changed(self) -> None:
        self._table = self._skip = None


class _Call:
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
        self.specials = add_special_tokens and not isinstance(text, ChatPrompt)
        split = tok.split_special_tokens if split_special_tokens is None else split_special_tokens
        self.keep_special = not split
        self.padding = batching.padding_of(padding)
        self.max_length, self.truncation = self._limit(truncation, max_length)
        self.stride, self.multiple, self.side = stride, pad_to_multiple_of, padding_side
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
            self.tok._warn("implicit truncation", "max_length without truncation=True: truncating to it all the same")
            strategy = "longest_first"
        if max_length is None and strategy != "do_not_truncate":
            if self.tok.model_max_length < VERY_LARGE:
                max_length = self.tok.model_max_length
            else:
                self.tok._warn("no limit", "truncation=True without max_length, and the model has none: nothing is cut")
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
            raise TokenizerError(f"text must be {_ACCEPTED}; got {type(text).__name__}")
        elif pair is not None:
            if not isinstance(pair, (list, tuple)) or len(pair) != len(text):
                raise TokenizerError(f"{len(text)} texts need as many text_pairs, as a list")
            rows = list(zip(text, pair))
        else:
            rows = [row if self._is_pair(row) else (row, None) for row in text]
        for row in rows:
            for value in row:
                self._check(value)
        return single, rows

    def _is_pair(self, row: Any) -> bool:
        kinds: Any = (list, tuple) if self.words else str
        return isinstance(row, (list, tuple)) and len(row) == 2 and all(isinstance(part, kinds) for part in row)

    def _check(self, value: Any) -> None:
        if value is None or (isinstance(value, str) and not self.words):
            return
        if self.words and isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
            return
        raise TokenizerError(f"text must be {_ACCEPTED}; got {type(value).__name__} {str(value)[:60]!r}")

    def run(self) -> BatchEncoding:
        plain = self.given is None and not self.words and self.truncation == "do_not_truncate"
        extra = self.offsets or self.special_mask or self.types or self.overflow
        if plain and not extra and all(pair is None for _, pair in self.rows):
            columns = self._plain_columns()
        else:
            columns = self._columns(self._encodings(detail=self.offsets))
        self._warn_long(columns["input_ids"])
        tok = self.tok
        length = tok._pad(columns, self.padding, self.max_length, self.multiple, self.side)
        if self.length:
            columns["length"] = [len(row) for row in columns["input_ids"]]
        single = self.single and not self.overflow
        data = {k: v[0] for k, v in columns.items()} if single and self.tensors is None else dict(columns)
        alignment = self._alignment(length) if self.given is None else None
        pairs = bool(self.rows) and self.rows[0][1] is not None
        return BatchEncoding(data, alignment, self.tensors, n_sequences=1 + pairs, is_fast=tok.is_fast)

    def _plain_columns(self) -> dict[str, list[Any]]:
        rows = self.tok._encode_ids([text for text, _ in self.rows], self.keep_special)
        if self.specials:
            if rows:
                self.tok._warn_double_bos(rows[0])
            before, after = self.tok._template.around()
            if before or after:
                rows = [before + row + after for row in rows]
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
            found = iter(self.tok._encode_segments(texts, self.keep_special))
        else:
            found = iter([Segment(ids) for ids in self.tok._encode_ids(texts, self.keep_special)])
        if not self.words:
            return [(next(found), None if pair is None else next(found)) for _, pair in self.rows]
        return [
            (_join([next(found) for _ in text]), None if pair is None else _join([next(found) for _ in pair]))
            for text, pair in self.rows
        ]

    def _encodings(self, detail: bool) -> list[list[Encoding]]:
        """For each row passed in, its encodings: one, or with overflow several."""
        template = self.tok._template
        out = []
        for a, b in self.given or self._segments(detail):
            added = template.added(b is not None) if self.specials else 0
            room = (self.max_length or 0) - added
            side = batching.check_side("truncation_side", self.tok.truncation_side)
            cut = batching.truncate(a, b, room, self.truncation, self.stride, side)
            out.append([self._assemble(template, x, y) for x, y in (cut if self.overflow else cut[:1])])
        return out

    def _assemble(self, template: Template, a: Segment, b: Segment | None) -> Encoding:
        row = Encoding([], [], [], [], [], [])
        parts: Sequence[Part] = template.single if b is None else template.pair
        for part in parts:
            if part.kind == "special":
                segment, sequence, special = Segment(list(part.ids)), None, 1
                if not self.specials:
                    continue
            else:
                segment, sequence, special = (a, 0, 0) if part.kind == "A" else (b or Segment([]), 1, 0)
            n = len(segment.ids)
            row.ids += segment.ids
            row.type_ids += [part.type_id] * n
            row.special_tokens_mask += [special] * n
            row.sequence_ids += [sequence] * n
            row.offsets += segment.offsets or [(0, 0)] * n
            row.word_ids += segment.words or [None] * n
        row.tokens = [self.tok._id_token(i) for i in row.ids] if a.offsets is not None else []
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
            self.tok._warn("too long", f"{longest} tokens are more than the model's {limit}; use truncation=True")


def _join(segments: list[Segment]) -> Segment:
    joined = Segment([], [], [])
    for word, segment in enumerate(segments):
        joined.ids += segment.ids
        joined.offsets = (joined.offsets or []) + (segment.offsets or [(0, 0)] * len(segment.ids))
        joined.words = (joined.words or []) + [word] * len(segment.ids)
    return joined


def _to_list(values: Any) -> list[Any]:
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
