"""LoraConfig as people write it for peft: its fields, what they mean for a model, and what is refused."""

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model

from llama2 import InputError, LlamaForSequenceClassification, LoraConfig, lora
from llama2.lora_config import TaskType


def test_fields_of_peft_that_change_nothing_are_taken() -> None:
    """The arguments that the guides of the Llama 2 page give."""
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"],
        fan_in_fan_out=False, inference_mode=False, modules_to_save=None, init_lora_weights=True,
        layers_to_transform=None, layers_pattern=None, rank_pattern={}, alpha_pattern=None, exclude_modules=None,
        loftq_config={}, megatron_core="megatron.core", layer_replication=None, use_rslora=False,
    )  # fmt: skip
    assert config == LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, task_type=TaskType.CAUSAL_LM)
    assert hash(LoraConfig(target_modules={"v_proj", "q_proj"}).target_modules) == hash(("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bias": "some"}, "bias is 'some'; it must be one of none, all, lora_only"),
        ({"task_type": "CHAT"}, "task_type is 'CHAT'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_bias": True}, "lora_bias is True, which is not supported"),
        ({"lora_aplha": 8}, "LoraConfig has no 'lora_aplha'; did you mean lora_alpha?"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"layers_to_transform": [1], "target_modules": ".*q_proj"}, "one pattern for whole paths"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LoraConfig(**given)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj")])
def test_layers_to_transform(targets: Any) -> None:
    for layers in (1, [1]):
        model = tiny_model(torch.float32)
        lora.add_adapter(model, LoraConfig(target_modules=targets, layers_to_transform=layers))  # type: ignore[arg-type]
        paths = list(lora.layers(model))
        assert len(paths) == (7 if targets == "all-linear" else 2) and all(".layers.1." in path for path in paths)
    named = LoraConfig(layers_to_transform=(1,), layers_pattern=("layers",))
    assert named.targets("model.layers.1.self_attn.q_proj") and not named.targets("model.blocks.1.self_attn.q_proj")


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


def test_modules_that_are_trained_whole() -> None:
    model = tiny_model(torch.float32)
    lora.add_adapter(model, LoraConfig(modules_to_save=("embed_tokens", "lm_head")))
    assert trained(model) == {"model.embed_tokens.weight", "lm_head.weight"}
    with pytest.raises(InputError, match="modules_to_save names 'head', which this model does not have"):
        lora.add_adapter(tiny_model(), LoraConfig(modules_to_save=("head",)))
    classifier = LlamaForSequenceClassification(tiny_config(num_labels=3))
    lora.add_adapter(classifier, LoraConfig(task_type="SEQ_CLS"))
    assert trained(classifier) == {"score.weight"}


def test_biases() -> None:
    """peft: all biases of the model, or those of the adapted linears."""
    found = {}
    for bias in ("none", "all", "lora_only"):
        model = tiny_model(torch.float32, attention_bias=True, mlp_bias=True)
        lora.add_adapter(model, LoraConfig(bias=bias, target_modules=("q_proj",)))
        found[bias] = {name.replace(".base_layer", "") for name in trained(model)}
    assert not found["none"] and len(found["all"]) == 2 * 7
    assert found["lora_only"] == {f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)}
    model = tiny_model(torch.float32)
    lora.add_adapter(model, LoraConfig(bias="all"))
    assert not trained(model)


def test_first_values() -> None:
    torch.manual_seed(0)
    layers = {}
    for init in (True, "gaussian", False):
        model = tiny_model(torch.float32)
        lora.add_adapter(model, LoraConfig(r=16, init_lora_weights=init))
        layers[init] = lora.layers(model)["model.layers.0.self_attn.q_proj"]
    assert all(bool(layer.lora_B["default"].any()) == (init is False) for init, layer in layers.items())
    assert layers["gaussian"].lora_A["default"].std().item() == pytest.approx(1 / 16, rel=0.1)
    bound = 1 / 64**0.5  # of peft's Kaiming-uniform A with a = sqrt(5) over 64 inputs
    assert 0.9 * bound < layers[True].lora_A["default"].abs().max().item() <= bound
