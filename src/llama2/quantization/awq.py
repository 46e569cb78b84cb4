"""AWQ (Lin et al., arXiv 2306.00978) as AutoAWQ, llm-awq and AutoRound lay it out: w = scale * (code - zero).

gemm       qweight int32 (K, N / 8), qzeros int32 (G, N / 8): nibble i of a word is output 0, 2, 4, 6, 1, 3, 5, 7 of its
           eight; scales (G, N)
gemv       qweight int32 (N, K / 8), the first input lowest; qzeros int32 (N, Z), scales (N, 8 Z), Z padded
gemv_fast  qweight int16 (N / 4, K), four rows interleaved by 64 inputs; scales and qzeros float16 (8 Z, N), the second
           the minimum: w = scale * code + qzeros
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama2.errors import CheckpointError
from llama2.quantization.file_linear import FLOATS, FileReader, TensorPart
from llama2.quantization.forms import Form, Integers

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of each output: the inverse of 0, 2, 4, 6, 1, 3, 5, 7


def _nibbles(words: Tensor, places: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """(A, B) int32 -> (A, 8 B) uint8."""
    shifts = 4 * torch.tensor(places, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(1).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Words (A, B / 8) int32 in gemm's order of codes (A, B)."""
    shifts = 4 * torch.tensor(_PLACES, dtype=torch.int64, device=codes.device)
    words = (codes.long().unflatten(1, (-1, 8)) << shifts).sum(-1)
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


def _sizes(shape: tuple[int, int], settings: Any) -> tuple[int, int, int]:
    """Inputs of a group, groups, and gemv's words of zeros."""
    columns = shape[1]
    group = columns if settings.group_size == -1 else settings.group_size
    if columns % group:
        raise CheckpointError(f"{columns} inputs are no multiple of the groups of {group}; correct quantization_config")
    words, step = -(-(columns // group) // 8), 1 if group >= 128 else 2 if group == 64 else 4
    return group, columns // group, -(-words // step) * step


def _layout(shape: tuple[int, int], settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, TensorPart]:
    (rows, columns), (_, groups, padded) = shape, _sizes(shape, settings)
    if rows % 8 or columns % 8:
        raise CheckpointError(f"the weight is {shape}; AWQ packs multiples of 8: the configuration is of another model")
    if settings.version == "gemm":
        return {
            "qweight": TensorPart((torch.int32,), (columns, rows // 8)),
            "qzeros": TensorPart((torch.int32,), (groups, rows // 8), optional=True),
            "scales": TensorPart(FLOATS, (groups, rows)),
        }
    if settings.version == "gemv":
        return {
            "qweight": TensorPart((torch.int32,), (rows, columns // 8)),
            "qzeros": TensorPart((torch.int32,), (rows, padded), optional=True),
            "scales": TensorPart(FLOATS, (rows, 8 * padded)),
        }
    if rows % 4 or columns % 64:
        raise CheckpointError(f"the weight is {shape}; gemv_fast interleaves 4 rows by 64 inputs: it is another layout")
    return {
        "qweight": TensorPart((torch.int16,), (rows // 4, columns)),
        "qzeros": TensorPart((torch.float16,), (8 * padded, rows)),
        "scales": TensorPart((torch.float16,), (8 * padded, rows)),
    }


def _fast_codes(words: Tensor) -> Tensor:
    """gemv_fast's int16 (N / 4, K) -> codes (N, K): word w of 32 inputs has w, w + 8, w + 16, w + 24."""
    shifts = 4 * torch.arange(4, dtype=torch.int32, device=words.device)
    nibbles = (words.int()[..., None] >> shifts) & 15  # (N / 4, K, 4)
    chunks = nibbles.unflatten(1, (-1, 4, 2, 8))  # chunk of 64 inputs, row of the four, block of 32, word, nibble
    return chunks.permute(0, 2, 1, 3, 5, 4).flatten(2).flatten(0, 1).to(torch.uint8)


def _form(tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Any) -> Form:
    group, groups, _ = _sizes(shape, settings)
    scales, qzeros = tensors["scales"], tensors.get("qzeros")
    if settings.version == "gemm":
        codes, scales = _nibbles(tensors["qweight"], _PLACES).mT.contiguous(), scales.mT
        zeros = torch.full_like(scales, 8) if qzeros is None else _nibbles(qzeros, _PLACES).mT
        return Integers(codes, scales, 4, group, zeros=zeros)
    if settings.version == "gemv":
        codes, scales = _nibbles(tensors["qweight"]), scales[:, :groups]
        zeros = torch.full_like(scales, 8) if qzeros is None else _nibbles(qzeros)[:, :groups]
        return Integers(codes, scales, 4, group, zeros=zeros)
    assert qzeros is not None
    return Integers(_fast_codes(tensors["qweight"]), scales[:groups].mT, 4, group, minima=qzeros[:groups].mT)


AWQ = FileReader(_layout, _form)
