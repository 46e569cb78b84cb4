"""From what a user writes, a path or a hub id, to an open checkpoint. No torch here.

folder or file                     of a split GGUF file any part, or the name without its number
owner/name                         a repository of safetensors, .bin, Meta's .pth, an adapter, or one GGUF file
owner/name:Q4_K_M                  the GGUF file of a repository whose name holds this type
owner/name/file.gguf               one file of a repository
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

import llama2.checkpoint as checkpoint
from llama2.call_options import HubSettings
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError
from llama2.files import settle
from llama2.keywords import drop
from llama2.lazy import door
from llama2.text_file import shown

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
_HUB_ID = re.compile(
    r"(?:(?:https://)?(?:huggingface\.co|hf\.co)/)?(?P<repo>[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?)"
    r"(?::(?P<tag>[\w.-]+)|/(?P<file>[\w./ -]+\.gguf))?"
)
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".json", ".pth", ".pt", ".model")

_options = door("checkpoint.hub", "HubOptions", "Hub settings.")
_fetch = door("checkpoint.hub", "fetch", "Files of a repository by pattern.")
_fetch_model = door("checkpoint.hub", "fetch_model", "Configuration and weights of a repository.")
_fetch_gguf = door("checkpoint.hub", "fetch_gguf", "A GGUF file of a repository.")
_list_gguf = door("checkpoint.hub", "only_gguf", "The one GGUF model of a repository without config.json.")


def local_path(name: str | Path, subfolder: str = "") -> Path | None:
    """The path if it exists, None if it can only be a hub id; raises CheckpointError if it can be neither."""
    if len(str(name)) > 4096 or "\0" in str(name):
        raise CheckpointError(
            f"{shown(str(name))} is no path and no hub id; give the path of a checkpoint folder or file"
        )
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a part of it is too long, or ~ of nobody
        raise CheckpointError(f"{shown(str(name))} is no path that could be: {error}") from error
    if path.exists():
        path = path / subfolder
        if path.exists():
            settle(path if path.is_dir() else path.parent)
            return path
        raise CheckpointError(f"{path} does not exist; check `subfolder`")
    text = str(name)
    if first := _first_part(path):
        return first
    if isinstance(name, Path) or hub_id(text) is None:
        raise CheckpointError(
            f"{text!r} does not exist, and it does not look like a hub id (owner/name, owner/name:Q4_K_M or "
            "owner/name/file.gguf) either; give the path of a checkpoint folder or file"
        )
    return None


def _first_part(path: Path) -> Path | None:
    """The first part of the split GGUF file that a name without the number means; None where there is none."""
    stem = path.name.removesuffix(".gguf")
    found = sorted(path.parent.glob(f"{glob_escape(stem)}-00001-of-*.gguf")) if stem else []
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class HubId:
    """A repository, and what of it is meant: a GGUF file by its name, or by the type in its name (tag)."""

    repo: str
    file: str | None = None
    tag: str | None = None


def hub_id(text: str) -> HubId | None:
    """Parses a hub id; None for a text that cannot be one."""
    match = _HUB_ID.fullmatch(text)
    if match is None or match["repo"].endswith(_FILE_SUFFIXES):
        return None
    file = match["file"]
    if file is not None and "/" not in match["repo"]:
        return None
    return HubId(match["repo"], file, match["tag"])


@dataclass(frozen=True)
class Located:
    """A hub id whose files are on this machine already, at `path`."""

    name: str
    path: Path

    def __str__(self) -> str:
        return self.name


def locate(
    name: str | Path | Located,
    hub: Mapping[str, Any],
    *,
    use_safetensors: bool | None = None,
    gguf_file: str | None = None,
) -> Located:
    """Where the weights and the configuration of a path or hub id are, fetched if need be; of GGUF the file."""
    if isinstance(name, Located):
        return name
    path = local_path(name, hub.get("subfolder", ""))
    if path is not None:
        return Located(str(name), path if gguf_file is None else path / gguf_file)
    found = hub_id(str(name))
    assert found is not None
    file, options = gguf_file or found.file, _options(**hub)
    if found.tag is not None or file is not None:
        return Located(str(name), _fetch_gguf(found.repo, options, file, found.tag))
    return Located(str(name), _fetch_model(found.repo, options, use_safetensors))


def split_hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the hub settings out of `kwargs`, those without an effect too."""
    drop("hub", kwargs)
    if (old_name := kwargs.pop("use_auth_token", None)) is not None:
        kwargs.setdefault("token", old_name)
    return {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}


# One of these there, and the repository describes itself without its weights.
_DESCRIBED = {
    "config": ("config.json", "params.json", "adapter_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
}
_PATTERNS: dict[str, tuple[str, ...]] = {
    "config": checkpoint.CONFIG_FILES,
    "tokenizer": checkpoint.TOKENIZER_FILES,
}


def fetch_files(name: str | Path, hub: Mapping[str, Any], kind: str, gguf_file: str | None = None) -> Path:
    """The local path of what describes a model ("config") or a tokenizer ("tokenizer"), fetched if need be.

    With `gguf_file` that file and nothing else.
    """
    found = local_path(name, hub.get("subfolder", ""))
    if found is not None:
        return found if gguf_file is None else found / gguf_file
    wanted, options = hub_id(str(name)), _options(**hub)
    assert wanted is not None
    if gguf_file is not None and not gguf_file.endswith(".gguf"):
        return Path(_fetch(wanted.repo, options, (gguf_file,))) / gguf_file
    if wanted.tag is not None or gguf_file is not None or wanted.file is not None:
        return Path(_fetch_gguf(wanted.repo, options, gguf_file or wanted.file, wanted.tag))
    found = Path(_fetch(wanted.repo, options, _PATTERNS[kind]))
    if any((found / name).exists() for name in _DESCRIBED[kind]):
        return found
    only = _list_gguf(wanted.repo, options)  # a repository of GGUF files: its model says what is asked
    return found if only is None else Path(_fetch_gguf(wanted.repo, options, only, None))


def settings_file(name: str | Path, file: str, kwargs: dict[str, Any]) -> Path:
    """The local path of one file of settings of a folder or a hub id; takes the hub settings out of `kwargs`.

    `name` may be the file itself. The path need not exist.
    """
    hub = split_hub_options(kwargs)
    if Path(name).is_file():
        settle(Path(name).parent)
        return Path(name)
    if Path(name).is_dir() or isinstance(name, Path) or str(name).endswith(_FILE_SUFFIXES):
        settle(Path(name) / hub.get("subfolder", ""))
        return Path(name) / hub.get("subfolder", "") / file
    return fetch_files(name, hub, "config", file)


def revision_of(name: str | Path, revision: str | None) -> HubSettings:
    """The hub settings of a revision. Raises InputError for one of a path, which has none."""
    if revision is None:
        return {}
    if local_path(name) is not None:
        raise InputError(f"{name} is a local path, which has no revision {revision!r}; leave --revision out")
    return {"revision": revision}


def locate_all(name: str | Path | Located, revision: str | None = None) -> Located:
    """As `locate`, with the tokenizer's files beside the model's. Raises InputError for the revision of a path."""
    if isinstance(name, Located):
        return name
    hub = revision_of(name, revision)
    if (path := local_path(name)) is not None:
        return Located(str(name), path)
    fetch_files(name, hub, "tokenizer")
    return locate(name, hub)


def open_source(
    name: str | Path | Located,
    hub: Mapping[str, Any],
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    weights_only: bool = True,
    gguf_file: str | None = None,
) -> checkpoint.Checkpoint:
    """Opens a path or a hub id; see `checkpoint.open`."""
    place = locate(name, hub, use_safetensors=use_safetensors, gguf_file=gguf_file)
    return checkpoint.open(place.path, use_safetensors=use_safetensors, variant=variant, weights_only=weights_only)


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
    rest = {key: value for key, value in fields.items() if key != "attn_implementation"}
    changed: LlamaConfig = type(config).from_dict(stored, **rest)
    changed._attn_implementation = config._attn_implementation
    if fields.get("attn_implementation") is not None:
        changed._attn_implementation = fields["attn_implementation"]
        changed.validate()
    return changed
