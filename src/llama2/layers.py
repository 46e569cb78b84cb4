"""One layer of the Llama 2 network (Touvron et al. 2023, arXiv 2307.09288): norm, attention, feed-forward.

Module and parameter names are Hugging Face's, so their checkpoints need no key map. Tensor names end in their shape:
B batch, T new tokens, S cached positions, D model, H query heads, K key-value heads, E head width, F ffn, V vocab.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.attention import ATTENTION, Mask
from llama2.cache import DynamicCache, StaticCache
from llama2.config import LlamaConfig
from llama2.linear import fused_linear, is_plain
from llama2.rope import promoted, rotate

Cache = DynamicCache | StaticCache

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class LlamaRMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019), computed in promote(x.dtype, float32)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype != torch.float64 and not torch.is_grad_enabled():
            # One kernel instead of seven, the same roundings in the same places; only its sum has another order.
            return self.weight * F.rms_norm(x, x.shape[-1:], None, self.variance_epsilon)
        wide = x.to(promoted(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


def split_output(layer: nn.Module, x: Tensor, parts: int) -> Tensor:
    """layer(x), computed in `parts` slices of the output features (pretraining_tp, column parallel).

    Only plain linears can be sliced; a packed or adapted one has its own fixed order and is called as it is.
    """
    if parts == 1 or not is_plain(layer):
        return fused_linear((layer,), x)[0]
    weights = layer.weight.tensor_split(parts)
    biases = layer.bias.tensor_split(parts) if layer.bias is not None else [None] * parts
    return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)


def split_outputs(layers: tuple[nn.Module, ...], x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The outputs of several layers on the same x, each as `split_output`."""
    return fused_linear(layers, x) if parts == 1 else tuple(split_output(layer, x, parts) for layer in layers)


def split_input(layer: nn.Module, x: Tensor, parts: int) -> Tensor:
    """layer(x) as the sum over `parts` slices of the input features (pretraining_tp, row parallel)."""
    if parts == 1 or not is_plain(layer):
        return fused_linear((layer,), x)[0]
    pieces = zip(x.tensor_split(parts, dim=-1), layer.weight.tensor_split(parts, dim=1), strict=True)
    total: Tensor = sum(F.linear(xs, w) for xs, w in pieces)  # type: ignore[assignment]
    return total if layer.bias is None else total + layer.bias


class LlamaMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        wide, narrow, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(narrow, wide, bias=bias)
        self.up_proj = nn.Linear(narrow, wide, bias=bias)
        self.down_proj = nn.Linear(wide, narrow, bias=bias)
        self.act_fn = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BTD: Tensor) -> Tensor:
        parts = self.config.pretraining_tp
        gate_BTF, up_BTF = split_outputs((self.gate_proj, self.up_proj), x_BTD, parts)
        return split_input(self.down_proj, self.act_fn(gate_BTF) * up_BTF, parts)


class LlamaAttention(nn.Module):
    """Causal self-attention with grouped key-value heads (Ainslie et al. 2023) and rotary positions."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=bias)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Mask,
        implementation: str,
        cache: Cache | None = None,
        cache_position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        parts = self.config.pretraining_tp
        heads = (-1, self.head_dim)
        projected = split_outputs((self.q_proj, self.k_proj, self.v_proj), x_BTD, parts)
        q_BHTE, k_BKSE, v_BKSE = (y.unflatten(-1, heads).transpose(1, 2) for y in projected)
        q_BHTE, k_BKSE = rotate((q_BHTE, k_BKSE), *rotation)
        if cache is not None:
            k_BKSE, v_BKSE = cache.update(k_BKSE, v_BKSE, self.layer_idx, {"cache_position": cache_position})
        dropout = self.config.attention_dropout if self.training else 0.0
        out_BHTE, weights = ATTENTION[implementation](q_BHTE, k_BKSE, v_BKSE, mask, self.scaling, dropout)
        out_BTD = split_input(self.o_proj, out_BHTE.transpose(1, 2).flatten(2), parts)
        return out_BTD, weights


class LlamaDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, *attention_args: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = with_weights(self.self_attn(self.input_layernorm(x_BTD), *attention_args))
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), weights


def with_weights(output: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
    """States and attention weights of what a layer or its attention returned.

    A forward hook, or a module put in place of ours, may return the states alone or a tuple of one.
    """
    if isinstance(output, Tensor):
        return output, None
    states = output[0]
    assert states is not None
    return states, output[1] if len(output) > 1 else None
