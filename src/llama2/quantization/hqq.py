"""HQQ (Badri and Shaji, 2023): w = (code - zero) * scale with a float zero, as its own files and transformers hold it.

The weight is seen as groups: axis 1 as (-1, G), with scale and zero (rows, 1); axis 0 as (G, -1), with (1, columns).
Codes are packed along the first axis of that view, in as many runs as a byte (int32 for 3 bits) has codes, the first
run in the highest bits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama2.errors import CheckpointError
from llama2.quantization.file_linear import FLOATS, FileReader, TensorPart
from llama2.quantization.forms import Form, Integers

_RUNS = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_SAID = ("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
         "quant_zero", "compute_dtype", "encoded_state_dict", "channel_wise", "optimize", "round_zero",
         "stores_quant_config", "offload_meta")  # fmt: skip
_ANY = (torch.uint8, torch.int32, torch.int64, torch.bool, torch.int8, *FLOATS)


def _geometry(shape: tuple[int, int], settings: Any) -> tuple[int, tuple[int, int], int]:
    """Inputs of a group, the view in which codes are grouped, and the rows of packed codes."""
    rows, columns = shape
    group = settings.group_size or columns
    if rows * columns % group:
        raise CheckpointError(f"{rows} x {columns} weights are no multiple of the groups of {group}")
    view = (rows * columns // group, group) if settings.axis == 1 else (group, rows * columns // group)
    return group, view, -(-view[0] // _RUNS[settings.bits])


def _layout(shape: tuple[int, int], settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, TensorPart]:
    _, view, packed = _geometry(shape, settings)
    each = (view[0], 1) if settings.axis == 1 else (1, view[1])
    dtype = torch.int32 if settings.bits == 3 else torch.uint8
    said = {name: TensorPart(_ANY, None, True, False) for name in _SAID}
    return {
        "W_q": TensorPart((dtype,), (packed, view[1])),
        "scale": TensorPart(FLOATS, each),
        "zero": TensorPart(FLOATS, each),
        **said,
    }


def _form(tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Any) -> Form:
    group, view, _ = _geometry(shape, settings)
    words, bits, runs = tensors["W_q"], settings.bits, _RUNS[settings.bits]
    width = 3 if bits == 3 else 8 // runs
    shifts = width * torch.arange(runs - 1, -1, -1, dtype=words.dtype, device=words.device)
    codes = ((words[None] >> shifts[:, None, None]) & ((1 << width) - 1)).flatten(0, 1)[: view[0]].to(torch.uint8)
    codes = codes.reshape(shape)
    scales, zeros = tensors["scale"], tensors["zero"]
    if settings.axis == 1 and shape[1] % group == 0:
        scales, zeros = scales.reshape(shape[0], -1), zeros.reshape(shape[0], -1)
    else:  # groups across rows: a scale of each weight
        scales, zeros = (each.expand(view).reshape(shape) for each in (scales, zeros))
        group = 1
    return Integers(codes, scales, bits, group, zeros=zeros, arithmetic=scales.dtype)


READER = FileReader(_layout, _form)
