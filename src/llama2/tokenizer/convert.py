"""SentencePiece model -> `tokenizers` backend with the same ids."""

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import tokenizers
from tokenizers import models

from llama2.tokenizer.added import AddedToken
from llama2.tokenizer.prefix import Prefix, components
from llama2.tokenizer.sentencepiece_model import BYTE, UNKNOWN, SentencePieceModel


def state_of(component: Any) -> Any:
    """A component of a `tokenizers.Tokenizer` as the object that tokenizer.json holds."""
    return None if component is None else json.loads(component.__getstate__())


def add_to_backend(backend: tokenizers.Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Register added tokens in order; one that the backend knows keeps its id.

    In runs of one kind: each call rebuilds the backend's matcher, so that one call a token would be quadratic.
    """
    for special, run in groupby(tokens, key=lambda token: token.special):
        rust = [
            tokenizers.AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=bool(token.normalized),
                special=token.special,
            )
            for token in run
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(rust)


def backend_from_spm(model: SentencePieceModel, prefix: Prefix) -> tokenizers.Tokenizer:
    """The BPE model with SentencePiece's scores as merge ranks."""
    model.check_llama()
    vocabulary = {piece: i for i, piece in enumerate(model.pieces)}
    unk = model.pieces[model.types.index(UNKNOWN)] if UNKNOWN in model.types else None
    fallback = model.byte_fallback and BYTE in model.types
    bpe = models.BPE(
        vocabulary,
        model.merges(),
        unk_token=unk,
        fuse_unk=True,
        byte_fallback=fallback,
    )
    backend = tokenizers.Tokenizer(bpe)
    return style(backend, prefix)


def style(backend: tokenizers.Tokenizer, prefix: Prefix) -> tokenizers.Tokenizer:
    """Give a fresh backend the components of a behaviour."""
    parts = tokenizers.Tokenizer.from_str(json.dumps(_EMPTY | components(prefix)))
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(parts, name) is not None:
            setattr(backend, name, getattr(parts, name))
    return backend


_EMPTY: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "post_processor": None,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
