"""Adapters that peft wrote: read strictly, and refused where they are not plain LoRA or not for this model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.adapter_files import tensors_for, write_adapter
from safetensors.torch import load_file, save_file
from tiny import random_adapter, tiny_config, tiny_ids, tiny_model
from tolerance import FLOAT32

from llama2 import CheckpointError, LlamaForSequenceClassification, LoraConfig
from llama2.architecture import linear_shapes
from llama2.checkpoint.merge import merge_into
from llama2.checkpoint.peft import load_adapter, save_adapter
from llama2.checkpoint.peft_adapter import read_adapter
from llama2.checkpoint.peft_files import read_config
from llama2.errors import MismatchError

MODEL = tiny_config()
QV = ("q_proj", "v_proj")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def test_names_shapes_and_values(tmp_path: Path) -> None:
    tensors = tensors_for(MODEL, QV)
    adapter = read_adapter(write_adapter(tmp_path, tensors), MODEL)
    assert list(adapter.modules) == [
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")
    ]
    low = adapter.modules["model.layers.0.self_attn.q_proj"]
    assert torch.equal(low.a, tensors[f"{Q0}A.weight"]) and torch.equal(low.b, tensors[f"{Q0}B.weight"])
    assert low.scale == 8 / 4
    assert adapter.config.base_model_name_or_path is None and adapter.config.target_modules == ("v_proj", "q_proj")


def test_shapes_are_those_of_the_model() -> None:
    for changes in ({}, {"head_dim": 24}, {"num_key_value_heads": 1}):
        model = tiny_model(torch.float32, **changes)
        shapes = linear_shapes(model.config)
        assert shapes == {n: tuple(model.get_submodule(n).weight.shape) for n in shapes}
        assert len(shapes) == 14


@pytest.mark.parametrize(
    "changes, scale",
    [
        ({}, 2.0),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 3}}, 0.75),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}, 2.0),
        ({"alpha_pattern": {r"model\.layers\.0\..*": 1, "q_proj": 3}}, 0.25),
        ({"alpha_pattern": {"proj": 3}}, 2.0),  # whole parts of a path only
    ],
)
def test_scaling(tmp_path: Path, changes: dict[str, Any], scale: float) -> None:
    adapter = read_adapter(write_adapter(tmp_path, tensors_for(MODEL, QV), **changes), MODEL)
    assert adapter.modules["model.layers.0.self_attn.q_proj"].scale == scale


def test_rank_pattern(tmp_path: Path) -> None:
    tensors = tensors_for(MODEL, ("q_proj",), 4) | tensors_for(MODEL, ("v_proj",), 2)
    pattern = {"v_proj": 2}
    adapter = read_adapter(write_adapter(tmp_path, tensors, rank_pattern=pattern), MODEL)
    assert adapter.modules["model.layers.1.self_attn.v_proj"].scale == 4.0
    with pytest.raises(MismatchError, match=r"v_proj has shape \(2, 64\), but rank 4"):
        read_adapter(write_adapter(tmp_path, tensors), MODEL)


@pytest.mark.parametrize(
    "targets, more, found",
    [
        (r".*\.self_attn\.(q|v)_proj", {}, QV),
        ("all-linear", {}, ("_proj",)),
        (["q_proj", "v_proj", "up_proj"], {"exclude_modules": ["up_proj"]}, QV),
        (["model.layers.0.mlp.up_proj"], {}, ("0.mlp.up_proj",)),
        (["q_proj", "v_proj"], {"layers_to_transform": [1]}, ("1.self_attn.q_proj", "1.self_attn.v_proj")),
        (["q_proj", "v_proj"], {"layers_to_transform": 0}, ("0.self_attn.q_proj", "0.self_attn.v_proj")),
    ],
)
def test_target_modules(tmp_path: Path, targets: Any, more: dict[str, Any], found: tuple[str, ...]) -> None:
    tensors = tensors_for(MODEL, found)
    adapter = read_adapter(write_adapter(tmp_path, tensors, target_modules=targets, **more), MODEL)
    assert 2 * len(adapter.modules) == len(tensors) > 0
    some = dict(list(tensors.items())[2:])
    with pytest.raises(CheckpointError, match=r"holds no tensors"):
        read_adapter(write_adapter(tmp_path, some, target_modules=targets, **more), MODEL)


def test_the_other_files_of_peft(tmp_path: Path) -> None:
    tensors = tensors_for(MODEL, QV, dtype=torch.bfloat16)
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    assert len(read_adapter(write_adapter(tmp_path, named), MODEL).modules) == 4
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    adapter = read_adapter(tmp_path, MODEL)
    assert torch.equal(adapter.modules["model.layers.0.self_attn.q_proj"].a, tensors[f"{Q0}A.weight"])
    torch.save({"x": Path("y")}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        read_adapter(tmp_path, MODEL)


def _renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors_for(MODEL, QV).items()}


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors_for(MODEL, QV).items() if key != name}


def _changed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors_for(MODEL, QV) | {name: tensor}


@pytest.mark.parametrize(
    "tensors, said",
    [
        (
            _renamed("base_model.model.model.", "base_model.model.body."),
            r"adapts 'body.layers.0.self_attn.q_proj' \(4 modules in all\), which is no linear",
        ),
        (_renamed("base_model.model.", ""), r"'model.layers.0.self_attn.q_proj.lora_A.weight'; those of a LoRA"),
        (_without(f"{Q0}B.weight"), r"has no base_model.*q_proj.lora_B.weight, the other half"),
        (_without(f"{Q0}A.weight"), r"has no base_model.*q_proj.lora_A.weight, the other half"),
        ({}, "saved empty"),
        (_changed(f"{Q0}A.weight", torch.zeros(4, 63)), r"lora_A of .*q_proj has shape \(4, 63\).*\(64, 64\)"),
        (_changed(f"{Q0}B.weight", torch.zeros(64, 5)), r"lora_B of .*q_proj has shape \(64, 5\)"),
        (_changed(f"{Q0}A.weight", torch.zeros(4, 64, dtype=torch.float64)), "float64"),
        (
            _changed("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", torch.zeros(64)),
            "no DoRA",
        ),
        (
            _changed("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 97)),
            "embed_tokens.lora_A.weight, the other half",
        ),
        (_changed("base_model.model.score.weight", torch.zeros(2, 64)), "adapter of a classifier"),
        (_changed("base_model.model.lm_head.weight", torch.zeros(97, 63)), r"lm_head.weight has shape \(97, 63\)"),
        (
            _changed("base_model.model.model.layers.0.extra.weight", torch.zeros(3)),
            "extra.weight .3,., which this model",
        ),
        (_changed("base_model.model.model.layers.0.mlp.up_proj.bias", torch.zeros(112)), "with biases"),
        (_changed("base_model.model.model.rows", torch.zeros(3)), "'base_model.model.model.rows'"),
        (
            _changed("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.zeros(1, 64)),
            "trainable_token_indices of its adapter_config.json does not say which",
        ),
        (tensors_for(tiny_config(num_hidden_layers=3), QV), r"layers.2.*no linear of a layer of this 2-layer model"),
        (tensors_for(tiny_config(num_hidden_layers=1), QV), r"targets 'model.layers.1.*fewer layers"),
        (tensors_for(MODEL, (*QV, "up_proj")), r"tensors for 'model.layers.0.mlp.up_proj', which its target_modules"),
        (
            _changed("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 64))
            | {"base_model.model.lm_head.lora_B.weight": torch.zeros(97, 4)},
            "tensors for 'lm_head', which its target_modules",
        ),
    ],
)
def test_tensors_that_have_no_place(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_adapter(write_adapter(tmp_path, tensors), MODEL)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"peft_type": "IA3"}, "'IA3'; only 'LORA'"),
        ({"use_dora": True}, r"q_proj.lora_magnitude_vector \(DoRA\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias is True: B has a bias, which is not supported; run it with peft"),
        ({"peft_type": "PREFIX_TUNING"}, "lives beside the weights and cannot be merged: run it with peft"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"trainable_token_indices": [1]}, "but there are no rows"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern is {'q_proj': True}"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alpha_pattern": {"(": 1}}, "not a pattern"),
        ({"target_modules": "("}, "not a pattern"),
        ({"target_modules": ["query_key_value"]}, "'query_key_value',.* names no linear.*q_proj"),
        ({"target_modules": None}, "malformed"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_adapter(write_adapter(tmp_path, tensors_for(MODEL, QV), **changes), MODEL)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither a folder nor a GGUF file"):
        read_adapter(tmp_path / "none", MODEL)
    with pytest.raises(CheckpointError, match=r"adapter_config.json does not exist"):
        read_adapter(tmp_path, MODEL)
    folder = write_adapter(tmp_path / "a", tensors_for(MODEL, QV))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        read_adapter(folder, MODEL)
    file.unlink()
    with pytest.raises(CheckpointError, match="neither adapter_model.safetensors nor"):
        read_adapter(folder, MODEL)
    fields = json.loads((folder / "adapter_config.json").read_text())
    del fields["r"]
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"malformed: KeyError\('r'\)"):
        read_config(folder)


# -- DoRA and classifiers ----------------------------------------------------------------------------------------


def _trained(model: Any, **settings: Any) -> LoraConfig:
    config = LoraConfig(r=4, lora_alpha=8, **settings)
    random_adapter(model, config, seed=3)
    return config


@pytest.mark.parametrize("targets", ["all-linear", ("o_proj", "down_proj")])
def test_dora_is_saved_loaded_and_merged(tmp_path: Path, targets: Any) -> None:
    model, ids = tiny_model(torch.float32), tiny_ids(2, 12)
    config = _trained(model, use_dora=True, target_modules=targets)
    save_adapter(model, tmp_path, config)
    with torch.no_grad():
        want = model(ids).logits
    close = {"rtol": 0, "atol": FLOAT32 * float(want.abs().max())}
    loaded, merged = tiny_model(torch.float32), tiny_model(torch.float32)
    assert load_adapter(loaded, tmp_path).use_dora
    merge_into(merged, read_adapter(tmp_path, merged.config))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, want)
        torch.testing.assert_close(merged(ids).logits, want, **close)
        assert not torch.allclose(tiny_model(torch.float32)(ids).logits, want, atol=1e-2)
    with pytest.raises(CheckpointError, match="DoRA adapter.*llama2 merge-adapter"):
        read_adapter(tmp_path, merged.config).plain  # noqa: B018
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("magnitude_vector"))
    save_file({**tensors, name: tensors[name][:-1]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"lora_magnitude_vector of .* has shape"):
        read_adapter(tmp_path, merged.config)


def test_the_head_of_a_classifier_goes_with_its_adapter(tmp_path: Path) -> None:
    def classifier(labels: int) -> Any:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(tiny_config(num_labels=labels, pad_token_id=0)).eval()

    model, other, ids = classifier(3), classifier(3), tiny_ids(1, 12)
    save_adapter(model, tmp_path, _trained(model, target_modules="all-linear"))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_CLS" and fields["modules_to_save"] == ["classifier", "score"]
    with torch.no_grad():
        other.score.weight.zero_()
    load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    with pytest.raises(MismatchError, match=r"score.weight has shape \(3, 64\).*num_labels=3"):
        load_adapter(classifier(2), tmp_path)
    with pytest.raises(MismatchError, match="adapter of a classifier"):
        load_adapter(tiny_model(torch.float32), tmp_path)
