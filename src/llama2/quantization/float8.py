"""Weights of 8-bit floats as transformers, vLLM and ModelOpt name them; torchao's flattened integers and floats.

fp8          weight float8 (N, K) and weight_scale_inv, which multiplies: (N / 128, K / 128), or one number;
             weight_scale in files of vLLM's older tools, and (N, 1) in fbgemm_fp8; torch.float8_e8m0fnu or its bytes
modelopt     FP8 as above; NVFP4: weight uint8 (N, K / 2), weight_scale float8 (N, K / 16) times
             weight_scale_2
torchao      _weight_qdata int8 or float8 (N, K), _weight_scale (N, G), _weight_zero_point int8
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama2.errors import CheckpointError
from llama2.quantization.compressed_tensors import E2M1, FLOAT8
from llama2.quantization.file_linear import FLOATS, FileReader, TensorPart, unpack_rows
from llama2.quantization.forms import Form, Integers, ScaledFloats, TableCodes

_E8M0 = (torch.float8_e8m0fnu, torch.uint8)
_UNUSED = ("activation_scale", "input_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale", "kv_scale")


def _unused() -> dict[str, TensorPart]:
    return {name: TensorPart((*FLOATS, *FLOAT8), None, True, False) for name in _UNUSED}


def _scale_name(tensors: Mapping[str, Tensor]) -> str:
    return next((name for name in ("weight_scale_inv", "weight_scale") if name in tensors), "weight_scale_inv")


def _layout(shape: tuple[int, int], settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, TensorPart]:
    (rows, columns), name = shape, _scale_name(tensors)
    if settings.is_nvfp4:
        if columns % 16:
            raise CheckpointError(f"{columns} inputs are no multiple of 16, the group of NVFP4")
        return {
            "weight": TensorPart((torch.uint8,), (rows, columns // 2)),
            "weight_scale": TensorPart(FLOAT8[:1], (rows, columns // 16)),
            "weight_scale_2": TensorPart(
                FLOATS, tuple(tensors["weight_scale_2"].shape) if "weight_scale_2" in tensors else ()
            ),
            **_unused(),
        }
    held = tuple(tensors[name].shape) if name in tensors else ()
    block = settings.block(shape, held)
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if held not in (wanted, (rows,), (), (1,)) or (held in ((), (1,)) and wanted != (1, 1)):
        raise CheckpointError(
            f"{name} has the shape {held}; {wanted} is needed for blocks of {block}: correct quantization_config, or "
            "fetch the file again"
        )
    return {"weight": TensorPart(FLOAT8, shape), name: TensorPart((*FLOATS, *_E8M0), held), **_unused()}


def _scales(held: Tensor) -> Tensor:
    """Scales (A, B) float32, from floats or from exponents."""
    if held.dtype == torch.uint8:
        held = torch.exp2(held.float() - 127)
    return held.float().reshape(-1, 1) if held.ndim < 2 else held.float()


def _form(tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Any) -> Form:
    if settings.is_nvfp4:
        scales = tensors["weight_scale"].float() * tensors["weight_scale_2"].float().reshape(-1)[0]
        return TableCodes(unpack_rows(tensors["weight"], 4, shape[1]), E2M1, scales, 16)
    held = tensors[_scale_name(tensors)]
    return ScaledFloats(tensors["weight"], _scales(held), settings.block(shape, tuple(held.shape)))


READER = FileReader(_layout, _form)


# -- torchao -----------------------------------------------------------------------------------------------------


def _ao_layout(shape: tuple[int, int], settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, TensorPart]:
    scale = tensors.get("_weight_scale")
    groups = scale.shape[1] if scale is not None and scale.ndim == 2 else 1
    if groups < 1 or shape[1] % groups:
        raise CheckpointError(f"_weight_scale has {groups} groups, which do not divide {shape[1]} inputs")
    return {
        "_weight_qdata": TensorPart((torch.int8, *FLOAT8), shape),
        "_weight_scale": TensorPart(FLOATS, (shape[0], groups)),
        "_weight_zero_point": TensorPart((torch.int8, torch.int32, *FLOATS), (shape[0], groups), optional=True),
        "_weight_act_pre_scale": TensorPart(FLOATS, None, True, False),
    }


def _ao_form(tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Any) -> Form:
    values, scales, zeros = tensors["_weight_qdata"], tensors["_weight_scale"], tensors.get("_weight_zero_point")
    group = shape[1] // scales.shape[1]
    if values.dtype in FLOAT8:
        return ScaledFloats(values, scales, (1, group))
    zeros = torch.zeros_like(scales) if zeros is None else zeros.float()
    low = int(values.min())
    if low >= -8 and int(values.max()) <= 7 and group < shape[1]:  # int4 in bytes
        return Integers((values.int() + 8).to(torch.uint8), scales, 4, group, zeros=zeros + 8)
    return Integers((values.int() + 128).to(torch.uint8), scales, 8, group, zeros=zeros + 128)


TORCHAO = FileReader(_ao_layout, _ao_form)
