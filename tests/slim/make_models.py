"""Models for `run.py`, made where torch is: SmolLM2 as safetensors, as Meta's files, and packed as GPTQ and NF4, and
in further types of GGUF; and an adapter. `python make_models.py GGUF FOLDER`."""

import sys
import warnings
from pathlib import Path

import torch

from llama2 import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTQConfig, LoraConfig, lora
from llama2.checkpoint.convert import ConversionSettings, convert


def main(gguf: Path, out: Path) -> None:
    """Writes every folder that is not there yet."""
    if (out / "done").exists():
        return
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    convert(gguf, out / "hf", ConversionSettings(dtype="bfloat16"))
    convert(out / "hf", out / "meta", ConversionSettings(to="meta"))
    AutoTokenizer.from_pretrained(out / "hf").save_pretrained(out / "meta")  # Meta's own is a tokenizer.model
    for kind in ("q8_0", "q6_k"):
        convert(out / "hf", out / f"{kind}.gguf", ConversionSettings(to="gguf", dtype=kind))
    for name, config in (
        ("gptq", GPTQConfig(group_size=32)),
        ("nf4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    ):
        packed = AutoModelForCausalLM.from_pretrained(out / "hf", quantization_config=config)
        packed.save_pretrained(out / name)
        AutoTokenizer.from_pretrained(out / "hf").save_pretrained(out / name)
    model = AutoModelForCausalLM.from_pretrained(out / "hf")
    lora.add_adapter(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    model.save_pretrained(out / "adapter")
    (out / "done").touch()


main(Path(sys.argv[1]), Path(sys.argv[2]))
