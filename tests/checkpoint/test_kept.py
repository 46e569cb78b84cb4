"""What conversions keep: 16 bits of packed checkpoints, and what a GGUF file says about itself."""

from pathlib import Path

import pytest
import torch
from checkpoint import gguf_package
from checkpoint.adapter_files import tensors_for, write_adapter
from safetensors.torch import load_file
from tiny import tiny_ids, tiny_model

from llama2 import BitsAndBytesConfig, GPTQConfig, LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.gguf import GgufFile, read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")
SIZES = {"hidden_size": 64, "intermediate_size": 128}
METHODS = {
    "gptq": GPTQConfig(group_size=32),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_packed_checkpoints_keep_the_dtype_of_their_model(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """float32 by default would double a 7B; what is stored in 16 bits otherwise stays in them."""
    tiny_model(dtype, **SIZES).save_pretrained(tmp_path / "plain")
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=METHODS[method])
    packed.save_pretrained(tmp_path / "packed")
    want = packed.dequantize()
    convert(tmp_path / "packed", tmp_path / "out", ConversionSettings())
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert all(torch.equal(tensors[name], weight) for name, weight in want.state_dict().items())
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
    convert(tmp_path / "packed", tmp_path / "x.gguf", ConversionSettings("gguf"))
    kinds = {info.type_id for info in GgufFile(tmp_path / "x.gguf").tensors.values() if len(info.shape) > 1}
    assert kinds == {{torch.float16: 1, torch.bfloat16: 30, torch.float32: 0}[dtype]}
    write_adapter(tmp_path / "adapter", tensors_for(want.config, ("q_proj", "v_proj")))
    convert(tmp_path / "packed", tmp_path / "merged", ConversionSettings(adapter=str(tmp_path / "adapter")))
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    convert(tmp_path / "packed", tmp_path / "wide", ConversionSettings(dtype="float32"))
    assert {t.dtype for t in load_file(tmp_path / "wide/model.safetensors").values()} == {torch.float32}


CARD = {
    "general.name": "Tiny Llama",
    "general.author": "Somebody",
    "general.license": "llama2",
    "general.license.link": "https://example.org/licence",
    "general.basename": "tiny",
    "general.size_label": "100K",
    "general.base_model.count": 1,
    "general.base_model.0.name": "Base",
}


def test_gguf_to_gguf_keeps_licence_author_and_name(tmp_path: Path) -> None:
    state = tiny_model(torch.float32, vocab_size=40, intermediate_size=96).state_dict()
    source = gguf_package.write(tmp_path / "source.gguf", state, **CARD)
    for dtype in ("keep", "q8_0"):
        target = tmp_path / f"{dtype}.gguf"
        convert(source, target, ConversionSettings("gguf", dtype))
        keys = read_metadata(target)
        assert CARD.items() <= keys.items()
    assert keys["general.file_type"] == 7 and keys["general.architecture"] == "llama"


def test_a_folder_gives_its_name(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path / "My-Model")
    convert(tmp_path / "My-Model", tmp_path / "x.gguf", ConversionSettings("gguf"))
    assert read_metadata(tmp_path / "x.gguf")["general.name"] == "My-Model"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "x.gguf")(tiny_ids()).logits.isfinite().all()
