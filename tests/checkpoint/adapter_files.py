"""Adapter folders byte by byte: what peft writes, made without it."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from llama2 import LlamaConfig
from llama2.architecture import linear_shapes

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
CONFIG: dict[str, Any] = {
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_alpha": 8,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
}


def safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    """A header length, a JSON header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors_for(
    model: LlamaConfig, suffixes: tuple[str, ...], rank: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random pairs under peft's names for every linear that ends so."""
    draw, made = torch.Generator().manual_seed(seed), {}
    for module, (rows, cols) in linear_shapes(model).items():
        if module.endswith(suffixes):
            stem = f"base_model.model.{module}.lora_"
            made[f"{stem}A.weight"] = (torch.randn(rank, cols, generator=draw) * 0.3).to(dtype)
            made[f"{stem}B.weight"] = (torch.randn(rows, rank, generator=draw) * 0.3).to(dtype)
    return made


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """The folder, its configuration changed in some keys."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    return folder
