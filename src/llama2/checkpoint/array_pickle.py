"""A reader of torch.save's files without torch: an archive of a pickle and the bytes of each storage, mapped.

The unpickler makes containers, numbers and placeholders of tensors, and nothing else: every name that a state dict
needs stands in `_CALLED`, another one is refused. A placeholder becomes an array only when the pickle has ended, from
numbers that are checked against the bytes that the archive stores. Python's own unpickler is used and not the one in C,
which takes the memory that a pickle names for its memo.
"""

import io
import math
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from llama2.checkpoint.pickle_check import begins, inspect, refusal, too_large
from llama2.errors import CheckpointError, needs_torch
from llama2.mapping import mapped
from llama2.stored_arrays import DTYPES, TORCH_NAMES
from llama2.text_file import opened, shown

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_MOST_AXES = 16


class _Placeholder:
    """A storage, or a tensor over one, until the pickle has ended: what the pickle says of it."""

    __slots__ = ("said",)

    def __init__(self, *said: Any) -> None:
        self.said = said

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a tensor is no object with a state")


class _Named(str):
    """A dtype, a layout or a kind of storage by its name: nothing can be called through it."""

    __slots__ = ()


def load(path: Path) -> Any:
    """The content of a file that torch.save wrote, its tensors as arrays over the mapped file.

    Raises CheckpointError for anything that is not made of tensors, containers and numbers, or that asks for more than
    the file holds, MissingDependencyError for torch's format of before 1.6.
    """
    with opened(path) as file:
        if not begins(file.read(16), path):
            raise needs_torch(f"{path} is in the format of torch before 1.6, whose reading")
        inspect(file, path)
        archive = _Archive(file, path)
        try:
            content = _Unpickler(archive).load()
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(refusal(path, f" ({shown(str(error))})")) from error
        except Exception as error:  # an unpickler raises whatever the content makes its parts raise
            said = shown(str(error) or type(error).__name__)
            raise CheckpointError(f"{path} is truncated or malformed ({said}); fetch it again") from error
    return _finished(content, archive)


class _Archive:
    """The mapped archive, and where each storage lies in it."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.path, self.data = path, mapped(file)
        with zipfile.ZipFile(file) as archive:
            self.entries = {entry.filename: entry for entry in archive.infolist()}
            pickled = next(name for name in self.entries if name.rpartition("/")[2] == "data.pkl")
            self.folder = pickled.removesuffix("data.pkl")
            order = self.entries.get(f"{self.folder}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise CheckpointError(f"{path} was written on a machine of the other byte order; save it again on one")
            self.pickle = archive.read(pickled)
        self.total = self.count = 0

    def stored(self, key: Any) -> tuple[int, int]:
        """The first byte of a storage and how many there are. Raises CheckpointError where the archive lacks it."""
        entry = self.entries.get(f"{self.folder}data/{key}")
        if entry is None:
            raise CheckpointError(f"{self.path} has no data for the storage {shown(key)}; fetch it again")
        head = entry.header_offset
        names = self.data[head + 26 : head + 30]
        start = head + 30 + int.from_bytes(names[:2], "little") + int.from_bytes(names[2:], "little")
        if start + entry.file_size > len(self.data):
            raise CheckpointError(f"{self.path} is truncated: the storage {shown(key)} has no end; fetch it again")
        return start, entry.file_size

    def tensor(self, said: Sequence[Any]) -> np.ndarray:
        """The array of a placeholder: storage, first element, shape, strides, dtype. Raises CheckpointError."""
        storage, first, shape, strides, *given = said
        if not isinstance(storage, _Placeholder) or len(storage.said) != 3:
            raise CheckpointError(f"{self.path} holds a tensor without a storage; it is malformed")
        kind, key, elements = storage.said
        code = _DTYPES.get(str(given[0]), "") if given else kind
        if code not in DTYPES:
            raise CheckpointError(f"{self.path} holds a tensor of {shown(str(given[0] if given else kind))}")
        dtype, (start, size) = DTYPES[code], self.stored(key)
        numbers = [first, elements, *shape, *strides]
        if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides) or len(shape) > _MOST_AXES:
            raise CheckpointError(f"{self.path} holds a tensor of shape {shown(shape)}, strides {shown(strides)}")
        last = first + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        count, length = math.prod(shape), size // dtype.itemsize
        self.total, self.count = self.total + count * dtype.itemsize, self.count + 1
        if (count and last >= length) or count > length or too_large(self.total, self.count - 1, len(self.data)):
            raise CheckpointError(
                f"{self.path} holds tensors of {self.total:,} bytes in all, one of shape {tuple(shape)} for which "
                f"{size:,} bytes are stored, and has {len(self.data):,}; it is malformed, save it again"
            )
        if not count:
            return np.empty(shape, dtype)
        flat = np.frombuffer(self.data, dtype, length - first, start + first * dtype.itemsize)
        steps = [step * dtype.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(flat, shape, steps)


_DTYPES = {name: code for code, name in TORCH_NAMES.items()}


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> _Placeholder:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: what follows says nothing about the values."""
    return _Placeholder(storage, first, tuple(shape), tuple(strides))


def _tensor_of(storage: Any, first: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any) -> _Placeholder:
    """torch._utils._rebuild_tensor_v3, of types that have no kind of storage."""
    return _Placeholder(storage, first, tuple(shape), tuple(strides), dtype)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _encoded(text: Any, encoding: Any) -> bytes:
    """How pickle of protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes are written as text of latin1")
    return text.encode("latin1")


_CALLED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("collections", "Counter"): Counter,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *said: _Named(said[0] if said else ""),
    ("_codecs", "encode"): _encoded,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, dict)},
}


class _Unpickler(pickle._Unpickler):
    def __init__(self, archive: _Archive) -> None:
        super().__init__(io.BytesIO(archive.pickle))

    def find_class(self, module: str, name: str) -> Any:
        """Only what is listed."""
        if (module, name) in _CALLED:
            return _CALLED[module, name]
        if module in ("torch", "torch.storage") and (name in _STORAGES or name in _DTYPES):
            return _Named(name)
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, said: Any) -> _Placeholder:
        """("storage", its kind, its key, the device, how many elements)."""
        if not isinstance(said, tuple) or len(said) < 5 or said[0] != "storage" or str(said[1]) not in _STORAGES:
            raise pickle.UnpicklingError(f"a storage of {shown(str(said))}")
        return _Placeholder(_STORAGES[str(said[1])], said[2], said[4])


def _finished(content: Any, archive: _Archive) -> Any:
    """The content with arrays in place of tensors, each container once: they may hold themselves."""
    done: dict[int, Any] = {}

    def made(value: Any) -> Any:
        if isinstance(value, _Placeholder):
            if len(value.said) < 4:
                raise CheckpointError(f"{archive.path} holds a storage alone; weights are tensors, save them as such")
            return archive.tensor(value.said)
        if not isinstance(value, Mapping | list | tuple):
            return value
        if id(value) not in done:
            items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            if not any(isinstance(item, _Placeholder | Mapping | list | tuple) for _, item in items):
                done[id(value)] = value
            elif isinstance(value, Mapping):
                filled: dict[Any, Any] = {}
                done[id(value)] = filled
                filled.update((key, made(item)) for key, item in items)
            else:
                listed: list[Any] = []
                done[id(value)] = listed
                listed += [made(item) for _, item in items]
        return done[id(value)]

    try:
        return made(content)
    except RecursionError as error:
        raise CheckpointError(f"{archive.path} nests its containers too deeply; save a state dict alone") from error
