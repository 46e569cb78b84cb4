"""The models on this machine: huggingface_hub's cache, which is ours too, and the stores of Ollama and LM Studio. No
torch here.

Ollama    $OLLAMA_MODELS (~/.ollama/models): manifests/HOST/OWNER/NAME/TAG is JSON whose layer of type
          application/vnd.ollama.image.model names a GGUF file, blobs/sha256-DIGEST
LM Studio ~/.lmstudio/models, before it ~/.cache/lm-studio/models: OWNER/NAME/FILE.gguf
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2.checkpoint import gguf_models, split_parts
from llama2.errors import CheckpointError
from llama2.lazy import door
from llama2.text_file import read_object

HUB, OLLAMA, LM_STUDIO = "hub cache", "Ollama", "LM Studio"
_OLLAMA_LAYER = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DESCRIBED = ("config.json", "params.json")

_cached_snapshots = door("checkpoint.hub", "cached_snapshots", "Repositories of the hub's cache.")
_name_of_gguf = door("checkpoint.hub", "name_of_gguf", "What -m takes for a GGUF model of a repository.")


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine. `name` is what -m takes; `files` are in the cache, with what they point to."""

    name: str
    path: Path
    format: str
    bytes: int
    modified: float  # seconds since 1970
    store: str
    files: tuple[Path, ...] = field(default=(), repr=False)


def stored_models() -> list[StoredModel]:
    """All of them, by store and name."""
    rows = [*_in_hub_cache(), *in_ollama(), *in_lm_studio()]
    return sorted(rows, key=lambda row: (row.store != HUB, row.store, row.name.lower()))


def find_elsewhere(name: str) -> Path | None:
    """The GGUF file that Ollama or LM Studio calls this; None where they have none of this name."""
    for row in (*in_ollama(), *in_lm_studio()):
        if name.removesuffix(":latest") in (row.name, row.name.removesuffix(":latest")):
            return row.path
    return None


def in_ollama() -> Iterator[StoredModel]:
    """Returns the models that `ollama list` shows."""
    root = Path(os.environ.get("OLLAMA_MODELS") or Path("~/.ollama/models").expanduser())
    manifests = root / "manifests"
    for manifest in sorted(manifests.glob("*/*/*/*")) if manifests.is_dir() else ():
        host, owner, model, tag = manifest.relative_to(manifests).parts
        blob = _ollama_blob(manifest, root)
        if blob is None or not blob.is_file():
            continue
        shown = "/".join(part for part in (host, owner, model) if part not in ("registry.ollama.ai", "library"))
        state = blob.stat()
        yield StoredModel(f"{shown}:{tag}", blob, "GGUF", state.st_size, state.st_mtime, OLLAMA)


def _ollama_blob(manifest: Path, root: Path) -> Path | None:
    """The file of weights that a manifest names; None for one that names none, or is no manifest."""
    try:
        layers = read_object(manifest, "a manifest").get("layers")
    except CheckpointError:
        return None
    for layer in layers if isinstance(layers, list) else ():
        digest = layer.get("digest") if isinstance(layer, dict) else None
        if isinstance(digest, str) and layer.get("mediaType") == _OLLAMA_LAYER and _DIGEST.fullmatch(digest):
            return root / "blobs" / digest.replace(":", "-")
    return None


def in_lm_studio() -> Iterator[StoredModel]:
    """The GGUF models in LM Studio's folders."""
    for root in (Path("~/.lmstudio/models").expanduser(), Path("~/.cache/lm-studio/models").expanduser()):
        for folder in sorted(root.glob("*/*")) if root.is_dir() else ():
            models = gguf_models(folder)
            owner = folder.relative_to(root).as_posix()
            for model in models:
                name = owner if len(models) == 1 else f"{owner}/{model.name}"
                yield _gguf_row(name, model, LM_STUDIO)


def _in_hub_cache() -> Iterator[StoredModel]:
    for repo, folder in _cached_snapshots():
        models = gguf_models(folder)
        for model in models:
            yield _gguf_row(_name_of_gguf(repo, model.relative_to(folder).as_posix(), models), model, HUB)
        if models:
            continue
        kind = kind_of(folder)
        if kind is not None:
            files = tuple(file for file in folder.rglob("*") if file.is_file())
            states = [file.stat() for file in files]
            newest = max(state.st_mtime for state in states)
            yield StoredModel(repo, folder, kind, sum(state.st_size for state in states), newest, HUB, files)


def kind_of(folder: Path) -> str | None:
    """The format of a folder's weights; None where they are not there, or are no model's."""
    if any(folder.glob("adapter_model.*")):
        return "adapter"
    if not any((folder / name).exists() for name in _DESCRIBED):
        return None
    suffixes = {".safetensors": "safetensors", ".bin": "PyTorch .bin", ".pth": "Meta .pth"}
    return next((text for suffix, text in suffixes.items() if any(folder.glob(f"*{suffix}"))), None)


def _gguf_row(name: str, model: Path, store: str) -> StoredModel:
    parts = tuple(part for part in split_parts(model) if part.exists())
    states: list[Any] = [part.stat() for part in parts]
    newest = max(state.st_mtime for state in states)
    return StoredModel(name, model, "GGUF", sum(state.st_size for state in states), newest, store, parts)


def remove(model: StoredModel) -> int:
    """Removes a model of the hub's cache, with the blobs that no other file of its repository points to; bytes freed.

    Raises CheckpointError for a model of another program's store.
    """
    if model.store != HUB:
        remedy = "`ollama rm`" if model.store == OLLAMA else "its own window"
        raise CheckpointError(
            f"{model.name} is in the store of {model.store}, at {model.path}; remove it with {remedy}"
        )
    blobs = {file.resolve() for file in model.files}
    repository = next(parent for parent in model.path.parents if parent.name == "snapshots").parent
    for file in model.files:
        file.unlink()
    others = {file.resolve() for file in (repository / "snapshots").rglob("*") if file.is_file()}
    freed = 0
    for blob in blobs - others:
        if blob.exists():
            freed += blob.stat().st_size
            blob.unlink()
    if not others:
        shutil.rmtree(repository)
    return freed or model.bytes
