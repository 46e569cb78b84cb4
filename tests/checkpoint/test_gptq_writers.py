"""What GPTQModel and AutoRound write besides AutoGPTQ: signed scales, no g_idx, settings of single layers.

Their layout (AutoRound 0.16, qlinear_torch; GPTQModel, dynamic_get): w[n, k] = scale[g, n] * (code[k, n] - zero), all
zeros 8 where weights are symmetric, stored as 7 in format "gptq" and as 8 in "gptq_v2".
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_model

from llama2 import GPTQConfig, LlamaForCausalLM, cpu
from llama2.architecture import linear_shapes
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.quantized import packed_layers
from llama2.cli.inspect import read
from llama2.errors import InputError
from llama2.runners.native import NativeModel, NativeRunner

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GROUP = 32
pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")


def words(codes_KN: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words along the first axis, the first code in the lowest bits."""
    per = 32 // bits
    shifts = torch.arange(0, 32, bits).view(1, per, 1)
    packed = (codes_KN.long().unflatten(0, (-1, per)) << shifts).sum(1)
    return packed.where(packed < 2**31, packed - 2**32).int()


def write(folder: Path, bits_of: dict[str, int], stored_zero: int = -1, **settings: Any) -> dict[str, torch.Tensor]:
    """A folder of symmetric weights with scales of either sign, some 0, and no g_idx. bits_of: by the linear's path,
    4 where nothing is said, 16 for one that is left alone. Returns the weights that it means."""
    tiny_model(torch.float16, **SIZES).save_pretrained(folder)
    tensors, weights = load_file(folder / "model.safetensors"), {}
    draw = torch.Generator().manual_seed(0)
    for path, (rows, columns) in linear_shapes(tiny_model(**SIZES).config).items():
        bits = bits_of.get(path, 4)
        if bits == 16:
            weights[f"{path}.weight"] = tensors[f"{path}.weight"].float()
            continue
        codes = torch.randint(0, 2**bits, (columns, rows), generator=draw)
        scales = (torch.randn(columns // GROUP, rows, generator=draw) * 0.6 / 2**bits).half()
        scales[0, :3] = 0
        zero = 2 ** (bits - 1)
        at = torch.arange(columns) // GROUP
        weights[f"{path}.weight"] = (scales.float()[at] * (codes - zero)).T.contiguous()
        del tensors[f"{path}.weight"]
        tensors[f"{path}.qweight"], tensors[f"{path}.scales"] = words(codes, bits), scales
        zeros = torch.full((rows, columns // GROUP), zero + stored_zero)
        tensors[f"{path}.qzeros"] = words(zeros, bits).T.contiguous()
    assert any((t < 0).any() for name, t in tensors.items() if name.endswith("scales"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def check(folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> LlamaForCausalLM:
    """The folder means these weights on every path."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    layers = packed_layers(model)
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        found = layers[path].dequantize() if path in layers else model.get_parameter(name)
        assert torch.equal(found, weight), path
    convert(folder, tmp_path / "out", ConversionSettings(dtype="float32"))
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in weights.items())
    return model


def test_signed_and_zero_scales_without_g_idx(tmp_path: Path) -> None:
    weights = write(tmp_path / "packed", {})
    model = check(tmp_path / "packed", weights, tmp_path)
    model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again", dtype="float32")
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)


@pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_native_engine_takes_signed_and_zero_scales(tmp_path: Path, bits: int) -> None:
    paths = linear_shapes(tiny_model(**SIZES).config)
    weights = write(tmp_path / "packed", dict.fromkeys(paths, bits), bits=bits)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "packed", dtype="float32")
    plain = tiny_model(torch.float16, **SIZES).float()
    plain.load_state_dict(weights, strict=False)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(plain.get_parameter(name), model.get_parameter(name))
    ids = tiny_ids()
    want = model(ids).logits
    assert torch.allclose(plain(ids).logits, want, atol=1e-4)
    runner = NativeRunner(NativeModel.from_module(model).weights, "float32")
    found = runner.step(ids, torch.arange(ids.shape[1])[None], None, None, keep=ids.shape[1])
    error = (found - want).norm() / want.norm()
    assert error < 0.05, error  # activations are rounded to 8 bits; a sign or a zero ignored gives 0.5 and more


DYNAMIC = {
    r"-:.*\.0\.mlp\.down_proj": {},
    r"+:.*\.1\.self_attn\.[qk]_proj": {"bits": 8},
    r".*\.1\.mlp\.": {"bits": 8, "group_size": GROUP},
}
DYNAMIC_BITS = {
    "model.layers.0.mlp.down_proj": 16,
    **{f"model.layers.1.self_attn.{name}_proj": 8 for name in "qk"},
    **{f"model.layers.1.mlp.{name}_proj": 8 for name in ("gate", "up", "down")},
}


def test_settings_of_single_layers(tmp_path: Path) -> None:
    weights = write(tmp_path / "packed", DYNAMIC_BITS, dynamic=DYNAMIC)
    model = check(tmp_path / "packed", weights, tmp_path)
    assert len(packed_layers(model)) == 13
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["dynamic"] == DYNAMIC
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again", dtype="float32")
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)
    headers = read(str(tmp_path / "packed"))
    assert headers.parameters == headers.config.num_parameters
    assert {"GPTQ 4-bit g32", "GPTQ 8-bit g32", "F16"} <= set(headers.types)


def test_the_first_pattern_counts_and_matches_from_the_beginning() -> None:
    config = GPTQConfig(dynamic={"-:model.layers.0": {}, "+:.*up_proj": {"bits": 8}, "up_proj": {"bits": 2}})
    assert config.skips("model.layers.0.mlp.up_proj") and not config.skips("model.layers.1.mlp.up_proj")
    assert config.at("model.layers.1.mlp.up_proj").bits == 8 and config.at("model.layers.1.mlp.gate_proj").bits == 4
    with pytest.raises(InputError, match="is not a pattern"):
        GPTQConfig(dynamic={"+:(": {}})


def test_quantising_while_loading_follows_dynamic(tmp_path: Path) -> None:
    tiny_model(torch.float32, **SIZES).save_pretrained(tmp_path)
    config = GPTQConfig(group_size=GROUP, dynamic=DYNAMIC)
    layers = packed_layers(LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config))
    assert len(layers) == 13 and {path: layers[path].bits for path in layers} == {
        path: DYNAMIC_BITS.get(path, 4) for path in layers
    }


@pytest.mark.parametrize(("packing", "stored"), [("auto_round:auto_gptq", -1), ("auto_round:exllamav2", 0)])
def test_auto_rounds_own_settings(tmp_path: Path, packing: str, stored: int) -> None:
    extra = {"model.layers.1.mlp.up_proj": {"bits": 8}, "model.layers.0.mlp.down_proj": {"bits": 16}}
    bits = {"model.layers.1.mlp.up_proj": 8, "model.layers.0.mlp.down_proj": 16}
    weights = write(tmp_path / "packed", bits, stored, quant_method="auto-round", packing_format=packing,
                    extra_config=extra, data_type="int", autoround_version="0.16.1")  # fmt: skip
    check(tmp_path / "packed", weights, tmp_path)
