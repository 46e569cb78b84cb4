"""LlamaTokenizerFast: the `tokenizers` package encodes; also the class for byte-level BPE (Llama 3, SmolLM2)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from llama2.errors import CheckpointError, TokenizerError
from llama2.tokenizer.added import AddedToken, TokenMatcher
from llama2.tokenizer.contract import PreTrainedTokenizer
from llama2.tokenizer.convert import add_to_backend, backend_from_spm, state_of
from llama2.tokenizer.encoding import Segment
from llama2.tokenizer.prefix import (
    Prefix,
    added_bytes,
    components,
    fit,
    matchers,
    normalize,
    prefix_of,
    recognise,
    surrogate_message,
)
from llama2.tokenizer.special import TokenLike
from llama2.tokenizer.spm import SentencePieceModel
from llama2.tokenizer.stream import EACH_BYTE, PieceTable, gpt2_byte_alphabet
from llama2.tokenizer.template import BARE, ends_of, template_from_json
from llama2.tokenizer.words import WordMemory, cuts_hold


class LlamaTokenizerFast(PreTrainedTokenizer):
    """The Rust tokenizer of Llama models.

    vocab_file: tokenizer.model (path or parsed model); tokenizer_file: tokenizer.json, whose behaviour is kept as it
    is unless `legacy` or `add_prefix_space` is given; tokenizer_object: a `tokenizers.Tokenizer`.
    """

    is_fast = True
    padding_side = "left"
    truncation_side = "right"
    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | Path | SentencePieceModel | None = None,
        tokenizer_file: str | Path | None = None,
        clean_up_tokenization_spaces: bool = False,
        unk_token: TokenLike | None = "<unk>",
        bos_token: TokenLike | None = "<s>",
        eos_token: TokenLike | None = "</s>",
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        use_default_system_prompt: bool = False,
        legacy: bool | None = None,
        add_prefix_space: bool | None = None,
        tokenizer_object: tokenizers.Tokenizer | None = None,
        pad_token: TokenLike | None = None,
        **kwargs: Any,
    ):
        self._spm: SentencePieceModel | None = vocab_file if isinstance(vocab_file, SentencePieceModel) else None
        self.vocab_file = None if vocab_file is None or self._spm else str(vocab_file)
        prefix = kwargs.pop("prefix", None)
        asked = prefix or (legacy is not None or add_prefix_space is not None)
        if tokenizer_object is not None:
            self._adopt(tokenizer_object)
        elif tokenizer_file is not None and not (asked and vocab_file is not None):
            self._adopt(_read(Path(tokenizer_file)))
        elif vocab_file is not None:
            self._adopt(backend_from_spm(self._model(), prefix or prefix_of(legacy, add_prefix_space)))
        else:
            raise TokenizerError(
                "Cannot load the tokenizer: vocab_file is 'None' and tokenizer_file is 'None'. Pass the path of "
                "tokenizer.model or tokenizer.json"
            )
        if asked and vocab_file is None and self._prefix is not None:
            self._restyle(prefix or prefix_of(legacy, add_prefix_space))
        if self._byte_level:
            bos_token, eos_token, unk_token = (
                None if token == default and self._tokenizer.token_to_id(default) is None else token
                for token, default in ((bos_token, "<s>"), (eos_token, "</s>"), (unk_token, "<unk>"))
            )
        own = template_from_json(state_of(self._tokenizer.post_processor))
        own_bos, own_eos = (not self._byte_level, False) if own is None else ends_of(own)
        bos = own_bos if add_bos_token is None else add_bos_token
        eos = own_eos if add_eos_token is None else add_eos_token
        self._setup(
            tokens={"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token},
            ends=(bos, eos),
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            use_default_system_prompt=use_default_system_prompt,
            template=(own or (BARE if self._byte_level else None)) if add_bos_token is add_eos_token is None else None,
            **kwargs,
        )

    def _model(self) -> SentencePieceModel:
        if self._spm is None:
            if self.vocab_file is None:
                raise TokenizerError("this tokenizer was made without a SentencePiece model (tokenizer.model)")
            self._spm = SentencePieceModel.from_file(self.vocab_file)
        return self._spm

    def _adopt(self, backend: tokenizers.Tokenizer) -> None:
        """Take the Rust object over: its behaviour is recognised, its tokens listed, its cache helped."""
        if not isinstance(backend.model, models.BPE):
            raise TokenizerError(f"tokenizer.json has a {type(backend.model).__name__} model; Llama tokenizers are BPE")
        backend.no_truncation()
        backend.no_padding()
        decoder, pre = state_of(backend.decoder), state_of(backend.pre_tokenizer)
        self._byte_level = "ByteLevel" in json.dumps(decoder)
        self._strip = '"Strip"' in json.dumps(decoder)
        self._prefix: Prefix | None = None if self._byte_level else recognise(state_of(backend.normalizer), pre)
        if not self._byte_level and "ByteFallback" not in json.dumps(decoder):
            raise TokenizerError(
                "tokenizer.json has a decoder that is neither ByteLevel nor SentencePiece's (ByteFallback); "
                "it does not belong to a Llama model"
            )
        self._tokenizer = backend
        self._literals: dict[bool, tokenizers.Tokenizer] = {}
        self._added = {i.content: (n, _from_rust(i)) for n, i in backend.get_added_tokens_decoder().items()}
        self._size = backend.get_vocab_size(with_added_tokens=False)
        self._matchers: tuple[TokenMatcher, TokenMatcher] | None = None
        self._memory: WordMemory | None = None
        self._cuts_hold = self._prefix is not None and cuts_hold(backend.get_vocab(with_added_tokens=False))
        if self._prefix is not None and self._cuts_hold:
            self._memory = WordMemory(self._encode_word, self._prefix)

    def _encode_word(self, word: str) -> list[int]:
        return [token.id for token in self._tokenizer.model.tokenize(word)]

    def _has_added(self, text: str) -> bool:
        """Whether an added token may be in the text: then the Rust object takes it as a whole."""
        if self._matchers is None:
            self._matchers = matchers(self._added, self._prefix or "never")
        raw, late = self._matchers
        return raw.any_in(text) or (bool(late) and late.any_in(normalize(text, self._prefix or "never")))

    def _restyle(self, prefix: Prefix) -> None:
        """The same vocabulary with another treatment of spaces."""
        document = self._document()
        document.update(components(prefix))
        for entry in document["added_tokens"]:
            entry["normalized"] = prefix == "first"
        self._adopt(tokenizers.Tokenizer.from_str(json.dumps(document)))

    # -- vocabulary ----------------------------------------------------------------------------------------------
    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` that does the work."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Size of the base vocabulary, without the tokens added later."""
        return self._size

    def get_vocab(self) -> dict[str, int]:
        """Every token -> id, added ones included."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def _token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def _id_token(self, token_id: int) -> str:
        added = self._added_ids.get(token_id)
        if added is not None:  # the backend would name a normalised token as it is matched: "▁newtok"
            return added
        token: str | None = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {len(self)} tokens")
        return token

    def _register(self, tokens: Sequence[AddedToken]) -> int:
        before = len(self)
        fresh = []
        for token in (fit(token, self._prefix) for token in tokens):
            known = self._added.get(token.content)
            entry = token if known is None else known[1].merged(token)
            if known is None or entry != known[1]:
                fresh.append(entry)
        add_to_backend(self._tokenizer, fresh)
        for token in fresh:
            self._added[token.content] = (self._tokenizer.token_to_id(token.content) or 0, token)
        self._by_id = None
        return len(self) - before

    def _changed(self) -> None:
        super()._changed()
        self._literals = {}
        self._matchers = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_literals": {}, "_memory": None, "_matchers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._memory = WordMemory(self._encode_word, self._prefix) if self._cuts_hold and self._prefix else None

    # -- encoding ------------------------------------------------------------------------------------------------
    def _encode_ids(self, texts: list[str], keep_special: bool) -> list[list[int]]:
        backend = self._tokenizer if keep_special else self._literal(continuing=False)
        memory = self._memory
        try:
            if memory is not None and not any(map(self._has_added, texts)):
                return [memory.ids(text) for text in texts]
            if len(texts) == 1:
                return [backend.encode(texts[0], add_special_tokens=False).ids]
            return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(surrogate_message(texts)) from error

    def _encode_segments(self, texts: list[str], keep_special: bool) -> list[Segment]:
        backend = self._tokenizer if keep_special else self._literal(continuing=False)
        try:
            rows = backend.encode_batch(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(surrogate_message(texts)) from error
        words = [row.word_ids if self._prefix is None else _space_words(row.tokens, row.word_ids) for row in rows]
        return [Segment(row.ids, row.offsets, found) for row, found in zip(rows, words)]

    def _literal(self, continuing: bool) -> tokenizers.Tokenizer:
        """A copy that takes special tokens for text; `continuing`, one that also puts nothing in front of it.

        A copy, because the switch of the Rust object is not per call: flipping it would race with other threads.
        """
        if continuing not in self._literals:
            copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            copy.encode_special_tokens = True
            if continuing:
                state = components("never")
                copy.normalizer = tokenizers.normalizers.Replace(state["normalizer"]["pattern"]["String"], "▁")
                copy.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([])
            self._literals[continuing] = copy
        return self._literals[continuing]

    def _encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                continuing = i > 0 and self._prefix in ("first", "metaspace")
                ids += self._literal(continuing).encode(part, add_special_tokens=False).ids
        return ids

    # -- decoding ------------------------------------------------------------------------------------------------
    def _make_table(self) -> PieceTable:
        added = dict(self._added.values())
        if self._byte_level:
            alphabet = gpt2_byte_alphabet()

            def level_bytes(token_id: int) -> bytes:
                if token_id in added:
                    return added[token_id].content.encode()
                piece = self._id_token(token_id)
                known = all(char in alphabet for char in piece)
                return bytes(alphabet[char] for char in piece) if known else piece.encode()

            return PieceTable(level_bytes, strip=False, errors="replace", raw_bytes=frozenset())
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        raw = {i: byte for name, byte in names.items() if (i := self._token_id(name)) is not None}

        def piece_bytes(token_id: int) -> bytes:
            if token_id in added:
                return added_bytes(added[token_id], self._prefix)
            if token_id in raw:
                return bytes([raw[token_id]])
            return self._id_token(token_id).replace("▁", " ").encode()

        return PieceTable(piece_bytes, strip=self._strip, errors=EACH_BYTE, raw_bytes=frozenset(raw))

    # -- files ---------------------------------------------------------------------------------------------------
    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return document


def _space_words(tokens: list[str], splits: list[int | None]) -> list[int | None]:
    """Words that begin at spaces; the backend knows only the stretches between added tokens."""
    words: list[int | None] = []
    word = -1
    for i, token in enumerate(tokens):
        starts = i == 0 or splits[i] != splits[i - 1]
        word += starts or (token.startswith("▁") and not tokens[i - 1].endswith("▁"))
        words.append(word)
    return words


def _from_rust(token: Any) -> AddedToken:
    return AddedToken(token.content, token.single_word, token.lstrip, token.rstrip, token.special, token.normalized)


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"no tokenizer at {path}; give the path of a tokenizer.json file")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer.json: {error}") from error
