"""A Llama from the papers in float64: loops and einsum, no cache, no fusion. It imports nothing of ours.

Weights are a dict under Hugging Face names. Positions rotate as complex pairs (i, i + E/2): another way to write
RoPE than the library's, so that an error in one does not hide in the other.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def frequencies(width: int, rope: dict, trained: int, length: int) -> tuple[list[float], float]:
    """Radians per position for each pair, and the factor on cos and sin, in Python floats."""
    kind, base = rope["rope_type"], rope["rope_theta"]
    factor = rope.get("factor", 1.0)
    if kind == "dynamic" and length > trained:
        base = base * (factor * length / trained - (factor - 1)) ** (width / (width - 2))
    inv = [base ** (-2 * i / width) for i in range(width // 2)]
    if kind == "linear":
        return [f / factor for f in inv], 1.0
    if kind == "llama3":
        context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
        out = []
        for f in inv:
            turns = context * f / (2 * math.pi)  # full turns within the trained context
            if turns < low:
                out.append(f / factor)
            elif turns > high:
                out.append(f)
            else:
                s = (turns - low) / (high - low)
                out.append((1 - s) * f / factor + s * f)
        return out, 1.0
    if kind == "yarn":
        context = rope.get("original_max_position_embeddings", trained)

        def dim_of(turns: float) -> float:
            return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dim_of(rope.get("beta_fast", 32))), 0)
        high = min(math.ceil(dim_of(rope.get("beta_slow", 1))), width - 1)
        high = high if high != low else high + 0.001
        ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
        scale = rope.get("attention_factor", 0.1 * math.log(factor) + 1.0)
        return [f / factor * r + f * (1 - r) for f, r in zip(inv, ramp, strict=True)], scale
    return inv, 1.0


def turn(x: Tensor, positions: Tensor, inv: list[float], scale: float) -> Tensor:
    """Rotates x (T, E) at each position by multiplying complex pairs."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[:, :half], x[:, half:])
    angles = positions[:, None].double() * torch.tensor(inv, dtype=torch.float64)
    turned = pairs * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat((turned.real, turned.imag), -1)


def forward(weights: dict[str, Tensor], config, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits (T, V) in float64 of one sequence of token ids (T,)."""
    w = {name: tensor.detach().double() for name, tensor in weights.items()}
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    positions = torch.arange(len(ids)) if positions is None else positions
    rope = config.rope_parameters
    inv, scale = frequencies(width, rope, config.max_position_embeddings, int(positions.max()) + 1)

    def linear(x: Tensor, name: str) -> Tensor:
        out = torch.einsum("ti,oi->to", x, w[name + ".weight"])
        return out + w[name + ".bias"] if name + ".bias" in w else out

    x = w["model.embed_tokens.weight"][ids]
    future = torch.arange(len(ids))[None, :] > torch.arange(len(ids))[:, None]
    for n in range(config.num_hidden_layers):
        p = f"model.layers.{n}."
        y = rms_norm(x, w[p + "input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (linear(y, p + f"self_attn.{c}_proj") for c in "qkv")
        attended = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            qh = turn(q[:, h * width : (h + 1) * width], positions, inv, scale)
            kh = turn(k[:, g * width : (g + 1) * width], positions, inv, scale)
            scores = torch.einsum("te,se->ts", qh, kh) / math.sqrt(width)
            scores = scores.masked_fill(future, -math.inf)
            attended.append(torch.softmax(scores, -1) @ v[:, g * width : (g + 1) * width])
        x = x + linear(torch.cat(attended, -1), p + "self_attn.o_proj")
        y = rms_norm(x, w[p + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = linear(y, p + "mlp.gate_proj"), linear(y, p + "mlp.up_proj")
        x = x + linear(gate / (1 + torch.exp(-gate)) * up, p + "mlp.down_proj")
    x = rms_norm(x, w["model.norm.weight"], config.rms_norm_eps)
    return x @ w["lm_head.weight"].T
