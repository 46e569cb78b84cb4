"""Text files: those that people give, and the small JSON files of settings that are read and written."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from llama2.errors import CheckpointError, InputError


def read_utf8(path: str | Path, encoding: str = "utf-8") -> str:
    """The text of a file. Raises InputError where it is not UTF-8; encoding: "utf-8-sig" drops a byte order mark."""
    try:
        return Path(path).read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def read_object(path: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of settings such as `name`. Raises CheckpointError where it is missing or is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} does not exist; give a folder that holds {name}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch or save the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; {name} must be an object")
    return content


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all: to a temporary file beside it, synced, then renamed. Makes its folder."""
    target = Path(path)
    if target.parent.exists() and not target.parent.is_dir():
        raise InputError(f"{str(target.parent)!r} is a file; give the path of a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=target.parent, prefix=f".{target.name}-", delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
