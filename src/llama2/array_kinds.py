"""The few operations that numpy's arrays and torch's tensors spell differently, for functions over either. No torch
here: a tensor is told by its methods."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def numbers(values: Sequence[int], like: Any) -> Any:
    """Whole numbers (n,) of the dtype of `like`, where that is."""
    return like.new_tensor(values) if hasattr(like, "new_tensor") else np.asarray(values, like.dtype)


def empty(shape: Sequence[int], like: Any) -> Any:
    """Memory of the dtype of `like`, where that is."""
    return like.new_empty(tuple(shape)) if hasattr(like, "new_empty") else np.empty(tuple(shape), like.dtype)


def to_bytes(codes: Any) -> Any:
    """Codes below 256 as uint8."""
    return codes.byte() if hasattr(codes, "byte") else codes.astype(np.uint8)
