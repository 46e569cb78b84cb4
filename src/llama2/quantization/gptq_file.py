"""The tensors of GPTQ's files, checked, and what they are to the native engine. No torch here; fields in words are read
from arrays and from tensors alike. The layout stands in `gptq`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.array_kinds import empty, numbers
from llama2.errors import CheckpointError, InputError
from llama2.quantization.packable import GroupWeight, order_of
from llama2.stored_arrays import misfit, said, to_float32

SPAN = 32  # fields that fill whole words, whatever their bits
PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What makes every zero of a word one larger, for widths that divide a word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_SCALES = ("F16", "BF16", "F32")


def unpack(words: Any, bits: int) -> Any:
    """The codes (K, N) int32 of words (K bits / 32, N)."""
    top = (1 << bits) - 1
    if bits != 3:
        shifts = numbers(range(0, 32, bits), words)
        return ((words[:, None] >> shifts[:, None]) & top).reshape(-1, words.shape[1])
    groups = words.reshape(-1, bits, words.shape[1])
    codes = empty((groups.shape[0], SPAN, groups.shape[2]), words)
    for field in range(SPAN):
        word, shift = divmod(field * bits, 32)
        codes[:, field] = groups[:, word] >> shift
        if shift + bits > 32:  # the shift above drew in the sign
            codes[:, field] &= (1 << (32 - shift)) - 1
            codes[:, field] |= groups[:, word + 1] << (32 - shift)
    codes &= top
    return codes.reshape(-1, words.shape[1])


def unpack_zeros(qzeros: Any, bits: int, v2: bool) -> Any:
    """The zeros (G, N) int32 that are subtracted.

    A v1 zero of 0 is stored as -1. GPTQModel subtracts and adds on whole words, so that it comes back together with
    what it borrowed from its neighbour; of 3 bits it works on fields.
    """
    if not v2 and bits != 3:
        qzeros = qzeros + _ONES[bits]
    zeros = unpack(qzeros.T, bits).T
    return (zeros + 1) & 7 if bits == 3 and not v2 else zeros


def format_of(qzeros: Any, bits: int) -> str | None:
    """The format of a symmetric weight, whose zeros are all 2^(bits - 1); None where they are not."""
    first = unpack(qzeros.T, bits)
    middle = 1 << (bits - 1)
    return next(
        (name for name, zero in (("gptq", middle - 1), ("gptq_v2", middle)) if bool((first == zero).all())), None
    )


def checked(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int], config: Any) -> dict[str, NDArray[Any]]:
    """The four tensors of a weight (N, K); g_idx is made where the file leaves it out. Raises CheckpointError."""
    found = dict(tensors)
    g_idx = found.get("g_idx")
    if g_idx is None:
        group = config.group_size if config.group_size != -1 else shape[1]
        found["g_idx"] = np.arange(shape[1], dtype=np.int32) // group
    elif g_idx.dtype == np.int64:
        found["g_idx"] = g_idx.astype(np.int32)
    _check(found, shape, config)
    return {name: found[name] for name in PARTS}


def weight_of(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int], config: Any) -> GroupWeight:
    """As `formats.Format.packed`: 2 and 3 bits by the kernel of 4, which their codes are a part of."""
    group = config.group_size if config.group_size != -1 else shape[1]
    return packed(checked(tensors, shape, config), config.bits, group, config.format == "gptq_v2")


def packed(held: Mapping[str, NDArray[Any]], bits: int, group: int, v2: bool) -> GroupWeight:
    """The weight of tensors that were checked, `group` columns to a scale."""
    scales = to_float32(held["scales"])
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if (lost := halves.astype(np.float32) != scales).any():
        raise InputError(
            f"a scale, {scales[lost][0]} in {said(held['scales'].dtype)}, is no float16, which the kernel reads; use "
            "runner='torch'"
        )
    codes, zeros = unpack(held["qweight"], bits), unpack_zeros(held["qzeros"], bits, v2)
    if int(zeros.max()) > 255:
        raise InputError("a zero is 256, which does not fit the 8 bits of the kernel; use runner='torch'")
    return GroupWeight(
        np.ascontiguousarray(codes.astype(np.uint8).T),
        np.ascontiguousarray(halves.T),
        np.ascontiguousarray(zeros.astype(np.uint8).T),
        group=-1 if group == len(codes) else group,
        bits=max(4, bits),
        order=order_of(held["g_idx"], group),
    )


def _check(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int], config: Any) -> None:
    """Raises CheckpointError for tensors that are no weight (N, K) of this configuration."""
    (rows, columns), bits = shape, config.bits
    if rows % SPAN or columns % SPAN:
        raise CheckpointError(
            f"the weight is {shape}; GPTQ packs multiples of {SPAN}: the configuration is of another model"
        )
    groups = 1 if config.group_size == -1 else -(-columns // config.group_size)
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("I32",), (columns * bits // 32, rows)),
        "qzeros": (("I32",), (groups, rows * bits // 32)),
        "scales": (_SCALES, (groups, rows)),
        "g_idx": (("I32",), (columns,)),
    }
    for name, (codes, size) in wanted.items():
        if there := misfit(tensors.get(name), codes, size):
            raise CheckpointError(
                f"{name} is {there}; {said(codes[0])} {size} is needed for {bits} bits in groups of "
                f"{config.group_size}: correct quantization_config, or fetch the file again"
            )
    if stray := sorted(set(tensors) - set(wanted)):
        raise CheckpointError(f"{stray[0]} is no part of a GPTQ linear ({', '.join(wanted)}); quantise the model again")
    _check_values(tensors, groups, config)


def _check_values(tensors: Mapping[str, NDArray[Any]], groups: int, config: Any) -> None:
    scales, g_idx = to_float32(tensors["scales"]), tensors["g_idx"]
    good = np.isfinite(scales)
    if not good.all():
        raise CheckpointError(
            f"scales hold {scales[~good][0]}; each must be a finite number: fetch or quantise the file again"
        )
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"g_idx holds {low if low < 0 else high}; groups are 0..{groups - 1}: fetch the file again"
        )
    found = format_of(tensors["qzeros"], config.bits) if config.sym else None
    if found is not None and found != config.format:
        raise CheckpointError(
            f"the zeros are those of format {found!r} and the configuration says {config.format!r}: every weight would "
            f"be off by a step. Set format and checkpoint_format of quantization_config to {found!r}"
        )
