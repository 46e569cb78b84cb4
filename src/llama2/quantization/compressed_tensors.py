"""compressed-tensors, what vLLM's tools write: integers in words, bytes or floats of 8 bits, FP4 with two scales.

pack-quantized   weight_packed int32 (N, ceil(K b / 32)): code + 2^(b-1), a run of bits along the row; weight_scale
                 (N, G); weight_shape int64 (2,); asymmetric: weight_zero_point int32 (ceil(N b / 32), G), packed in the
                 same way along the outputs, of old files int8 (N, G); weight_g_idx int32 (K,)
int-quantized, naive-quantized   weight int8 (N, K), weight_scale (N, G) or (1,), weight_zero_point int8
float-quantized  weight float8 (N, K), weight_scale (1,), (N, 1) or (N / r, K / c)
nvfp4-pack-quantized   weight_packed uint8 (N, K / 2), the first of two codes low; weight_scale float8 (N, K / 16);
                 weight_global_scale float32 (1,), which divides
mxfp4-pack-quantized   the same with weight_scale uint8 (N, K / 32), exponents
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama2.errors import CheckpointError
from llama2.quantization.file_linear import FLOATS, FileReader, TensorPart, unpack_rows
from llama2.quantization.forms import Form, Integers, ScaledFloats, TableCodes

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale")


def activations() -> dict[str, TensorPart]:
    """Names of tensors that describe activations of a linear, which stay floats here."""
    return {name: TensorPart((*FLOATS, *FLOAT8, torch.int8, torch.uint8), None, True, False) for name in _ACTIVATIONS}


def _old_width(settings: Any, columns: int, tensors: Mapping[str, Tensor]) -> bool:
    """Whether words hold whole codes only, which versions before 0.17 wrote where the bits do not divide a word."""
    held, per = tensors.get("weight_packed"), 32 // settings.bits
    straight, whole = -(-columns * settings.bits // 32), -(-columns // per)
    return held is not None and held.ndim == 2 and straight != whole and held.shape[1] == whole


def _layout(shape: tuple[int, int], settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, TensorPart]:
    (rows, columns), kind = shape, settings.kind
    group = settings.group(columns)
    if kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        step, dtype = (16, FLOAT8[0]) if kind.startswith("nv") else (32, torch.uint8)
        if columns % step:
            raise CheckpointError(f"{columns} inputs are no multiple of {step}, the group of {kind}")
        overall = {"weight_global_scale": TensorPart(FLOATS, (1,))} if step == 16 else {}
        return {
            "weight_packed": TensorPart((torch.uint8,), (rows, columns // 2)),
            "weight_scale": TensorPart((dtype,), (rows, columns // step)),
            **overall,
            **activations(),
        }
    scale = TensorPart(FLOATS, tuple(tensors["weight_scale"].shape) if "weight_scale" in tensors else (1,))
    if kind == "pack-quantized":
        bits, groups = settings.bits, -(-columns // group)
        width = -(-columns // (32 // bits)) if _old_width(settings, columns, tensors) else -(-columns * bits // 32)
        height = -(-rows // (32 // bits)) if _old_width(settings, columns, tensors) else -(-rows * bits // 32)
        plain = tensors.get("weight_zero_point", torch.empty(0)).dtype == torch.int8
        zeros = (
            TensorPart((torch.int8,), (rows, groups), True)
            if plain
            else TensorPart((torch.int32,), (height, groups), True)
        )
        return {
            "weight_packed": TensorPart((torch.int32,), (rows, width)),
            "weight_scale": TensorPart(FLOATS, (rows, groups)),
            "weight_shape": TensorPart((torch.int64, torch.int32), (2,), True),
            "weight_zero_point": zeros,
            "weight_g_idx": TensorPart((torch.int32,), (columns,), True),
            **activations(),
        }
    dtypes = FLOAT8 if settings.type == "float" else (torch.int8,)
    _check_scale(scale.shape, shape, settings)
    zeros = TensorPart((torch.int8, *FLOAT8, torch.float32), scale.shape, True, settings.type != "float")
    return {"weight": TensorPart(dtypes, shape), "weight_scale": scale, "weight_zero_point": zeros, **activations()}


def _check_scale(found: tuple[int, ...] | None, shape: tuple[int, int], settings: Any) -> None:
    (rows, columns), (r, c) = shape, settings.block(shape)
    wanted = (-(-rows // r), -(-columns // c))
    if found not in (wanted, (), (1,)) and not (wanted == (rows, 1) and found == (rows,)):
        raise CheckpointError(
            f"weight_scale has the shape {found}; {wanted} is needed for the strategy {settings.strategy!r}: correct "
            "quantization_config, or fetch the file again"
        )
    if found in ((), (1,)) and wanted not in ((1, 1),):
        raise CheckpointError(f"weight_scale is one number; the strategy {settings.strategy!r} needs {wanted}")


def _words_whole(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of words that each hold 32 // bits whole ones."""
    shifts = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count].to(torch.uint8)


def _form(tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Any) -> Form:
    (rows, columns), kind = shape, settings.kind
    if kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        codes = unpack_rows(tensors["weight_packed"], 4, columns)
        if kind.startswith("mx"):
            return TableCodes(codes, E2M1, torch.exp2(tensors["weight_scale"].float() - 127), 32)
        return TableCodes(codes, E2M1, tensors["weight_scale"].float() / tensors["weight_global_scale"].float(), 16)
    scales, zeros = tensors["weight_scale"], tensors.get("weight_zero_point")
    if kind != "pack-quantized" and settings.type == "float":
        return ScaledFloats(
            tensors["weight"], scales.reshape(-1, 1) if scales.ndim < 2 else scales, settings.block(shape)
        )
    bits, group = settings.bits, settings.group(columns)
    middle = 1 << (bits - 1)
    if kind == "pack-quantized":
        take = _words_whole if _old_width(settings, columns, tensors) else unpack_rows
        codes = take(tensors["weight_packed"], bits, columns)
        if zeros is None:
            zeros = torch.full_like(scales, middle, dtype=torch.int32)
        elif zeros.dtype == torch.int8:
            zeros = zeros.int() + middle
        else:
            zeros = take(zeros.mT.contiguous(), bits, rows).mT
        return Integers(codes, scales, bits, group, zeros=zeros, index=_index(tensors.get("weight_g_idx"), group))
    codes = (tensors["weight"].int() + 128).to(torch.uint8)
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    zeros = torch.zeros_like(scales) if zeros is None else zeros.float().reshape(scales.shape)
    return Integers(codes, scales.expand(rows, -1), 8, group, zeros=(zeros + 128).expand(rows, -1))


def _index(g_idx: Tensor | None, group: int) -> Tensor | None:
    """The group of each column; None where groups are runs. -1 throughout means that nothing was reordered."""
    if g_idx is None or bool((g_idx == -1).all()):
        return None
    if int(g_idx.min()) < 0 or int(g_idx.max()) > (len(g_idx) - 1) // group:
        raise CheckpointError(
            f"weight_g_idx holds {int(g_idx.max())}, which is no group of {group}: fetch the file again"
        )
    places = torch.arange(len(g_idx), dtype=g_idx.dtype) // group
    return None if torch.equal(g_idx, places) else g_idx


READER = FileReader(_layout, _form)
