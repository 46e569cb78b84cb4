"""GGUF files written by hand for the tests: struct, no package."""

import math
import struct
from typing import Any

import torch

TYPE_IDS = {"F32": 0, "F16": 1, "Q8_0": 8}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(v: Any) -> bytes:
    """A metadata value with its type in front; a list is an array of its first item's type."""
    if isinstance(v, bool):
        return struct.pack("<I?", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, str):
        return struct.pack("<I", 8) + text(v)
    inner = [value(x) for x in v]
    return struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(v)) + b"".join(x[4:] for x in inner)


def quantize(tensor: torch.Tensor, kind: str) -> bytes:
    """Rows as F32, F16 or Q8_0 bytes."""
    if kind == "Q8_0":
        blocks = tensor.reshape(-1, 32)
        d = (blocks.abs().amax(1, keepdim=True) / 127).half()
        q = (blocks / d.float().clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8)
        packed = torch.cat((d.view(torch.uint8), q.view(torch.uint8)), dim=1)
        return packed.numpy().tobytes()
    return tensor.to(torch.float32 if kind == "F32" else torch.float16).numpy().tobytes()


def gguf(metadata: dict[str, Any], tensors: dict[str, tuple[torch.Tensor, str]], *, version: int = 3) -> bytes:
    """A whole file: metadata, and tensors as (values, type name)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(v) for key, v in metadata.items())
    data = b""
    for name, (tensor, kind) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        dims = tuple(reversed(tensor.shape))
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPE_IDS[kind], len(data))
        data += quantize(tensor, kind)
    return head + b"\0" * (-len(head) % 32) + data


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k: row half * E/2 + j of each head becomes row 2 * j + half."""
    width = rows.shape[0] // heads
    order = [h * width + half * (width // 2) + j for h in range(heads) for j in range(width // 2) for half in (0, 1)]
    return rows[order]


def llama_metadata(**overrides: Any) -> dict[str, Any]:
    """Metadata of a tiny Llama: 2 layers, width 64, 4 heads over 2 key-value heads."""
    return {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "é"],
        "tokenizer.ggml.scores": [0.0, 0.0, -1.5, -2.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        **overrides,
    }


def llama_tensors(state_dict: dict[str, torch.Tensor], kind: str = "F32") -> dict[str, tuple[torch.Tensor, str]]:
    """GGUF names and q/k order for the state dict of that tiny Llama; vectors stay F32."""
    names = {
        "embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors = {}
    for name, tensor in state_dict.items():
        theirs = next(short for ours, short in names.items() if ours in name)
        if ".layers." in name:
            theirs = f"blk.{name.split('.')[2]}.{theirs}"
        if theirs.endswith(("attn_q", "attn_k")):
            tensor = interleave(tensor, 4 if theirs.endswith("q") else 2)
        tensors[f"{theirs}.{name.rpartition('.')[2]}"] = (tensor, kind if tensor.dim() > 1 else "F32")
    return tensors


def rope_freqs(head_dim: int, theta: float, factor: float, low: float, high: float, original: int) -> torch.Tensor:
    """The divisors of Llama 3.1 by its published formula."""
    freqs = []
    for i in range(head_dim // 2):
        inv = theta ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / inv
        if wavelength < original / high:
            freqs.append(1.0)
        elif wavelength > original / low:
            freqs.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            freqs.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(freqs)
