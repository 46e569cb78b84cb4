"""Packed linears from file to module and back, whatever their format."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llama2.checkpoint as checkpoint
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.quantized import packed_layers, unpacked
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.model import LlamaForCausalLM, LlamaModel
from llama2.quantization.formats import parse
from llama2.quantization_config import BitsAndBytesConfig, GPTQConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WAYS: dict[str, Any] = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "gptq": GPTQConfig(bits=4, group_size=32),
    "gptq-asym": GPTQConfig(bits=4, group_size=64, sym=False, format="gptq_v2"),
    "gptq-8": GPTQConfig(bits=8, group_size=-1),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4 in float16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="float16"),
    "fp4 double in float32": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.float32
    ),
}
IDS = torch.tensor([[5, 9, 60, 2, 33, 8, 90, 41]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture(params=WAYS)
def config(request: pytest.FixtureRequest) -> Any:
    return copy.deepcopy(WAYS[request.param])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit: codes that are kept as floats may look like NaN."""
    bits = [each.reshape(-1).view(torch.uint8) for each in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def test_quantised_saved_loaded_unpacked(folder: Path, config: Any, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    layers = packed_layers(model)
    assert len(layers) == 14 and "lm_head" not in layers
    plain = LlamaForCausalLM.from_pretrained(folder)
    change = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < change < (0.02 if layers["model.layers.0.mlp.up_proj"].nbytes > 128 * 192 else 0.3)  # 8 bits, and 4
    model.save_pretrained(tmp_path / "packed")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(same(ours[name], theirs[name]) for name in ours)
    assert parse(again.config.quantization_config) == config
    seen = unpacked(checkpoint.open(tmp_path / "packed"))
    for path, layer in layers.items():
        assert torch.equal(seen.read(f"{path}.weight"), layer.dequantize())
        assert seen.tensors[f"{path}.weight"].shape == (layer.out_features, layer.in_features)
    before = logits(again)
    assert not packed_layers(again.dequantize()) and not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), before)


def test_converted_to_floats(folder: Path, config: Any, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match="no tokenizer"):
        convert(tmp_path / "packed", tmp_path / "floats", ConversionSettings("hf", "float32"))
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "floats")), logits(model))


def test_native_engine_runs_it(folder: Path, config: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    native = model.generate(IDS, max_new_tokens=1, runner="native", return_dict_in_generate=True, output_logits=True)
    wanted = logits(model)[:, -1]
    error = (native.logits[0] - wanted).norm() / wanted.norm()
    assert 0 < error < 2e-2  # the fast mode rounds activations to 8 bits


def test_gradient_reaches_the_input_but_no_weight(folder: Path, config: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    plain = copy.deepcopy(model).dequantize()
    grads = []
    for each in (model, plain):
        x = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=x, labels=IDS).loss.backward()
        grads.append(x.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-7) and grads[0].abs().max() > 0
    assert all(not tensor.requires_grad for layer in packed_layers(model).values() for tensor in layer.packed.values())


def test_dtype_of_the_codes_survives_a_cast(folder: Path, config: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    before = {path: {n: t.clone() for n, t in x.packed.items()} for path, x in packed_layers(model).items()}
    model.to(torch.bfloat16)
    for path, layer in packed_layers(model).items():
        for name, tensor in layer.packed.items():
            assert same(tensor, before[path][name])
    assert logits(model).dtype == torch.bfloat16


def test_state_dict_round_trip(folder: Path, config: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    other = copy.deepcopy(model)
    for layer in packed_layers(other).values():
        for tensor in layer.packed.values():
            tensor.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match="nonsense"):
        other.load_state_dict({**model.state_dict(), "model.layers.0.mlp.up_proj.nonsense": torch.zeros(1)})


def test_base_model_takes_the_packed_layers(folder: Path, config: Any, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    base = LlamaModel.from_pretrained(tmp_path / "packed")
    assert len(packed_layers(base)) == 14
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        headed = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert len(packed_layers(headed)) == 14


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "quantisation method is None"),
        ({"quantization_config": {"quant_method": "awq"}}, "not quantised to awq while it is loaded"),
        ({"quantization_config": 5}, "quantization_config is 5"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "set exactly one"),
        (
            {"quantization_config": GPTQConfig(bits=4, dataset=["a text"])},
            "no tokenizer, and from_pretrained rounds without calibration",
        ),
        ({"load_in_8bit": True, "quantization_config": WAYS["int8"]}, "one setting"),
    ],
)
def test_wrong_requests(folder: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LlamaForCausalLM.from_pretrained(folder, **given)


def test_another_method_than_the_files(folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder, load_in_8bit=True).save_pretrained(tmp_path / "packed")
    with pytest.raises(InputError, match=r"packed by bitsandbytes and gptq is asked for"):
        LlamaForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=GPTQConfig(bits=4))


def test_unpacked_file_that_says_it_is_packed(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = WAYS["int8"].to_dict()
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no linear of the file is packed"):
        LlamaForCausalLM.from_pretrained(folder)


def test_a_lost_part_is_named(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, load_in_8bit=True)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.SCB"]
    model.save_pretrained(tmp_path / "packed", state_dict=state)
    with pytest.raises((CheckpointError, MismatchError), match=r"layers\.1\.mlp\.up_proj"):
        LlamaForCausalLM.from_pretrained(tmp_path / "packed")


def test_nothing_to_dequantise(folder: Path) -> None:
    with pytest.raises(InputError, match="nothing to dequantise"):
        LlamaForCausalLM.from_pretrained(folder).dequantize()
