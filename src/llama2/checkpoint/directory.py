"""The directory of a safetensors file: {name: {dtype, shape, data_offsets}} in JSON behind its length. No torch here.

Every entry is checked against the file before anything of its size is touched: dtypes, shapes, and that the tensors
tile the data without gap or overlap.
"""

import math
import os
from pathlib import Path
from typing import IO, Any, NamedTuple

from llama2.errors import CheckpointError
from llama2.schema import check, several, text, whole
from llama2.text_file import opened, parse_json, shown

# Bits of one value; those that `hf.DTYPES` lacks are only counted.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0",
            "U32", "U16")  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, as in the safetensors package
MAX_TENSORS = 200_000  # the largest Llama, quantised with all its parts, has 10,000
_COUNT = whole(0, 2**63)
_ENTRY = {"dtype": text(16), "shape": several(_COUNT, 16), "data_offsets": several(_COUNT, 2)}


class Entry(NamedTuple):
    """A tensor: its name, dtype as the file calls it, shape, and the bytes behind the header where it lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def found(path: Path) -> IO[bytes]:
    """A file of a checkpoint, opened. Raises CheckpointError where it is missing or no regular file."""
    try:
        return opened(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} does not exist; fetch or save the checkpoint again") from error


def read_directory(path: Path, file: IO[bytes], readable: bool = True) -> tuple[int, list[Entry]]:
    """Where the data begins, and every entry. readable: whether dtypes that are not read here are refused.

    Raises CheckpointError for a file that is truncated or malformed."""
    size, head = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"{path} is truncated or not safetensors: its header of {length} bytes does not fit its {size} bytes; "
            "fetch the file again"
        )
    header = _parse(path, file.read(length))
    entries = [_entry(path, name, entry, readable) for name, entry in header.items()]
    _check_tiling(path, entries, size - 8 - length)
    return 8 + length, entries


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        header = parse_json(data, "it")
    except CheckpointError as error:
        raise CheckpointError(f"{path} has a malformed safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is a JSON {type(header).__name__}; fetch the file again")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} holds {len(header):,} tensors; at most {MAX_TENSORS:,} are read")
    return header


def _entry(path: Path, name: str, entry: Any, readable: bool) -> Entry:
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY.keys() or len(name) > 4096:
        raise CheckpointError(
            f"{path}: the entry of tensor {shown(name)} is malformed ({shown(entry)}); dtype, shape and data_offsets "
            "are needed"
        )
    check(entry, _ENTRY, f"{path}: tensor {shown(name)}")
    code, shape = entry["dtype"], tuple(entry["shape"])
    if code not in (READABLE if readable else BITS):
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has dtype {shown(code)}; supported are {', '.join(READABLE)}"
        )
    if len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{path}: the entry of tensor {shown(name)} is malformed: it needs two data_offsets")
    (start, end), needed = entry["data_offsets"], -(-math.prod(shape) * BITS[code] // 8)
    if end - start != needed:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of {code} and shape {shown(list(shape))} needs {shown(needed)} bytes, its "
            f"offsets span {end - start}; the file is malformed, fetch it again"
        )
    return Entry(name, code, shape, start, end)


def _check_tiling(path: Path, entries: list[Entry], data_size: int) -> None:
    at = 0
    for entry in sorted(entries, key=lambda e: e[3:]):
        if entry.start != at:
            raise CheckpointError(
                f"{path}: tensor {shown(entry.name)} starts at byte {entry.start}, the one before ends at {at}"
            )
        at = entry.end
    if at != data_size:
        raise CheckpointError(
            f"{path} is {'truncated' if at > data_size else 'malformed'}: its tensors take {at} bytes, the file holds "
            f"{data_size} after the header; fetch the file again"
        )
