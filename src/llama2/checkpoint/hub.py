"""Hub ids through huggingface_hub: the only module that imports it. Local paths never come here."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from llama2.checkpoint import CONFIG_FILES, TOKENIZER_FILES, split_parts
from llama2.errors import CheckpointError

_COMPANION = re.compile(r"(?:^|[/._-])(?:mmproj|imatrix)", re.IGNORECASE)
_TYPE = re.compile(
    r"(?<![A-Za-z0-9])((?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|BF16|F16|F32|MXFP4))(?![A-Za-z0-9])", re.IGNORECASE
)

SAFETENSORS_FILES = ("*.safetensors", "*.safetensors.index*.json")
BIN_FILES = ("pytorch_model*.bin", "pytorch_model*.json", "gptq_model-*.bin", "adapter_model.bin")
META_FILES = ("consolidated.*.pth", "params.json", "tokenizer.model")


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


def fetch_model(repo_id: str, options: HubOptions, use_safetensors: bool | None) -> Path:
    """Configuration and weights of a repository: safetensors, else .bin, else Meta's .pth, else its only GGUF model.

    Returns the folder, or the GGUF file. Raises CheckpointError where several GGUF models are there to choose from.
    """
    kinds = {True: (SAFETENSORS_FILES,), False: (BIN_FILES,), None: (SAFETENSORS_FILES, BIN_FILES, META_FILES)}
    for files in kinds[use_safetensors]:
        folder = fetch(repo_id, options, CONFIG_FILES + files)
        if any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.glob("*")):
            return folder
    only = only_gguf(repo_id, options) if use_safetensors is None else None
    return folder if only is None else fetch_gguf(repo_id, options, only, None)


def list_files(repo_id: str, options: HubOptions) -> list[str]:
    """Names of the files of a repository; where the hub is not asked, of those that are in the cache."""
    if not options.local_files_only and not constants.HF_HUB_OFFLINE:
        names: list[str] = _explained(
            huggingface_hub.HfApi().list_repo_files, repo_id, revision=options.revision, token=options.token
        )
    else:
        folder = _snapshot(repo_id, options)
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    inside = f"{options.subfolder}/" if options.subfolder else ""
    return sorted(name.removeprefix(inside) for name in names if name.startswith(inside))


def _repository(repo_id: str, cache_dir: str | Path | None = None) -> Path:
    """The folder of a repository in the cache."""
    return Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def _snapshot(repo_id: str, options: HubOptions) -> Path:
    """The folder of a revision in the cache; some of its files may never have been fetched. Raises CheckpointError."""
    root = _repository(repo_id, options.cache_dir)
    revision = options.revision or "main"
    reference = root / "refs" / revision
    folder = root / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    if not folder.is_dir():
        raise CheckpointError(
            f"{repo_id!r} is not a local path, and the cache has no revision {revision!r} of it; the hub is not asked "
            "(local_files_only, HF_HUB_OFFLINE): fetch it once with a network"
        )
    return folder


def only_gguf(repo_id: str, options: HubOptions) -> str | None:
    """The GGUF model of a repository that holds one, of a split one its first part; None where there is none.

    Raises CheckpointError where there are several.
    """
    models = _models(list_files(repo_id, options))
    if len(models) > 1:
        kinds = ", ".join(dict.fromkeys(tag for name in models if (tag := _kind(name)))) or "none by their names"
        raise CheckpointError(
            f"{repo_id} holds {len(models)} GGUF files; choose one by its type, such as {repo_id}:{_kind(models[0])} "
            f"({kinds}), or by its name, {repo_id}/{models[0]}"
        )
    return models[0] if models else None


def fetch_gguf(repo_id: str, options: HubOptions, file: str | None, tag: str | None) -> Path:
    """One GGUF file of a repository, by its name or by a type that its name holds, with all its parts."""
    if file is None:
        file = pick_gguf(repo_id, list_files(repo_id, options), None, tag)
    parts = [file_part.as_posix() for file_part in split_parts(Path(file))]
    folder = fetch(repo_id, options, tuple(glob_escape(file_part) for file_part in parts))
    if not (folder / file).exists():
        raise CheckpointError(f"{repo_id} holds no {file!r} at this revision; check the name")
    return folder / file


def pick_gguf(repo_id: str, names: list[str], file: str | None, tag: str | None) -> str:
    """The GGUF model among the names of a repository that a file name or a type means, of a split one its first part.

    Raises CheckpointError where that is none or several.
    """
    models = _models(names)
    if file is not None:
        if file not in models:
            raise CheckpointError(f"{repo_id} holds no {file!r}; it holds {', '.join(models) or 'no GGUF file'}")
        return file
    type_tag = str(tag).lower().removesuffix(".gguf")
    exact = [name for name in models if (_kind(name) or "").lower() == type_tag]
    fitting = exact or [name for name in models if type_tag in name.lower()]
    if len(fitting) != 1:
        choices = ", ".join(fitting or models) or "no GGUF file"
        raise CheckpointError(
            f"{repo_id}:{tag} means {len(fitting)} files; {repo_id} holds {choices}: give {repo_id}/FILE.gguf"
        )
    return fitting[0]


def weight_files(repo_id: str, names: list[str]) -> list[str]:
    """Of the files of a repository those that a model needs, by the rule of `fetch_model`: its configuration, its
    tokenizer and one form of its weights. Raises CheckpointError where there are none, or several GGUF models."""
    for patterns in (SAFETENSORS_FILES, BIN_FILES, META_FILES):
        weights = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
        if any(name.endswith((".safetensors", ".bin", ".pth")) for name in weights):
            described = (*CONFIG_FILES, *TOKENIZER_FILES)
            return sorted({*weights, *(name for name in names if any(fnmatch(name, one) for one in described))})
    models = _models(names)
    if len(models) != 1:
        raise CheckpointError(f"{repo_id} holds {len(models)} GGUF files and no other weights; name one of them")
    return [file_part.as_posix() for file_part in split_parts(Path(models[0]))]


def _models(names: list[str]) -> list[str]:
    """GGUF models among files, split ones by their first part, without the companions of a model."""
    models = {split_parts(Path(name))[0].as_posix() for name in names if name.endswith(".gguf")}
    return sorted(name for name in models if not _COMPANION.search(name))


def _kind(name: str) -> str | None:
    """The quantisation type that a file's name holds, as llama.cpp spells it."""
    types = _TYPE.findall(Path(name).stem)
    return types[-1].upper() if types else None


def name_of_gguf(repo_id: str, file: str, models: Collection[Any]) -> str:
    """Returns the argument of -m for a GGUF model of a repository with `models`: the repository where it is alone, else
    with its type where no other has it, else with its file name."""
    if len(models) == 1:
        return repo_id
    type_name = _kind(file)
    alike = [model for model in models if _kind(str(model)) == type_name]
    return f"{repo_id}:{type_name}" if type_name and len(alike) == 1 else f"{repo_id}/{file}"


@dataclass(frozen=True)
class RepositoryFile:
    """A file of a repository: bytes, and its SHA-256 where the hub keeps it as a large one."""

    name: str
    bytes: int
    sha256: str | None


def repository_files(repo_id: str, options: HubOptions) -> list[RepositoryFile]:
    """The files of a repository as the hub lists them. Raises CheckpointError where it cannot be asked."""
    info = _explained(
        huggingface_hub.HfApi().model_info,
        repo_id,
        revision=options.revision,
        token=options.token,
        files_metadata=True,
    )
    return [
        RepositoryFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or ()
    ]


def gguf_choices(files: Sequence[RepositoryFile]) -> dict[str, int]:
    """The GGUF models among the files of a repository, with the bytes of all their parts."""
    sizes = {file.name: file.bytes for file in files}
    return {
        name: sum(sizes.get(file_part.as_posix(), 0) for file_part in split_parts(Path(name)))
        for name in _models(list(sizes))
    }


def cached_snapshots() -> list[tuple[str, Path]]:
    """The repositories of models in the cache and the folder of the newest snapshot of each."""
    root = Path(constants.HF_HUB_CACHE)
    complete = []
    for repository in sorted(root.glob("models--*")) if root.is_dir() else ():
        snapshots = [folder for folder in repository.glob("snapshots/*") if folder.is_dir() and any(folder.iterdir())]
        if snapshots:
            newest = max(snapshots, key=lambda folder: folder.stat().st_mtime)
            complete.append((repository.name.removeprefix("models--").replace("--", "/"), newest))
    return complete


def is_cached(repo_id: str) -> bool:
    """Whether anything of a repository is in the cache."""
    return any(any(folder.iterdir()) for folder in _repository(repo_id).glob("snapshots/*"))


def incomplete_bytes(repo_id: str) -> int:
    """Bytes of a repository in the cache, those of files that are still being fetched among them."""
    blobs = _repository(repo_id) / "blobs"
    return sum(file.stat().st_size for file in blobs.glob("*") if file.is_file()) if blobs.is_dir() else 0


def create(repo_id: str, *, token: str | bool | None, private: bool | None) -> None:
    """Creates the repository where it does not exist."""
    _explained(huggingface_hub.create_repo, repo_id, token=token, private=private, exist_ok=True)


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None,
    private: bool | None,
    commit_message: str,
    revision: str | None = None,
) -> str:
    """Creates the repository where it does not exist and uploads the folder; returns the address of the commit."""
    create(repo_id, token=token, private=private)
    return str(
        _explained(
            huggingface_hub.upload_folder,
            repo_id,
            folder_path=folder,
            token=token,
            commit_message=commit_message,
            **({} if revision is None else {"revision": revision}),
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
