"""A text that a model is measured on: a file, several, or the standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from llama2.errors import InputError


def read(files: Sequence[str]) -> str:
    """The text of the files, joined; - is the standard input. Raises InputError for what is no text."""
    return "\n".join(_read(file) for file in files)


def _read(file: str) -> str:
    try:
        if file == "-":
            text = sys.stdin.buffer.read().decode("utf-8") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        else:
            text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not text.strip():
        raise InputError(f"{'the standard input' if file == '-' else file} holds no text; give at least two tokens")
    return text
