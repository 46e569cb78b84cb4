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
