"""The surface of a model that scripts for transformers use: arguments, configurations, checkpointing of layers."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from torch import nn

from llama2 import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    InputError,
    Llama2Error,
    LlamaConfig,
    LlamaForCausalLM,
)


class TheirConfig:
    """A LlamaConfig of another library: `model_type`, `to_dict`, and how attention is computed."""

    model_type = "llama"
    _attn_implementation = "eager"

    def to_dict(self) -> dict[str, Any]:
        return {**tiny_config().to_dict(), "dtype": "float64"}


def test_attention_is_that_of_the_configuration() -> None:
    """Set at construction, and read at every call, in the model and in the one inside it."""
    config = tiny_config()
    model = LlamaForCausalLM(config).eval()
    assert config._attn_implementation == model.attn_implementation == model.model.attn_implementation == "sdpa"
    model.config._attn_implementation = "eager"
    assert model.attn_implementation == model.model.attn_implementation == "eager"
    assert LlamaForCausalLM(tiny_config(attn_implementation="eager")).config._attn_implementation == "eager"
    model.set_attn_implementation(attn_implementation="sdpa")
    assert config._attn_implementation == "sdpa"


def test_attention_by_parts_of_a_model(tmp_path: Path) -> None:
    """transformers 5 takes a dict of a model's parts wherever it takes a name; "" is the model itself."""
    eager = {"": "eager"}
    tiny_model().save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=eager).attn_implementation == "eager"
    assert AutoConfig.from_pretrained(tmp_path, attn_implementation=eager)._attn_implementation == "eager"
    model = AutoModelForCausalLM.from_config(tiny_config(attn_implementation=eager))
    assert model.attn_implementation == model.config._attn_implementation == "eager"
    model.set_attn_implementation({"": "sdpa"})
    assert model.attn_implementation == "sdpa"
    with pytest.warns(UserWarning, match="'text_config', 'vision_config' too, and a Llama model has no such part"):
        model.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
    assert model.attn_implementation == "sdpa"
    model.set_attn_implementation({})
    for unknown in ("sdpaa", {"": "sdpaa"}):
        with pytest.raises(Llama2Error, match="'sdpaa'; it must be one of eager"):
            model.set_attn_implementation(unknown)
        assert model.attn_implementation == "sdpa"
        with pytest.raises(Llama2Error, match="'sdpaa'; it must be one of eager"):
            LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=unknown)


@pytest.mark.parametrize("make", [LlamaForCausalLM, LlamaForCausalLM.from_config, LlamaForCausalLM._from_config])
def test_a_configuration_of_another_library_is_read(make: Any) -> None:
    model = make(TheirConfig())
    assert type(model.config) is LlamaConfig and model.config.hidden_size == 64
    assert model.attn_implementation == "eager"
    assert AutoModelForCausalLM.from_config(TheirConfig()).dtype == torch.float64
    with pytest.raises(ValueError, match="LlamaConfig is needed but got dict"):
        make({})


def test_from_config_copies_and_takes_what_transformers_takes() -> None:
    config = tiny_config()
    model = AutoModelForCausalLM.from_config(
        config, trust_remote_code=True, code_revision=None, attn_implementation="eager", torch_dtype="float64"
    )
    assert (model.dtype, model.attn_implementation, config._attn_implementation) == (torch.float64, "eager", None)
    assert model.config is not config
    with pytest.raises(InputError, match="from_config.*'foo'"):
        AutoModelForCausalLM.from_config(config, foo=1)


QUIET = {
    "proxies": None,
    "from_tf": False,
    "from_flax": False,
    "trust_remote_code": True,
    "resume_download": None,
    "low_cpu_mem_usage": True,
    "_fast_init": False,
    "max_memory": None,
    "tp_plan": None,
    "adapter_kwargs": None,
    "use_kernels": False,
    "revision": "main",
    "mirror": None,
}
WARNS = {"tp_plan": "auto", "offload_folder": "x", "use_kernels": True, "proxies": {"https": "x"}, "device_mesh": 1}
REFUSED = {"from_tf": True, "from_flax": True, "max_memory": {0: "1GB"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(torch.float32).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", QUIET)
def test_arguments_that_ask_for_nothing(name: str, folder: Path) -> None:
    for load in (LlamaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert not hasattr(load(folder, **{name: QUIET[name]}).config, name)


@pytest.mark.parametrize("name", WARNS)
def test_arguments_without_an_effect_warn_once(name: str, folder: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        LlamaForCausalLM.from_pretrained(folder, **{name: WARNS[name]})
    assert [str(w.message).startswith(f"{name} has no effect here") for w in said] == [True]
    assert said[0].filename == __file__  # the caller's line, through every wrapper of from_pretrained


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_ask_for_the_impossible(name: str, folder: Path) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        LlamaForCausalLM.from_pretrained(folder, **{name: REFUSED[name]})


def test_configuration_and_settings_of_another_library(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, config=TheirConfig(), generation_config={"top_k": 3})
    assert type(model.config) is LlamaConfig and model.attn_implementation == "eager"
    assert model.generation_config.top_k == 3
    settings = GenerationConfig(max_new_tokens=2)
    model = LlamaForCausalLM.from_pretrained(folder, generation_config=settings)
    assert model.generate(tiny_ids(1, 3)).shape == (1, 5) and model.generation_config is not settings


def test_key_mapping_renames_tensors(folder: Path) -> None:
    """The first pattern that matches applies, as in transformers."""
    want = LlamaForCausalLM.from_pretrained(folder)
    state = {name.replace("model.layers", "blocks"): tensor for name, tensor in want.state_dict().items()}
    mapping = {r"^blocks\.(\d+)": r"model.layers.\1", "layers": "never"}
    model = LlamaForCausalLM.from_pretrained(None, config=want.config, state_dict=state, key_mapping=mapping)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), model.parameters(), strict=True))


def test_save_pretrained_takes_what_accelerate_gives(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    state = model.state_dict()
    model.save_pretrained(tmp_path, is_main_process=True, state_dict=state, push_to_hub=False, save_function=None)
    with pytest.warns(UserWarning, match="save_function has no effect here"):
        model.save_pretrained(tmp_path, save_function=torch.save)
    with pytest.raises(InputError, match="'foo'"):
        model.save_pretrained(tmp_path, foo=1)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_minus_one_and_a_wide_eps() -> None:
    """transformers' own tests set both on a configuration."""
    config = tiny_config(rms_norm_eps=1.0)
    config.pad_token_id = -1
    assert LlamaForCausalLM(config).model.embed_tokens.padding_idx is None


def test_torchscript_traces() -> None:
    """config.torchscript: tuples come out, caches too, as torch.jit.trace needs; the trace gives the same logits."""
    model, ids = tiny_model(torchscript=True), tiny_ids(2, 6)
    assert model.config.use_return_dict is False and isinstance(model(ids)[1], tuple)
    assert isinstance(model(ids, return_dict=True).logits, torch.Tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (ids, torch.ones_like(ids)))
    other = tiny_ids(2, 6, seed=5)
    assert torch.allclose(traced(other, torch.ones_like(other))[0], model(other)[0], atol=1e-12)


def test_loading_where_there_is_no_room(folder: Path) -> None:
    with torch.device("meta"), pytest.raises(RuntimeError, match="outside of that context"):
        LlamaForCausalLM.from_pretrained(folder)


# -- layers that are computed again -----------------------------------------------------------------------------------


def _recomputed(model: Any) -> list[int]:
    """Which layers run twice in one training step."""
    runs = [0] * len(model.model.layers)

    def count(module: nn.Module, *_: Any) -> None:
        runs[list(model.model.layers).index(module)] += 1

    hooks = [layer.register_forward_pre_hook(count) for layer in model.model.layers]
    ids = tiny_ids(2, 6)
    model.train()(ids, labels=ids).loss.backward()
    for hook in hooks:
        hook.remove()
    return [i for i, n in enumerate(runs) if n == 2]


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_every_n_layers(name: str, every: int, expected: list[int]) -> None:
    model = tiny_model(num_hidden_layers=5)
    getattr(model, name)(every_n_layers=every)
    assert _recomputed(model) == expected and model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert _recomputed(model) == [] and not model.is_gradient_checkpointing


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_those_without(offload: bool) -> None:
    plain, again = tiny_model(num_hidden_layers=3).train(), tiny_model(num_hidden_layers=3).train()
    again.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=2, offload=offload)
    ids = tiny_ids(2, 6)
    for model in (plain, again):
        model(ids, labels=ids).loss.backward()
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        assert isinstance(one, nn.Parameter) and torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


def test_every_n_layers_is_bounded() -> None:
    for value in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="every_n_layers"):
            tiny_model().gradient_checkpointing_enable(every_n_layers=value)  # type: ignore[arg-type]
