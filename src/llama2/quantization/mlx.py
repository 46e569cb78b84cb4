"""MLX folders: `quantization` in config.json; X.weight uint32, X.scales, and in mode affine X.biases.

affine   w = scale * code + bias; codes of 2, 3, 4, 5, 6 or 8 bits as a run of bits along the row
mxfp4    groups of 32, E2M1 codes, scales uint8 exponents; mxfp8: bytes of E4M3; nvfp4: groups of 16, scales E4M3
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama2.errors import CheckpointError
from llama2.quantization.compressed_tensors import E2M1
from llama2.quantization.file_linear import FLOATS, FileReader, TensorPart, unpack_rows
from llama2.quantization.forms import Form, Integers, ScaledFloats, TableCodes


def _layout(shape: tuple[int, int], settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, TensorPart]:
    rows, columns = shape
    bits, group = settings.bits, settings.group_size
    if columns % group or columns * bits % 32:
        raise CheckpointError(f"{columns} inputs are no multiple of the groups of {group}; correct quantization")
    weight = {"weight": TensorPart((torch.uint32,), (rows, columns * bits // 32))}
    if settings.mode != "affine":
        return {**weight, "scales": TensorPart((torch.uint8,), (rows, columns // group))}
    each = TensorPart(FLOATS, (rows, columns // group))
    return {**weight, "scales": each, "biases": each}


def _form(tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Any) -> Form:
    words, scales, group = tensors["weight"].view(torch.int32), tensors["scales"], settings.group_size
    codes = unpack_rows(words, settings.bits, shape[1])
    if settings.mode == "affine":
        return Integers(codes, scales, settings.bits, group, minima=tensors["biases"])
    exponents = torch.exp2(scales.float() - 127)
    if settings.mode == "mxfp8":
        return ScaledFloats(codes.view(torch.float8_e4m3fn), exponents, (1, group))
    return TableCodes(
        codes, E2M1, exponents if settings.mode == "mxfp4" else scales.view(torch.float8_e4m3fn).float(), group
    )


READER = FileReader(_layout, _form)
