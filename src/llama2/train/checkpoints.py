"""Checkpoints of a run: whole or not at all, and checked before they are used.

A checkpoint is a folder checkpoint-STEP. It is written beside its place, every file synced, with a manifest of sizes
and hashes, and then renamed. The newest one whose files match its manifest is the one that a run resumes from.

The manifest names the run, so that several may share a folder: a run removes no checkpoint but its own, and the newest
is the last of the run that began last.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama2.errors import CheckpointError
from llama2.text_file import LISTING_BYTES, read_object

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def new_run() -> str:
    """What a run is called in its checkpoints; a later one has a greater name."""
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
    target, made = folder / f"checkpoint-{step}", Path(tempfile.mkdtemp(dir=folder, prefix=".checkpoint-"))
    try:
        yield made
        files = sorted(path for path in made.rglob("*") if path.is_file())
        content = {str(p.relative_to(made)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        (made / MANIFEST).write_text(json.dumps({"step": step, "run": run, "files": content}, indent=2) + "\n")
        folders = [path for path in made.rglob("*") if path.is_dir()]
        for path in (*files, made / MANIFEST, *folders, made):
            _sync(path)
        made.chmod(0o755)
        if target.exists() and run_of(target) == run:
            shutil.rmtree(target)
        elif target.exists():
            _set_aside(target)
        made.rename(target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _set_aside(checkpoint: Path) -> None:
    names = (checkpoint.with_name(f"{checkpoint.name}-earlier-{count}") for count in range(1, 10_000))
    checkpoint.rename(next(name for name in names if not name.exists()))


def found(folder: Path) -> list[Path]:
    """The checkpoints of all runs in a folder, oldest first, damaged ones too."""
    there = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(there, key=lambda checkpoint: (run_of(checkpoint), step_of(checkpoint)))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name gives."""
    match = _NAME.fullmatch(checkpoint.name)
    return -1 if match is None else int(match[1])


def problem(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
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
            shutil.rmtree(checkpoint)


def sweep(folder: Path) -> None:
    """Removes what a run that was killed had begun to write."""
    for begun in folder.glob(".checkpoint-*"):
        shutil.rmtree(begun, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
