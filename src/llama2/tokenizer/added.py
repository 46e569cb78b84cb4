"""Added tokens: strings that stand for one id whatever surrounds them, and the matcher that finds them in a text.

The matching rules are those of the `tokenizers` package, so that both of our classes split a text alike: leftmost
longest match; tokens with `normalized=False` are looked up in the raw text, the others in the normalised text.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llama2.errors import TokenizerError

# Unicode's White_Space: Python's own set has the separators U+001C to U+001F as well.
_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_JOINERS = "\u200c\u200d"
_LETTERS_IN_SHAPES = re.compile("[\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]")
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "special", "normalized")


@dataclass(frozen=True, slots=True, eq=False)
class AddedToken:
    """One added token.

    `normalized` (None: True unless `special`) looks for the token in the normalised text. With Meta's normaliser, which
    puts "▁" in front of each segment, such a token matches at the start of a word only; False matches anywhere.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    special: bool = False
    normalized: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.content, str) or not self.content:
            raise TokenizerError(f"an added token needs a non-empty string, got {self.content!r}")
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        return self.content

    def __eq__(self, other: object) -> bool:
        """Also to an AddedToken of the `tokenizers` package, which transformers hands out."""
        if not all(hasattr(other, name) for name in _FIELDS):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in _FIELDS)

    def __hash__(self) -> int:
        return hash(self.content)

    def replaced_by(self, again: "AddedToken") -> "AddedToken":
        """This token after it is added `again`: with the new flags, but special once and for all."""
        return replace(again, special=self.special or again.special)

    def to_dict(self) -> dict[str, Any]:
        """The entry of `added_tokens_decoder` in tokenizer_config.json."""
        names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "AddedToken":
        """From a JSON object; keys that are not ours (`id`, `__type`) are dropped."""
        known = {k: v for k, v in fields.items() if k in cls.__dataclass_fields__}
        if "content" not in known:
            raise TokenizerError(f"an added token needs 'content', got {fields!r}")
        return cls(**known)


def content_of(token: Any) -> str:
    """The text of a token in any of its spellings; "" for none."""
    content = token.get("content") if isinstance(token, dict) else token
    return str(content or "")


def as_added_token(token: "str | dict[str, Any] | AddedToken", special: bool = False) -> AddedToken:
    """Any of the spellings that files and callers use."""
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, dict):
        return AddedToken.from_dict({"special": special, **token})
    if isinstance(token, str):
        return AddedToken(token, special=special)
    # an AddedToken of the `tokenizers` package
    if all(hasattr(token, name) for name in _FIELDS):
        return AddedToken(**{name: getattr(token, name) for name in _FIELDS})
    raise TokenizerError(f"a token is a str or an AddedToken, got {type(token).__name__} {token!r}")


def _trie_pattern(words: Iterable[str]) -> str:
    """A regular expression that matches the longest of `words`, in time that does not grow with their number."""
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}

    def render(node: dict[str, Any]) -> str:
        # Chains of single children are joined first: nesting depth is then the number of forks, not of characters.
        chain = ""
        while len(node) == 1 and "" not in node:
            char, node = next(iter(node.items()))
            chain += re.escape(char)
        branches = [re.escape(char) + render(child) for char, child in node.items() if char]
        if not branches:
            return chain
        body = "(?:" + "|".join(branches) + ")"
        return chain + (body + "?" if "" in node else body)

    return render(trie)


class TokenMatcher:
    """Finds added tokens in a text. Build one per set of tokens; `normalize` maps a content to what is looked for."""

    def __init__(self, tokens: dict[str, tuple[int, AddedToken]], normalize: Callable[[str], str] | None = None):
        self._tokens = {(normalize(content) if normalize else content): entry for content, entry in tokens.items()}
        self._pattern = re.compile(_trie_pattern(self._tokens)) if self._tokens else None
        self._few = tuple(self._tokens) if len(self._tokens) <= 24 else None

    def __bool__(self) -> bool:
        return self._pattern is not None

    def any_in(self, text: str) -> bool:
        """Whether the text contains one of the tokens (before their `single_word` condition)."""
        if self._few is not None:  # a substring search per token beats one regular expression by far
            return any(content in text for content in self._few)
        return self._pattern is not None and self._pattern.search(text) is not None

    def split(self, text: str, keep_special: bool = True) -> Iterator[tuple[int | None, int, int]]:
        """Yield (id or None, start, stop) over the whole text; `keep_special=False` leaves special tokens as text."""
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token_id, token = self._tokens[match.group()]
            start, stop = match.span()
            if token.special and not keep_special:
                continue
            if token.single_word and not _stands_alone(text, start, stop):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip(_WHITE)))
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip(_WHITE))
            if done < start:
                yield None, done, start
            yield token_id, start, stop
            done = stop
        if done < len(text):
            yield None, done, len(text)


def _stands_alone(text: str, start: int, stop: int) -> bool:
    before, after = text[start - 1 : start], text[stop : stop + 1]
    return not (_in_a_word(before) or _in_a_word(after))


def _in_a_word(char: str) -> bool:
    """Unicode's word characters (UTS #18, annex C), as in `tokenizers`; Python's lack marks and have superscripts."""
    if not char:
        return False
    kind = unicodedata.category(char)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or char in _JOINERS or bool(_LETTERS_IN_SHAPES.match(char))
