"""The interface that other libraries use: older names, training a new vocabulary, and the way to `transformers`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from llama2.errors import MissingDependencyError, TokenizerError
from llama2.tokenizer import batching
from llama2.tokenizer.added import AddedToken
from llama2.tokenizer.encoding import Segment
from llama2.tokenizer.files import Files
from llama2.tokenizer.special import NAMES


class Interchange(Files):
    """Mixin of both classes."""

    pad_token_type_id = 0
    backend: ClassVar[str]  # "sentencepiece" or "tokenizers": transformers 5's word for is_fast
    init_inputs: ClassVar[tuple[Any, ...]] = ()

    def get_vocab(self) -> dict[str, int]:
        """Every token -> id, added ones included."""
        raise NotImplementedError

    @property
    def vocab(self) -> dict[str, int]:
        """`get_vocab()`."""
        return self.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        """Added token -> id, by id; special tokens of the vocabulary are among them."""
        return self.added_tokens_encoder

    @property
    def special_tokens_map_extended(self) -> dict[str, Any]:
        """Role -> `AddedToken` with its flags, for the roles that are set."""
        found: dict[str, Any] = {}
        for name, value in self.special_tokens_map.items():
            found[name] = self._with_flags(value) if isinstance(value, str) else [*map(self._with_flags, value)]
        return found

    @property
    def deprecation_warnings(self) -> dict[str, bool]:
        """Warnings already issued; assign {} to repeat them."""
        return dict.fromkeys(self._warned, True)

    @deprecation_warnings.setter
    def deprecation_warnings(self, names: dict[str, bool]) -> None:
        self._warned = {name for name, said in names.items() if said}

    @property
    def _special_tokens_map(self) -> dict[str, Any]:
        """Read by libraries of transformers' family: every role, None where it is not set."""
        return {**dict.fromkeys(NAMES), **self.special_tokens_map_extended}

    @property
    def all_special_tokens_extended(self) -> list[AddedToken]:
        """`all_special_tokens` with their flags."""
        return [self._with_flags(token) for token in self.all_special_tokens]

    def _with_flags(self, token: str) -> AddedToken:
        known = self._added.get(token)
        return AddedToken(token, special=True) if known is None else known[1]

    def sanitize_special_tokens(self) -> int:
        """Adds the special tokens that are not in the vocabulary; the number of new ids."""
        return self.add_tokens(self.all_special_tokens_extended, special_tokens=True)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """(ids, pair ids, overflow) with so many tokens removed, from the side `truncation_side`.

        The overflow is what was removed and `stride` tokens of what stays; of a pair under "longest_first" it is empty.
        """
        if num_tokens_to_remove <= 0:
            return ids, pair_ids, []
        strategy = batching.truncation_of(truncation_strategy)
        room = len(ids) + len(pair_ids or ()) - num_tokens_to_remove
        second = None if pair_ids is None else Segment(pair_ids)
        a, b = batching.truncate(Segment(ids), second, room, strategy, 0, self.truncation_side)[0]
        overflow: list[int] = []
        if pair_ids is None or strategy != "longest_first":
            whole = ids if len(a.ids) < len(ids) or pair_ids is None else pair_ids
            size = min(len(whole), num_tokens_to_remove + stride)
            overflow = whole[:size] if self.truncation_side == "left" else whole[-size:]
        return a.ids, None if b is None else b.ids, overflow

    # -- to transformers -----------------------------------------------------------------------------------------
    def to_transformers(self) -> Any:
        """An equal `transformers.PreTrainedTokenizerFast`, for libraries that ask for that class (TRL's trainers).

        The same ids, special tokens, limits, sides and chat template. MissingDependencyError without transformers,
        TokenizerError for a tokenizer.model that merge ranks cannot express.
        """
        reason = self._beyond_ranks
        if reason is not None:
            raise TokenizerError(
                f"no tokenizer of transformers has these ids: {reason}; use this class, or its slow one"
            )
        try:
            theirs = importlib.import_module("transformers")
        except ImportError as error:
            raise MissingDependencyError("to_transformers() needs transformers: pip install transformers") from error
        roles = {name: _rust(self._with_flags(token)) for name in NAMES if (token := self._special.get(name))}
        others = {"additional_special_tokens": [_rust(self._with_flags(token)) for token in self._additional]}
        made = theirs.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(self._tokenizer_json())),
            **roles,
            **(others if self._additional else {}),
            chat_template=self.chat_template,
            clean_up_tokenization_spaces=self.clean_up_tokenization_spaces,
            model_input_names=list(self.model_input_names),
            model_max_length=self.model_max_length,
            padding_side=self.padding_side,
            truncation_side=self.truncation_side,
            split_special_tokens=self.split_special_tokens,
        )
        made.name_or_path = self.name_or_path
        return made

    @property
    def _beyond_ranks(self) -> str | None:
        """Returns the part of this tokenizer that tokenizer.json cannot express; None if there is none."""
        return None if self._spm is None or self.space_prefix is None else self._spm.beyond_ranks()

    # -- a new vocabulary ----------------------------------------------------------------------------------------
    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str | list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: list[str | AddedToken] | None = None,
        special_tokens_map: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A fast tokenizer of the same kind whose vocabulary is trained on these texts, or batches of texts.

        Special tokens come first and keep their roles, renamed by special_tokens_map; bytes without a piece of their
        own keep theirs. Other keywords are those of `tokenizers.trainers.BpeTrainer`.
        """
        renamed = dict(special_tokens_map or {})
        document = self._tokenizer_json()
        special = [t for t in self.added_tokens_decoder.values() if t.special]
        names = [renamed.get(token.content, token.content) for token in special]
        names += [str(token) for token in new_special_tokens or ()]
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)] if document["model"].get("byte_fallback") else []
        if vocab_size < len(names) + len(byte_pieces):
            raise TokenizerError(
                f"vocab_size={vocab_size} is less than the {len(names) + len(byte_pieces)} special tokens and bytes"
            )
        trained = _train(document, text_iterator, vocab_size - len(byte_pieces), names, length, kwargs)
        pieces = [*names, *byte_pieces, *(p for p in trained["vocab"] if p not in {*names})]
        document["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
        document["model"]["merges"] = trained["merges"]
        unk = document["model"].get("unk_token")
        document["model"]["unk_token"] = renamed.get(unk, unk)
        document["added_tokens"], document["post_processor"] = [], None
        settings = {name: renamed.get(token, token) for name in NAMES if (token := self._special.get(name))}
        roles = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        own = {"additional_special_tokens": [renamed.get(t, t) for t in self._additional] + names[len(special) :]}
        return _fast_class(type(self))(
            tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(document)),
            **{**settings, **roles, **own},
            add_bos_token=self._add_bos,
            add_eos_token=self._add_eos,
            chat_template=self.chat_template,
            model_max_length=self.model_max_length,
            padding_side=self.padding_side,
            truncation_side=self.truncation_side,
        )


def _rust(token: AddedToken) -> tokenizers.AddedToken:
    flags = {name: bool(value) for name, value in token.to_dict().items() if name != "content"}
    return tokenizers.AddedToken(token.content, **flags)


def _fast_class(cls: type[Any]) -> type[Any]:
    return cls if cls.is_fast else cls._fast_sibling()


def _train(
    document: dict[str, Any],
    texts: Iterable[str | list[str]],
    size: int,
    special: list[str],
    length: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """{"vocab": pieces in the order of their ids, "merges"} of BPE trained behind the tokenizer's own cuts."""
    backend = tokenizers.Tokenizer(models.BPE())
    frame = {**document, "model": json.loads(backend.to_str())["model"], "added_tokens": [], "post_processor": None}
    backend = tokenizers.Tokenizer.from_str(json.dumps(frame))
    level = "ByteLevel" in json.dumps(document["pre_tokenizer"])
    if not level:  # Llama's own cuts are none: pieces that go over several words would take the place of words
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if level else {}
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, **{"show_progress": False, **alphabet, **options}
    )
    backend.train_from_iterator(_flat(texts), trainer=trainer, length=length)
    model = json.loads(backend.to_str())["model"]
    return {"vocab": sorted(model["vocab"], key=model["vocab"].get), "merges": model["merges"]}


def _flat(texts: Iterable[str | list[str]]) -> Iterator[str]:
    for item in texts:
        if isinstance(item, str):
            yield item
        else:
            yield from item
