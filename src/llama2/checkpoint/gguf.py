"""GGUF versions 2 and 3: the container and its metadata, read from memory maps. No torch, no numpy.

Layout (llama.cpp, docs/gguf.md), little endian: "GGUF", u32 version, u64 tensors, u64 keys; the keys, each a string,
a u32 type and a value; the tensor directory; padding; the data. Every count and length is compared with the bytes that
are left before anything of that size is touched.

A model may be split into PREFIX-00001-of-0000N.gguf and on, each a GGUF file with a directory and data of its own; the
first has the metadata, all have split.no (from 0), split.count and split.tensors.count (the tensors of all parts).
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2.checkpoint import split_parts
from llama2.checkpoint.gguf_config import config_from
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError
from llama2.mapping import mapped
from llama2.quantization.formats import BLOCKS
from llama2.text_file import opened, shown

# GGUF value type -> struct code; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
MAX_KEYS = 200_000  # and tensors
MAX_ITEMS = 2**24  # of all arrays together: tokens, scores, types and merges of the largest vocabulary are two millions


@dataclass(frozen=True)
class TensorInfo:
    """One directory entry: shape slowest axis first (the reverse of the file's), ggml type, offset into the data.

    part: which file of a split one holds it.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    part: int = 0


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Every key of a GGUF file: numbers, strings and lists of them. Raises CheckpointError for a malformed file."""
    return GgufFile(path).metadata


class GgufFile:
    """The header of a GGUF file, or of all parts of a split one, whichever part is named.

    `tensors` parses the directories, `place` says where the data of one lies in a map; both only when asked.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._parts = [_Part(Path(path))]
        header = self._parts[0]
        named = split_parts(header.path)
        count = max(header.split("count", 1), len(named) if all(file.exists() for file in named) else 1)
        if count > 1:
            self._parts = self._all_parts(header, count)
        elif header.split("no", 0):
            raise CheckpointError(
                f"{path}: split.no is {header.split('no', 0)} and split.count {count}; fetch it again"
            )
        first = self._parts[0]
        self.path, self.version, self.metadata = first.path, first.version, first.metadata

    @staticmethod
    def _all_parts(given: "_Part", count: int) -> "list[_Part]":
        paths = split_parts(given.path)
        if len(paths) != count:
            raise CheckpointError(
                f"{given.path} is part {given.split('no', 0) + 1} of {count} of a split GGUF file (split.count), which "
                f"are called PREFIX-00001-of-{count:05d}.gguf and so on; give the file its name back"
            )
        if lost := [path.name for path in paths if not path.exists()]:
            raise CheckpointError(
                f"{given.path} is a part of a split GGUF file of {count}, and {', '.join(lost[:4])} "
                f"({len(lost)} in all) is missing beside it; fetch all parts"
            )
        parts = [given if path == given.path else _Part(path) for path in paths]
        for i, file in enumerate(parts):
            said = file.split("no", 0), file.split("count", 1)
            if said != (i, count):
                raise CheckpointError(
                    f"{file.path} says that it is part {said[0] + 1} of {said[1]} (split.no, split.count), not "
                    f"{i + 1} of {count} as it is called; the files do not belong together"
                )
        return parts

    @property
    def files(self) -> list[Path]:
        """The file, or the parts of a split one in order."""
        return [file.path for file in self._parts]

    @property
    def maps(self) -> list[mmap.mmap]:
        """The whole files, mapped copy-on-write: writing to them changes memory only."""
        return [file.map for file in self._parts]

    @property
    def data_starts(self) -> list[int]:
        """Where the weights begin in each file, in bytes from its start."""
        return [file.data_start for file in self._parts]

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(len(file.map) for file in self._parts)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensor directory of all parts by GGUF name."""
        found: dict[str, TensorInfo] = {}
        for i, file in enumerate(self._parts):
            for name, info in file.tensors.items():
                if name in found:
                    raise CheckpointError(f"{file.path} and an earlier part both hold {name!r}; fetch the files again")
                found[name] = replace(info, part=i)
        total = self._parts[0].split("tensors.count", len(found))
        if len(self._parts) > 1 and total != len(found):
            raise CheckpointError(
                f"{self.path} announces {total} tensors in all its parts, which hold {len(found)}; fetch them again"
            )
        return found

    def place(self, name: str) -> tuple[mmap.mmap, int]:
        """The map that holds the data of a tensor, and the byte where it begins."""
        info = self.tensors[name]
        file = self._parts[info.part]
        return file.map, file.data_start + info.offset

    def check_extents(self) -> None:
        """Raises CheckpointError for a tensor of a type that is not known, or that does not lie within its file."""
        for info in self.tensors.values():
            if info.type_id not in BLOCKS:
                continue  # who reads it names the types that it has
            block = BLOCKS[info.type_id]
            data, start = self.place(info.name)
            end = start + math.prod(info.shape[:-1]) * (info.shape[-1] // block.weights * block.bytes)
            if info.offset % 8 or end > len(data):
                raise CheckpointError(
                    f"{self.files[info.part]} is truncated or malformed: tensor {info.name!r} ({block.id}, "
                    f"{info.shape}) lies at bytes {start} to {end}, the file ends at byte {len(data)}. Fetch the file "
                    "again"
                )

    def floats(self, name: str) -> tuple[float, ...]:
        """A small F32 tensor as numbers."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        data, start = self.place(name)
        if info.type_id != 0 or start + 4 * count > len(data):
            raise CheckpointError(f"{self.path}: tensor {name!r} is not F32 within the file; fetch the file again")
        return struct.unpack_from(f"<{count}f", data, start)

    @cached_property
    def config(self) -> LlamaConfig:
        """The architecture of the model in the file."""
        return config_from(self)


class _Part:
    """One file: its header at once, its directory when asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.map = _map(path)
        reader = _Reader(self.map, self.path)
        self.version, self._tensor_count, key_count = self._read_counts(reader)
        self.metadata = self._read_keys(reader, key_count)
        self._directory = reader.at

    def split(self, key: str, default: int) -> int:
        """split.no, split.count or split.tensors.count."""
        value = self.metadata.get(f"split.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: split.{key} is {value!r}; a whole number is needed")
        return value

    def _read_counts(self, reader: "_Reader") -> tuple[int, int, int]:
        if self.map[:4] != b"GGUF":
            raise CheckpointError(f"{self.path} starts with {self.map[:4]!r}, not b'GGUF'; it is not a GGUF file")
        reader.at = 4
        version: int = reader.scalar("I")
        if version not in (2, 3):
            version_name = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise CheckpointError(
                f"{self.path} is a {version_name} GGUF file; little-endian versions 2 and 3 are supported. "
                "Convert it again with a current llama.cpp"
            )
        return version, reader.scalar("Q"), reader.scalar("Q")

    def _read_keys(self, reader: "_Reader", count: int) -> dict[str, Any]:
        reader.require(count, 13, "keys")
        if count > MAX_KEYS:
            raise CheckpointError(f"{self.path} announces {count} keys; at most {MAX_KEYS} are read")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = reader.string()
            if key in metadata:
                raise CheckpointError(f"{self.path} names the key {key!r} twice; the file is malformed")
            metadata[key] = reader.value(reader.scalar("I"))
        return metadata

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensor directory by GGUF name."""
        reader = _Reader(self.map, self.path, self._directory)
        reader.require(self._tensor_count, 24, "tensors")
        if self._tensor_count > MAX_KEYS:
            raise CheckpointError(f"{self.path} announces {self._tensor_count} tensors; at most {MAX_KEYS} are read")
        found: dict[str, TensorInfo] = {}
        for _ in range(self._tensor_count):
            name, dims = reader.string(), reader.scalar("I")
            if not 1 <= dims <= _MAX_DIMS:
                raise CheckpointError(f"{self.path}: tensor {name!r} has {dims} axes; GGUF allows 1 to {_MAX_DIMS}")
            if name in found:
                raise CheckpointError(f"{self.path} names the tensor {name!r} twice; the file is malformed")
            shape = tuple(reversed([reader.scalar("Q") for _ in range(dims)]))
            found[name] = TensorInfo(name, shape, reader.scalar("I"), reader.scalar("Q"))
        self._data_start = reader.at
        return found

    @cached_property
    def data_start(self) -> int:
        """Where the weights begin, in bytes from the start of the file."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}; it must be a multiple of 8")
        self.tensors  # noqa: B018 - parsing the directory finds its end
        return -(-self._data_start // alignment) * alignment


def _map(path: Path) -> mmap.mmap:
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise CheckpointError(f"{path} has {size} bytes; a GGUF header alone has 24. Fetch the file again")
            return mapped(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} does not exist; give the path of a GGUF file") from error


class _Reader:
    """A cursor over the header that refuses to pass the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path, at: int = 0) -> None:
        self.data, self.path, self.at, self.size, self._items = data, path, at, len(data), 0

    def require(self, count: int, each: int, what: str) -> None:
        """Raises CheckpointError unless `count` items of at least `each` bytes are left."""
        left = self.size - self.at
        if count * each > left:
            raise CheckpointError(
                f"{self.path} is truncated or malformed: at byte {self.at} it announces {count} {what} "
                f"(at least {count * each} bytes), but {left} bytes are left. Fetch the file again"
            )

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.require(1, size, "number")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.require(length, 1, "bytes of text")
        start, self.at = self.at, self.at + length
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: the text at byte {start} is not UTF-8; fetch the file again"
            ) from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.scalar(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: value type {kind} at byte {self.at} is unknown (arrays of arrays are not supported); "
                "the file is malformed or of a newer format"
            )
        return _SCALARS[kind]

    def _hold(self, count: int, each: int, what: str) -> None:
        """As `require`, of items that become objects of Python, which are larger than the file's."""
        self.require(count, each, what)
        self._items += count
        if self._items > MAX_ITEMS:
            raise CheckpointError(
                f"{self.path} announces {shown(self._items)} items in arrays of its keys up to byte {self.at}; at most "
                f"{MAX_ITEMS} are read"
            )

    def array(self) -> list[Any]:
        value_type, count = self.scalar("I"), self.scalar("Q")
        if value_type == _STRING:
            return self._strings(count)
        code = self._code(value_type)
        size = struct.calcsize("<" + code)
        self._hold(count, size, "array items")
        start, self.at = self.at, self.at + count * size
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def _strings(self, count: int) -> list[str]:
        # A vocabulary is 50,000 to 200,000 strings: one tight loop over plain bytes, bounds checked once per string.
        self._hold(count, 8, "strings")
        data, offset, size = self.data, self.at, self.size
        length_at = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                start = offset + 8
                offset = start + length_at(data, offset)[0]
                if offset > size:
                    break
                strings.append(data[start:offset].decode())
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: the strings at byte {self.at} are malformed ({error})") from error
        if offset > size:
            raise CheckpointError(
                f"{self.path} is truncated or malformed: a string ends at byte {offset}, the file at byte {size}. "
                "Fetch the file again"
            )
        self.at = offset
        return strings
