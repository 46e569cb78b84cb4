"""What other formats call the tensors: one literal table a format, read both ways, and the q/k permutation.

The names inside are Hugging Face's. `{i}` stands for the layer.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GGUF: dict[str, str] = {  # Hugging Face -> llama.cpp, gguf-py/gguf/tensor_mapping.py
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.{i}.input_layernorm.weight": "blk.{i}.attn_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blk.{i}.attn_q.weight",
    "model.layers.{i}.self_attn.q_proj.bias": "blk.{i}.attn_q.bias",
    "model.layers.{i}.self_attn.k_proj.weight": "blk.{i}.attn_k.weight",
    "model.layers.{i}.self_attn.k_proj.bias": "blk.{i}.attn_k.bias",
    "model.layers.{i}.self_attn.v_proj.weight": "blk.{i}.attn_v.weight",
    "model.layers.{i}.self_attn.v_proj.bias": "blk.{i}.attn_v.bias",
    "model.layers.{i}.self_attn.o_proj.weight": "blk.{i}.attn_output.weight",
    "model.layers.{i}.self_attn.o_proj.bias": "blk.{i}.attn_output.bias",
    "model.layers.{i}.post_attention_layernorm.weight": "blk.{i}.ffn_norm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "blk.{i}.ffn_gate.weight",
    "model.layers.{i}.mlp.gate_proj.bias": "blk.{i}.ffn_gate.bias",
    "model.layers.{i}.mlp.up_proj.weight": "blk.{i}.ffn_up.weight",
    "model.layers.{i}.mlp.up_proj.bias": "blk.{i}.ffn_up.bias",
    "model.layers.{i}.mlp.down_proj.weight": "blk.{i}.ffn_down.weight",
    "model.layers.{i}.mlp.down_proj.bias": "blk.{i}.ffn_down.bias",
}

_GGUF_TO_HF = {theirs: ours for ours, theirs in GGUF.items()}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")


def _translate(name: str, table: dict[str, str]) -> str | None:
    layer = _NUMBER.search(name)
    found = table.get(_NUMBER.sub("{i}", name, count=1))
    return found if found is None or layer is None else found.replace("{i}", layer.group())


def gguf_to_hf(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None where there is none."""
    return _translate(name, _GGUF_TO_HF)


def hf_to_gguf(name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor; None where there is none."""
    return _translate(name, GGUF)


def rotated_heads(name: str, heads: int, kv_heads: int) -> int | None:
    """How many heads the rows of this tensor (Hugging Face name) divide into where RoPE turns them, else None."""
    match = _ROTATED.search(name)
    return None if match is None else (heads if match[1] == "q" else kv_heads)


def to_half_split(rows: "Tensor", heads: int) -> "Tensor":
    """Rows (heads * E, ...) from pairs (0, 1), (2, 3), ... to Hugging Face's (0, E/2), (1, E/2 + 1), ...

    Works on packed rows too: only whole rows move. Meta and GGUF store pairs.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: "Tensor", heads: int) -> "Tensor":
    """The inverse of `to_half_split`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
