"""What other libraries ask of a model, with the values that transformers' models give. None of them is needed here."""

import inspect
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model

import llama2
from llama2 import InputError, LlamaForCausalLM, LoraConfig

IDS = tiny_ids(2, 8)


def greedy(model: Any, ids: torch.Tensor = IDS, **how: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **how)
    return out


def test_attributes_that_are_read() -> None:
    model = tiny_model(torch.float32)
    assert model.can_generate() and LlamaForCausalLM.can_generate()
    assert not llama2.LlamaModel.can_generate() and not llama2.LlamaForSequenceClassification.can_generate()
    assert model._no_split_modules == ["LlamaDecoderLayer"]
    assert list(LlamaForCausalLM._tied_weights_keys or ()) == ["lm_head.weight"]
    assert model.warnings_issued == {} and tiny_model(torch.float32).warnings_issued is not model.warnings_issued
    assert not model._hf_peft_config_loaded and not model.is_parallelizable
    assert not hasattr(model, "hf_device_map")


def test_tags() -> None:
    model = tiny_model(torch.float32)
    model.add_model_tags("sft")
    model.add_model_tags(["trl", "sft"])
    assert model.model_tags == ["sft", "trl"] and tiny_model(torch.float32).model_tags is None


def test_labels_of_the_signature() -> None:
    """transformers' Trainer evaluates a loss only where inputs hold every argument with "label" in its name."""
    names = [name for name in inspect.signature(LlamaForCausalLM.forward).parameters if "label" in name]
    assert names == ["labels"]
    kinds = [p.kind for p in inspect.signature(LlamaForCausalLM.forward).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD in kinds and LlamaForCausalLM.accepts_loss_kwargs
    assert not llama2.LlamaForSequenceClassification.accepts_loss_kwargs
    assert (
        LlamaForCausalLM.loss_type == "ForCausalLM"
    )  # its Trainer then counts labels[..., 1:], as its models' loss does
    assert llama2.LlamaForSequenceClassification.loss_type == "ForSequenceClassification"


def test_forward_takes_what_transformers_takes() -> None:
    model = tiny_model(torch.float32)
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, model(IDS, labels=IDS).loss)
    with pytest.raises(InputError, match="attn_mask"):
        model(IDS, attn_mask=None)


# -- prepare_inputs_for_generation: values worked out by hand ------------------------------------------------------


def test_inputs_of_the_first_step() -> None:
    model = tiny_model(torch.float32)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    inputs = model.prepare_inputs_for_generation(IDS, attention_mask=mask, use_cache=True, extra=3)
    assert (inputs["input_ids"] == IDS).all() and inputs["use_cache"] and inputs["extra"] == 3
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 4, 5], list(range(8))]


def test_inputs_of_a_later_step() -> None:
    model = tiny_model(torch.float32)
    cache = model(IDS[:, :6]).past_key_values
    mask = torch.ones_like(IDS)
    for how in ({}, {"cache_position": torch.tensor([6, 7])}, {"next_sequence_length": 2}):
        inputs = model.prepare_inputs_for_generation(IDS, past_key_values=cache, attention_mask=mask, **how)
        assert (inputs["input_ids"] == IDS[:, 6:]).all() and inputs["past_key_values"] is cache
        assert inputs["position_ids"].tolist() == [[6, 7], [6, 7]] and inputs["attention_mask"].shape == (2, 8)
    assert model.prepare_inputs_for_generation(IDS[:, :6], past_key_values=cache)["input_ids"].shape == (2, 1)


def test_embeddings_count_while_nothing_is_cached() -> None:
    model = tiny_model(torch.float32)
    embeds = model.get_input_embeddings()(IDS)
    first = model.prepare_inputs_for_generation(IDS[:, :0], inputs_embeds=embeds)
    assert first["input_ids"] is None and first["inputs_embeds"] is embeds
    cache = model(inputs_embeds=embeds).past_key_values
    later = model.prepare_inputs_for_generation(
        IDS[:, :1], inputs_embeds=embeds, past_key_values=cache, cache_position=torch.tensor([8])
    )
    assert (later["input_ids"] == IDS[:, :1]).all() and "inputs_embeds" not in later


class WithPrompt(LlamaForCausalLM):
    """Two virtual tokens before the prompt, as peft's prompt tuning puts them."""

    virtual = 2

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat((mask.new_ones((len(mask), self.virtual)), mask), 1)
        inputs["position_ids"] = None
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            embed = self.get_input_embeddings()
            before = embed(torch.tensor([[5, 9]])).expand(len(mask), -1, -1)
            inputs["inputs_embeds"] = torch.cat((before, embed(inputs.pop("input_ids"))), 1)
        return inputs


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}, {"runner": "torch"}], ids=str)
def test_generate_uses_a_replaced_method(how: dict[str, Any]) -> None:
    model = tiny_model(torch.float32)
    want = greedy(model, torch.cat((torch.tensor([[5, 9]]).expand(2, -1), IDS), 1), **{**how, "runner": "torch"})
    other = WithPrompt(tiny_config()).eval()
    other.load_state_dict(model.state_dict())
    assert (greedy(other, **how)[:, 8:] == want[:, 10:]).all()
    replaced = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda ids, **kwargs: WithPrompt.prepare_inputs_for_generation(
        other, ids, **kwargs
    )
    assert (greedy(model, **how)[:, 8:] == want[:, 10:]).all()
    model.prepare_inputs_for_generation = replaced


def test_a_replaced_method_and_the_native_engine() -> None:
    with pytest.raises(InputError, match="prepare_inputs_for_generation"):
        greedy(WithPrompt(tiny_config()).eval(), runner="native")


class WithBias(LlamaForCausalLM):
    """A forward with an argument of its own."""

    def forward(self, *args: Any, bias: torch.Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        out = super().forward(*args, **kwargs)
        if bias is not None:
            out.logits = out.logits + bias
        return out


def test_arguments_of_a_subclass_reach_its_forward() -> None:
    model = WithBias(tiny_config()).eval()
    bias = torch.zeros(97)
    bias[7] = 1e4
    assert (greedy(model, bias=bias)[:, 8:] == 7).all()
    with pytest.raises(InputError, match="bais"):
        greedy(model, bais=bias)
    with pytest.raises(InputError, match="bias"):
        greedy(tiny_model(torch.float32), bias=bias)


# -- adapters ----------------------------------------------------------------------------------------------------


def with_adapters() -> Any:
    model = tiny_model(torch.float32)
    for name, seed in (("a", 1), ("b", 2)):
        model.add_adapter(LoraConfig(r=2, target_modules=("q_proj", "up_proj")), name)
        generator = torch.Generator().manual_seed(seed)
        for layer in llama2.lora.layers(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.5, generator=generator)
    return model


@torch.no_grad()
def test_adapters_are_switched() -> None:
    model, plain = with_adapters(), tiny_model(torch.float32)(IDS).logits
    assert model.active_adapters() == ["b"] and model._hf_peft_config_loaded
    b = model(IDS).logits
    model.set_adapter("a")
    a = model(IDS).logits
    assert not torch.allclose(a, b) and not torch.allclose(a, plain)
    model.disable_adapters()
    torch.testing.assert_close(model(IDS).logits, plain)
    assert model.active_adapters() == ["a"]
    model.enable_adapters()
    torch.testing.assert_close(model(IDS).logits, a)
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"]
    model.delete_adapter(["a", "b"])
    torch.testing.assert_close(model(IDS).logits, plain)
    assert not model._hf_peft_config_loaded
    for call in (model.disable_adapters, model.enable_adapters, model.active_adapters):
        with pytest.raises(InputError, match="no adapter"):
            call()


@torch.no_grad()
def test_an_adapter_is_loaded(tmp_path: Any) -> None:
    model = with_adapters()
    llama2.checkpoint.peft.save_adapter(model, tmp_path, name="b")
    fresh = tiny_model(torch.float32)
    fresh.load_adapter(tmp_path, "c")
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for p in fresh.parameters())
    assert set(fresh.get_adapter_state_dict()) == set(model.get_adapter_state_dict("b"))
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in fresh.get_adapter_state_dict("c")
    trainable = tiny_model(torch.float32)
    trainable.load_adapter(str(tmp_path), is_trainable=True)
    assert {n.split(".")[-2] for n, p in trainable.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


class PeftConfig:
    """As peft's LoraConfig gives itself."""

    def __init__(self, **fields: Any) -> None:
        self.fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "bias": "none", **fields}

    def to_dict(self) -> dict[str, Any]:
        return self.fields


def test_configurations_of_peft() -> None:
    model = tiny_model(torch.float32)
    model.add_adapter(PeftConfig(target_modules={"v_proj"}, lora_alpha=4), "x")
    layers = llama2.lora.layers(model)
    assert set(layers) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    assert layers["model.layers.0.self_attn.v_proj"].scaling["x"] == 2.0
    with pytest.raises(InputError, match="IA3|LoraConfig"):
        model.add_adapter(PeftConfig(peft_type="IA3"), "y")
    with pytest.raises(InputError, match="alora_invocation_tokens"):
        model.add_adapter(PeftConfig(alora_invocation_tokens=[1]), "y")


# -- packed linears --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_packed_linears_are_found_and_their_codes_are_no_weight(bits: dict[str, bool], tmp_path: Any) -> None:
    """peft's "all-linear" takes nn.Linear; its merge would add floats to codes, in int8 even without an error."""
    tiny_model(torch.float32).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, **bits)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, torch.nn.Linear) and type(layer) is not torch.nn.Linear
    assert layer.weight.device.type == "cpu" and not layer.weight.is_floating_point()
    for compute in (
        lambda: layer.weight.data,
        lambda: layer.weight + 1,
        lambda: layer.weight.clone(),
        lambda: layer.weight.add_(torch.ones(1)),
        lambda: torch.nn.functional.linear(torch.ones(1, 64), layer.weight),
    ):
        with pytest.raises(InputError, match=r"dequantize\(\)"):
            compute()
    names = {name for name in model.state_dict() if "layers.0.mlp.up_proj" in name}
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert type(model.state_dict()["model.layers.0.mlp.up_proj.weight"]) is torch.Tensor
    model.dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_the_networks_linears_are_torchs_own() -> None:
    """peft's GLoRA, for one, takes torch.nn.Linear and no subclass."""
    model = tiny_model(torch.float32)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 15 and all(type(m) is torch.nn.Linear for m in linears)


def test_a_folder_of_transformers_trainer_without_a_configuration(tmp_path: Any) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(llama2.CheckpointError, match=r"save_pretrained\(folder\).*to_transformers"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "training_args.bin").unlink()
    with pytest.raises(llama2.CheckpointError, match="must hold it"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_to_transformers_shares_the_parameters(tied: bool) -> None:
    pytest.importorskip("transformers", reason="make parity installs transformers")
    model = tiny_model(torch.float64, tie_word_embeddings=tied)
    theirs = model.to_transformers()
    assert type(theirs).__module__.startswith("transformers.") and type(theirs).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)  # norms in float32
    own = dict(model.named_parameters())
    assert all(p is own[name] for name, p in theirs.named_parameters())
    with torch.no_grad():
        theirs.model.norm.weight.mul_(2)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)  # norms in float32
    model.add_adapter(LoraConfig())
    with pytest.raises(InputError, match="adapters"):
        model.to_transformers()


class Hook:
    """As accelerate's AlignDevicesHook."""

    execution_device = "cpu"


def test_the_device_of_an_offloaded_model() -> None:
    model = tiny_model(torch.float32).to("meta")
    assert model.device.type == "meta"
    model.model.norm._hf_hook = Hook()
    assert model.device == torch.device("cpu")
