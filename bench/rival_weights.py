"""Quantised files through the packages that wrote them: their weights unpacked, and their own decoding.

GPTQModel, transformers with bitsandbytes, and llama.cpp (through gguf and llama-cpp-python). Imported where they are
used: a row needs only its own.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # of one worker, its choice on two cores, its loader asks for two


def gptqmodel(folder: Path) -> Tensors:
    """Weights of a GPTQ folder as GPTQModel's torch kernel unpacks them, float32, by Hugging Face's names."""
    from gptqmodel import BACKEND, GPTQModel

    from llama2 import checkpoint

    model = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    stored, found = checkpoint.open(folder), {}
    for path, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = stored.read(f"{path}.scales", torch.float32)  # 16 bits would round every product
            found[f"{path}.weight"] = module.dequantize_weight().T.float().contiguous()
    return found | {name: stored.read(name, torch.float32) for name in stored.tensors if name.endswith(_plain(found))}


def bitsandbytes(folder: Path) -> Tensors:
    """Weights of a bitsandbytes folder as its CPU kernels unpack them, float32, by Hugging Face's names."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    found: Tensors = {}
    for path, module in AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            if module.in_features % 64:
                raise SystemExit(f"{path}: bitsandbytes on a CPU misreads rows that are no multiple of 64")
            found[f"{path}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.state.SCB if weight.SCB is None else weight.SCB
            found[f"{path}.weight"] = bnb.functional.int8_vectorwise_dequant(weight.data, scales).float()
        elif weight is not None:
            found[f"{path}.weight"] = weight.detach().float()
    return found


def gguf(file: Path) -> Tensors:
    """Weights of a GGUF file as the package gguf unpacks them, float32, by Hugging Face's names and row order."""
    from gguf import GGUFReader, dequantize

    from llama2 import checkpoint
    from llama2.checkpoint.names import gguf_to_hf, rotated_heads, to_half_split

    config, found = checkpoint.open(file).config, {}
    for tensor in GGUFReader(file).tensors:
        name = gguf_to_hf(tensor.name)
        if name is not None and not tensor.name.startswith("rope_freqs"):
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
            heads = rotated_heads(name, config.num_attention_heads, config.num_key_value_heads)
            found[name] = to_half_split(weight, heads) if heads else weight
    return found


def _plain(packed: Tensors) -> tuple[str, ...]:
    """Endings of what a GPTQ folder holds in floating point."""
    return ("norm.weight", "embed_tokens.weight", *(() if "lm_head.weight" in packed else ("lm_head.weight",)))


def decoder(path: Path, method: str) -> Callable[[int], Any]:
    """The format's own engine behind a prompt: called with a count, it decodes as many tokens, one at a time."""
    if method == "gguf":
        from native_gguf import Rival

        rival, at = Rival(path, torch.get_num_threads(), 2048), [16]
        rival.step(list(range(3, 19)), 0)

        def llama_cpp(count: int) -> None:
            for _ in range(count):
                rival.step([7], at[0])
                at[0] += 1

        return llama_cpp
    return _transformers(_loaded(path, method))


def _loaded(path: Path, method: str) -> Any:
    if method == "gptq":
        from gptqmodel import GPTQModel

        return GPTQModel.load(str(path), device="cpu").model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu")


def _transformers(model: Any) -> Callable[[int], Any]:
    from transformers import DynamicCache

    cache = DynamicCache()

    def step(tokens: list[int]) -> None:
        with torch.inference_mode():
            model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)

    def decode(count: int) -> None:
        for _ in range(count):
            step([7])

    step(list(range(3, 19)))
    return decode
