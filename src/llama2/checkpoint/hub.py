"""Hub ids through huggingface_hub: the only module that imports it. Local paths never come here."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from llama2.errors import CheckpointError

CONFIG_FILES = ("config.json", "generation_config.json", "params.json", "quantize_config.json", "quant_config.json")
SAFETENSORS_FILES = ("*.safetensors", "*.safetensors.index*.json")
BIN_FILES = ("pytorch_model*.bin", "pytorch_model*.json", "gptq_model-*.bin")


@dataclass(frozen=True)
class HubOptions:
    """Which revision of a repository, from where and as whom; no field matters for a local path."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""


def fetch(repo_id: str, options: HubOptions, patterns: tuple[str, ...]) -> Path:
    """Downloads, or finds in the cache, the files of a repository that match; returns their folder."""
    inside = f"{options.subfolder}/" if options.subfolder else ""
    folder = _explained(
        huggingface_hub.snapshot_download,
        repo_id,
        revision=options.revision,
        cache_dir=options.cache_dir,
        token=options.token,
        local_files_only=options.local_files_only,
        force_download=options.force_download,
        allow_patterns=[inside + pattern for pattern in patterns],
        # Llama 2 repositories keep Meta's own copy of the weights there, which doubles the download.
        ignore_patterns=None if options.subfolder else ["original/*"],
    )
    return Path(folder) / options.subfolder


def fetch_model(repo_id: str, options: HubOptions, use_safetensors: bool | None, gguf_file: str | None) -> Path:
    """Configuration and weights: one GGUF file, or safetensors, or .bin where there are no safetensors."""
    if gguf_file is not None:
        return fetch(repo_id, options, (gguf_file,))
    if use_safetensors is not False:
        folder = fetch(repo_id, options, CONFIG_FILES + SAFETENSORS_FILES)
        if use_safetensors or any(folder.glob("*.safetensors")):
            return folder
    return fetch(repo_id, options, CONFIG_FILES + BIN_FILES)


def upload(folder: Path, repo_id: str, *, token: str | bool | None, private: bool | None, commit_message: str) -> str:
    """Creates the repository where it does not exist and uploads the folder; returns the address of the commit."""
    _explained(huggingface_hub.create_repo, repo_id, token=token, private=private, exist_ok=True)
    return str(
        _explained(
            huggingface_hub.upload_folder,
            repo_id,
            folder_path=folder,
            token=token,
            commit_message=commit_message,
        )
    )


def upload_file(
    file: Path,
    *,
    repo_id: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> str:
    """As `upload`, one file; the repository is called as the file's folder where no name is given."""
    repo_id = repo_id or file.parent.resolve().name
    _explained(huggingface_hub.create_repo, repo_id, token=token, private=private, exist_ok=True)
    return str(
        _explained(
            huggingface_hub.upload_file,
            repo_id,
            path_or_fileobj=file,
            path_in_repo=file.name,
            token=token,
            commit_message=commit_message or f"Upload {file.name}",
        )
    )


def _explained(call: Callable[..., Any], repo_id: str, **kwargs: Any) -> Any:
    try:
        return call(repo_id=repo_id, **kwargs)
    except Exception as error:  # the classes differ between versions of huggingface_hub (requests, httpx, its own)
        reason = re.sub(r"\s+", " ", str(error)).strip()[:300]
        raise CheckpointError(
            f"{repo_id!r} is not a local path, and the Hugging Face hub did not serve it "
            f"({type(error).__name__}: {reason}). Check the spelling; for a gated model accept its licence on the hub "
            "and run `hf auth login` or pass token=; without a network, download the model elsewhere and give the "
            "path of its folder"
        ) from error
