"""The tensors of LLM.int8()'s files, checked, and what they are to the native engine. No torch here; the layout stands
in `int8`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.errors import CheckpointError
from llama2.quantization.packable import Int8Weight
from llama2.stored_arrays import misfit, said, to_float32

LEVELS = 127


def checked(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int]) -> Mapping[str, NDArray[Any]]:
    """The tensors with scales of float32, which are float16 in files of before 2023. Raises CheckpointError for tensors
    that are no rows (N, K) of int8."""
    if "SCB" in tensors and tensors["SCB"].dtype == np.float16:
        tensors = {**tensors, "SCB": to_float32(tensors["SCB"])}
    wanted = {"weight": ("I8", shape), "SCB": ("F32", shape[:1])}
    for name, (code, size) in wanted.items():
        if there := misfit(tensors.get(name), (code,), size):
            raise CheckpointError(f"{name} is {there}; {said(code)} {size} is needed: quantise the model again")
    if stray := sorted(set(tensors) - {*wanted, "weight_format"}):
        raise CheckpointError(f"{stray[0]} is no part of int8 rows ({', '.join(wanted)}); quantise the model again")
    order = tensors.get("weight_format")
    if order is not None and order.size != 1:
        raise CheckpointError(f"weight_format has {order.size} values; one is needed: save the model again")
    if order is not None and int(order.reshape(-1)[0]) != 0:
        raise CheckpointError(
            f"weight_format is {int(order.reshape(-1)[0])}; only 0, rows, is supported: save the model again"
        )
    if not (np.isfinite(tensors["SCB"]) & (tensors["SCB"] >= 0)).all():
        raise CheckpointError("SCB holds NaN, inf or values below 0; the file is damaged: fetch it again")
    return tensors


def weight_of(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int], config: Any) -> Int8Weight:
    """As `formats.Format.packed`."""
    return packed(checked(tensors, shape))


def packed(tensors: Mapping[str, NDArray[Any]]) -> Int8Weight:
    """The weight of tensors that were checked."""
    return Int8Weight(tensors["weight"], (tensors["SCB"] / np.float32(LEVELS)).astype(np.float32, copy=False))
