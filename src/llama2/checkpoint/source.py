"""From what a user writes, a path or a hub id, to an open checkpoint. No torch here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama2.checkpoint as checkpoint
from llama2.doors import door
from llama2.errors import CheckpointError

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
    """Takes the hub settings out of `kwargs`."""
    return {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}


def fetch_files(name: str | Path, hub: Mapping[str, Any], kind: str) -> Path:
    """The local path, or a folder with the files of one kind from the hub: "config" or "tokenizer"."""
    found = local_path(name, hub.get("subfolder", ""))
    if found is not None:
        return found
    fetched: Path = _fetch(str(name), _options(**hub), PATTERNS[kind])
    return fetched


PATTERNS: dict[str, tuple[str, ...]] = {
    "config": ("config.json", "generation_config.json", "params.json"),
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
