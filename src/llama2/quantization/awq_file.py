"""The tensors of AWQ's files (the layouts stand in `awq`), read from arrays and from tensors alike. No torch here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama2.array_kinds import numbers, to_bytes
from llama2.errors import CheckpointError
from llama2.quantization.integer_weight import integer_weight
from llama2.quantization.packable import PackableWeight
from llama2.stored_arrays import misfit, said, to_float32

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of each output: the inverse of 0, 2, 4, 6, 1, 3, 5, 7
_FLOATS = ("F16", "BF16", "F32")


class AwqPart(NamedTuple):
    """Demands on a tensor: one of these types, this shape."""

    codes: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False


class AwqGrid(NamedTuple):
    """codes (N, K); scales, and zeros or minima, (N, G): w = scale * (code - zero), or scale * code + minimum."""

    codes: Any
    scales: Any
    zeros: Any
    minima: Any


def nibbles(words: Any, places: tuple[int, ...] = tuple(range(8))) -> Any:
    """(A, B) int32 -> (A, 8 B) uint8."""
    shifts = numbers([4 * place for place in places], words)
    return to_bytes(((words[..., None] >> shifts) & 15).reshape(words.shape[0], -1))


def sizes(shape: tuple[int, int], settings: Any) -> tuple[int, int, int]:
    """Inputs of a group, groups, and gemv's words of zeros."""
    columns = shape[1]
    group = columns if settings.group_size == -1 else settings.group_size
    if columns % group:
        raise CheckpointError(f"{columns} inputs are no multiple of the groups of {group}; correct quantization_config")
    words, step = -(-(columns // group) // 8), 1 if group >= 128 else 2 if group == 64 else 4
    return group, columns // group, -(-words // step) * step


def layout(shape: tuple[int, int], settings: Any) -> dict[str, AwqPart]:
    """The tensors of a weight (N, K). Raises CheckpointError for a shape that the layout cannot hold."""
    (rows, columns), (_, groups, padded) = shape, sizes(shape, settings)
    if rows % 8 or columns % 8:
        raise CheckpointError(f"the weight is {shape}; AWQ packs multiples of 8: the configuration is of another model")
    if settings.version == "gemm":
        return {
            "qweight": AwqPart(("I32",), (columns, rows // 8)),
            "qzeros": AwqPart(("I32",), (groups, rows // 8), optional=True),
            "scales": AwqPart(_FLOATS, (groups, rows)),
        }
    if settings.version == "gemv":
        return {
            "qweight": AwqPart(("I32",), (rows, columns // 8)),
            "qzeros": AwqPart(("I32",), (rows, padded), optional=True),
            "scales": AwqPart(_FLOATS, (rows, 8 * padded)),
        }
    if rows % 4 or columns % 64:
        raise CheckpointError(f"the weight is {shape}; gemv_fast interleaves 4 rows by 64 inputs: it is another layout")
    return {
        "qweight": AwqPart(("I16",), (rows // 4, columns)),
        "qzeros": AwqPart(("F16",), (8 * padded, rows)),
        "scales": AwqPart(("F16",), (8 * padded, rows)),
    }


def _fast_codes(words: Any) -> Any:
    """gemv_fast's int16 (N / 4, K) -> codes (N, K): word w of 32 inputs has w, w + 8, w + 16, w + 24."""
    found = (words[..., None] >> numbers([0, 4, 8, 12], words)) & 15  # (N / 4, K, 4)
    chunks = found.reshape(words.shape[0], -1, 4, 2, 8, 4)  # chunk of 64 inputs, row of the four, block, word, nibble
    for one, other in ((1, 2), (4, 5)):
        chunks = chunks.swapaxes(one, other)
    return to_bytes(chunks.reshape(4 * words.shape[0], -1))


def grid(tensors: Mapping[str, Any], shape: tuple[int, int], settings: Any) -> AwqGrid:
    """The meaning of the tensors; zeros None where they are 8 throughout."""
    _, groups, _ = sizes(shape, settings)
    scales, qzeros = tensors["scales"], tensors.get("qzeros")
    if settings.version == "gemm":
        codes = nibbles(tensors["qweight"], PLACES).T
        return AwqGrid(codes, scales.T, None if qzeros is None else nibbles(qzeros, PLACES).T, None)
    if settings.version == "gemv":
        zeros = None if qzeros is None else nibbles(qzeros)[:, :groups]
        return AwqGrid(nibbles(tensors["qweight"]), scales[:, :groups], zeros, None)
    assert qzeros is not None
    return AwqGrid(_fast_codes(tensors["qweight"]), scales[:groups].T, None, qzeros[:groups].T)


def weight_of(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int], settings: Any) -> PackableWeight | None:
    """As `formats.Format.packed`. Raises CheckpointError for tensors that are no such weight."""
    wanted = layout(shape, settings)
    for name, part in wanted.items():
        if part.optional and name not in tensors:
            continue
        if there := misfit(tensors.get(name), part.codes, part.shape):
            raise CheckpointError(
                f"{name} is {there}; {' or '.join(map(said, part.codes))} {part.shape} is needed: correct "
                "quantization_config, or fetch the file again"
            )
    if stray := sorted(set(tensors) - set(wanted)):
        raise CheckpointError(
            f"{stray[0]} is no part of a weight in {settings.label('')} ({', '.join(wanted)}); fetch the file again"
        )
    codes, scales, zeros, minima = grid(tensors, shape, settings)
    for field, held in (("scales", scales), ("minima", minima)):
        if held is not None and not np.isfinite(to_float32(held)).all():
            raise CheckpointError(f"the {field} hold NaN or infinity; fetch the file again")
    if zeros is None and minima is None:
        zeros = np.full(scales.shape, 8, np.uint8)
    return integer_weight(codes, scales, 4, sizes(shape, settings)[0], zeros, minima)
