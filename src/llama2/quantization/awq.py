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

from llama2.quantization.awq_file import PLACES, grid, layout, sizes
from llama2.quantization.file_linear import FileReader, TensorPart
from llama2.quantization.forms import Form, Integers
from llama2.stored_arrays import TORCH_NAMES


def pack_nibbles(codes: Tensor) -> Tensor:
    """Words (A, B / 8) int32 in gemm's order of codes (A, B)."""
    shifts = 4 * torch.tensor(PLACES, dtype=torch.int64, device=codes.device)
    words = (codes.long().unflatten(1, (-1, 8)) << shifts).sum(-1)
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


def _layout(shape: tuple[int, int], settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, TensorPart]:
    return {
        name: TensorPart(
            tuple(getattr(torch, TORCH_NAMES[code]) for code in part.codes), part.shape, optional=part.optional
        )
        for name, part in layout(shape, settings).items()
    }


def _form(tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Any) -> Form:
    found, group = grid(tensors, shape, settings), sizes(shape, settings)[0]
    codes = found.codes.contiguous()
    if found.minima is not None:
        return Integers(codes, found.scales, 4, group, minima=found.minima)
    zeros = torch.full_like(found.scales, 8) if found.zeros is None else found.zeros
    return Integers(codes, found.scales, 4, group, zeros=zeros)


AWQ = FileReader(_layout, _form)
