"""Tensor names of other formats: one literal table for each, read both ways, and the q/k permutation.

The names inside are Hugging Face's. `{i}` stands for the layer. GGUF's table stands in `llama2.architecture`.
"""

import re
from typing import Any

from llama2.architecture import GGUF, gguf_to_hf, hf_to_gguf, pattern, translate

__all__ = [
    "GGUF",
    "META",
    "gguf_to_hf",
    "hf_to_gguf",
    "hf_to_meta",
    "meta_axis",
    "meta_to_hf",
    "rotated_heads",
    "to_half_split",
    "to_pairs",
]

# Hugging Face -> Meta, and the axis along which Meta's shards divide the tensor (None: each holds all of it).
META: dict[str, tuple[str, int | None]] = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
    "model.layers.{i}.input_layernorm.weight": ("layers.{i}.attention_norm.weight", None),
    "model.layers.{i}.self_attn.q_proj.weight": ("layers.{i}.attention.wq.weight", 0),
    "model.layers.{i}.self_attn.k_proj.weight": ("layers.{i}.attention.wk.weight", 0),
    "model.layers.{i}.self_attn.v_proj.weight": ("layers.{i}.attention.wv.weight", 0),
    "model.layers.{i}.self_attn.o_proj.weight": ("layers.{i}.attention.wo.weight", 1),
    "model.layers.{i}.post_attention_layernorm.weight": ("layers.{i}.ffn_norm.weight", None),
    "model.layers.{i}.mlp.gate_proj.weight": ("layers.{i}.feed_forward.w1.weight", 0),
    "model.layers.{i}.mlp.up_proj.weight": ("layers.{i}.feed_forward.w3.weight", 0),
    "model.layers.{i}.mlp.down_proj.weight": ("layers.{i}.feed_forward.w2.weight", 1),
}

_HF_TO_META = {ours: theirs for ours, (theirs, _) in META.items()}
_META_TO_HF = {theirs: ours for ours, (theirs, _) in META.items()}
_ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")


def meta_to_hf(name: str) -> str | None:
    """The Hugging Face name of a tensor of Meta's; None where there is none."""
    return translate(name, _META_TO_HF)


def hf_to_meta(name: str) -> str | None:
    """Meta's name of a Hugging Face tensor; None where there is none."""
    return translate(name, _HF_TO_META)


def meta_axis(name: str) -> int | None:
    """The axis along which Meta's shards divide the tensor with this Hugging Face name."""
    return META[pattern(name)][1]


def rotated_heads(name: str, heads: int, kv_heads: int) -> int | None:
    """How many heads the rows of this tensor (Hugging Face name) divide into where RoPE turns them, else None."""
    match = _ROTATED.search(name)
    return None if match is None else (heads if match[1] == "q" else kv_heads)


def to_half_split(rows: Any, heads: int) -> Any:
    """Rows (heads * E, ...) from pairs (0, 1), (2, 3), ... to Hugging Face's (0, E/2), (1, E/2 + 1), ...

    Works on packed rows too: only whole rows move; on arrays and on tensors. Meta and GGUF store pairs.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_pairs(rows: Any, heads: int) -> Any:
    """The inverse of `to_half_split`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
