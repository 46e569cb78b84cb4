"""Tensors of files as numpy arrays, also of the types that numpy lacks. No torch here.

An array of bfloat16 or of floats of 8 bits holds their patterns in a dtype with one field that is called as the type:
slicing, joining and comparing bits work as for any array, and no arithmetic is done on patterns by mistake.
"""

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama2.errors import InputError


def _patterns(code: str, base: str) -> Any:
    return np.dtype([(code, base)])


# The type as safetensors calls it -> the dtype of an array of it.
DTYPES: dict[str, Any] = {
    **{code: np.dtype(name) for code, name in (("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"))},
    "BF16": _patterns("BF16", "<u2"),
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (8, 4, 2, 1)},
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
    **{code: _patterns(code, "u1") for code in ("F8_E4M3", "F8_E5M2", "F8_E8M0")},
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
}
CODES: dict[Any, str] = {dtype: code for code, dtype in DTYPES.items()}
BFLOAT16 = DTYPES["BF16"]
WIDTHS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # by torch's names
NAMES = {code: name for name, code in WIDTHS.items()}
TORCH_NAMES = {  # of all types
    **NAMES,
    **{f"I{8 * size}": f"int{8 * size}" for size in (8, 4, 2, 1)},
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


class ArrayLike(Protocol):
    """An array of numpy, or a tensor."""

    @property
    def dtype(self) -> Any:
        """The type of its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""


def said(kind: Any) -> str:
    """A type, or the dtype of an array or a tensor, by torch's name, for messages."""
    code = kind if isinstance(kind, str) else CODES.get(kind, str(kind))
    return f"torch.{TORCH_NAMES.get(code, code).removeprefix('torch.')}"


def misfit(array: ArrayLike | None, types: Collection[Any], shape: tuple[int, ...] | None) -> str:
    """Describes an array that is none of these types and this shape, for messages; "" for one that is.

    types: codes for arrays, dtypes for tensors. shape: None for any."""
    if array is None:
        return "missing"
    own_shape = tuple(array.shape)
    fits = CODES.get(array.dtype, array.dtype) in types and shape in (None, own_shape)
    return "" if fits else f"{said(array.dtype)} {own_shape}"


def is_float(array: NDArray[Any]) -> bool:
    """Whether the values are floating-point numbers, of any width."""
    return array.dtype.kind == "f" or array.dtype.names is not None


def patterns(array: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of an array of bfloat16."""
    return array.view(np.uint16)


def to_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """The values of floats of 16, 32 or 64 bits; in place where they are float32."""
    if array.dtype == BFLOAT16:
        return (patterns(array).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def converted(array: NDArray[Any], code: str) -> NDArray[Any]:
    """The values as F64, F32, F16 or BF16, rounded to nearest even as torch rounds; in place where they are so already.

    Raises InputError for what is no float of 16 bits or more."""
    if array.dtype == DTYPES[code]:
        return array
    if CODES.get(array.dtype) not in NAMES:
        raise InputError(f"values of {CODES.get(array.dtype, array.dtype)} are no floats that convert to {code}")
    if code != "BF16":
        wide = to_float32(array) if array.dtype == BFLOAT16 else array
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            return wide.astype(DTYPES[code])
    exact = to_float32(array)
    bits = exact.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(exact)] = 0x7FC0
    return rounded.view(BFLOAT16)
