"""Whatever differs from the plain network is run by torch, as written: the same tokens as runner="torch", said once."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import random_adapter, tiny_config, tiny_ids, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama2 import LlamaForCausalLM, LoraConfig, cpu, lora
from llama2.attention import ATTENTION
from llama2.layers import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from llama2.plain_network import difference
from llama2.runners.native import native_weights

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")

Undo = Callable[[], Any]


def answer(model: Any, runner: str = "auto", **settings: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(tiny_ids(2, 7), runner=runner, **settings).tolist()  # type: ignore[no-any-return]


def replaced(owner: Any, name: str, value: Any) -> Undo:
    """Sets an attribute; the result sets it back."""
    before = vars(owner).get(name, ...) if not isinstance(owner, nn.Module) else getattr(owner, name)
    own = isinstance(owner, nn.Module) and name in owner.__dict__
    setattr(owner, name, value)
    if name == "forward" and isinstance(owner, nn.Module) and not own:
        return lambda: delattr(owner, name)
    return lambda: setattr(owner, name, before)


class Steered(LlamaDecoderLayer):
    def forward(self, x_BTD: Tensor, *attention_args: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = super().forward(x_BTD, *attention_args)
        return out + 1.0, weights


class Mine(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits
        return out


def peft_linear(base: nn.Module) -> nn.Module:
    """A layer of another library that is also called Linear."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.weight, self.bias = base, base.weight, None

        def forward(self, x: Tensor) -> Tensor:
            return -self.base_layer(x)  # type: ignore[no-any-return]

    return Linear()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Subclassed(Tensor):
    """A tensor that computes its products otherwise, as torchao's do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return -out if func is F.linear else out


def stranger(model: Any) -> Undo:
    linear = model.model.layers[0].mlp.up_proj
    before = linear.weight
    del linear.weight
    linear.weight = nn.Parameter(before.detach().as_subclass(Subclassed), requires_grad=False)  # type: ignore[arg-type]

    def undo() -> None:
        del linear.weight
        linear.weight = before

    return undo


def layers_as(order: list[int]) -> Callable[[Any], Undo]:
    def change(model: Any) -> Undo:
        old = model.model.layers
        model.model.layers = nn.ModuleList(old[i] for i in order)
        return lambda: setattr(model.model, "layers", old)

    return change


def parametrized(model: Any) -> Undo:
    linear = model.model.layers[1].mlp.down_proj
    parametrize.register_parametrization(linear, "weight", Doubled())
    return lambda: parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def weight_normed(model: Any) -> Undo:
    linear = model.lm_head
    parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(torch.linspace(-1, 1, 97)[:, None])
    return lambda: parametrize.remove_parametrizations(linear, "weight")


def pruned(model: Any) -> Undo:
    linear = model.model.layers[0].self_attn.v_proj
    prune.random_unstructured(linear, "weight", amount=0.5)
    return lambda: prune.remove(linear, "weight")


def edited(name: str, value: Any) -> Callable[[Any], Undo]:
    return lambda model: replaced(model.config, name, value)


def edited_rope(model: Any) -> Undo:
    settings = model.config.rope_parameters
    before = settings["rope_theta"]
    settings["rope_theta"] = 20.0
    return lambda: settings.update(rope_theta=before)


def hooked(path: str, pre: bool = False) -> Callable[[Any], Undo]:
    def change(model: Any) -> Undo:
        module = model.get_submodule(path)
        if pre:
            return module.register_forward_pre_hook(lambda _m, args: (args[0] * -0.5, *args[1:])).remove  # type: ignore[no-any-return]

        def hook(_module: Any, _args: Any, out: Any) -> Any:
            return (out[0] * -0.5, *out[1:]) if isinstance(out, tuple) else out * -0.5

        return module.register_forward_hook(hook).remove  # type: ignore[no-any-return]

    return change


def patched(path: str) -> Callable[[Any], Undo]:
    def change(model: Any) -> Undo:
        module = model.get_submodule(path) if path else model
        forward = module.forward

        def other(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if isinstance(out, Tensor):
                return out * -0.5
            if isinstance(out, tuple):
                return (out[0] * -0.5, *out[1:])
            out["logits" if "logits" in out else "last_hidden_state"] *= -0.5
            return out

        return replaced(module, "forward", other)

    return change


def globally_hooked(model: Any) -> Undo:
    def hook(module: Any, _args: Any, out: Any) -> Any:
        return out * 0.5 if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(hook).remove  # type: ignore[no-any-return]


def class_patched(kind: Any) -> Callable[[Any], Undo]:
    def change(model: Any) -> Undo:
        forward = kind.forward
        kind.forward = lambda self, *args: (
            (out[0] * 0.5, *out[1:]) if isinstance(out := forward(self, *args), tuple) else out * 0.5
        )
        return lambda: setattr(kind, "forward", forward)

    return change


def attention_replaced(model: Any) -> Undo:
    own = ATTENTION["sdpa"]
    ATTENTION["sdpa"] = lambda q, k, v, *more: own(q * 0.1, k, v, *more)
    return lambda: ATTENTION.update(sdpa=own)


class Modes(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 0.5 if func is F.silu else out


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 0.5 if "silu" in str(func) else out


def inside(mode: Any) -> Callable[[Any], Undo]:
    def change(model: Any) -> Undo:
        stack = ExitStack()
        stack.enter_context(mode())
        return stack.close

    return change


def noisy_embedding(model: Any) -> Undo:
    return replaced(model.model.embed_tokens, "max_norm", 0.5)


def frequencies(model: Any) -> Undo:
    rope = model.model.rotary_emb
    rope.inv_freq = rope.inv_freq * 3
    return lambda: setattr(rope, "_given", None)


class HalfRope(nn.Module):
    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.own(x, position_ids // 2)


def bias(model: Any) -> Undo:
    return replaced(model, "lm_head", nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 97)))


CHANGES: dict[str, tuple[Callable[[Any], Undo], str]] = {
    "hook on a layer": (hooked("model.layers.0"), r"model\.layers\.0 has a forward hook"),
    "hook on attention": (hooked("model.layers.1.self_attn"), r"self_attn has a forward hook"),
    "hook on a linear": (hooked("model.layers.1.mlp.up_proj"), r"up_proj has a forward hook"),
    "hook on a norm": (hooked("model.norm"), r"model\.norm has a forward hook"),
    "hook on the embedding": (hooked("model.embed_tokens"), r"embed_tokens has a forward hook"),
    "hook on the head": (hooked("lm_head"), r"lm_head has a forward hook"),
    "pre-hook on a layer": (hooked("model.layers.1", True), r"model\.layers\.1 has a forward pre hook"),
    "pre-hook on a linear": (hooked("model.layers.0.self_attn.q_proj", True), r"q_proj has a forward pre hook"),
    "global hook": (globally_hooked, "global module hook"),
    "forward of the model": (patched(""), "the model's forward was replaced"),
    "forward of the decoder": (patched("model"), r"model's forward was replaced"),
    "forward of a layer": (patched("model.layers.0"), r"model\.layers\.0's forward was replaced"),
    "forward of a linear": (patched("model.layers.0.self_attn.k_proj"), r"k_proj's forward was replaced"),
    "forward of a norm": (patched("model.layers.0.input_layernorm"), r"input_layernorm's forward was replaced"),
    "forward of the embedding": (patched("model.embed_tokens"), r"embed_tokens's forward was replaced"),
    "forward of the head": (patched("lm_head"), r"lm_head's forward was replaced"),
    "forward of a class": (class_patched(LlamaRMSNorm), r"LlamaRMSNorm\.forward was replaced"),
    "forward of every linear": (class_patched(nn.Linear), r"Linear\.forward was replaced"),
    "forward of attention's class": (class_patched(LlamaAttention), r"LlamaAttention\.forward was replaced"),
    "attention function": (attention_replaced, "'sdpa' was replaced"),
    "torch's attention": (
        lambda _m: replaced(F, "scaled_dot_product_attention", lambda q, *a, **k: q * 1.0),
        "scaled_dot_product_attention was replaced",
    ),
    "norm": (lambda m: replaced(m.model, "norm", nn.Identity()), r"model\.norm is a .*Identity, not a LlamaRMSNorm"),
    "torch's norm": (lambda m: replaced(m.model, "norm", nn.RMSNorm(64)), r"model\.norm is a .*RMSNorm"),
    "mlp": (lambda m: replaced(m.model.layers[0], "mlp", nn.Identity()), r"layers\.0\.mlp is a .*Identity"),
    "head": (bias, r"lm_head is a .*Sequential"),
    "embedding": (
        lambda m: replaced(m.model, "embed_tokens", nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 64))),
        r"embed_tokens is a .*Sequential",
    ),
    "subclassed layer": (
        lambda m: replaced(m.model.layers[1], "__class__", Steered),
        r"model\.layers\.1 is a .*Steered, not a LlamaDecoderLayer",
    ),
    "subclassed model": (lambda m: replaced(m, "__class__", Mine), r"the model is a .*Mine"),
    "a linear called Linear": (
        lambda m: replaced(m.model.layers[0].mlp, "down_proj", peft_linear(m.model.layers[0].mlp.down_proj)),
        r"down_proj is a .*Linear",
    ),
    "activation": (lambda m: replaced(m.model.layers[0].mlp, "act_fn", F.gelu), r"mlp\.act_fn was replaced"),
    "activation module": (lambda m: replaced(m.model.layers[1].mlp, "act_fn", torch.tanh), r"mlp\.act_fn was replaced"),
    "epsilon": (
        lambda m: replaced(m.model.layers[0].input_layernorm, "variance_epsilon", 30.0),
        r"norm\.variance_epsilon is 30\.0, not the configuration's 1e-05",
    ),
    "scale": (
        lambda m: replaced(m.model.layers[1].self_attn, "scaling", 0.01),
        r"self_attn\.scaling is 0\.01, not the configuration's 0\.25",
    ),
    "embedding's norm": (noisy_embedding, r"embed_tokens\.max_norm"),
    "frequencies": (frequencies, r"rotary_emb\._given"),
    "rope": (lambda m: replaced(m.model, "rotary_emb", HalfRope(m.model.rotary_emb)), r"rotary_emb is a .*HalfRope"),
    "config: eps": (edited("rms_norm_eps", 1.0), r"variance_epsilon is 1e-05, not the configuration's 1.0"),
    "config: activation": (edited("hidden_act", "gelu"), r"act_fn was replaced"),
    "config: layers": (edited("num_hidden_layers", 1), r"layers has 2 layers; the configuration says 1"),
    "a layer dropped": (layers_as([0]), r"layers has 1 layers; the configuration says 2"),
    "the first layer dropped": (layers_as([1]), r"layers has 1 layers"),
    "layers reordered": (layers_as([1, 0]), r"layers\.0 is layer 1 of the model"),
    "a layer twice": (layers_as([0, 0]), r"layers\.1 is layer 0 of the model"),
    "layers repeated": (layers_as([0, 1, 0, 1]), r"layers has 4 layers"),
    "parametrised": (parametrized, r"down_proj is a .*Parametrized"),
    "weight norm": (weight_normed, r"lm_head is a .*Parametrized"),
    "pruned": (pruned, r"v_proj has a forward pre hook"),
    "tensor subclass": (stranger, r"up_proj\.weight is a .*"),
    "function mode": (inside(Modes), "function mode Modes"),
    "dispatch mode": (inside(Dispatched), "dispatch mode"),
}
OTHER_WEIGHTS = {"pruned", "weight norm", "embedding's norm"}  # after the change is undone


@contextmanager
def warned(pattern: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=f"torch runs this model, not the native engine: .*(?:{pattern})"):
        yield


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_run_by_torch(name: str) -> None:
    change, reason = CHANGES[name]
    model = tiny_model(torch.float32)
    before = answer(model)
    assert native_weights(model) is not None and before == answer(model, "torch")
    undo = change(model)
    try:
        expected = answer(model, "torch")
        assert expected == answer(model, "torch", use_cache=False)
        with warned(reason):
            assert answer(model) == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            assert answer(model) == expected
    finally:
        undo()
    assert native_weights(model) is not None, difference(model)
    assert (answer(model) == before) != (name in OTHER_WEIGHTS)
    if name not in ("config: layers", "config: eps", "config: activation"):  # torch does not read these again
        assert expected != before


@pytest.mark.parametrize("name", ["hook on a layer", "forward of the model", "a layer twice", "mlp", "rope"])
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "seed": 1}, {"prefill_chunk_size": 2}])
def test_every_way_of_decoding_sees_it(name: str, settings: dict[str, Any]) -> None:
    model = tiny_model(torch.float32)
    undo = CHANGES[name][0](model)
    with warned(""):
        assert answer(model, **settings) == answer(model, "torch", **settings)
    undo()


def test_settings_that_both_read_at_each_call() -> None:
    """An edited rope is a rope like any other: it stays native, and both follow it."""
    model = tiny_model(torch.float32)
    before = answer(model)
    undo = edited_rope(model)
    assert answer(model) == answer(model, "torch") != before
    undo()
    assert answer(model) == before


def test_what_is_plain_in_spite_of_its_looks() -> None:
    model = tiny_model(torch.float32)
    model.model.layers[0].self_attn.q_proj.register_full_backward_hook(lambda *_: None)
    model.lm_head.weight.register_hook(lambda grad: grad)
    model.enable_input_require_grads()
    model.note, model.extra = "mine", nn.Linear(2, 2)
    model.lm_head, head = nn.Linear(64, 97, bias=False), model.lm_head.weight
    model.lm_head.weight = head
    assert difference(model) == ""
    assert "backward hook" in difference(model, training=True)
    with torch.device("cpu"):
        assert answer(model) == answer(model, "torch")
    assert native_weights(model) is not None


def test_a_compiled_model_is_not_passed_over() -> None:
    model = tiny_model(torch.float32)
    model.compile(backend="eager")
    assert difference(model) == "the model is compiled"


@pytest.mark.parametrize("where", ["lora_over_a_hook", "hook_on_the_base"])
def test_a_hook_inside_an_adapted_layer(where: str) -> None:
    """The base layer's hooks run as they would without an adapter."""
    model = tiny_model(torch.float32)
    x = torch.randn(3, 64)
    linear = model.model.layers[0].self_attn.q_proj
    if where == "lora_over_a_hook":
        linear.register_forward_hook(lambda _m, _a, out: out + 1)
    random_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), 1)
    adapted = model.model.layers[0].self_attn.q_proj
    plain = adapted(x) - (1.0 if where == "lora_over_a_hook" else 0.0)
    if where == "hook_on_the_base":
        linear.register_forward_hook(lambda _m, _a, out: out + 1)
    expected = F.linear(x, linear.weight) + F.linear(x, adapted.delta("default"))
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(adapted(x), expected + 1)
    with lora.disabled(model):
        torch.testing.assert_close(adapted(x), F.linear(x, linear.weight) + 1)


def test_packed_weights_that_change_are_packed_again() -> None:
    """The engine copies packed weights: a change of theirs in place shows at the next call."""
    from llama2.quantization.int8 import Linear8bit

    model = tiny_model(torch.float32)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Linear8bit.quantize(mlp.up_proj.weight, None, None)
    before = answer(model)
    assert before == answer(model, "torch")
    mlp.up_proj.packed["SCB"].mul_(3)
    assert answer(model) == answer(model, "torch") != before


def test_pretraining_tp_and_reordered_weights_call_what_is_hooked() -> None:
    model = tiny_model(torch.float32, pretraining_tp=2)
    seen: list[str] = []
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(tiny_ids())
    assert seen == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"]


class Fetching:
    """What accelerate's offloading does to a module: no weights between calls, a forward that fetches them."""

    execution_device = "cpu"

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        self.kept = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        module._hf_hook, module.forward = self, self  # type: ignore[assignment]
        self.place(torch.device("meta"))

    def place(self, device: torch.device) -> None:
        for name, value in self.kept.items():
            self.module._parameters[name] = nn.Parameter(value.to(device), requires_grad=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.place(torch.device("cpu"))
        out = self.forward(*args, **kwargs)
        self.place(torch.device("meta"))
        return out


def test_offloaded_weights() -> None:
    model = tiny_model(torch.float32)
    before = answer(model)
    for module in list(model.modules()):
        if list(module.parameters(recurse=False)):
            Fetching(module)
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.device == torch.device("cpu")
    with warned("forward was replaced"):
        assert answer(model) == before


def test_reasons_are_of_ours() -> None:
    assert difference(nn.Linear(2, 2)).startswith("the model is a torch.nn.modules.linear.Linear")
    assert difference(tiny_model(torch.float32).model) == ""
    assert LlamaMLP(tiny_config()).act_fn is F.silu
