"""From what a user writes, a path or a hub id, to an open checkpoint. No torch here."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama2.checkpoint as checkpoint
from llama2.config import LlamaConfig
from llama2.doors import door
from llama2.errors import CheckpointError, InputError
from llama2.keywords import drop

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".json", ".pth", ".pt", ".model")

_options = door("checkpoint.hub", "HubOptions", "Hub settings.")
_fetch = door("checkpoint.hub", "fetch", "Files of a repository by pattern.")
_fetch_model = door("checkpoint.hub", "fetch_model", "Configuration and weights of a repository.")


def local_path(name: str | Path, subfolder: str = "") -> Path | None:
    """The path if it exists, None if it can only be a hub id; raises CheckpointError if it can be neither."""
    path = Path(name).expanduser()
    if path.exists():
        path = path / subfolder
        if path.exists():
            return path
        raise CheckpointError(f"{path} does not exist; check `subfolder`")
    text = str(name)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(text) or text.endswith(_FILE_SUFFIXES):
        raise CheckpointError(
            f"{text!r} does not exist, and it does not look like a hub id (owner/name) either; "
            "give the path of a checkpoint folder or file"
        )
    return None


def split_hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the hub settings out of `kwargs`, those without an effect too."""
    drop("hub", kwargs)
    if (old_name := kwargs.pop("use_auth_token", None)) is not None:
        kwargs.setdefault("token", old_name)
    return {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}


_PATTERNS: dict[str, tuple[str, ...]] = {
    "config": (
        "config.json",
        "generation_config.json",
        "params.json",
        "quantize_config.json",
        "quant_config.json",
    ),
    "tokenizer": (
        "config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template*",
    ),
}


def fetch_files(name: str | Path, hub: Mapping[str, Any], kind: str, gguf_file: str | None = None) -> Path:
    """The local path of what describes a model ("config") or a tokenizer ("tokenizer"), fetched if need be.

    With `gguf_file` that file and nothing else.
    """
    found = local_path(name, hub.get("subfolder", ""))
    if found is None:
        found = _fetch(str(name), _options(**hub), _PATTERNS[kind] if gguf_file is None else (gguf_file,))
    return found if gguf_file is None else found / gguf_file


def settings_file(name: str | Path, file: str, kwargs: dict[str, Any]) -> Path:
    """The local path of one file of settings of a folder or a hub id; takes the hub settings out of `kwargs`.

    `name` may be the file itself. The path need not exist.
    """
    hub = split_hub_options(kwargs)
    if Path(name).is_file():
        return Path(name)
    if Path(name).is_dir() or isinstance(name, Path) or str(name).endswith(_FILE_SUFFIXES):
        return Path(name) / hub.get("subfolder", "") / file
    return fetch_files(name, hub, "config", file)


def open_source(
    name: str | Path,
    hub: Mapping[str, Any],
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    weights_only: bool = True,
    gguf_file: str | None = None,
) -> checkpoint.Checkpoint:
    """Opens a path or a hub id; see `checkpoint.open`."""
    path = local_path(name, hub.get("subfolder", ""))
    if path is None:
        path = _fetch_model(str(name), _options(**hub), use_safetensors, gguf_file)
    return checkpoint.open(
        path, use_safetensors=use_safetensors, variant=variant, weights_only=weights_only, gguf_file=gguf_file
    )


def is_field(config: LlamaConfig, name: str) -> bool:
    """Whether a keyword of this name changes the configuration."""
    if name == "attn_implementation":
        return True
    return not name.startswith("_") and hasattr(config, name) and not callable(getattr(config, name))


def override(config: LlamaConfig, fields: Mapping[str, Any]) -> LlamaConfig:
    """The configuration with these fields replaced. Raises InputError for a keyword that is no field."""
    if not fields:
        return config
    if unknown := [key for key in fields if not is_field(config, key)]:
        known = [key for key in dir(config) if is_field(config, key)]
        close = [
            f"{key} (did you mean {near[0]}?)" for key in unknown if (near := difflib.get_close_matches(key, known))
        ]
        raise InputError(
            f"from_pretrained does not know {', '.join(map(repr, unknown))}: neither its arguments nor fields of the "
            f"configuration{'; ' + '; '.join(close) if close else ''}"
        )
    stored = config.to_dict()
    if {"num_labels", "id2label"} & set(fields):
        stored.pop("id2label", None)
        stored.pop("label2id", None)
    changed: LlamaConfig = type(config).from_dict(stored, **fields)
    changed._attn_implementation = fields.get("attn_implementation") or config._attn_implementation
    return changed
