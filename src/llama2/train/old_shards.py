"""Checkpoints of earlier versions: torch's distributed format, whose directory, `.metadata`, is a pickle.

Nothing of it is run: an unpickler that knows the few names which such a directory has makes plain records of them, and
the records are checked. The data of each part is what torch.save wrote of one tensor, read as any .bin is.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint import directory, pickles
from llama2.checkpoint.torch_tensors import DTYPES
from llama2.errors import CheckpointError
from llama2.schema import check, several, text, whole
from llama2.text_file import LISTING_BYTES, inside, read_bytes
from llama2.train.shards import TensorParts

METADATA = ".metadata"
_SIZES = {
    "shape": several(whole(0, 2**48), 8),
    "offsets": several(whole(0, 2**48), 8),
    "sizes": several(whole(0, 2**48), 8),
}
_PLACE = {"relative_path": text(255), "offset": whole(0, 2**60), "length": whole(0, 2**60), "fqn": text(4096)}


class _Record:
    """Stands for an object of torch's classes: what it was made of, and its attributes."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __setstate__(self, state: object) -> None:
        vars(self).update(state if isinstance(state, dict) else {"parts": state})


class _TensorRecord(_Record):
    """TensorStorageMetadata: the only entries that are read."""


def _plain(*parts: object) -> tuple[Any, ...]:
    """torch.Size, a path, a layout: what they were made of."""
    return tuple(parts[0]) if len(parts) == 1 and isinstance(parts[0], tuple | list) else parts


_FORMAT = "torch.distributed.checkpoint.metadata"
_CLASSES: dict[tuple[str, str], Any] = {
    (_FORMAT, "TensorStorageMetadata"): _TensorRecord,
    **{
        (_FORMAT, name): _Record
        for name in ("Metadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
                     "StorageMeta", "_MEM_FORMAT_ENCODING")
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch", "Size"): _plain,
    ("torch.serialization", "_get_layout"): _plain,
    ("pathlib", "PosixPath"): _plain,
    ("pathlib", "WindowsPath"): _plain,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES.values()},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Knows the names of _CLASSES and none besides."""

    def find_class(self, module: str, name: str) -> type:
        """Returns the substitute for a class. Raises UnpicklingError for any that no directory has."""
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which was not run")
        return _CLASSES[module, name]


def read(folder: Path) -> dict[str, TensorParts]:
    """Reads the tensors of all ranks' parts, by name. Raises CheckpointError for a directory that is malformed, or
    names anything but what belongs in one."""
    where = folder / METADATA
    try:
        data = read_bytes(where, LISTING_BYTES)
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(
                data
            ):  # makes the unpickler take room for so many
                raise pickle.UnpicklingError("it is malformed")
        content = _Unpickler(io.BytesIO(data)).load()
        return _tensors(content, folder)
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler raises whatever the content makes its parts raise
        raise CheckpointError(f"{where} is no directory of a sharded checkpoint ({error}); it is damaged") from error


def _tensors(content: Any, folder: Path) -> dict[str, TensorParts]:
    places: dict[tuple[str, tuple[int, ...]], Callable[[], Tensor]] = {}
    for index, info in content.storage_data.items():
        found = {name: getattr(info, name) for name in ("relative_path", "offset", "length")} | {"fqn": index.fqn}
        check(found, _PLACE, folder / METADATA)
        if getattr(index, "offset", None) is not None:
            places[index.fqn, tuple(index.offset)] = _reader(folder, found)
    entries = content.state_dict_metadata.items()
    return {name: _stored(name, entry, places, folder) for name, entry in entries if isinstance(entry, _TensorRecord)}


def _stored(name: str, entry: Any, places: dict[Any, Callable[[], Tensor]], folder: Path) -> TensorParts:
    shape, dtype, parts = tuple(entry.size), entry.properties.parts[0], []
    if dtype not in DTYPES.values():
        raise CheckpointError(f"{folder / METADATA}: {name} has dtype {dtype!r}; the checkpoint is damaged")
    for chunk in entry.chunks:
        check({"shape": shape, "offsets": chunk.offsets, "sizes": chunk.sizes}, _SIZES, f"{folder / METADATA}: {name}")
        if tuple(chunk.sizes)[1:] != shape[1:] or any(tuple(chunk.offsets)[1:]):
            raise CheckpointError(
                f"{folder / METADATA}: {name} is not divided by rows; merge it with torch's own tools"
            )
        first, rows = (chunk.offsets[0], chunk.sizes[0]) if shape else (0, 1)
        parts.append((first, rows, places[name, tuple(chunk.offsets)]))
    return TensorParts(name, shape, dtype, tuple(sorted(parts, key=lambda part: part[:2])))


def _reader(folder: Path, place: dict[str, Any]) -> Callable[[], Tensor]:
    """Reads one part; nothing before it is called."""

    def read() -> Tensor:
        path = inside(folder, place["relative_path"], folder / METADATA)
        with directory.found(path) as file:
            file.seek(place["offset"])
            data = file.read(min(place["length"], path.stat().st_size))
        found = pickles.load_part(io.BytesIO(data), len(data), f"{path} from byte {place['offset']}")
        if not isinstance(found, torch.Tensor):
            raise CheckpointError(f"{path} holds a {type(found).__name__} where a tensor is meant; it is damaged")
        return found

    return read
