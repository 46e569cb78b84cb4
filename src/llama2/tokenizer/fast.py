"""LlamaTokenizerFast: the `tokenizers` package encodes; also the class for byte-level BPE (Llama 3, SmolLM2)."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from llama2.errors import CheckpointError, TokenizerError
from llama2.text_file import LISTING_BYTES, read_bytes, shown
from llama2.tokenizer.added import AddedToken, TokenMatcher
from llama2.tokenizer.base import PreTrainedTokenizer
from llama2.tokenizer.convert import add_to_backend, backend_from_spm, state_of
from llama2.tokenizer.encoding import Segment
from llama2.tokenizer.exact import SentencePieceEncoder
from llama2.tokenizer.files import arguments_of
from llama2.tokenizer.post_processor import BARE, ends_of, template_from_json
from llama2.tokenizer.prefix import (
    Prefix,
    components,
    fit,
    matchers,
    normalize,
    prefix_of,
    recognise,
    surrogate_message,
)
from llama2.tokenizer.sentencepiece_model import SentencePieceModel
from llama2.tokenizer.special import TokenLike
from llama2.tokenizer.stream import EACH_BYTE, PieceTable, gpt2_byte_alphabet
from llama2.tokenizer.trial import Trial, checked, gave_up, is_panic, unknown
from llama2.tokenizer.word_cache import WordMemory, cuts_hold

# Characters of one text that are encoded with the interpreter's lock held, which costs 20 us less than giving it up.
AT_ONCE = 4096


class LlamaTokenizerFast(PreTrainedTokenizer):
    """The Rust tokenizer of Llama models.

    vocab_file: tokenizer.model (path or parsed model); tokenizer_file: tokenizer.json, whose behaviour is kept as it
    is unless `legacy`, `add_prefix_space` or `from_slow=True` asks for tokenizer.model; tokenizer_object: a
    `tokenizers.Tokenizer`. Where merge ranks cannot express tokenizer.model, sentencepiece encodes, said once.
    """

    is_fast = True
    backend = "tokenizers"
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
        from_slow: bool = False,
        pad_token: TokenLike | None = None,
        **kwargs: Any,
    ):
        self.init_kwargs = arguments_of(locals())
        self._spm: SentencePieceModel | None = vocab_file if isinstance(vocab_file, SentencePieceModel) else None
        self.vocab_file = None if vocab_file is None or self._spm else str(vocab_file)
        self._exact: SentencePieceEncoder | None = None
        self._memory: WordMemory | None = None
        prefix = kwargs.pop("prefix", None)
        asked = prefix or from_slow or (legacy is not None or add_prefix_space is not None)
        if tokenizer_object is not None:
            self._adopt(tokenizer_object)
        elif tokenizer_file is not None and not (asked and vocab_file is not None):
            self._adopt(_read(Path(tokenizer_file)))
        elif vocab_file is not None:
            model = self._model()
            prefix = prefix or prefix_of(legacy, add_prefix_space, model.add_dummy_prefix)
            self._adopt(backend_from_spm(model, prefix))
        else:
            raise TokenizerError(
                "Cannot load the tokenizer: vocab_file is 'None' and tokenizer_file is 'None'. Pass the path of "
                "tokenizer.model or tokenizer.json"
            )
        if asked and vocab_file is None and self.space_prefix is not None:
            self._restyle(prefix or prefix_of(legacy, add_prefix_space))
        self._reason = self._ranks_fall_short()
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
        if self._reason:
            self.warn_once("beyond ranks", f"{self._reason}: sentencepiece encodes in place of merge ranks")

    def _model(self) -> SentencePieceModel:
        if self._spm is None:
            if self.vocab_file is None:
                raise TokenizerError("this tokenizer was made without a SentencePiece model (tokenizer.model)")
            self._spm = SentencePieceModel.from_file(self.vocab_file)
        return self._spm

    def _ranks_fall_short(self) -> str | None:
        """Why the ranks of the Rust object cannot give the ids of tokenizer.model; None where they do, or without one.

        A tokenizer.json beside a tokenizer.model of another vocabulary, or with spaces of its own, is kept as it is.
        """
        if self.space_prefix is None or (self._spm is None and self.vocab_file is None):
            return None
        model = self._model()
        reason = model.beyond_ranks()
        if reason is None or self._tokenizer.get_vocab(False) != dict(zip(model.pieces, range(len(model.pieces)))):
            return None
        model.check_llama()
        self._memory = None
        return f"merge ranks cannot express this tokenizer.model: {reason}"

    @property
    def _beyond_ranks(self) -> str | None:
        return self._reason

    @property
    def _encoder(self) -> SentencePieceEncoder | None:
        """sentencepiece in place of the Rust object, where that one's ranks fall short."""
        if self._exact is None and self._reason and self.space_prefix is not None:
            self._exact = SentencePieceEncoder(self._model(), self.space_prefix, self._matching, {})
        return self._exact

    def _adopt(self, backend: tokenizers.Tokenizer) -> None:
        """Take the Rust object over: its behaviour is recognised, its tokens listed, its cache helped."""
        if not isinstance(backend.model, models.BPE):
            raise TokenizerError(f"tokenizer.json has a {type(backend.model).__name__} model; Llama tokenizers are BPE")
        backend.no_truncation()
        backend.no_padding()
        decoder, pre = state_of(backend.decoder), state_of(backend.pre_tokenizer)
        self._byte_level = "ByteLevel" in json.dumps(decoder)
        self._strip = '"Strip"' in json.dumps(decoder)
        self.space_prefix: Prefix | None = None if self._byte_level else recognise(state_of(backend.normalizer), pre)
        if not self._byte_level and "ByteFallback" not in json.dumps(decoder):
            raise TokenizerError(
                "tokenizer.json has a decoder that is neither ByteLevel nor SentencePiece's (ByteFallback); "
                "it does not belong to a Llama model"
            )
        self._tokenizer = backend
        self._literals: dict[bool, tokenizers.Tokenizer] = {}
        self._trials: dict[int, Trial] = {}
        self._unknown = unknown(state_of(backend.normalizer), pre) if self.space_prefix is None else []
        self._added = {i.content: (n, _from_rust(i)) for n, i in backend.get_added_tokens_decoder().items()}
        self._find_anywhere()
        self._size = backend.get_vocab_size(with_added_tokens=False)
        self._matchers: tuple[TokenMatcher, TokenMatcher] | None = None
        self._memory = None
        self._cuts_hold = self.space_prefix is not None and cuts_hold(backend.get_vocab(with_added_tokens=False))
        if self.space_prefix is not None and self._cuts_hold:
            self._memory = WordMemory(self._encode_word, self.space_prefix)

    def _find_anywhere(self) -> None:
        """Files of transformers 4 look for added tokens behind the normaliser: at the start of words only."""
        fitted = {content: fit(token, self.space_prefix) for content, (_, token) in self._added.items()}
        add_to_backend(self._tokenizer, [t for content, t in fitted.items() if t != self._added[content][1]])
        self._added = {content: (i, fitted[content]) for content, (i, _) in self._added.items()}

    def _encode_word(self, word: str) -> list[int]:
        if len(word) > AT_ONCE:  # `tokenize` makes an object of each token, all with the interpreter's lock held
            return _ids(self._literal(continuing=True), word)
        return [token.id for token in self._tokenizer.model.tokenize(word)]

    def _has_added(self, text: str) -> bool:
        """Whether an added token may be in the text: then the Rust object takes it as a whole."""
        raw, late = self._matching()
        return raw.any_in(text) or (bool(late) and late.any_in(normalize(text, self.space_prefix or "never")))

    def _matching(self) -> tuple[TokenMatcher, TokenMatcher]:
        """(tokens looked up in the raw text, tokens looked up in the normalised text)."""
        if self._matchers is None:
            self._matchers = matchers(self._added, self.space_prefix or "never")
        return self._matchers

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

    def piece_of_id(self, token_id: int) -> str:
        added = self._added_ids.get(token_id)
        if added is not None:  # the backend would name a normalised token as it is matched: "▁newtok"
            return added
        token: str | None = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {len(self)} tokens")
        return token

    def _has_piece(self, token_id: int) -> bool:
        return token_id in self._added_ids or self._tokenizer.id_to_token(token_id) is not None

    def _register(self, tokens: Sequence[AddedToken]) -> int:
        before = len(self)
        fresh = []
        for token in (fit(token, self.space_prefix) for token in tokens):
            known = self._added.get(token.content)
            entry = token if known is None else known[1].replaced_by(token)
            if known is None or entry != known[1]:
                fresh.append(entry)
        with self._encoding(self._tokenizer, [token.content for token in fresh]):
            add_to_backend(self._tokenizer, fresh)
        self._trials = {}
        for token in fresh:
            self._added[token.content] = (self._tokenizer.token_to_id(token.content) or 0, token)
        self._by_id = None
        return len(self) - before

    def _changed(self) -> None:
        super()._changed()
        self._literals, self._trials = {}, {}
        self._matchers = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_literals": {},
            "_trials": {},
            "_memory": None,
            "_matchers": None,
            "_exact": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        remembers = self._cuts_hold and self.space_prefix and not self._reason
        self._memory = WordMemory(self._encode_word, self.space_prefix) if remembers and self.space_prefix else None

    # -- encoding ------------------------------------------------------------------------------------------------
    def encode_texts(self, texts: list[str], keep_special: bool) -> list[list[int]]:
        if (encoder := self._encoder) is not None:
            return encoder.ids(texts, keep_special)
        backend = self._tokenizer if keep_special else self._literal(continuing=False)
        memory = self._memory
        with self._encoding(backend, texts):
            if memory is not None and not any(map(self._has_added, texts)):
                return [memory.ids(text) for text in texts]
            if len(texts) == 1:
                return [_ids(backend, texts[0])]
            return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_segments(self, texts: list[str], keep_special: bool) -> list[Segment]:
        if (encoder := self._encoder) is not None:
            return encoder.segments(texts, keep_special)
        backend = self._tokenizer if keep_special else self._literal(continuing=False)
        with self._encoding(backend, texts):
            rows = backend.encode_batch(texts, add_special_tokens=False)
        words = [row.word_ids if self.space_prefix is None else _space_words(row.tokens, row.word_ids) for row in rows]
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
        if (encoder := self._encoder) is not None:
            return encoder.parts(parts)
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                continuing = i > 0 and self.space_prefix in ("first", "metaspace")
                ids += self._literal_ids(continuing, part)
        return ids

    def _encode_inside(self, text: str) -> list[int]:
        if (encoder := self._encoder) is not None:
            return encoder.inside(text)
        return self._literal_ids(self.space_prefix is not None, text)

    def _literal_ids(self, continuing: bool, text: str) -> list[int]:
        backend = self._literal(continuing)
        with self._encoding(backend, [text]):
            return _ids(backend, text)

    @contextmanager
    def _encoding(self, backend: tokenizers.Tokenizer, texts: list[str]) -> Iterator[None]:
        """Encodes, and raises what the Rust side raises as one error; unknown patterns are tried on the texts first."""
        if self._unknown and texts:
            if (trial := self._trials.get(id(backend))) is None:
                special = bool(backend.encode_special_tokens)
                trial = self._trials[id(backend)] = Trial(backend.to_str(), self._unknown, special)
            trial(texts)
        try:
            yield
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(surrogate_message(texts)) from error
        except BaseException as error:
            if not is_panic(error):
                raise
            raise TokenizerError(gave_up(str(error), ", ".join(self._unknown) or "a part of it")) from error

    # -- decoding ------------------------------------------------------------------------------------------------
    def _make_table(self) -> PieceTable:
        added = dict(self._added.values())
        if self._byte_level:
            alphabet = gpt2_byte_alphabet()

            def level_bytes(token_id: int) -> bytes:
                if token_id in added:
                    return added[token_id].content.encode()
                if not self._has_piece(token_id):
                    return b""
                piece = self.piece_of_id(token_id)
                known = all(char in alphabet for char in piece)
                return bytes(alphabet[char] for char in piece) if known else piece.encode()

            return PieceTable(level_bytes, strip=False, errors="replace", raw_bytes=frozenset())
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        raw = {i: byte for name, byte in names.items() if (i := self._token_id(name)) is not None}

        def piece_bytes(token_id: int) -> bytes:
            if token_id in added:
                return added[token_id].content.encode()
            if token_id in raw:
                return bytes([raw[token_id]])
            if not self._has_piece(token_id):
                return b""
            return self.piece_of_id(token_id).replace("▁", " ").encode()

        return PieceTable(piece_bytes, strip=self._strip, errors=EACH_BYTE, raw_bytes=frozenset(raw))

    # -- files ---------------------------------------------------------------------------------------------------
    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return document


class PreTrainedTokenizerFast(LlamaTokenizerFast):
    """The name under which byte-level tokenizers (Llama 3, SmolLM2) are saved; it pads on the right."""

    padding_side = "right"


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of one text; a long one without the interpreter's lock, so that no other thread waits for it."""
    if len(text) <= AT_ONCE:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids
    rows: list[list[int]] = [row.ids for row in backend.encode_batch_fast([text], add_special_tokens=False)]
    return rows[0]


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
    try:
        data = read_bytes(path, LISTING_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"no tokenizer at {path}; give the path of a tokenizer.json file") from error
    if _LONG.search(data):
        raise CheckpointError(f"{path} has a text of more than a million bytes; no tokenizer does")
    try:
        return tokenizers.Tokenizer.from_buffer(checked(data))
    except TokenizerError:
        raise
    except BaseException as error:  # the Rust side raises plain Exception, and a panic is not even that
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise CheckpointError(f"{path} is not a tokenizer.json: {shown(str(error))}") from error


_LONG = re.compile(rb'"[^"]{1000000}')
