"""GGUF files written by the gguf package, independently of our writer; split ones too."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint.gguf_bytes import llama_tensors

gguf = __import__("pytest").importorskip("gguf")


def write(path: Path, state: dict[str, torch.Tensor], split: int = 0, quantise: str | None = None, **keys: Any) -> Path:
    """The tiny Llama of `gguf_bytes.llama_metadata`; split: tensors in a part. Returns the file, or the first part."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for name, (tensor, _) in llama_tensors(state).items():
        data = tensor.float().numpy()
        if quantise is not None and data.ndim > 1:
            kind = gguf.GGMLQuantizationType[quantise]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _block_bytes(rng: np.random.Generator, kind: str, rows: int, columns: int) -> "np.ndarray[Any, Any]":
    """Random blocks whose scales are about 0.002."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    if kind == "IQ1_M":  # four bits of the scale in each of four numbers
        for at, nibble in ((49, 0), (51, 0), (53, 8), (55, 1)):
            raw[:, at] = raw[:, at] & 15 | nibble << 4
    elif kind == "MXFP4":
        raw[:, 0] = 119
    elif kind == "NVFP4":
        raw[:, :4] = 0x0C
    else:
        at = {"TQ1_0": 52, "TQ2_0": 64}.get(kind, 0)
        raw[:, at : at + 2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    return raw.reshape(rows, -1)


def write_blocks(path: Path, kinds: tuple[str, ...]) -> Path:
    """A Llama of two layers, 256 wide, whose linears are random blocks of these types in turn."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(97)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", rng.standard_normal((97, 256)).astype(np.float32) * 0.1)
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    turn = iter(range(10**6))
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
              "ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}  # fmt: skip
    for layer in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(256, np.float32))
        for name, shape in shapes.items():
            kind = kinds[next(turn) % len(kinds)]
            writer.add_tensor(
                f"blk.{layer}.{name}.weight",
                _block_bytes(rng, kind, *shape),
                raw_dtype=gguf.GGMLQuantizationType[kind],
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
