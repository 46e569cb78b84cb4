"""Text files: those that people give, and the small JSON files of settings.

What a stranger may have made is read here and nowhere else: a regular file, no larger than a bound, JSON no deeper than
a bound, and names that stay in their folder. Every fault is one CheckpointError.
"""

import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import IO, Any

from llama2.errors import CheckpointError, InputError

SETTINGS_BYTES = 16_000_000  # config.json and its like; the largest in use, with a label for every word, has 5 MB
LISTING_BYTES = 128_000_000  # an index of shards, tokenizer.json: as long as a model has tensors or tokens
TEMPLATE_BYTES = 1_000_000  # the longest chat template in use has 25 kB
MAX_DEPTH = 64  # of JSON: no file in use has 20, and nothing behind this bound recurses further
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


# -- files -------------------------------------------------------------------------------------------------------


def opened(path: str | Path) -> IO[bytes]:
    """A file opened for reading in bytes. Raises FileNotFoundError, NotADirectoryError, and CheckpointError for what
    may not be read or is no regular file: a folder, a device, a FIFO (opening one could wait for ever)."""
    descriptor = -1
    try:
        check_regular(path)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{shown(path)} cannot be read: {reason}") from error


def check_regular(path: str | Path) -> None:
    """Raises as `opened`, without opening the file."""
    _refuse_irregular(path, os.stat(path).st_mode)


def _refuse_irregular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
        kind = next((word for holds, word in kinds if holds(mode)), "a device")
        raise CheckpointError(f"{shown(path)} is {kind}, not a regular file; give a file")


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; raises as `opened`, CheckpointError beyond the bound."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise CheckpointError(f"{shown(path)} has more than {most:,} bytes, the bound for such a file; check it")
    return data


def read_utf8(path: str | Path, encoding: str = "utf-8", most: int | None = None) -> str:
    """The text of a file. Raises InputError where it is not UTF-8; encoding: "utf-8-sig" drops a byte order mark.

    most: bytes, for files that come with a model; raises as `read_bytes` then."""
    try:
        if most is not None:
            return read_bytes(path, most).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        return Path(path).read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def inside(folder: Path, name: Any, said_by: str | Path) -> Path:
    """The file of this name in a folder, as another file names it. Raises CheckpointError for what is no plain name,
    and for a link that leads out of the folder; the links of a hub snapshot into its own blobs may."""
    if not isinstance(name, str) or not name or name in (".", "..") or not _PLAIN.fullmatch(name):
        raise CheckpointError(f"{said_by} points to {shown(name)}; it must be the name of a file beside it")
    return linked_inside(folder / name, folder)


def linked_inside(path: Path, folder: Path) -> Path:
    """The path; raises CheckpointError where it is a link that leads out of its folder, as `inside`."""
    if path.is_symlink():
        home = folder.resolve()
        target = Path(os.path.realpath(path))
        snapshots = next((above for above in home.parents if above.name == "snapshots"), None)
        homes = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
        if not any(target.is_relative_to(one) for one in homes):
            raise CheckpointError(f"{path} is a link to {target}, outside its folder; put the file itself there")
    return path


_PLAIN = re.compile(r"[^/\\\0]{1,255}")


def shown(value: Any) -> str:
    """A value of a file for a message: printable, on one line, short."""
    text = str(value) if isinstance(value, Path) else _SHORT.repr(value)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:1000])
    return text if len(text) <= 300 else f"{text[:300]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


# -- JSON --------------------------------------------------------------------------------------------------------


def parse_json(data: bytes, where: str | Path) -> Any:
    """The value of JSON in UTF-8. Raises CheckpointError for what is none, or deeper than MAX_DEPTH."""
    try:
        text = data.decode("utf-8")
        content = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); fetch or save the file again") from error
    if isinstance(content, list | dict) and _deeper(content, MAX_DEPTH):
        raise CheckpointError(f"{where} is JSON nested deeper than {MAX_DEPTH} levels; no such file is")
    return content


def read_object(path: str | Path, name: str, most: int = SETTINGS_BYTES, remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file of settings such as `name`. Raises CheckpointError where it is missing, no regular
    file, more than `most` bytes long, or no such object; remedy: what to do where it is missing."""
    try:
        content = parse_json(read_bytes(path, most), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} does not exist; {remedy or f'give a folder that holds {name}'}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; {name} must be an object")
    return content


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper than `most` levels."""
    level = [value]
    for _ in range(most + 1):
        inner = [value for held in level for value in (held.values() if isinstance(held, dict) else held)]
        level = [value for value in inner if isinstance(value, list | dict)]
        if not level:
            return False
    return True
