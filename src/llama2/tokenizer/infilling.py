"""Code Llama's infilling: `prefix <FILL_ME> suffix` becomes the ids that ask the model for the middle.

<PRE> prefix <SUF> suffix <MID>, or with suffix_first <PRE> <SUF> suffix <MID> prefix: the layouts of Meta's codellama.
The prefix is encoded as the start of a text, the suffix as it stands inside one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama2.errors import TokenizerError
from llama2.tokenizer.base import PreTrainedTokenizer
from llama2.tokenizer.encoding import BatchEncoding, Segment
from llama2.tokenizer.fast import LlamaTokenizerFast
from llama2.tokenizer.sentencepiece_model import SentencePieceModel
from llama2.tokenizer.slow import LlamaTokenizer
from llama2.tokenizer.special import TokenLike

_ROLES = ("prefix", "middle", "suffix", "eot")


class InfillText(str):
    """A prefix and a suffix around the fill token."""

    suffix_first: bool | None
    parts: tuple[str, str]

    def __new__(cls, prefix: str, suffix: str, suffix_first: bool | None) -> InfillText:
        made = super().__new__(cls, prefix + suffix)
        made.parts, made.suffix_first = (prefix, suffix), suffix_first
        return made


class Infilling(PreTrainedTokenizer):
    """Mixin of both Code Llama classes."""

    prefix_token: str | None
    middle_token: str | None
    suffix_token: str | None
    eot_token: str | None
    fill_token: str | None
    suffix_first: bool

    def _set_infilling(self, tokens: dict[str, TokenLike | None], fill_token: TokenLike | None, first: bool) -> None:
        for role in _ROLES:
            token = tokens[role]
            setattr(self, f"{role}_token", None if not token else _text(token))
        self.fill_token, self.suffix_first = None if not fill_token else _text(fill_token), first
        own = {f"{role}_token": tokens[role] for role in _ROLES}
        self.init_kwargs.update(own, fill_token=fill_token, suffix_first=first)
        given = [token for token in tokens.values() if token]
        self.add_special_tokens({"additional_special_tokens": given}, replace_additional_special_tokens=False)

    @property
    def prefix_id(self) -> int | None:
        """The id in front of the prefix."""
        return self._role_id("prefix")

    @property
    def middle_id(self) -> int | None:
        """The id behind which the model writes the middle."""
        return self._role_id("middle")

    @property
    def suffix_id(self) -> int | None:
        """The id in front of the suffix."""
        return self._role_id("suffix")

    @property
    def eot_id(self) -> int | None:
        """The id with which the model ends the middle."""
        return self._role_id("eot")

    def _role_id(self, role: str) -> int | None:
        token = getattr(self, f"{role}_token")
        return None if token is None else self._token_id(token)

    def __call__(
        self, text: Any = None, *args: Any, suffix: str | None = None, suffix_first: bool | None = None, **kwargs: Any
    ) -> BatchEncoding:
        """As every tokenizer's call. A text with the fill token, or with `suffix`, becomes an infilling prompt."""
        return super().__call__(self._infill_text(text, suffix, suffix_first), *args, **kwargs)

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        """The ids of one text or pair; keywords as for a call."""
        text = self._infill_text(text, kwargs.pop("suffix", None), kwargs.pop("suffix_first", None))
        return super().encode(text, text_pair, add_special_tokens, **kwargs)

    def tokenize(  # type: ignore[override]
        self,
        prefix: str,
        suffix: str | None = None,
        suffix_first: bool | None = None,
        add_special_tokens: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """The pieces of a text, or of the infilling prompt that it and `suffix` make."""
        text = self._infill_text(prefix, suffix, suffix_first)
        return super().tokenize(text, add_special_tokens=add_special_tokens, **kwargs)

    def _infill_text(self, text: Any, suffix: str | None, suffix_first: bool | None) -> Any:
        if not isinstance(text, str) or (suffix is None and suffix_first is None):
            return text
        if suffix is None and self.fill_token is not None and self.fill_token in text:
            text, suffix = self._halves(text)
        return InfillText(text, suffix, suffix_first) if suffix else text

    def _halves(self, text: str) -> tuple[str, str]:
        halves = text.split(self.fill_token)
        if len(halves) != 2:
            raise TokenizerError(
                f"the text has {len(halves) - 1} {self.fill_token!r}; one place can be filled at a time"
            )
        return halves[0], halves[1]

    def _prompt(self, text: str) -> InfillText | None:
        """The text as an infilling prompt; None where it is none. A suffix of nothing asks for no infilling."""
        if isinstance(text, InfillText):
            return text
        if self.fill_token is None or self.fill_token not in text:
            return None
        prefix, suffix = self._halves(text)
        return InfillText(prefix, suffix, None) if suffix else None

    def _marks(self) -> tuple[int, int, int]:
        prefix, middle, suffix = self.prefix_id, self.middle_id, self.suffix_id
        if prefix is None or middle is None or suffix is None:
            raise TokenizerError(
                "this tokenizer has no infilling tokens (prefix_token, middle_token, suffix_token): Code Llama 34B and "
                "the Python models were not trained to fill in"
            )
        return prefix, middle, suffix

    def _laid_out(self, text: InfillText, prefix: list[int], suffix: list[int]) -> list[int]:
        pre, mid, suf = self._marks()
        first = self.suffix_first if text.suffix_first is None else text.suffix_first
        return [pre, suf, *suffix, mid, *prefix] if first else [pre, *prefix, suf, *suffix, mid]

    def encode_texts(self, texts: list[str], keep_special: bool) -> list[list[int]]:
        prompts = [self._prompt(text) for text in texts]
        if not any(prompt is not None for prompt in prompts):
            return super().encode_texts([self._without_mark(text) for text in texts], keep_special)
        rows = []
        for text, prompt in zip(texts, prompts, strict=True):
            if prompt is None:
                rows += super().encode_texts([self._without_mark(text)], keep_special)
            else:
                before, behind = prompt.parts
                prefix = self._encode_parts([before]) if before else []
                rows.append(self._laid_out(prompt, prefix, self._encode_inside(behind)))
        return rows

    def _without_mark(self, text: str) -> str:
        """A text that ends in the fill token is the text in front of it."""
        return text.removesuffix(self.fill_token) if self.fill_token else text

    def encode_segments(self, texts: list[str], keep_special: bool) -> list[Segment]:
        segments = []
        for text in texts:
            if self._prompt(text) is None:
                segments += super().encode_segments([self._without_mark(text)], keep_special)
            else:  # the order of the ids is not that of the text: no places
                ids = self.encode_texts([text], keep_special)[0]
                segments.append(Segment(ids, [(0, 0)] * len(ids), [None] * len(ids)))
        return segments

    def _config(self) -> dict[str, Any]:
        roles = {f"{role}_token": getattr(self, f"{role}_token") for role in _ROLES}
        return {**super()._config(), **roles, "fill_token": self.fill_token, "suffix_first": self.suffix_first}


def _text(token: TokenLike) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


class CodeLlamaTokenizer(Infilling, LlamaTokenizer):
    """`LlamaTokenizer` with infilling. The names of the five tokens are arguments; None switches one off."""

    def __init__(
        self,
        vocab_file: str | Path | SentencePieceModel | None = None,
        *,
        prefix_token: TokenLike | None = "▁<PRE>",
        middle_token: TokenLike | None = "▁<MID>",
        suffix_token: TokenLike | None = "▁<SUF>",
        eot_token: TokenLike | None = "▁<EOT>",
        fill_token: TokenLike | None = "<FILL_ME>",
        suffix_first: bool = False,
        **kwargs: Any,
    ):
        super().__init__(vocab_file, **kwargs)
        tokens = {"prefix": prefix_token, "middle": middle_token, "suffix": suffix_token, "eot": eot_token}
        self._set_infilling(tokens, fill_token, suffix_first)


class CodeLlamaTokenizerFast(Infilling, LlamaTokenizerFast):
    """`LlamaTokenizerFast` with infilling. The names of the five tokens are arguments; None switches one off."""

    def __init__(
        self,
        vocab_file: str | Path | SentencePieceModel | None = None,
        tokenizer_file: str | Path | None = None,
        *,
        prefix_token: TokenLike | None = "▁<PRE>",
        middle_token: TokenLike | None = "▁<MID>",
        suffix_token: TokenLike | None = "▁<SUF>",
        eot_token: TokenLike | None = "▁<EOT>",
        fill_token: TokenLike | None = "<FILL_ME>",
        suffix_first: bool = False,
        **kwargs: Any,
    ):
        super().__init__(vocab_file, tokenizer_file, **kwargs)
        tokens = {"prefix": prefix_token, "middle": middle_token, "suffix": suffix_token, "eot": eot_token}
        self._set_infilling(tokens, fill_token, suffix_first)
