"""`llama2 pull`: a model from the Hugging Face hub into the cache, its hashes checked."""

import hashlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama2.cli import terminal
from llama2.cli.args import option, revision_option
from llama2.cli.info import size
from llama2.cli.names import add_name, resolve_name
from llama2.cli.progress import Waiting
from llama2.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from llama2.checkpoint.hub import HubOptions, RepositoryFile
    from llama2.checkpoint.source import HubId

SHARE_OF_MEMORY = 0.7  # that the weights may take of this machine's memory; the rest is for the cache and for others
# Where no type is named: a GGUF file of more bits than Q8_0 gives no better answers for its memory.
_MORE_THAN_NEEDED = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """Fetch a model from the Hugging Face hub into the cache, and check its hashes. What was fetched before is kept, so
    that an interrupted run goes on. Of a repository of several GGUF files, where no type is named, the largest that
    fits this machine's memory."""

    paths: tuple[str, ...] = option(
        (), "owner/name, owner/name:Q4_K_M, owner/name/file.gguf or a short name", metavar="MODEL", positional=True
    )
    revision: str | None = revision_option("MODEL")
    name: str | None = option(None, "a short name for it from now on: -m NAME", metavar="NAME")
    dry_run: bool = option(False, "say what would be fetched, and its size; fetch nothing")


def run(options: PullOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 1:
        raise InputError(f"pull fetches one model, but {len(options.paths)} were given; see `llama2 pull --help`")
    from llama2.checkpoint.hub import HubOptions, repository_files
    from llama2.checkpoint.source import local_path

    named = options.paths[0]
    meant = resolve_name(named)
    if local_path(meant) is not None:
        raise InputError(f"{named} is on this machine already: {meant}")
    hub = HubOptions(revision=options.revision)
    found = hub_id_of(meant)
    files = repository_files(found.repo, hub)
    found = chosen(found, files)
    text = text_of(found)
    wanted = selected(found, files)
    total = sum(file.bytes for file in wanted)
    terminal.notice(f"llama2: {text}: {len(wanted)} files, {size(total)}")
    if options.dry_run:
        print("\n".join(f"{size(file.bytes):>9}  {file.name}" for file in wanted))
        return 0
    path = fetched(text, found, hub, total)
    check_hashes(path, wanted)
    if options.name is not None:
        add_name(options.name, text, os.environ)
    print(path)
    return 0


def hub_id_of(text: str) -> "HubId":
    """Parses a hub id. Raises InputError where it cannot be one."""
    from llama2.checkpoint.source import hub_id

    found = hub_id(text)
    if found is None:
        raise InputError(f"{text!r} is no hub id; give owner/name, owner/name:Q4_K_M or owner/name/file.gguf")
    return found


def chosen(hub_id: "HubId", files: "list[RepositoryFile]") -> "HubId":
    """With the GGUF file that fits this machine, where the repository has several and none is named.

    Raises InputError where none fits.
    """
    from llama2.checkpoint.hub import gguf_choices
    from llama2.memory import total_bytes

    if hub_id.file is not None or hub_id.tag is not None:
        return hub_id
    names = {file.name for file in files}
    choices = gguf_choices(files)
    if len(choices) < 2 or ("config.json" in names and any(name.endswith(".safetensors") for name in names)):
        return hub_id
    most = int(SHARE_OF_MEMORY * total_bytes())
    fitting = {
        name: count
        for name, count in choices.items()
        if count <= most and not any(kind in Path(name).name.upper() for kind in _MORE_THAN_NEEDED)
    }
    if not fitting:
        least = min(choices, key=lambda name: choices[name])
        raise InputError(
            f"{hub_id.repo} holds {len(choices)} GGUF files; none takes at most {size(most)}, {SHARE_OF_MEMORY:.0%} "
            f"of this machine's memory; the smallest, {least}, has {size(choices[least])}: name one to fetch it anyhow"
        )
    best = max(fitting, key=lambda name: fitting[name])
    terminal.notice(
        f"llama2: of {len(choices)} GGUF files {best} is the largest that fits {SHARE_OF_MEMORY:.0%} of this machine's "
        f"{size(total_bytes())} of memory"
    )
    return replace(hub_id, file=best)


def text_of(hub_id: "HubId") -> str:
    """A hub id as the user writes it."""
    return hub_id.repo + (f"/{hub_id.file}" if hub_id.file else f":{hub_id.tag}" if hub_id.tag else "")


def selected(hub_id: "HubId", files: "list[RepositoryFile]") -> "list[RepositoryFile]":
    """The files that fetching takes. Raises CheckpointError where a type or name means none or several."""
    from llama2.checkpoint import split_parts
    from llama2.checkpoint.hub import pick_gguf, weight_files

    names = [file.name for file in files]
    if hub_id.file is not None or hub_id.tag is not None:
        first = pick_gguf(hub_id.repo, names, hub_id.file, hub_id.tag)
        parts = {part.as_posix() for part in split_parts(Path(first))}
        return [file for file in files if file.name in parts]
    wanted = set(weight_files(hub_id.repo, names))
    return [file for file in files if file.name in wanted]


def fetched(text: str, hub_id: "HubId", hub: "HubOptions", total: int) -> Path:
    """Fetches a model with its tokenizer; progress on standard error. Returns the folder or the file."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    from llama2.checkpoint.hub import incomplete_bytes
    from llama2.checkpoint.source import locate_all

    bars = sys.stderr.isatty()
    (enable_progress_bars if bars else disable_progress_bars)()
    with Waiting(f"fetching {text}") as waiting:
        waiting.say(lambda: f"{size(incomplete_bytes(hub_id.repo))} of {size(total)}")
        return locate_all(text, hub.revision).path


def check_hashes(path: Path, files: "list[RepositoryFile]") -> None:
    """Compares what was fetched with the hub's sizes and SHA-256. A file that differs is removed.

    Raises CheckpointError.
    """
    root = next(parent for parent in path.parents if parent.parent.name == "snapshots") if path.is_file() else path
    with Waiting("checking hashes"):
        for file in files:
            local = root / file.name
            if not local.exists():
                raise CheckpointError(f"{file.name} was not fetched to {root}; run the command again")
            wrong = local.stat().st_size != file.bytes
            if not wrong and file.sha256 is not None:
                with local.open("rb") as content:
                    wrong = hashlib.file_digest(content, "sha256").hexdigest() != file.sha256
            if wrong:
                local.resolve().unlink()
                local.unlink(missing_ok=True)
                raise CheckpointError(
                    f"{file.name} is not what the hub holds (its size or SHA-256 differs), and was removed; run the "
                    "command again to fetch it anew"
                )


def fetched_if_asked(model: str, revision: str | None) -> str:
    """The model itself; at a terminal one of the hub that is not on this machine is fetched after one question.

    Raises InputError where the answer is no.
    """
    from llama2.checkpoint.hub import HubOptions, is_cached, repository_files
    from llama2.checkpoint.source import local_path

    if not terminal.interactive() or local_path(model) is not None:
        return model
    found, hub = hub_id_of(model), HubOptions(revision=revision)
    if is_cached(found.repo):
        return model
    files = repository_files(found.repo, hub)
    found = chosen(found, files)
    wanted = selected(found, files)
    total = sum(file.bytes for file in wanted)
    answer = input(f"{text_of(found)} is not on this machine; fetch {size(total)}? [Y/n] ").strip().lower()
    if answer not in ("", "y", "yes"):
        raise InputError(f"{model} was not fetched; `llama2 list` shows what is on this machine")
    check_hashes(fetched(text_of(found), found, hub, total), wanted)
    return text_of(found)
