"""Checkpoints of a run: whole or not at all, and checked before they are used.

A checkpoint is a folder checkpoint-STEP. It is written beside its place, every file synced, with a manifest of sizes
and hashes, and then renamed. The newest one whose files match its manifest is the one that a run resumes from.

The manifest names the run, so that several may share a folder: a run removes no checkpoint but its own, and the newest
is the last of the run that began last. One process at a time writes there (`files.locked`).
"""

import hashlib
import json
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama2.errors import CheckpointError
from llama2.files import rename, sync_tree, write_text
from llama2.text_file import LISTING_BYTES, read_object

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BEGUN, _GONE = ".checkpoint-new-", ".checkpoint-gone-"


def new_run() -> str:
    """Returns the name of a run in its checkpoints; a later run has a greater name."""
    return f"{time.time_ns():020d}-{secrets.token_hex(4)}"


def run_of(checkpoint: Path) -> str:
    """The run that wrote a checkpoint; "" where it does not say."""
    try:
        found = read_object(checkpoint / MANIFEST, MANIFEST, most=LISTING_BYTES).get("run", "")
    except CheckpointError:
        return ""
    return found if isinstance(found, str) else ""


@contextmanager
def writing(folder: Path, step: int, run: str = "") -> Iterator[Path]:
    """A new folder that becomes `folder`/checkpoint-`step` when the block ends without an error.

    One of that name is replaced where it is of the same run; another run's is kept as checkpoint-`step`-earlier-1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, made = folder / f"checkpoint-{step}", folder / f"{_BEGUN}{secrets.token_hex(8)}"
    made.mkdir()
    try:
        yield made
        files = sorted(path for path in made.rglob("*") if path.is_file())
        content = {str(p.relative_to(made)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        sync_tree(made)
        write_text(made / MANIFEST, json.dumps({"step": step, "run": run, "files": content}, indent=2) + "\n")
        _place(made, target, run)
    except BaseException:
        if made.exists() and not target.exists() and not problem(made):
            _place(made, target, run)  # whole, and the one that it replaces is gone
        shutil.rmtree(made, ignore_errors=True)
        raise


def _place(made: Path, target: Path, run: str) -> None:
    """Gives a whole checkpoint its name. Where that is interrupted, `sweep` goes on with it."""
    if target.exists() and run_of(target) == run:
        _remove(target)
    elif target.exists():
        _set_aside(target)
    rename(made, target)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint: it loses its name at once, so that no half of one is seen."""
    gone = checkpoint.with_name(f"{_GONE}{secrets.token_hex(8)}")
    rename(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _set_aside(checkpoint: Path) -> None:
    names = (checkpoint.with_name(f"{checkpoint.name}-earlier-{count}") for count in range(1, 10_000))
    rename(checkpoint, next(name for name in names if not name.exists()))


def found(folder: Path) -> list[Path]:
    """The checkpoints of all runs in a folder, oldest first, damaged ones too."""
    there = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(there, key=lambda checkpoint: (run_of(checkpoint), step_of(checkpoint)))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name gives."""
    match = _NAME.fullmatch(checkpoint.name)
    return -1 if match is None else int(match[1])


def problem(checkpoint: Path) -> str:
    """Returns what is wrong with a checkpoint, or ""."""
    try:
        files = read_object(checkpoint / MANIFEST, MANIFEST, most=LISTING_BYTES)["files"]
        for name, wanted in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"its manifest names {name!r}, which is not in it"
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
            if _sha256(path) != wanted["sha256"]:
                return f"the content of {name} has changed"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error!r})"
    return ""


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is skipped with a warning."""
    for checkpoint in reversed(found(folder)):
        if not (wrong := problem(checkpoint)):
            return checkpoint
        warnings.warn(f"{checkpoint} is damaged and is skipped: {wrong}", stacklevel=2)
    return None


def prune(folder: Path, keep: int, spare: Path | None = None, run: str = "") -> None:
    """Removes all but the newest `keep` checkpoints of a run, and never `spare`."""
    own = [checkpoint for checkpoint in found(folder) if run_of(checkpoint) == run]
    for checkpoint in own[: -keep or None] if keep else []:
        if checkpoint != spare:
            _remove(checkpoint)


def sweep(folder: Path) -> None:
    """Removes what a run that was killed had begun to write or to remove. What only lacks its name gets it."""
    for left in folder.glob(".checkpoint-*"):
        step: object = -1
        if left.name.startswith(_BEGUN) and not problem(left):
            step = read_object(left / MANIFEST, MANIFEST, most=LISTING_BYTES).get("step")
        if type(step) is int and step >= 0 and not (folder / f"checkpoint-{step}").exists():
            rename(left, folder / f"checkpoint-{step}")
        shutil.rmtree(left, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
