"""Tensors of files as torch's: the other column of `tensor_library`, and torch's names of the types in files."""

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint import RawTensor, pickles
from llama2.stored_arrays import TORCH_NAMES

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in TORCH_NAMES.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class _Torch:
    """See `tensor_library.TensorLibrary`."""

    def view(self, data: mmap.mmap, code: str, shape: Sequence[int], at: int) -> Any:
        dtype, count = DTYPES[code], math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        if at % dtype.itemsize == 0:
            return torch.frombuffer(data, dtype=dtype, count=count, offset=at).view(tuple(shape))
        # a header that is not padded to 8 bytes; the format allows it
        copied = torch.frombuffer(data, dtype=torch.uint8, count=count * dtype.itemsize, offset=at).clone()
        return copied.view(dtype).view(tuple(shape))

    def code(self, tensor: Any) -> str:
        return CODES.get(tensor.dtype, str(tensor.dtype))

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, Tensor)

    def is_float(self, tensor: Any) -> bool:
        return bool(tensor.is_floating_point())

    def equal(self, a: Any, b: Any) -> bool:
        return bool(torch.equal(a, b))

    def is_zero(self, tensor: Any) -> bool:
        return not bool(tensor.any())

    def joined(self, parts: Sequence[Any], axis: int) -> Any:
        return torch.cat(list(parts), axis)

    def converted(self, tensor: Any, dtype: Any) -> Any:
        return tensor.to(dtype)

    def unpickled(self, path: Path, weights_only: bool) -> Any:
        return pickles.load(path, weights_only=weights_only)


_TORCH = _Torch()


def library() -> _Torch:
    """The operations on torch's tensors."""
    return _TORCH


def raw(tensor: Tensor) -> RawTensor:
    """A tensor as `Checkpoint.raw` gives it."""
    tensor = tensor.contiguous()
    return RawTensor(tensor.reshape(-1, tensor.shape[-1]).view(torch.uint8), CODES[tensor.dtype], tuple(tensor.shape))
