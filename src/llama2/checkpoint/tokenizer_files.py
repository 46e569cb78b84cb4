"""The tokenizer that goes with a converted checkpoint: files for a folder, keys for a GGUF file."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.checkpoint import read_json
from llama2.checkpoint.tokenizer_model import rebuild
from llama2.errors import CheckpointError, InputError
from llama2.files import copy, write_bytes
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, from_gguf, load
from llama2.tokenizer.gguf import byte_level_name
from llama2.tokenizer.sentencepiece_model import CONTROL, NORMAL, UNUSED, USER_DEFINED, SentencePieceModel

Source = Path | dict[str, Any]
_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_ADDED_SCORE = -1000.0  # llama.cpp's score of tokens outside the SentencePiece model


def write_folder(source: Source, folder: Path, chat: bool) -> None:
    """Every file a loader may want. Files of a complete tokenizer are copied as they are; from tokenizer.model or GGUF
    keys alone the others are made. `chat` adds Llama 2's chat template. Warns where there is no tokenizer."""
    if not _has_tokenizer(source):
        return
    if isinstance(source, Path) and not chat and (source / "tokenizer.json").exists():
        for name in _FILES:
            if (source / name).exists():
                copy(source / name, folder / name)
        return
    tokenizer = from_gguf(source) if isinstance(source, Mapping) else load(source)
    if chat:
        tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(source: Source, folder: Path) -> None:
    """tokenizer.model alone, which is all that Meta's code reads, made from tokenizer.json where there is no other.
    Warns where the tokenizer has no such form."""
    if not _has_tokenizer(source):
        return
    made = rebuild(source, load(source)) if isinstance(source, Path) and not _has_model(source) else None
    if isinstance(source, Path) and _has_model(source):
        copy(source / "tokenizer.model", folder / "tokenizer.model")
    elif isinstance(source, Mapping) and source.get("tokenizer.ggml.model") == "llama":
        from_gguf(source).save_vocabulary(folder)
    elif made is not None:
        write_bytes(folder / "tokenizer.model", made.to_bytes())
    else:
        warnings.warn(
            "the tokenizer has no tokenizer.model form (it is byte-level BPE, or was saved without it); the folder is "
            "written without a tokenizer",
            stacklevel=4,
        )


def gguf_keys(source: Source, vocab_size: int, chat: bool) -> dict[str, Any]:
    """The keys tokenizer.* of a GGUF file. Raises InputError for a tokenizer that has no such form.

    vocab_size: rows of the embedding. Added tokens beyond them are left out with a warning.
    """
    if not _has_tokenizer(source):
        return {"tokenizer.ggml.model": "no_vocab"}
    template = {"tokenizer.chat_template": LLAMA2_CHAT_TEMPLATE} if chat else {}
    if isinstance(source, Mapping):
        keys = {key: value for key, value in source.items() if key.startswith("tokenizer.")}
        return {**keys, **template}
    tokenizer = load(source)
    if _has_model(source):
        model: SentencePieceModel | None = SentencePieceModel.from_file(source / "tokenizer.model")
    else:
        model = rebuild(source, tokenizer)
    if model is not None:
        return {**_sentencepiece_keys(source, model, tokenizer, vocab_size), **template}
    return {**_byte_level_keys(source, tokenizer, vocab_size), **template}


def _has_model(folder: Path) -> bool:
    return (folder / "tokenizer.model").exists()


def _has_tokenizer(source: Source) -> bool:
    if isinstance(source, Mapping):
        found = source.get("tokenizer.ggml.tokens") is not None
    else:
        found = (source / "tokenizer.json").exists() or (source / "tokenizer.model").exists()
    if not found:
        warnings.warn("there is no tokenizer beside the weights; the result has none either", stacklevel=5)
    return found


def _sentencepiece_keys(folder: Path, model: SentencePieceModel, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    pieces, scores, types = list(model.pieces), list(model.scores), list(model.types)
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i >= len(pieces)}
    _append(pieces, types, added, vocab_size, folder)
    scores += [_ADDED_SCORE] * (len(pieces) - len(scores))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(score) for score in scores],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.add_space_prefix": tokenizer.space_prefix != "never",
        **_settings(tokenizer, vocab_size),
    }


def _byte_level_keys(folder: Path, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Of a tokenizer.json alone: byte-level BPE, as Llama 3 and SmolLM2 have it."""
    document = read_json(folder / "tokenizer.json")
    name = byte_level_name(document)
    if name is None:
        raise InputError(
            f"{folder} has a tokenizer.json, and GGUF has no name for the way it cuts words; put the tokenizer.model "
            "beside it, from which its scores are taken"
        )
    vocabulary = sorted(document["model"]["vocab"].items(), key=lambda item: item[1])
    pieces, types = [piece for piece, _ in vocabulary], [NORMAL] * len(vocabulary)
    if [i for _, i in vocabulary] != list(range(len(vocabulary))):
        raise CheckpointError(f"{folder}/tokenizer.json has a vocabulary with gaps; GGUF lists tokens by their id")
    for i, token in tokenizer.added_tokens_decoder.items():
        if i < len(pieces):
            types[i] = CONTROL if token.special else USER_DEFINED
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i >= len(pieces)}
    _append(pieces, types, added, vocab_size, folder)
    merges = document["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        **_settings(tokenizer, vocab_size),
    }


def _append(pieces: list[str], types: list[int], added: Mapping[int, Any], vocab_size: int, folder: Path) -> None:
    """Adds tokens behind the vocabulary, and fills up to a token for each row of the embedding, which readers want."""
    if len(pieces) > vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(pieces)} tokens, the model only {vocab_size}; they do not belong "
            "together"
        )
    if lost := [token.content for i, token in added.items() if i >= vocab_size]:
        warnings.warn(
            f"{', '.join(lost[:8])} ({len(lost)} tokens) of the tokenizer in {folder} have ids beyond the model's "
            f"{vocab_size} embeddings and are left out",
            stacklevel=6,
        )
    for i in range(len(pieces), vocab_size):
        token = added.get(i)
        pieces.append(f"[PAD{i}]" if token is None else token.content)
        types.append(UNUSED if token is None else CONTROL if token.special else USER_DEFINED)


def _settings(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Flags, special ids and chat template. An id without an embedding is left out."""
    keys: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": bool(tokenizer.add_bos_token),
        "tokenizer.ggml.add_eos_token": bool(tokenizer.add_eos_token),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = getattr(tokenizer, f"{role}_token_id")
        if token_id is not None and token_id < vocab_size:
            keys[f"tokenizer.ggml.{key}_token_id"] = int(token_id)
    chat = tokenizer.chat_template
    if isinstance(chat, Mapping):
        chat = chat.get("default")
    return {**keys, "tokenizer.chat_template": chat} if chat else keys
