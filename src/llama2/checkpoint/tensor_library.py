"""The operations on tensors that readers of files need, for both kinds: numpy's arrays, here, and torch's tensors
(`torch_tensors`). The readers are written once, over either. No torch here."""

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llama2.checkpoint import array_pickle
from llama2.errors import InputError
from llama2.stored_arrays import CODES, DTYPES, WIDTHS, converted, is_float, to_float32


class TensorLibrary(Protocol):
    """Operations on one kind of tensors."""

    def view(self, data: mmap.mmap, code: str, shape: Sequence[int], at: int) -> Any:
        """The tensor of the type `code` at a byte of the map; a copy where it is not aligned there."""

    def code(self, tensor: Any) -> str:
        """The type as safetensors calls it; torch's own name where it has none there."""

    def is_tensor(self, value: Any) -> bool: ...

    def is_float(self, tensor: Any) -> bool: ...

    def equal(self, a: Any, b: Any) -> bool: ...

    def is_zero(self, tensor: Any) -> bool:
        """Whether every value is 0."""

    def joined(self, parts: Sequence[Any], axis: int) -> Any: ...

    def converted(self, tensor: Any, dtype: Any) -> Any:
        """As the dtype that a caller of `Checkpoint.read` names."""

    def unpickled(self, path: Path, weights_only: bool) -> Any:
        """The content of a file that torch.save wrote, bounded by `pickles`."""


class _Arrays:
    """See `TensorLibrary`; the types that numpy lacks are those of `stored_arrays`."""

    def view(self, data: mmap.mmap, code: str, shape: Sequence[int], at: int) -> Any:
        dtype = DTYPES[code]
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        found = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
        return found if at % dtype.itemsize == 0 else found.copy()

    def code(self, tensor: Any) -> str:
        return CODES.get(tensor.dtype, str(tensor.dtype))

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, np.ndarray)

    def is_float(self, tensor: Any) -> bool:
        return is_float(tensor)

    def equal(self, a: Any, b: Any) -> bool:
        return bool(np.array_equal(a, b))

    def is_zero(self, tensor: Any) -> bool:
        return not bool((to_float32(tensor) if is_float(tensor) else tensor).any())

    def joined(self, parts: Sequence[Any], axis: int) -> Any:
        return np.concatenate(parts, axis)

    def converted(self, tensor: Any, dtype: Any) -> Any:
        if dtype not in WIDTHS:
            raise InputError(f"arrays are converted to one of {', '.join(WIDTHS)}, not {dtype!r}")
        return converted(tensor, WIDTHS[dtype])

    def unpickled(self, path: Path, weights_only: bool) -> Any:
        return array_pickle.load(path)


ARRAYS: TensorLibrary = _Arrays()


def arrays() -> TensorLibrary:
    """The operations on arrays."""
    return ARRAYS
