"""Which stretch of a text gets a "▁" in front: the one point where Llama tokenizers differ from each other.

every      Meta, `legacy=True`: each stretch between added tokens
first      `legacy=False`: the start of the text only, also where it starts with a space already
metaspace  what transformers 5 makes of any Llama tokenizer: as `first`, but not in front of a space
never      `add_prefix_space=False`
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from llama2.tokenizer.added import AddedToken, TokenMatcher

Prefix = Literal["every", "first", "metaspace", "never"]
SPACES = (" ", "▁")


def prefix_of(legacy: bool | None, add_prefix_space: bool | None, dummy_prefix: bool = True) -> Prefix:
    """From the constructor arguments of `transformers`; None stands for Meta's behaviour.

    `dummy_prefix` is the setting in tokenizer.model: without it no text gets a space in front, unless legacy=False and
    add_prefix_space=True ask for one.
    """
    if add_prefix_space is False:
        return "never"
    if legacy is False:
        return "first" if dummy_prefix or add_prefix_space else "never"
    return "every" if dummy_prefix else "never"


def normalize(text: str, prefix: Prefix) -> str:
    """Normalises text for tokens with `normalized=True`, as the normaliser in tokenizer.json does."""
    if prefix == "every":
        return "▁" + text.replace(" ", "▁") if text else text
    if prefix == "first":
        return "▁▁" + text[1:] if text.startswith(SPACES) else text
    return text.replace(" ", "▁") if prefix == "never" else text


def matchers(added: dict[str, tuple[int, AddedToken]], prefix: Prefix) -> tuple[TokenMatcher, TokenMatcher]:
    """(tokens looked up in the raw text, tokens looked up in the normalised text)."""
    raw = {content: entry for content, entry in added.items() if not entry[1].normalized}
    late = {content: entry for content, entry in added.items() if entry[1].normalized}
    return TokenMatcher(raw), TokenMatcher(late, partial(normalize, prefix=prefix))


def fit(token: AddedToken, prefix: Prefix | None) -> AddedToken:
    """The token with the `normalized` flag that its tokenizer needs; byte-level tokenizers keep it as it is.

    Added tokens are found anywhere in a text, inside words too. Behind a normaliser that puts "▁" in front of each
    stretch they would be found at the start of words only, so they are looked up in the raw text. Under "first" the
    leading space is doubled once for the whole text, which asks for tokens to be found behind the normaliser; one that
    itself starts with a space would be changed by it and stays in front, and so does one that takes the spaces on both
    sides, which must not be doubled before.
    """
    if prefix is None:
        return token
    stays = token.content.startswith(SPACES) or (token.lstrip and token.rstrip)
    return replace(token, normalized=prefix == "first" and not stays)


def components(prefix: Prefix) -> dict[str, Any]:
    """normalizer, pre_tokenizer and decoder as tokenizer.json writes them."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    double = {"type": "Replace", "pattern": {"Regex": r"\A[ ▁]"}, "content": "▁▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizers: dict[Prefix, Any] = {
        "every": {"type": "Sequence", "normalizers": [prepend, spaces]},
        "first": double,
        "metaspace": None,
        "never": spaces,
    }
    return {
        "normalizer": normalizers[prefix],
        "pre_tokenizer": metaspace if prefix in ("first", "metaspace") else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def recognise(normalizer: Any, pre_tokenizer: Any) -> Prefix | None:
    """The behaviour that a tokenizer.json describes; None where it is none of ours."""
    if normalizer is not None and normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) == 1:
        normalizer = normalizer["normalizers"][0]
    if pre_tokenizer is not None and pre_tokenizer.get("type") == "Metaspace" and not pre_tokenizer.get("split", True):
        scheme = pre_tokenizer.get("prepend_scheme", "always")
        pre_tokenizer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    for prefix in ("every", "first", "metaspace", "never"):
        ours = components(prefix)
        if (ours["normalizer"], ours["pre_tokenizer"]) == (normalizer, pre_tokenizer):
            return prefix
    return None


def surrogate_message(texts: list[str]) -> str:
    for text in texts:
        for i, char in enumerate(text):
            if "\ud800" <= char <= "\udfff":
                return (
                    f"character {i} of the text is a lone surrogate (U+{ord(char):04X}), which is not Unicode text; "
                    "decode the bytes with errors='replace' before tokenizing"
                )
    return "the text could not be encoded"
