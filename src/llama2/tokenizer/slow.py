"""LlamaTokenizer: sentencepiece encodes the text, Python finds the added tokens around it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2.errors import TokenizerError
from llama2.tokenizer.added import AddedToken, TokenMatcher
from llama2.tokenizer.contract import PreTrainedTokenizer
from llama2.tokenizer.convert import add_to_backend, backend_from_spm
from llama2.tokenizer.encoding import Segment, Span
from llama2.tokenizer.prefix import SPACES, Prefix, added_bytes, fit, matchers, normalize, prefix_of, surrogate_message
from llama2.tokenizer.special import TokenLike
from llama2.tokenizer.spm import BYTE, SentencePieceModel
from llama2.tokenizer.stream import EACH_BYTE, PieceTable
from llama2.tokenizer.words import WordMemory, cuts_hold


class LlamaTokenizer(PreTrainedTokenizer):
    """The sentencepiece tokenizer of Llama 2.

    vocab_file: path of tokenizer.model (or a parsed SentencePieceModel). Other arguments as in `transformers`.
    """

    padding_side = "right"
    truncation_side = "right"
    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - the name and type users of HF read

    def __init__(
        self,
        vocab_file: str | Path | SentencePieceModel | None = None,
        unk_token: TokenLike | None = "<unk>",
        bos_token: TokenLike | None = "<s>",
        eos_token: TokenLike | None = "</s>",
        pad_token: TokenLike | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        use_default_system_prompt: bool = False,
        spaces_between_special_tokens: bool = False,
        legacy: bool | None = None,
        add_prefix_space: bool | None = True,
        **kwargs: Any,
    ):
        if vocab_file is None:
            raise TokenizerError(
                "Cannot load the tokenizer: vocab_file is 'None'. Pass the path of tokenizer.model; a folder that has "
                "only tokenizer.json loads with LlamaTokenizerFast"
            )
        self._vocab = (
            vocab_file if isinstance(vocab_file, SentencePieceModel) else SentencePieceModel.from_file(vocab_file)
        )
        self._spm = self._vocab.check_llama()
        self.vocab_file = None if isinstance(vocab_file, SentencePieceModel) else str(vocab_file)
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        self._prefix: Prefix = kwargs.pop("prefix", None) or prefix_of(legacy, add_prefix_space)
        self._ids: dict[str, int] = {piece: i for i, piece in enumerate(self._vocab.pieces)}
        self._processors: dict[bool, Any] = {}
        self._matchers: tuple[TokenMatcher, TokenMatcher] | None = None
        self._memory: WordMemory | None = None
        # sampled segmentation is drawn anew at each call: nothing to remember
        self._cuts_hold = not self.sp_model_kwargs and cuts_hold(self._vocab.pieces)
        self._added = {}
        self._setup(
            tokens={"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token},
            ends=(add_bos_token, add_eos_token),
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            use_default_system_prompt=use_default_system_prompt,
            spaces_between_special_tokens=spaces_between_special_tokens,
            **kwargs,
        )

    @property
    def sp_model(self) -> Any:
        """The `sentencepiece.SentencePieceProcessor`."""
        return self._processor(True)

    def _processor(self, dummy_prefix: bool) -> Any:
        if dummy_prefix not in self._processors:
            import sentencepiece

            fits = dummy_prefix == self._vocab.add_dummy_prefix
            model = self._vocab if fits else replace(self._vocab, add_dummy_prefix=dummy_prefix, raw=b"")
            loaded = sentencepiece.SentencePieceProcessor(model_proto=model.to_bytes(), **self.sp_model_kwargs)
            self._processors[dummy_prefix] = loaded
        return self._processors[dummy_prefix]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_processors": {}, "_matchers": None, "_memory": None}

    # -- vocabulary ----------------------------------------------------------------------------------------------
    @property
    def vocab_size(self) -> int:
        """Pieces of the SentencePiece model (32,000 for Llama 2)."""
        return len(self._vocab.pieces)

    def get_vocab(self) -> dict[str, int]:
        """Every token -> id, added ones included."""
        return {**self._ids, **self.added_tokens_encoder}

    def _token_id(self, token: str) -> int | None:
        entry = self._added.get(token)
        return self._ids.get(token) if entry is None else entry[0]

    def _id_token(self, token_id: int) -> str:
        if 0 <= token_id < len(self._vocab.pieces):
            return self._vocab.pieces[token_id]
        if token_id not in self._added_ids:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {len(self)} tokens")
        return self._added_ids[token_id]

    def _register(self, tokens: Sequence[AddedToken]) -> int:
        new, size = 0, len(self)
        for token in tokens:
            known = self._added.get(token.content)
            if known is not None:
                self._added[token.content] = (known[0], known[1].merged(token))
                continue
            base = self._ids.get(token.content)
            token_id = size + new if base is None else base
            new += base is None
            self._added[token.content] = (token_id, fit(token, self._prefix))
        self._by_id = None
        return new

    def _changed(self) -> None:
        super()._changed()
        self._matchers = None

    # -- encoding ------------------------------------------------------------------------------------------------
    @property
    def _matching(self) -> tuple[TokenMatcher, TokenMatcher]:
        """(tokens looked up in the raw text, tokens looked up in the normalised text)."""
        if self._matchers is None:
            self._matchers = matchers(self._added, self._prefix)
        return self._matchers

    def _encode_ids(self, texts: list[str], keep_special: bool) -> list[list[int]]:
        try:
            memory = self._words
            return [
                self._encode_one(text, keep_special) if memory is None or self._has_added(text) else memory.ids(text)
                for text in texts
            ]
        except RuntimeError as error:
            raise TokenizerError(surrogate_message(texts)) from error

    @property
    def _words(self) -> WordMemory | None:
        if self._memory is None and self._cuts_hold:
            self._memory = WordMemory(self._processor(False).encode, self._prefix)
        return self._memory

    def _has_added(self, text: str) -> bool:
        raw, late = self._matching
        return raw.any_in(text) or (bool(late) and late.any_in(normalize(text, self._prefix)))

    def _encode_one(self, text: str, keep_special: bool) -> list[int]:
        plain = self._processor(False)
        ids: list[int] = []
        for token_id, piece, _, _ in self._split(text, keep_special):
            if token_id is None:
                ids += plain.encode(piece)
            else:
                ids.append(token_id)
        return ids

    def _split(self, text: str, keep_special: bool) -> Iterator[tuple[int | None, str, int, int]]:
        """(id, "", start, stop) of an added token, or (None, text with its "▁", start, stop); places in `text`."""
        raw, late = self._matching
        for token_id, start, stop in raw.split(text, keep_special):
            if token_id is not None:
                yield token_id, "", start, stop
                continue
            normal = normalize(text[start:stop], self._prefix)
            shift = start - (len(normal) - (stop - start))  # the "▁" in front has no character of its own
            for inner_id, first, last in late.split(normal, keep_special):
                if inner_id is not None:
                    yield inner_id, "", max(start, first + shift), last + shift
                    continue
                piece, low = normal[first:last], max(start, first + shift)
                # the first stretch of the whole text, as Metaspace tells it: by its place, and not by its order
                if self._prefix in ("first", "metaspace") and low == 0 and not piece.startswith(SPACES):
                    piece = "▁" + piece
                yield None, piece, low, last + shift

    def _encode_segments(self, texts: list[str], keep_special: bool) -> list[Segment]:
        try:
            return [self._encode_segment(text, keep_special) for text in texts]
        except RuntimeError as error:
            raise TokenizerError(surrogate_message(texts)) from error

    def _encode_segment(self, text: str, keep_special: bool) -> Segment:
        ids: list[int] = []
        offsets: list[Span] = []
        words: list[int | None] = []
        word = -1
        for token_id, piece, low, stop in self._split(text, keep_special):
            if token_id is not None:
                found, spans, shift = [token_id], [(0, stop - low)], low
            else:
                found = self._processor(False).encode(piece)
                spans, shift = list(self._spans(found, piece)), stop - len(piece)
            for i, (first, last) in enumerate(spans):
                begins = first == 0 or (piece[first] in SPACES and piece[first - 1] not in SPACES)
                word += begins and (i == 0 or spans[i - 1] != (first, last))
                # a virtual "▁" has no character: it is given the one behind it
                offsets.append((max(low, first + shift), max(low + 1, last + shift)))
                words.append(word)
            ids += found
        return Segment(ids, offsets, words)

    def _spans(self, ids: list[int], text: str) -> Iterator[Span]:
        """The characters of `text` that each id covers; all bytes of a character cover it whole."""
        at = left = 0
        for token_id in ids:
            if self._vocab.types[token_id] != BYTE:
                at, left = at + len(self._vocab.pieces[token_id]), 0
                yield at - len(self._vocab.pieces[token_id]), at
                continue
            if left == 0:
                at, left = at + 1, len(text[at].encode("utf-8"))
            left -= 1
            yield at - 1, at

    def _encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif i == 0 or self._prefix in ("every", "never"):
                ids += self._encode_one(part, keep_special=False)
            else:
                ids += self._processor(False).encode(part)
        return ids

    # -- decoding ------------------------------------------------------------------------------------------------
    def _make_table(self) -> PieceTable:
        added = dict(self._added.values())
        raw = frozenset(i for i, kind in enumerate(self._vocab.types) if kind == BYTE)

        def piece_bytes(token_id: int) -> bytes:
            if token_id in added:
                return added_bytes(added[token_id], self._prefix)
            if token_id in raw:
                return bytes([int(self._vocab.pieces[token_id][1:-1], 16)])
            return self._id_token(token_id).replace("▁", " ").encode()

        return PieceTable(piece_bytes, strip=self._prefix != "never", errors=EACH_BYTE, raw_bytes=raw)

    # -- files ---------------------------------------------------------------------------------------------------
    def _document(self) -> dict[str, Any]:
        """The fast tokenizer's file."""
        backend = backend_from_spm(self._vocab, self._prefix)
        add_to_backend(backend, self.added_tokens_decoder.values())
        document: dict[str, Any] = json.loads(backend.to_str())
        return document
