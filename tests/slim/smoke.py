"""Tries an installed wheel by itself, without a model, a download or a compiler: `python smoke.py`.

It makes a folder of a tiny random Llama and holds the engine, on every instruction set that is here, to the same
network in numpy and float64.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WIDTH, HEADS, KV_HEADS, LAYERS, WIDE, VOCABULARY = 64, 4, 2, 2, 96, 128


def weights(seed: int) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names, float32."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    kv = WIDTH // HEADS * KV_HEADS
    found = {"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH), "lm_head.weight": matrix(VOCABULARY, WIDTH)}
    found["model.norm.weight"] = 1 + 0.1 * matrix(1, WIDTH)[0]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = 1 + 0.1 * matrix(1, WIDTH)[0]
        for name, rows in (("q", WIDTH), ("k", kv), ("v", kv), ("o", WIDTH)):
            found[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, WIDTH)
        for name, rows, columns in (("gate", WIDE, WIDTH), ("up", WIDE, WIDTH), ("down", WIDTH, WIDE)):
            found[f"{at}mlp.{name}_proj.weight"] = matrix(rows, columns)
    return found


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def rotate(x: np.ndarray) -> np.ndarray:
    """Rotary positions on (tokens, heads, head width), the halves of a head paired."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def network(tensors: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits of every position in float64, (tokens, vocabulary)."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = w["model.embed_tokens.weight"][ids]
    hidden = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        y = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (
            (y @ w[f"{at}self_attn.{name}_proj.weight"].T).reshape(len(ids), -1, WIDTH // HEADS) for name in "qkv"
        )
        q, k, v = rotate(q), *(np.repeat(t, HEADS // KV_HEADS, 1) for t in (rotate(k), v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(WIDTH // HEADS) + hidden
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", share, v).reshape(len(ids), WIDTH) @ w[f"{at}self_attn.o_proj.weight"].T
        y = norm(x, w[at + "post_attention_layernorm.weight"])
        gate = y @ w[f"{at}mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[f"{at}mlp.up_proj.weight"].T)) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def folder(at: Path, tensors: dict[str, np.ndarray]) -> None:
    """A Hugging Face folder of these tensors, without a tokenizer."""
    from safetensors.numpy import save_file

    save_file(tensors, at / "model.safetensors")
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": WIDE, "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "float32",
    }  # fmt: skip
    (at / "config.json").write_text(json.dumps(settings))


def main() -> None:
    import llama2
    from llama2 import compiled, cpu
    from llama2.checkpoint.native_files import open_native

    sets = compiled.instruction_sets()
    print(f"llama2 {llama2.__version__}, Python {platform.python_version()}, {platform.machine()}: {', '.join(sets)}")
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79]
    tensors = weights(0)
    wanted = network(tensors, ids)[-1]
    with tempfile.TemporaryDirectory() as place:
        folder(Path(place), tensors)
        read = open_native(Path(place)).weights
        for isa in sets:
            runner, cache = (
                cpu.CpuRunner(read, isa=isa, precision="exact"),
                cpu.PagedCache(read, tokens=64, dtype="float32"),
            )
            found = runner.feed(cache.sequence(), ids)
            error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            print(f"  {isa}: {error:.1e} from float64")
            assert error < 1e-5, (isa, error)
        del read, runner, cache
    said = subprocess.run([sys.executable, "-m", "llama2", "--help"], capture_output=True, text=True, check=True).stdout
    assert "generate" in said


if __name__ == "__main__":
    main()
