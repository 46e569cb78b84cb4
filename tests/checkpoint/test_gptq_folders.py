"""GPTQ folders as AutoGPTQ, GPTQModel and transformers lay them out: settings, names of files, what `info` says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_model

import llama2.checkpoint as checkpoint
from llama2 import AutoConfig, GPTQConfig, LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.quantized import packed_layers
from llama2.cli.inspect import main_type, read
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.quantization.formats import parse
from llama2.quantization_config import BitsAndBytesConfig

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
IDS = tiny_ids(1, 12)
MODERN = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed folder as `save_pretrained` writes it: 4 bits in groups of 32."""
    model = tiny_model(torch.float32, **{**SIZES, "num_key_value_heads": 2})
    model.save_pretrained(tmp_path / "plain")
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=GPTQConfig(group_size=32))
    packed.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def logits(folder: Path, **given: Any) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, **given)
    assert len(packed_layers(model)) == 7 * model.config.num_hidden_layers
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def old_layout(folder: Path, name: str, settings: str = "quantize_config.json", **changes: Any) -> None:
    """Settings in a file of their own only, and weights under AutoGPTQ's name."""
    (folder / MODERN).rename(folder / name)
    edit(folder / "config.json", lambda c: c.pop("quantization_config"))
    (folder / "quantize_config.json").rename(folder / "moved")
    (folder / "moved").rename(folder / settings)
    edit(folder / settings, lambda c: (c.pop("quant_method"), c.pop("format"), c.pop("checkpoint_format")))
    edit(folder / settings, lambda c: c.update(changes))


# -- settings and names ------------------------------------------------------------------------------------------


def test_both_files_say_the_same(folder: Path) -> None:
    beside = json.loads((folder / "quantize_config.json").read_text())
    assert beside == json.loads((folder / "config.json").read_text())["quantization_config"]
    wanted = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "quant_method": "gptq"}
    assert wanted.items() <= beside.items() and beside["checkpoint_format"] == beside["format"] == "gptq"


@pytest.mark.parametrize("settings", ["quantize_config.json", "quant_config.json"])
def test_the_layout_of_autogptq(folder: Path, settings: str) -> None:
    wanted = logits(folder)
    old_layout(folder, "gptq_model-4bit-32g.safetensors", settings)
    assert torch.equal(logits(folder), wanted)
    assert torch.equal(logits(folder, config=AutoConfig.from_pretrained(folder)), wanted)
    plain = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in plain
    assert parse(AutoConfig.from_pretrained(folder).quantization_config) == GPTQConfig(group_size=32)
    assert main_type(read(str(folder))) == "GPTQ 4-bit g32"


def test_a_bin_file_of_autogptq(folder: Path) -> None:
    wanted, tensors = logits(folder), load_file(folder / MODERN)
    old_layout(folder, "gone")
    torch.save(tensors, folder / "gptq_model-4bit-32g.bin")
    assert torch.equal(logits(folder), wanted)
    with pytest.raises(CheckpointError, match="holds none of"):
        LlamaForCausalLM.from_pretrained(folder, use_safetensors=True)


def test_two_quantisations_in_one_folder(folder: Path) -> None:
    old_layout(folder, "gptq_model-4bit-32g.safetensors")
    shutil.copy(folder / "gptq_model-4bit-32g.safetensors", folder / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(CheckpointError, match=r"2 quantised models, gptq_model-4bit-128g.safetensors, .*; keep one"):
        LlamaForCausalLM.from_pretrained(folder)


def test_names_of_fields_of_other_programs(folder: Path) -> None:
    wanted = logits(folder)
    old_layout(folder, "gptq_model-4bit-32g.safetensors", "quant_config.json")
    edit(folder / "quant_config.json", lambda c: c.update(w_bit=c.pop("bits"), q_group_size=c.pop("group_size")))
    assert torch.equal(logits(folder), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_point": True}, r"qweight is torch.int32 \(20, 64\); torch.int32 \(160, 8\) is needed"),
        ({"is_marlin_format": True}, "the GPTQ format is 'marlin'; 'gptq' and 'gptq_v2' are supported"),
        ({"checkpoint_format": "gptq_v2", "format": "gptq"}, "format is 'gptq' and checkpoint_format 'gptq_v2'"),
        ({"bits": 5}, "bits is 5"),
        ({"checkpoint_format": "gptq_v2"}, "zeros are those of format 'gptq' and the configuration says 'gptq_v2'"),
        ({"bits": 8}, r"qweight is torch.int32 \(20, 64\); .* is needed for 8 bits"),
        ({"group_size": 64}, r"qzeros is torch.int32 \(5, 8\); .*\(3, 8\) is needed"),
    ],
)
def test_settings_that_cannot_be_right(folder: Path, changes: dict[str, Any], message: str) -> None:
    old_layout(folder, "gptq_model-4bit-32g.safetensors", **changes)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(folder)


def test_a_truncated_file(folder: Path) -> None:
    data = (folder / MODERN).read_bytes()
    (folder / MODERN).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        LlamaForCausalLM.from_pretrained(folder)


def test_an_error_names_the_layer(folder: Path) -> None:
    tensors = load_file(folder / MODERN)
    tensors["model.layers.1.mlp.up_proj.scales"][1, 7] = float("nan")
    save_file(tensors, folder / MODERN, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: scales hold nan"):
        LlamaForCausalLM.from_pretrained(folder)


def test_stale_settings_go_with_the_next_save(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).dequantize().save_pretrained(folder)
    assert not (folder / "quantize_config.json").exists()
    assert not packed_layers(LlamaForCausalLM.from_pretrained(folder))


# -- biases that are none ----------------------------------------------------------------------------------------


def test_biases_of_zero_are_dropped(folder: Path, tmp_path: Path) -> None:
    """AutoGPTQ gives every linear one."""
    wanted, tensors = logits(folder), load_file(folder / MODERN)
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    biases = {f"{name}.bias": torch.zeros(tensors[f"{name}.scales"].shape[1]).half() for name in names}
    save_file({**tensors, **biases}, folder / MODERN, {"format": "pt"})
    assert torch.equal(logits(folder), wanted)
    with pytest.warns(UserWarning, match="no tokenizer"):
        convert(folder, tmp_path / "floats", ConversionSettings("hf", "float32"))
    assert not any(name.endswith(".bias") for name in checkpoint.open(tmp_path / "floats").tensors)
    biases[f"{names[0]}.bias"][3] = 1
    save_file({**tensors, **biases}, folder / MODERN, {"format": "pt"})
    with pytest.raises(MismatchError, match=rf"{names[0]}\.bias"):
        LlamaForCausalLM.from_pretrained(folder)


# -- info --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (GPTQConfig(bits=3, group_size=32), "GPTQ 3-bit g32"),
        (GPTQConfig(bits=8, group_size=-1), "GPTQ 8-bit"),
        (BitsAndBytesConfig(load_in_8bit=True), "INT8 rows"),
    ],
)
def test_info_counts_the_weights_behind_the_codes(folder: Path, tmp_path: Path, config: Any, kind: str) -> None:
    model = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "new")
    found, layers = read(str(tmp_path / "new")), packed_layers(model).values()
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert found.parameters == plain.num_parameters() and main_type(found) == kind
    assert found.types[kind].parameters == sum(layer.in_features * layer.out_features for layer in layers)
    assert found.types[kind].bytes == sum(layer.nbytes for layer in layers)


def test_format_where_none_is_given() -> None:
    """GPTQModel refuses asymmetric files of v1 that others wrote; a file that names no format is v1."""
    assert GPTQConfig().format == "gptq" and GPTQConfig(sym=False).format == "gptq_v2"
    assert parse({"quant_method": "gptq", "sym": False}).to_dict()["checkpoint_format"] == "gptq"
    with pytest.raises(InputError, match="give one"):
        GPTQConfig(format="gptq", checkpoint_format="gptq_v2")
