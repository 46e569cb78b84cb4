"""Integers with scales, of whatever file, as the native engine takes them. No torch here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.quantization.packable import AffineWeight, GroupWeight, Int8Weight, PackableWeight, order_of
from llama2.stored_arrays import to_float32

_SPAN = 32  # columns that a kernel takes at once


def integer_weight(
    codes: NDArray[np.uint8],
    scales: NDArray[Any],
    bits: int,
    group: int,
    zeros: NDArray[Any] | None = None,
    minima: NDArray[Any] | None = None,
    index: NDArray[Any] | None = None,
) -> PackableWeight | None:
    """The fields of `forms.Integers` as arrays: G4, G8 where scales are float16 and zeros bytes, R8 for signed bytes of
    whole rows, else A4, A8. None where no layout holds them."""
    codes = np.ascontiguousarray(codes)
    whole = scales.shape[1] == 1
    if not whole and (group % _SPAN or codes.shape[1] % group):
        return None
    group, wide = -1 if whole else group, 4 if bits <= 4 else 8
    scales = to_float32(scales)
    zeros = None if zeros is None else to_float32(zeros)
    if whole and wide == 8 and zeros is not None and bool((zeros == 128).all()):
        values = (codes.astype(np.int16) - 128).astype(np.int8)
        return Int8Weight(values, np.ascontiguousarray(scales.ravel()))
    order = None if index is None else order_of(index, group)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if minima is None and np.array_equal(halves.astype(np.float32), scales):
        small = np.zeros_like(scales) if zeros is None else zeros
        if bool(((small == np.rint(small)) & (small >= 0) & (small <= 255)).all()):
            found = np.ascontiguousarray(small.astype(np.uint8))
            return GroupWeight(codes, np.ascontiguousarray(halves), found, group, wide, order)
    least = np.zeros_like(scales) if minima is None else to_float32(minima)
    if zeros is not None:
        least = -zeros * scales
    return AffineWeight(codes, np.ascontiguousarray(scales), np.ascontiguousarray(least), group, wide, order)
