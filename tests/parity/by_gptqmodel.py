"""What the GPTQModel of the interpreter that runs this file makes, and makes of folders.

    python by_gptqmodel.py JOB.json

JOB: {"make": {folder: {"from": plain folder, settings of its QuantizeConfig ...}}, "read": {folder: result}}. `make`
quantises with seeded token ids; `read` writes to `result` (safetensors) every weight in float32 under its Hugging Face
name, packed ones as GPTQModel's own code dequantises them with scales of float32. Knows nothing of this library.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_DISABLE_SPLASH", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file


def make(folder: str, settings: dict[str, Any]) -> None:
    """Quantises a plain folder."""
    gen = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 90, (32, 64), generator=gen).tolist()
    source = settings.pop("from")
    model = GPTQModel.load(source, QuantizeConfig(device="cpu", **settings), dtype=torch.float16)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=8)
    model.save(folder)


def read(folder: str, result: str) -> None:
    """Writes the weights of a folder."""
    model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    stored: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*.safetensors"):
        stored |= load_file(file)
    found = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = stored[f"{name}.scales"].float()
            found[f"{name}.weight"] = module.dequantize_weight().T.float().contiguous()
    packed = len(found)
    assert packed, "nothing is packed"
    for name, tensor in stored.items():
        if name.endswith(".weight"):
            found[name] = tensor.float()
    save_file(found, result)


def main(job: str) -> None:
    """Runs the job."""
    asked = json.loads(Path(job).read_text())
    for folder, settings in asked["make"].items():
        make(folder, settings)
    for folder, result in asked["read"].items():
        read(folder, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
