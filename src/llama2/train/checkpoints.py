"""Checkpoints of a run: whole or not at all, and checked before they are used.

A checkpoint is a folder checkpoint-STEP. It is written beside its place, every file synced, with a manifest of sizes
and hashes, and then renamed. The newest one whose files match its manifest is the one that a run resumes from.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """A new folder that becomes `folder`/checkpoint-`step` when the block ends without an error."""
    folder.mkdir(parents=True, exist_ok=True)
    target, made = folder / f"checkpoint-{step}", Path(tempfile.mkdtemp(dir=folder, prefix=".checkpoint-"))
    try:
        yield made
        files = sorted(path for path in made.rglob("*") if path.is_file())
        content = {str(p.relative_to(made)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        (made / MANIFEST).write_text(json.dumps({"step": step, "files": content}, indent=2) + "\n")
        folders = [path for path in made.rglob("*") if path.is_dir()]
        for path in (*files, made / MANIFEST, *folders, made):
            _sync(path)
        made.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones too."""
    there = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(there, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name gives."""
    match = _NAME.fullmatch(checkpoint.name)
    return -1 if match is None else int(match[1])


def problem(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name, wanted in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
            if _sha256(path) != wanted["sha256"]:
                return f"the content of {name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({error!r})"
    return ""


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is skipped with a warning."""
    for checkpoint in reversed(found(folder)):
        if not (wrong := problem(checkpoint)):
            return checkpoint
        warnings.warn(f"{checkpoint} is damaged and is skipped: {wrong}", stacklevel=2)
    return None


def prune(folder: Path, keep: int, spare: Path | None = None) -> None:
    """Removes all but the newest `keep` checkpoints, and never `spare`."""
    for checkpoint in found(folder)[: -keep or None] if keep else []:
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
