"""Packed weights in a file of their own, beside the GGUF file: a second start maps them and packs nothing.

    write(file)           MODEL.gguf.packed from an opened GGUF file: only when asked for, it is as large as the weights
    find(file)            that file opened for reading, or None; one that does not fit is told in a warning, not used

Layout: "L2PACKED", u32 version, u32 length of the header, the header as JSON, its sha256, zeros up to a page; then the
matrices as the kernels read them, each at a multiple of 64 bytes. The header is what the GGUF file makes it: a reader
computes it anew and compares, so that no offset or size is ever believed. Only the checksums of the data are read from
it. It names the source (size, time of change, a digest of its header and of samples of its data), the byte order and a
digest of what packing itself does to a fixed pattern: a file of another layout is another file.
"""

import hashlib
import json
import mmap
import os
import re
import shutil
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from llama2.compiled import make_pool, native
from llama2.cpu.gguf_reader import BlockMatrix, GgufSource, block_matrices, check_coverage
from llama2.errors import CheckpointError, InputError
from llama2.files import locked, replacing
from llama2.mapping import mapped
from llama2.quantization.formats import BLOCKS
from llama2.schema import Kind, check, table
from llama2.text_file import opened, parse_json

SUFFIX = ".packed"
_MAGIC, _VERSION = b"L2PACKED", 1
_FIXED = struct.Struct("<8sII")
_SAMPLES, _SAMPLE = 256, 4096
_PIECE = 2 << 20  # bytes of tiles packed at once
_WRITE = 8 << 20  # bytes of one write: the system then caches the file in large pages

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Place:
    """Where one matrix lies."""

    matrix: BlockMatrix
    tile: int  # bytes of 16 rows
    start: int  # bytes from the start of the file

    @property
    def size(self) -> int:
        return -(-self.matrix.shape[0] // 16) * self.tile


_HEX = re.compile(r"[0-9a-f]{8}")
_CHECKSUM = Kind("eight hexadecimal digits", lambda value: isinstance(value, str) and _HEX.fullmatch(value) is not None)


class PackedFile:
    """A packed file that fits its GGUF file, mapped for reading: processes that run it share its memory."""

    def __init__(self, path: Path, source: GgufSource) -> None:
        """Raises CheckpointError for a file that is not whole, not of this source or not of this layout."""
        self.path = path
        expected = _describe(source)
        self.data, stored = _open(path)
        self.checksums = _compare(path, stored, expected)
        self._places = _places(source, _data_start(expected))
        size = _end(self._places)
        if len(self.data) != size:
            raise CheckpointError(f"{path} has {len(self.data)} bytes, {size} are needed: it is damaged")
        for advice in ("MADV_HUGEPAGE", "MADV_WILLNEED"):
            _advise(self.data, advice)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def bytes(self, name: str) -> NDArray[np.uint8]:
        """The packed bytes of a matrix, in the file's map."""
        entry = self._places[name]
        return np.frombuffer(self.data, np.uint8, entry.size, entry.start)

    def verify(self, progress: Progress | None = None) -> None:
        """Reads everything and compares checksums. Raises CheckpointError with the name of the first wrong matrix."""
        done = 0
        for name, entry in self._places.items():
            if progress is not None:
                progress(done, len(self.data), name)
            if zlib.crc32(self.bytes(name).data) != int(self.checksums[name], 16):
                raise CheckpointError(f"{self.path}: the packed matrix {name!r} is damaged; delete the file")
            done += entry.size


def packed_path(source: GgufSource) -> Path:
    """Where the packed file of a GGUF file stands: beside it, its name and ".packed"."""
    return source.path.with_name(source.path.name + SUFFIX)


def find(source: GgufSource) -> PackedFile | None:
    """The packed file beside `source`, or None. One that does not fit is not used, which a warning says."""
    path = packed_path(source)
    if not path.exists():
        return None
    try:
        return PackedFile(path, source)
    except (CheckpointError, OSError) as error:
        warnings.warn(
            f"the packed weights are not used and the model is packed in memory: {error}; "
            f"`llama2 pack {source.path}` writes them anew, deleting them is safe",
            stacklevel=2,
        )
        return None


def write(source: GgufSource, progress: Progress | None = None, threads: int | None = None) -> Path:
    """Packs every block matrix of `source` into `packed_path(source)` and returns that path.

    The file is written beside under another name, synced and renamed; on any error, Ctrl-C included, nothing is left.
    `progress` is called with (bytes done, bytes in all, name of the matrix). Memory: 20 MB, whatever the model's size.
    Raises InputError where there is nothing to pack, too little room, or another process packs the same file;
    MismatchError where the tensors are not those of the configuration.
    """
    check_coverage(source)
    path = packed_path(source)
    if path.is_file() and not _begins(path):
        raise InputError(f"{path} is no packed file; nothing but one is replaced: move it away first")
    header = _describe(source)
    places = _places(source, _data_start(header))
    if not places:
        raise InputError(f"{source.path} has no 4- to 8-bit blocks: its weights are used in place, without packing")
    for entry in places.values():
        entry.matrix.raw()  # refuses a truncated source before anything is written
    size, free = _end(places), shutil.disk_usage(path.parent).free
    if size > free:
        raise InputError(f"{path} needs {size:,} bytes and {path.parent} has {free:,} free; make room there")
    with locked(path), replacing(path, _WRITE) as file:
        _fill(file, source, header, places, make_pool(threads), progress)
        if _describe(source) != header:
            raise CheckpointError(f"{source.path} changed while it was packed; pack it again")
    return path


def _begins(path: Path) -> bool:
    """Whether a file begins as packed ones do."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _fill(
    file: IO[bytes],
    source: GgufSource,
    header: dict[str, Any],
    places: dict[str, _Place],
    pool: Any,
    progress: Progress | None,
) -> None:
    size, checksums = _end(places), dict.fromkeys(places, "0" * 8)
    file.write(_header_bytes(header, checksums))  # keeps the room: the checksums are known at the end
    for name, entry in places.items():
        file.write(bytes(entry.start - file.tell()))
        check = 0
        for piece in _pieces(entry, pool):
            if progress is not None:
                progress(file.tell(), size, name)
            check = zlib.crc32(piece, check)
            file.write(piece)
        checksums[name] = f"{check:08x}"
    file.seek(0)
    file.write(_header_bytes(header, checksums))


def _pieces(entry: _Place, pool: Any) -> Iterator[memoryview]:
    """The tiles of one matrix, a few at a time, in a buffer that is used again."""
    matrix, tiles = entry.matrix, -(-entry.matrix.shape[0] // 16)
    step = max(1, _PIECE // entry.tile)
    buffer = np.empty(step * entry.tile, np.uint8)
    raw, rows = matrix.raw(), matrix.rows
    for first in range(0, tiles, step):
        out = buffer[: min(step, tiles - first) * entry.tile]
        native().pack_tiles(pool, raw, matrix.type_id, *matrix.shape, rows, first, out)
        yield out.data
    matrix.release()


def _header_bytes(header: dict[str, Any], checksums: dict[str, str]) -> bytes:
    text = json.dumps({**header, "crc32": checksums}, sort_keys=True).encode()
    whole = _FIXED.pack(_MAGIC, _VERSION, len(text)) + text
    return whole + hashlib.sha256(whole).digest()


def _data_start(header: dict[str, Any]) -> int:
    """Where the matrices begin: behind the header, at a page."""
    empty = {name: "0" * 8 for name, *_ in header["matrices"]}
    return -(-len(_header_bytes(header, empty)) // mmap.PAGESIZE) * mmap.PAGESIZE


def _open(path: Path) -> tuple[mmap.mmap, dict[str, Any]]:
    """The map of a packed file, and its header where that is whole."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size < _FIXED.size + 32:
            raise CheckpointError(f"{path} is too short to be a packed file")
        data = mapped(file, mmap.ACCESS_READ)
    magic, version, length = _FIXED.unpack_from(data, 0)
    if magic != _MAGIC:
        raise CheckpointError(f"{path} starts with {magic!r}, not {_MAGIC!r}: it is no packed file")
    if version != _VERSION:
        raise CheckpointError(f"{path} is a packed file of version {version}, {_VERSION} is read here")
    end = _FIXED.size + length
    if end + 32 > len(data) or hashlib.sha256(data[:end]).digest() != data[end : end + 32]:
        raise CheckpointError(f"{path} has a damaged header")
    stored = parse_json(data[_FIXED.size : end], f"the header of {path}")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} has a header that is no table")
    return data, stored


def _compare(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> dict[str, str]:
    """The checksums of a header that is what it has to be. Raises CheckpointError with what differs."""
    reasons = {
        "source": "was packed from another file, or from this one before it changed",
        "byte_order": "was packed on a machine of the other byte order",
        "layout": "was packed for kernels of another layout",
        "matrices": "holds other matrices",
    }
    for key, reason in reasons.items():
        if stored.get(key) != expected[key]:
            raise CheckpointError(f"{path} {reason}")
    check(stored, {"crc32": table(_CHECKSUM, 1_000_000)}, path)
    checksums: dict[str, str] = stored.get("crc32", {})
    if set(checksums) != {name for name, *_ in expected["matrices"]}:
        raise CheckpointError(f"{path} lacks checksums of its matrices")
    return checksums


def _places(source: GgufSource, start: int) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for matrix in block_matrices(source):
        try:
            entry = _Place(matrix, native().tile_bytes(matrix.type_id, *matrix.shape), start)
        except ValueError as error:
            raise InputError(f"tensor {matrix.name!r} cannot be packed: {error}") from error
        places[matrix.name] = entry
        start = -(-(start + entry.size) // 64) * 64
    return places


def _end(places: dict[str, _Place]) -> int:
    last = list(places.values())[-1:]
    return last[0].start + last[0].size if last else 0


def _describe(source: GgufSource) -> dict[str, Any]:
    """Returns the header without the checksums of the data."""
    matrices = [(m.name, m.type_id, *m.shape) for m in block_matrices(source)]
    stats = [os.stat(file) for file in source.files]
    size, changed = sum(status.st_size for status in stats), max(status.st_mtime_ns for status in stats)
    return {
        "source": {"bytes": size, "changed_ns": changed, "digest": _digest(source)},
        "byte_order": sys.byteorder,
        "layout": _layout(frozenset(type_id for _, type_id, *_ in matrices)),
        "matrices": [list(m) for m in matrices],
    }


def _digest(source: GgufSource) -> str:
    """sha256 of the header of each file of the model and of samples over all its data."""
    digest = hashlib.sha256()
    for data, head in zip(source.maps, source.data_starts, strict=True):
        digest.update(data[:head])
        for i in range(_SAMPLES):
            offset = head + (len(data) - head) * i // _SAMPLES
            digest.update(data[offset : offset + _SAMPLE])
    return digest.hexdigest()


def _layout(types: frozenset[int]) -> str:
    """A digest of what packing does to a fixed pattern of 16 rows of 512 columns, for every block type in use."""
    digest = hashlib.sha256()
    for type_id in sorted(types):
        raw = (np.arange(_pattern_bytes(type_id), dtype=np.uint32) * 2654435761 >> 13).astype(np.uint8)
        out = np.empty(native().tile_bytes(type_id, 16, 512), np.uint8)
        native().pack_tiles(_single(), raw, type_id, 16, 512, None, 0, out)
        digest.update(out.data)
    return digest.hexdigest()


def _pattern_bytes(type_id: int) -> int:
    return 16 * 512 // BLOCKS[type_id].weights * BLOCKS[type_id].bytes


@cache
def _single() -> Any:
    """One thread, which is the caller's."""
    return native().Pool(1, [])


def _advise(data: mmap.mmap, name: str) -> None:
    """Pages of 2 MB and reading ahead, where the system has them for files."""
    if hasattr(mmap, name):
        with suppress(OSError):
            data.madvise(getattr(mmap, name))
