"""LoRA adapters as GGUF files, which llama.cpp takes with --lora: read like those of peft, and written.

Metadata: general.type "adapter", adapter.type "lora", adapter.lora.alpha; no rank, no tokenizer, no sizes of the model.
Tensors: the model's GGUF name + .lora_a (r, in) and .lora_b (out, r); scale * B A is added to the weight, scale being
alpha / r, and 1 where alpha is 0 or not said. Rows of B of q and k stand in pairs, as those of the weights. Of
token_embd A is (V, r) and B (D, r). Source: llama.cpp, convert_lora_to_gguf.py and llama_adapter_lora_init_impl.
"""

import re
import struct
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.architecture import EMBEDDING
from llama2.checkpoint.adapter_header import ALPHA, lora_alpha
from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.gguf_write import ALIGNMENT, container_head
from llama2.checkpoint.names import gguf_to_hf, hf_to_gguf, rotated_heads, to_half_split, to_pairs
from llama2.checkpoint.peft_files import Parts
from llama2.checkpoint.torch_tensors import CODES
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.files import replacing
from llama2.lora_config import LoraConfig, each_module
from llama2.quantization.ggml import block_type, dequantize

_TENSOR = re.compile(r"(?P<name>.+)\.lora_(?P<half>[ab])")

LowRanks = Mapping[str, tuple[Tensor, Tensor, float]]


# -- reading -----------------------------------------------------------------------------------------------------


def read_parts(path: Path, model: LlamaConfig) -> tuple[LoraConfig, Parts]:
    """The adapter of a GGUF file under the model's own names, rows of q and k in its order; floats as they are stored.

    model: of the base, whose heads say where the rows of q and k belong. Raises CheckpointError for a file that is no
    LoRA adapter or is malformed, MismatchError for tensors that no Llama has.
    """
    file = GgufFile(path)
    alpha = lora_alpha(file)
    file.check_extents()
    parts, ranks = Parts(), dict[str, int]()
    for name in file.tensors:
        if name.endswith("_norm.weight"):  # mergekit's; llama.cpp reads past them too
            warnings.warn(f"{path}: {name} is left out, as llama.cpp does: an adapter here is A and B", stacklevel=2)
            continue
        match = _TENSOR.fullmatch(name)
        ours = None if match is None else gguf_to_hf(match["name"])
        if match is None or ours is None or not ours.endswith(".weight"):
            raise MismatchError(
                f"{path} holds the tensor {name!r}, which is no part of an adapter of a Llama model; those are called "
                "blk.0.attn_q.weight.lora_a and .lora_b. Take an adapter of this model"
            )
        module, half = ours.removesuffix(".weight"), match["half"].upper()
        tensor = _half_of(file, name)
        if ours == EMBEDDING:  # A of the file is looked up by token, so it is B of the sum
            half, tensor = ("B", tensor) if half == "A" else ("A", tensor.mT)
        heads = rotated_heads(ours, model.num_attention_heads, model.num_key_value_heads)
        if half == "B" and heads is not None and tensor.shape[0] % (2 * heads) == 0:  # else told by the shapes
            tensor = to_half_split(tensor, heads)
        parts.pairs.setdefault(module, {})[half] = tensor
        if half == "A":
            ranks[module] = len(tensor)
    _check(path, parts)
    return each_module({name: (rank, alpha or rank) for name, rank in ranks.items()}), parts


def _half_of(file: GgufFile, name: str) -> Tensor:
    """A or B, of floats a view of the map; blocks as float32."""
    info = file.tensors[name]
    if len(info.shape) != 2 or min(info.shape) < 1:
        raise MismatchError(f"{file.path}: {name!r} has shape {info.shape}; a matrix is needed. Convert it again")
    block = block_type(info.type_id)
    data, start = file.place(name)
    count = info.shape[0] * block.row_bytes(info.shape[1])
    rows = torch.frombuffer(data, dtype=torch.uint8, count=count, offset=start).view(info.shape[0], -1)
    return dequantize(rows, block, block.dense or torch.float32)


def _check(path: Path, parts: Parts) -> None:
    if not parts.pairs:
        raise CheckpointError(f"{path} holds no tensors: the adapter was written empty; convert it again")
    for module, pair in parts.pairs.items():
        if lost := sorted({"A", "B"} - set(pair)):
            name = hf_to_gguf(f"{module}.weight")
            raise CheckpointError(f"{path} has {name} without the lora_{lost[0].lower()} of its pair; fetch it again")


# -- writing -----------------------------------------------------------------------------------------------------


def write_adapter(path: Path, low_ranks: LowRanks, model: LlamaConfig, about: Mapping[str, Any]) -> None:
    """Writes an adapter for llama.cpp. low_ranks: (A, B, scale) by module path, as `peft.Adapter` holds them.

    The file has one alpha for all: where scales times ranks differ, B takes the rest, in float32. about: general.* keys
    of the base.
    """
    if not low_ranks:
        raise InputError(f"{path}: an adapter without tensors changes nothing; give one with A and B")
    alpha = _shared_alpha(low_ranks)
    tensors: dict[str, Tensor] = {}
    for module, (a, b, scale) in low_ranks.items():
        name, rest = f"{module}.weight", scale * a.shape[0] / alpha
        if abs(rest - 1) > 1e-9:
            b = b.float() * rest
        heads = rotated_heads(name, model.num_attention_heads, model.num_key_value_heads)
        b = b if heads is None else to_pairs(b, heads)
        halves = (b, a.mT) if name == EMBEDDING else (a, b)
        for half, tensor in zip("ab", halves, strict=True):
            tensors[f"{hf_to_gguf(name)}.lora_{half}"] = tensor.contiguous()
    keys = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", ALPHA: float(alpha)}
    table = [
        (name, tuple(tensor.shape), block_type(CODES[tensor.dtype]).id, tensor.nbytes)
        for name, tensor in tensors.items()
    ]
    with replacing(path) as file:
        file.write(container_head({**keys, **about}, table))
        for tensor in tensors.values():
            data = tensor.view(torch.uint8).numpy()
            file.write(data.tobytes() + bytes(-data.nbytes % ALIGNMENT))


def _shared_alpha(low_ranks: LowRanks) -> float:
    """The alpha of most modules, as float32 has it; never 0, which means 1 / r in a file."""
    alphas = Counter(scale * a.shape[0] for a, _, scale in low_ranks.values() if scale)
    most = alphas.most_common(1)[0][0] if alphas else next(iter(low_ranks.values()))[0].shape[0]
    return float(struct.unpack("<f", struct.pack("<f", most))[0])
