"""EXL2, ExLlamaV2's files: groups of inputs, each of its own bits (2, 3, 4, 5, 6, 8), inputs in an order of their own.

q_weight int32 (rows, N'): a group's codes as a run of bits down its rows, each output for itself; N' is N up to 32
q_groups int16 (2 G): bits and first row of each group; q_scale int32 (G, N' / 8): codes of 4 bits, less 1;
q_scale_max float16 (G,): scale = (code + 1)^2 * max / 256, in float16; q_invperm int32 (K,)
w[n, i] = (code[q_invperm[i], n] - 2^(bits - 1)) * scale
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2.errors import CheckpointError
from llama2.quantization.file_linear import FileReader, TensorPart, unpack_rows
from llama2.quantization.forms import Form

_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class MixedGroups:
    """A weight (N, K) whose groups of inputs differ in bits: unpacked by torch only."""

    weight: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        return self.weight.to(dtype)

    def packable(self) -> None:
        """No layout has groups of several widths: the engine takes the weight in bfloat16."""
        return


def _groups(tensors: Mapping[str, Tensor], columns: int) -> list[tuple[int, int, int, int]]:
    """(bits, first row, rows, inputs) of every group. Raises CheckpointError where they do not make up the weight."""
    held, weight = tensors.get("q_groups"), tensors.get("q_weight")
    if held is None or weight is None or held.ndim != 1 or weight.ndim != 2 or held.numel() % 2 or not held.numel():
        raise CheckpointError(
            "q_groups and q_weight are needed, bits and first row of each group: fetch the file again"
        )
    said = (held.int() & 0xFFFF).view(-1, 2).tolist()
    found, left = [], columns
    for i, (bits, first) in enumerate(said):
        last = said[i + 1][1] if i + 1 < len(said) else weight.shape[0]
        count = (last - first) * 32 // bits if bits in _BITS else 0
        count = min(count, left) if i + 1 == len(said) else count
        if bits not in _BITS or last <= first or not 0 < count <= left:
            raise CheckpointError(
                f"group {i} of q_groups has {bits} bits from row {first} to {last}: fetch the file again"
            )
        found.append((bits, first, last - first, count))
        left -= count
    if left or said[0][1]:
        raise CheckpointError(f"the groups of q_groups hold {columns - left} inputs of {columns}: fetch the file again")
    return found


def _layout(shape: tuple[int, int], settings: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, TensorPart]:
    rows, columns = shape
    groups, width = _groups(tensors, columns), -(-rows // 32) * 32
    for name in ("q_invperm", "q_perm"):
        order = tensors.get(name)
        if order is not None and not torch.equal(order.flatten().long().sort().values, torch.arange(columns)):
            raise CheckpointError(f"{name} is no permutation of the {columns} inputs: fetch the file again")
    return {
        "q_weight": TensorPart((torch.int32,), (tensors["q_weight"].shape[0], width)),
        "q_scale": TensorPart((torch.int32,), (len(groups), width // 8)),
        "q_scale_max": TensorPart((torch.float16,), (len(groups),)),
        "q_groups": TensorPart((torch.int16,), (2 * len(groups),)),
        "q_invperm": TensorPart((torch.int32, torch.int16), (columns,), optional=True),
        "q_perm": TensorPart((torch.int32, torch.int16), (columns,), optional=True),
    }


def _form(tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Any) -> Form:
    rows, columns = shape
    words, parts = tensors["q_weight"], []
    nibbles = unpack_rows(tensors["q_scale"], 4, words.shape[1]).int() + 1
    scales = nibbles.square().half() * (tensors["q_scale_max"].float() / 256).half()[:, None]
    for at, (bits, first, height, count) in enumerate(_groups(tensors, columns)):
        codes = unpack_rows(words[first : first + height].mT.contiguous(), bits, count)
        parts.append((codes.float() - (1 << (bits - 1))) * scales[at].float()[:, None])
    weight = torch.cat(parts, 1)[:rows]
    if (order := tensors.get("q_invperm")) is not None:
        weight = weight[:, order.long()]
    elif (order := tensors.get("q_perm")) is not None:
        weight = weight[:, order.long().argsort()]
    return MixedGroups(weight, scales)


READER = FileReader(_layout, _form)
