"""The contract that both tokenizers keep: one call API over one primitive, "these texts as segments of ids"."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, overload

from llama2.errors import TokenizerError
from llama2.tokenizer import batching
from llama2.tokenizer.call import ACCEPTED, VERY_LARGE, TokenizerCall, tensor_kind, to_list, whole
from llama2.tokenizer.chat import ChatPrompt, ChatTemplates
from llama2.tokenizer.encoding import BatchEncoding, Segment
from llama2.tokenizer.interchange import Interchange
from llama2.tokenizer.stream import PieceTable, StreamDecoder, clean_up_tokenization

logger = logging.getLogger(__name__)


class PreTrainedTokenizer(ChatTemplates, Interchange):
    """Text <-> ids. `LlamaTokenizer` (sentencepiece) and `LlamaTokenizerFast` (tokenizers) give the same ids.

    `legacy` True (default) is Meta's behaviour: each stretch of text between special tokens starts with a "▁" of its
    own. False: only the start of the text does. `add_prefix_space=False`: none does.
    """

    model_input_names: list[str]
    padding_side: str
    truncation_side: str
    model_max_length: int
    clean_up_tokenization_spaces: bool
    split_special_tokens: bool
    _warned: set[str]

    # -- what the subclass supplies ------------------------------------------------------------------------------
    @property
    def vocab_size(self) -> int:
        """Size of the base vocabulary, without the tokens added later."""
        raise NotImplementedError

    def encode_texts(self, texts: list[str], keep_special: bool) -> list[list[int]]:
        """The ids of each text, without those of the template; keep_special: special tokens in it are found."""
        raise NotImplementedError

    def encode_segments(self, texts: list[str], keep_special: bool) -> list[Segment]:
        """As `encode_texts`, with offsets and words."""
        raise NotImplementedError

    def _encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Texts taken literally, between ids already known: one text whose special tokens were found by the caller."""
        raise NotImplementedError

    def _encode_inside(self, text: str) -> list[int]:
        """Text taken literally as it stands inside another: nothing is put in front of it."""
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
        **other: Any,
    ) -> BatchEncoding:
        """Encode a text or a batch: `input_ids`, `attention_mask` and the columns asked for.

        One text gives flat lists, a batch gives lists of lists, `return_tensors` gives [B, T] tensors. Overflow comes
        as further rows with `overflow_to_sample_mapping`. `text_target` becomes `labels`.
        """
        options = dict(locals())
        for name in ("self", "text", "text_pair", "text_target", "text_pair_target", "other"):
            del options[name]
        if other.pop("pad_to_max_length", False) and padding is False:  # the old name of padding="max_length"
            options["padding"] = "max_length"
        self._no_effect(other)
        if text is None and text_target is None:
            raise TokenizerError(f"nothing to encode: text is None; pass {ACCEPTED}")
        if text_target is None:
            return TokenizerCall(self, text, text_pair, **options).run()
        target = TokenizerCall(self, text_target, text_pair_target, **options).run()
        if text is None:
            return target
        encoded = TokenizerCall(self, text, text_pair, **options).run()
        encoded["labels"] = target["input_ids"]
        return encoded

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        """The ids of one text or pair; keywords as for a call."""
        if not kwargs and text_pair is None and isinstance(text, str):
            ids = self.encode_texts([text], not self.split_special_tokens)[0]
            if add_special_tokens and not isinstance(text, ChatPrompt):
                self.warn_of_double_bos(ids)
                before, after = self.special_tokens_template.around()
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
        **other: Any,
    ) -> list[str]:
        """The pieces of a text, e.g. ["▁Hello", "▁world"]; with a pair, those of both."""
        options: dict[str, Any] = {
            "add_special_tokens": add_special_tokens,
            "split_special_tokens": split_special_tokens,
        }
        enc = self(text, pair, **options, **other)
        return [self.piece_of_id(i) for i in enc["input_ids"]]

    def prepare_for_model(self, ids: list[int], pair_ids: list[int] | None = None, **kwargs: Any) -> BatchEncoding:
        """Ids of one text or pair, as a call would return them: special tokens, truncation, padding."""
        call = TokenizerCall(self, "", None if pair_ids is None else "", **kwargs)
        call.given = [(Segment(list(ids)), None if pair_ids is None else Segment(list(pair_ids)))]
        return call.run()

    def _no_effect(self, names: Mapping[str, Any]) -> None:
        """One warning for keywords that transformers accepts and that change nothing here."""
        if names:
            told = ", ".join(sorted(names))
            self.warn_once(f"no effect: {told}", f"{told}: no effect on a Llama tokenizer")

    def warn_once(self, key: str, message: str) -> None:
        """Logs a warning, once for each key."""
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)

    def warn_of_double_bos(self, ids: list[int]) -> None:
        """Warns, once, where a text begins with the BOS token that the template puts before it."""
        if self._add_bos and ids and ids[0] == self.bos_token_id:
            self.warn_once(
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
        """Pad a dict of columns, or a list of dicts (a data collator's batch). `labels` are left as they are.

        Tensors and arrays give the same kind back, unless return_tensors says another.
        """
        if isinstance(encoded_inputs, (list, tuple)):
            if not encoded_inputs:
                raise TokenizerError("pad() got an empty list; pass at least one row")
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        columns = {name: to_list(column) for name, column in encoded_inputs.items()}
        return_tensors = return_tensors or tensor_kind(encoded_inputs.get("input_ids"))
        max_length, pad_to_multiple_of = (
            whole("max_length", max_length),
            whole("pad_to_multiple_of", pad_to_multiple_of),
        )
        ids = columns.get("input_ids")
        if ids is None:
            raise TokenizerError(f"pad() needs 'input_ids'; got {', '.join(columns) or 'no columns'}")
        single = not ids or not isinstance(ids[0], (list, tuple))
        if single:
            columns = {name: [column] for name, column in columns.items()}
        columns = {name: [to_list(row) for row in rows] for name, rows in columns.items()}
        if return_attention_mask is not False and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        self.pad_columns(columns, batching.padding_of(padding), max_length, pad_to_multiple_of, padding_side)
        if single and return_tensors is None:
            columns = {name: rows[0] for name, rows in columns.items()}
        return BatchEncoding(columns, tensor_type=return_tensors, is_fast=self.is_fast)

    def pad_columns(
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
        if padding == "max_length" and max_length is None:
            self.warn_once(
                "no length", "padding='max_length' without max_length, and the model has none: nothing is padded"
            )
            return None
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

    @overload
    def decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **other: Any,
    ) -> str: ...

    @overload
    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **other: Any,
    ) -> Any: ...

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **other: Any,
    ) -> Any:
        """The text of ids (int, list, array or tensor); a list of texts for a list of lists.

        An id beyond the vocabulary, as a padded embedding has, gives nothing.
        """
        self._no_effect(other)
        ids = to_list(token_ids)
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
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> list[str]:
        """The text of each row; keywords as for decode."""
        rows = to_list(sequences)
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **options) for row in rows]

    def stream_decoder(
        self, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> StreamDecoder:
        """Incremental `decode`: feed ids as they come, get text that never loses a space or splits a character."""
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return StreamDecoder(self._pieces, self._skippable if skip_special_tokens else frozenset(), clean)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for inside a text."""
        return self._pieces[token_id]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids whose `token_bytes`, joined, are exactly `data`: no special tokens and no space in front.

        Where the pieces of the text say something else (broken UTF-8, "▁" itself, a normalizer), byte tokens do.
        TokenizerError for a byte without a token.
        """
        try:
            ids = self._encode_inside(data.decode())
        except UnicodeDecodeError:
            ids = []
        if b"".join(map(self.token_bytes, ids)) == data:
            return ids
        missing = next((byte for byte in data if byte not in self._byte_ids), None)
        if missing is not None:
            raise TokenizerError(f"the vocabulary has no token for the byte 0x{missing:02X} of {data[:40]!r}")
        return [self._byte_ids[byte] for byte in data]

    @property
    def _byte_ids(self) -> dict[int, int]:
        """byte -> the id that stands for it alone."""
        if self._single_bytes is None:
            table = self._pieces
            alone = [i for i in range(self.vocab_size) if len(table[i]) == 1 and i not in self._skippable]
            alone.sort(key=lambda i: i not in table.raw_bytes, reverse=True)
            self._single_bytes = {table[i][0]: i for i in alone}
        return self._single_bytes

    _single_bytes: dict[int, int] | None = None

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens: what skip_special_tokens skips."""
        return self._skippable

    @property
    def _skippable(self) -> frozenset[int]:
        if self._skip is None:
            marked = (i for i, token in self._added.values() if token.special)
            self._skip = frozenset([*marked, *self.all_special_ids])
        return self._skip

    _skip: frozenset[int] | None = None

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The piece of an id, or the pieces of a list: "▁Hello", "<0x0A>"; None for an id without one, as a model's
        vocabulary that is padded has."""
        values = to_list(ids)
        if isinstance(ids, int) or getattr(ids, "ndim", None) == 0:
            return self._piece(values[0])
        return [self._piece(i) for i in values if not (skip_special_tokens and i in self._skippable)]

    def _piece(self, token_id: int) -> str | None:
        return self.piece_of_id(token_id) if token_id >= 0 and self._has_piece(token_id) else None

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
        """Returns the state without the caches of calls: equal before and after any use, as the hashes of
        datasets' cache need it."""
        return {**self.__dict__, **dict.fromkeys(("_table", "_skip", "_by_id", "_single_bytes"))}

    def _changed(self) -> None:
        self._table = self._skip = None
