"""The tensors of bitsandbytes' 4-bit files, checked, and what they are to the native engine. No torch here; the layout
stands in `nf4`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.errors import CheckpointError
from llama2.quantization.codebooks import FP4, NF4
from llama2.quantization.packable import CodebookWeight
from llama2.stored_arrays import CODES, DTYPES, WIDTHS, misfit, said

TABLES = {"nf4": NF4, "fp4": FP4}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # sizes that bitsandbytes knows
STORAGES = ("uint8", "bfloat16", "float16", "float32")  # bnb_4bit_quant_storage
STATE = "weight.quant_state.bitsandbytes__"
_DAMAGED = "the file is damaged: fetch it, or quantise the model, again"
_CODES = tuple(WIDTHS.get(name, "U8") for name in STORAGES)


@dataclass(frozen=True)
class State:
    """The quantisation state of the JSON: "nf4" or "fp4", values of a block, and of double quantisation blocks of a
    block (0: without) and what is added."""

    kind: str
    block: int
    nested: int = 0
    offset: float = 0.0

    @classmethod
    def read(cls, tensors: Mapping[str, Any], shape: tuple[int, int]) -> "State":
        """The state among the tensors of a layer. Raises CheckpointError for one that is not of a weight (out, in)."""
        keys = [name for name in tensors if name.startswith("weight.quant_state.")]
        if len(keys) != 1 or keys[0].removeprefix(STATE) not in TABLES:
            raise CheckpointError(
                f"it has {keys or 'no weight.quant_state'}; exactly one of {STATE}nf4 and {STATE}fp4 is needed: "
                "quantise the model again with bitsandbytes 0.41.3 or later"
            )
        kind = keys[0].removeprefix(STATE)
        try:
            content = json.loads(bytes(tensors[keys[0]].flatten().tolist()).decode())
            asked = {**content}
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{keys[0]} is not a JSON object in bytes ({error}); {_DAMAGED}") from error
        nested = "nested_blocksize" in asked or "nested_offset" in asked
        rules = {
            "quant_type": (asked.get("quant_type") == kind, f"{kind!r}, as its name says"),
            "blocksize": (asked.get("blocksize") in BLOCKS, f"one of {', '.join(map(str, BLOCKS))}"),
            "dtype": (asked.get("dtype") in STORAGES[1:], f"one of {', '.join(STORAGES[1:])}"),
            "shape": (asked.get("shape") == list(shape), f"{list(shape)}, which the configuration says"),
        }
        if nested:
            size, offset = asked.get("nested_blocksize"), asked.get("nested_offset")
            rules["nested_blocksize"] = (type(size) is int and size > 0, "a number of blocks")
            rules["nested_dtype"] = (asked.get("nested_dtype") == "float32", "'float32'")
            rules["nested_offset"] = (isinstance(offset, int | float) and math.isfinite(offset), "a finite number")
        for name, (holds, bound) in rules.items():
            if not holds:
                raise CheckpointError(f"{keys[0]}: {name} is {asked.get(name)!r}; it must be {bound}: {_DAMAGED}")
        if not nested:
            return cls(kind, asked["blocksize"])
        return cls(kind, asked["blocksize"], asked["nested_blocksize"], float(asked["nested_offset"]))


def _layout(
    state: State, shape: tuple[int, int], tensors: Mapping[str, NDArray[Any]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a layer; the weight's type is the file's, where it can be."""
    count = math.prod(shape)
    held = CODES.get(tensors["weight"].dtype) if "weight" in tensors else None
    storage = held if held in _CODES else "U8"
    blocks, key = -(-count // state.block), STATE + state.kind
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": (storage, (-(-count // 2) // int(DTYPES[storage].itemsize), 1)),
        "weight.absmax": ("U8" if state.nested else "F32", (blocks,)),
        "weight.quant_map": ("F32", (16,)),
    }
    if state.nested:
        layout["weight.nested_absmax"] = ("F32", (-(-blocks // state.nested),))
        layout["weight.nested_quant_map"] = ("F32", (256,))
    return {**layout, key: ("U8", tuple(tensors[key].shape))}


def checked(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int]) -> tuple[State, tuple[str, ...]]:
    """The state, and the names of the tensors in their order. Raises CheckpointError."""
    state = State.read(tensors, shape)
    wanted = _layout(state, shape, tensors)
    for name, (code, size) in wanted.items():
        if there := misfit(tensors.get(name), (code,), size):
            raise CheckpointError(f"{name} is {there}; {said(code)} {size} is needed: quantise the model again")
    if stray := sorted(set(tensors) - set(wanted)):
        raise CheckpointError(f"{stray[0]} is no part of {state.kind} ({', '.join(wanted)}); quantise it again")
    if not np.allclose(tensors["weight.quant_map"], np.asarray(TABLES[state.kind], np.float32), atol=1e-6):
        raise CheckpointError(f"weight.quant_map is not the table of {state.kind}; {_DAMAGED}")
    scales = "weight.nested_absmax" if state.nested else "weight.absmax"
    if not (np.isfinite(tensors[scales]) & (tensors[scales] >= 0)).all():
        raise CheckpointError(f"{scales} holds NaN, inf or values below 0; {_DAMAGED}")
    if state.nested and not (np.abs(tensors["weight.nested_quant_map"]) <= 1).all():
        raise CheckpointError(f"weight.nested_quant_map holds NaN or values outside [-1, 1]; {_DAMAGED}")
    return state, tuple(wanted)


def scales_of(tensors: Mapping[str, NDArray[Any]], state: State) -> NDArray[np.float32]:
    """The scale of every block, float32 (blocks,), double quantisation undone. It may then fall below 0."""
    absmax = tensors["weight.absmax"]
    if not state.nested:
        return absmax
    found: NDArray[np.float32] = tensors["weight.nested_quant_map"][absmax]
    found *= np.repeat(tensors["weight.nested_absmax"], state.nested)[: len(found)]
    return found + np.float32(state.offset)


def weight_of(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int], config: Any) -> CodebookWeight:
    """As `formats.Format.packed`."""
    return packed(tensors, shape, checked(tensors, shape)[0])


def packed(tensors: Mapping[str, NDArray[Any]], shape: tuple[int, int], state: State) -> CodebookWeight:
    """The weight (N, K) of tensors that were checked."""
    codes = np.ascontiguousarray(tensors["weight"]).view(np.uint8).reshape(-1)
    return CodebookWeight(codes, scales_of(tensors, state), shape, TABLES[state.kind], state.block)
