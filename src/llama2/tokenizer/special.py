"""Special and added tokens: names, ids, setters, and growing the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, overload

from llama2.errors import TokenizerError
from llama2.tokenizer.added import AddedToken, as_added_token
from llama2.tokenizer.post_processor import Template, llama_template

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TokenLike = str | AddedToken | dict[str, Any]


class _Token:
    """`tokenizer.bos_token` and its siblings: the string or None; assign a string that the vocabulary has."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, obj: None, owner: type) -> _Token: ...
    @overload
    def __get__(self, obj: SpecialTokens, owner: type) -> str | None: ...
    def __get__(self, obj: SpecialTokens | None, owner: type) -> _Token | str | None:
        return self if obj is None else obj._special.get(self.name)

    def __set__(self, obj: SpecialTokens, value: TokenLike | None) -> None:
        obj._set_special(self.name, value)


class _TokenId:
    """`tokenizer.bos_token_id` and its siblings: the id or None; assign an id."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    @overload
    def __get__(self, obj: None, owner: type) -> _TokenId: ...
    @overload
    def __get__(self, obj: SpecialTokens, owner: type) -> int | None: ...
    def __get__(self, obj: SpecialTokens | None, owner: type) -> _TokenId | int | None:
        if obj is None:
            return self
        token = obj._special.get(self.name)
        return None if token is None else obj._token_id(token)

    def __set__(self, obj: SpecialTokens, value: int | None) -> None:
        obj._set_special(self.name, None if value is None else obj.piece_of_id(value))


class SpecialTokens:
    """Mixin of both classes. The subclass looks tokens up and registers new ones."""

    SPECIAL_TOKENS_ATTRIBUTES = (*NAMES, "additional_special_tokens")

    bos_token, eos_token, unk_token = _Token(), _Token(), _Token()
    sep_token, pad_token, cls_token, mask_token = _Token(), _Token(), _Token(), _Token()
    bos_token_id, eos_token_id, unk_token_id = _TokenId(), _TokenId(), _TokenId()
    sep_token_id, pad_token_id, cls_token_id, mask_token_id = _TokenId(), _TokenId(), _TokenId(), _TokenId()

    _special: dict[str, str | None]
    _additional: list[str]
    _added: dict[str, tuple[int, AddedToken]]
    special_tokens_template: Template
    _add_bos: bool
    _add_eos: bool

    # what the subclass supplies
    def _token_id(self, token: str) -> int | None:
        raise NotImplementedError

    def _has_piece(self, token_id: int) -> bool:
        raise NotImplementedError

    def piece_of_id(self, token_id: int) -> str:
        """The piece of one id, which must have one."""
        raise NotImplementedError

    def _register(self, tokens: Sequence[AddedToken]) -> int:
        """Add the tokens that are new; the number of ids that this made."""
        raise NotImplementedError

    def _changed(self) -> None:
        """Drop what was derived from the set of tokens."""
        raise NotImplementedError

    def _set_special(self, name: str, value: TokenLike | None) -> None:
        token = None if value is None or value == "" else self._as_added(value, True)
        if token is not None and self._token_id(token.content) is None:
            raise TokenizerError(
                f"{name} = {token.content!r} is not in the vocabulary, its id would be unknown; "
                f"use add_special_tokens({{{name!r}: {token.content!r}}}) and resize the model's embeddings"
            )
        if token is not None:
            self._mark_special(token)
        self._special[name] = None if token is None else token.content
        self._changed()

    def _mark_special(self, token: AddedToken) -> None:
        known = self._added.get(token.content)
        if known is None or not known[1].special:
            self._register([token])

    @property
    def additional_special_tokens(self) -> list[str] | None:
        """Special tokens without a role of their own; None after they were set to None."""
        return list(self._additional) if self._additional or not self._additional_off else None

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[TokenLike] | None) -> None:
        self._additional = []
        self.add_special_tokens({"additional_special_tokens": list(tokens or ())})
        self._additional_off = tokens is None

    _additional_off = False

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Their ids; assign ids that the vocabulary has."""
        return [i for i in map(self._token_id, self._additional) if i is not None]

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Sequence[int]) -> None:
        self.additional_special_tokens = [self.piece_of_id(i) for i in ids]

    @property
    def extra_special_tokens(self) -> list[str]:
        """The name of transformers 5 for `additional_special_tokens`."""
        return list(self._additional)

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[TokenLike] | None) -> None:
        self.additional_special_tokens = list(tokens or ())

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        """Their ids; assign ids that the vocabulary has."""
        return self.additional_special_tokens_ids

    @extra_special_tokens_ids.setter
    def extra_special_tokens_ids(self, ids: Sequence[int]) -> None:
        self.additional_special_tokens_ids = ids

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """Role -> token, for the roles that are set."""
        found: dict[str, str | list[str]] = {n: t for n in NAMES if (t := self._special.get(n)) is not None}
        return {**found, "additional_special_tokens": list(self._additional)} if self._additional else found

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once, in the order bos, eos, unk, sep, pad, cls, mask, others."""
        roles = [t for name in NAMES if (t := self._special.get(name)) is not None]
        return list(dict.fromkeys([*roles, *self._additional]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [i for i in map(self._token_id, self.all_special_tokens) if i is not None]

    @property
    def _added_ids(self) -> dict[int, str]:
        if self._by_id is None:
            self._by_id = {i: token.content for i, token in self._added.values()}
        return self._by_id

    _by_id: dict[int, str] | None = None

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """id -> added token, by id."""
        return dict(sorted(self._added.values(), key=lambda entry: entry[0]))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Added token -> id, by id."""
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def add_tokens(self, new_tokens: TokenLike | Sequence[TokenLike], special_tokens: bool = False) -> int:
        """Append tokens to the vocabulary; the number of new ids (known tokens add none). Resize the model after it."""
        if not new_tokens:
            return 0
        single = isinstance(new_tokens, (str, dict)) or not isinstance(new_tokens, Iterable)
        given: Any = [new_tokens] if single else new_tokens
        tokens = [self._as_added(t, special_tokens) for t in given]
        added = self._register(tokens)
        self._changed()
        return added

    def _as_added(self, token: TokenLike, special: bool) -> AddedToken:
        """A token as given; a string that is known already keeps the flags it was added with."""
        known = self._added.get(token) if isinstance(token, str) else None
        if known is not None:
            return replace(known[1], special=special or known[1].special)
        found = as_added_token(token, special=special)
        return replace(found, special=True) if special and not found.special else found

    def add_special_tokens(
        self,
        special_tokens_dict: dict[str, Any],
        replace_additional_special_tokens: bool = True,
        replace_extra_special_tokens: bool | None = None,
    ) -> int:
        """Give roles their tokens ({"pad_token": "<pad>"}), adding those that are new; the number of new ids.

        replace_extra_special_tokens is transformers 5's name of replace_additional_special_tokens.
        """
        added = 0
        if replace_extra_special_tokens is not None:
            replace_additional_special_tokens = replace_extra_special_tokens
        for name, value in special_tokens_dict.items():
            if name in ("additional_special_tokens", "extra_special_tokens"):
                tokens = [self._as_added(t, True) for t in value or ()]
                added += self._register(tokens)
                kept = [] if replace_additional_special_tokens else self._additional
                self._additional = list(dict.fromkeys([*kept, *(t.content for t in tokens)]))
            elif name in NAMES:
                token = self._as_added(value, True)
                added += self._register([token])
                self._special[name] = token.content
            else:
                raise TokenizerError(f"{name!r} is not a special token; use one of {self.SPECIAL_TOKENS_ATTRIBUTES}")
        self._changed()
        return added

    @property
    def add_bos_token(self) -> bool:
        """Whether BOS goes in front of each text. Takes effect at once, and is saved."""
        return self._add_bos

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos = value
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        """Whether EOS goes behind each text. Takes effect at once, and is saved."""
        return self._add_eos

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos = value
        self.update_post_processor()

    def update_post_processor(self) -> None:
        """Rebuild the layout of special tokens from add_bos_token, add_eos_token and the present BOS and EOS.

        ValueError where one of them is to be added and is None.
        """
        self.special_tokens_template = llama_template(
            self._role("bos_token", self._add_bos), self._role("eos_token", self._add_eos)
        )

    def _role(self, name: str, wanted: bool) -> tuple[str, int] | None:
        if not wanted:
            return None
        token = self._special.get(name)
        token_id = None if token is None else self._token_id(token)
        if token is None or token_id is None:
            raise TokenizerError(f"add_{name} = True but {name} = None; set {name} or pass add_{name}=False")
        return token, token_id

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens a text, or a pair, is given."""
        return self.special_tokens_template.added(pair)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids with the special tokens around them: `<s> a [</s>] [<s> b [</s>]]`."""
        texts = {"A": token_ids_0, "B": token_ids_1 or []}
        parts = self.special_tokens_template.single if token_ids_1 is None else self.special_tokens_template.pair
        return [i for part in parts for i in (part.ids if part.kind == "special" else texts[part.kind])]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 at special tokens: of the ids as they will be built, or, where they already have them, as they are."""
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise TokenizerError("already_has_special_tokens=True takes one list: pass token_ids_1=None")
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        texts = {"A": token_ids_0, "B": token_ids_1 or []}
        parts = self.special_tokens_template.single if token_ids_1 is None else self.special_tokens_template.pair
        masks: Iterable[list[int]] = (
            [1] * len(part.ids) if part.kind == "special" else [0] * len(texts[part.kind]) for part in parts
        )
        return [bit for mask in masks for bit in mask]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """0 over the first text and its special tokens, 1 over the second: <s> a <s> b gives 0 0 1 1."""
        texts = {"A": token_ids_0, "B": token_ids_1 or []}
        parts = self.special_tokens_template.single if token_ids_1 is None else self.special_tokens_template.pair
        return [part.type_id for part in parts for _ in (part.ids if part.kind == "special" else texts[part.kind])]
