"""Text files that people give."""

from pathlib import Path

from llama2.errors import InputError


def read_utf8(path: str | Path, encoding: str = "utf-8") -> str:
    """The text of a file. Raises InputError where it is not UTF-8; encoding: "utf-8-sig" drops a byte order mark."""
    try:
        return Path(path).read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
