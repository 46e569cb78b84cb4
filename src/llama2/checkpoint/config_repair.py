"""Repairs of configuration files: meaningless entries are left out with a warning that names the file."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2.config import LlamaConfig
from llama2.generation.config import GenerationConfig
from llama2.rope_types import ROPE_TYPES

if TYPE_CHECKING:
    from llama2.checkpoint import Checkpoint

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SPELLINGS = ("rope_scaling", "rope_parameters")
# Settings that change the rotation in other libraries, and the values with which they do not.
_NEUTRAL: dict[str, Any] = {"partial_rotary_factor": 1.0}


def repaired(fields: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The content of a config.json without ids outside its vocabulary, and RoPE settings that its type does not use."""
    found = dict(fields)
    for spelling in _SPELLINGS:
        if isinstance(found.get(spelling), Mapping):
            found[spelling] = _known_settings(found[spelling], f"{where}: {spelling}")
    size = found.get("vocab_size", 32000)
    return known_ids(found, size, where) if isinstance(size, int) else found


def known_ids(fields: Mapping[str, Any], vocab_size: int, where: Path | str) -> dict[str, Any]:
    """The fields with ids outside the vocabulary None, or out of the list, and a warning for each."""
    found = dict(fields)
    for role in _IDS:
        value = found.get(role)
        ids = value if isinstance(value, list) else [value]
        # -1 meant "none" in early files, which the configuration knows.
        lost = [i for i in ids if type(i) is int and i != -1 and not 0 <= i < vocab_size]
        if lost:
            left = [i for i in ids if i not in lost]
            found[role] = left if isinstance(value, list) and left else None
            warnings.warn(
                f"{where}: {role} is {', '.join(map(str, lost))} but ids run from 0 to {vocab_size - 1}; it is taken "
                f"as {found[role]}. model.add_pad_token(tokenizer) makes a token with an embedding",
                stacklevel=5,
            )
    return found


def _known_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = settings.get("rope_type", settings.get("type"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        return dict(settings)
    required, optional = ROPE_TYPES[kind].required, ROPE_TYPES[kind].optional
    known = {"type", "rope_type", "rope_theta", *required, *optional}
    known |= {key for key, value in _NEUTRAL.items() if settings.get(key, value) != value}  # refused later, by name
    if odd := sorted(set(settings) - known - set(_NEUTRAL)):
        names = ", ".join(odd)
        warnings.warn(f"{where} has {names}, which RoPE of type {kind!r} does not use: no effect", stacklevel=6)
    return {key: value for key, value in settings.items() if key in known}


def stored_generation(source: "Checkpoint", config: LlamaConfig) -> GenerationConfig:
    """How a model generates unless told: as its generation_config.json says, else its configuration."""
    settings = source.generation_settings
    if settings is None:
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_dict(known_ids(settings, config.vocab_size, f"{source.path}/generation_config.json"))
