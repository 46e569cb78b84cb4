"""The tokenizer that goes with a converted checkpoint: files for a folder, keys for a GGUF file."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.errors import CheckpointError, InputError
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, from_gguf, load
from llama2.tokenizer.spm import CONTROL, UNUSED, USER_DEFINED, SentencePieceModel

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
                shutil.copyfile(source / name, folder / name)
        return
    tokenizer = from_gguf(source) if isinstance(source, Mapping) else load(source)
    if chat:
        tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(source: Source, folder: Path) -> None:
    """tokenizer.model alone, which is all that Meta's code reads. Warns where the tokenizer has no such form."""
    if not _has_tokenizer(source):
        return
    if isinstance(source, Path) and (source / "tokenizer.model").exists():
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    elif isinstance(source, Mapping) and source.get("tokenizer.ggml.model") == "llama":
        from_gguf(source).save_vocabulary(folder)
    else:
        warnings.warn(
            "the tokenizer has no tokenizer.model form (it is byte-level BPE, or was saved without it); the folder is "
            "written without a tokenizer",
            stacklevel=4,
        )


def gguf_keys(source: Source, vocab_size: int, chat: bool) -> dict[str, Any]:
    """The keys tokenizer.* of a GGUF file. Raises InputError for a tokenizer that has no such form."""
    if not _has_tokenizer(source):
        return {"tokenizer.ggml.model": "no_vocab"}
    template = {"tokenizer.chat_template": LLAMA2_CHAT_TEMPLATE} if chat else {}
    if isinstance(source, Mapping):
        keys = {key: value for key, value in source.items() if key.startswith("tokenizer.") and value != []}
        return {**keys, **template}
    if not (source / "tokenizer.model").exists():
        raise InputError(
            f"{source} has a tokenizer.json but no tokenizer.model; GGUF needs its scores. Put the model's "
            "tokenizer.model beside it"
        )
    return {**_sentencepiece_keys(source, vocab_size), **template}


def _has_tokenizer(source: Source) -> bool:
    if isinstance(source, Mapping):
        found = source.get("tokenizer.ggml.tokens") is not None
    else:
        found = (source / "tokenizer.json").exists() or (source / "tokenizer.model").exists()
    if not found:
        warnings.warn("there is no tokenizer beside the weights; the result has none either", stacklevel=5)
    return found


def _sentencepiece_keys(folder: Path, vocab_size: int) -> dict[str, Any]:
    model = SentencePieceModel.from_file(folder / "tokenizer.model")
    tokenizer: Any = load(folder)
    pieces, scores, types = list(model.pieces), list(model.scores), list(model.types)
    for i, token in sorted(tokenizer.added_tokens_decoder.items()):
        if i < len(pieces):
            continue
        while len(pieces) < i:
            pieces, scores, types = [*pieces, f"[PAD{len(pieces)}]"], [*scores, _ADDED_SCORE], [*types, UNUSED]
        pieces.append(token.content)
        scores.append(_ADDED_SCORE)
        types.append(CONTROL if token.special else USER_DEFINED)
    if len(pieces) > vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(pieces)} tokens, the model only {vocab_size}; they do not belong "
            "together"
        )
    for i in range(len(pieces), vocab_size):  # readers want a token for each row of the embedding
        pieces.append(f"[PAD{i}]")
        scores.append(_ADDED_SCORE)
        types.append(UNUSED)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(score) for score in scores],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.add_bos_token": bool(tokenizer.add_bos_token),
        "tokenizer.ggml.add_eos_token": bool(tokenizer.add_eos_token),
        "tokenizer.ggml.add_space_prefix": tokenizer._prefix != "never",
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            keys[f"tokenizer.ggml.{key}_token_id"] = int(token_id)
    chat = tokenizer.chat_template
    if isinstance(chat, Mapping):
        chat = chat.get("default")
    return {**keys, "tokenizer.chat_template": chat} if chat else keys
