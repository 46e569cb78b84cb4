"""LlamaTokenizer: sentencepiece encodes the text, Python finds the added tokens around it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2.errors import TokenizerError
from llama2.tokenizer.added import AddedToken, TokenMatcher
from llama2.tokenizer.base import PreTrainedTokenizer
from llama2.tokenizer.convert import add_to_backend, backend_from_spm
from llama2.tokenizer.encoding import Segment
from llama2.tokenizer.exact import SentencePieceEncoder
from llama2.tokenizer.files import arguments_of
from llama2.tokenizer.prefix import Prefix, fit, matchers, prefix_of
from llama2.tokenizer.sentencepiece_model import BYTE, SentencePieceModel
from llama2.tokenizer.special import TokenLike
from llama2.tokenizer.stream import EACH_BYTE, PieceTable


class LlamaTokenizer(PreTrainedTokenizer):
    """The sentencepiece tokenizer of Llama 2.

    vocab_file: path of tokenizer.model (or a parsed SentencePieceModel). Other arguments as in `transformers`.
    """

    backend = "sentencepiece"
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
        add_prefix_space: bool | None = None,
        **kwargs: Any,
    ):
        self.init_kwargs = arguments_of(locals())
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
        self.space_prefix: Prefix = kwargs.pop("prefix", None) or prefix_of(
            legacy, add_prefix_space, self._vocab.add_dummy_prefix
        )
        self._ids: dict[str, int] = {piece: i for i, piece in enumerate(self._vocab.pieces)}
        self._matchers: tuple[TokenMatcher, TokenMatcher] | None = None
        self._exact: SentencePieceEncoder | None = None
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
        """The `sentencepiece.SentencePieceProcessor`; with legacy=False the one without a dummy space."""
        return self._encoder.processor(self.space_prefix == "every")

    @property
    def _encoder(self) -> SentencePieceEncoder:
        if self._exact is None:
            self._exact = SentencePieceEncoder(self._vocab, self.space_prefix, self._matching, self.sp_model_kwargs)
        return self._exact

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_exact": None, "_matchers": None}

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

    def piece_of_id(self, token_id: int) -> str:
        if 0 <= token_id < len(self._vocab.pieces):
            return self._vocab.pieces[token_id]
        if token_id not in self._added_ids:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {len(self)} tokens")
        return self._added_ids[token_id]

    def _has_piece(self, token_id: int) -> bool:
        return token_id < len(self._vocab.pieces) or token_id in self._added_ids

    def _register(self, tokens: Sequence[AddedToken]) -> int:
        new, size = 0, len(self)
        for token in tokens:
            known = self._added.get(token.content)
            if known is not None:
                self._added[token.content] = (known[0], known[1].replaced_by(fit(token, self.space_prefix)))
                continue
            base = self._ids.get(token.content)
            token_id = size + new if base is None else base
            new += base is None
            self._added[token.content] = (token_id, fit(token, self.space_prefix))
        self._by_id = None
        return new

    def _changed(self) -> None:
        super()._changed()
        self._matchers = None

    # -- encoding ------------------------------------------------------------------------------------------------
    def _matching(self) -> tuple[TokenMatcher, TokenMatcher]:
        """(tokens looked up in the raw text, tokens looked up in the normalised text)."""
        if self._matchers is None:
            self._matchers = matchers(self._added, self.space_prefix)
        return self._matchers

    def encode_texts(self, texts: list[str], keep_special: bool) -> list[list[int]]:
        return self._encoder.ids(texts, keep_special)

    def encode_segments(self, texts: list[str], keep_special: bool) -> list[Segment]:
        return self._encoder.segments(texts, keep_special)

    def _encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        return self._encoder.parts(parts)

    def _encode_inside(self, text: str) -> list[int]:
        return self._encoder.inside(text)

    # -- decoding ------------------------------------------------------------------------------------------------
    def _make_table(self) -> PieceTable:
        added = dict(self._added.values())
        raw = frozenset(i for i, kind in enumerate(self._vocab.types) if kind == BYTE)

        def piece_bytes(token_id: int) -> bytes:
            if token_id in added:
                return added[token_id].content.encode()
            if token_id in raw:
                return bytes([int(self._vocab.pieces[token_id][1:-1], 16)])
            if not self._has_piece(token_id):
                return b""
            return self.piece_of_id(token_id).replace("▁", " ").encode()

        strip = self.space_prefix != "never" or self._vocab.remove_extra_whitespaces
        return PieceTable(piece_bytes, strip=strip, errors=EACH_BYTE, raw_bytes=raw)

    # -- files ---------------------------------------------------------------------------------------------------
    def _document(self) -> dict[str, Any]:
        """The fast tokenizer's file."""
        backend = backend_from_spm(self._vocab, self.space_prefix)
        add_to_backend(backend, self.added_tokens_decoder.values())
        document: dict[str, Any] = json.loads(backend.to_str())
        return document
