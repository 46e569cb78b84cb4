"""What transformers and bitsandbytes of the interpreter that runs this file make of weights and checkpoint folders.

    python by_bitsandbytes.py JOB.json

JOB: {"ids": token ids (rows, tokens), "weights": a safetensors file or null, "settings": {name: arguments of
BitsAndBytesConfig}, "make": [[folder, name of the settings, dtype, new folder]], "read": [folder], "result": a file}.
RESULT, safetensors: for each weight and 4-bit settings WEIGHT/SETTINGS/PART and its values as bitsandbytes' own torch
code finds them under WEIGHT/SETTINGS/values-DTYPE; for int8 the same; for each folder, made or read, its logits
("FOLDER/logits": float32 products with the packed layers, those of int8 with unpacked ones) and those of a model with
unpacked weights ("FOLDER/unpacked"). Knows nothing of this library.
"""

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default import ops  # right where rows are no multiple of 64; 0.50's CPU code is not
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

VALUES = (torch.float32, torch.float16, torch.bfloat16)


def four_bits(weight: torch.Tensor, how: BitsAndBytesConfig) -> dict[str, torch.Tensor]:
    codes, state = functional.quantize_4bit(
        weight,
        quant_type=how.bnb_4bit_quant_type,
        compress_statistics=how.bnb_4bit_use_double_quant,
        quant_storage=how.bnb_4bit_quant_storage,
    )
    found = {"weight": codes, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    for dtype in VALUES:
        values = ops._dequantize_4bit_compute(
            codes.view(torch.uint8).reshape(-1), absmax, state.code, state.blocksize, tuple(weight.shape), dtype
        )
        if weight.shape[1] % 64 == 0:
            state.dtype = dtype
            assert torch.equal(values, functional.dequantize_4bit(codes, state))
        found[f"values-{dtype}"] = values
    return found


def eight_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    made = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    return {
        "weight": made.data,
        "SCB": made.SCB,
        "values-torch.float32": functional.int8_vectorwise_dequant(made.data, made.SCB),
    }


def unpacked(layer: torch.nn.Module) -> torch.nn.Linear:
    """A linear in float32 with the values of a packed one."""
    if isinstance(layer, bnb.nn.Linear4bit):
        layer.weight.quant_state.dtype = torch.float32
        values = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        values = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    made = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.weight = torch.nn.Parameter(values)
    if layer.bias is not None:
        made.bias = torch.nn.Parameter(layer.bias.data.float())
    return made


def logits(model: Any, ids: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    packed = [path for path, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert packed, name
    found = {}
    with torch.no_grad():
        if isinstance(model.get_submodule(packed[0]), bnb.nn.Linear4bit):
            model.train()  # in eval mode some processors take products in bfloat16, whatever the compute dtype is
            found[f"{name}/logits"] = model(ids).logits
        for path in packed:
            model.set_submodule(path, unpacked(model.get_submodule(path)))
        found[f"{name}/unpacked"] = model(ids).logits
    found.setdefault(f"{name}/logits", found[f"{name}/unpacked"].clone())
    return found


def main(job: str) -> None:
    """Runs the job."""
    asked = json.loads(Path(job).read_text())
    ids, found = torch.tensor(asked["ids"]), {}
    settings = {name: BitsAndBytesConfig(**how) for name, how in asked["settings"].items()}
    for name, weight in load_file(asked["weights"]).items() if asked["weights"] else ():
        for way, how in settings.items():
            if -(-weight.numel() // 2) % how.bnb_4bit_quant_storage.itemsize:
                continue
            made = four_bits(weight, how) if how.load_in_4bit else eight_bits(weight)
            found |= {f"{name}/{way}/{part}": tensor for part, tensor in made.items()}
    for source, way, dtype, folder in asked["make"]:
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=settings[way], dtype=getattr(torch, dtype), device_map="cpu"
        )
        model.save_pretrained(folder)
    for folder in [*(made[-1] for made in asked["make"]), *asked["read"]]:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map="cpu", output_loading_info=True
        )
        assert not any(info.values()), f"{folder}: {info}"
        for parameter in model.parameters():  # bitsandbytes' loader leaves those of 16 bits as they are
            if not isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params):
                parameter.data = parameter.data.float()
        found |= logits(model, ids, folder)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, asked["result"])


if __name__ == "__main__":
    main(*sys.argv[1:])
