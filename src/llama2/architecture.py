"""Facts of the architecture, without torch: the shape of every parameter, and what GGUF files call it."""

import re
from collections.abc import Mapping

from llama2.config import LlamaConfig
from llama2.lora_config import LINEARS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

GGUF: dict[str, str] = {  # Hugging Face -> llama.cpp, gguf-py/gguf/tensor_mapping.py; {i} stands for the layer
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


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """The name that a table with {i} in place of the layer gives for this one; None where it has none."""
    layer = _NUMBER.search(name)
    found = table.get(pattern(name))
    return found if found is None or layer is None else found.replace("{i}", layer.group())


def pattern(name: str) -> str:
    """The name with {i} in place of its layer."""
    return _NUMBER.sub("{i}", name, count=1)


def gguf_to_hf(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None where there is none."""
    return translate(name, _GGUF_TO_HF)


def hf_to_gguf(name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor; None where there is none."""
    return translate(name, GGUF)


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of every layer, by module path."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (ffn, hidden), (ffn, hidden), (hidden, ffn))
    return {
        f"model.layers.{i}.{'mlp' if name in LINEARS[4:] else 'self_attn'}.{name}": size
        for i in range(config.num_hidden_layers)
        for name, size in zip(LINEARS, sizes, strict=True)
    }


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a LlamaForCausalLM in the order of the module, the head, tied or not, last."""
    hidden, linears = config.hidden_size, linear_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for path, size in linears.items():
        shapes[f"{path}.weight"] = size
        if config.attention_bias if ".self_attn." in path else config.mlp_bias:
            shapes[f"{path}.bias"] = size[:1]
        if path.endswith("down_proj"):
            layer = path.removesuffix(".mlp.down_proj")
            shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,), HEAD: (config.vocab_size, hidden)}
